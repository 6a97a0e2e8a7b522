//! STU-Net (Huang et al., "STU-Net: Scalable and Transferable Medical Image Segmentation Models Empowered by
//! Large-Scale Supervised Pre-training", 2023): a residual U-Net of fixed topology that scales in width and depth.

use std::collections::BTreeMap;

use super::RandomParams;
use crate::autograd::{Ctx, Var};
use crate::error::{Error, Result};
use crate::nn::{Conv3d, InstanceNorm, Module, ParamSource};
use crate::ops::{self, Sources};
use crate::tensor::{BLOCK, Device};

/// Negative slope of every leaky ReLU of the network.
const SLOPE: f32 = 0.01;
/// Every 3x3x3 kernel of the network.
const K3: [usize; 3] = [3, 3, 3];
const K1: [usize; 3] = [1, 1, 1];
const ONE: [usize; 3] = [1, 1, 1];

/// Sizes that make one member of the family. Kernels are 3x3x3 throughout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StuNetConfig {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels, background included.
    pub classes: usize,
    /// Residual blocks of the six encoder stages.
    pub depth: [usize; 6],
    /// Residual blocks of the five decoder stages, deepest first.
    pub decoder_depth: [usize; 5],
    /// Channels of the six stages.
    pub dims: [usize; 6],
    /// Strides (z, y, x) into stages 1 to 5; `[1, 1, 1]` is a stage without pooling.
    pub strides: [[usize; 3]; 5],
}

impl StuNetConfig {
    fn scaled(in_channels: usize, classes: usize, base: usize, depth: usize) -> Self {
        Self {
            in_channels,
            classes,
            depth: [depth; 6],
            decoder_depth: [depth; 5],
            dims: [1, 2, 4, 8, 16, 16].map(|m| m * base),
            strides: [[2, 2, 2]; 5],
        }
    }

    /// STU-Net-S: 14.6 M parameters with 1 input channel and 105 classes.
    #[must_use]
    pub fn small(in_channels: usize, classes: usize) -> Self {
        Self::scaled(in_channels, classes, 16, 1)
    }

    /// STU-Net-B: 58.3 M parameters.
    #[must_use]
    pub fn base(in_channels: usize, classes: usize) -> Self {
        Self::scaled(in_channels, classes, 32, 1)
    }

    /// STU-Net-L: 440.3 M parameters.
    #[must_use]
    pub fn large(in_channels: usize, classes: usize) -> Self {
        Self::scaled(in_channels, classes, 64, 2)
    }

    /// STU-Net-H: 1457.3 M parameters.
    #[must_use]
    pub fn huge(in_channels: usize, classes: usize) -> Self {
        Self::scaled(in_channels, classes, 96, 3)
    }

    /// The same network with other strides.
    #[must_use]
    pub fn with_strides(mut self, strides: [[usize; 3]; 5]) -> Self {
        self.strides = strides;
        self
    }

    /// Name and shape of every parameter, as in STU-Net's PyTorch state dict.
    #[must_use]
    pub fn parameters(&self) -> BTreeMap<String, Vec<usize>> {
        let mut out = BTreeMap::new();
        let mut conv = |name: String, o: usize, i: usize, k: [usize; 3]| {
            out.insert(format!("{name}.weight"), vec![o, i, k[0], k[1], k[2]]);
            out.insert(format!("{name}.bias"), vec![o]);
        };
        let mut norms = Vec::new();
        for (prefix, blocks, first_in, width) in self.stages() {
            for b in 0..blocks {
                let i = if b == 0 { first_in } else { width };
                conv(format!("{prefix}.{b}.conv1"), width, i, K3);
                conv(format!("{prefix}.{b}.conv2"), width, width, K3);
                if b == 0 {
                    conv(format!("{prefix}.{b}.conv3"), width, i, K1);
                }
                norms.extend([1, 2].map(|k| (format!("{prefix}.{b}.norm{k}"), width)));
            }
        }
        for u in 0..5 {
            conv(format!("upsample_layers.{u}.conv"), self.dims[4 - u], self.dims[5 - u], K1);
            conv(format!("seg_outputs.{u}"), self.classes, self.dims[4 - u], K1);
        }
        for (name, width) in norms {
            out.insert(format!("{name}.weight"), vec![width]);
            out.insert(format!("{name}.bias"), vec![width]);
        }
        out
    }

