//! Leaky rectified linear unit.

use super::{activation, floats, memory, processor};
use crate::autograd::{Backward, Ctx, Grads, Var};
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
    let nodes = [x.node()];
    let mut x = floats("leaky_relu", x.into_value())?;
    // The sign of the result tells the input's, so that the input need not be kept, unless the slope turns it over.
    let turns = slope.is_nan() || slope < 0.0;
    let kept = (turns && cx.is_recorded()).then(|| x.clone());
    let y = if x.is_unique() {
        dispatch!(cx.device(), leaky_relu::forward(name, None, slope, memory("leaky_relu", &mut x)?))?;
        x
    } else {
        let mut out = Tensor::empty(*x.dims(), Layout::BLOCKED, cx.device())?;
        let to = memory("leaky_relu", &mut out)?;
        dispatch!(cx.device(), leaky_relu::forward(name, Some(x.as_slice()), slope, to))?;
        out
    };
    let sign = kept.unwrap_or_else(|| y.clone());
    Ok(cx.record(y, &nodes, || Box::new(LeakyReluBackward { sign, slope })))
}

struct LeakyReluBackward {
    /// Positive where the input is.
    sign: Tensor,
    slope: f32,
}

impl<'m> Backward<'m> for LeakyReluBackward {
    fn name(&self) -> &'static str {
        "leaky_relu"
    }

    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor)) {
        visit(&self.sign);
    }

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, _: &mut Grads, mut dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let sign = self.sign.as_slice();
        if let Some(dx) = dy.as_mut_slice() {
            dispatch!(cx.device(), leaky_relu::backward(sign, self.slope, None, dx));
            return Ok(vec![Some(dy)]);
        }
        let mut out = Tensor::empty(*dy.dims(), Layout::BLOCKED, cx.device())?;
        let dx = memory("leaky_relu", &mut out)?;
        dispatch!(cx.device(), leaky_relu::backward(sign, self.slope, Some(dy.as_slice()), dx));
        Ok(vec![Some(out)])
    }
}
