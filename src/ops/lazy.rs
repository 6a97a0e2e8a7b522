//! Inputs that are finished while they are read: a normalisation that is known but not applied, voxels that are repeated
//! but not stored. An operation that cannot read them so has them made first.

use std::sync::Arc;

use super::{activation, blocked, memory, on_card, stored_memory, unshared};
use crate::autograd::{Backward, Ctx, Grads, Param, ParamId, Var};
use crate::backend::compute;
use crate::backend::cpu::conv3d::Norm;
use crate::backend::cpu::instance_norm::{Operand, Problem};
use crate::backend::cpu::instance_norm_grad::{self as grad, Mask};
use crate::backend::cpu::moments::Moments as BlockMoments;
use crate::error::{Error, Result};
use crate::tensor::{BLOCK, Dims, Layout, Tensor};

/// Mean and variance of every channel of every sample of an activation.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    channels: usize,
    /// `[N][blocks]`; none on a card.
    blocks: Vec<BlockMoments>,
    #[cfg(feature = "cuda")]
    card: Option<CardMoments>,
}

/// Moments of the tiles of an activation on a card.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone)]
pub(super) struct CardMoments {
    /// f32 `[N][tiles][count, mean, squares][padded channels]`.
    pub(super) partials: Tensor,
    pub(super) tiles: usize,
    pub(super) batch: usize,
    pub(super) voxels: usize,
}

#[cfg(feature = "cuda")]
impl PartialEq for CardMoments {
    /// The same memory: what is in it is the card's to know.
    fn eq(&self, other: &Self) -> bool {
        self.partials.cuda() == other.partials.cuda()
    }
}

impl Moments {
    pub(super) fn new(channels: usize, blocks: Vec<BlockMoments>) -> Self {
        Self {
            channels,
            blocks,
            #[cfg(feature = "cuda")]
            card: None,
        }
    }

    fn is_with_processor(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.card.is_none();
        #[cfg(not(feature = "cuda"))]
        true
    }

    /// Of an activation on a card.
    #[cfg(feature = "cuda")]
    pub(super) fn on_card(channels: usize, card: CardMoments) -> Self {
        Self { channels, blocks: Vec::new(), card: Some(card) }
    }

    /// Mean and (biased) variance of channel `c` of sample `n`. On a card they stay there: NaN.
    #[must_use]
    pub fn of(&self, n: usize, c: usize) -> (f64, f64) {
        let Some(m) = self.blocks.get(n * self.channels.div_ceil(BLOCK) + c / BLOCK) else {
            return (f64::NAN, f64::NAN);
        };
        (m.mean[c % BLOCK], m.squares[c % BLOCK] / m.count)
    }
}

/// A normalisation with leaky ReLU that is known but not applied: `leaky_relu((x - mean) * scale + shift)` with a mean,
/// a scale and a shift per sample and channel.
#[derive(Debug, Clone, PartialEq)]
pub struct Affine {
    channels: usize,
    /// `[N][channels padded to blocks]` each.
    mean: Vec<f32>,
    scale: Vec<f32>,
    shift: Vec<f32>,
    /// One over the deviation.
    inverse: Vec<f32>,
    slope: f32,
    /// Of weight and bias.
    params: [ParamId; 2],
    /// f32 `[N][mean, scale, shift][padded channels]`, `[N][inverse][padded channels]` on a card, which the vectors are not.
    #[cfg(feature = "cuda")]
    card: Option<Planes>,
}

/// A tensor that is equal to itself.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone)]
struct Planes(Tensor);

#[cfg(feature = "cuda")]
impl PartialEq for Planes {
    fn eq(&self, other: &Self) -> bool {
        self.0.cuda() == other.0.cuda()
    }
}

impl Affine {
    /// The tensor on a card, if it is a card's.
    #[cfg(feature = "cuda")]
    pub(super) fn card(&self) -> Option<&Tensor> {
        self.card.as_ref().map(|p| &p.0)
    }

    /// Of the leaky ReLU; 1 for none.
    #[cfg(feature = "cuda")]
    pub(super) fn slope(&self) -> f32 {
        self.slope
    }

