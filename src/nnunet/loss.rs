//! Which loss nnU-Net trains with, and on which of a network's outputs.

use crate::autograd::{Ctx, Var};
use crate::error::{Error, Result};
use crate::models::Scored;
use crate::ops::{self, LabelMap, Loss, LossValue, Outputs, Target};

/// The losses of nnU-Net's trainers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Criterion {
    /// Dice and cross-entropy: `nnUNetTrainer`.
    #[default]
    DiceCe,
    /// The same with Dice not smoothed: `nnUNetTrainerDiceCELoss_noSmooth`.
    DiceCeNoSmooth,
    /// `nnUNetTrainerDiceLoss`.
    Dice,
    /// `nnUNetTrainerCELoss`; labels only.
    Ce,
    /// The largest tenth of the cross-entropies: `nnUNetTrainerTopk10Loss`; labels only.
    TopK10,
    /// Dice and the largest tenth of the cross-entropies: `nnUNetTrainerDiceTopK10Loss`; labels only.
    DiceTopK10,
}

impl Criterion {
    /// The loss for a data set: what its outputs are, its ignore label, and whether the plans ask for Dice over the batch.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for regions with a criterion for labels only.
    pub fn loss(self, outputs: Outputs, ignore: Option<u16>, batch_dice: bool) -> Result<Loss> {
        let labels_only = matches!(self, Criterion::Ce | Criterion::TopK10 | Criterion::DiceTopK10);
        if labels_only && outputs != Outputs::Labels {
            return Err(Error::unsupported(format!("{self:?} with regions, expected a data set of labels")));
        }
        let mut loss = Loss { ignore, batch_dice, ..Loss::new(outputs) };
        match self {
            Criterion::DiceCe => {}
            Criterion::DiceCeNoSmooth => loss.smooth = 0.0,
            Criterion::Dice => loss.cross_entropy = 0.0,
            Criterion::Ce => loss.dice = 0.0,
            Criterion::TopK10 => (loss.dice, loss.top) = (0.0, Some(10.0)),
            Criterion::DiceTopK10 => loss.top = Some(10.0),
        }
        Ok(loss)
    }
}

/// How much each output counts, the largest first: half of the one before, the last one not at all, one in total. A single
/// output, which is no deep supervision, counts in full.
#[must_use]
pub fn deep_supervision_weights(outputs: usize) -> Vec<f64> {
    if outputs == 1 {
        return vec![1.0];
    }
    let half = |i| if i + 1 < outputs { 0.5f64.powi(i32::try_from(i).unwrap_or(i32::MAX)) } else { 0.0 };
    let weights: Vec<f64> = (0..outputs).map(half).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / total).collect()
}

/// The labels at the size `space` (D, H, W): those of the voxels whose centres are nearest, `floor((i + 1/2) in / out)`
/// along each axis (PyTorch's `nearest-exact`). Shares the memory where the size stays.
///
/// # Errors
/// [`Error::Shape`] for an empty size.
pub fn downsampled(target: &LabelMap, space: [usize; 3]) -> Result<LabelMap> {
    let [n, d, h, w] = target.dims();
    if space == [d, h, w] {
        return Ok(target.clone());
    }
    if target.labels().is_empty() || space.contains(&0) {
        return Err(Error::shape("downsampled", format!("labels of {:?} at {space:?}", target.dims())));
    }
    let sources = |from: usize, to: usize| -> Vec<usize> { (0..to).map(|i| (2 * i + 1) * from / (2 * to)).collect() };
    let [zs, ys, xs] = [sources(d, space[0]), sources(h, space[1]), sources(w, space[2])];
    let mut labels = Vec::with_capacity(n * zs.len() * ys.len() * xs.len());
    for sample in target.labels().chunks_exact(d * h * w) {
        for z in &zs {
            for y in &ys {
                let row = &sample[(z * h + y) * w..][..w];
                labels.extend(xs.iter().map(|x| row[*x]));
            }
        }
    }
    LabelMap::new(labels, [n, space[0], space[1], space[2]])
}

/// The loss of a network's `outputs` `[N, C, D, H, W]`, the largest first, each against the labels at its size, weighted by
/// [`deep_supervision_weights`]; outputs of weight 0 are not looked at. A scalar `[1]`, and its value in f64.
///
/// # Errors
/// Those of [`ops::loss`]; [`Error::Shape`] without outputs.
pub fn deep_supervised(cx: &mut Ctx<'_>, outputs: Vec<Var>, target: &LabelMap, how: &Loss) -> Result<(Var, f64)> {
    let weights = deep_supervision_weights(outputs.len());
    supervised(cx, outputs, &weights, target, how)
}

/// The same with other weights; an output without one, or a weight without an output, does not count (nnU-Net's
/// `DeepSupervisionWrapper`).
///
/// # Errors
/// As [`deep_supervised`].
pub fn supervised(
    cx: &mut Ctx<'_>,
    outputs: Vec<Var>,
    weights: &[f64],
    target: &LabelMap,
    how: &Loss,
) -> Result<(Var, f64)> {
    let (mut terms, mut total) = (Vec::new(), 0.0);
    for (output, &weight) in outputs.into_iter().zip(weights) {
        if weight == 0.0 {
            continue;
        }
        let target = downsampled(target, output.value().dims().space())?;
        let (loss, value) = ops::loss(cx, output, &target, how)?;
        total += weight * value;
        terms.push((loss, weight));
    }
    Ok((ops::weighted_sum(cx, terms)?, total))
}

/// The same of heads whose scores need not be in memory.
///
/// # Errors
/// Those of [`ops::head_loss()`]; [`Error::Shape`] without outputs.
pub fn supervised_heads<'m>(
    cx: &mut Ctx<'m>,
    heads: Vec<Scored<'m>>,
    weights: &[f64],
    target: &Target,
    how: &Loss,
) -> Result<(Var, LossValue)> {
    if cx.device().is_cpu() {
        let scores = heads.into_iter().map(|h| h.scores(cx)).collect::<Result<_>>()?;
        let (loss, value) = supervised(cx, scores, weights, target.map()?, how)?;
        return Ok((loss, LossValue::known(value)));
    }
    let (mut terms, mut values) = (Vec::new(), Vec::new());
    for (head, &weight) in heads.into_iter().zip(weights) {
        if weight != 0.0 {
            let (loss, value) = head.loss(cx, target, how)?;
            terms.push((loss, weight));
            values.push((value, weight));
        }
    }
    Ok((ops::weighted_sum(cx, terms)?, LossValue::sum(values)))
}
