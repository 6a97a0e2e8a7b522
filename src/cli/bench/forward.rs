//! `stunet bench forward`.

use stunet::Result;

use super::record::Layer;
use super::{Options, input, time};

/// A whole STU-Net, from a window's intensities to its labels
///
/// The last layer and the decision are one pass: the scores of the classes are never in memory. The layers' times are
/// those of one more run.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    options: Options,
}

impl Args {
    pub(super) fn run(&self) -> Result<()> {
        let options = &self.options;
        let (config, device) = (options.config(), options.device.open()?);
        let (patch, runs) = (options.patch(&config)?, options.runs(5));
        let precision = options.precision(&device);
        let net = device.install(|| config.build_random_with(&device, 0, precision))?;
        let mut record = options.record("forward", patch, runs, &device)?;
        let x = input(config.in_channels, patch, &device)?;
        let seconds = time(&device, runs, &[], || {
            let mut cx = options.ctx(&device);
            let x = cx.leaf(x.clone());
            net.labels(&mut cx, x).map(drop)
        })?;
        record.measured(seconds, config.macs(patch) as f64, &device);
        record.layers = device.install(|| {
            // The same memory as the timed runs.
            device.planned(&[], || -> Result<_> {
                let mut cx = options.ctx(&device).traced();
                let x = cx.leaf(x.clone());
                net.labels(&mut cx, x)?;
                Ok(cx.steps().iter().map(Layer::from).collect())
            })
        })?;
        record.print(options.json)
    }
}
