//! Instance normalisation: one pass for the moments, one that normalises, adds and applies leaky ReLU.

use std::borrow::Cow;
use std::ops::Range;

use super::PIECE;
use super::conv3d::Norm;
use super::isa::{Simd, simd_entry};
use super::moments::{Moments, moments};
use super::stored::store;
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa, Stored, StoredMut};

/// Where an operand is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// In the output's memory, to be overwritten.
    Out,
    /// In memory of its own.
    At(Stored<'a>),
}

/// A piece of an operand.
enum Part<'a> {
    Out,
    At(Cow<'a, [f32]>),
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

type Run = fn(Isa, &Problem<'_>, StoredMut<'_>);

pub(crate) static INSTANCE_NORM: [Impl<(), Run>; 3] = levels(run);

fn picked(isa: Isa, name: Option<&str>) -> Result<&'static Impl<(), Run>> {
    pick(&INSTANCE_NORM, isa, &(), name).ok_or_else(|| no_implementation("instance_norm", name))
}

/// The moments of every channel block of `x`, of `space` voxels each.
pub(crate) fn measure(isa: Isa, name: Option<&str>, space: usize, x: Stored<'_>) -> Result<Vec<Moments>> {
    let (isa, len) = (picked(isa, name)?.isa, space * BLOCK);
    let per_block = len.div_ceil(PIECE);
    let parts = par::map(x.len() / len * per_block, |i| {
        let (block, first) = (i / per_block * len, i % per_block * PIECE);
        moments(isa, &x.part(block + first..block + len.min(first + PIECE)))
    });
    Ok(parts.chunks(per_block).map(|p| p.iter().fold(Moments::default(), |all, m| all.merge(*m))).collect())
}

/// Writes the normalised `p.x` to `out`.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem<'_>, out: StoredMut<'_>) -> Result<()> {
    let i = picked(isa, name)?;
    (i.run)(i.isa, p, out);
    Ok(())
}

fn run(isa: Isa, p: &Problem<'_>, out: StoredMut<'_>) {
    match out {
        StoredMut::F32(out) => pieces(p, out, |block, at, out| apply(isa, p, block, at, out)),
        StoredMut::Bf16(out) => pieces(p, out, |block, at, out| {
            let mut floats = vec![0.0; out.len()];
            Stored::Bf16(out).widen(isa, 0, &mut floats);
            apply(isa, p, block, at, &mut floats);
            store(isa, &floats, StoredMut::Bf16(out));
        }),
    }
}

/// Calls `f(channel block, place in the output, values)` for pieces of the output.
fn pieces<T: Send>(p: &Problem<'_>, out: &mut [T], f: impl Fn(usize, usize, &mut [T]) + Sync + Send) {
    let len = p.space * BLOCK;
    let per_block = len.div_ceil(PIECE);
    let pieces: Vec<&mut [T]> = out.chunks_mut(len).flat_map(|block| block.chunks_mut(PIECE)).collect();
    par::each(pieces, |i, out| {
        let block = i / per_block;
        f(block, block * len + i % per_block * PIECE, out);
    });
}

/// The normalised piece of a channel block from place `at` on.
fn apply(isa: Isa, p: &Problem<'_>, block: usize, at: usize, out: &mut [f32]) {
    let range = at..at + out.len();
    let x = p.x.part(range.clone());
    let residual = p.residual.map(|r| r.part(range));
    applied::on(isa, &Affine::of(&p.norm, block), &x, residual.as_ref(), out);
}

impl<'a> Operand<'a> {
    /// Some of its values, as floats.
    fn part(self, range: Range<usize>) -> Part<'a> {
        match self {
            Operand::Out => Part::Out,
            Operand::At(x) => Part::At(x.part(range)),
        }
    }
}

/// `(x - mean) * scale + shift`, which, unlike `x * scale + shift'`, loses nothing when the mean is large.
#[derive(Clone, Copy)]
pub(super) struct Affine {
    pub(super) mean: [f32; BLOCK],
    pub(super) scale: [f32; BLOCK],
    pub(super) shift: [f32; BLOCK],
    pub(super) slope: f32,
}

impl Affine {
    /// That of one channel block.
    pub(super) fn of(norm: &Norm<'_>, block: usize) -> Self {
        let part = |v: &[f32]| v.as_chunks::<BLOCK>().0[block];
        Self { mean: part(norm.mean), scale: part(norm.scale), shift: part(norm.shift), slope: norm.slope }
    }
}

simd_entry!(applied = apply_to(m: &Affine, x: &Part<'_>, residual: Option<&Part<'_>>, out: &mut [f32]));

#[inline(always)]
fn apply_to<S: Simd>(s: S, m: &Affine, x: &Part<'_>, residual: Option<&Part<'_>>, out: &mut [f32]) {
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
fn operand<S: Simd>(s: S, from: &Part<'_>, i: usize, out: &[f32; BLOCK]) -> S::V {
    match from {
        Part::Out => s.load(out),
        Part::At(x) => s.load(&x.as_chunks::<BLOCK>().0[i]),
    }
}
