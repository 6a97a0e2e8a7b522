//! What is done to the values of one channel on the host: maps of single values, what is known of all of them, noise.

use super::elementary::{cos_sin_turns, exp, ln};
use super::isa::{Simd, simd_entry};
use crate::base::rng::Key;
use crate::tensor::{BLOCK, Isa};

/// `scale x + shift`, held between `low` and `high`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Map {
    pub(crate) scale: f32,
    pub(crate) shift: f32,
    pub(crate) low: f32,
    pub(crate) high: f32,
}

impl Map {
    /// Values as they are.
    pub(crate) const IDENTITY: Map = Map { scale: 1.0, shift: 0.0, low: f32::NEG_INFINITY, high: f32::INFINITY };

    /// NaN stays NaN.
    #[inline(always)]
    pub(super) fn of(self, x: f32) -> f32 {
        let v = x * self.scale + self.shift;
        let v = if v < self.low { self.low } else { v };
        if v > self.high { self.high } else { v }
    }

    #[inline(always)]
    fn of_block(self, x: &[f32; BLOCK]) -> [f32; BLOCK] {
        let mut out = [0.0; BLOCK];
        for l in 0..BLOCK {
            out[l] = self.of(x[l]);
        }
        out
    }
}

/// What is known of a channel's values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Stats {
    pub(crate) mean: f64,
    /// Standard deviation with the count less one; NaN for one value.
    pub(crate) std: f64,
    pub(crate) min: f32,
    pub(crate) max: f32,
}

/// A power curve on the range of the values: `((x - min) / max(range, 1e-7))^gamma range + min`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Power {
    pub(crate) min: f32,
    pub(crate) max: f32,
    pub(crate) gamma: f32,
}

/// Where the rows of one channel go: `shape` voxels along (z, y, x), some axes reversed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flip {
    pub(crate) shape: [usize; 3],
    pub(crate) axes: [bool; 3],
}

/// What is known of `map(x)`.
pub(crate) fn stats(isa: Isa, x: &[f32], map: Map) -> Stats {
    known::on(isa, x, map).finish()
}

/// `x <- power(map(x))`, and what is known of the result.
pub(crate) fn power(isa: Isa, x: &mut [f32], map: Map, how: Power) -> Stats {
    curve::on(isa, x, map, how).finish()
}

/// `x <- x + sigma n` with the standard normal numbers of the stream `key`.
pub(crate) fn add_noise(isa: Isa, x: &mut [f32], sigma: f32, key: Key) {
    noise::on(isa, x, sigma, key);
}

/// `to <- map(from)` with axes reversed; where `outside`, voxel by voxel of `from`, is negative, 0.
pub(crate) fn put(isa: Isa, flip: Flip, map: Map, from: &[f32], outside: Option<&[i16]>, to: &mut [f32]) {
    values::on(isa, flip, map, from, outside, to);
}

/// `to <- max(from, 0)` with axes reversed.
pub(crate) fn put_labels(isa: Isa, flip: Flip, from: &[i16], to: &mut [u16]) {
    labels::on(isa, flip, from, to);
}

simd_entry!(known = known_of(x: &[f32], map: Map) -> Sums);
simd_entry!(curve = curve_of(x: &mut [f32], map: Map, how: Power) -> Sums);
simd_entry!(noise = noise_of(x: &mut [f32], sigma: f32, key: Key));
simd_entry!(values = put_values(flip: Flip, map: Map, from: &[f32], outside: Option<&[i16]>, to: &mut [f32]));
simd_entry!(labels = put_only(flip: Flip, from: &[i16], to: &mut [u16]));

/// Values whose sums are taken at once: few enough for f32, and in the level-1 cache when they are looked at twice.
const PART: usize = 256 * BLOCK;

/// Statistics under way.
#[derive(Debug, Clone, Copy)]
struct Sums {
    count: f64,
    mean: f64,
    squares: f64,
    min: [f32; BLOCK],
    max: [f32; BLOCK],
}

