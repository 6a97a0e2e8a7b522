//! Options that several commands share, and the forms of their values.

use std::str::FromStr;

use clap::ValueEnum;
use stunet::nnunet::model::{Folds, ModelOptions};
use stunet::{Device, Error, Isa, Precision, Result};

/// Which networks of a model.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct ModelArgs {
    /// Folds whose networks are used: 0 1 .. or all [default: every one found]
    #[arg(short, long, value_name = "FOLD", num_args = 1.., value_parser = fold, help_heading = "Model")]
    folds: Vec<String>,
    /// Checkpoint in each fold [-chk] [default: the final one]
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    checkpoint: Option<String>,
}

impl ModelArgs {
    /// What to open.
    pub(super) fn options(&self) -> ModelOptions {
        let mut options = ModelOptions::new();
        if !self.folds.is_empty() {
            options = options.folds(Folds::Named(self.folds.clone()));
        }
        match &self.checkpoint {
            Some(name) => options.checkpoint(name),
            None => options,
        }
    }
}

fn fold(s: &str) -> Result<String, String> {
    let number = !s.is_empty() && s.len() < 4 && s.bytes().all(|b| b.is_ascii_digit());
    if number || s == "all" { Ok(s.into()) } else { Err("expected a number such as 0, or all".into()) }
}

/// Where to compute.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct DeviceArgs {
    /// auto, cpu, cuda or cuda:N; auto is the processor in this version
    #[arg(long, default_value = "auto", value_name = "DEVICE", help_heading = "Where to compute")]
    device: DeviceChoice,
    /// CPU threads, also beside a GPU [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024),
          help_heading = "Where to compute")]
    threads: Option<u16>,
    /// Instruction set of the CPU kernels [default: the best there is]
    #[arg(long, value_enum, help_heading = "Where to compute")]
    isa: Option<IsaChoice>,
}

impl DeviceArgs {
    /// The device asked for.
    pub(super) fn open(&self) -> Result<Device> {
        let cpu = || {
            let isa = self.isa.map_or_else(Isa::detect, Into::into);
            Device::cpu_with(self.threads.map(usize::from), isa)
        };
        match self.device {
            DeviceChoice::Cpu => cpu(),
            DeviceChoice::Cuda(_) if self.isa.is_some() => {
                Err(Error::Usage { what: "--isa is for the processor, not for --device cuda".into() })
            }
            DeviceChoice::Cuda(n) => Device::cuda_with(n, self.threads.map(usize::from)),
            // No card unasked as long as the kernels have run on an interpreter only.
            DeviceChoice::Auto => cpu(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum DeviceChoice {
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once(':') {
            None if s == "auto" => Ok(Self::Auto),
            None if s == "cpu" => Ok(Self::Cpu),
            None if s == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", n)) if n.parse::<u16>().is_ok() => Ok(Self::Cuda(n.parse().unwrap_or_default())),
            _ => Err("expected auto, cpu, cuda or cuda:N".into()),
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum IsaChoice {
    Scalar,
    Avx2,
    Avx512,
}

impl From<IsaChoice> for Isa {
    fn from(c: IsaChoice) -> Self {
        match c {
            IsaChoice::Scalar => Isa::Scalar,
            IsaChoice::Avx2 => Isa::Avx2,
            IsaChoice::Avx512 => Isa::Avx512,
        }
    }
}

/// How weights and activations are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PrecisionChoice {
    F32,
    Bf16,
    /// For computing, cards only
    F16,
}

impl From<PrecisionChoice> for Precision {
    fn from(c: PrecisionChoice) -> Self {
        match c {
            PrecisionChoice::F32 => Precision::F32,
            PrecisionChoice::Bf16 => Precision::Bf16,
            PrecisionChoice::F16 => Precision::F16,
        }
    }
}

/// A size in bytes: `4GiB`, `500MB`, `2G` (of 1024) or a plain number.
pub(super) fn bytes(s: &str) -> Result<usize, String> {
    let expected = || "expected a size like 4GiB, 500MB or a number of bytes".to_owned();
    let digits = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, unit) = s.split_at(digits);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        _ => return Err(expected()),
    };
    let value = number.parse::<f64>().map_err(|_| expected())? * factor;
    // Casting a float saturates; a limit beyond what a pointer can reach is a slip of the pen.
    if (1.0..9e18).contains(&value) { Ok(value as usize) } else { Err(expected()) }
}

/// A fraction of the patch: more than 0, at most 1.
pub(super) fn step_size(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(v) if v > 0.0 && v <= 1.0 => Ok(v),
        _ => Err("expected a number above 0 and up to 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes("4GiB"), Ok(4 << 30));
        assert_eq!(bytes("1.5k"), Ok(1536));
        assert_eq!(bytes("500MB"), Ok(500_000_000));
        assert_eq!(bytes("123"), Ok(123));
        for bad in ["", "GiB", "4 apples", "-1", "0", "1e400", "nan", "999999999TiB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn devices() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cpu:0", "mps"] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }
}