    /// Instance normalisation with weight `w` and bias `b`, both `[C]`, of an activation with these moments.
    ///
    /// # Errors
    /// [`Error::Shape`] when the channels do not fit.
    pub fn new(moments: &Moments, w: &Param, b: &Param, how: super::InstanceNorm) -> Result<Self> {
        const OP: &str = "instance_norm";
        let c = moments.channels;
        let padded = Layout::BLOCKED.padded(c);
        for (what, p) in [("weight", w), ("bias", b)] {
            if p.dims().as_slice() != [c] || p.value().dims().len() != padded {
                return Err(Error::shape(OP, format!("{what} of size {:?} for {c} channels", p.dims())));
            }
        }
        let params = [w.id(), b.id()];
        let processor = moments.is_with_processor();
        if w.value().device().is_cpu() != processor || b.value().device().is_cpu() != processor {
            return Err(Error::Device { what: format!("{OP}: weights and moments of different devices") });
        }
        #[cfg(feature = "cuda")]
        if let Some(m) = &moments.card {
            let card = Some(Planes(super::cuda::affine(c, m, w, b, how.eps)?));
            let [mean, scale, shift, inverse] = [(); 4].map(|()| Vec::new());
            return Ok(Self {
                channels: c,
                mean,
                scale,
                shift,
                inverse,
                slope: how.slope.unwrap_or(1.0),
                params,
                card,
            });
        }
        let (w, b) = (w.value().as_slice(), b.value().as_slice());
        let n = moments.blocks.len() / c.div_ceil(BLOCK);
        let [mut mean, mut scale, mut shift, mut inverse] = [(); 4].map(|()| Vec::with_capacity(n * padded));
        for (i, m) in moments.blocks.iter().enumerate() {
            let first = i % c.div_ceil(BLOCK) * BLOCK;
            for lane in 0..BLOCK {
                mean.push(m.mean[lane] as f32);
                let deviation = (m.squares[lane] / m.count + f64::from(how.eps)).sqrt();
                scale.push((f64::from(w[first + lane]) / deviation) as f32);
                shift.push(b[first + lane]);
                inverse.push((1.0 / deviation) as f32);
            }
        }
        Ok(Self {
            channels: c,
            mean,
            scale,
            shift,
            inverse,
            slope: how.slope.unwrap_or(1.0),
            params,
            #[cfg(feature = "cuda")]
            card: None,
        })
    }

