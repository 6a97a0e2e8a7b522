//! `stunet bench predict`.

use stunet::io::{Geometry, Image};
use stunet::{PredictOptions, Predictor, Result};

use super::super::args::step_size;
use super::record::{Layer, Prediction};
use super::{Options, Seconds, input, values};

/// Voxel distance of the image and of the network, in mm.
const SPACING: [f64; 3] = [1.5; 3];

/// A whole prediction: from an image in memory to its labels
///
/// By nnU-Net v2's rules, at the network's own spacing. The layers' times are those of one more window.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Voxels of the image along z, y and x
    #[arg(long, num_args = 3, value_names = ["Z", "Y", "X"], default_values_t = [224, 202, 244],
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    shape: Vec<u16>,
    /// Distance of neighbouring windows as a fraction of the window
    #[arg(long, value_name = "0..1", default_value = "0.5", value_parser = step_size)]
    step_size: f64,
    /// Mirror every window along all axes: eight passes
    #[arg(long)]
    tta: bool,
    #[command(flatten)]
    options: Options,
}

impl Args {
    pub(super) fn run(&self) -> Result<()> {
        let options = &self.options;
        let (config, device) = (options.config(), options.device.open()?);
        let (patch, runs) = (options.patch(&config)?, options.runs(1));
        let wanted = PredictOptions::default().step_size(self.step_size).mirroring(self.tta).strict(options.strict);
        wanted.check_step_size(&patch)?;
        let shape = [0, 1, 2].map(|a| usize::from(self.shape[a]));
        let mut record = options.record("predict", patch, runs, &device)?;
        let precision = options.precision(&device);
        let net = device.install(|| config.build_random_with(&device, 0, precision))?;
        // Filters are transformed in the first run, which is not counted.
        let mut cx = options.ctx(&device);
        let x = cx.leaf(input(config.in_channels, patch, &device)?);
        device.install(|| net.features(&mut cx, x).map(drop))?;
        drop(cx);
        let mut cx = options.ctx(&device).traced();
        let x = cx.leaf(input(config.in_channels, patch, &device)?);
        device.install(|| net.features(&mut cx, x).map(drop))?;
        record.layers = cx.steps().iter().map(Layer::from).collect();
        drop(cx);
        let mut predictor = Predictor::stand_in(net, patch, SPACING, &device)?.options(wanted);
        let voxels = shape.iter().product::<usize>();
        let image = Image::new(vec![values(voxels); config.in_channels], Geometry::new(shape, SPACING))?;
        let mut reports = Vec::with_capacity(usize::from(runs));
        for _ in 0..runs {
            let report = predictor.predict_with(&image, &mut ())?.report;
            reports.push((report.seconds.iter().map(|(_, s)| s).sum::<f64>(), report));
        }
        reports.sort_by(|a, b| a.0.total_cmp(&b.0));
        let seconds = Seconds::of(reports.iter().map(|r| r.0).collect());
        let (_, median) = reports.swap_remove(reports.len() / 2);
        let passes = median.tiles * if self.tta { 8 } else { 1 };
        let head = (config.dims[0] * config.classes) as f64;
        let of_window = config.macs(patch) as f64 - head * patch.iter().product::<usize>() as f64;
        record.measured(seconds, passes as f64 * of_window + head * voxels as f64, &device);
        let network = median.seconds.iter().find(|(stage, _)| stage == "network").map_or(0.0, |(_, s)| *s);
        record.prediction = Some(Prediction {
            shape,
            step_size: self.step_size,
            mirroring: self.tta,
            windows: median.tiles,
            passes,
            seconds_per_window: network / median.tiles.max(1) as f64,
            seconds_per_stage: median.seconds.into_iter().map(|(stage, s)| (stage, s.into())).collect(),
        });
        record.print(options.json)
    }
}
