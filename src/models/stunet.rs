//! STU-Net (Huang et al., "STU-Net: Scalable and Transferable Medical Image Segmentation Models Empowered by
//! Large-Scale Supervised Pre-training", 2023): a residual U-Net of fixed topology that scales in width and depth.

use super::heads::{Heads, Scored, See, storing};
use super::{Head, StuNetConfig};
use crate::autograd::{Ctx, Param, Var};
use crate::error::{Error, Result};
use crate::nn::{Conv3d, InstanceNorm, Module, ParamSource};
use crate::ops::{Source, Sources};
use crate::tensor::{Device, Precision};

/// Negative slope of every leaky ReLU of the network.
const SLOPE: f32 = 0.01;
/// Every 3x3x3 kernel of the network.
const K3: [usize; 3] = [3, 3, 3];
const K1: [usize; 3] = [1, 1, 1];
const ONE: [usize; 3] = [1, 1, 1];

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
        inputs: usize,
        width: usize,
        stride: [usize; 3],
        shortcut: bool,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        let conv = |k: &str, inputs: usize, kernel, stride| {
            Conv3d::load_with(source, &format!("{name}.{k}"), width, inputs, kernel, stride, precision, device)
        };
        Ok(Self {
            conv1: conv("conv1", inputs, K3, stride)?,
            norm1: InstanceNorm::load(source, &format!("{name}.norm1"), width, device)?,
            conv2: conv("conv2", width, K3, ONE)?,
            norm2: InstanceNorm::load(source, &format!("{name}.norm2"), width, device)?,
            conv3: if shortcut { Some(conv("conv3", inputs, K1, stride)?) } else { None },
        })
    }

    /// Normalisations happen where their input is read next: the first in the second convolution, the second together
    /// with the shortcut, which comes last so that it can be added in the same pass.
    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Sources) -> Result<Var> {
        let (y, moments) = self.conv1.run_measured(cx, x.clone())?;
        let norm = self.norm1.affine(&moments, Some(SLOPE))?;
        let (y, moments) = self.conv2.run_measured(cx, Sources::One(Source::normalised(y, norm.into())))?;
        let norm = self.norm2.affine(&moments, Some(SLOPE))?;
        match (&self.conv3, x) {
            (Some(c), x) => c.run_residual(cx, y, &norm, x),
            (None, Sources::One(x)) => {
                let x = x.into_var(cx)?;
                norm.apply(cx, y, Some(x))
            }
            (None, Sources::Two(..)) => Err(Error::shape("stunet", "a block of two inputs needs a shortcut")),
        }
    }
}

impl Module for ResBlock {
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        self.run(cx, x.into())
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        let parts: [&dyn Module; 4] = [&self.conv1, &self.norm1, &self.conv2, &self.norm2];
        parts.into_iter().for_each(|p| p.params(visit));
        self.conv3.iter().for_each(|c| c.params(visit));
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        let parts: [&mut dyn Module; 4] = [&mut self.conv1, &mut self.norm1, &mut self.conv2, &mut self.norm2];
        parts.into_iter().for_each(|p| p.params_mut(visit));
        self.conv3.iter_mut().for_each(|c| c.params_mut(visit));
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
        inputs: usize,
        width: usize,
        stride: [usize; 3],
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        let block = |b: usize| {
            let name = format!("{name}.{b}");
            if b == 0 {
                ResBlock::load(source, &name, inputs, width, stride, true, precision, device)
            } else {
                ResBlock::load(source, &name, width, width, ONE, false, precision, device)
            }
        };
        (0..blocks).map(block).collect::<Result<_>>().map(Stage)
    }

    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Sources) -> Result<Var> {
        let mut x = x;
        for block in &self.0 {
            x = block.run(cx, x)?.into();
        }
        match x {
            Sources::One(y) => y.into_var(cx),
            Sources::Two(..) => Err(Error::shape("stunet", "a stage without a block")),
        }
    }
}

/// A STU-Net with its parameters.
#[derive(Debug)]
pub struct StuNet {
    config: StuNetConfig,
    precision: Precision,
    encoder: Vec<Stage>,
    up: Vec<Conv3d>,
    decoder: Vec<Stage>,
    heads: Heads,
    recompute: bool,
}

impl StuNet {
    pub(super) fn load(
        config: &StuNetConfig,
        source: &dyn ParamSource,
        device: &Device,
        precision: Precision,
    ) -> Result<Self> {
        let c = config;
        let heads: Vec<_> = (0..5).map(|u| (format!("seg_outputs.{u}"), c.dims[4 - u])).collect();
        let mut net = Self {
            config: c.clone(),
            precision,
            encoder: Vec::new(),
            up: Vec::new(),
            decoder: Vec::new(),
            heads: Heads::load(source, &heads, c.classes, precision, device)?,
            recompute: false,
        };
        for s in 0..6 {
            let name = format!("conv_blocks_context.{s}");
            let (input, stride) = if s == 0 { (c.in_channels, ONE) } else { (c.dims[s - 1], c.strides[s - 1]) };
            net.encoder.push(Stage::load(source, &name, c.depth[s], input, c.dims[s], stride, precision, device)?);
        }
        for u in 0..5 {
            let (below, w) = (c.dims[5 - u], c.dims[4 - u]);
            let up = format!("upsample_layers.{u}.conv");
            net.up.push(Conv3d::load_with(source, &up, w, below, K1, ONE, precision, device)?);
            let name = format!("conv_blocks_localization.{u}");
            net.decoder.push(Stage::load(source, &name, c.decoder_depth[u], 2 * w, w, ONE, precision, device)?);
        }
        Ok(net)
    }