    pub(super) fn norm(&self) -> Norm<'_> {
        Norm { mean: &self.mean, scale: &self.scale, shift: &self.shift, slope: self.slope }
    }

    /// Checks that it belongs to an activation of sizes `dims`.
    pub(super) fn fits(&self, op: &'static str, dims: &Dims) -> Result<()> {
        let [n, c, ..] = activation(op, dims)?;
        let held = self.mean.len();
        #[cfg(feature = "cuda")]
        let held = self.card().map_or(held, |t| t.dims().len() / 4);
        if c != self.channels || n * Layout::BLOCKED.padded(c) != held {
            return Err(Error::shape(op, format!("a normalisation of {} channels for {dims:?}", self.channels)));
        }
        Ok(())
    }

    /// Checks that an activation of sizes `dims` can be normalised while it is read: the leaky ReLU is then a maximum.
    pub(super) fn is_readable(&self, op: &'static str, dims: &Dims) -> Result<()> {
        self.fits(op, dims)?;
        if !(0.0..=1.0).contains(&self.slope) {
            return Err(Error::shape(op, format!("a leaky ReLU of slope {}, expected 0 to 1", self.slope)));
        }
        Ok(())
    }

    /// Applies it to `x`, adding `residual` before the leaky ReLU; in place in whichever has no other owner.
    ///
    /// # Errors
    /// [`Error::Shape`] when the sizes do not fit; [`Error::OutOfMemory`].
    pub fn apply(&self, cx: &mut Ctx<'_>, x: Var, residual: Option<Var>) -> Result<Var> {
        self.apply_by(cx, x, residual, None)
    }

    pub(super) fn apply_by(&self, cx: &mut Ctx<'_>, x: Var, residual: Option<Var>, name: Option<&str>) -> Result<Var> {
        const OP: &str = "instance_norm";
        self.fits(OP, x.value().dims())?;
        if let Some(r) = &residual
            && r.value().dims() != x.value().dims()
        {
            let (x, r) = (x.value().dims(), r.value().dims());
            return Err(Error::shape(OP, format!("input {x:?} and residual {r:?}, expected equal sizes")));
        }
        if cx.is_recorded() && residual.is_some() {
            // The way back tells the side of leaky ReLU by the sign of its result.
            self.is_readable(OP, x.value().dims())?;
        }
        on_card!(cx.device(), {
            if !cx.is_recorded() {
                return super::cuda::apply(cx, x, self, residual);
            }
            let (nodes, added) = ([x.node(), residual.as_ref().and_then(Var::node)], residual.is_some());
            let x = x.reformed(|x| super::computed_with(OP, x))?;
            // A second owner, so that it is not overwritten.
            let kept = x.value().clone();
            let out = cx.unrecorded(|cx| super::cuda::apply(cx, x, self, residual))?.into_value();
            let result = added.then(|| out.clone());
            Ok(cx.record(out, &nodes, || Box::new(AffineBackward { norm: self.clone(), x: kept, result })))
        });
        let clock = cx.clock();
        let dims = *x.value().dims();
        let nodes = [x.node(), residual.as_ref().and_then(Var::node)];
        let mut x = blocked(OP, x.into_value())?;
        // Kept by a second owner, so that it is not overwritten.
        let kept = cx.is_recorded().then(|| x.clone());
        let added = residual.is_some();
        let mut residual = residual.map(|r| blocked(OP, r.into_value())).transpose()?;
        let mut p =
            Problem { space: dims.space().iter().product(), norm: self.norm(), x: Operand::Out, residual: None };
        let out = if x.is_unique() {
            p.residual = residual.as_ref().map(|r| Operand::At(r.stored()));
            compute!(cx.device(), instance_norm::forward(name, &p, stored_memory(OP, &mut x)?), Ok(()))?;
            x
        } else {
            p.x = Operand::At(x.stored());
            // In the place of one that is stored alike: what is stored is no matter of who else has it.
            let mut out = match residual.take_if(|r| r.is_unique() && r.precision() == x.precision()) {
                Some(r) => {
                    p.residual = Some(Operand::Out);
                    r
                }
                None => {
                    p.residual = residual.as_ref().map(|r| Operand::At(r.stored()));
                    Tensor::empty_in(dims, Layout::BLOCKED, x.precision(), cx.device())?
                }
            };
            compute!(cx.device(), instance_norm::forward(name, &p, stored_memory(OP, &mut out)?), Ok(()))?;
            out
        };
        cx.note(OP, clock, cx.device().isa().name(), 0, || format!("{dims:?}"));
        let Some(x) = kept else { return Ok(cx.leaf(out)) };
        let result = added.then(|| out.clone());
        Ok(cx.record(out, &nodes, || Box::new(AffineBackward { norm: self.clone(), x, result })))
    }

    /// The gradient of the activation `x` by that of its normalised form, in whose memory it is. Those of weight and bias go
    /// to `grads`. The moments are taken as functions of `x`.
    pub(super) fn backward(&self, cx: &mut Ctx<'_>, grads: &mut Grads, x: &Tensor, dy: Tensor) -> Result<Tensor> {
        const OP: &str = "instance_norm backward";
        self.fits(OP, x.dims())?;
        on_card!(cx.device(), Ok(super::cuda::instance_norm_gradients(cx, grads, self, self.params, x, None, dy)?.0));
        let clock = cx.clock();
        let p = self.problem(x, Mask::Normalised);
        let mut dy = unshared(OP, dy)?;
        let to = memory(OP, &mut dy)?;
        let sums = compute!(cx.device(), instance_norm_grad::sums(&p, to), Vec::new());
        self.learn(cx, grads, &sums)?;
        compute!(cx.device(), instance_norm_grad::input(&p, &sums, None, to), ());
        cx.note(OP, clock, cx.device().isa().name(), 0, || format!("{:?}", x.dims()));
        Ok(dy)
    }

    /// As [`Affine::backward`] where something was added before leaky ReLU gave `result`: the gradient of `x`, that of what
    /// was added, and the sum of the latter over voxels and samples, per channel padded to blocks.
    pub(super) fn backward_added(
        &self,
        cx: &mut Ctx<'_>,
        grads: &mut Grads,
        x: &Tensor,
        result: &Tensor,
        dy: Tensor,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        const OP: &str = "instance_norm backward";
        self.fits(OP, x.dims())?;
        on_card!(cx.device(), super::cuda::instance_norm_gradients(cx, grads, self, self.params, x, Some(result), dy));
        let clock = cx.clock();
        let p = self.problem(x, Mask::Result(result.stored()));
        let mut g = unshared(OP, dy)?;
        let to = memory(OP, &mut g)?;
        let sums = compute!(cx.device(), instance_norm_grad::sums(&p, to), Vec::new());
        let summed = self.learn(cx, grads, &sums)?;
        let summed = Tensor::from_host(&summed, Dims::from([summed.len()]), cx.device())?;
        let mut dx = Tensor::empty(*x.dims(), Layout::BLOCKED, cx.device())?;
        let to = memory(OP, &mut dx)?;
        compute!(cx.device(), instance_norm_grad::input(&p, &sums, Some(g.as_slice()), to), ());
        cx.note(OP, clock, cx.device().isa().name(), 0, || format!("{:?} added", x.dims()));
        Ok((dx, g, summed))
    }

    fn problem<'a>(&'a self, x: &'a Tensor, mask: Mask<'a>) -> grad::Problem<'a> {
        let space = x.dims().space().iter().product();
        grad::Problem { space, norm: self.norm(), inverse: &self.inverse, x: x.stored(), mask }
    }

    /// Adds the gradients of weight and bias; returns the latter.
    fn learn(&self, cx: &Ctx<'_>, grads: &mut Grads, sums: &[grad::Sums]) -> Result<Vec<f32>> {
        let blocks = self.channels.div_ceil(BLOCK);
        let total = |part: fn(&grad::Sums) -> &[f64; BLOCK]| -> Vec<f32> {
            let of = |i: usize| sums.iter().skip(i / BLOCK).step_by(blocks).map(|s| part(s)[i % BLOCK]).sum::<f64>();
            // Lanes past the channels belong to no one.
            (0..blocks * BLOCK).map(|i| if i < self.channels { of(i) as f32 } else { 0.0 }).collect()
        };
        let (w, b) = (total(|s| &s.gh), total(|s| &s.g));
        for (p, g) in self.params.into_iter().zip([&w, &b]) {
            grads.add_param(p, Tensor::from_host(g, Dims::from([g.len()]), cx.device())?)?;
        }
        Ok(b)
    }
}

