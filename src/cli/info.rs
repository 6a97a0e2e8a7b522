//! `stunet info`.

use stunet::tensor::{CudaStatus, cuda_status};
use stunet::{Device, Isa, Result};

use super::{output, system};

/// Show the processor, threads, memory, and the GPUs or why there is none
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

/// What the driver found: number, name, and whether it can be used.
fn cards() -> Vec<(usize, String, Result<Device>)> {
    let CudaStatus::Found { devices, .. } = cuda_status() else { return Vec::new() };
    devices.into_iter().enumerate().map(|(i, name)| (i, name, Device::cuda(i))).collect()
}

fn card_json((i, name, device): &(usize, String, Result<Device>)) -> serde_json::Value {
    let device_name = format!("cuda:{i}");
    match device {
        Ok(d) => serde_json::json!({
            "device": device_name,
            "name": name,
            "usable": true,
            "compute_capability": d.compute_capability(),
            "memory_bytes": d.total_memory(),
            "precision": d.precision().name(),
        }),
        Err(e) => serde_json::json!({ "device": device_name, "name": name, "usable": false, "reason": e.to_string() }),
    }
}

fn card_line((i, name, device): &(usize, String, Result<Device>)) -> String {
    let what = match device {
        Ok(d) => {
            let [major, minor] = d.compute_capability().unwrap_or_default();
            let memory = system::human(d.total_memory().unwrap_or_default() as u64);
            let precision = d.precision().name();
            format!("{name}, compute capability {major}.{minor}, {memory}, networks in {precision}")
        }
        Err(e) => {
            let e = e.to_string();
            e.split_once(&format!("cuda:{i} ")).map_or(e.clone(), |(_, what)| what.to_owned())
        }
    };
    format!("{:<15} {what}", format!("cuda:{i}"))
}

pub(super) fn run(args: &Args) -> Result<()> {
    let device = Device::cpu();
    let (cuda, cards) = (cuda_status(), cards());
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
            // What 'auto' takes.
            "device": Device::best().name(),
            "cuda": {
                "usable": cards.iter().any(|(_, _, d)| d.is_ok()),
                "status": cuda.reason(),
                "cards": cards.iter().map(card_json).collect::<Vec<_>>(),
            },
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
    output::line(format!("cuda            {}", cuda.reason()))?;
    cards.iter().try_for_each(|c| output::line(card_line(c)))?;
    output::line(format!("device          {} unless --device says otherwise", Device::best().name()))
}
