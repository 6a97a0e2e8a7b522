//! Channels that exclude each other.

use super::super::Line;
use super::super::elementary::exp;
use super::super::isa::Simd;
use super::{Part, Problem, Row, Slopes, TILE};
use crate::tensor::BLOCK;

/// Of some voxels: `e^(logit - largest)` and what it takes to make probabilities of it.
struct Tile {
    blocks: usize,
    /// `[voxel][block]`, zero in lanes without a channel.
    exponentials: Vec<Line>,
    /// The largest logit.
    top: [f32; TILE],
    /// The sum of the exponentials, at least one.
    total: [f32; TILE],
    /// The sum of the exponentials weighted by channel.
    weighted: [f32; TILE],
    lanes: [f32; BLOCK],
}

impl Tile {
    fn new(p: &Problem<'_>) -> Self {
        Self {
            blocks: p.blocks(),
            exponentials: vec![Line([0.0; BLOCK]); p.blocks() * TILE],
            top: [0.0; TILE],
            total: [0.0; TILE],
            weighted: [0.0; TILE],
            lanes: p.last_lanes(),
        }
    }

    /// The `n` voxels of `x` from `at` on; with `WEIGHTED` their weighted sums too.
    #[inline(always)]
    fn fill<S: Simd, R: AsRef<Row>, const WEIGHTED: bool>(
        &mut self,
        s: S,
        x: &[R],
        at: usize,
        n: usize,
        weights: &[[f32; BLOCK]],
    ) {
        let last = self.blocks - 1;
        let lanes = s.load(&self.lanes);
        // Makes lanes without a channel less than all others, whose values it does not change.
        let pad = s.mul(s.sub(s.splat(1.0), lanes), s.splat(f32::MIN));
        for (v, top) in self.top.iter_mut().enumerate().take(n) {
            let mut t = s.add(s.load(&x[last].as_ref()[at + v]), pad);
            for x in &x[..last] {
                t = s.max(t, s.load(&x.as_ref()[at + v]));
            }
            *top = s.largest(t);
        }
        for v in 0..n {
            let e = &mut self.exponentials[v * self.blocks..][..self.blocks];
            let top = s.splat(self.top[v]);
            let value = s.sub(s.add(s.load(&x[last].as_ref()[at + v]), pad), top);
            let y = s.mul(exp(s, value), lanes);
            s.store(y, &mut e[last].0);
            let mut total = y;
            let mut weighted = if WEIGHTED { s.mul(y, s.load(&weights[last])) } else { y };
            for b in 0..last {
                let y = exp(s, s.sub(s.load(&x[b].as_ref()[at + v]), top));
                s.store(y, &mut e[b].0);
                total = s.add(total, y);
                if WEIGHTED {
                    weighted = s.fma(y, s.load(&weights[b]), weighted);
                }
            }
            self.total[v] = s.sum(total);
            if WEIGHTED {
                self.weighted[v] = s.sum(weighted);
            }
        }
    }

    #[inline(always)]
    fn exponential(&self, v: usize, channel: usize) -> f32 {
        self.exponentials[v * self.blocks + channel / BLOCK].0[channel % BLOCK]
    }
}

/// The sums over the voxels of `x`; with `each` the cross-entropy of every voxel.
#[inline(always)]
pub(super) fn softmax_sums_piece<S: Simd>(s: S, p: &Problem<'_>, x: &[&Row], labels: &[u16], each: bool) -> Part {
    let (mut part, mut tile) = (Part::new(p), Tile::new(p));
    for at in (0..labels.len()).step_by(TILE) {
        let n = TILE.min(labels.len() - at);
        tile.fill::<S, _, false>(s, x, at, n, &[]);
        let mut scale = [0.0; TILE];
        // The logarithm of a product is the sum of the logarithms; it stays below 65536^32.
        let (mut product, mut below) = (1.0f64, 0.0f64);
        for v in 0..n {
            let label = labels[at + v];
            if !p.is_valid(label) {
                if each {
                    part.each.push(0.0);
                }
                continue;
            }
            let (label, total) = (usize::from(label), f64::from(tile.total[v]));
            let gap = f64::from(tile.top[v]) - f64::from(x[label / BLOCK][at + v][label % BLOCK]);
            scale[v] = 1.0 / tile.total[v];
            part.intersection[label] += f64::from(tile.exponential(v, label) * scale[v]);
            part.truth[label] += 1.0;
            part.valid += 1;
            product *= total;
            below += gap;
            if each {
                part.each.push((total.ln() + gap) as f32);
            }
        }
        part.cross_entropy += product.ln() + below;
        for (b, sum) in part.predicted.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            // Two sums, to hide the latency of the addition.
            let mut acc = [s.splat(0.0); 2];
            for v in 0..n {
                let e = s.load(&tile.exponentials[v * tile.blocks + b].0);
                acc[v % 2] = s.fma(e, s.splat(scale[v]), acc[v % 2]);
            }
            add_to(s, s.add(acc[0], acc[1]), sum);
        }
    }
    part
}

/// Adds sixteen floats to sums in f64.
#[inline(always)]
pub(super) fn add_to<S: Simd>(s: S, v: S::V, sums: &mut [f64; BLOCK]) {
    let mut lanes = [0.0; BLOCK];
    s.store(v, &mut lanes);
    sums.iter_mut().zip(lanes).for_each(|(sum, v)| *sum += f64::from(v));
}

/// The gradient of the voxels of `x`, or of `out` itself. With `a` and `b` the slopes with intersection and volume, `k`
/// that with the cross-entropy and `t` the truth: `p_c (a_c t_c + b_c - sum of p (a t + b)) + k (p_c - t_c)`.
#[inline(always)]
pub(super) fn softmax_gradient_piece<S: Simd>(
    s: S,
    p: &Problem<'_>,
    slopes: &Slopes<'_>,
    x: Option<&[&Row]>,
    labels: &[u16],
    out: &mut [&mut Row],
) {
    let mut tile = Tile::new(p);
    for at in (0..labels.len()).step_by(TILE) {
        let n = TILE.min(labels.len() - at);
        match x {
            Some(x) => tile.fill::<S, _, true>(s, x, at, n, slopes.predicted),
            None => tile.fill::<S, _, true>(s, &*out, at, n, slopes.predicted),
        }
        for v in 0..n {
            let e = &tile.exponentials[v * tile.blocks..][..tile.blocks];
            let label = labels[at + v];
            if !p.is_valid(label) {
                out.iter_mut().for_each(|out| out[at + v] = [0.0; BLOCK]);
                continue;
            }
            let (block, lane) = (usize::from(label) / BLOCK, usize::from(label) % BLOCK);
            let counts = slopes.chosen.is_none_or(|c| c[at + v]);
            let k = if counts { slopes.cross_entropy } else { 0.0 };
            let scale = 1.0 / tile.total[v];
            let own = e[block].0[lane] * scale * slopes.intersection[block][lane];
            let shift = s.splat(k - (tile.weighted[v] * scale + own));
            let scale = s.splat(scale);
            for (b, (out, e)) in out.iter_mut().zip(e).enumerate() {
                let probability = s.mul(s.load(&e.0), scale);
                s.store(s.mul(probability, s.add(s.load(&slopes.predicted[b]), shift)), &mut out[at + v]);
            }
            out[block][at + v][lane] += own - k;
        }
    }
}
