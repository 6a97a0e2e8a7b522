//! The last step of a prediction, fused: interpolate a row of channel-last values, apply the network's linear head,
//! keep the winning label. Per output voxel nothing but the label is stored.
//!
//! Kernels work on tiles of voxels turned to structure-of-arrays form, so that lanes are voxels, and on four classes at
//! a time, so that every load feeds several multiplications. Which voxels share a tile depends on the row alone, never
//! on threads.

use super::head::PackedHead;
use crate::error::{Error, Result};
use crate::tensor::Isa;

/// Classes that a kernel computes together.
const GROUP: usize = 4;

/// Voxels of the largest tile.
const TILE: usize = 32;

/// A 1x1x1 convolution with bias.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LinearHead {
    channels: usize,
    classes: usize,
    /// (classes, channels), padded with zeros to whole groups of classes.
    weight: Vec<f32>,
    /// (classes), padded with minus infinity: a padded class never wins.
    bias: Vec<f32>,
}

impl LinearHead {
    /// The head with `weight` (classes, channels) and `bias` (classes).
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths do not fit each other.
    pub(crate) fn new(weight: &[f32], bias: &[f32]) -> Result<Self> {
        let classes = bias.len();
        if classes == 0 || weight.is_empty() || !weight.len().is_multiple_of(classes) {
            return Err(Error::shape("head", format!("{} weights for {classes} classes", weight.len())));
        }
        let (channels, padded) = (weight.len() / classes, classes.next_multiple_of(GROUP));
        let (mut weight, mut bias) = (weight.to_vec(), bias.to_vec());
        weight.resize(padded * channels, 0.0);
        bias.resize(padded, f32::NEG_INFINITY);
        Ok(Self { channels, classes, weight, bias })
    }

    /// Input channels.
    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// Output channels.
    pub(crate) fn classes(&self) -> usize {
        self.classes
    }

    /// (classes, channels).
    pub(crate) fn weight(&self) -> &[f32] {
        &self.weight[..self.classes * self.channels]
    }

    /// (classes).
    pub(crate) fn bias(&self) -> &[f32] {
        &self.bias[..self.classes]
    }

    /// The same head with classes as lanes.
    pub(crate) fn packed(&self) -> PackedHead {
        PackedHead::new(self.weight(), self.bias(), self.channels, self.channels)
    }

    /// The outputs for one voxel.
    pub(crate) fn apply(&self, features: &[f32], out: &mut [f32]) {
        for ((o, b), w) in out.iter_mut().zip(&self.bias).zip(self.weight.chunks(self.channels)) {
            *o = w.iter().zip(features).fold(*b, |t, (w, f)| t + w * f);
        }
    }
}

/// How values become a label.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Winner<'a> {
    /// The first of the largest values.
    Largest,
    /// Where value i exceeds `threshold`, label `paint[i]` is written, in order.
    Painted {
        /// The limit.
        threshold: f32,
        /// The label of every value.
        paint: &'a [u16],
    },
}

impl Winner<'_> {
    /// The label of one voxel.
    pub(crate) fn of(&self, values: &[f32]) -> u16 {
        match self {
            Winner::Largest => {
                let first = (f32::NEG_INFINITY, 0);
                values.iter().enumerate().fold(first, |t, (i, &v)| if v > t.0 { (v, i as u16) } else { t }).1
            }
            Winner::Painted { threshold, paint } => {
                values.iter().zip(*paint).fold(0, |label, (v, p)| if v > threshold { *p } else { label })
            }
        }
    }
}

/// An output voxel between two voxels of a row: `(1 - w) row[i] + w row[j]`.
pub(crate) type Tap = (usize, usize, f32);

/// `a + w (b - a)`.
#[inline(always)]
fn mix(a: f32, b: f32, w: f32) -> f32 {
    a + w * (b - a)
}

