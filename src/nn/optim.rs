//! Optimizers: what becomes of parameters when their gradients are known.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::param::{pack, unpack};
use super::scaler::GradScaler;
use crate::autograd::{Grads, Param};
use crate::error::{Error, Result};
use crate::ops::LossValue;
use crate::ops::optim::{self, Update};
use crate::tensor::{Device, Layout, Precision, Tensor};

/// The rule of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Rule {
    /// Stochastic gradient descent as `torch.optim.SGD` without dampening: `d = g + weight_decay * p`,
    /// `b = momentum * b + d` (`b = d` in the first step), `p -= lr * (d + momentum * b)` with `nesterov`, else
    /// `p -= lr * b`.
    Sgd {
        /// In `[0, 1)`.
        momentum: f64,
        /// Not negative.
        weight_decay: f64,
        /// Nesterov's momentum (Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013).
        nesterov: bool,
    },
    /// Adam (Kingma and Ba, "Adam: A method for stochastic optimization", 2015) as `torch.optim.Adam`; `decoupled` as
    /// `torch.optim.AdamW` (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019).
    Adam {
        /// Decay of the running means of gradients and of their squares, in `[0, 1)`.
        betas: [f64; 2],
        /// Added to the root of the mean square; positive as f32, since a gradient may be zero.
        eps: f64,
        /// Not negative.
        weight_decay: f64,
        /// The weights decay by themselves, not through the gradient.
        decoupled: bool,
    },
}

impl Rule {
    /// nnU-Net's: momentum 0.99, Nesterov, weight decay 3e-5.
    pub const NNUNET: Rule = Rule::Sgd { momentum: 0.99, weight_decay: 3e-5, nesterov: true };

    /// What it keeps of every parameter, as PyTorch calls it.
    #[must_use]
    pub fn buffers(&self) -> &'static [&'static str] {
        match self {
            Rule::Sgd { .. } => &["momentum_buffer"],
            Rule::Adam { .. } => &["exp_avg", "exp_avg_sq"],
        }
    }

    /// Whether its numbers are in their ranges.
    fn is_valid(&self) -> bool {
        let factor = |v: f64| (0.0..1.0).contains(&v);
        let positive = |v: f64| v >= 0.0 && v.is_finite();
        match *self {
            Rule::Sgd { momentum, weight_decay, nesterov } => {
                factor(momentum) && positive(weight_decay) && (momentum > 0.0 || !nesterov)
            }
            Rule::Adam { betas, eps, weight_decay, .. } => {
                betas.into_iter().all(factor) && positive(eps) && eps as f32 > 0.0 && positive(weight_decay)
            }
        }
    }
}

/// What a step found.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct StepNorms {
    /// Euclidean norm of all gradients together, before clipping.
    pub gradient: f64,
    /// What the gradients were multiplied by: below one when they were clipped.
    pub scale: f64,
}

/// What is kept of one parameter.
#[derive(Debug)]
enum Kept {
    Sgd([Tensor; 1]),
    Adam([Tensor; 2]),
}

#[derive(Debug)]
struct Slot {
    kept: Kept,
    /// Steps that this parameter took.
    steps: u64,
}

/// An optimizer with what it keeps of the parameters, by their names.
#[derive(Debug)]
pub struct Optimizer {
    rule: Rule,
    max_norm: Option<f64>,
    slots: BTreeMap<String, Slot>,
    /// What a card has of it.
    #[cfg(feature = "cuda")]
    room: crate::ops::cuda::optim::Room,
}

/// A step that was asked for.
pub(crate) enum Begun {
    /// And done.
    Done(StepNorms),
    /// Of the parameters of these names, of gradients that are scaled.
    #[cfg(feature = "cuda")]
    OnCard {
        /// What the card will find.
        outcome: crate::ops::cuda::optim::Asked,
        /// In the card's order.
        names: Vec<String>,
        /// What gradients are multiplied by.
        scale: f64,
    },
}

impl Optimizer {
    /// One that has seen no gradient. Gradients whose norm, all together, is above `max_norm` are scaled down to it, as
    /// `torch.nn.utils.clip_grad_norm_` does.
    ///
    /// # Errors
    /// [`Error::Usage`] when a number is out of its range.
    pub fn new(rule: Rule, max_norm: Option<f64>) -> Result<Self> {
        if !rule.is_valid() || max_norm.is_some_and(|m| m.is_nan() || m <= 0.0) {
            return Err(Error::usage(format!("optimizer {rule:?} with norms up to {max_norm:?}: out of range")));
        }
        Ok(Self::with(rule, max_norm))
    }

