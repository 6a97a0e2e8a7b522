//! The way back of the convolution, and of the end of a residual block. What is kept are the inputs as they are stored:
//! normalised and repeated again while the filter's gradient reads them.

use super::{Conv3d, OP, concatenated, describe, geometry, macs, one_layout};
use crate::autograd::{Backward, Ctx, Grads, Param};
use crate::backend::cpu::conv3d::Geometry;
use crate::error::Result;
use crate::ops::conv3d_grad::{By, Layer, bias_grad, dgrad, wgrad};
#[cfg(feature = "cuda")]
use crate::ops::cuda;
use crate::ops::lazy::{Affine, Source, Sources};
use crate::tensor::Tensor;

/// Of [`super::conv3d`].
pub(super) struct ConvBackward<'m> {
    pub(super) sources: Vec<Source>,
    pub(super) w: &'m Param,
    pub(super) b: Option<&'m Param>,
    pub(super) how: Conv3d,
}

impl<'m> Backward<'m> for ConvBackward<'m> {
    fn name(&self) -> &'static str {
        OP
    }

    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor)) {
        self.sources.iter().for_each(|s| visit(s.value.value()));
    }

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, grads: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { sources, w, b, how } = *self;
        #[cfg(feature = "cuda")]
        if !cx.device().is_cpu() {
            if let Some(b) = b {
                let db = cuda::bias(cx, &dy)?;
                grads.add_param(b.id(), db)?;
            }
            return cuda::conv3d_gradients(cx, grads, sources, w, how, dy);
        }
        if let Some(b) = b {
            let clock = cx.clock();
            let db = bias_grad(&dy, None)?;
            cx.note("conv3d bias gradient", clock, cx.device().isa().name(), 0, || format!("{:?}", dy.dims()));
            grads.add_param(b.id(), db)?;
        }
        gradients(cx, grads, sources, w, how, dy)
    }
}

/// Of [`super::conv3d_residual`].
pub(super) struct ResidualBackward<'m> {
    /// Before it was normalised.
    pub(super) y: Tensor,
    pub(super) norm: Affine,
    pub(super) result: Tensor,
    pub(super) conv: ConvBackward<'m>,
}

impl<'m> Backward<'m> for ResidualBackward<'m> {
    fn name(&self) -> &'static str {
        "conv3d_residual"
    }

    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor)) {
        visit(&self.y);
        visit(&self.result);
        self.conv.saved(visit);
    }

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, grads: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { y, norm, result, conv: ConvBackward { sources, w, b, how } } = *self;
        let (dy, added, sum) = norm.backward_added(cx, grads, &y, &result, dy)?;
        drop((y, result));
        if let Some(b) = b {
            grads.add_param(b.id(), sum)?;
        }
        let mut all = vec![Some(dy)];
        #[cfg(feature = "cuda")]
        if !cx.device().is_cpu() {
            all.extend(cuda::conv3d_gradients(cx, grads, sources, w, how, added)?);
            return Ok(all);
        }
        all.extend(gradients(cx, grads, sources, w, how, added)?);
        Ok(all)
    }
}

/// Gradients of the filter, to `grads`, and of the sources.
fn gradients(
    cx: &mut Ctx<'_>,
    grads: &mut Grads,
    sources: Vec<Source>,
    w: &Param,
    how: Conv3d,
    dy: Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let x = concatenated(&sources)?;
    let (g, _) = geometry(&x, w, None, how)?;
    let layer = Layer { x: x.five(), w: w.dims().five(), how };
    let by = By { name: None, strict: cx.is_strict() };
    let sources = one_layout(sources)?;
    let clock = cx.clock();
    let (dw, name) = wgrad(by, Sources::of(sources.clone())?, layer.w, how, &dy, None)?;
    cx.note("conv3d filter gradient", clock, name, macs(&g), || describe(&g));
    grads.add_param(w.id(), dw)?;
    let mut first = 0;
    let mut all = Vec::with_capacity(sources.len());
    for Source { value, norm, factor } in sources {
        let channels = first..first + value.value().dims().five()[1];
        first = channels.end;
        if value.node().is_none() && norm.is_none() {
            all.push(None);
            continue;
        }
        let clock = cx.clock();
        let part = Geometry { in_channels: channels.len(), ..g };
        let (dx, name) = dgrad(by, layer, &dy, w, channels, factor, None)?;
        cx.note("conv3d input gradient", clock, name, macs(&part), || describe(&part));
        // Weight and bias of a normalisation learn even where its input does not.
        all.push(Some(match norm {
            None => dx,
            Some(norm) => norm.backward(cx, grads, value.value(), dx)?,
        }));
    }
    Ok(all)
}
