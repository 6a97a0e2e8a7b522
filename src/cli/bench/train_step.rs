//! `stunet bench train-step`.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::value_parser;
use serde::Serialize;
use stunet::autograd::{Ctx, Grads};
use stunet::models::StuNet;
use stunet::nn::{Module, Optimizer};
use stunet::nnunet::loss::{Criterion, deep_supervised};
use stunet::ops::{LabelMap, Outputs};
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Result};

use super::record::Layer;
use super::{Options, Seconds, values};

/// A whole training step of a STU-Net: forward with five heads, Dice and cross-entropy with deep supervision, backward,
/// clipping, SGD
///
/// GFLOP/s count three times the multiplications and additions of the forward pass. The layers' times are those of one more
/// step.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    options: Options,
    /// Samples per step
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = value_parser!(u16).range(1..=64))]
    batch: u16,
    /// Keep only the inputs of stages and run each once more on the way back
    #[arg(long)]
    recompute: bool,
}

/// What only a training step has.
#[derive(Debug, Serialize)]
pub(super) struct Training {
    batch: u16,
    recompute: bool,
    /// Medians.
    seconds_forward: f64,
    seconds_loss: f64,
    seconds_backward: f64,
    seconds_optimizer: f64,
    /// Bytes of tensors that operations keep for their way back, by operation.
    saved_bytes: BTreeMap<&'static str, usize>,
}

impl Training {
    /// Two lines for people.
    pub(super) fn lines(&self, human: impl Fn(u64) -> String) -> [String; 2] {
        let ms = |s: f64| s * 1e3;
        let saved: Vec<String> = self.saved_bytes.iter().map(|(n, b)| format!("{n} {}", human(*b as u64))).collect();
        [
            format!(
                "batch {}{}: forward {:.1} ms, loss {:.1} ms, backward {:.1} ms, optimizer {:.1} ms",
                self.batch,
                if self.recompute { ", recomputing" } else { "" },
                ms(self.seconds_forward),
                ms(self.seconds_loss),
                ms(self.seconds_backward),
                ms(self.seconds_optimizer),
            ),
            format!("kept for the way back: {}", saved.join(", ")),
        ]
    }
}

/// What a step needs besides the network.
struct Batch {
    image: Tensor,
    target: LabelMap,
    optimizer: Optimizer,
}

/// When each part of a step was over, and what the step left to look at.
struct Parts {
    /// Forward, loss, backward, optimizer.
    seconds: [f64; 4],
    layers: Vec<Layer>,
    saved: BTreeMap<&'static str, usize>,
}

impl Args {
    pub(super) fn run(&self) -> Result<()> {
        let options = &self.options;
        let (config, device) = (options.config(), options.device.open()?);
        let (patch, runs) = (options.patch(&config)?, options.runs(5));
        let mut record = options.record("train-step", patch, runs, &device)?;
        let net = device.install(|| config.build_random(&device, 0))?;
        let mut net = net.recomputing(self.recompute);
        let [n, d, h, w] = [usize::from(self.batch), patch[0], patch[1], patch[2]];
        let voxels = n * d * h * w;
        let image = values(voxels * config.in_channels);
        let labels: Vec<u16> = (0..voxels).map(|i| (i / 7 % config.classes) as u16).collect();
        let mut batch = Batch {
            image: Tensor::from_host(&image, Dims::from([n, config.in_channels, d, h, w]), &device)?,
            target: LabelMap::new(labels, [n, d, h, w])?,
            optimizer: Optimizer::nnunet(),
        };
        let mut all = Vec::with_capacity(usize::from(runs));
        let mut saved = BTreeMap::new();
        device.install(|| -> Result<()> {
            // The last step is looked at, not counted.
            for i in 0..usize::from(runs) + 3 {
                let look = i == usize::from(runs) + 2;
                let parts = device.planned(&[], || self.step(&mut net, &mut batch, &device, look))?;
                if look {
                    (record.layers, saved) = (parts.layers, parts.saved);
                } else if i >= 2 {
                    all.push(parts.seconds);
                }
            }
            Ok(())
        })?;
        let median = |part: usize| Seconds::of(all.iter().map(|s| s[part]).collect()).median;
        record.measured(
            Seconds::of(all.iter().map(|s| s.iter().sum()).collect()),
            3.0 * n as f64 * config.macs(patch) as f64,
            &device,
        );
        record.training = Some(Training {
            batch: self.batch,
            recompute: self.recompute,
            seconds_forward: median(0),
            seconds_loss: median(1),
            seconds_backward: median(2),
            seconds_optimizer: median(3),
            saved_bytes: saved,
        });
        record.print(options.json)
    }

    fn step(&self, net: &mut StuNet, batch: &mut Batch, device: &Device, look: bool) -> Result<Parts> {
        let mut clock = Instant::now();
        let mut seconds = [0.0; 4];
        let mut over = |part: usize| {
            seconds[part] = clock.elapsed().as_secs_f64();
            clock = Instant::now();
        };
        let how = Criterion::DiceCe.loss(Outputs::Labels, None, false)?;
        let mut grads = Grads::new();
        let (layers, saved) = {
            let cx = Ctx::train(device).strict(self.options.strict).storing(self.options.precision(device));
            let mut cx = if look { cx.traced() } else { cx };
            let x = cx.leaf(batch.image.clone());
            let outputs = net.forward_all(&mut cx, x)?;
            over(0);
            let (loss, _) = deep_supervised(&mut cx, outputs, &batch.target, &how)?;
            over(1);
            let mut saved = BTreeMap::new();
            if look {
                cx.saved().iter().for_each(|s| *saved.entry(s.operation).or_default() += s.bytes);
            }
            cx.backward(loss, &mut grads)?;
            over(2);
            (cx.steps().iter().map(Layer::from).collect(), saved)
        };
        let mut params = Vec::new();
        net.params_mut(&mut |p| params.push(p));
        batch.optimizer.step(params, &mut grads, 1e-2)?;
        over(3);
        Ok(Parts { seconds, layers, saved })
    }
}
