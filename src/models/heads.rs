//! The 1x1x1 layers that make scores of classes from the features of each level, and the last of them in plain numbers.

use std::sync::OnceLock;

use crate::autograd::{Ctx, Param, Var};
use crate::error::{Error, Result};
use crate::nn::{self, Conv3d, Module, ParamSource};
use crate::ops;
use crate::tensor::{Device, Dims, Precision, Tensor};

const ONE: [usize; 3] = [1; 3];

/// The full-resolution 1x1x1 head in plain numbers, for callers that apply it themselves.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Row-major `[classes, features]`.
    pub weight: Vec<f32>,
    /// `[classes]`, zeros where the layer has none.
    pub bias: Vec<f32>,
    /// Feature channels.
    pub features: usize,
}

/// A head for each level of a decoder, from the coarsest up.
#[derive(Debug)]
pub(super) struct Heads {
    layers: Vec<Conv3d>,
    classes: usize,
    /// Channels that the last one reads.
    features: usize,
    /// Until the parameters change.
    last: OnceLock<Head>,
}

impl Heads {
    /// Loads the layers of these names and feature channels.
    pub(super) fn load(
        source: &dyn ParamSource,
        layers: &[(String, usize)],
        classes: usize,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        let (name, features) = layers.last().ok_or_else(|| Error::shape("heads", "a network without a head"))?;
        let mut weight = source.values(&format!("{name}.weight"))?.into_owned();
        // Callers that apply the head themselves are to get what the layer gives.
        weight.iter_mut().for_each(|w| *w = precision.round(*w));
        let bias = format!("{name}.bias");
        let bias = match source.shape(&bias) {
            Some(_) => source.values(&bias)?.into_owned(),
            None => vec![0.0; classes],
        };
        let load = |(n, f): &(String, usize)| Conv3d::load_with(source, n, classes, *f, ONE, ONE, precision, device);
        Ok(Self {
            layers: layers.iter().map(load).collect::<Result<_>>()?,
            classes,
            features: *features,
            last: OnceLock::from(Head { weight, bias, features: *features }),
        })
    }

    /// The last one.
    ///
    /// # Errors
    /// [`Error::Device`] of a card after its parameters were changed there.
    pub(super) fn last(&self) -> Result<&Head> {
        if let Some(head) = self.last.get() {
            return Ok(head);
        }
        let mut values = Vec::new();
        self.layers.iter().next_back().into_iter().for_each(|l| l.params(&mut |p| values.push(nn::values(p))));
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or_else(|| Ok(vec![0.0; self.classes]));
        let head = Head { weight: next()?, bias: next()?, features: self.features };
        Ok(self.last.get_or_init(|| head))
    }

    /// What head `u` says: results, not activations, so not rounded; by a card, whose kernels store as filters are stored, to
    /// 16 bits.
    pub(super) fn scores<'m>(&'m self, cx: &mut Ctx<'m>, u: usize, x: Var) -> Result<Var> {
        // A card computes with the head as with every other filter.
        let wanted = if cx.device().is_cpu() { Precision::F32 } else { cx.precision() };
        let before = cx.set_precision(wanted);
        let scores = self.layers[u].run(cx, x);
        cx.set_precision(before);
        scores
    }

    /// Features of a level with head `u`, whose scores nobody has asked for yet.
    pub(super) fn scored(&self, u: usize, features: Var) -> Scored<'_> {
        Scored { features, heads: self, level: u }
    }

    /// What the last one says.
    pub(super) fn last_scores<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        self.scores(cx, self.layers.len() - 1, x)
    }

    /// The first class of the largest score of the last one, without scores in memory.
    pub(super) fn labels(&self, cx: &mut Ctx<'_>, features: Var) -> Result<Vec<u16>> {
        let head = self.last()?;
        ops::head_labels(cx, features, &head.weight, &head.bias)
    }

    pub(super) fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        self.layers.iter().for_each(|l| l.params(visit));
    }

    pub(super) fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        self.last.take();
        self.layers.iter_mut().for_each(|l| l.params_mut(visit));
    }
}

/// Who looks at a level's output.
pub(super) type See<'s, 'm> = dyn FnMut(&mut Ctx<'m>, usize, &Var) -> Result<()> + 's;

/// Features of a level and the head that is to make scores of them.
#[derive(Debug)]
pub struct Scored<'m> {
    features: Var,
    heads: &'m Heads,
    level: usize,
}

impl<'m> Scored<'m> {
    /// Sizes of the features, whose space is that of the scores: `[N, features, D, H, W]`.
    #[must_use]
    pub fn dims(&self) -> &Dims {
        self.features.value().dims()
    }

    /// The scores `[N, classes, D, H, W]`.
    ///
    /// # Errors
    /// As [`ops::conv3d()`].
    pub fn scores(self, cx: &mut Ctx<'m>) -> Result<Var> {
        self.heads.scores(cx, self.level, self.features)
    }

    /// The scores where the processor can read them, as far as a card rounds them to 16 bits.
    ///
    /// # Errors
    /// As [`ops::conv3d()`]; [`Error::Device`].
    pub fn host_scores(&self, cx: &mut Ctx<'m>) -> Result<Tensor> {
        let scores = self.heads.scores(cx, self.level, self.features.clone())?.into_value();
        Tensor::from_host(&scores.to_host()?, *scores.dims(), cx.device().host())
    }

    /// The loss of the scores; see [`ops::head_loss()`].
    ///
    /// # Errors
    /// As [`ops::head_loss()`].
    pub fn loss(self, cx: &mut Ctx<'m>, target: &ops::Target, how: &ops::Loss) -> Result<(Var, ops::LossValue)> {
        self.heads.layers[self.level].run_loss(cx, self.features, target, how)
    }

    /// The label of every voxel by the full-resolution head; see [`ops::head_labels()`].
    ///
    /// # Errors
    /// As [`ops::head_labels()`].
    pub fn labels(&self, cx: &mut Ctx<'_>) -> Result<Vec<u16>> {
        self.heads.labels(cx, self.features.clone())
    }
}

/// Runs `pass` with activations stored as filters are, or, where those are floats, as the pass asks for.
pub(super) fn storing<'m, T>(cx: &mut Ctx<'m>, filters: Precision, pass: impl FnOnce(&mut Ctx<'m>) -> T) -> T {
    let before = cx.precision();
    cx.set_precision(if filters == Precision::F32 { before } else { filters });
    let done = pass(cx);
    cx.set_precision(before);
    done
}
