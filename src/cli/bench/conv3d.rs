//! `stunet bench conv3d`.

use std::collections::BTreeMap;

use stunet::autograd::{Param, Var};
use stunet::nn::ParamSource;
use stunet::nn::RandomParams;
use stunet::ops::{Conv3d, Sources, testing};
use stunet::tensor::Precision;
use stunet::{Device, Error, Result};

use super::record::{Candidate, Layer};
use super::{Options, Seconds, input, time_in_a_row};

/// The 3x3x3 convolutions of a STU-Net, stage by stage, and how each is chosen
///
/// Every implementation that fits a layer has an estimated time; the least is chosen. A layer of two inputs, in the
/// decoder, is listed after the encoder's. The total is that of one run of every layer by its choice.
///
/// A card is given many runs of a layer before it is waited for, of which the mean is said: they all read the same input, which
/// a card's second-level cache may hold when it is small.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Time every implementation of the instruction set, not only the choice
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    options: Options,
}

/// A convolution with padding 1.
struct Shape {
    /// Channels of its one or two inputs.
    inputs: Vec<usize>,
    out: usize,
    /// (z, y, x) of the input.
    size: [usize; 3],
    stride: [usize; 3],
}

impl Args {
    pub(super) fn run(&self) -> Result<()> {
        let options = &self.options;
        let (config, device) = (options.config(), options.device.open()?);
        let (patch, runs) = (options.patch(&config)?, options.runs(5));
        let mut record = options.record("conv3d", patch, runs, &device)?;
        let (mut shapes, mut sizes) = (Vec::new(), Vec::new());
        let mut size = patch;
        for (stage, &out) in config.dims.iter().enumerate() {
            let (before, stride) = match stage {
                0 => (config.in_channels, [1; 3]),
                _ => (config.dims[stage - 1], config.strides[stage - 1]),
            };
            shapes.push(Shape { inputs: vec![before], out, size, stride });
            size = [0, 1, 2].map(|a| size[a] / stride[a]);
            shapes.push(Shape { inputs: vec![out], out, size, stride: [1; 3] });
            sizes.push(size);
        }
        for (&out, &size) in config.dims.iter().zip(&sizes).take(5).rev() {
            shapes.push(Shape { inputs: vec![out; 2], out, size, stride: [1; 3] });
        }
        let (mut total, mut macs) = (Seconds { median: 0.0, min: 0.0 }, 0.0);
        for (number, shape) in shapes.iter().enumerate() {
            let (layer, seconds) = self.layer(number, shape, runs, record.roofline_gflops * 1e9, &device)?;
            total = Seconds { median: total.median + seconds.median, min: total.min + seconds.min };
            macs += shape.macs();
            record.layers.push(layer);
        }
        record.measured(total, macs, &device);
        record.print(options.json)
    }

    fn layer(
        &self,
        number: usize,
        shape: &Shape,
        runs: u16,
        roofline: f64,
        device: &Device,
    ) -> Result<(Layer, Seconds)> {
        let options = &self.options;
        let precision = options.precision(device);
        let (w, xs) = (shape.filter(precision, device)?, shape.inputs(precision, device)?);
        let how = Conv3d { stride: shape.stride, padding: [1; 3] };
        let estimates = testing::conv3d_estimates(device, shape.dims(), &shape.inputs, &w, how, options.strict)?;
        let mut layer = Layer {
            operation: "conv3d",
            what: shape.describe(),
            implementations: Vec::with_capacity(estimates.len()),
            ..Layer::default()
        };
        let mut of_choice = None;
        for (i, e) in estimates.into_iter().enumerate() {
            let (seconds, in_a_row) = if e.chosen || self.all {
                let run = || {
                    let mut cx = options.ctx(device).storing(precision);
                    testing::conv3d(e.name, &mut cx, xs.clone(), &w, None, how).map(drop)
                };
                let (seconds, in_a_row) = time_in_a_row(device, runs, &[number, i], run)?;
                (Some(seconds), in_a_row)
            } else {
                (None, None)
            };
            if e.chosen {
                (layer.implementation, layer.in_a_row) = (e.name, in_a_row);
                of_choice = seconds;
            }
            layer.implementations.push(Candidate {
                implementation: e.name,
                strict: e.strict,
                chosen: e.chosen,
                // A multiply-add of 16 floats is 32 operations.
                estimated_seconds: e.cycles * 32.0 / roofline,
                seconds: seconds.map(|s| s.median),
                seconds_min: seconds.map(|s| s.min),
                in_a_row,
            });
        }
        let seconds = of_choice.ok_or_else(|| Error::Unsupported { what: format!("no {}", layer.what) })?;
        layer.seconds = seconds.median;
        layer.gflops = Some(shape.macs() * 2e-9 / seconds.median);
        Ok((layer, seconds))
    }
}

impl Shape {
    fn channels(&self) -> usize {
        self.inputs.iter().sum()
    }

    fn output(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| self.size[a] / self.stride[a])
    }

    fn macs(&self) -> f64 {
        (27 * self.channels() * self.out * self.output().iter().product::<usize>()) as f64
    }

    /// Of the inputs together.
    fn dims(&self) -> [usize; 5] {
        let [d, h, w] = self.size;
        [1, self.channels(), d, h, w]
    }

    /// As a traced pass says it.
    fn describe(&self) -> String {
        let by = |v: [usize; 3]| format!("{}x{}x{}", v[0], v[1], v[2]);
        let inputs: Vec<String> = self.inputs.iter().map(ToString::to_string).collect();
        let (inputs, stride, at) = (inputs.join("+"), by(self.stride), by(self.output()));
        format!("{inputs}->{} 3x3x3 stride {stride} at {at}", self.out)
    }

    fn filter(&self, precision: Precision, device: &Device) -> Result<Param> {
        let dims = [self.out, self.channels(), 3, 3, 3];
        let source = RandomParams::new(0, BTreeMap::from([("weight".to_owned(), dims.to_vec())]));
        testing::stored_filter(&source.values("weight")?, dims, precision, device)
    }

    /// One input or two, in the layout in which they pass between layers; the network's own as it arrives.
    fn inputs(&self, precision: Precision, device: &Device) -> Result<Sources> {
        let mut cx = stunet::autograd::Ctx::infer(device);
        let mut make = |channels: usize| -> Result<Var> {
            let x = input(channels, self.size, device)?;
            Ok(cx.leaf(if channels < 16 { x } else { testing::stored(x, precision)? }))
        };
        let first = make(self.inputs[0])?;
        Ok(match self.inputs.get(1) {
            Some(&second) => Sources::Two(first.into(), make(second)?.into()),
            None => first.into(),
        })
    }
}
