//! The 1x1x1 head on rows of voxels: scores, softmax or sigmoid, added to a running sum. Used where class scores are
//! aggregated voxel by voxel and no `[classes, D, H, W]` tensor may exist. Scores alone, for interpolation between voxels.

use super::elementary::exp;
use super::isa::{Simd, simd_entry};
use crate::tensor::{BLOCK, Isa};

/// What is done to the scores of a voxel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// Nothing: logits.
    Identity,
    /// Softmax over the classes.
    Softmax,
    /// Each class by itself.
    Sigmoid,
}

/// Head weights as the kernel reads them: `[features][padded classes]`, classes padded to whole lanes.
#[derive(Debug, Clone)]
pub(crate) struct PackedHead {
    weight: Vec<[f32; BLOCK]>,
    bias: Vec<[f32; BLOCK]>,
    features: usize,
    classes: usize,
}

impl PackedHead {
    /// Packs `weight` `[classes][features]` and `bias` `[classes]` for inputs of `stride >= features` floats a voxel.
    pub(crate) fn new(weight: &[f32], bias: &[f32], features: usize, stride: usize) -> Self {
        let classes = bias.len();
        let blocks = classes.div_ceil(BLOCK);
        let mut packed = vec![[0.0; BLOCK]; stride * blocks];
        for (c, row) in weight.chunks_exact(features).enumerate() {
            for (k, &w) in row.iter().enumerate() {
                packed[k * blocks + c / BLOCK][c % BLOCK] = w;
            }
        }
        // A pad class of the lowest score takes no part in a softmax and never wins; between two such scores lies no NaN.
        let mut b = vec![[f32::MIN; BLOCK]; blocks];
        bias.iter().enumerate().for_each(|(c, &v)| b[c / BLOCK][c % BLOCK] = v);
        Self { weight: packed, bias: b, features: stride, classes }
    }

    /// Classes with those that fill the last lanes.
    pub(crate) fn padded(&self) -> usize {
        self.bias.len() * BLOCK
    }
}

/// For each voxel i of a row: `out[i] = W x[i] + b`, `out` with [`PackedHead::padded`] classes a voxel, the padded ones
/// below all scores.
pub(crate) fn scores(isa: Isa, head: &PackedHead, x: &[f32], out: &mut [f32]) {
    score::on(isa, head, x, out);
}

simd_entry!(score = score_row(head: &PackedHead, x: &[f32], out: &mut [f32]));

/// Voxels that are scored together: with two blocks of classes six sums, enough to hide the latency of a
/// multiply-addition, and twelve of the sixteen registers that AVX2 has.
const TOGETHER: usize = 3;

#[inline(always)]
fn score_row<S: Simd>(s: S, head: &PackedHead, x: &[f32], out: &mut [f32]) {
    let (k, n) = (head.features, head.padded());
    assert!(x.len() / k == out.len() / n, "as many voxels in as out");
    for (x, out) in x.chunks(TOGETHER * k).zip(out.chunks_mut(TOGETHER * n)) {
        match x.len() / k {
            TOGETHER => score_voxels::<S, TOGETHER>(s, head, x, out),
            2 => score_voxels::<S, 2>(s, head, x, out),
            _ => score_voxels::<S, 1>(s, head, x, out),
        }
    }
}

#[inline(always)]
fn score_voxels<S: Simd, const V: usize>(s: S, head: &PackedHead, x: &[f32], out: &mut [f32]) {
    let n = head.bias.len();
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    let mut b = 0;
    while b + 2 <= n {
        score_blocks::<S, V, 2>(s, head, b, x, out);
        b += 2;
    }
    if b < n {
        score_blocks::<S, V, 1>(s, head, b, x, out);
    }
}

#[inline(always)]
fn score_blocks<S: Simd, const V: usize, const N: usize>(
    s: S,
    head: &PackedHead,
    b: usize,
    x: &[f32],
    out: &mut [[f32; BLOCK]],
) {
    let (k, n) = (head.features, head.bias.len());
    let mut voxels = [&x[..k]; V];
    for v in 0..V {
        voxels[v] = &x[v * k..][..k];
    }
    let mut acc = [[s.splat(0.0); N]; V];
    for v in 0..V {
        for j in 0..N {
            acc[v][j] = s.load(&head.bias[b + j]);
        }
    }
    for (i, w) in head.weight.chunks_exact(n).enumerate().take(k) {
        let w = &w[b..b + N];
        for v in 0..V {
            let value = s.splat(voxels[v][i]);
            for j in 0..N {
                acc[v][j] = s.fma(value, s.load(&w[j]), acc[v][j]);
            }
        }
    }
    for v in 0..V {
        for j in 0..N {
            s.store(acc[v][j], &mut out[v * n + b + j]);
        }
    }
}

/// For each voxel i of a row: `sum[i] += scale[i] * activation(W x[i] + b)`.
///
/// `x` holds the head's stride of floats a voxel, `sum` its classes, both with the voxel as the outer index.
pub(crate) fn accumulate(isa: Isa, head: &PackedHead, how: Activation, x: &[f32], scale: &[f32], sum: &mut [f32]) {
    row::on(isa, head, how, x, scale, sum);
}

simd_entry!(row = accumulate_row(head: &PackedHead, how: Activation, x: &[f32], scale: &[f32], sum: &mut [f32]));

