//! Mean and variance of channels: pieces in f32, put together in f64 in a fixed order.

use super::isa::{Simd, simd_entry};
use crate::tensor::BLOCK;

/// Voxels whose moments are taken at once: they fit the level-1 cache, so that looking at them twice costs no memory
/// traffic, and are few enough for sums in f32.
const VOXELS: usize = 256;

/// Count, mean and sum of squared deviations from it, for 16 channels.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Moments {
    pub(crate) count: f64,
    pub(crate) mean: [f64; BLOCK],
    pub(crate) squares: [f64; BLOCK],
}

impl Moments {
    /// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    pub(crate) fn merge(self, other: Moments) -> Moments {
        if self.count == 0.0 {
            return other;
        }
        if other.count == 0.0 {
            return self;
        }
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

simd_entry!(entry = moments_of(x: &[f32]) -> Moments);

/// Moments of 16 channels over the voxels of `x`, one block each.
pub(crate) fn moments(isa: crate::tensor::Isa, x: &[f32]) -> Moments {
    entry::on(isa, x)
}

#[inline(always)]
fn moments_of<S: Simd>(s: S, x: &[f32]) -> Moments {
    let parts = x.as_chunks::<BLOCK>().0.chunks(VOXELS);
    parts.fold(Moments::default(), |all, part| all.merge(part_moments(s, part)))
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
