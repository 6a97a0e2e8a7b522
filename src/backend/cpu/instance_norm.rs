//! Instance normalisation: one pass for the statistics, one that normalises, adds and applies leaky ReLU.

use super::PIECE;
use super::conv3d::Norm;
use super::isa::{Simd, simd_entry};
use super::moments::{Moments, moments};
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa};

/// Where an operand is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// In the output's memory, to be overwritten.
    Out,
    /// In memory of its own.
    At(&'a [f32]),
}

/// All but the output: blocked tensors, vectors padded to whole blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a> {
    /// Channel blocks of one sample.
    pub(crate) blocks: usize,
    /// Voxels per channel, at least one.
    pub(crate) space: usize,
    pub(crate) x: Operand<'a>,
    /// Added after the normalisation.
    pub(crate) residual: Option<Operand<'a>>,
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
    /// Leaky ReLU at the end.
    pub(crate) slope: Option<f32>,
}

type Run = fn(Isa, &Problem<'_>, &mut [f32]);

pub(crate) static INSTANCE_NORM: [Impl<(), Run>; 3] = levels(run);

/// Writes the normalised `p.x` to `out`.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem<'_>, out: &mut [f32]) -> Result<()> {
    let i = pick(&INSTANCE_NORM, isa, &(), name).ok_or_else(|| no_implementation("instance_norm", name))?;
    (i.run)(i.isa, p, out);
    Ok(())
}

/// One channel block at a time where a block is large, so that its second pass finds it in the cache if it fits;
/// small blocks in parallel.
fn run(isa: Isa, p: &Problem<'_>, out: &mut [f32]) {
    let len = p.space * BLOCK;
    if len <= PIECE {
        par::chunks_mut(out, len, |i, out| {
            let (x, residual) = (p.x.part(i * len, len), p.residual.map(|r| r.part(i * len, len)));
            let m = Affine::new(p, i % p.blocks, moments(isa, x.slice(out)));
            applied::on(isa, &m, x, residual, out);
        });
        return;
    }
    for (i, out) in out.chunks_exact_mut(len).enumerate() {
        let (x, residual) = (p.x.part(i * len, len), p.residual.map(|r| r.part(i * len, len)));
        let x_all = x.slice(out);
        let parts = par::map(len.div_ceil(PIECE), |j| moments(isa, &x_all[j * PIECE..len.min((j + 1) * PIECE)]));
        let m = Affine::new(p, i % p.blocks, parts.into_iter().reduce(Moments::merge).unwrap_or_default());
        par::chunks_mut(out, PIECE, |j, out| {
            let (at, n) = (j * PIECE, out.len());
            applied::on(isa, &m, x.part(at, n), residual.map(|r| r.part(at, n)), out);
        });
    }
}

/// Writes `leaky_relu(normalised(x) + residual)` to `out`; without `x`, the input is in `out`. `space` voxels per
/// channel.
pub(crate) fn apply(
    isa: Isa,
    norm: &Norm<'_>,
    space: usize,
    x: Option<&[f32]>,
    residual: Option<&[f32]>,
    out: &mut [f32],
) {
    known(isa, norm, space, x.map_or(Operand::Out, Operand::At), residual.map(Operand::At), out);
}

/// Writes `leaky_relu(normalised(x) + out)` to `out`.
pub(crate) fn apply_into_residual(isa: Isa, norm: &Norm<'_>, space: usize, x: &[f32], out: &mut [f32]) {
    known(isa, norm, space, Operand::At(x), Some(Operand::Out), out);
}

fn known(isa: Isa, norm: &Norm<'_>, space: usize, x: Operand<'_>, residual: Option<Operand<'_>>, out: &mut [f32]) {
    let len = space * BLOCK;
    let vector = |v: &[f32], i: usize| {
        let mut block = [0.0; BLOCK];
        block.copy_from_slice(&v[i * BLOCK..][..BLOCK]);
        block
    };
    let per_block = len.div_ceil(PIECE);
    let blocks: Vec<&mut [f32]> = out.chunks_mut(len).flat_map(|b| b.chunks_mut(PIECE)).collect();
    par::each(blocks, |i, out| {
        let (block, at) = (i / per_block, i % per_block * PIECE);
        let m = Affine {
            mean: vector(norm.mean, block),
            scale: vector(norm.scale, block),
            shift: vector(norm.shift, block),
            slope: Some(norm.slope),
        };
        let (at, n) = (block * len + at, out.len());
        applied::on(isa, &m, x.part(at, n), residual.map(|r| r.part(at, n)), out);
    });
}

impl<'a> Operand<'a> {
    fn part(self, at: usize, len: usize) -> Self {
        match self {
            Operand::Out => Operand::Out,
            Operand::At(x) => Operand::At(&x[at..at + len]),
        }
    }

    fn slice<'s>(self, out: &'s [f32]) -> &'s [f32]
    where
        'a: 's,
    {
        match self {
            Operand::Out => out,
            Operand::At(x) => x,
        }
    }
}

/// `(x - mean) * scale + shift`, which, unlike `x * scale + shift'`, loses nothing when the mean is large.
#[derive(Clone, Copy)]
struct Affine {
    mean: [f32; BLOCK],
    scale: [f32; BLOCK],
    shift: [f32; BLOCK],
    slope: Option<f32>,
}

impl Affine {
    fn new(p: &Problem<'_>, block: usize, m: Moments) -> Self {
        let mut a = Affine { mean: [0.0; BLOCK], scale: [0.0; BLOCK], shift: [0.0; BLOCK], slope: p.slope };
        for c in 0..BLOCK {
            let k = block * BLOCK + c;
            let variance = m.squares[c] / m.count;
            a.mean[c] = m.mean[c] as f32;
            a.scale[c] = (f64::from(p.weight[k]) / (variance + f64::from(p.eps)).sqrt()) as f32;
            a.shift[c] = p.bias[k];
        }
        a
    }
}

simd_entry!(applied = apply_to(m: &Affine, x: Operand<'_>, residual: Option<Operand<'_>>, out: &mut [f32]));

#[inline(always)]
fn apply_to<S: Simd>(s: S, m: &Affine, x: Operand<'_>, residual: Option<Operand<'_>>, out: &mut [f32]) {
    let (mean, scale, shift) = (s.load(&m.mean), s.load(&m.scale), s.load(&m.shift));
    // A slope of one changes nothing, so "no activation" needs no loop of its own.
    let slope = s.splat(m.slope.unwrap_or(1.0));
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    for (i, o) in out.iter_mut().enumerate() {
        let v = s.fma(s.sub(operand(s, x, i, o), mean), scale, shift);
        let v = match residual {
            Some(r) => s.add(v, operand(s, r, i, o)),
            None => v,
        };
        s.store(s.leaky_relu(v, slope), o);
    }
}

#[inline(always)]
fn operand<S: Simd>(s: S, from: Operand<'_>, i: usize, out: &[f32; BLOCK]) -> S::V {
    match from {
        Operand::Out => s.load(out),
        Operand::At(x) => s.load(&x.as_chunks::<BLOCK>().0[i]),
    }
}