impl Sums {
    const NONE: Sums =
        Sums { count: 0.0, mean: 0.0, squares: 0.0, min: [f32::INFINITY; BLOCK], max: [f32::NEG_INFINITY; BLOCK] };

    fn finish(self) -> Stats {
        Stats {
            mean: self.mean,
            std: (self.squares / (self.count - 1.0)).sqrt(),
            min: self.min.into_iter().fold(f32::INFINITY, f32::min),
            max: self.max.into_iter().fold(f32::NEG_INFINITY, f32::max),
        }
    }

    /// Adds a part: corrected two-pass in f32, put together in f64 (Chan, Golub and LeVeque, 1979).
    #[inline(always)]
    fn add<S: Simd>(&mut self, s: S, part: &[[f32; BLOCK]], rest: &[f32], map: Map) {
        let (zero, n) = (s.splat(0.0), part.len() * BLOCK + rest.len());
        let mut sum = [zero; 4];
        for (i, x) in part.iter().enumerate() {
            let v = map.of_block(x);
            for l in 0..BLOCK {
                self.min[l] = if v[l] < self.min[l] { v[l] } else { self.min[l] };
                self.max[l] = if v[l] > self.max[l] { v[l] } else { self.max[l] };
            }
            sum[i % 4] = s.add(sum[i % 4], s.load(&v));
        }
        let mut total = s.sum(s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3])));
        for &x in rest {
            let v = map.of(x);
            self.min[0] = self.min[0].min(v);
            self.max[0] = self.max[0].max(v);
            total += v;
        }
        let about = total / n as f32;
        let (mut first, mut second) = ([zero; 4], [zero; 4]);
        for (i, x) in part.iter().enumerate() {
            let d = s.sub(s.load(&map.of_block(x)), s.splat(about));
            first[i % 4] = s.add(first[i % 4], d);
            second[i % 4] = s.fma(d, d, second[i % 4]);
        }
        let mut f = f64::from(s.sum(s.add(s.add(first[0], first[1]), s.add(first[2], first[3]))));
        let mut q = f64::from(s.sum(s.add(s.add(second[0], second[1]), s.add(second[2], second[3]))));
        for &x in rest {
            let d = f64::from(map.of(x) - about);
            f += d;
            q += d * d;
        }
        let n = n as f64;
        let mean = f64::from(about) + f / n;
        let squares = (q - f * f / n).max(0.0);
        let (delta, share) = (mean - self.mean, n / (self.count + n));
        self.squares += squares + delta * delta * self.count * share;
        self.mean += delta * share;
        self.count += n;
    }
}

#[inline(always)]
fn known_of<S: Simd>(s: S, x: &[f32], map: Map) -> Sums {
    let mut sums = Sums::NONE;
    for part in x.chunks(PART) {
        let (blocks, rest) = part.as_chunks();
        sums.add(s, blocks, rest, map);
    }
    sums
}