    /// (state-dict prefix, blocks, input channels of the first block, width) of every residual stage.
    fn stages(&self) -> Vec<(String, usize, usize, usize)> {
        let encoder = (0..6).map(|s| {
            let first_in = if s == 0 { self.in_channels } else { self.dims[s - 1] };
            (format!("conv_blocks_context.{s}"), self.depth[s], first_in, self.dims[s])
        });
        let decoder = (0..5).map(|u| {
            let w = self.dims[4 - u];
            (format!("conv_blocks_localization.{u}"), self.decoder_depth[u], 2 * w, w)
        });
        encoder.chain(decoder).collect()
    }

    /// Number of trainable parameters.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.parameters().values().map(|s| s.iter().product::<usize>()).sum()
    }

    /// Product of the strides per axis: a patch must be a multiple of it.
    #[must_use]
    pub fn divisor(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| self.strides.iter().map(|s| s[a]).product())
    }

    /// Voxels of each of the six stages for a patch of `patch` voxels.
    fn voxels(&self, patch: [usize; 3]) -> [usize; 6] {
        let mut v = [patch.iter().product::<usize>(); 6];
        for s in 0..5 {
            v[s + 1] = v[s] / self.strides[s].iter().product::<usize>().max(1);
        }
        v
    }

    /// Multiply-accumulates of one forward pass over a patch (z, y, x), full-resolution head only. The 1x1x1
    /// convolutions before upsampling are counted at the resolution they run at: before it.
    #[must_use]
    pub fn macs(&self, patch: [usize; 3]) -> u64 {
        let voxels = self.voxels(patch);
        let stage = |blocks: usize, first_in: usize, w: usize, v: usize| {
            ((first_in * w * 28 + w * w * 27 + (blocks - 1) * w * w * 54) * v) as u64
        };
        let mut total = 0;
        for (k, (_, blocks, first_in, w)) in self.stages().into_iter().enumerate() {
            total += stage(blocks.max(1), first_in, w, voxels[if k < 6 { k } else { 10 - k }]);
        }
        for u in 0..5 {
            total += (self.dims[5 - u] * self.dims[4 - u] * voxels[5 - u]) as u64;
        }
        total + (self.dims[0] * self.classes * voxels[0]) as u64
    }

    /// Bytes of tensors at the peak of a forward pass that ends in the last features, input included. Follows the
    /// order in which [`StuNet::features`] runs.
    #[must_use]
    pub fn activation_bytes(&self, patch: [usize; 3]) -> usize {
        let voxels = self.voxels(patch);
        let t = |s: usize| self.dims[s].next_multiple_of(BLOCK) * voxels[s];
        let mut peak = self.in_channels * voxels[0] + 2 * t(0);
        let mut skips = 0;
        for s in 0..6 {
            // conv1's output, the shortcut, conv2's output; the stage's input is among the skips.
            peak = peak.max(skips + 3 * t(s));
            skips += t(s);
        }
        for u in 0..5 {
            let (s, below) = (4 - u, t(5 - u));
            skips -= t(s + 1);
            // `skips` still holds this level's skip; beside it: the upsampled tensor, the shortcut and conv1's output.
            peak = peak.max(skips + below + t(s)).max(skips + 3 * t(s));
        }
        peak * 4
    }

    /// Builds the network with parameters from `source`.
    ///
    /// # Errors
    /// [`Error::Model`] when a parameter is missing or has another shape; [`Error::OutOfMemory`].
    pub fn build(&self, source: &dyn ParamSource, device: &Device) -> Result<StuNet> {
        StuNet::load(self, source, device)
    }

    /// Builds the network with seeded random parameters.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn build_random(&self, device: &Device, seed: u64) -> Result<StuNet> {
        StuNet::load(self, &RandomParams::new(seed, self.parameters()), device)
    }
}

