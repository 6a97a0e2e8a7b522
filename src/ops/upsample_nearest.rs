//! Nearest-neighbour upsampling.

use super::{activation, floats, memory, processor};
use crate::autograd::{Ctx, Var};
use crate::backend::cpu::upsample_nearest::Problem;
use crate::backend::dispatch;
use crate::error::{Error, Result};
use crate::tensor::{Dims, Layout, Tensor};

/// Repeats every voxel of `[N, C, D, H, W]` `factor` times per axis: `out[z, y, x] = in[z / fz, y / fy, x / fx]`
/// (PyTorch's `interpolate(mode="nearest")` at a whole scale factor, as in STU-Net's decoder).
///
/// # Errors
/// [`Error::Shape`] for a factor of zero or an input that is no activation; [`Error::OutOfMemory`].
pub fn upsample_nearest(cx: &mut Ctx<'_>, x: Var, factor: [usize; 3]) -> Result<Var> {
    run(cx, x, factor, None)
}

pub(super) fn run(cx: &mut Ctx<'_>, x: Var, factor: [usize; 3], name: Option<&str>) -> Result<Var> {
    processor("upsample_nearest", cx.device())?;
    let [n, c, d, h, w] = activation("upsample_nearest", x.value().dims())?;
    if factor.contains(&0) {
        return Err(Error::shape("upsample_nearest", format!("factor {factor:?}, expected at least 1 per axis")));
    }
    if factor == [1; 3] {
        return Ok(x);
    }
    let x = floats("upsample_nearest", x.into_value())?;
    let dims =
        Dims::from([n, c, d.saturating_mul(factor[0]), h.saturating_mul(factor[1]), w.saturating_mul(factor[2])]);
    let mut out = Tensor::empty(dims, Layout::BLOCKED, cx.device())?;
    let p = Problem { space: [d, h, w], factor };
    let to = memory("upsample_nearest", &mut out)?;
    dispatch!(cx.device(), upsample_nearest::forward(name, &p, x.as_slice(), to))?;
    Ok(cx.leaf(out))
}
