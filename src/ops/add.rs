//! Elementwise sum.

use super::{activation, floats, memory, on_card};
use crate::autograd::{Backward, Ctx, Grads, Var};
use crate::backend::compute;
use crate::error::{Error, Result};
use crate::tensor::{Layout, Tensor};

/// `a + b` for two activations `[N, C, D, H, W]` of the same sizes. In place in whichever has no other owner.
///
/// # Errors
/// [`Error::Shape`] when the sizes differ; [`Error::OutOfMemory`] when neither can be overwritten and there is no
/// memory for the sum.
pub fn add(cx: &mut Ctx<'_>, a: Var, b: Var) -> Result<Var> {
    run(cx, a, b, None)
}

pub(super) fn run(cx: &mut Ctx<'_>, a: Var, b: Var, name: Option<&str>) -> Result<Var> {
    let nodes = [a.node(), b.node()];
    let (a, b) = (a.into_value(), b.into_value());
    activation("add", a.dims())?;
    if a.dims() != b.dims() {
        return Err(Error::shape("add", format!("{:?} and {:?}, expected equal sizes", a.dims(), b.dims())));
    }
    on_card!(cx.device(), {
        let sum = super::cuda::add("add", a, b)?;
        Ok(cx.record(sum, &nodes, || Box::new(AddBackward)))
    });
    let (a, b) = (floats("add", a)?, floats("add", b)?);
    // The sum of two floats does not depend on their order, so either may be the place of the result.
    let (mut a, b) = if a.is_unique() { (a, b) } else { (b, a) };
    if a.is_unique() {
        compute!(cx.device(), add::forward(name, None, b.as_slice(), memory("add", &mut a)?), Ok(()))?;
        return Ok(cx.record(a, &nodes, || Box::new(AddBackward)));
    }
    let mut out = Tensor::empty(*a.dims(), Layout::BLOCKED, cx.device())?;
    compute!(cx.device(), add::forward(name, Some(a.as_slice()), b.as_slice(), memory("add", &mut out)?), Ok(()))?;
    Ok(cx.record(out, &nodes, || Box::new(AddBackward)))
}

/// The gradient of a sum is that of each of its parts.
struct AddBackward;

impl<'m> Backward<'m> for AddBackward {
    fn name(&self) -> &'static str {
        "add"
    }

    fn saved<'s>(&'s self, _: &mut dyn FnMut(&'s Tensor)) {}

    fn backward(self: Box<Self>, _: &mut Ctx<'m>, _: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(dy.clone()), Some(dy)])
    }
}