/// Interpolates the voxel at `tap` of `row` (voxels, channels).
pub(crate) fn sample(row: &[f32], channels: usize, (i, j, w): Tap, out: &mut [f32]) {
    let (a, b) = (&row[i * channels..][..channels], &row[j * channels..][..channels]);
    out.iter_mut().zip(a).zip(b).for_each(|((o, &a), &b)| *o = mix(a, b, w));
}

/// `out = (1 - v) ((1 - u) rows[0] + u rows[1]) + v ((1 - u) rows[2] + u rows[3])`.
pub(crate) fn blend(isa: Isa, rows: [&[f32]; 4], u: f32, v: f32, out: &mut [f32]) {
    #[inline(always)]
    fn body([a, b, c, d]: [&[f32]; 4], u: f32, v: f32, out: &mut [f32]) {
        let n = out.len();
        let (a, b, c, d) = (&a[..n], &b[..n], &c[..n], &d[..n]);
        // Half of the reading is saved where a weight is nothing; the values are the same.
        let (pair, weight) = if u == 0.0 { (c, v) } else { (b, u) };
        if u == 0.0 || v == 0.0 {
            return (0..n).for_each(|i| out[i] = mix(a[i], pair[i], weight));
        }
        for i in 0..n {
            out[i] = mix(mix(a[i], b[i], u), mix(c[i], d[i], u), v);
        }
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2(rows: [&[f32]; 4], u: f32, v: f32, out: &mut [f32]) {
            body(rows, u, v, out);
        }
        if has(isa) >= Isa::Avx2 {
            // SAFETY: `has` has just found AVX2 in this processor.
            return unsafe { avx2(rows, u, v, out) };
        }
    }
    let _ = isa;
    body(rows, u, v, out);
}

/// `isa`, or the best below it that this processor really has.
fn has(isa: Isa) -> Isa {
    isa.min(Isa::detect())
}

/// Labels of the voxels at `taps` of `row` (voxels, `channels`), whose values are the scores themselves.
pub(crate) fn label_row(isa: Isa, row: &[f32], channels: usize, taps: &[Tap], winner: Winner<'_>, out: &mut [u16]) {
    let isa = if winner == Winner::Largest { has(isa) } else { Isa::Scalar };
    let mut values = vec![0.0; channels];
    for (o, &(i, j, w)) in out.iter_mut().zip(taps) {
        let (a, b) = (&row[i * channels..][..channels], &row[j * channels..][..channels]);
        *o = match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `has` found AVX-512 in this processor; both slices hold at least 16 values, equally many.
            Isa::Avx512 if channels >= 16 => unsafe { x86::largest_512(a, b, w) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `has` found AVX2 and FMA in this processor; both slices hold at least 8 values, equally many.
            Isa::Avx2 | Isa::Avx512 if channels >= 8 => unsafe { x86::largest_256(a, b, w) },
            _ => {
                sample(row, channels, (i, j, w), &mut values);
                winner.of(&values)
            }
        };
    }
}

/// Labels of the voxels at `taps` of `row` (voxels, channels of `head`), whose scores are `head` of the values.
pub(crate) fn head_row(isa: Isa, row: &[f32], taps: &[Tap], head: &LinearHead, winner: Winner<'_>, out: &mut [u16]) {
    let k = head.channels;
    let padded = head.bias.len();
    let labels: Vec<u32> = match winner {
        Winner::Largest => (0..padded as u32).collect(),
        Winner::Painted { paint, .. } => (0..padded).map(|i| paint.get(i).copied().map_or(0, u32::from)).collect(),
    };
    let isa = has(isa);
    let width = if isa >= Isa::Avx512 { TILE } else { TILE / 2 };
    let mut tile = vec![0f32; k * width];
    let mut found = [0u32; TILE];
    for (out, taps) in out.chunks_mut(width).zip(taps.chunks(width)) {
        for (l, &(i, j, w)) in taps.iter().enumerate() {
            let (a, b) = (&row[i * k..][..k], &row[j * k..][..k]);
            for ((t, &a), &b) in tile[l..].iter_mut().step_by(width).zip(a).zip(b) {
                *t = mix(a, b, w);
            }
        }
        let (threshold, running) = match winner {
            Winner::Largest => (f32::NEG_INFINITY, true),
            Winner::Painted { threshold, .. } => (threshold, false),
        };
        let job = Tile { values: &tile, head, labels: &labels, threshold };
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `has` found AVX-512 in this processor; the tile holds `k` rows of 32 values.
            Isa::Avx512 if running => unsafe { x86::avx512::<true>(&job, &mut found) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { x86::avx512::<false>(&job, &mut found) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `has` found AVX2 and FMA in this processor; the tile holds `k` rows of 16 values.
            Isa::Avx2 if running => unsafe { x86::avx2::<true>(&job, &mut found) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::avx2::<false>(&job, &mut found) },
            _ => scalar(&job, running, &mut found),
        }
        out.iter_mut().zip(&found).for_each(|(o, &f)| *o = f as u16);
    }
}

/// Voxels side by side, and what is asked about them.
struct Tile<'a> {
    /// (channels, voxels).
    values: &'a [f32],
    head: &'a LinearHead,
    /// The label of every class, padded classes too.
    labels: &'a [u32],
    /// A class wins where its score exceeds this ...
    threshold: f32,
}

