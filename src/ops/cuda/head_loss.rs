//! The loss of a head on a card, see [`crate::ops::head_loss()`].

use super::{as_voxels, backend, card, filter, memory, note, plain, upload, voxels};
use crate::autograd::{Backward, Ctx, Grads, Param, Var};
use crate::backend::cuda::head_loss as kernel;
use crate::error::{Error, Result};
use crate::ops::activation;
use crate::ops::head_loss::{LossValue, Target};
use crate::ops::loss::{LabelMap, Loss, Outputs, scalar};
use crate::tensor::{Device, Dims, Precision, Tensor};

const OP: &str = "head_loss";

/// What a card has of a target, sent before a pass so that the pass is launches only.
#[derive(Debug, Clone)]
pub(in crate::ops) struct CardTarget {
    /// Two to a float.
    labels: Tensor,
    /// Which labels are in which regions, with the length of a row.
    members: Option<(Tensor, usize)>,
}

impl CardTarget {
    pub(in crate::ops) fn new(map: &LabelMap, outputs: &Outputs, device: &Device) -> Result<Self> {
        let labels = plain(map.labels().len().div_ceil(2), device)?;
        card(OP, device)?.upload(memory(OP, device, &labels)?, bytemuck::cast_slice(map.labels()))?;
        Self::of(labels, outputs)
    }

    /// Of labels that are there.
    pub(in crate::ops) fn of(labels: Tensor, outputs: &Outputs) -> Result<Self> {
        let device = labels.device();
        let members = match outputs {
            Outputs::Labels => None,
            Outputs::Regions(regions) => {
                let words = kernel::pack_regions(regions);
                let rows = words.len() / regions.len().div_ceil(backend::BLOCK).max(1);
                Some((upload(OP, bytemuck::cast_slice(&words), Precision::F16, device)?, rows))
            }
        };
        Ok(Self { labels, members })
    }
}

/// The labels at the size `space`.
fn labels_at(cx: &Ctx<'_>, target: &Target, space: [usize; 3]) -> Result<Tensor> {
    let missing = || Error::shape(OP, "labels that are not on the card");
    let labels = &target.card.as_ref().ok_or_else(missing)?.labels;
    let [batch, from @ ..] = target.dims();
    if from == space {
        return Ok(labels.clone());
    }
    let device = cx.device();
    let out = plain((batch * space.iter().product::<usize>()).div_ceil(2), device)?;
    let p = kernel::Labels {
        batch,
        from_space: from,
        labels: memory(OP, device, labels)?,
        space,
        out: memory(OP, device, &out)?,
    };
    kernel::labels(card(OP, device)?, &p)?;
    Ok(out)
}

/// What both passes read.
struct Kept {
    features: Tensor,
    labels: Tensor,
    slopes: Tensor,
    /// Of regions, with the length of a row.
    members: Option<(Tensor, usize)>,
}

/// The problem of a head.
fn problem(cx: &Ctx<'_>, kept: &Kept, w: &Param, b: Option<&Param>, how: &Loss) -> Result<kernel::Problem> {
    let device = cx.device();
    let at = |t: &Tensor| memory(OP, device, t);
    let [batch, channels, space @ ..] = kept.features.dims().five();
    let precision = kept.features.precision();
    // The features' storage is that of the pass, whatever the pass computes with now.
    let held =
        (precision != w.precision()).then(|| filter::kept(OP, device, w, precision, filter::Kept::Same)).transpose()?;
    let regions = match &kept.members {
        Some((t, rows)) => Some(kernel::Regions { members: at(t)?, rows: *rows }),
        None => None,
    };
    Ok(kernel::Problem {
        storage: precision.into(),
        batch,
        space,
        features: at(&kept.features)?,
        channels,
        weight: at(held.as_deref().unwrap_or(w.value()))?,
        bias: b.map(|b| at(b.value())).transpose()?,
        classes: w.dims().five()[0],
        labels: at(&kept.labels)?,
        regions,
        ignore: how.ignore,
        batch_dice: how.batch_dice,
        slopes: at(&kept.slopes)?,
        workspace: at(&kept.slopes)?,
    })
}

