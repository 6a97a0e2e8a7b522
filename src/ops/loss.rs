//! The losses that segmentation networks are trained with, and weighted sums of them.

use std::sync::Arc;

use super::{activation, floats, memory, processor};
use crate::autograd::{Backward, Ctx, Grads, Var};
use crate::backend::compute;
use crate::backend::cpu::loss::{Members, Problem, Slopes, Sums};
use crate::error::{Error, Result};
use crate::tensor::{BLOCK, Dims, Layout, Tensor};

const OP: &str = "loss";

/// The label of every voxel of a batch. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelMap {
    labels: Arc<[u16]>,
    dims: [usize; 4],
}

impl LabelMap {
    /// `labels` in the order `[N, D, H, W]` of sizes `dims`.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are not as many.
    pub fn new(labels: impl Into<Arc<[u16]>>, dims: [usize; 4]) -> Result<Self> {
        let labels = labels.into();
        if labels.len() != Dims::from(dims).len() {
            return Err(Error::shape(OP, format!("{} labels for {dims:?}", labels.len())));
        }
        Ok(Self { labels, dims })
    }

    /// The labels in the order `[N, D, H, W]`.
    #[must_use]
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// N, D, H, W.
    #[must_use]
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }
}

/// What the channels of the logits are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outputs {
    /// Channel i is label i; a voxel's probabilities are a softmax.
    Labels,
    /// Channel i is the region of the labels that item i lists, and regions may overlap; each probability is a sigmoid.
    Regions(Vec<Vec<u16>>),
}

/// `cross_entropy` times the cross-entropy minus `dice` times the mean soft Dice `(2 I + smooth) / (P + G + smooth)` of the
/// channels, where I, P and G are sums over the voxels of `p g`, `p` and `g`, of probability p and truth g.
#[derive(Debug, Clone, PartialEq)]
pub struct Loss {
    /// What the channels are.
    pub outputs: Outputs,
    /// Voxels of this label take no part.
    pub ignore: Option<u16>,
    /// Weight of the cross-entropy: over labels its mean over the voxels that take part. Over regions the mean of the binary
    /// cross-entropy over voxels and channels, but with `ignore` the sum over channels of the means over voxels that take part.
    pub cross_entropy: f64,
    /// Only the largest cross-entropies count, so many percent of all voxels, at least one; ignored voxels are among them
    /// with zero. Over labels only.
    pub top: Option<f64>,
    /// Weight of Dice.
    pub dice: f64,
    /// I, P and G are of the whole batch. Otherwise of each sample, and the mean goes over samples too.
    pub batch_dice: bool,
    /// Channel 0 counts in Dice.
    pub background: bool,
    /// See above; in nnU-Net 1e-5.
    pub smooth: f64,
}

impl Loss {
    /// Cross-entropy and Dice as nnU-Net weighs them: background left out of Dice where channels are labels.
    #[must_use]
    pub fn new(outputs: Outputs) -> Self {
        Self {
            background: outputs != Outputs::Labels,
            outputs,
            ignore: None,
            cross_entropy: 1.0,
            top: None,
            dice: 1.0,
            batch_dice: false,
            smooth: 1e-5,
        }
    }

    /// An error if the settings contradict each other or a network of so many `channels`.
    pub(super) fn check(&self, channels: usize) -> Result<()> {
        let wrong = |what: String| Err(Error::shape(OP, what));
        if let Outputs::Regions(regions) = &self.outputs {
            if regions.len() != channels {
                return wrong(format!("{} regions for {channels} channels", regions.len()));
            }
            if self.top.is_some() {
                return wrong("the largest cross-entropies of regions, expected labels".into());
            }
        }
        if self.outputs == Outputs::Labels && channels > 1 << 16 {
            return wrong(format!("{channels} channels, expected at most 65536"));
        }
        if self.dice != 0.0 && channels == 1 && !self.background {
            return wrong("Dice without the background of one channel, expected more channels".into());
        }
        let numbers = [self.cross_entropy, self.dice, self.smooth];
        if numbers.iter().any(|v| !v.is_finite()) || self.smooth < 0.0 {
            return wrong(format!("weights and smoothing {numbers:?}, expected finite ones and no negative smoothing"));
        }
        if self.top.is_some_and(|t| !(t > 0.0 && t <= 100.0)) {
            return wrong(format!("the largest {:?} percent, expected above 0 and at most 100", self.top));
        }
        Ok(())
    }
}

