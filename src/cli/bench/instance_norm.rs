//! `stunet bench instance-norm`.

use stunet::Result;
use stunet::ops::{self, InstanceNorm, testing};

use super::record::Layer;
use super::{Options, Seconds, input, time_in_a_row};

/// Instance normalisation with leaky ReLU alone, at the size of every stage
///
/// From a stored activation to another one: statistics, then normalised values. Networks do less, as convolutions take the
/// statistics of what they write and normalise what they read. Bytes are counted as read twice and written once; the share
/// is of what a card's memory reaches with a copy, and is above 1 where its second-level cache holds them. A card is given
/// many runs before it is waited for, of which the mean is said.
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
        let mut record = options.record("instance-norm", patch, runs, &device)?;
        let precision = options.precision(&device);
        let how = InstanceNorm { eps: 1e-5, slope: Some(0.01) };
        let (mut total, mut size) = (Seconds { median: 0.0, min: 0.0 }, patch);
        for (stage, &channels) in config.dims.iter().enumerate() {
            if stage > 0 {
                size = [0, 1, 2].map(|a| size[a] / config.strides[stage - 1][a]);
            }
            let x = testing::stored(input(channels, size, &device)?, precision)?;
            let [weight, bias] = [1.0, 0.0].map(|v| testing::vector(&vec![v; channels], &device));
            let (weight, bias) = (weight?, bias?);
            let run = || {
                let mut cx = options.ctx(&device).storing(precision);
                // A second owner has it, so that it is not overwritten.
                let x = cx.leaf(x.clone());
                ops::instance_norm(&mut cx, x, &weight, &bias, None, how).map(drop)
            };
            let (seconds, in_a_row) = time_in_a_row(&device, runs, &[stage], run)?;
            total = Seconds { median: total.median + seconds.median, min: total.min + seconds.min };
            let bytes = 3 * precision.size() * channels * size.iter().product::<usize>();
            record.layers.push(Layer {
                operation: "instance_norm",
                what: format!("{channels} at {}x{}x{}", size[0], size[1], size[2]),
                implementation: if device.is_cpu() { device.isa().name() } else { "instance_norm" },
                seconds: seconds.median,
                gb_per_second: Some(bytes as f64 * 1e-9 / seconds.median),
                in_a_row,
                ..Layer::default()
            });
        }
        // Nothing is multiplied that a roofline knows.
        record.measured(total, 0.0, &device);
        record.print(options.json)
    }
}
