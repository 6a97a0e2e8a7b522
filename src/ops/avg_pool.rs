//! Average pooling.

use super::{activation, computed_with, floats, memory, on_card};
use crate::autograd::{Backward, Ctx, Grads, Var};
use crate::backend::compute;
use crate::backend::cpu::avg_pool::Problem;
use crate::error::{Error, Result};
use crate::tensor::{Dims, Layout, Tensor};

const OP: &str = "avg_pool";

/// The mean over blocks of `kernel` voxels of `[N, C, D, H, W]`, next to each other: `[N, C, D / kD, H / kH, W / kW]`,
/// rounded down; voxels past the last whole block have no part in it (PyTorch's `AvgPool3d(kernel, stride=kernel)`, the
/// shortcut of nnU-Net's residual encoder).
///
/// # Errors
/// [`Error::Shape`] for an input that is no activation, or a kernel with a zero or larger than the input;
/// [`Error::OutOfMemory`].
pub fn avg_pool(cx: &mut Ctx<'_>, x: Var, kernel: [usize; 3]) -> Result<Var> {
    run(cx, x, kernel, None)
}

pub(super) fn run(cx: &mut Ctx<'_>, x: Var, kernel: [usize; 3], name: Option<&str>) -> Result<Var> {
    let dims = *x.value().dims();
    let [n, c, space @ ..] = activation(OP, &dims)?;
    if (0..3).any(|a| kernel[a] == 0 || kernel[a] > space[a]) {
        return Err(Error::shape(OP, format!("kernel {kernel:?} for an input {dims:?}")));
    }
    if kernel == [1; 3] {
        return x.reformed(|x| computed_with(OP, x));
    }
    let p = Problem { space, kernel };
    let node = x.node();
    on_card!(cx.device(), {
        let x = computed_with(OP, x.into_value())?;
        let out = super::cuda::pooled(OP, x, kernel, 1.0 / kernel.iter().product::<usize>() as f32)?;
        Ok(cx.record(out, &[node], || Box::new(AvgPool { dims, kernel })))
    });
    let x = floats(OP, x.into_value())?;
    let [d, h, w] = p.output();
    let mut out = Tensor::empty(Dims::from([n, c, d, h, w]), Layout::BLOCKED, cx.device())?;
    compute!(cx.device(), avg_pool::forward(name, &p, x.as_slice(), memory(OP, &mut out)?), Ok(()))?;
    Ok(cx.record(out, &[node], || Box::new(AvgPool { dims, kernel })))
}

/// The way back needs no value of the way forward.
struct AvgPool {
    /// Of the input.
    dims: Dims,
    kernel: [usize; 3],
}

impl<'m> Backward<'m> for AvgPool {
    fn name(&self) -> &'static str {
        OP
    }

    fn saved<'s>(&'s self, _: &mut dyn FnMut(&'s Tensor)) {}

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, _: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(input_gradient(cx, &dy, self.dims, self.kernel, None)?)])
    }
}

/// The gradient by an input of sizes `dims`: every voxel of a block has an equal share of that of the block's mean.
pub(super) fn input_gradient(
    cx: &Ctx<'_>,
    dy: &Tensor,
    dims: Dims,
    kernel: [usize; 3],
    name: Option<&str>,
) -> Result<Tensor> {
    let p = Problem { space: dims.space(), kernel };
    if dy.dims().five()[..2] != dims.five()[..2] || dy.dims().space() != p.output() {
        return Err(Error::shape(OP, format!("a gradient of {:?} for an input {dims:?}", dy.dims())));
    }
    on_card!(
        cx.device(),
        super::cuda::spread(OP, dy.clone(), dims, kernel, 1.0 / kernel.iter().product::<usize>() as f32)
    );
    let mut dx = Tensor::empty(dims, Layout::BLOCKED, cx.device())?;
    compute!(cx.device(), avg_pool::input_gradient(name, &p, dy.as_slice(), memory(OP, &mut dx)?), Ok(()))?;
    Ok(dx)
}
