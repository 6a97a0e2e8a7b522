//! `stunet bench`.

mod conv3d;
mod export;
mod forward;
mod instance_norm;
mod predict;
mod record;
mod train_step;
mod volume;

use std::time::Instant;

use clap::{Subcommand, ValueEnum};
use stunet::autograd::Ctx;
use stunet::models::StuNetConfig;
use stunet::ops::testing;
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Error, Precision, Result};

use self::record::Record;
use super::args::{DeviceArgs, PrecisionChoice};

/// Time a layer, a network, a training step or a whole prediction with random weights on this machine
///
/// Rates are effective: the multiplications and additions of plain convolutions, divided by the time. Winograd's
/// algorithm does fewer, so that the share of the roofline, which is what this machine reaches with multiply-additions in
/// registers, can be above 1. On a GPU these are products of matrices by mma.sync, beyond which Hopper has a faster unit; what
/// its memory reaches with a copy is given beside. What a card is given is on it already; forward says what labels on the host
/// cost beside. With --json the last line is one JSON object.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet bench conv3d --model base --patch 96 160 128 --all
  stunet bench forward --model base --runs 3 --json
  stunet bench forward --strict --isa avx2 --threads 1
  stunet bench instance-norm --device cuda
  stunet bench train-step --patch 64 --batch 2
  stunet bench predict --shape 224 202 244 --json
  stunet bench export --classes 105
  stunet bench volume organs.nii.gz --label 5")]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Conv3d(conv3d::Args),
    Forward(forward::Args),
    InstanceNorm(instance_norm::Args),
    TrainStep(train_step::Args),
    Predict(predict::Args),
    Export(export::Args),
    Volume(volume::Args),
}

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Conv3d(a) => a.run(),
        What::Forward(a) => a.run(),
        What::InstanceNorm(a) => a.run(),
        What::TrainStep(a) => a.run(),
        What::Predict(a) => a.run(),
        What::Export(a) => a.run(),
        What::Volume(a) => a.run(),
    }
}

/// What all that run a network or parts of it share.
#[derive(Debug, clap::Args)]
struct Options {
    /// Size of the network
    #[arg(long, value_enum, default_value = "small")]
    model: Size,
    /// Window in voxels: one number, or three along z, y and x; multiples of 32
    #[arg(long, value_name = "N", num_args = 1..=3, default_value = "128",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    patch: Vec<u16>,
    /// Input channels
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    channels: u16,
    /// Classes, background included
    #[arg(long, value_name = "N", default_value_t = 105, value_parser = clap::value_parser!(u16).range(2..=4096))]
    classes: u16,
    /// How filters and activations are stored; arithmetic is in f32 [default: f32, on a GPU bf16 or f16]
    #[arg(long, value_enum)]
    precision: Option<PrecisionChoice>,
    /// Only kernels as accurate as plain summation
    #[arg(long)]
    strict: bool,
    /// Timed repetitions, after some that are not counted [default: 5, of predict 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: Option<u16>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Size {
    Small,
    Base,
    Large,
    Huge,
}

/// The name of a value as it is typed.
fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
}

impl Options {
    fn config(&self) -> StuNetConfig {
        let make = match self.model {
            Size::Small => StuNetConfig::small,
            Size::Base => StuNetConfig::base,
            Size::Large => StuNetConfig::large,
            Size::Huge => StuNetConfig::huge,
        };
        make(usize::from(self.channels), usize::from(self.classes))
    }

    fn patch(&self, config: &StuNetConfig) -> Result<[usize; 3]> {
        let patch = match self.patch[..] {
            [n] => [n; 3],
            [z, y, x] => [z, y, x],
            _ => return Err(Error::Usage { what: "--patch takes one number, or three along z, y and x".into() }),
        };
        let (patch, divisor) = (patch.map(usize::from), config.divisor());
        if (0..3).any(|a| !patch[a].is_multiple_of(divisor[a])) {
            let what =
                format!("--patch {patch:?}: expected multiples of {divisor:?}, which the network's strides divide");
            return Err(Error::Usage { what });
        }
        Ok(patch)
    }

    fn precision(&self, device: &Device) -> Precision {
        self.precision.map_or_else(|| device.precision(), Into::into)
    }

    fn runs(&self, default: u16) -> u16 {
        self.runs.unwrap_or(default)
    }