    /// nnU-Net's: [`Rule::NNUNET`], gradients clipped to a norm of 12.
    #[must_use]
    pub fn nnunet() -> Self {
        Self::with(Rule::NNUNET, Some(12.0))
    }

    fn with(rule: Rule, max_norm: Option<f64>) -> Self {
        Self {
            rule,
            max_norm,
            slots: BTreeMap::new(),
            #[cfg(feature = "cuda")]
            room: crate::ops::cuda::optim::Room::default(),
        }
    }

    /// Its rule.
    #[must_use]
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// The largest norm of gradients that is not scaled down.
    #[must_use]
    pub fn max_norm(&self) -> Option<f64> {
        self.max_norm
    }

    /// Moves every parameter that has a gradient by one step of the learning rate `lr`, and uses the gradients up. One
    /// without a gradient is left as it is; it does not decay either. Sums of a parameter's squares, then of all parameters',
    /// are added in f64 in a fixed order.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the first parameter whose gradient holds a NaN or an infinity, [`Error::Usage`] for a
    /// learning rate that is negative or no number, or two parameters of one name, [`Error::Shape`] when a gradient does
    /// not fit: nothing is changed then. [`Error::Unsupported`] for parameters not stored as f32; [`Error::OutOfMemory`].
    pub fn step(&mut self, params: Vec<&mut Param>, grads: &mut Grads, lr: f64) -> Result<StepNorms> {
        self.step_by(params, grads, lr, None)
    }