/// The reference of the kernels below. `running`: the threshold rises to the score that won.
fn scalar(tile: &Tile<'_>, running: bool, found: &mut [u32; TILE]) {
    const WIDTH: usize = TILE / 2;
    let k = tile.head.channels;
    let mut best = [tile.threshold; WIDTH];
    found.fill(0);
    for (c, &label) in tile.labels.iter().enumerate() {
        let mut score = [tile.head.bias[c]; WIDTH];
        for (w, values) in tile.head.weight[c * k..][..k].iter().zip(tile.values.chunks_exact(WIDTH)) {
            for l in 0..WIDTH {
                score[l] += w * values[l];
            }
        }
        for l in 0..WIDTH {
            if score[l] > best[l] {
                found[l] = label;
                best[l] = if running { score[l] } else { best[l] };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{GROUP, TILE, Tile};

    /// A kernel on tiles of two vectors. `$take` turns (scores, best, labels found, this label) into the new best and
    /// labels.
    macro_rules! kernel {
        ($name:ident, $features:literal, $lanes:literal, $set:ident, $load:ident, $fma:ident, $seti:ident,
         $store:ident, $take:ident) => {
            /// See [`super::scalar`].
            ///
            /// # Safety
            /// The processor has the instructions; `tile.values` holds two vectors per channel of the head.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name<const RUNNING: bool>(tile: &Tile<'_>, found: &mut [u32; TILE]) {
                const WIDTH: usize = 2 * $lanes;
                let k = tile.head.channels;
                assert!(tile.values.len() == k * WIDTH && tile.labels.len() == tile.head.bias.len());
                let values = tile.values.as_ptr();
                let (mut best, mut label) = ([$set(tile.threshold); 2], [$seti(0); 2]);
                let groups = tile.head.weight.chunks_exact(GROUP * k).zip(tile.head.bias.chunks_exact(GROUP));
                for ((weight, bias), labels) in groups.zip(tile.labels.chunks_exact(GROUP)) {
                    let mut score = [[$set(bias[0]); 2], [$set(bias[1]); 2], [$set(bias[2]); 2], [$set(bias[3]); 2]];
                    let (first, rest) = weight.split_at(k);
                    let (second, rest) = rest.split_at(k);
                    let (third, fourth) = rest.split_at(k);
                    for (i, (((a, b), c), d)) in first.iter().zip(second).zip(third).zip(fourth).enumerate() {
                        // SAFETY: i < k, and the tile holds k rows of WIDTH values (asserted above).
                        let v = unsafe { [$load(values.add(i * WIDTH)), $load(values.add(i * WIDTH + $lanes))] };
                        for (s, w) in score.iter_mut().zip([a, b, c, d]) {
                            let w = $set(*w);
                            s[0] = $fma(w, v[0], s[0]);
                            s[1] = $fma(w, v[1], s[1]);
                        }
                    }
                    for (s, &l) in score.iter().zip(labels) {
                        for h in 0..2 {
                            let taken = $take(s[h], best[h], label[h], $seti(l as i32));
                            label[h] = taken.1;
                            if RUNNING {
                                best[h] = taken.0;
                            }
                        }
                    }
                }
                for h in 0..2 {
                    // SAFETY: WIDTH <= TILE, the length of `found`.
                    unsafe { $store(found.as_mut_ptr().add(h * $lanes).cast(), label[h]) };
                }
            }
        };
    }

    /// Index of the first largest of `a + w (b - a)`. Even and odd vectors are compared apart, so that one need not wait
    /// for the other. The last vector overlaps the one before: a value seen twice has the same index twice.
    ///
    /// # Safety
    /// The processor has AVX-512 F; `a` and `b` are equally long, at least 16.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn largest_512(a: &[f32], b: &[f32], w: f32) -> u16 {
        let n = a.len();
        assert!(n >= 16 && b.len() == n);
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let w = _mm512_set1_ps(w);
        let (mut best, mut found) = ([_mm512_set1_ps(f32::NEG_INFINITY); 2], [_mm512_setzero_si512(); 2]);
        for pair in (0..n).step_by(32) {
            for h in 0..2 {
                let at = (pair + 16 * h).min(n - 16);
                // SAFETY: at + 16 <= n, the length of both.
                let (a, b) = unsafe { (_mm512_loadu_ps(a.as_ptr().add(at)), _mm512_loadu_ps(b.as_ptr().add(at))) };
                let score = _mm512_fmadd_ps(w, _mm512_sub_ps(b, a), a);
                let index = _mm512_add_epi32(lanes, _mm512_set1_epi32(at as i32));
                (best[h], found[h]) = take_512(score, best[h], found[h], index);
            }
        }
        let equal = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(best[1], best[0]);
        let first = _mm512_mask_min_epu32(found[0], equal, found[0], found[1]);
        let (best, found) = take_512(best[1], best[0], first, found[1]);
        let top = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(best, _mm512_set1_ps(_mm512_reduce_max_ps(best)));
        _mm512_mask_reduce_min_epu32(top, found) as u16
    }

    /// As [`largest_512`].
    ///
    /// # Safety
    /// The processor has AVX2 and FMA; `a` and `b` are equally long, at least 8.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn largest_256(a: &[f32], b: &[f32], w: f32) -> u16 {
        let n = a.len();
        assert!(n >= 8 && b.len() == n);
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let w = _mm256_set1_ps(w);
        let (mut best, mut found) = (_mm256_set1_ps(f32::NEG_INFINITY), _mm256_setzero_si256());
        for c in 0..n.div_ceil(8) {
            let at = (8 * c).min(n - 8);
            // SAFETY: at + 8 <= n, the length of both.
            let (a, b) = unsafe { (_mm256_loadu_ps(a.as_ptr().add(at)), _mm256_loadu_ps(b.as_ptr().add(at))) };
            let score = _mm256_fmadd_ps(w, _mm256_sub_ps(b, a), a);
            let index = _mm256_add_epi32(lanes, _mm256_set1_epi32(at as i32));
            (best, found) = take_256(score, best, found, index);
        }
        // Every lane learns the largest of all, then the smallest index among those that hold it.
        let mut top = _mm256_max_ps(best, _mm256_permute2f128_ps::<1>(best, best));
        top = _mm256_max_ps(top, _mm256_permute_ps::<0b01_00_11_10>(top));
        top = _mm256_max_ps(top, _mm256_permute_ps::<0b10_11_00_01>(top));
        let lost = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NEQ_UQ>(best, top));
        let found = _mm256_or_si256(found, lost);
        let mut first = _mm256_min_epu32(found, _mm256_permute2x128_si256::<1>(found, found));
        first = _mm256_min_epu32(first, _mm256_shuffle_epi32::<0b01_00_11_10>(first));
        first = _mm256_min_epu32(first, _mm256_shuffle_epi32::<0b10_11_00_01>(first));
        _mm256_cvtsi256_si32(first) as u16
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn take_512(score: __m512, best: __m512, labels: __m512i, label: __m512i) -> (__m512, __m512i) {
        let more = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(score, best);
        (_mm512_mask_mov_ps(best, more, score), _mm512_mask_mov_epi32(labels, more, label))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn take_256(score: __m256, best: __m256, labels: __m256i, label: __m256i) -> (__m256, __m256i) {
        let more = _mm256_cmp_ps::<_CMP_GT_OQ>(score, best);
        let labels = _mm256_blendv_epi8(labels, label, _mm256_castps_si256(more));
        (_mm256_blendv_ps(best, score, more), labels)
    }

    kernel!(
        avx512,
        "avx512f",
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_fmadd_ps,
        _mm512_set1_epi32,
        _mm512_storeu_si512,
        take_512
    );
    kernel!(
        avx2,
        "avx2,fma",
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_fmadd_ps,
        _mm256_set1_epi32,
        _mm256_storeu_si256,
        take_256
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    fn random(rng: &mut Rng, n: usize) -> Vec<f32> {
        (0..n).map(|_| rng.normal() as f32).collect()
    }

    /// Every instruction set gives the label of one of the (nearly) best classes, and exactly the best where it stands
    /// out.
    #[test]
    fn head_row_of_every_isa_finds_the_winner() {
        let mut rng = Rng::new(3, 1);
        for (k, classes, voxels) in [(1, 1, 3), (5, 2, 17), (16, 105, 70), (32, 9, 33), (96, 14, 64)] {
            let head = LinearHead::new(&random(&mut rng, k * classes), &random(&mut rng, classes)).unwrap();
            let row = random(&mut rng, 20 * k);
            let taps: Vec<Tap> = (0..voxels).map(|v| (v % 19, v % 19 + 1, 0.01 * v as f32)).collect();
            let paint: Vec<u16> = (0..classes as u16).map(|c| 3 * c + 1).collect();
            for winner in [Winner::Largest, Winner::Painted { threshold: 0.1, paint: &paint }] {
                for &isa in Isa::available() {
                    let mut found = vec![0; voxels];
                    head_row(isa, &row, &taps, &head, winner, &mut found);
                    let (mut values, mut scores) = (vec![0.0; k], vec![0.0; classes]);
                    for (&f, &tap) in found.iter().zip(&taps) {
                        sample(&row, k, tap, &mut values);
                        head.apply(&values, &mut scores);
                        let mut sorted = scores.clone();
                        sorted.sort_by(f32::total_cmp);
                        let near = match winner {
                            Winner::Largest => classes > 1 && sorted[classes - 1] - sorted[classes - 2] < 1e-4,
                            Winner::Painted { threshold, .. } => scores.iter().any(|s| (s - threshold).abs() < 1e-4),
                        };
                        assert!(near || f == winner.of(&scores), "{isa:?} {k} {classes}");
                    }
                }
            }
        }
    }

    #[test]
    fn label_row_takes_the_first_largest() {
        let mut rng = Rng::new(4, 1);
        for channels in [1, 2, 15, 16, 17, 31, 105] {
            // Few distinct values: ties abound.
            let row: Vec<f32> = (0..8 * channels).map(|_| rng.uniform(0.0, 4.0).floor() as f32).collect();
            let taps: Vec<Tap> = (0..15).map(|v| (v / 2, (v / 2 + 1).min(7), 0.5 * (v % 2) as f32)).collect();
            for &isa in Isa::available() {
                let mut found = vec![0; taps.len()];
                label_row(isa, &row, channels, &taps, Winner::Largest, &mut found);
                let mut values = vec![0.0; channels];
                for (&f, &tap) in found.iter().zip(&taps) {
                    sample(&row, channels, tap, &mut values);
                    assert_eq!(f, Winner::Largest.of(&values), "{isa:?} {channels}");
                }
            }
        }
    }
}