/// Two 3x3x3 convolutions with instance norm, and a shortcut: identity, or a 1x1x1 convolution without norm in the
/// first block of a stage.
#[derive(Debug)]
struct ResBlock {
    conv1: Conv3d,
    norm1: InstanceNorm,
    conv2: Conv3d,
    norm2: InstanceNorm,
    conv3: Option<Conv3d>,
}

impl ResBlock {
    fn load(
        source: &dyn ParamSource,
        name: &str,
        inputs: &[usize],
        width: usize,
        stride: [usize; 3],
        shortcut: bool,
        device: &Device,
    ) -> Result<Self> {
        let conv = |k: &str, inputs: &[usize], kernel, stride| {
            Conv3d::load(source, &format!("{name}.{k}"), width, inputs, kernel, stride, device)
        };
        Ok(Self {
            conv1: conv("conv1", inputs, K3, stride)?,
            norm1: InstanceNorm::load(source, &format!("{name}.norm1"), width, device)?,
            conv2: conv("conv2", &[width], K3, ONE)?,
            norm2: InstanceNorm::load(source, &format!("{name}.norm2"), width, device)?,
            conv3: if shortcut { Some(conv("conv3", inputs, K1, stride)?) } else { None },
        })
    }

    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Sources) -> Result<Var> {
        let y = self.conv1.run(cx, x.share())?;
        // The shortcut runs before the second convolution: it is the input's last use, so the input's memory is
        // free while the larger part of the block runs.
        let shortcut = match (&self.conv3, x) {
            (Some(c), x) => c.run(cx, x)?,
            (None, Sources::One(x)) => x,
            (None, Sources::Two(..)) => return Err(Error::shape("stunet", "a block of two inputs needs a shortcut")),
        };
        let y = self.norm1.run(cx, y, None, Some(SLOPE))?;
        let y = self.conv2.run(cx, Sources::One(y))?;
        self.norm2.run(cx, y, Some(shortcut), Some(SLOPE))
    }
}

/// Blocks in sequence.
#[derive(Debug)]
struct Stage(Vec<ResBlock>);

impl Stage {
    fn load(
        source: &dyn ParamSource,
        name: &str,
        blocks: usize,
        inputs: &[usize],
        width: usize,
        stride: [usize; 3],
        device: &Device,
    ) -> Result<Self> {
        let block = |b: usize| {
            let name = format!("{name}.{b}");
            if b == 0 {
                ResBlock::load(source, &name, inputs, width, stride, true, device)
            } else {
                ResBlock::load(source, &name, &[width], width, ONE, false, device)
            }
        };
        (0..blocks).map(block).collect::<Result<_>>().map(Stage)
    }

    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Sources) -> Result<Var> {
        let mut x = x;
        for block in &self.0 {
            x = Sources::One(block.run(cx, x)?);
        }
        match x {
            Sources::One(y) => Ok(y),
            Sources::Two(..) => Err(Error::shape("stunet", "a stage without a block")),
        }
    }
}

/// A STU-Net with its parameters.
#[derive(Debug)]
pub struct StuNet {
    config: StuNetConfig,
    encoder: Vec<Stage>,
    up: Vec<Conv3d>,
    decoder: Vec<Stage>,
    heads: Vec<Conv3d>,
    last_head: Head,
}

/// The full-resolution 1x1x1 head in plain numbers, for callers that apply it themselves.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Row-major `[classes, features]`.
    pub weight: Vec<f32>,
    /// `[classes]`.
    pub bias: Vec<f32>,
    /// Feature channels.
    pub features: usize,
}