    /// As [`Optimizer::step`], of gradients of the loss times `scale`, which is taken out of them again. On a card nothing is
    /// changed either when the loss turns out not to be finite, and this waits for the card.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn step_guarded(
        &mut self,
        params: Vec<&mut Param>,
        grads: &mut Grads,
        lr: f64,
        loss: &LossValue,
        scale: f64,
    ) -> Result<StepNorms> {
        let begun = self.begin_step(params, grads, lr, loss, scale)?;
        self.finish_step(begun)
    }

    /// As [`Optimizer::step_guarded`], but a card is not waited for: [`Optimizer::finish_step`] does that, before anything else is
    /// done with the optimizer.
    pub(crate) fn begin_step(
        &mut self,
        params: Vec<&mut Param>,
        grads: &mut Grads,
        lr: f64,
        loss: &LossValue,
        scale: f64,
    ) -> Result<Begun> {
        #[cfg(feature = "cuda")]
        if let Some(guard) = loss.guard() {
            check_rate(lr)?;
            return self.begin_on_card(params, grads, lr, Some(guard), scale);
        }
        if loss.get().is_some() && scale != 1.0 {
            return Err(Error::unsupported("gradients of a scaled loss on the processor"));
        }
        self.step_by(params, grads, lr, None).map(Begun::Done)
    }

    /// What a step came to.
    pub(crate) fn finish_step(&mut self, begun: Begun) -> Result<StepNorms> {
        match begun {
            Begun::Done(norms) => Ok(norms),
            #[cfg(feature = "cuda")]
            Begun::OnCard { outcome, names, scale } => self.finish_on_card(&outcome, &names, scale),
        }
    }

    /// As [`Optimizer::step_guarded`], of gradients of the loss times [`GradScaler::scale`]. Where only these turn out not to be
    /// finite, nothing is changed but the scaler, which goes back, and there are no norms: the step is skipped.
    ///
    /// # Errors
    /// As [`Optimizer::step`]; [`Error::NotFinite`] of gradients only when the scaler cannot go back any further.
    pub fn step_scaled(
        &mut self,
        params: Vec<&mut Param>,
        grads: &mut Grads,
        lr: f64,
        loss: &LossValue,
        scaler: &mut GradScaler,
    ) -> Result<Option<StepNorms>> {
        let found = self.step_guarded(params, grads, lr, loss, scaler.scale());
        scaler.settle(found, loss)
    }

    /// The step of parameters that are on a card.
    #[cfg(feature = "cuda")]
    fn begin_on_card(
        &mut self,
        mut params: Vec<&mut Param>,
        grads: &mut Grads,
        lr: f64,
        guard: Option<&Tensor>,
        scale: f64,
    ) -> Result<Begun> {
        use crate::ops::cuda::{self, optim as card};
        params.retain(|p| grads.param(p).is_some());
        let Some(device) = params.first().map(|p| p.value().device().clone()) else {
            return Ok(Begun::Done(StepNorms { gradient: 0.0, scale: 1.0 }));
        };
        for p in &params {
            let Some(g) = grads.param(p) else { continue };
            if p.precision() != Precision::F32 {
                let what = format!("training of parameters stored as {}; float32 is", p.precision().name());
                return Err(Error::unsupported(what));
            }
            if g.dims().len() != cuda::floats(p)? || g.precision() != Precision::F32 {
                let what = format!("a gradient of {:?} for {:?}: {}", g.dims(), p.dims(), p.name());
                return Err(Error::shape("optim", what));
            }
        }
        self.make_slots(&params)?;
        let taken: Vec<Tensor> = params.iter().filter_map(|p| grads.take_param(p)).collect();
        // Adam's numbers are those of the parameter's own steps.
        let mut groups: BTreeMap<u64, (card::Rule, Vec<card::Moved<'_>>)> = BTreeMap::new();
        for (p, gradient) in params.iter().zip(&taken) {
            let Some(slot) = self.slots.get(p.name()) else { continue };
            let steps = slot.steps + 1;
            let (key, rule) = match self.rule {
                Rule::Sgd { momentum, weight_decay, nesterov } => {
                    let (weight_decay, momentum, rate) = (weight_decay as f32, momentum as f32, lr as f32);
                    (0, card::Rule::Sgd(card::Sgd { weight_decay, momentum, rate, nesterov }))
                }
                Rule::Adam { betas: [beta1, beta2], eps, weight_decay, decoupled } => {
                    let correction = |beta: f64| 1.0 - beta.powf(steps as f64);
                    let adam = card::Adam {
                        weight_decay: if decoupled { 0.0 } else { weight_decay as f32 },
                        shrink: if decoupled { (1.0 - lr * weight_decay) as f32 } else { 1.0 },
                        share1: (1.0 - beta1) as f32,
                        beta2: beta2 as f32,
                        share2: (1.0 - beta2) as f32,
                        rate: (lr / correction(beta1)) as f32,
                        correction: correction(beta2).sqrt() as f32,
                        eps: eps as f32,
                    };
                    (steps, card::Rule::Adam(adam))
                }
            };
            let moved = card::Moved { param: p, gradient, kept: slot.kept.all(), first: steps == 1 };
            groups.entry(key).or_insert_with(|| (rule, Vec::new())).1.push(moved);
        }
        let groups: Vec<_> = groups.into_values().collect();
        let outcome = card::step(&device, &mut self.room, &groups, guard, self.max_norm, 1.0 / scale)?;
        let names = groups.iter().flat_map(|(_, g)| g).map(|m| m.param.name().into()).collect();
        Ok(Begun::OnCard { outcome, names, scale })
    }

    /// Waits for a card.
    #[cfg(feature = "cuda")]
    fn finish_on_card(
        &mut self,
        outcome: &crate::ops::cuda::optim::Asked,
        names: &[String],
        scale: f64,
    ) -> Result<StepNorms> {
        let found = outcome.read()?;
        if !found.finite {
            return Err(Error::NotFinite {
                what: match found.wrong.and_then(|i| names.get(i)) {
                    Some(name) if found.guard.is_finite() => format!("the gradient of {name}"),
                    _ => format!("the loss is {}", found.guard),
                },
            });
        }
        for name in names {
            if let Some(slot) = self.slots.get_mut(name) {
                slot.steps += 1;
            }
        }
        // What frees gradients of the factor does not clip them.
        let freed = (1.0 / scale) as f32;
        let scale = if found.scale == freed { 1.0 } else { f64::from(found.scale) / f64::from(freed) };
        Ok(StepNorms { gradient: found.norm, scale })
    }

    /// As [`Optimizer::step`], by one implementation: for tests.
    #[doc(hidden)]
    pub fn step_by(
        &mut self,
        mut params: Vec<&mut Param>,
        grads: &mut Grads,
        lr: f64,
        name: Option<&str>,
    ) -> Result<StepNorms> {
        check_rate(lr)?;
        #[cfg(feature = "cuda")]
        if params.first().is_some_and(|p| !p.value().device().is_cpu()) {
            let begun = self.begin_on_card(params, grads, lr, None, 1.0)?;
            return self.finish_step(begun);
        }
        params.retain(|p| grads.param(p).is_some());
        let Some(device) = params.first().map(|p| p.value().device().clone()) else {
            return Ok(StepNorms { gradient: 0.0, scale: 1.0 });
        };
        let mut sum = 0.0;
        for p in &params {
            let Some(g) = grads.param(p) else { continue };
            optim::floats(p.value())?;
            if g.layout() != p.value().layout() || g.dims() != p.value().dims() {
                let what = format!("a gradient of {:?} for {:?}: {}", g.dims(), p.value().dims(), p.name());
                return Err(Error::shape("optim", what));
            }
            let squares = optim::squares(g, name)?;
            if !squares.is_finite() {
                return Err(Error::NotFinite { what: format!("the gradient of {}", p.name()) });
            }
            sum += squares;
        }
        let gradient = sum.sqrt();
        let scale = self.max_norm.map_or(1.0, |m| (m / (gradient + 1e-6)).min(1.0));
        self.make_slots(&params)?;
        let taken: Vec<Option<Tensor>> = params.iter().map(|p| grads.take_param(p)).collect();
        self.update(&device, params, &taken, scale as f32, lr, name)?;
        Ok(StepNorms { gradient, scale })
    }

    /// Room for what is kept, of zeros, for parameters that are new.
    fn make_slots(&mut self, params: &[&mut Param]) -> Result<()> {
        let mut names: Vec<&str> = params.iter().map(|p| p.name()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::usage(format!("two parameters of the name {}", twice[0])));
        }
        for p in params {
            if let Some(slot) = self.slots.get(p.name()) {
                if slot.kept.all()[0].dims() != p.value().dims() {
                    return Err(Error::shape("optim", format!("{} is of another size than before", p.name())));
                }
                continue;
            }
            let zeros = || zeros(p);
            let kept = match self.rule {
                Rule::Sgd { .. } => Kept::Sgd([zeros()?]),
                Rule::Adam { .. } => Kept::Adam([zeros()?, zeros()?]),
            };
            self.slots.insert(p.name().into(), Slot { kept, steps: 0 });
        }
        Ok(())
    }

    fn update(
        &mut self,
        device: &Device,
        params: Vec<&mut Param>,
        grads: &[Option<Tensor>],
        scale: f32,
        lr: f64,
        name: Option<&str>,
    ) -> Result<()> {
        let mut by_name: BTreeMap<&str, &mut Slot> = self.slots.iter_mut().map(|(n, s)| (n.as_str(), s)).collect();
        let (mut sgd, mut adam) = (Vec::new(), Vec::new());
        for (p, gradient) in params.into_iter().zip(grads) {
            let (Some(gradient), Some(slot)) = (gradient, by_name.remove(p.name())) else { continue };
            slot.steps += 1;
            match (&mut slot.kept, self.rule) {
                (Kept::Sgd(kept), Rule::Sgd { momentum, weight_decay, nesterov }) => {
                    let how = optim::Sgd {
                        scale,
                        weight_decay: weight_decay as f32,
                        momentum: momentum as f32,
                        nesterov,
                        rate: lr as f32,
                        first: slot.steps == 1,
                    };
                    sgd.push(Update { value: p.value_mut(), gradient, kept, how });
                }
                (Kept::Adam(kept), Rule::Adam { betas: [beta1, beta2], eps, weight_decay, decoupled }) => {
                    let correction = |beta: f64| 1.0 - beta.powf(slot.steps as f64);
                    let how = optim::Adam {
                        scale,
                        weight_decay: if decoupled { 0.0 } else { weight_decay as f32 },
                        shrink: if decoupled { (1.0 - lr * weight_decay) as f32 } else { 1.0 },
                        share1: (1.0 - beta1) as f32,
                        beta2: beta2 as f32,
                        share2: (1.0 - beta2) as f32,
                        rate: (lr / correction(beta1)) as f32,
                        correction: correction(beta2).sqrt() as f32,
                        eps: eps as f32,
                    };
                    adam.push(Update { value: p.value_mut(), gradient, kept, how });
                }
                // Slots are made by the rule, which never changes.
                _ => {}
            }
        }
        optim::sgd(device, sgd, name)?;
        optim::adam(device, adam, name)
    }

    /// Steps that the parameter took and what is kept of it, in the order of [`Rule::buffers`] and of PyTorch's values; `None`
    /// if it never had a gradient.
    ///
    /// # Errors
    /// [`Error::Shape`] when `p` is another parameter of the same name.
    pub fn kept(&self, p: &Param) -> Option<Result<(u64, Vec<Vec<f32>>)>> {
        let slot = self.slots.get(p.name())?;
        let values = slot.kept.all().iter().map(|t| unpack(p, t)).collect::<Result<_>>();
        Some(values.map(|v| (slot.steps, v)))
    }

    /// Steps that the parameter took.
    #[must_use]
    pub fn steps(&self, p: &Param) -> u64 {
        self.slots.get(p.name()).map_or(0, |s| s.steps)
    }

    /// One of the parameter's buffers, by its place in [`Rule::buffers`], in the order of PyTorch's values.
    ///
    /// # Errors
    /// As [`Optimizer::kept`].
    pub fn buffer(&self, p: &Param, at: usize) -> Option<Result<Vec<f32>>> {
        let kept = self.slots.get(p.name())?.kept.all().get(at)?;
        Some(unpack(p, kept))
    }

    /// Takes up what another one kept of the parameter.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are other buffers or sizes; [`Error::OutOfMemory`].
    pub fn set_kept(&mut self, p: &Param, steps: u64, buffers: &[&[f32]]) -> Result<()> {
        let packed = buffers.iter().map(|b| pack(p, b, Precision::F32)).collect::<Result<Vec<_>>>()?;
        let kept = match self.rule {
            Rule::Sgd { .. } => packed.try_into().ok().map(Kept::Sgd),
            Rule::Adam { .. } => packed.try_into().ok().map(Kept::Adam),
        };
        let other = || format!("{} buffers of {}, expected {:?}", buffers.len(), p.name(), self.rule.buffers());
        let kept = kept.ok_or_else(|| Error::shape("optim", other()))?;
        self.slots.insert(p.name().into(), Slot { kept, steps });
        Ok(())
    }
}