/// Room for what a pass adds up.
fn workspace(cx: &Ctx<'_>, p: &mut kernel::Problem) -> Result<Tensor> {
    let (device, driver) = (cx.device(), card(OP, cx.device())?);
    let work = plain(kernel::workspace_bytes(driver, p)?.div_ceil(4).max(1), device)?;
    p.workspace = memory(OP, device, &work)?;
    Ok(work)
}

/// See [`crate::ops::head_loss()`].
pub(in crate::ops) fn head_loss<'m>(
    cx: &mut Ctx<'m>,
    features: Var,
    w: &'m Param,
    b: Option<&'m Param>,
    target: &Target,
    how: &Loss,
) -> Result<(Var, LossValue)> {
    let [classes, inputs, kernel @ ..] = w.dims().five();
    let [batch, channels, space @ ..] = activation(OP, features.value().dims())?;
    if kernel != [1; 3] || inputs != channels {
        return Err(Error::shape(OP, format!("a head {:?} for {channels} channels", w.dims())));
    }
    how.check(classes)?;
    let clock = cx.clock();
    let node = features.node();
    let precision = features.value().precision();
    let features = as_voxels(OP, features.into_value(), precision)?;
    let members = target.card.as_ref().and_then(|c| c.members.clone());
    if members.is_some() != matches!(how.outputs, Outputs::Regions(_)) {
        return Err(Error::shape(OP, "a target of labels for regions, or of regions for labels"));
    }
    let slopes = plain(kernel::slopes_bytes(batch, classes, how.batch_dice).div_ceil(4), cx.device())?;
    let kept = Kept { features, labels: labels_at(cx, target, space)?, slopes, members };
    let mut p = problem(cx, &kept, w, b, how)?;
    let work = workspace(cx, &mut p)?;
    let terms = kernel::Terms {
        cross_entropy: how.cross_entropy,
        top: how.top,
        dice: how.dice,
        background: how.background,
        smooth: how.smooth,
    };
    let value = plain(1, cx.device())?;
    kernel::forward(card(OP, cx.device())?, &p, &terms, memory(OP, cx.device(), &value)?)?;
    drop(work);
    let macs = [batch, classes, channels].iter().chain(&space).fold(1, |n: u64, &v| n.saturating_mul(v as u64));
    note(cx, OP, clock, "fused", macs, || format!("{channels}->{classes} at {space:?}"))?;
    // The gradient by a scalar is a number, which is known before the scalar.
    let scalar = Tensor::from_host(&[f32::NAN], [1].into(), cx.device().host())?;
    let how = how.clone();
    let back = || HeadLoss { kept, w, b, how };
    Ok((cx.record(scalar, &[node], || Box::new(back())), LossValue::on_card(value)))
}

/// The way back.
struct HeadLoss<'m> {
    kept: Kept,
    w: &'m Param,
    b: Option<&'m Param>,
    how: Loss,
}

impl<'m> Backward<'m> for HeadLoss<'m> {
    fn name(&self) -> &'static str {
        OP
    }

    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor)) {
        visit(&self.kept.features);
        visit(&self.kept.labels);
        visit(&self.kept.slopes);
    }

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, grads: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { kept, w, b, how } = *self;
        let clock = cx.clock();
        let scale = scalar(&dy)? as f32;
        let device = cx.device();
        let features = &kept.features;
        let dims: Dims = *features.dims();
        let mut p = problem(cx, &kept, w, b, &how)?;
        let _work = workspace(cx, &mut p)?;
        let dx = voxels(OP, dims, features.precision(), device)?;
        let dw = plain(filter::floats(w)?, device)?;
        let db = b.map(|b| plain(filter::floats(b)?, device)).transpose()?;
        let to = kernel::Gradients {
            scale,
            features: memory(OP, device, &dx)?,
            weight: memory(OP, device, &dw)?,
            bias: db.as_ref().map(|t| memory(OP, device, t)).transpose()?,
        };
        kernel::backward(card(OP, device)?, &p, &to)?;
        let [_, channels, space @ ..] = dims.five();
        note(cx, "head_loss backward", clock, "fused", 0, || format!("{channels} at {space:?}"))?;
        grads.add_param(w.id(), dw)?;
        if let (Some(b), Some(db)) = (b, db) {
            grads.add_param(b.id(), db)?;
        }
        Ok(vec![Some(dx)])
    }
}