struct AffineBackward {
    norm: Affine,
    x: Tensor,
    /// With what was added; none if nothing was.
    result: Option<Tensor>,
}

impl<'m> Backward<'m> for AffineBackward {
    fn name(&self) -> &'static str {
        "instance_norm"
    }

    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor)) {
        visit(&self.x);
        self.result.iter().for_each(visit);
    }

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, grads: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { norm, x, result } = *self;
        let Some(result) = result else { return Ok(vec![Some(norm.backward(cx, grads, &x, dy)?), None]) };
        let (dx, added, _) = norm.backward_added(cx, grads, &x, &result, dy)?;
        Ok(vec![Some(dx), Some(added)])
    }
}

/// One input of a convolution.
#[derive(Debug, Clone)]
pub struct Source {
    pub(super) value: Var,
    pub(super) norm: Option<Arc<Affine>>,
    pub(super) factor: [usize; 3],
}

impl From<Var> for Source {
    fn from(value: Var) -> Self {
        Self { value, norm: None, factor: [1; 3] }
    }
}

impl Source {
    /// `value` with `norm` applied to it, whose leaky ReLU has a slope in [0, 1].
    #[must_use]
    pub fn normalised(value: Var, norm: Arc<Affine>) -> Self {
        Self { value, norm: Some(norm), factor: [1; 3] }
    }

    /// `value` with every voxel repeated `factor` times per axis, as [`super::upsample_nearest`] would.
    #[must_use]
    pub fn repeated(value: Var, factor: [usize; 3]) -> Self {
        Self { value, norm: None, factor }
    }

    /// Sizes `[N, C, D, H, W]` as an operation sees them.
    pub(super) fn dims(&self, op: &'static str) -> Result<[usize; 5]> {
        let [n, c, d, h, w] = activation(op, self.value.value().dims())?;
        let f = self.factor;
        if f.contains(&0) {
            return Err(Error::shape(op, format!("factor {f:?}, expected at least 1 per axis")));
        }
        if let Some(norm) = &self.norm {
            norm.is_readable(op, self.value.value().dims())?;
        }
        Ok([n, c, d.saturating_mul(f[0]), h.saturating_mul(f[1]), w.saturating_mul(f[2])])
    }

    /// True when nothing is left to do while reading.
    pub(super) fn is_plain(&self) -> bool {
        self.norm.is_none() && self.factor == [1; 3]
    }

    /// The activation, made if anything was left to do while reading.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn into_var(self, cx: &mut Ctx<'_>) -> Result<Var> {
        Ok(if self.is_plain() { self.value } else { self.made(cx)?.value })
    }

    /// The same with nothing left to do while reading.
    pub(super) fn made(self, cx: &mut Ctx<'_>) -> Result<Self> {
        let mut x = self.value;
        if let Some(norm) = &self.norm {
            x = norm.apply(cx, x, None)?;
        }
        if self.factor != [1; 3] {
            x = super::upsample_nearest(cx, x, self.factor)?;
        }
        Ok(Self::from(x))
    }
}

/// One input, or two that are read as if concatenated along the channels, which is never done in memory.
#[derive(Debug, Clone)]
pub enum Sources {
    /// One tensor.
    One(Source),
    /// The first tensor's channels, then the second's.
    Two(Source, Source),
}

impl Sources {
    /// One or two.
    pub(super) fn of(sources: Vec<Source>) -> Result<Self> {
        let mut sources = sources.into_iter();
        match (sources.next(), sources.next(), sources.next()) {
            (Some(a), None, _) => Ok(Sources::One(a)),
            (Some(a), Some(b), None) => Ok(Sources::Two(a, b)),
            _ => Err(Error::shape("conv3d", "no source, or more than two")),
        }
    }

    pub(super) fn into_vec(self) -> Vec<Source> {
        match self {
            Sources::One(a) => vec![a],
            Sources::Two(a, b) => vec![a, b],
        }
    }
}

impl From<Source> for Sources {
    fn from(source: Source) -> Self {
        Sources::One(source)
    }
}

impl From<Var> for Sources {
    fn from(value: Var) -> Self {
        Sources::One(value.into())
    }
}