/// The loss of `logits` `[N, C, D, H, W]` against `target` `[N, D, H, W]`: a scalar `[1]`, and its value in f64. Without a
/// voxel that takes part the cross-entropy is 0 (nnU-Net's `DC_and_CE_loss`, `DC_and_BCE_loss`, `DC_and_topk_loss`). On the
/// way back the gradient replaces the logits where they have no other owner.
///
/// # Errors
/// [`Error::Shape`] when sizes differ, when a label is neither a channel nor ignored, or when settings contradict each
/// other; [`Error::OutOfMemory`].
pub fn loss(cx: &mut Ctx<'_>, logits: Var, target: &LabelMap, how: &Loss) -> Result<(Var, f64)> {
    run(cx, logits, target, how, None)
}

pub(super) fn run(
    cx: &mut Ctx<'_>,
    logits: Var,
    target: &LabelMap,
    how: &Loss,
    name: Option<&str>,
) -> Result<(Var, f64)> {
    processor(OP, cx.device())?;
    let [n, channels, d, h, w] = activation(OP, logits.value().dims())?;
    if target.dims != [n, d, h, w] {
        return Err(Error::shape(OP, format!("labels of {:?} for logits of {:?}", target.dims, logits.value().dims())));
    }
    how.check(channels)?;
    let members = match &how.outputs {
        Outputs::Labels => None,
        Outputs::Regions(regions) => Some(Members::new(regions)),
    };
    let strange = |l: &u16| usize::from(*l) >= channels && how.ignore != Some(*l);
    if let Some(label) = target.labels.iter().copied().filter(|_| members.is_none()).find(strange) {
        return Err(Error::shape(OP, format!("label {label} for {channels} channels")));
    }
    let top = how.top.filter(|_| how.cross_entropy != 0.0);
    let top = top.map(|t| ((target.labels.len() as f64 * t / 100.0) as usize).max(1));
    let node = logits.node();
    let logits = floats(OP, logits.into_value())?;
    let clock = cx.clock();
    let p = problem(logits.dims(), target, how.ignore, members.as_ref());
    let (sums, name) = compute!(cx.device(), loss::forward(name, &p, top, logits.as_slice()), Ok(unknown()))?;
    cx.note(OP, clock, name, 0, || format!("{channels} at {d}x{h}x{w}"));
    let terms = terms(how, channels, n, d * h * w, top, sums);
    let value = terms.value;
    let scalar = Tensor::from_host(&[value as f32], [1].into(), cx.device())?;
    let back = || Kept { logits, target: target.clone(), members, ignore: how.ignore, name, terms };
    Ok((cx.record(scalar, &[node], || Box::new(back())), value))
}

/// What stands for the sums of a loss that is not computed.
fn unknown() -> (Sums, &'static str) {
    let [intersection, predicted, truth] = [(); 3].map(|()| Vec::new());
    (Sums { intersection, predicted, truth, cross_entropy: 0.0, valid: 1, chosen: None }, "none")
}

/// The loss, and how it grows with the sums that it is made of.
#[derive(Debug, Default)]
struct Terms {
    value: f64,
    /// `[sample or batch][channel]`.
    intersection: Vec<f64>,
    predicted: Vec<f64>,
    cross_entropy: f64,
    chosen: Option<Vec<bool>>,
}

fn terms(how: &Loss, channels: usize, samples: usize, voxels: usize, top: Option<usize>, sums: Sums) -> Terms {
    let count = match (&how.outputs, how.ignore, top) {
        (_, _, Some(top)) => top,
        (Outputs::Labels, ..) | (_, Some(_), _) => sums.valid,
        _ => samples * voxels * channels,
    };
    let mut terms = Terms { chosen: sums.chosen, ..Terms::default() };
    if how.cross_entropy != 0.0 && count > 0 {
        terms.cross_entropy = how.cross_entropy / count as f64;
        terms.value = terms.cross_entropy * sums.cross_entropy;
    }
    let groups = if how.batch_dice { 1 } else { samples };
    terms.intersection = vec![0.0; groups * channels];
    terms.predicted = vec![0.0; groups * channels];
    if how.dice == 0.0 {
        return terms;
    }
    let first = usize::from(!how.background);
    let each = how.dice / (groups * (channels - first)) as f64;
    for group in 0..groups {
        for c in first..channels {
            let of = |all: &[f64]| -> f64 { all.iter().skip(group * channels + c).step_by(groups * channels).sum() };
            let sum = of(&sums.predicted) + of(&sums.truth) + how.smooth;
            // Not `max`, which would hide NaN.
            let denominator = if sum < 1e-8 { 1e-8 } else { sum };
            let numerator = 2.0 * of(&sums.intersection) + how.smooth;
            terms.value -= each * numerator / denominator;
            terms.intersection[group * channels + c] = -each * 2.0 / denominator;
            // A denominator that was raised does not grow.
            let slope = if sum < 1e-8 { 0.0 } else { each * numerator / (denominator * denominator) };
            terms.predicted[group * channels + c] = slope;
        }
    }
    terms
}

