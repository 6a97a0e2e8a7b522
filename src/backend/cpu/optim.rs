//! Steps of optimizers: one pass over a parameter, its gradient and what the optimizer keeps of it.
//!
//! Operations, their order and where they are rounded once are those of `torch.optim` on a processor (its `add` with a
//! factor and its `lerp` are fused multiply-adds), so that sets with such an instruction give PyTorch's bits; but for
//! Adam's square root, which is correctly rounded here and, depending on the build, not there.

use super::PIECE;
use super::isa::{Simd, simd_entry};
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa};

/// A parameter and what belongs to it, all of one length in whole blocks.
#[derive(Debug)]
pub(crate) struct Update<'u, const N: usize, H> {
    pub(crate) value: &'u mut [f32],
    pub(crate) gradient: &'u [f32],
    /// What the optimizer keeps.
    pub(crate) kept: [&'u mut [f32]; N],
    pub(crate) how: H,
}

/// Stochastic gradient descent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sgd {
    /// Factor of the gradient.
    pub(crate) scale: f32,
    pub(crate) weight_decay: f32,
    pub(crate) momentum: f32,
    pub(crate) nesterov: bool,
    pub(crate) rate: f32,
    /// The momentum begins with this gradient.
    pub(crate) first: bool,
}

/// Adam and AdamW.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adam {
    /// Factor of the gradient.
    pub(crate) scale: f32,
    /// Added to the gradient times the value.
    pub(crate) weight_decay: f32,
    /// Factor of the value.
    pub(crate) shrink: f32,
    /// `1 - beta1`.
    pub(crate) share1: f32,
    pub(crate) beta2: f32,
    /// `1 - beta2`.
    pub(crate) share2: f32,
    /// `rate / (1 - beta1^step)`.
    pub(crate) rate: f32,
    /// `sqrt(1 - beta2^step)`.
    pub(crate) correction: f32,
    pub(crate) eps: f32,
}