#[inline(always)]
fn accumulate_row<S: Simd>(s: S, head: &PackedHead, how: Activation, x: &[f32], scale: &[f32], sum: &mut [f32]) {
    let mut scores = vec![[0f32; BLOCK]; head.bias.len()];
    for ((x, &g), sum) in x.chunks_exact(head.features).zip(scale).zip(sum.chunks_exact_mut(head.classes)) {
        linear(s, head, x, &mut scores);
        let mut g = g;
        match how {
            Activation::Identity => {}
            Activation::Softmax => g /= exponentials(s, &mut scores),
            Activation::Sigmoid => sigmoid(s, &mut scores),
        }
        let factor = s.splat(g);
        let (whole, rest) = sum.as_chunks_mut::<BLOCK>();
        for (sum, v) in whole.iter_mut().zip(&scores) {
            s.store(s.fma(factor, s.load(v), s.load(sum)), sum);
        }
        if let Some(last) = scores.get(whole.len()) {
            for (sum, v) in rest.iter_mut().zip(last) {
                *sum += g * v;
            }
        }
    }
}

/// Scores of one voxel, four blocks of classes at a time so that the sums stay in registers.
#[inline(always)]
fn linear<S: Simd>(s: S, head: &PackedHead, x: &[f32], scores: &mut [[f32; BLOCK]]) {
    let mut b = 0;
    while b + 4 <= scores.len() {
        blocks::<S, 4>(s, head, b, x, scores);
        b += 4;
    }
    match scores.len() - b {
        3 => blocks::<S, 3>(s, head, b, x, scores),
        2 => blocks::<S, 2>(s, head, b, x, scores),
        1 => blocks::<S, 1>(s, head, b, x, scores),
        _ => {}
    }
}

#[inline(always)]
fn blocks<S: Simd, const N: usize>(s: S, head: &PackedHead, b: usize, x: &[f32], scores: &mut [[f32; BLOCK]]) {
    let n = scores.len();
    let mut acc = [s.splat(0.0); N];
    for j in 0..N {
        acc[j] = s.load(&head.bias[b + j]);
    }
    for (&v, w) in x.iter().zip(head.weight.chunks_exact(n)) {
        let (v, w) = (s.splat(v), &w[b..b + N]);
        for j in 0..N {
            acc[j] = s.fma(v, s.load(&w[j]), acc[j]);
        }
    }
    for j in 0..N {
        s.store(acc[j], &mut scores[b + j]);
    }
}

/// Turns scores into `e^(score - largest)` and returns their sum.
#[inline(always)]
fn exponentials<S: Simd>(s: S, scores: &mut [[f32; BLOCK]]) -> f32 {
    let mut top = s.splat(f32::NEG_INFINITY);
    for v in scores.iter() {
        top = s.max(top, s.load(v));
    }
    let mut lanes = [0.0; BLOCK];
    s.store(top, &mut lanes);
    let top = s.splat(lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mut total = s.splat(0.0);
    for v in scores.iter_mut() {
        let e = exp(s, s.sub(s.load(v), top));
        total = s.add(total, e);
        s.store(e, v);
    }
    s.store(total, &mut lanes);
    lanes.iter().sum()
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, scores: &mut [[f32; BLOCK]]) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    for v in scores {
        // e^87 is still finite; beyond it the result is 0 or 1 to the last bit anyway.
        let e = exp(s, s.sub(zero, s.max(s.load(v), s.splat(-87.0))));
        s.store(s.div(one, s.add(one, e)), v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    /// Every instruction set against f64, for class counts around the lane width.
    #[test]
    fn rows_match_f64() {
        let mut rng = Rng::new(7, 0);
        for (classes, features, stride) in [(2, 4, 16), (16, 16, 16), (17, 20, 32), (64, 16, 16), (105, 32, 32)] {
            let draw = |n: usize, rng: &mut Rng| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let (w, b) = (draw(classes * features, &mut rng), draw(classes, &mut rng));
            let (n, mut x) = (5, draw(5 * stride, &mut rng));
            x.chunks_exact_mut(stride).for_each(|v| v[features..].fill(0.0));
            let g = draw(n, &mut rng);
            let head = PackedHead::new(&w, &b, features, stride);
            for how in [Activation::Identity, Activation::Softmax, Activation::Sigmoid] {
                let mut expected = vec![1.0; n * classes];
                for i in 0..n {
                    let logit = |c: usize| {
                        let dot = |k: usize| f64::from(w[c * features + k]) * f64::from(x[i * stride + k]);
                        f64::from(b[c]) + (0..features).map(dot).sum::<f64>()
                    };
                    let total: f64 = (0..classes).map(|c| logit(c).exp()).sum();
                    for c in 0..classes {
                        let v = match how {
                            Activation::Identity => logit(c),
                            Activation::Softmax => logit(c).exp() / total,
                            Activation::Sigmoid => 1.0 / (1.0 + (-logit(c)).exp()),
                        };
                        expected[i * classes + c] += f64::from(g[i]) * v;
                    }
                }
                for &isa in Isa::available() {
                    if how == Activation::Identity {
                        let mut plain = vec![0.0; n * head.padded()];
                        scores(isa, &head, &x, &mut plain);
                        for (i, voxel) in plain.chunks(head.padded()).enumerate() {
                            assert!(voxel[classes..].iter().all(|&v| v == f32::MIN));
                            for (c, v) in voxel[..classes].iter().enumerate() {
                                let e = (expected[i * classes + c] - 1.0) / f64::from(g[i]);
                                assert!((f64::from(*v) - e).abs() < 1e-4, "{isa:?} {classes}: {v} {e}");
                            }
                        }
                    }
                    let mut sum = vec![1.0; n * classes];
                    accumulate(isa, &head, how, &x, &g, &mut sum);
                    for (s, e) in sum.iter().zip(&expected) {
                        // Dot products of at most 33 terms of size about 6, scaled by at most about 4.
                        assert!((f64::from(*s) - e).abs() < 1e-4, "{isa:?} {how:?} {classes}: {s} {e}");
                    }
                }
            }
        }
    }
}
