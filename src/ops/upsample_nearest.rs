//! Nearest-neighbour upsampling.

use super::{activation, floats, memory, on_card};
use crate::autograd::{Backward, Ctx, Grads, Var};
use crate::backend::compute;
use crate::backend::cpu::upsample_nearest::Problem;
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
    let [n, c, d, h, w] = activation("upsample_nearest", x.value().dims())?;
    if factor.contains(&0) {
        return Err(Error::shape("upsample_nearest", format!("factor {factor:?}, expected at least 1 per axis")));
    }
    if factor == [1; 3] {
        return Ok(x);
    }
    let nodes = [x.node()];
    let dims =
        Dims::from([n, c, d.saturating_mul(factor[0]), h.saturating_mul(factor[1]), w.saturating_mul(factor[2])]);
    on_card!(cx.device(), {
        let x = super::computed_with("upsample_nearest", x.into_value())?;
        let back = UpsampleBackward { dims: *x.dims(), factor };
        let out = super::cuda::spread("upsample_nearest", x, dims, factor, 1.0)?;
        Ok(cx.record(out, &nodes, || Box::new(back)))
    });
    let x = floats("upsample_nearest", x.into_value())?;
    let mut out = Tensor::empty(dims, Layout::BLOCKED, cx.device())?;
    let p = Problem { space: [d, h, w], factor };
    let to = memory("upsample_nearest", &mut out)?;
    compute!(cx.device(), upsample_nearest::forward(name, &p, x.as_slice(), to), Ok(()))?;
    Ok(cx.record(out, &nodes, || Box::new(UpsampleBackward { dims: *x.dims(), factor })))
}

/// The gradient of a voxel is the sum of those of its repetitions.
struct UpsampleBackward {
    /// Sizes of the input.
    dims: Dims,
    factor: [usize; 3],
}

impl<'m> Backward<'m> for UpsampleBackward {
    fn name(&self) -> &'static str {
        "upsample_nearest"
    }

    fn saved<'s>(&'s self, _: &mut dyn FnMut(&'s Tensor)) {}

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, _: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(summed(cx, dy, self.dims, self.factor)?)])
    }
}

/// The sum over the voxels that repeat each voxel of `dims`.
pub(super) fn summed(cx: &Ctx<'_>, dy: Tensor, dims: Dims, factor: [usize; 3]) -> Result<Tensor> {
    on_card!(cx.device(), super::cuda::pooled("upsample_nearest", dy, factor, 1.0));
    let mut dx = Tensor::empty(dims, Layout::BLOCKED, cx.device())?;
    let p = Problem { space: dims.space(), factor };
    let to = memory("upsample_nearest", &mut dx)?;
    compute!(cx.device(), upsample_nearest::backward(&p, dy.as_slice(), to), ());
    Ok(dx)
}
