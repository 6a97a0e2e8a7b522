//! `stunet info`.

use stunet::tensor::cuda_status;
use stunet::{Device, Isa, Result};

use super::{output, system};

/// Show the processor, threads, memory, and the GPU or why it is not used
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet info
  stunet info --json")]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let device = Device::cpu();
    let cuda = cuda_status().reason();
    let features: Vec<&str> = Isa::available().iter().map(|i| i.name()).collect();
    let memory = system::memory_bytes();
    if args.json {
        let json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "architecture": std::env::consts::ARCH,
            "system": std::env::consts::OS,
            "processor": system::processor(),
            "instruction_sets": features,
            "instruction_set": device.isa().name(),
            "threads": device.threads(),
            "memory_bytes": memory.map(|m| m.0),
            "memory_available_bytes": memory.map(|m| m.1),
            "transparent_huge_pages": system::huge_pages(),
            "cuda": { "usable": Device::cuda(0).is_ok(), "status": cuda },
        });
        return output::line(format!("{json:#}"));
    }
    let unknown = || "unknown".to_owned();
    output::line(format!("stunet          {}", env!("CARGO_PKG_VERSION")))?;
    output::line(format!("system          {} {}", std::env::consts::OS, std::env::consts::ARCH))?;
    output::line(format!("processor       {}", system::processor().unwrap_or_else(unknown)))?;
    output::line(format!("kernels         {} (of {})", device.isa().name(), features.join(", ")))?;
    output::line(format!("threads         {}", device.threads()))?;
    let memory = memory.map(|(all, free)| format!("{}, {} available", system::human(all), system::human(free)));
    output::line(format!("memory          {}", memory.unwrap_or_else(unknown)))?;
    output::line(format!("huge pages      {}", system::huge_pages().unwrap_or_else(unknown)))?;
    output::line(format!("cuda            {cuda}"))
}
