//! `stunet bench`.

use std::time::Instant;

use clap::{Subcommand, ValueEnum};
use serde::Serialize;
use stunet::autograd::Ctx;
use stunet::models::{RandomParams, StuNetConfig};
use stunet::nn::{Conv3d, Module};
use stunet::nnunet::predict::labels_from_scores;
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Error, Result};

use super::args::DeviceArgs;
use super::{output, system};

/// Time a layer or a whole network with random weights on this machine
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet bench conv3d --threads 1
  stunet bench forward --model base --runs 3 --json
  stunet bench export --classes 105")]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The 3x3x3 convolutions of a STU-Net, stage by stage
    Conv3d(Options),
    /// A whole STU-Net, without its last 1x1x1 layer
    Forward(Options),
    /// From scores on the network's grid to labels on the image's
    Export(Export),
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Size of the network
    #[arg(long, value_enum, default_value = "small")]
    model: Size,
    /// Window in voxels per axis, a multiple of 32
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = patch)]
    patch: usize,
    /// Input channels
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    channels: u16,
    /// Classes, background included
    #[arg(long, value_name = "N", default_value_t = 105, value_parser = clap::value_parser!(u16).range(2..=4096))]
    classes: u16,
    /// Timed repetitions, after two that are not counted
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Debug, clap::Args)]
struct Export {
    /// Voxels of the scores along z, y and x
    #[arg(long, num_args = 3, value_names = ["Z", "Y", "X"], default_values_t = [224, 202, 244])]
    from: Vec<usize>,
    /// Voxels of the image along z, y and x
    #[arg(long, num_args = 3, value_names = ["Z", "Y", "X"], default_values_t = [112, 101, 122])]
    to: Vec<usize>,
    /// Classes, background included
    #[arg(long, value_name = "N", default_value_t = 105, value_parser = clap::value_parser!(u16).range(2..=4096))]
    classes: u16,
    /// Timed repetitions, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: u16,
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

fn patch(s: &str) -> Result<usize, String> {
    match s.parse() {
        Ok(n) if n > 0 && n <= 1024 && n % 32 == 0 => Ok(n),
        _ => Err("expected a multiple of 32, up to 1024".into()),
    }
}

/// One thing timed.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    min_ms: f64,
    median_ms: f64,
    /// Of the fastest run; a multiply-accumulate counts as two operations.
    gflops_per_second: f64,
    /// Most bytes held by tensors, parameters included.
    peak_tensor_bytes: usize,
}

#[derive(Debug, Serialize)]
struct Table {
    version: &'static str,
    device: String,
    instruction_set: &'static str,
    threads: usize,
    patch: usize,
    runs: u16,
    rows: Vec<Row>,
    peak_process_bytes: Option<u64>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let options = match &args.what {
        What::Conv3d(options) | What::Forward(options) => options,
        What::Export(e) => return e.run(),
    };
    let device = options.device.open()?;
    let config = options.config();
    let rows = match args.what {
        What::Conv3d(_) => options.layers(&config)?,
        What::Forward(_) | What::Export(_) => vec![options.network(&config, &device)?],
    };
    let table = Table {
        version: env!("CARGO_PKG_VERSION"),
        device: device.name(),
        instruction_set: device.isa().name(),
        threads: device.threads(),
        patch: options.patch,
        runs: options.runs,
        rows,
        peak_process_bytes: system::peak_process_bytes(),
    };
    if options.json {
        let json = serde_json::to_value(&table).map_err(|e| Error::Unsupported { what: e.to_string() })?;
        return output::line(format!("{json:#}"));
    }
    let peak = table.peak_process_bytes.map(|b| format!(", process peak {}", system::human(b))).unwrap_or_default();
    output::line(format!("{} {}, {} threads{peak}", table.device, table.instruction_set, table.threads))?;
    output::line(format!("{:<30} {:>10} {:>10} {:>9} {:>12}", "", "min ms", "median ms", "GFLOP/s", "tensors"))?;
    table.rows.iter().try_for_each(|r| {
        let memory = system::human(r.peak_tensor_bytes as u64);
        let numbers = format!("{:>10.2} {:>10.2} {:>9.1} {memory:>12}", r.min_ms, r.median_ms, r.gflops_per_second);
        output::line(format!("{:<30} {numbers}", r.name))
    })
}