#[inline(always)]
fn curve_of<S: Simd>(s: S, x: &mut [f32], map: Map, how: Power) -> Sums {
    let mut sums = Sums::NONE;
    for part in x.chunks_mut(PART) {
        let (blocks, rest) = part.as_chunks_mut::<BLOCK>();
        for b in &mut *blocks {
            *b = raised(s, map.of_block(b), how);
        }
        let mut last = [0.0; BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        rest.copy_from_slice(&raised(s, map.of_block(&last), how)[..rest.len()]);
        sums.add(s, blocks, rest, Map::IDENTITY);
    }
    sums
}

#[inline(always)]
fn raised<S: Simd>(s: S, x: [f32; BLOCK], how: Power) -> [f32; BLOCK] {
    let range = how.max - how.min;
    let inverse = 1.0 / range.max(1e-7);
    let mut t = [0.0; BLOCK];
    for l in 0..BLOCK {
        let v = (x[l] - how.min) * inverse;
        // Of a normal number; any power of it by more than 1/2 is nothing beside 1. NaN goes through.
        t[l] = if v < 1e-36 { 1e-36 } else { v };
    }
    let y = exp(s, s.mul(s.splat(how.gamma), s.load(&ln(t))));
    let mut out = [0.0; BLOCK];
    s.store(s.fma(y, s.splat(range), s.splat(how.min)), &mut out);
    out
}

#[inline(always)]
fn noise_of<S: Simd>(s: S, x: &mut [f32], sigma: f32, key: Key) {
    // Sixteen places of the stream are four numbers each: two pairs of normal numbers.
    for (piece, x) in x.chunks_mut(4 * BLOCK).enumerate() {
        let n = normals(s, key, (piece * BLOCK) as u32);
        for (x, n) in x.iter_mut().zip(n.as_flattened()) {
            *x += sigma * n;
        }
    }
}

/// Box and Muller's pairs from the numbers at sixteen places of a stream.
#[inline(always)]
fn normals<S: Simd>(s: S, key: Key, place: u32) -> [[f32; BLOCK]; 4] {
    let mut bits = [[0u32; BLOCK]; 4];
    for l in 0..BLOCK {
        let four = key.four(place.wrapping_add(l as u32));
        for k in 0..4 {
            bits[k][l] = four[k];
        }
    }
    let mut out = [[0.0; BLOCK]; 4];
    for pair in [0, 2] {
        let mut u = [0.0; BLOCK];
        for l in 0..BLOCK {
            // The middles of 2^24 equal parts of [0, 1]; the last would round to 1, whose logarithm is 0 as well.
            u[l] = ((bits[pair][l] >> 8) as f32 + 0.5) * (1.0 / 16_777_216.0);
        }
        let radius = s.sqrt(s.mul(s.splat(-2.0), s.load(&ln(u))));
        for (k, along) in cos_sin_turns(bits[pair + 1]).iter().enumerate() {
            s.store(s.mul(radius, s.load(along)), &mut out[pair + k]);
        }
    }
    out
}

#[inline(always)]
fn put_values<S: Simd>(_: S, flip: Flip, map: Map, from: &[f32], outside: Option<&[i16]>, to: &mut [f32]) {
    put_rows(flip, from, to, |to, x| *to = map.of(x));
    if let Some(outside) = outside {
        put_rows(flip, outside, to, |to, label| *to = if label < 0 { 0.0 } else { *to });
    }
}

#[inline(always)]
fn put_only<S: Simd>(_: S, flip: Flip, from: &[i16], to: &mut [u16]) {
    put_rows(flip, from, to, |to, label| *to = label.max(0) as u16);
}

/// Meets each value with the one that comes to lie in its place.
#[inline(always)]
fn put_rows<A: Copy, B>(flip: Flip, from: &[A], to: &mut [B], put: impl Fn(&mut B, A)) {
    let Flip { shape: [d, h, w], axes } = flip;
    if w == 0 {
        return;
    }
    for (row, to) in to.chunks_exact_mut(w).enumerate().take(d * h) {
        let at = source_row(flip, row);
        let from = &from[at..at + w];
        if axes[2] {
            to.iter_mut().zip(from.iter().rev()).for_each(|(to, x)| put(to, *x));
        } else {
            to.iter_mut().zip(from).for_each(|(to, x)| put(to, *x));
        }
    }
}

/// Where the row begins that goes to row number `row`.
#[inline(always)]
fn source_row(Flip { shape: [d, h, w], axes }: Flip, row: usize) -> usize {
    let (z, y) = (row / h, row % h);
    let (z, y) = (if axes[0] { d - 1 - z } else { z }, if axes[1] { h - 1 - y } else { y });
    (z * h + y) * w
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Key {
        Key { seed: 7, words: [1, 2, 3] }
    }

    /// Every normal number is the one that its random bits give, and all together they are normal.
    #[test]
    fn noise_is_box_and_mullers() {
        for &isa in Isa::available() {
            let mut x = vec![0.0f32; 1_000_001];
            add_noise(isa, &mut x, 1.0, stream());
            for (i, &n) in x.iter().enumerate() {
                let (piece, k, l) = (i / 64, i % 64 / 16, i % 16);
                let four = stream().four((piece * 16 + l) as u32);
                let u = (f64::from(four[k / 2 * 2] >> 8) + 0.5) / 16_777_216.0;
                let turn = f64::from(four[k / 2 * 2 + 1] >> 8) / 16_777_216.0 - 0.125;
                let (sin, cos) = (turn * std::f64::consts::TAU).sin_cos();
                let expected = (-2.0 * u.ln()).sqrt() * if k % 2 == 0 { cos } else { sin };
                // The uniform number is rounded to f32, which near 1 is all that is known of its logarithm.
                assert!(
                    (f64::from(n) - expected).abs() < 3e-4 && (u > 0.999 || (f64::from(n) - expected).abs() < 1e-5)
                );
            }
            // Moments within four standard errors.
            let n = x.len() as f64;
            let moment = |p: i32| x.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / n;
            for (p, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
                let m: f64 = moment(p);
                assert!((m - expected).abs() < 4.0 * f64::sqrt(variance / n), "{isa:?} moment {p}: {m}");
            }
        }
    }

    #[test]
    fn statistics_are_those_of_f64() {
        let mut rng = crate::base::rng::Rng::new(1, 1);
        for n in [2, 15, 16, 17, 4095, 4096, 4097, 20_000] {
            let x: Vec<f32> = (0..n).map(|_| (1000.0 + rng.normal()) as f32).collect();
            let map = Map { scale: -0.5, shift: 3.0, low: -498.0, high: -496.5 };
            let v: Vec<f64> = x.iter().map(|&x| f64::from((x * -0.5 + 3.0).clamp(-498.0, -496.5))).collect();
            let mean = v.iter().sum::<f64>() / n as f64;
            let std = (v.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n as f64 - 1.0)).sqrt();
            for &isa in Isa::available() {
                let s = stats(isa, &x, map);
                assert!((s.mean - mean).abs() < 1e-5 && (s.std - std).abs() < 1e-5, "{isa:?} {n}: {s:?} {mean} {std}");
                let f = |v: f64, w: &f64| if *w < v { *w } else { v };
                assert_eq!(f64::from(s.min), v.iter().fold(f64::INFINITY, f));
                assert_eq!(-f64::from(s.max), v.iter().map(|v| -v).fold(f64::INFINITY, |a, b| f(a, &b)));
            }
        }
    }

    #[test]
    fn powers_keep_the_ends() {
        for &isa in Isa::available() {
            for gamma in [0.7f32, 1.0, 1.5] {
                let mut x: Vec<f32> = (0..1003).map(|i| -2.0 + i as f32 * 0.004).collect();
                let before = x.clone();
                let s = power(isa, &mut x, Map::IDENTITY, Power { min: before[0], max: before[1002], gamma });
                for (a, b) in before.iter().zip(&x) {
                    let (min, range) = (f64::from(before[0]), f64::from(before[1002] - before[0]));
                    let expected = ((f64::from(*a) - min) / range).powf(f64::from(gamma)) * range + min;
                    assert!((f64::from(*b) - expected).abs() < 5e-6, "{isa:?} {gamma}: {a} to {b}, not {expected}");
                }
                assert_eq!((s.min, s.max), (x[0], x[1002]));
                // A constant channel stays as it is.
                let mut flat = vec![3.0; 5];
                power(isa, &mut flat, Map::IDENTITY, Power { min: 3.0, max: 3.0, gamma });
                assert_eq!(flat, [3.0; 5]);
            }
        }
    }
}