    /// A record that knows all but the measurements.
    fn record(&self, command: &'static str, patch: [usize; 3], runs: u16, device: &Device) -> Result<Record> {
        let precision = self.precision(device);
        let (roofline, memory) = roofline(device, precision)?;
        Ok(Record {
            command,
            version: env!("CARGO_PKG_VERSION"),
            model: name(&self.model),
            patch,
            channels: self.channels,
            classes: self.classes,
            precision: precision.name().into(),
            strict: self.strict,
            device: device.name(),
            threads: device.threads(),
            isa: device.isa().name(),
            runs,
            roofline_gflops: roofline * 1e-9,
            memory_gb_per_second: memory.map(|bytes| bytes * 1e-9),
            ..Record::default()
        })
    }

    fn ctx<'m>(&self, device: &Device) -> Ctx<'m> {
        Ctx::infer(device).strict(self.strict)
    }
}

/// Median and least.
#[derive(Debug, Clone, Copy)]
struct Seconds {
    median: f64,
    min: f64,
}

impl Seconds {
    fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        Self { median: seconds[seconds.len() / 2], min: seconds[0] }
    }
}

/// Seconds of `runs` calls, each until a card has done its work, after two that are not counted. Calls of the same `key` ask
/// for the same tensors.
fn time(device: &Device, runs: u16, key: &[usize], mut f: impl FnMut() -> Result<()> + Send) -> Result<Seconds> {
    let mut seconds = Vec::with_capacity(usize::from(runs));
    device.install(|| -> Result<()> {
        // One to learn which memory it takes, one to touch that memory.
        for _ in 0..2 {
            device.planned(key, &mut f)?;
        }
        for _ in 0..runs {
            let begin = Instant::now();
            device.planned(key, &mut f)?;
            device.synchronize()?;
            seconds.push(begin.elapsed().as_secs_f64());
        }
        Ok(())
    })?;
    Ok(Seconds::of(seconds))
}

/// Of [`time_in_a_row`]: seconds that one of its passes takes about, calls that it has at most, and passes between two waits.
const PASS: f64 = 1e-3;
const MOST_CALLS: f64 = 200.0;
const PASSES: usize = 4;

/// As [`time`]; on a card the mean of calls that are issued one after the other before it is waited for, and how many they
/// are: a short call alone would be measured with its launch and the wait.
fn time_in_a_row(
    device: &Device,
    runs: u16,
    key: &[usize],
    mut f: impl FnMut() -> Result<()> + Send,
) -> Result<(Seconds, Option<usize>)> {
    if device.is_cpu() {
        return Ok((time(device, runs, key, f)?, None));
    }
    let calls = (PASS / time(device, 3, key, &mut f)?.min).clamp(1.0, MOST_CALLS) as usize;
    let mut seconds = Vec::with_capacity(usize::from(runs));
    // Another computation than a single call.
    let key = [key, &[calls]].concat();
    let mut passes = || (0..PASSES).try_for_each(|_| device.planned(&key, || (0..calls).try_for_each(|_| f())));
    device.install(|| -> Result<()> {
        passes()?;
        for _ in 0..runs {
            device.synchronize()?;
            let begin = Instant::now();
            // The first is issued launch by launch. The others, which find the card busy, are graphs, if any are made.
            passes()?;
            device.synchronize()?;
            seconds.push(begin.elapsed().as_secs_f64() / (PASSES * calls) as f64);
        }
        Ok(())
    })?;
    Ok((Seconds::of(seconds), Some(PASSES * calls)))
}

/// Operations per second in registers: the best of some milliseconds at a time; and of a card bytes per second of a copy in
/// its memory.
fn roofline(device: &Device, precision: Precision) -> Result<(f64, Option<f64>)> {
    if !device.is_cpu() {
        let (operations, bytes) = testing::peaks(device, precision)?;
        return Ok((operations, Some(bytes)));
    }
    let rate = |_| {
        let begin = Instant::now();
        testing::spin(device) / begin.elapsed().as_secs_f64()
    };
    Ok(((0..20).map(rate).fold(0.0, f64::max), None))
}

/// Values of both signs, the same each time.
fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 % 1021) as f32 / 510.0 - 1.0).collect()
}

/// An image or activation of [`values`].
fn input(channels: usize, [d, h, w]: [usize; 3], device: &Device) -> Result<Tensor> {
    Tensor::from_host(&values(channels * d * h * w), Dims::from([1, channels, d, h, w]), device)
}
