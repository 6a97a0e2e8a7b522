//! Instance normalisation: one pass for the moments, one that normalises, adds and applies leaky ReLU.

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

/// All but the output, of blocked tensors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a> {
    /// Voxels per channel, at least one.
    pub(crate) space: usize,
    pub(crate) norm: Norm<'a>,
    pub(crate) x: Operand<'a>,
    /// Added after the normalisation, before the leaky ReLU.
    pub(crate) residual: Option<Operand<'a>>,
}

type Run = fn(Isa, &Problem<'_>, &mut [f32]);

pub(crate) static INSTANCE_NORM: [Impl<(), Run>; 3] = levels(run);

fn picked(isa: Isa, name: Option<&str>) -> Result<&'static Impl<(), Run>> {
    pick(&INSTANCE_NORM, isa, &(), name).ok_or_else(|| no_implementation("instance_norm", name))
}

/// The moments of every channel block of `x`, of `space` voxels each.
pub(crate) fn measure(isa: Isa, name: Option<&str>, space: usize, x: &[f32]) -> Result<Vec<Moments>> {
    let (isa, len) = (picked(isa, name)?.isa, space * BLOCK);
    let per_block = len.div_ceil(PIECE);
    let parts = par::map(x.len() / len * per_block, |i| {
        let block = &x[i / per_block * len..][..len];
        moments(isa, &block[i % per_block * PIECE..len.min((i % per_block + 1) * PIECE)])
    });
    Ok(parts.chunks(per_block).map(|p| p.iter().fold(Moments::default(), |all, m| all.merge(*m))).collect())
}

/// Writes the normalised `p.x` to `out`.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem<'_>, out: &mut [f32]) -> Result<()> {
    let i = picked(isa, name)?;
    (i.run)(i.isa, p, out);
    Ok(())
}

fn run(isa: Isa, p: &Problem<'_>, out: &mut [f32]) {
    let len = p.space * BLOCK;
    let per_block = len.div_ceil(PIECE);
    let pieces: Vec<&mut [f32]> = out.chunks_mut(len).flat_map(|block| block.chunks_mut(PIECE)).collect();
    par::each(pieces, |i, out| {
        let block = i / per_block;
        let (at, n) = (block * len + i % per_block * PIECE, out.len());
        applied::on(isa, &Affine::of(&p.norm, block), p.x.part(at, n), p.residual.map(|r| r.part(at, n)), out);
    });
}

impl<'a> Operand<'a> {
    fn part(self, at: usize, len: usize) -> Self {
        match self {
            Operand::Out => Operand::Out,
            Operand::At(x) => Operand::At(&x[at..at + len]),
        }
    }
}

/// `(x - mean) * scale + shift`, which, unlike `x * scale + shift'`, loses nothing when the mean is large.
#[derive(Clone, Copy)]
struct Affine {
    mean: [f32; BLOCK],
    scale: [f32; BLOCK],
    shift: [f32; BLOCK],
    slope: f32,
}

impl Affine {
    /// That of one channel block.
    fn of(norm: &Norm<'_>, block: usize) -> Self {
        let part = |v: &[f32]| v.as_chunks::<BLOCK>().0[block];
        Self { mean: part(norm.mean), scale: part(norm.scale), shift: part(norm.shift), slope: norm.slope }
    }
}

simd_entry!(applied = apply_to(m: &Affine, x: Operand<'_>, residual: Option<Operand<'_>>, out: &mut [f32]));

#[inline(always)]
fn apply_to<S: Simd>(s: S, m: &Affine, x: Operand<'_>, residual: Option<Operand<'_>>, out: &mut [f32]) {
    let (mean, scale, shift) = (s.load(&m.mean), s.load(&m.scale), s.load(&m.shift));
    // A slope of one changes nothing, so "no activation" needs no loop of its own.
    let slope = s.splat(m.slope);
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
