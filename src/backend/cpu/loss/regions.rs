//! Channels that may overlap: each voxel is in a region or not.

use super::super::elementary::{exp, log1p_ratio};
use super::super::isa::Simd;
use super::softmax::add_to;
use super::{Members, Part, Problem, Row, Slopes, TILE};
use crate::tensor::BLOCK;

/// The probabilities of being in and of being out, each as accurate as the other.
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V) -> [S::V; 2] {
    // e^87 is still finite; beyond it the results are 0 and 1 to the last bit anyway.
    let e = exp(s, s.sub(s.splat(0.0), s.max(s.splat(-87.0), x)));
    let inside = s.div(s.splat(1.0), s.add(s.splat(1.0), e));
    [inside, s.mul(e, inside)]
}

/// The sums over the voxels of `x`.
#[inline(always)]
pub(super) fn region_sums_piece<S: Simd>(s: S, p: &Problem<'_>, members: &Members, x: &[&Row], labels: &[u16]) -> Part {
    let mut part = Part::new(p);
    let mut cross_entropy = vec![0.0; part.truth.len()];
    let zero = s.splat(0.0);
    for at in (0..labels.len()).step_by(TILE) {
        let labels = &labels[at..labels.len().min(at + TILE)];
        part.valid += labels.iter().filter(|l| p.is_valid(**l)).count();
        for (b, x) in x.iter().enumerate() {
            let [mut intersection, mut predicted, mut truth, mut entropy] = [zero; 4];
            for (x, &label) in x[at..].iter().zip(labels) {
                if !p.is_valid(label) {
                    continue;
                }
                let (x, t) = (s.load(x), s.load(&members.row(label)[b]));
                let [inside, outside] = sigmoid(s, x);
                intersection = s.fma(inside, t, intersection);
                predicted = s.add(predicted, inside);
                truth = s.add(truth, t);
                let smaller = s.sub(zero, s.max(s.sub(zero, inside), s.sub(zero, outside)));
                let log = log1p_ratio(s, smaller, s.max(inside, outside));
                entropy = s.add(entropy, s.add(s.sub(s.max(zero, x), s.mul(x, t)), log));
            }
            let sums = [
                (intersection, &mut part.intersection),
                (predicted, &mut part.predicted),
                (truth, &mut part.truth),
                (entropy, &mut cross_entropy),
            ];
            for (v, sums) in sums {
                add_to(s, v, &mut sums.as_chunks_mut::<BLOCK>().0[b]);
            }
        }
    }
    part.cross_entropy = cross_entropy[..p.channels].iter().sum();
    part
}

/// The gradient of the voxels of `x`, or of `out` itself: `p (1 - p) (a t + b) + k (p - t)` by the letters of the softmax.
#[inline(always)]
pub(super) fn region_gradient_piece<S: Simd>(
    s: S,
    p: &Problem<'_>,
    members: &Members,
    slopes: &Slopes<'_>,
    x: Option<&[&Row]>,
    labels: &[u16],
    out: &mut [&mut Row],
) {
    for (b, out) in out.iter_mut().enumerate() {
        let (a, c) = (s.load(&slopes.intersection[b]), s.load(&slopes.predicted[b]));
        let lanes = if b + 1 == p.blocks() { p.last_lanes() } else { [1.0; BLOCK] };
        let k = s.mul(s.splat(slopes.cross_entropy), s.load(&lanes));
        for (v, (out, &label)) in out.iter_mut().zip(labels).enumerate() {
            if !p.is_valid(label) {
                *out = [0.0; BLOCK];
                continue;
            }
            let x = s.load(x.map_or(&*out, |x| &x[b][v]));
            let t = s.load(&members.row(label)[b]);
            let [inside, outside] = sigmoid(s, x);
            let dice = s.mul(s.mul(inside, outside), s.fma(a, t, c));
            s.store(s.fma(k, s.sub(inside, t), dice), out);
        }
    }
}