type SgdRun = fn(Isa, Vec<Update<'_, 1, Sgd>>);
type AdamRun = fn(Isa, Vec<Update<'_, 2, Adam>>);
type SquaresRun = fn(Isa, &[f32]) -> f64;

pub(crate) static SGD: [Impl<(), SgdRun>; 3] = levels(sgd_run);
pub(crate) static ADAM: [Impl<(), AdamRun>; 3] = levels(adam_run);
pub(crate) static SQUARES: [Impl<(), SquaresRun>; 3] = levels(squares_run);

/// One step of stochastic gradient descent; what is kept is the momentum.
pub(crate) fn sgd(isa: Isa, name: Option<&str>, all: Vec<Update<'_, 1, Sgd>>) -> Result<()> {
    let i = pick(&SGD, isa, &(), name).ok_or_else(|| no_implementation("optim", name))?;
    (i.run)(i.isa, all);
    Ok(())
}

/// One step of Adam; what is kept are the running means of gradients and of their squares.
pub(crate) fn adam(isa: Isa, name: Option<&str>, all: Vec<Update<'_, 2, Adam>>) -> Result<()> {
    let i = pick(&ADAM, isa, &(), name).ok_or_else(|| no_implementation("optim", name))?;
    (i.run)(i.isa, all);
    Ok(())
}

/// The sum of squares, not finite exactly if a value is not.
pub(crate) fn squares(isa: Isa, name: Option<&str>, x: &[f32]) -> Result<f64> {
    let i = pick(&SQUARES, isa, &(), name).ok_or_else(|| no_implementation("optim", name))?;
    Ok((i.run)(i.isa, x))
}

fn sgd_run(isa: Isa, all: Vec<Update<'_, 1, Sgd>>) {
    par::each(pieces(all), |_, p| {
        let [momentum] = p.kept;
        sgd_piece::on(isa, p.value, p.gradient, momentum, p.how);
    });
}

fn adam_run(isa: Isa, all: Vec<Update<'_, 2, Adam>>) {
    par::each(pieces(all), |_, p| {
        let [mean, squares] = p.kept;
        adam_piece::on(isa, p.value, p.gradient, mean, squares, p.how);
    });
}

fn squares_run(isa: Isa, x: &[f32]) -> f64 {
    let n = x.len().div_ceil(PIECE);
    par::map(n, |i| squares_piece::on(isa, &x[i * PIECE..x.len().min((i + 1) * PIECE)])).into_iter().sum()
}

/// All parameters cut into pieces, so that small ones are worked on beside large ones.
fn pieces<const N: usize, H: Copy>(all: Vec<Update<'_, N, H>>) -> Vec<Update<'_, N, H>> {
    let mut out = Vec::new();
    for u in all {
        let mut kept = u.kept.map(|k| k.chunks_mut(PIECE));
        for (value, gradient) in u.value.chunks_mut(PIECE).zip(u.gradient.chunks(PIECE)) {
            let kept = kept.each_mut().map(|k| k.next().unwrap_or_default());
            out.push(Update { value, gradient, kept, how: u.how });
        }
    }
    out
}

simd_entry!(sgd_piece = sgd_blocks(value: &mut [f32], gradient: &[f32], momentum: &mut [f32], how: Sgd));
simd_entry!(
    adam_piece = adam_blocks(value: &mut [f32], gradient: &[f32], mean: &mut [f32], squares: &mut [f32], how: Adam)
);
simd_entry!(squares_piece = squares_of(x: &[f32]) -> f64);

#[inline(always)]
fn sgd_blocks<S: Simd>(s: S, value: &mut [f32], gradient: &[f32], momentum: &mut [f32], how: Sgd) {
    let [scale, decay, mu, down] = [how.scale, how.weight_decay, how.momentum, -how.rate].map(|v| s.splat(v));
    let momentum = momentum.as_chunks_mut::<BLOCK>().0;
    for ((p, g), b) in value.as_chunks_mut::<BLOCK>().0.iter_mut().zip(gradient.as_chunks::<BLOCK>().0).zip(momentum) {
        let v = s.load(p);
        let mut d = s.mul(s.load(g), scale);
        if how.weight_decay != 0.0 {
            d = s.fma(v, decay, d);
        }
        if how.momentum != 0.0 {
            let m = if how.first { d } else { s.add(s.mul(s.load(b), mu), d) };
            s.store(m, b);
            d = if how.nesterov { s.fma(m, mu, d) } else { m };
        }
        s.store(s.fma(d, down, v), p);
    }
}

#[inline(always)]
fn adam_blocks<S: Simd>(s: S, value: &mut [f32], gradient: &[f32], mean: &mut [f32], squares: &mut [f32], how: Adam) {
    let [scale, decay, shrink] = [how.scale, how.weight_decay, how.shrink].map(|v| s.splat(v));
    let [share1, beta2, share2] = [how.share1, how.beta2, how.share2].map(|v| s.splat(v));
    let [down, correction, eps] = [-how.rate, how.correction, how.eps].map(|v| s.splat(v));
    let kept = mean.as_chunks_mut::<BLOCK>().0.iter_mut().zip(squares.as_chunks_mut::<BLOCK>().0);
    let values = value.as_chunks_mut::<BLOCK>().0.iter_mut().zip(gradient.as_chunks::<BLOCK>().0);
    for ((p, g), (m, q)) in values.zip(kept) {
        let v = s.mul(s.load(p), shrink);
        let mut d = s.mul(s.load(g), scale);
        if how.weight_decay != 0.0 {
            d = s.fma(v, decay, d);
        }
        let old = s.load(m);
        let first = s.fma(share1, s.sub(d, old), old);
        let second = s.fma(s.mul(share2, d), d, s.mul(s.load(q), beta2));
        s.store(first, m);
        s.store(second, q);
        let under = s.add(s.div(s.sqrt(second), correction), eps);
        s.store(s.add(v, s.div(s.mul(down, first), under)), p);
    }
}

/// Squares of floats are exact in f64, so all sets give the same bits.
#[inline(always)]
fn squares_of<S: Simd>(s: S, x: &[f32]) -> f64 {
    let mut sum = [0.0; BLOCK];
    for block in x.as_chunks::<BLOCK>().0 {
        for (sum, v) in sum.iter_mut().zip(block) {
            *sum = s.fma_f64(f64::from(*v), f64::from(*v), *sum);
        }
    }
    sum.iter().sum()
}
