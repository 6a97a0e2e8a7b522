//! The encoder of nnU-Net's `PlainConvUNet` and `Generic_UNet`: stages of convolutions, the first of each with the stage's stride.

use super::UnetConfig;
use super::unet::{ConvNorm, Loader, part, stack};
use crate::autograd::{Ctx, Param, Var};
use crate::error::Result;

#[derive(Debug)]
pub(super) struct PlainEncoder(Vec<Vec<ConvNorm>>);

impl PlainEncoder {
    pub(super) fn load(c: &UnetConfig, loader: Loader<'_>) -> Result<Self> {
        let stage = |s: usize| {
            let convs = c.block_inputs(s).into_iter().enumerate();
            let load = |(i, inputs): (usize, usize)| {
                loader.conv_norm(&c.encoder_conv(s, i), c.features[s], inputs, c.kernels[s], c.stride(s, i))
            };
            convs.map(load).collect()
        };
        (0..c.features.len()).map(stage).collect::<Result<_>>().map(Self)
    }

    /// The outputs of all stages, finest first.
    pub(super) fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Var, recompute: bool) -> Result<Vec<Var>> {
        let mut outs = Vec::with_capacity(self.0.len());
        let mut x = x;
        for convs in &self.0 {
            let y = part(cx, recompute, x, |cx, x| stack(cx, convs, x.into()))?;
            x = y.clone();
            outs.push(y);
        }
        Ok(outs)
    }

    pub(super) fn kept_bytes(&self) -> usize {
        self.0.iter().flatten().map(ConvNorm::kept_bytes).sum()
    }

    pub(super) fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        self.0.iter().flatten().for_each(|c| c.params(visit));
    }

    pub(super) fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        self.0.iter_mut().flatten().for_each(|c| c.params_mut(visit));
    }
}
