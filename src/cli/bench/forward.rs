//! `stunet bench forward`.

use stunet::Result;
use stunet::ops::testing;

use super::record::Layer;
use super::{Options, input, time, time_in_a_row};

/// A whole STU-Net, from a window's intensities to its labels
///
/// The last layer and the decision are one pass: the scores of the classes are never in memory. The layers' times are
/// those of one more run, on a card each with its launch and a wait. Labels stay on a card; the time with the labels on the
/// host is said beside, and that of passes that follow each other without a wait.
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
        let head = net.head()?;
        let pass = || {
            let mut cx = options.ctx(&device);
            let x = cx.leaf(x.clone());
            let features = net.features(&mut cx, x)?;
            testing::head_labels_unread(&mut cx, features, &head.weight, &head.bias)
        };
        let seconds = time(&device, runs, &[], pass)?;
        record.measured(seconds, config.macs(patch) as f64, &device);
        if !device.is_cpu() {
            let on_host = time(&device, runs, &[], || {
                let mut cx = options.ctx(&device);
                let x = cx.leaf(x.clone());
                net.labels(&mut cx, x).map(drop)
            })?;
            record.seconds_on_host = Some(on_host.median);
            record.seconds_in_a_row = Some(time_in_a_row(&device, runs, &[], pass)?.0.median);
        }
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
