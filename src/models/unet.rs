//! nnU-Net's U-Nets (Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
//! segmentation", 2021): an encoder of either kind and the decoder that all share.

use std::borrow::Cow;

use super::heads::{Heads, Scored, See, storing};
use super::plain_unet::PlainEncoder;
use super::res_enc_unet::ResEncEncoder;
use super::{Head, UnetConfig, UnetKind};
use crate::autograd::{Ctx, Param, Var};
use crate::error::{Error, Result};
use crate::nn::{Conv3d, ConvTranspose3d, InstanceNorm, Module, ParamSource};
use crate::ops::{Affine, Source, Sources};
use crate::tensor::{Device, Precision};

const OP: &str = "unet";
/// Negative slope of every leaky ReLU of the networks.
pub(super) const SLOPE: f32 = 0.01;
const ONE: [usize; 3] = [1; 3];

/// Where layers come from, and how they are stored.
#[derive(Clone, Copy)]
pub(super) struct Loader<'a> {
    source: &'a dyn ParamSource,
    precision: Precision,
    device: &'a Device,
    /// Name of the norm after a convolution.
    norm: &'static str,
}

impl Loader<'_> {
    fn conv(&self, name: &str, out: usize, inputs: usize, kernel: [usize; 3], stride: [usize; 3]) -> Result<Conv3d> {
        Conv3d::load_with(self.source, name, out, inputs, kernel, stride, self.precision, self.device)
    }

    pub(super) fn conv_norm(
        &self,
        name: &str,
        out: usize,
        inputs: usize,
        kernel: [usize; 3],
        stride: [usize; 3],
    ) -> Result<ConvNorm> {
        Ok(ConvNorm {
            conv: self.conv(&format!("{name}.conv"), out, inputs, kernel, stride)?,
            norm: InstanceNorm::load(self.source, &format!("{name}.{}", self.norm), out, self.device)?,
        })
    }
}

/// Filters of a 2D network, `[O, I, kH, kW]`, as those of one voxel along z.
struct Planar<'a>(&'a dyn ParamSource);

impl ParamSource for Planar<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let mut shape = self.0.shape(name)?;
        if shape.len() == 4 {
            shape.insert(2, 1);
        }
        Some(shape)
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        self.0.values(name)
    }

    fn error(&self, name: &str, what: String) -> Error {
        self.0.error(name, what)
    }
}

/// A convolution and a normalisation that is left to whoever reads the result.
#[derive(Debug)]
pub(super) struct ConvNorm {
    conv: Conv3d,
    norm: InstanceNorm,
}

impl ConvNorm {
    /// The convolution's result, and what is still to be done to it: the norm, and leaky ReLU of `slope` where given.
    pub(super) fn run<'m>(
        &'m self,
        cx: &mut Ctx<'m>,
        x: impl Into<Sources>,
        slope: Option<f32>,
    ) -> Result<(Var, Affine)> {
        let (y, moments) = self.conv.run_measured(cx, x)?;
        let norm = self.norm.affine(&moments, slope)?;
        Ok((y, norm))
    }

    pub(super) fn kept_bytes(&self) -> usize {
        self.conv.kept_bytes()
    }

    pub(super) fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        self.conv.params(visit);
        self.norm.params(visit);
    }

    pub(super) fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        self.conv.params_mut(visit);
        self.norm.params_mut(visit);
    }
}

/// Convolutions in sequence, each with norm and leaky ReLU, of which all but the last are applied by the next convolution
/// while it reads.
pub(super) fn stack<'m>(cx: &mut Ctx<'m>, convs: &'m [ConvNorm], x: Sources) -> Result<Var> {
    let (mut x, mut last) = (Some(x), None);
    for conv in convs {
        // Moved, so that a convolution that has the only use of its input may work in its place.
        let input = match last.take() {
            Some((y, norm)) => Some(Sources::One(Source::normalised(y, Affine::into(norm)))),
            None => x.take(),
        };
        last = input.map(|x| conv.run(cx, x, Some(SLOPE))).transpose()?;
    }
    let (y, norm) = last.ok_or_else(|| Error::shape(OP, "a stage without a convolution"))?;
    norm.apply(cx, y, None)
}

/// A stage of one input, which recorded passes keep no more of than that where they `recompute`.
pub(super) fn part<'m>(
    cx: &mut Ctx<'m>,
    recompute: bool,
    x: Var,
    run: impl Fn(&mut Ctx<'m>, Var) -> Result<Var> + Send + 'm,
) -> Result<Var> {
    if !recompute {
        return run(cx, x);
    }
    cx.checkpoint(vec![x], move |cx, x| run(cx, x.into_iter().next().ok_or_else(|| Error::shape(OP, "no input"))?))
}

/// The way down: what differs between the networks.
#[derive(Debug)]
enum Encoder {
    Plain(PlainEncoder),
    ResEnc(ResEncEncoder),
}

impl Encoder {
    /// The outputs of all stages, finest first.
    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Var, recompute: bool) -> Result<Vec<Var>> {
        match self {
            Encoder::Plain(e) => e.run(cx, x, recompute),
            Encoder::ResEnc(e) => e.run(cx, x, recompute),
        }
    }

    fn kept_bytes(&self) -> usize {
        match self {
            Encoder::Plain(e) => e.kept_bytes(),
            Encoder::ResEnc(e) => e.kept_bytes(),
        }
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        match self {
            Encoder::Plain(e) => e.params(visit),
            Encoder::ResEnc(e) => e.params(visit),
        }
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        match self {
            Encoder::Plain(e) => e.params_mut(visit),
            Encoder::ResEnc(e) => e.params_mut(visit),
        }
    }
}

