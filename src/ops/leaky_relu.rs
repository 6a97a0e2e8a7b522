//! Leaky rectified linear unit.

use super::{activation, floats, memory, processor};
use crate::autograd::{Ctx, Var};
use crate::backend::dispatch;
use crate::error::Result;
use crate::tensor::{Layout, Tensor};

/// `x` where `x > 0`, else `slope * x`, for an activation `[N, C, D, H, W]` (PyTorch's `leaky_relu`). In place when `x`
/// has no other owner.
///
/// # Errors
/// [`crate::Error::Shape`] when `x` is not an activation; [`crate::Error::OutOfMemory`] when it cannot be overwritten
/// and there is no memory for the result.
pub fn leaky_relu(cx: &mut Ctx<'_>, x: Var, slope: f32) -> Result<Var> {
    run(cx, x, slope, None)
}

pub(super) fn run(cx: &mut Ctx<'_>, x: Var, slope: f32, name: Option<&str>) -> Result<Var> {
    processor("leaky_relu", cx.device())?;
    activation("leaky_relu", x.value().dims())?;
    let mut x = floats("leaky_relu", x.into_value())?;
    if x.is_unique() {
        dispatch!(cx.device(), leaky_relu::forward(name, None, slope, memory("leaky_relu", &mut x)?))?;
        return Ok(cx.leaf(x));
    }
    let mut out = Tensor::empty(*x.dims(), Layout::BLOCKED, cx.device())?;
    let to = memory("leaky_relu", &mut out)?;
    dispatch!(cx.device(), leaky_relu::forward(name, Some(x.as_slice()), slope, to))?;
    Ok(cx.leaf(out))
}
