//! The last 1x1x1 convolution and the decision in one pass.

use super::{activation, blocked, on_card};
use crate::autograd::{Ctx, Var};
use crate::backend::cpu::head_labels::Problem;
use crate::backend::dispatch;
use crate::error::{Error, Result};

const OP: &str = "head_labels";

/// The label of every voxel of features `[N, C, D, H, W]`: the first class of the largest score
/// `bias[class] + sum over c of weight[class][c] x[c]`, in the order `[N, D, H, W]`. The scores are never in memory. A
/// voxel without any score above minus infinity gets label 0.
///
/// # Errors
/// [`Error::Shape`] when `weight` is not `[classes][C]` for as many classes as `bias` has, 1 to 65536;
/// [`Error::OutOfMemory`].
pub fn head_labels(cx: &mut Ctx<'_>, x: Var, weight: &[f32], bias: &[f32]) -> Result<Vec<u16>> {
    run(cx, x, weight, bias, None)
}

/// As [`head_labels`] where nobody reads the labels: on a card they stay there.
pub(super) fn unread(cx: &mut Ctx<'_>, x: Var, weight: &[f32], bias: &[f32]) -> Result<()> {
    sizes(&x, weight, bias)?;
    on_card!(cx.device(), super::cuda::head_labels(cx, x, weight, bias).map(drop));
    run(cx, x, weight, bias, None).map(drop)
}

/// Those of `x`, which weights and biases fit.
fn sizes(x: &Var, weight: &[f32], bias: &[f32]) -> Result<[usize; 5]> {
    let sizes = activation(OP, x.value().dims())?;
    let (channels, classes) = (sizes[1], bias.len());
    if !(1..=1 << 16).contains(&classes) || weight.len() != classes * channels {
        let what = format!("{} weights for {classes} classes and {channels} channels", weight.len());
        return Err(Error::shape(OP, what));
    }
    Ok(sizes)
}

pub(super) fn run(cx: &mut Ctx<'_>, x: Var, weight: &[f32], bias: &[f32], name: Option<&str>) -> Result<Vec<u16>> {
    let [n, channels, d, h, w] = sizes(&x, weight, bias)?;
    let classes = bias.len();
    let clock = cx.clock();
    let voxels = d * h * w;
    on_card!(cx.device(), {
        let there = super::cuda::head_labels(cx, x, weight, bias)?;
        // Zeros and their page faults take the processor's time while the card computes.
        let mut out = labels(n * voxels, cx)?;
        super::cuda::read_labels(&there, &mut out)?;
        Ok(out)
    });
    let mut out = labels(n * voxels, cx)?;
    let x = blocked(OP, x.into_value())?;
    let p = Problem { x: x.stored(), channels, voxels, weight, bias };
    let ran = dispatch!(cx.device(), head_labels::forward(name, &p, &mut out))?;
    let macs = [n, voxels, channels, classes].iter().fold(1, |n: u64, &v| n.saturating_mul(v as u64));
    cx.note(OP, clock, ran, macs, || format!("{channels}->{classes} at {d}x{h}x{w}"));
    Ok(out)
}

/// Zeros, or an error where there is no memory.
fn labels(n: usize, cx: &Ctx<'_>) -> Result<Vec<u16>> {
    let mut out = Vec::new();
    out.try_reserve_exact(n).map_err(|_| {
        let memory = cx.device().memory();
        let limit = memory.limit.unwrap_or(usize::MAX);
        Error::OutOfMemory { what: "the labels".into(), asked: 2 * n, in_use: memory.in_use, limit }
    })?;
    out.resize(n, 0);
    Ok(out)
}