impl StuNet {
    fn load(config: &StuNetConfig, source: &dyn ParamSource, device: &Device) -> Result<Self> {
        let c = config;
        let mut net = Self {
            config: c.clone(),
            encoder: Vec::new(),
            up: Vec::new(),
            decoder: Vec::new(),
            heads: Vec::new(),
            last_head: Head {
                weight: source.values("seg_outputs.4.weight")?.into_owned(),
                bias: source.values("seg_outputs.4.bias")?.into_owned(),
                features: c.dims[0],
            },
        };
        for s in 0..6 {
            let name = format!("conv_blocks_context.{s}");
            let (input, stride) = if s == 0 { (c.in_channels, ONE) } else { (c.dims[s - 1], c.strides[s - 1]) };
            net.encoder.push(Stage::load(source, &name, c.depth[s], &[input], c.dims[s], stride, device)?);
        }
        for u in 0..5 {
            let (below, w) = (c.dims[5 - u], c.dims[4 - u]);
            let up = format!("upsample_layers.{u}.conv");
            net.up.push(Conv3d::load(source, &up, w, &[below], K1, ONE, device)?);
            let name = format!("conv_blocks_localization.{u}");
            net.decoder.push(Stage::load(source, &name, c.decoder_depth[u], &[w, w], w, ONE, device)?);
            let head = format!("seg_outputs.{u}");
            net.heads.push(Conv3d::load(source, &head, c.classes, &[w], K1, ONE, device)?);
        }
        Ok(net)
    }

    /// Its sizes.
    #[must_use]
    pub fn config(&self) -> &StuNetConfig {
        &self.config
    }

    /// The full-resolution head.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.last_head
    }

    /// The last decoder stage's output `[N, dims[0], D, H, W]`: everything but the full-resolution head.
    ///
    /// # Errors
    /// [`Error::Shape`] when `x` has other channels, or sizes that the strides do not divide;
    /// [`Error::OutOfMemory`].
    pub fn features<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        self.run(cx, x, None)
    }

    /// All five heads' logits, the full resolution first (deep supervision's outputs), each `[N, classes, ...]`.
    ///
    /// # Errors
    /// As [`StuNet::features`].
    pub fn forward_all<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Vec<Var>> {
        let mut outs = Vec::new();
        let last = self.run(cx, x, Some(&mut outs))?;
        outs.push(self.heads[4].forward(cx, last)?);
        outs.reverse();
        Ok(outs)
    }

    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Var, mut outs: Option<&mut Vec<Var>>) -> Result<Var> {
        self.check(&x)?;
        let mut x = x;
        let mut skips = Vec::with_capacity(5);
        for (s, stage) in self.encoder.iter().enumerate() {
            x = stage.run(cx, Sources::One(x))?;
            if s < 5 {
                skips.push(x.clone());
            }
        }
        for (u, stage) in self.decoder.iter().enumerate() {
            // Nearest upsampling only repeats voxels, so the 1x1x1 convolution gives the same numbers before it, for
            // an eighth of the work.
            let low = self.up[u].run(cx, Sources::One(x))?;
            let up = ops::upsample_nearest(cx, low, self.config.strides[4 - u])?;
            let skip = skips.pop().ok_or_else(|| Error::shape("stunet", "skip missing"))?;
            x = stage.run(cx, Sources::Two(up, skip))?;
            if u < 4
                && let Some(outs) = &mut outs
            {
                outs.push(self.heads[u].run(cx, Sources::One(x.clone()))?);
            }
        }
        Ok(x)
    }

    fn check(&self, x: &Var) -> Result<()> {
        let d = x.value().dims();
        let (c, div) = (&self.config, self.config.divisor());
        if d.five()[1] != c.in_channels {
            return Err(Error::shape("stunet", format!("{} input channels, expected {}", d.five()[1], c.in_channels)));
        }
        if (0..3).any(|a| d.space()[a] == 0 || !d.space()[a].is_multiple_of(div[a])) {
            return Err(Error::shape("stunet", format!("patch {:?} is not a multiple of {div:?}", d.space())));
        }
        Ok(())
    }
}

impl Module for StuNet {
    /// The full-resolution logits `[N, classes, D, H, W]`.
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        let f = self.features(cx, x)?;
        self.heads[4].forward(cx, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The counts of STU-Net's paper, to the last digit.
    #[test]
    fn parameter_counts() {
        let counts = [StuNetConfig::small, StuNetConfig::base, StuNetConfig::large, StuNetConfig::huge]
            .map(|f| f(1, 105).parameter_count());
        assert_eq!(counts, [14_596_941, 58_262_669, 440_302_605, 1_457_326_221]);
        assert_eq!(StuNetConfig::large(1, 105).parameters().len(), 218);
    }
}
