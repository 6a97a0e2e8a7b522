//! Instance normalisation, with what a residual block does next.

use super::{activation, blocked, memory};
use crate::autograd::{Ctx, Param, Var};
use crate::backend::cpu::instance_norm::{Operand, Problem};
use crate::backend::dispatch;
use crate::error::{Error, Result};
use crate::tensor::{BLOCK, Layout, Tensor};

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
/// [`Error::Shape`] when the sizes do not fit; [`Error::OutOfMemory`].
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
    for (what, p) in [("weight", w), ("bias", b)] {
        if p.dims().as_slice() != [c] || p.value().as_slice().len() != Layout::BLOCKED.padded(c) {
            return Err(Error::shape(OP, format!("{what} of size {:?} for {c} channels", p.dims())));
        }
    }
    if let Some(r) = &residual
        && r.value().dims() != x.value().dims()
    {
        let (x, r) = (x.value().dims(), r.value().dims());
        return Err(Error::shape(OP, format!("input {x:?} and residual {r:?}, expected equal sizes")));
    }
    let mut x = blocked(OP, x.into_value())?;
    let mut residual = residual.map(|r| blocked(OP, r.into_value())).transpose()?;
    let mut p = Problem {
        blocks: c.div_ceil(BLOCK),
        space: d * h * space_w,
        x: Operand::Out,
        residual: None,
        weight: w.value().as_slice(),
        bias: b.value().as_slice(),
        eps: how.eps,
        slope: how.slope,
    };
    if x.is_unique() {
        p.residual = residual.as_ref().map(|r| Operand::At(r.as_slice()));
        dispatch!(cx.device(), instance_norm::forward(name, &p, memory(OP, &mut x)?))?;
        return Ok(cx.leaf(x));
    }
    p.x = Operand::At(x.as_slice());
    if let Some(mut r) = residual.take_if(|r| r.is_unique()) {
        p.residual = Some(Operand::Out);
        dispatch!(cx.device(), instance_norm::forward(name, &p, memory(OP, &mut r)?))?;
        return Ok(cx.leaf(r));
    }
    p.residual = residual.as_ref().map(|r| Operand::At(r.as_slice()));
    let mut out = Tensor::empty(*x.dims(), Layout::BLOCKED, cx.device())?;
    dispatch!(cx.device(), instance_norm::forward(name, &p, memory(OP, &mut out)?))?;
    Ok(cx.leaf(out))
}