/// The way back of [`loss`].
struct Kept {
    logits: Tensor,
    target: LabelMap,
    members: Option<Members>,
    ignore: Option<u16>,
    /// The implementation.
    name: &'static str,
    terms: Terms,
}

/// The problem of logits of sizes `dims`.
fn problem<'a>(dims: &Dims, target: &'a LabelMap, ignore: Option<u16>, members: Option<&'a Members>) -> Problem<'a> {
    let [_, channels, d, h, w] = dims.five();
    Problem { channels, voxels: d * h * w, labels: &target.labels, ignore, regions: members }
}

/// Numbers per channel, scaled, as lanes; zero in those without a channel.
fn lanes(values: &[f64], channels: usize, scale: f64) -> Vec<[f32; BLOCK]> {
    let blocks = values.chunks_exact(channels).flat_map(|group| group.chunks(BLOCK));
    blocks.map(|b| std::array::from_fn(|i| b.get(i).map_or(0.0, |v| (v * scale) as f32))).collect()
}

impl<'m> Backward<'m> for Kept {
    fn name(&self) -> &'static str {
        OP
    }

    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor)) {
        visit(&self.logits);
    }

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, _: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { mut logits, target, members, ignore, name, terms } = *self;
        let scale = scalar(&dy)?;
        let dims = *logits.dims();
        let p = problem(&dims, &target, ignore, members.as_ref());
        let slopes = [&terms.intersection, &terms.predicted].map(|v| lanes(v, p.channels, scale));
        let slopes = Slopes {
            intersection: &slopes[0],
            predicted: &slopes[1],
            cross_entropy: (terms.cross_entropy * scale) as f32,
            chosen: terms.chosen.as_deref(),
        };
        if logits.is_unique() {
            let to = memory(OP, &mut logits)?;
            compute!(cx.device(), loss::backward(name, &p, &slopes, None, to), Ok(()))?;
            return Ok(vec![Some(logits)]);
        }
        let mut out = Tensor::empty(dims, Layout::BLOCKED, cx.device())?;
        let to = memory(OP, &mut out)?;
        compute!(cx.device(), loss::backward(name, &p, &slopes, Some(logits.as_slice()), to), Ok(()))?;
        Ok(vec![Some(out)])
    }
}

/// The number of a scalar `[1]` of the processor's.
pub(super) fn scalar(x: &Tensor) -> Result<f64> {
    match (x.dims().as_slice(), x.device().is_cpu()) {
        ([1], true) => Ok(f64::from(x.as_slice()[0])),
        _ => Err(Error::shape("weighted_sum", format!("{:?}, expected [1] on the processor", x.dims()))),
    }
}

/// The sum of scalars `[1]`, each times its weight: a scalar. What has weight 0 gets no gradient.
///
/// # Errors
/// [`Error::Shape`] for anything but scalars, or when all weights are 0; [`Error::OutOfMemory`].
pub fn weighted_sum(cx: &mut Ctx<'_>, mut terms: Vec<(Var, f64)>) -> Result<Var> {
    terms.retain(|(_, weight)| *weight != 0.0);
    if terms.is_empty() {
        return Err(Error::shape("weighted_sum", "no term of a weight other than 0"));
    }
    let mut sum = 0.0;
    for (x, weight) in &terms {
        sum += weight * scalar(x.value())?;
    }
    let nodes: Vec<_> = terms.iter().map(|(x, _)| x.node()).collect();
    let value = Tensor::from_host(&[sum as f32], [1].into(), cx.device().host())?;
    Ok(cx.record(value, &nodes, || Box::new(Weights(terms.into_iter().map(|(_, weight)| weight).collect()))))
}

/// The way back of [`weighted_sum`].
struct Weights(Vec<f64>);

impl<'m> Backward<'m> for Weights {
    fn name(&self) -> &'static str {
        "weighted_sum"
    }

    fn saved<'s>(&'s self, _: &mut dyn FnMut(&'s Tensor)) {}

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, _: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let dy = scalar(&dy)?;
        let one = |weight: &f64| Tensor::from_host(&[(weight * dy) as f32], [1].into(), cx.device().host()).map(Some);
        self.0.iter().map(one).collect()
    }
}
