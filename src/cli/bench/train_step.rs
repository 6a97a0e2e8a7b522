//! `stunet bench train-step`.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::value_parser;
use serde::Serialize;
use stunet::autograd::{Ctx, Grads};
use stunet::models::StuNet;
use stunet::nn::{GradScaler, Module, Optimizer};
use stunet::nnunet::loss::{Criterion, deep_supervised, deep_supervision_weights, supervised_heads};
use stunet::ops::{LabelMap, Outputs, Target};
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Precision, Result};

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

/// Steps before those that are counted.
const WARM: usize = 5;
/// Steps of a card whose parts are waited for, one after the other.
const PARTS: usize = 3;

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
    /// Of a loss that is scaled: in float16 on a card.
    #[serde(skip_serializing_if = "Option::is_none")]
    loss_scale: Option<f64>,
    /// Steps that were skipped because gradients overflowed.
    skipped: u32,
    /// Bytes of tensors that operations keep for their way back, by operation.
    saved_bytes: BTreeMap<&'static str, usize>,
}

impl Training {
    /// Two lines for people.
    pub(super) fn lines(&self, human: impl Fn(u64) -> String) -> [String; 2] {
        let ms = |s: f64| s * 1e3;
        let scaled = |s: f64| format!(", loss scale {s} after {} steps skipped", self.skipped);
        let scaled = self.loss_scale.map_or_else(String::new, scaled);
        let saved: Vec<String> = self.saved_bytes.iter().map(|(n, b)| format!("{n} {}", human(*b as u64))).collect();
        [
            format!(
                "batch {}{}{scaled}: forward {:.1} ms, loss {:.1} ms, backward {:.1} ms, optimizer {:.1} ms",
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
    target: Target,
    optimizer: Optimizer,
    scaler: Option<GradScaler>,
    skipped: u32,
}

/// What is wanted to be known of a step beside its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// Nothing: a card is waited for at the end only.
    Away,
    /// The time of its parts.
    Parts,
    /// The time of every layer, too.
    Layers,
}

/// When each part of a step was over, and what the step left to look at.
struct Parts {
    total: f64,
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
            target: Target::new(LabelMap::new(labels, [n, d, h, w])?, &Outputs::Labels, &device)?,
            optimizer: Optimizer::nnunet(),
            scaler: (!device.is_cpu() && options.precision(&device) == Precision::F16).then(GradScaler::default),
            skipped: 0,
        };
        let (mut all, mut totals) = (Vec::with_capacity(usize::from(runs)), Vec::with_capacity(usize::from(runs)));
        let mut saved = BTreeMap::new();
        device.install(|| -> Result<()> {
            let mut step = |look| device.planned(&[], || self.step(&mut net, &mut batch, &device, look));
            // A card knows the work of a step by heart when it has come twice without anything that comes only once.
            for i in 0..usize::from(runs) + WARM {
                let parts = step(Look::Away)?;
                if i >= WARM {
                    totals.push(parts.total);
                    all.push(parts.seconds);
                }
            }
            if !device.is_cpu() {
                all.clear();
                for _ in 0..PARTS {
                    all.push(step(Look::Parts)?.seconds);
                }
            }
            // The last step is looked at, not counted.
            let parts = step(Look::Layers)?;
            (record.layers, saved) = (parts.layers, parts.saved);
            Ok(())
        })?;
        let median = |part: usize| Seconds::of(all.iter().map(|s| s[part]).collect()).median;
        record.measured(Seconds::of(totals), 3.0 * n as f64 * config.macs(patch) as f64, &device);
        record.training = Some(Training {
            batch: self.batch,
            recompute: self.recompute,
            seconds_forward: median(0),
            seconds_loss: median(1),
            seconds_backward: median(2),
            seconds_optimizer: median(3),
            loss_scale: batch.scaler.map(|s| s.scale()),
            skipped: batch.skipped,
            saved_bytes: saved,
        });
        record.print(options.json)
    }

    fn step(&self, net: &mut StuNet, batch: &mut Batch, device: &Device, look: Look) -> Result<Parts> {
        device.synchronize()?;
        let begin = Instant::now();
        let mut clock = begin;
        let mut seconds = [0.0; 4];
        let mut over = |part: usize| -> Result<()> {
            if look != Look::Away {
                device.synchronize()?;
            }
            seconds[part] = clock.elapsed().as_secs_f64();
            clock = Instant::now();
            Ok(())
        };
        let how = Criterion::DiceCe.loss(Outputs::Labels, None, false)?;
        let mut grads = Grads::new();
        let (layers, saved, value) = {
            let cx = Ctx::train(device).strict(self.options.strict).storing(self.options.precision(device));
            let mut cx = if look == Look::Layers { cx.traced() } else { cx };
            let x = cx.leaf(batch.image.clone());
            let (loss, value) = if device.is_cpu() {
                let outputs = net.forward_all(&mut cx, x)?;
                over(0)?;
                let (loss, _) = deep_supervised(&mut cx, outputs, batch.target.map()?, &how)?;
                (loss, None)
            } else {
                // With the heads, whose scores are never in memory.
                let heads = net.forward_heads(&mut cx, x)?;
                over(0)?;
                let weights = deep_supervision_weights(heads.len());
                let (loss, value) = supervised_heads(&mut cx, heads, &weights, &batch.target, &how)?;
                (loss, Some(value))
            };
            over(1)?;
            let mut saved = BTreeMap::new();
            if look == Look::Layers {
                cx.saved().iter().for_each(|s| *saved.entry(s.operation).or_default() += s.bytes);
            }
            cx.backward_scaled(loss, batch.scaler.map_or(1.0, |s| s.scale()), &mut grads)?;
            over(2)?;
            (cx.steps().iter().map(Layer::from).collect(), saved, value)
        };
        let mut params = Vec::new();
        net.params_mut(&mut |p| params.push(p));
        // Both of a card wait for it.
        match (value, &mut batch.scaler) {
            (Some(value), Some(scaler)) => {
                let moved = batch.optimizer.step_scaled(params, &mut grads, 1e-2, &value, scaler)?;
                batch.skipped += u32::from(moved.is_none());
            }
            (Some(value), None) => {
                batch.optimizer.step_guarded(params, &mut grads, 1e-2, &value, 1.0)?;
            }
            (None, _) => {
                batch.optimizer.step(params, &mut grads, 1e-2)?;
            }
        }
        over(3)?;
        Ok(Parts { total: begin.elapsed().as_secs_f64(), seconds, layers, saved })
    }
}
