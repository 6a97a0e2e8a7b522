//! Instance normalisation, with what a residual block does next.

use super::lazy::{Affine, Moments};
use super::{activation, blocked, on_card};
use crate::autograd::{Ctx, Param, Var};
use crate::backend::dispatch;
use crate::error::Result;

/// How to normalise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InstanceNorm {
    /// Added to the variance.
    pub eps: f32,
    /// Leaky ReLU applied last, if any.
    pub slope: Option<f32>,
}

/// `leaky_relu((x - mean) / sqrt(variance + eps) * w + b + residual)` for `x` and `residual` of sizes
/// `[N, C, D, H, W]`, `w` and `b` of size `[C]`; mean and (biased) variance are those of each sample's channel over its
/// voxels (Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", 2016; PyTorch's `InstanceNorm3d(affine=True)`).
/// A single voxel has variance zero and gives `b`, where PyTorch refuses in training mode.
///
/// Works in place in `x` or `residual`, whichever has no other owner. The statistics are accumulated in f64 over
/// fixed pieces, so they depend neither on the number of threads nor, beyond rounding, on the size of the mean.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) when the sizes do not fit;
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn instance_norm<'m>(
    cx: &mut Ctx<'m>,
    x: Var,
    w: &'m Param,
    b: &'m Param,
    residual: Option<Var>,
    how: InstanceNorm,
) -> Result<Var> {
    run(cx, x, w, b, residual, how, None)
}

pub(super) fn run(
    cx: &mut Ctx<'_>,
    x: Var,
    w: &Param,
    b: &Param,
    residual: Option<Var>,
    how: InstanceNorm,
    name: Option<&str>,
) -> Result<Var> {
    const OP: &str = "instance_norm";
    let [_, c, d, h, space_w] = activation(OP, x.value().dims())?;
    on_card!(cx.device(), super::cuda::instance_norm(cx, x, w, b, residual, how));
    let x = x.reformed(|x| blocked(OP, x))?;
    let blocks = dispatch!(cx.device(), instance_norm::measure(name, d * h * space_w, x.value().stored()))?;
    let norm = Affine::new(&Moments::new(c, blocks), w, b, how)?;
    norm.apply_by(cx, x, residual, name)
}