/// A U-Net of nnU-Net with its parameters.
#[derive(Debug)]
pub struct Unet {
    config: UnetConfig,
    precision: Precision,
    encoder: Encoder,
    /// From the coarsest level up.
    up: Vec<ConvTranspose3d>,
    decoder: Vec<Vec<ConvNorm>>,
    heads: Heads,
    recompute: bool,
}

impl Unet {
    pub(super) fn load(
        config: &UnetConfig,
        source: &dyn ParamSource,
        device: &Device,
        precision: Precision,
    ) -> Result<Self> {
        config.validate()?;
        let (c, planar) = (config, Planar(source));
        let source = if c.planar { &planar } else { source };
        let loader = Loader { source, precision, device, norm: c.kind.norm() };
        let (f, levels) = (&c.features, c.features.len() - 1);
        let heads: Vec<_> = (0..levels).map(|u| (c.kind.head(u), f[levels - 1 - u])).collect();
        let mut net = Self {
            config: c.clone(),
            precision,
            encoder: match c.kind {
                UnetKind::Plain | UnetKind::Generic => Encoder::Plain(PlainEncoder::load(c, loader)?),
                UnetKind::ResEnc => Encoder::ResEnc(ResEncEncoder::load(c, loader)?),
            },
            up: Vec::new(),
            decoder: Vec::new(),
            heads: Heads::load(source, &heads, c.classes, precision, device)?,
            recompute: false,
        };
        for u in 0..levels {
            let s = levels - 1 - u;
            net.up.push(ConvTranspose3d::load(source, &c.kind.up(u), f[s], f[s + 1], c.strides[s + 1], device)?);
            let convs = 0..c.decoder_depth[u];
            let inputs = |conv: usize| if conv == 0 { 2 * f[s] } else { f[s] };
            let load = |i: usize| loader.conv_norm(&c.decoder_conv(u, i), f[s], inputs(i), c.decoder_kernel(s), ONE);
            net.decoder.push(convs.map(load).collect::<Result<_>>()?);
        }
        if c.planar {
            net.params_mut(&mut Param::set_planar);
        }
        Ok(net)
    }

    /// Its sizes.
    #[must_use]
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// Bytes of filters in other forms, which convolutions keep from the first pass on.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        let up = self.up.iter().map(ConvTranspose3d::kept_bytes).sum::<usize>();
        self.encoder.kept_bytes() + up + self.decoder.iter().flatten().map(ConvNorm::kept_bytes).sum::<usize>()
    }

    /// As [`super::StuNet::recomputing`].
    #[must_use]
    pub fn recomputing(mut self, on: bool) -> Self {
        self.recompute = on;
        self
    }

    /// How its filters are stored, and the activations of a pass unless they are f32 and the pass asks for less
    /// ([`Ctx::storing`]); transposed convolutions work in floats.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The full-resolution head.
    ///
    /// # Errors
    /// As [`super::StuNet::head`].
    pub fn head(&self) -> Result<&Head> {
        self.heads.last()
    }

    /// The last decoder stage's output `[N, features[0], D, H, W]`: everything but the full-resolution head.
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
    /// As [`Unet::features`].
    pub fn labels<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Vec<u16>> {
        let features = self.features(cx, x)?;
        self.heads.labels(cx, features)
    }

    /// All heads' logits, the full resolution first (deep supervision's outputs), each `[N, classes, ...]`.
    ///
    /// # Errors
    /// As [`Unet::features`].
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
        let mut skips = self.encoder.run(cx, x, self.recompute)?;
        let mut skip = || skips.pop().ok_or_else(|| Error::shape(OP, "skip missing"));
        let mut x = skip()?;
        for (u, convs) in self.decoder.iter().enumerate() {
            let up = &self.up[u];
            let level = move |cx: &mut Ctx<'m>, x: Vec<Var>| {
                let [low, skip] = x.try_into().map_err(|_| Error::shape(OP, "a level of two inputs"))?;
                let up = up.forward(cx, low)?;
                stack(cx, convs, Sources::Two(up.into(), skip.into()))
            };
            let both = vec![x, skip()?];
            x = if self.recompute { cx.checkpoint(both, level)? } else { level(cx, both)? };
            if u + 1 < self.decoder.len() {
                see(cx, u, &x)?;
            }
        }
        Ok(x)
    }

    fn check(&self, x: &Var) -> Result<()> {
        let d = x.value().dims();
        let (c, div) = (&self.config, self.config.divisor());
        if d.five()[1] != c.in_channels {
            return Err(Error::shape(OP, format!("{} input channels, expected {}", d.five()[1], c.in_channels)));
        }
        if (0..3).any(|a| d.space()[a] == 0 || !d.space()[a].is_multiple_of(div[a])) {
            return Err(Error::shape(OP, format!("patch {:?} is not a multiple of {div:?}", d.space())));
        }
        if c.planar && d.space()[0] != 1 {
            return Err(Error::shape(OP, format!("patch {:?} of a 2D network, expected depth 1", d.space())));
        }
        Ok(())
    }
}

impl Module for Unet {
    /// The full-resolution logits `[N, classes, D, H, W]`.
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        let f = self.features(cx, x)?;
        self.heads.last_scores(cx, f)
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        self.encoder.params(visit);
        self.decoder.iter().flatten().for_each(|c| c.params(visit));
        self.up.iter().for_each(|c| c.params(visit));
        self.heads.params(visit);
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        self.encoder.params_mut(visit);
        self.decoder.iter_mut().flatten().for_each(|c| c.params_mut(visit));
        self.up.iter_mut().for_each(|c| c.params_mut(visit));
        self.heads.params_mut(visit);
    }
}