    /// Its sizes.
    #[must_use]
    pub fn config(&self) -> &StuNetConfig {
        &self.config
    }

    /// Bytes of filters in other forms, which convolutions keep from the first pass on.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        let blocks = self.encoder.iter().chain(&self.decoder).flat_map(|s| &s.0);
        blocks.map(|b| b.conv1.kept_bytes() + b.conv2.kept_bytes()).sum()
    }

    /// With `on`, a pass that is recorded keeps only the inputs of stages and runs each once more on the way back: about a
    /// third more work, for a fraction of the memory.
    #[must_use]
    pub fn recomputing(mut self, on: bool) -> Self {
        self.recompute = on;
        self
    }

    /// How its filters are stored, and the activations of a pass unless they are f32 and the pass asks for less
    /// ([`Ctx::storing`]).
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The full-resolution head.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a card after its parameters were changed there.
    pub fn head(&self) -> Result<&Head> {
        self.heads.last()
    }

    /// The last decoder stage's output `[N, dims[0], D, H, W]`: everything but the full-resolution head.
    ///
    /// # Errors
    /// [`Error::Shape`] when `x` has other channels, or sizes that the strides do not divide;
    /// [`Error::OutOfMemory`].
    pub fn features<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        self.run(cx, x, &mut |_, _, _| Ok(()))
    }

    /// The label of every voxel, `[N, D, H, W]`: the first class of the largest full-resolution logit. Logits are never in
    /// memory, the features' go with the last of them.
    ///
    /// # Errors
    /// As [`StuNet::features`].
    pub fn labels<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Vec<u16>> {
        let features = self.features(cx, x)?;
        self.heads.labels(cx, features)
    }

    /// All five heads' logits, the full resolution first (deep supervision's outputs), each `[N, classes, ...]`.
    ///
    /// # Errors
    /// As [`StuNet::features`].
    pub fn forward_all<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Vec<Var>> {
        let mut outs = Vec::new();
        let last = self.run(cx, x, &mut |cx, u, x| {
            outs.push(self.heads.scores(cx, u, x.clone())?);
            Ok(())
        })?;
        outs.push(self.heads.last_scores(cx, last)?);
        outs.reverse();
        Ok(outs)
    }

    /// All heads with the features that they read, the full resolution first: for losses that need no scores in memory.
    ///
    /// # Errors
    /// As [`Self::features`].
    pub fn forward_heads<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Vec<Scored<'m>>> {
        let mut outs = Vec::new();
        let last = self.run(cx, x, &mut |_, u, x| {
            outs.push(self.heads.scored(u, x.clone()));
            Ok(())
        })?;
        outs.push(self.heads.scored(outs.len(), last));
        outs.reverse();
        Ok(outs)
    }

    /// Shows the output of every level but the last one to `see`.
    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Var, see: &mut See<'_, 'm>) -> Result<Var> {
        self.check(&x)?;
        storing(cx, self.precision, |cx| self.stages(cx, x, see))
    }

    fn stages<'m>(&'m self, cx: &mut Ctx<'m>, x: Var, see: &mut See<'_, 'm>) -> Result<Var> {
        let mut x = x;
        let mut skips = Vec::with_capacity(5);
        for (s, stage) in self.encoder.iter().enumerate() {
            x = self.stage(cx, stage, vec![x], ONE)?;
            if s < 5 {
                skips.push(x.clone());
            }
        }
        for (u, stage) in self.decoder.iter().enumerate() {
            // Nearest upsampling only repeats voxels, so the 1x1x1 convolution gives the same numbers before it, for
            // an eighth of the work.
            let low = self.up[u].run(cx, x)?;
            let skip = skips.pop().ok_or_else(|| Error::shape("stunet", "skip missing"))?;
            x = self.stage(cx, stage, vec![low, skip], self.config.strides[4 - u])?;
            if u < 4 {
                see(cx, u, &x)?;
            }
        }
        Ok(x)
    }

    /// A stage of one input, or of two of which the first is repeated.
    fn stage<'m>(&'m self, cx: &mut Ctx<'m>, stage: &'m Stage, x: Vec<Var>, repeat: [usize; 3]) -> Result<Var> {
        let run = move |cx: &mut Ctx<'m>, x: Vec<Var>| {
            let mut x = x.into_iter();
            match (x.next(), x.next()) {
                (Some(low), Some(skip)) => stage.run(cx, Sources::Two(Source::repeated(low, repeat), skip.into())),
                (Some(x), None) => stage.run(cx, x.into()),
                (None, _) => Err(Error::shape("stunet", "a stage without an input")),
            }
        };
        if self.recompute { cx.checkpoint(x, run) } else { run(cx, x) }
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
        self.heads.last_scores(cx, f)
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        let blocks = |stages: &'m [Stage]| stages.iter().flat_map(|s| &s.0);
        blocks(&self.encoder).for_each(|b| b.params(visit));
        self.up.iter().for_each(|c| c.params(visit));
        blocks(&self.decoder).for_each(|b| b.params(visit));
        self.heads.params(visit);
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        self.encoder.iter_mut().flat_map(|s| &mut s.0).for_each(|b| b.params_mut(visit));
        self.up.iter_mut().for_each(|c| c.params_mut(visit));
        self.decoder.iter_mut().flat_map(|s| &mut s.0).for_each(|b| b.params_mut(visit));
        self.heads.params_mut(visit);
    }
}
