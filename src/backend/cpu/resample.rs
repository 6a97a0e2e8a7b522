//! Lines of samples resampled side by side: sample i of all lines of a panel lies in one lane, so that lanes are lines and
//! the recursion along a line needs no shuffles. In f64, as scipy does.

use super::isa::{Simd, simd_entry};
use crate::tensor::Isa;

/// Lines of a panel. In f64 four AVX-512 registers: enough recursions at a time to hide the latency of one.
pub(crate) const LANES: usize = 32;

/// One sample of every line of a panel.
pub(crate) type Lane = [f64; LANES];

/// `(i, j, w)`: the sample `(1 - w) in[i] + w in[j]`.
pub(crate) type Pair = (usize, usize, f64);

/// `(i, w)`: the sample `w[0] in[i] + .. + w[3] in[i + 3]`.
pub(crate) type Four = (usize, [f64; 4]);

/// Pole of the cubic B-spline prefilter, sqrt(3) - 2.
const POLE: f64 = -0.267_949_192_431_122_7;

/// Terms of the mirrored series that starts the recursion; the next would be below 1e-26 of a sample.
const SERIES: usize = 46;

/// Output sample o of every line is the one that `taps[o]` says.
pub(crate) fn linear(isa: Isa, taps: &[Pair], panel: &[Lane], out: &mut [Lane]) {
    pairs::on(isa, taps, panel, out);
}

/// As [`linear`], with four neighbours.
pub(crate) fn cubic(isa: Isa, taps: &[Four], panel: &[Lane], out: &mut [Lane]) {
    fours::on(isa, taps, panel, out);
}

/// Samples to cubic B-spline coefficients, in place, mirrored about the outer edges of the end samples: the recursion of
/// Unser, Aldroubi and Eden, "B-spline signal processing: part I", IEEE TSP 41 (1993).
pub(crate) fn prefilter(isa: Isa, panel: &mut [Lane]) {
    filter::on(isa, panel);
}

simd_entry!(pairs = pairs_of(taps: &[Pair], panel: &[Lane], out: &mut [Lane]));
simd_entry!(fours = fours_of(taps: &[Four], panel: &[Lane], out: &mut [Lane]));
simd_entry!(filter = recursion(c: &mut [Lane]));

#[inline(always)]
fn pairs_of<S: Simd>(s: S, taps: &[Pair], panel: &[Lane], out: &mut [Lane]) {
    for (o, &(i, j, w)) in out.iter_mut().zip(taps) {
        let (a, b) = (&panel[i], &panel[j]);
        for l in 0..LANES {
            o[l] = s.fma_f64(w, b[l], (1.0 - w) * a[l]);
        }
    }
}

#[inline(always)]
fn fours_of<S: Simd>(s: S, taps: &[Four], panel: &[Lane], out: &mut [Lane]) {
    for (o, &(i, [w0, w1, w2, w3])) in out.iter_mut().zip(taps) {
        let (a, b, c, d) = (&panel[i], &panel[i + 1], &panel[i + 2], &panel[i + 3]);
        for l in 0..LANES {
            o[l] = s.fma_f64(w3, d[l], s.fma_f64(w2, c[l], s.fma_f64(w1, b[l], w0 * a[l])));
        }
    }
}

#[inline(always)]
fn recursion<S: Simd>(s: S, c: &mut [Lane]) {
    let n = c.len();
    if n == 0 {
        return;
    }
    // (1 - z)(1 - 1/z), the gain of the two recursions together.
    let gain = (1.0 - POLE) * (1.0 - 1.0 / POLE);
    let far = POLE.powi(n.min(1 << 20) as i32);
    let (mut before, last) = (c[0], c[n - 1]);
    for l in 0..LANES {
        before[l] += far * last[l];
    }
    let mut power = POLE;
    for i in 1..n.min(SERIES) {
        let (near, mirrored) = (c[i], c[n - 1 - i]);
        for l in 0..LANES {
            before[l] += power * (near[l] + far * mirrored[l]);
        }
        power *= POLE;
    }
    for l in 0..LANES {
        before[l] = gain * (c[0][l] + before[l] * POLE / (1.0 - far * far));
    }
    c[0] = before;
    for sample in &mut c[1..] {
        for l in 0..LANES {
            before[l] = s.fma_f64(POLE, before[l], gain * sample[l]);
        }
        *sample = before;
    }
    for l in 0..LANES {
        before[l] *= POLE / (POLE - 1.0);
    }
    c[n - 1] = before;
    for sample in c[..n - 1].iter_mut().rev() {
        for l in 0..LANES {
            before[l] = POLE * (before[l] - sample[l]);
        }
        *sample = before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    fn panel(rng: &mut Rng, n: usize) -> Vec<Lane> {
        (0..n).map(|_| std::array::from_fn(|_| rng.normal())).collect()
    }

    /// A spline goes through its samples, for lines around the length of the starting series, on every instruction set.
    #[test]
    fn coefficients_give_the_samples_back() {
        let mut rng = Rng::new(2, 3);
        for n in [1, 2, 3, 10, 45, 46, 47, 130] {
            let samples = panel(&mut rng, n);
            for &isa in Isa::available() {
                let mut c = samples.clone();
                prefilter(isa, &mut c);
                // Mirrored about the edges: one coefficient more on both sides.
                let all: Vec<Lane> = [&c[..1], &c[..], &c[n - 1..]].concat();
                let taps: Vec<Four> = (0..n).map(|i| (i, [1.0 / 6.0, 4.0 / 6.0, 1.0 / 6.0, 0.0])).collect();
                let mut back = vec![[0.0; LANES]; n];
                // The fourth neighbour has no weight, but must be there.
                cubic(isa, &taps, &[&all[..], &all[..1]].concat(), &mut back);
                for (b, s) in back.iter().flatten().zip(samples.iter().flatten()) {
                    // Samples of size about 4, amplified by at most 9, some hundred roundings of 1e-16.
                    assert!((b - s).abs() < 1e-12, "{isa:?} {n}: {b} {s}");
                }
            }
        }
    }

    #[test]
    fn linear_taps_are_the_weighted_sum() {
        let mut rng = Rng::new(2, 4);
        let samples = panel(&mut rng, 9);
        let taps: Vec<Pair> = (0..20).map(|o| (o % 9, o % 7, o as f64 / 20.0)).collect();
        for &isa in Isa::available() {
            let mut out = vec![[0.0; LANES]; taps.len()];
            linear(isa, &taps, &samples, &mut out);
            for (o, &(i, j, w)) in out.iter().zip(&taps) {
                for l in 0..LANES {
                    let expected = samples[i][l] * (1.0 - w) + samples[j][l] * w;
                    assert!((o[l] - expected).abs() < 1e-14, "{isa:?}: {} {expected}", o[l]);
                }
            }
        }
    }
}
