//! Instance normalisation: one pass for the statistics, one that normalises, adds and applies leaky ReLU.

use super::PIECE;
use super::isa::{Simd, simd_entry};
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa};

/// Voxels whose moments are taken at once: they fit the level-1 cache, so that looking at them twice costs no memory
/// traffic, and are few enough for sums in f32.
const VOXELS: usize = 256;

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
            let m = Affine::new(p, i % p.blocks, moments::on(isa, x.slice(out)));
            apply::on(isa, &m, x, residual, out);
        });
        return;
    }
    for (i, out) in out.chunks_exact_mut(len).enumerate() {
        let (x, residual) = (p.x.part(i * len, len), p.residual.map(|r| r.part(i * len, len)));
        let x_all = x.slice(out);
        let parts = par::map(len.div_ceil(PIECE), |j| moments::on(isa, &x_all[j * PIECE..len.min((j + 1) * PIECE)]));
        let m = Affine::new(p, i % p.blocks, parts.into_iter().reduce(Moments::merge).unwrap_or_default());
        par::chunks_mut(out, PIECE, |j, out| {
            let (at, n) = (j * PIECE, out.len());
            apply::on(isa, &m, x.part(at, n), residual.map(|r| r.part(at, n)), out);
        });
    }
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

/// Count, mean and sum of squared deviations from it, for 16 channels.
#[derive(Clone, Copy, Default)]
struct Moments {
    count: f64,
    mean: [f64; BLOCK],
    squares: [f64; BLOCK],
}

impl Moments {
    /// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    fn merge(self, other: Moments) -> Moments {
        let mut m = self;
        m.count += other.count;
        for c in 0..BLOCK {
            let delta = other.mean[c] - self.mean[c];
            let share = other.count / m.count;
            m.mean[c] += delta * share;
            m.squares[c] += other.squares[c] + delta * delta * self.count * share;
        }
        m
    }
}

simd_entry!(moments = moments_of(x: &[f32]) -> Moments);

#[inline(always)]
fn moments_of<S: Simd>(s: S, x: &[f32]) -> Moments {
    let mut all: Option<Moments> = None;
    for part in x.as_chunks::<BLOCK>().0.chunks(VOXELS) {
        let m = part_moments(s, part);
        all = Some(match all {
            Some(a) => a.merge(m),
            None => m,
        });
    }
    all.unwrap_or_default()
}

/// Corrected two-pass: deviations from a mean taken in f32, whose own error is then removed from both sums.
#[inline(always)]
fn part_moments<S: Simd>(s: S, x: &[[f32; BLOCK]]) -> Moments {
    let n = x.len() as f64;
    let zero = s.splat(0.0);
    let (fours, rest) = x.as_chunks::<4>();
    // Four sums each, to hide the latency of the addition.
    let mut sum = [zero; 4];
    for v in fours {
        for k in 0..4 {
            sum[k] = s.add(sum[k], s.load(&v[k]));
        }
    }
    for v in rest {
        sum[0] = s.add(sum[0], s.load(v));
    }
    let total = s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]));
    let about = s.mul(total, s.splat((1.0 / n) as f32));
    let (mut first, mut second) = ([zero; 4], [zero; 4]);
    for v in fours {
        for k in 0..4 {
            let d = s.sub(s.load(&v[k]), about);
            first[k] = s.add(first[k], d);
            second[k] = s.fma(d, d, second[k]);
        }
    }
    for v in rest {
        let d = s.sub(s.load(v), about);
        first[0] = s.add(first[0], d);
        second[0] = s.fma(d, d, second[0]);
    }
    let (mut mean, mut f, mut q) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
    s.store(about, &mut mean);
    s.store(s.add(s.add(first[0], first[1]), s.add(first[2], first[3])), &mut f);
    s.store(s.add(s.add(second[0], second[1]), s.add(second[2], second[3])), &mut q);
    let mut m = Moments { count: n, ..Moments::default() };
    for c in 0..BLOCK {
        let off = f64::from(f[c]) / n;
        m.mean[c] = f64::from(mean[c]) + off;
        m.squares[c] = (f64::from(q[c]) - off * f64::from(f[c])).max(0.0);
    }
    m
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

simd_entry!(apply = apply_to(m: &Affine, x: Operand<'_>, residual: Option<Operand<'_>>, out: &mut [f32]));

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
