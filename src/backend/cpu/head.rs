//! The 1x1x1 head on rows of voxels: scores, softmax or sigmoid, added to a running sum. Used where class scores are
//! aggregated voxel by voxel and no `[classes, D, H, W]` tensor may exist.
#![allow(unsafe_code)]

use crate::tensor::Isa;

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

/// Lanes of the arrays that the compiler turns into registers.
const L: usize = 16;

/// Head weights as the kernel reads them: `[features][padded classes]`, classes padded to whole lanes.
#[derive(Debug, Clone)]
pub(crate) struct PackedHead {
    weight: Vec<[f32; L]>,
    bias: Vec<[f32; L]>,
    features: usize,
    classes: usize,
}

impl PackedHead {
    /// Packs `weight` `[classes][features]` and `bias` `[classes]` for inputs of `stride >= features` floats a voxel.
    pub(crate) fn new(weight: &[f32], bias: &[f32], features: usize, stride: usize) -> Self {
        let classes = bias.len();
        let blocks = classes.div_ceil(L);
        let mut packed = vec![[0.0; L]; stride * blocks];
        for (c, row) in weight.chunks_exact(features).enumerate() {
            for (k, &w) in row.iter().enumerate() {
                packed[k * blocks + c / L][c % L] = w;
            }
        }
        // A pad class of minus infinity takes no part in a softmax.
        let mut b = vec![[f32::NEG_INFINITY; L]; blocks];
        bias.iter().enumerate().for_each(|(c, &v)| b[c / L][c % L] = v);
        Self { weight: packed, bias: b, features: stride, classes }
    }
}

/// For each voxel i of a row: `sum[i] += scale[i] * activation(W x[i] + b)`.
///
/// `x` holds the head's stride of floats a voxel, `sum` its classes, both with the voxel as the outer index.
pub(crate) fn accumulate(isa: Isa, head: &PackedHead, how: Activation, x: &[f32], scale: &[f32], sum: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a device has this instruction set only after it was detected on this processor.
        Isa::Avx512 => unsafe { accumulate_avx512(head, how, x, scale, sum) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { accumulate_avx2(head, how, x, scale, sum) },
        _ => rows::<false>(head, how, x, scale, sum),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
fn accumulate_avx512(head: &PackedHead, how: Activation, x: &[f32], scale: &[f32], sum: &mut [f32]) {
    rows::<true>(head, how, x, scale, sum);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn accumulate_avx2(head: &PackedHead, how: Activation, x: &[f32], scale: &[f32], sum: &mut [f32]) {
    rows::<true>(head, how, x, scale, sum);
}

/// `a * b + c`; fused only where the instruction exists, since without it `mul_add` is a call of a slow function.
#[inline(always)]
fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn rows<const FMA: bool>(head: &PackedHead, how: Activation, x: &[f32], scale: &[f32], sum: &mut [f32]) {
    let blocks = head.bias.len();
    let mut scores = vec![[0f32; L]; blocks];
    for ((x, &g), sum) in x.chunks_exact(head.features).zip(scale).zip(sum.chunks_exact_mut(head.classes)) {
        voxel::<FMA>(head, x, &mut scores);
        match how {
            Activation::Identity => {}
            Activation::Softmax => softmax::<FMA>(&mut scores),
            Activation::Sigmoid => scores.iter_mut().for_each(|s| {
                for v in s {
                    *v = 1.0 / (1.0 + exp::<FMA>(-*v));
                }
            }),
        }
        for (sum, s) in sum.chunks_mut(L).zip(&scores) {
            if let Ok(sum) = <&mut [f32; L]>::try_from(&mut *sum) {
                for l in 0..L {
                    sum[l] = madd::<FMA>(g, s[l], sum[l]);
                }
            } else {
                sum.iter_mut().zip(s).for_each(|(a, &v)| *a = madd::<FMA>(g, v, *a));
            }
        }
    }
}

/// Scores of one voxel, four blocks of classes at a time so that the sums stay in registers.
#[inline(always)]
fn voxel<const FMA: bool>(head: &PackedHead, x: &[f32], scores: &mut [[f32; L]]) {
    let blocks = scores.len();
    let mut b = 0;
    while b < blocks {
        let n = (blocks - b).min(4);
        let mut acc = [[0f32; L]; 4];
        acc[..n].copy_from_slice(&head.bias[b..b + n]);
        if n == 4 {
            for (k, &v) in x.iter().enumerate() {
                let w = &head.weight[k * blocks + b..][..4];
                for j in 0..4 {
                    for l in 0..L {
                        acc[j][l] = madd::<FMA>(v, w[j][l], acc[j][l]);
                    }
                }
            }
        } else {
            for (k, &v) in x.iter().enumerate() {
                for j in 0..n {
                    let w = &head.weight[k * blocks + b + j];
                    for l in 0..L {
                        acc[j][l] = madd::<FMA>(v, w[l], acc[j][l]);
                    }
                }
            }
        }
        scores[b..b + n].copy_from_slice(&acc[..n]);
        b += n;
    }
}

#[inline(always)]
fn softmax<const FMA: bool>(scores: &mut [[f32; L]]) {
    let mut m = [f32::NEG_INFINITY; L];
    for s in scores.iter() {
        for l in 0..L {
            m[l] = if s[l] > m[l] { s[l] } else { m[l] };
        }
    }
    let max = m.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = [0f32; L];
    for s in scores.iter_mut() {
        for l in 0..L {
            s[l] = exp::<FMA>(s[l] - max);
            total[l] += s[l];
        }
    }
    let inverse = 1.0 / total.iter().sum::<f32>();
    for s in scores {
        for v in s {
            *v *= inverse;
        }
    }
}

/// e^x to about one unit in the last place: range reduction to |r| <= ln 2 / 2 and a degree-7 polynomial (Cephes
/// `expf`). Below -87 the result is about 1e-38 or 0, which is all that a probability needs.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let n = madd::<FMA>(x, std::f32::consts::LOG2_E, ROUND) - ROUND;
    let r = madd::<FMA>(n, -0.693_359_4, x);
    let r = madd::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1] {
        p = madd::<FMA>(p, r, c);
    }
    let y = madd::<FMA>(p * r, r, r) + 1.0;
    y * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    #[test]
    fn exp_is_accurate() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let e = f64::from(x).exp();
            let rel = (f64::from(exp::<false>(x)) - e).abs() / e;
            assert!(rel < 2.5e-7, "exp({x}): relative error {rel:e}");
        }
    }

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