impl Export {
    fn run(&self) -> Result<()> {
        let device = self.device.open()?;
        let grid = |v: &[usize]| <[usize; 3]>::try_from(v).map_err(|_| Error::Usage { what: "three sizes".into() });
        let (from, to, classes) = (grid(&self.from)?, grid(&self.to)?, usize::from(self.classes));
        if from.iter().chain(&to).any(|d| !(1..=4096).contains(d)) {
            return Err(Error::Usage { what: "sizes of --from and --to must lie in 1 to 4096".into() });
        }
        let n = classes * from.iter().product::<usize>();
        let scores: Vec<f32> = (0..n).map(|i| (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32).collect();
        let mut seconds = Vec::new();
        for run in 0..=self.runs {
            let begin = Instant::now();
            labels_from_scores(&scores, classes, from, to, &device)?;
            if run > 0 {
                seconds.push(begin.elapsed().as_secs_f64());
            }
        }
        seconds.sort_by(f64::total_cmp);
        let peak = system::peak_process_bytes().map(|b| b.saturating_sub(4 * n as u64)).map(system::human);
        let peak = peak.map(|p| format!(", {p} above the scores")).unwrap_or_default();
        let (min, median) = (seconds[0], seconds[seconds.len() / 2]);
        output::line(format!("{classes} classes, {from:?} to {to:?}: min {min:.3} s, median {median:.3} s{peak}"))
    }
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

    fn network(&self, config: &StuNetConfig, device: &Device) -> Result<Row> {
        let patch = [self.patch; 3];
        let net = config.build_random(device, 0)?;
        let x = input(config.in_channels, patch, device)?;
        let head = config.dims[0] * config.classes * patch.iter().product::<usize>();
        let name = format!("{:?} {}^3 {} classes", self.model, self.patch, config.classes).to_lowercase();
        self.time(name, config.macs(patch) - head as u64, device, || {
            let mut cx = Ctx::infer(device);
            let x = cx.leaf(x.clone());
            net.features(&mut cx, x).map(drop)
        })
    }

    fn layers(&self, config: &StuNetConfig) -> Result<Vec<Row>> {
        let mut size = self.patch;
        let mut rows = Vec::new();
        for (stage, &channels) in config.dims.iter().enumerate() {
            let before = if stage == 0 { config.in_channels } else { config.dims[stage - 1] };
            let stride = if stage == 0 { 1 } else { config.strides[stage - 1][0] };
            rows.push(self.layer([before, channels], size, stride)?);
            size /= stride;
            rows.push(self.layer([channels, channels], size, 1)?);
        }
        Ok(rows)
    }

    fn layer(&self, [from, to]: [usize; 2], size: usize, stride: usize) -> Result<Row> {
        // A device of its own, so that its peak of memory is this layer's.
        let device = &self.device.open()?;
        let dims = [to, from, 3, 3, 3];
        let shapes = [("layer.weight", dims.to_vec()), ("layer.bias", vec![to])].map(|(n, s)| (n.to_owned(), s));
        let source = RandomParams::new(0, shapes.into());
        let layer = Conv3d::load(&source, "layer", to, from, [3; 3], [stride; 3], device)?;
        let x = input(from, [size; 3], device)?;
        let macs = dims.iter().product::<usize>() * (size / stride).pow(3);
        let name = format!("{from:>4} -> {to:>4}  {size:>3}^3  stride {stride}");
        self.time(name, macs as u64, device, || {
            let mut cx = Ctx::infer(device);
            let x = cx.leaf(x.clone());
            layer.forward(&mut cx, x).map(drop)
        })
    }

    fn time(&self, name: String, macs: u64, device: &Device, mut f: impl FnMut() -> Result<()> + Send) -> Result<Row> {
        let mut seconds = Vec::with_capacity(usize::from(self.runs));
        device.install(|| -> Result<()> {
            // One to learn which memory it takes, one to touch that memory.
            for _ in 0..2 {
                device.planned(&[], &mut f)?;
            }
            for _ in 0..self.runs {
                let begin = Instant::now();
                device.planned(&[], &mut f)?;
                seconds.push(begin.elapsed().as_secs_f64());
            }
            Ok(())
        })?;
        seconds.sort_by(f64::total_cmp);
        let (min, median) = (seconds[0], seconds[seconds.len() / 2]);
        Ok(Row {
            name,
            min_ms: min * 1e3,
            median_ms: median * 1e3,
            gflops_per_second: macs as f64 * 2e-9 / min,
            peak_tensor_bytes: device.memory().peak,
        })
    }
}

/// Values of both signs, the same each time.
fn input(channels: usize, [d, h, w]: [usize; 3], device: &Device) -> Result<Tensor> {
    let n = channels * d * h * w;
    let values: Vec<f32> = (0..n).map(|i| (i * 7919 % 1021) as f32 / 510.0 - 1.0).collect();
    Tensor::from_host(&values, Dims::from([1, channels, d, h, w]), device)
}