impl Kept {
    fn all(&self) -> &[Tensor] {
        match self {
            Kept::Sgd(kept) => kept,
            Kept::Adam(kept) => kept,
        }
    }
}

fn check_rate(lr: f64) -> Result<()> {
    if lr >= 0.0 && lr.is_finite() {
        return Ok(());
    }
    Err(Error::usage(format!("learning rate {lr}, expected a number of at least 0")))
}

/// Zeros that lie as the values of `p` do, for as long as training lasts.
fn zeros(p: &Param) -> Result<Tensor> {
    let device = p.value().device();
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        let t = device.unplanned(|| Tensor::empty(*p.value().dims(), Layout::PLAIN, device))?;
        crate::ops::cuda::clear(&t, 0, t.dims().len())?;
        return Ok(t);
    }
    let mut t = device.unplanned(|| Tensor::empty(*p.value().dims(), Layout::PLAIN, device))?;
    if !device.is_rehearsal() {
        t.as_mut_slice().ok_or_else(|| Error::shape("optim", "fresh memory is shared"))?.fill(0.0);
    }
    Ok(t)
}

/// The learning rate `initial * (1 - epoch / epochs)^exponent` of an epoch, constant within it (nnU-Net's
/// `PolyLRScheduler`).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolyLr {
    /// Of epoch 0.
    pub initial: f64,
    /// Number of epochs.
    pub epochs: u32,
    /// 0.9 in nnU-Net.
    pub exponent: f64,
}

impl PolyLr {
    /// nnU-Net's: 0.01, 1000 epochs, 0.9.
    pub const NNUNET: PolyLr = PolyLr { initial: 0.01, epochs: 1000, exponent: 0.9 };

    /// That of an epoch, counted from 0; 0 from the last one's end on.
    #[must_use]
    pub fn at(&self, epoch: u32) -> f64 {
        let left = 1.0 - f64::from(epoch.min(self.epochs)) / f64::from(self.epochs.max(1));
        self.initial * left.powf(self.exponent)
    }
}
