//! The encoder of nnU-Net's `ResidualEncoderUNet`: a stem and stages of residual blocks (He et al., "Deep Residual Learning
//! for Image Recognition", 2016), whose shortcuts pool where a block strides (He et al., "Bag of Tricks for Image
//! Classification with Convolutional Neural Networks", 2019).

use super::UnetConfig;
use super::unet::{ConvNorm, Loader, SLOPE, part, stack};
use super::unet_names::{STEM, encoder_block, projection};
use crate::autograd::{Ctx, Param, Var};
use crate::error::Result;
use crate::ops::{self, Source};

const ONE: [usize; 3] = [1; 3];

/// Two convolutions, and a shortcut: the mean over the stride where there is one, then a 1x1x1 convolution with norm where
/// the number of channels changes.
#[derive(Debug)]
struct Block {
    conv1: ConvNorm,
    conv2: ConvNorm,
    stride: [usize; 3],
    projection: Option<ConvNorm>,
}

impl Block {
    /// Norms are applied where their input is read next: the first in the second convolution, the second together with the
    /// shortcut and the leaky ReLU.
    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        let (y, norm) = self.conv1.run(cx, x.clone(), Some(SLOPE))?;
        let (y, norm) = self.conv2.run(cx, Source::normalised(y, norm.into()), Some(SLOPE))?;
        let mut shortcut = ops::avg_pool(cx, x, self.stride)?;
        if let Some(projection) = &self.projection {
            let (p, norm) = projection.run(cx, shortcut, None)?;
            shortcut = norm.apply(cx, p, None)?;
        }
        norm.apply(cx, y, Some(shortcut))
    }

    fn kept_bytes(&self) -> usize {
        let convs = [Some(&self.conv1), Some(&self.conv2), self.projection.as_ref()];
        convs.into_iter().flatten().map(ConvNorm::kept_bytes).sum()
    }
}

#[derive(Debug)]
pub(super) struct ResEncEncoder {
    /// One convolution.
    stem: Vec<ConvNorm>,
    stages: Vec<Vec<Block>>,
}

impl ResEncEncoder {
    pub(super) fn load(c: &UnetConfig, loader: Loader<'_>) -> Result<Self> {
        let stem = loader.conv_norm(STEM, c.features[0], c.in_channels, c.kernels[0], ONE)?;
        let block = |s: usize, b: usize, inputs: usize| {
            let (name, f, k, stride) = (encoder_block(s, b), c.features[s], c.kernels[s], c.stride(s, b));
            let shortcut = || loader.conv_norm(&projection(&name, stride), f, inputs, ONE, ONE);
            Ok(Block {
                conv1: loader.conv_norm(&format!("{name}.conv1"), f, inputs, k, stride)?,
                conv2: loader.conv_norm(&format!("{name}.conv2"), f, f, k, ONE)?,
                stride,
                projection: (inputs != f).then(shortcut).transpose()?,
            })
        };
        let stage = |s: usize| c.block_inputs(s).into_iter().enumerate().map(|(b, i)| block(s, b, i)).collect();
        Ok(Self { stem: vec![stem], stages: (0..c.features.len()).map(stage).collect::<Result<_>>()? })
    }

    /// The outputs of all stages, finest first.
    pub(super) fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Var, recompute: bool) -> Result<Vec<Var>> {
        let mut outs = Vec::with_capacity(self.stages.len());
        let mut x = x;
        for (s, blocks) in self.stages.iter().enumerate() {
            // The stem belongs to the first stage.
            let stem = (s == 0).then_some(&self.stem);
            x = part(cx, recompute, x, move |cx, x| {
                let x = match stem {
                    Some(stem) => stack(cx, stem, x.into())?,
                    None => x,
                };
                blocks.iter().try_fold(x, |x, block| block.run(cx, x))
            })?;
            outs.push(x.clone());
        }
        Ok(outs)
    }

    pub(super) fn kept_bytes(&self) -> usize {
        let stem = self.stem.iter().map(ConvNorm::kept_bytes).sum::<usize>();
        stem + self.stages.iter().flatten().map(Block::kept_bytes).sum::<usize>()
    }

    pub(super) fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        let blocks = self.stages.iter().flatten().flat_map(|b| [&b.conv1, &b.conv2].into_iter().chain(&b.projection));
        self.stem.iter().chain(blocks).for_each(|c| c.params(visit));
    }

    pub(super) fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        let blocks = self.stages.iter_mut().flatten();
        let blocks = blocks.flat_map(|b| [&mut b.conv1, &mut b.conv2].into_iter().chain(&mut b.projection));
        self.stem.iter_mut().chain(blocks).for_each(|c| c.params_mut(visit));
    }
}
