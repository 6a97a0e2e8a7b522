//! One pass over a batch.

use super::input::{Input, tensors};
use super::metrics::{Counts, count, count_labels};
use super::options::TrainOptions;
use super::plan::TrainingPlan;
use crate::autograd::{Ctx, Grads, Var};
use crate::error::{Error, Result};
use crate::models::Network;
use crate::nn::{GradScaler, Module, Optimizer, StepNorms};
use crate::nnunet::loader::Batch;
use crate::nnunet::loss::{supervised, supervised_heads};
use crate::ops::{Loss, LossValue, Outputs, Target};
use crate::tensor::{Device, Precision, Tensor};

/// Keys of repeated computations; see [`Device::planned`].
const TRAIN: usize = 1;
const VALIDATE: usize = 2;

/// What all passes of a training share.
#[derive(Debug)]
pub(super) struct Pass {
    loss: Loss,
    /// Of the outputs, the largest first.
    weights: Vec<f64>,
    precision: Precision,
    strict: bool,
}

impl Pass {
    pub(super) fn new(plan: &TrainingPlan, options: &TrainOptions) -> Result<Self> {
        let loss = options.criterion.loss(plan.labels.outputs(), plan.labels.ignore(), plan.batch_dice)?;
        let weights = if options.deep_supervision { plan.supervision() } else { vec![1.0] };
        Ok(Self { loss, weights, precision: options.precision, strict: options.strict })
    }

    /// Dice and cross-entropy of labels, of so many outputs.
    #[cfg(all(test, feature = "cuda"))]
    pub(super) fn supervised(outputs: usize, precision: Precision) -> Self {
        let weights = crate::nnunet::loss::deep_supervision_weights(outputs);
        Self { loss: Loss::new(Outputs::Labels), weights, precision, strict: false }
    }

    /// Whether the device can do it.
    pub(super) fn check(&self, device: &Device) -> Result<()> {
        if device.is_cpu() {
            return match self.precision {
                Precision::F16 => {
                    Err(Error::unsupported("training in float16 on the processor; expected float32 or bfloat16"))
                }
                _ => Ok(()),
            };
        }
        let old = device.compute_capability().is_some_and(|[major, _]| major < 8);
        let what = match self.precision {
            Precision::F16 if self.strict => "strictly in float16; expected float32",
            Precision::Bf16 if self.strict => "strictly in bfloat16; expected float32",
            Precision::Bf16 if old => "in bfloat16 on a card before Ampere; expected float32",
            _ if self.loss.top.is_some() => "by the largest cross-entropies on a card; on the processor it is",
            _ => return Ok(()),
        };
        Err(Error::unsupported(format!("training {what}")))
    }

    /// What scales the loss on `device`, where gradients are stored as they are computed; on the processor they are f32.
    pub(super) fn scaler(&self, device: &Device) -> Option<GradScaler> {
        (self.precision == Precision::F16 && !device.is_cpu()).then(GradScaler::default)
    }

    /// A step; returns the loss before it, and no norms when `scaler` skips it. Nothing is changed when the loss or a gradient is
    /// not finite. A card works on it while `meanwhile` runs.
    pub(super) fn train(
        &self,
        net: &mut Network,
        optimizer: &mut Optimizer,
        input: &Input,
        rate: f64,
        scaler: Option<&mut GradScaler>,
        device: &Device,
        meanwhile: &mut (dyn FnMut() + Send),
    ) -> Result<(f64, Option<StepNorms>)> {
        let scale = scaler.as_ref().map_or(1.0, |s| s.scale());
        device.install(|| {
            let (value, begun) = device.repeated(&[TRAIN, input.batch.cases.len()], || {
                let mut grads = Grads::new();
                let value = {
                    let mut cx = Ctx::train(device).strict(self.strict).storing(self.precision);
                    let (image, target) = input.tensors(&self.loss.outputs, device)?;
                    let x = cx.leaf(image);
                    let (loss, value) = if device.is_cpu() {
                        let outputs = net.forward_all(&mut cx, x)?;
                        let (loss, value) = supervised(&mut cx, outputs, &self.weights, target.map()?, &self.loss)?;
                        (loss, LossValue::known(value))
                    } else {
                        let heads = net.forward_heads(&mut cx, x)?;
                        supervised_heads(&mut cx, heads, &self.weights, &target, &self.loss)?
                    };
                    // What a card does not know yet, its optimizer looks at before it moves anything.
                    if let Some(value) = value.get().filter(|v| !v.is_finite()) {
                        return Err(Error::NotFinite { what: format!("the loss is {value}") });
                    }
                    cx.backward_scaled(loss, scale, &mut grads)?;
                    value
                };
                let mut params = Vec::new();
                net.params_mut(&mut |p| params.push(p));
                let begun = optimizer.begin_step(params, &mut grads, rate, &value, scale)?;
                Ok((value, begun))
            })?;
            meanwhile();
            let found = optimizer.finish_step(begun);
            let norms = match scaler {
                Some(scaler) => scaler.settle(found, &value)?,
                None => Some(found?),
            };
            Ok((value.read()?, norms))
        })
    }

    /// The loss of a batch, and its voxels by what becomes of them.
    pub(super) fn validate(&self, net: &Network, batch: &Batch, device: &Device) -> Result<(f64, Counts)> {
        device.install(|| {
            device.planned(&[VALIDATE, batch.cases.len()], || {
                let mut cx = Ctx::infer(device).strict(self.strict).storing(self.precision);
                let (image, target) = tensors(batch, &self.loss.outputs, device)?;
                let x = cx.leaf(image);
                if !device.is_cpu() {
                    return self.validate_on_card(net, cx, x, &target);
                }
                let outputs = net.forward_all(&mut cx, x)?;
                let logits = outputs.first().map(|y| y.value().clone());
                let logits = logits.ok_or_else(|| Error::shape("validation", "a network without outputs"))?;
                // The loss checks the labels.
                let (_, value) = supervised(&mut cx, outputs, &self.weights, target.map()?, &self.loss)?;
                Ok((value, count(&logits, target.map()?, &self.loss.outputs, self.loss.ignore)?))
            })
        })
    }

    /// Scores stay on the card; of labels the largest is found there, regions are for the processor to find.
    fn validate_on_card<'m>(
        &self,
        net: &'m Network,
        mut cx: Ctx<'m>,
        x: Var,
        target: &Target,
    ) -> Result<(f64, Counts)> {
        let heads = net.forward_heads(&mut cx, x)?;
        let finest = heads.first().ok_or_else(|| Error::shape("validation", "a network without outputs"))?;
        let (outputs, ignore) = (&self.loss.outputs, self.loss.ignore);
        let found = match outputs {
            Outputs::Labels => Found::Labels(finest.labels(&mut cx)?),
            Outputs::Regions(_) => Found::Scores(finest.host_scores(&mut cx)?),
        };
        let (_, value) = supervised_heads(&mut cx, heads, &self.weights, target, &self.loss)?;
        let counts = match found {
            Found::Labels(labels) => count_labels(&labels, target.map()?, net.classes(), ignore)?,
            Found::Scores(scores) => count(&scores, target.map()?, outputs, ignore)?,
        };
        Ok((value.read()?, counts))
    }
}

/// What a network says of a batch.
enum Found {
    Labels(Vec<u16>),
    Scores(Tensor),
}
