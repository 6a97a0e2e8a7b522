//! The last 1x1x1 convolution fused with the decision: blocked features in, labels out, no score in memory.
//!
//! A tile of voxels is turned to rows of channels, so that lanes are voxels. Scores are summed in registers for six
//! classes at a time and meet the largest so far there. Which voxels share a tile depends on the sizes alone.

use super::Line;
#[cfg(target_arch = "x86_64")]
use super::isa::{Avx2, Avx512};
use super::isa::{Scalar, simd_entry};
use super::lanes::Lanes;
use crate::backend::{Impl, levels, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa, Stored};

/// Classes that are summed together.
const GROUP: usize = 6;

/// Voxels of a piece of parallel work, whole tiles of every instruction set.
const PIECE: usize = 4096;

/// Voxels of the largest tile.
const TILE: usize = 64;

/// Features and a head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a> {
    /// `[sample][block][voxel][BLOCK]`.
    pub(crate) x: Stored<'a>,
    pub(crate) channels: usize,
    /// Voxels of one sample.
    pub(crate) voxels: usize,
    /// `[class][channel]`.
    pub(crate) weight: &'a [f32],
    /// `[class]`.
    pub(crate) bias: &'a [f32],
}

type Run = fn(Isa, &Problem<'_>, &mut [u16]);

pub(crate) static HEAD_LABELS: [Impl<(), Run>; 3] = levels(run);

/// Writes the first class of the largest score of every voxel, `[sample][voxel]`; returns who did.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem<'_>, out: &mut [u16]) -> Result<&'static str> {
    let i = pick(&HEAD_LABELS, isa, &(), name).ok_or_else(|| no_implementation("head_labels", name))?;
    (i.run)(i.isa, p, out);
    Ok(i.name)
}

fn run(isa: Isa, p: &Problem<'_>, out: &mut [u16]) {
    let head = Packed::new(p);
    let blocks = p.channels.div_ceil(BLOCK);
    let sample = blocks * BLOCK * p.voxels;
    for (n, out) in out.chunks_exact_mut(p.voxels).enumerate() {
        par::chunks_mut(out, PIECE, |i, out| match p.x {
            Stored::F32(x) => piece::on(isa, &head, &x[n * sample..][..sample], p.voxels, i * PIECE, out),
            Stored::Bf16(_) => {
                let len = out.len() * BLOCK;
                let mut x = vec![0.0; blocks * len];
                for (b, x) in x.chunks_exact_mut(len).enumerate() {
                    p.x.widen(isa, n * sample + (b * p.voxels + i * PIECE) * BLOCK, x);
                }
                piece::on(isa, &head, &x, out.len(), 0, out);
            }
        });
    }
}

/// The head as the kernel reads it, classes filled up to whole groups with some that never win.
struct Packed {
    channels: usize,
    /// `[group][channel]`.
    weight: Vec<[f32; GROUP]>,
    /// `[group]`.
    bias: Vec<[f32; GROUP]>,
}

impl Packed {
    fn new(p: &Problem<'_>) -> Self {
        let groups = p.bias.len().div_ceil(GROUP);
        let mut weight = vec![[0.0; GROUP]; groups * p.channels];
        let mut bias = vec![[f32::NEG_INFINITY; GROUP]; groups];
        for (class, (row, &b)) in p.weight.chunks_exact(p.channels).zip(p.bias).enumerate() {
            let (group, place) = (class / GROUP, class % GROUP);
            bias[group][place] = b;
            let to = &mut weight[group * p.channels..][..p.channels];
            to.iter_mut().zip(row).for_each(|(to, &w)| to[place] = w);
        }
        Self { channels: p.channels, weight, bias }
    }
}

/// What the search for the largest needs of a register beside arithmetic.
trait Search: Lanes {
    /// A label per lane.
    type L: Copy;

    /// The same label in every lane.
    fn label(self, label: u32) -> Self::L;
    /// `score` and `label` where `score > best`, else `best` and `found`.
    fn take(self, score: Self::R, best: Self::R, label: Self::L, found: Self::L) -> (Self::R, Self::L);
    /// # Safety
    /// `N` labels are writable at `to`.
    unsafe fn put(self, labels: Self::L, to: *mut u32);
    /// Value j of line i becomes value i of line j, of `N` lines with `N` values each; lines lie [`BLOCK`] floats apart
    /// at `from`, `width` at `to`.
    ///
    /// # Safety
    /// Those values are readable at `from` and writable at `to`.
    unsafe fn turn(self, from: *const f32, to: *mut f32, width: usize);
}

simd_entry!(piece = label_piece(head: &Packed, x: &[f32], voxels: usize, first: usize, out: &mut [u16]));

/// Labels of the voxels from `first` on, of a sample with `voxels`. 24 sums with 32 registers, 12 with 16.
#[inline(always)]
fn label_piece<S: Search>(s: S, head: &Packed, x: &[f32], voxels: usize, first: usize, out: &mut [u16]) {
    if S::N == BLOCK {
        label_tiles::<S, 4>(s, head, x, voxels, first, out);
    } else {
        label_tiles::<S, 2>(s, head, x, voxels, first, out);
    }
}

#[inline(always)]
fn label_tiles<S: Search, const T: usize>(
    s: S,
    head: &Packed,
    x: &[f32],
    voxels: usize,
    first: usize,
    out: &mut [u16],
) {
    let (width, blocks) = (T * S::N, head.channels.div_ceil(BLOCK));
    assert!(width <= TILE && x.len() == blocks * voxels * BLOCK && first + out.len() <= voxels);
    assert!(head.weight.len() == head.bias.len() * head.channels);
    let mut tile = vec![Line([0.0; 16]); blocks * width];
    let values = tile.as_mut_ptr().cast::<f32>();
    let mut found = [0u32; TILE];
    // The next tile's lines are asked for while this one is summed, some with every group.
    let share = (blocks * width).div_ceil(head.bias.len().max(1));
    for (i, out) in out.chunks_mut(width).enumerate() {
        let at = first + i * width;
        for b in 0..blocks {
            let from = &x[(b * voxels + at) * BLOCK..][..out.len() * BLOCK];
            // SAFETY: the tile has `width` floats for each of `blocks * BLOCK` channels.
            let to = unsafe { values.add(b * BLOCK * width) };
            // SAFETY: `from` has the lines of `out.len() <= width` voxels, `to` the rows of a block of channels.
            unsafe { turn_block::<S, T>(s, from, to) };
        }
        let (mut best, mut labels) = ([s.splat(f32::NEG_INFINITY); T], [s.label(0); T]);
        for (group, bias) in head.bias.iter().enumerate() {
            let mut sums = [[s.splat(0.0); T]; GROUP];
            for j in 0..GROUP {
                sums[j] = [s.splat(bias[j]); T];
            }
            for (k, w) in head.weight[group * head.channels..][..head.channels].iter().enumerate() {
                let mut v = [s.splat(0.0); T];
                for h in 0..T {
                    // SAFETY: k is a channel of the tile, whose row has T registers.
                    v[h] = unsafe { s.load(values.add(k * width + h * S::N)) };
                }
                for j in 0..GROUP {
                    let w = s.splat(w[j]);
                    for h in 0..T {
                        sums[j][h] = s.fma(w, v[h], sums[j][h]);
                    }
                }
            }
            for j in 0..GROUP {
                let label = s.label((group * GROUP + j) as u32);
                for h in 0..T {
                    (best[h], labels[h]) = s.take(sums[j][h], best[h], label, labels[h]);
                }
            }
            for line in group * share..((group + 1) * share).min(blocks * width) {
                let next = (line / width * voxels + at + width + line % width) * BLOCK;
                s.prefetch(x.as_ptr().wrapping_add(next));
            }
        }
        for h in 0..T {
            // SAFETY: T registers are `width <= TILE` labels.
            unsafe { s.put(labels[h], found.as_mut_ptr().add(h * S::N)) };
        }
        out.iter_mut().zip(&found).for_each(|(o, &f)| *o = f as u16);
    }
}

/// Turns the voxels of `from`, a block of channels each, to rows of voxels.
///
/// # Safety
/// `from` has at most `T * N` voxels, `to` is writable for [`BLOCK`] rows of so many.
#[inline(always)]
unsafe fn turn_block<S: Search, const T: usize>(s: S, from: &[f32], to: *mut f32) {
    let width = T * S::N;
    if from.len() < width * BLOCK {
        for (v, values) in from.chunks_exact(BLOCK).enumerate() {
            for (c, &value) in values.iter().enumerate() {
                // SAFETY: row c of [`BLOCK`], voxel v of at most `width`.
                unsafe { *to.add(c * width + v) = value };
            }
        }
        return;
    }
    for h in 0..T {
        for q in (0..BLOCK).step_by(S::N) {
            // SAFETY: `from` has whole lines for `width` voxels, of which N from h * N on are read; rows q to q + N are
            // written there.
            unsafe { s.turn(from.as_ptr().add(h * S::N * BLOCK + q), to.add(q * width + h * S::N), width) };
        }
    }
}

impl Search for Scalar {
    type L = [u32; 4];

    #[inline(always)]
    fn label(self, label: u32) -> Self::L {
        [label; 4]
    }
    #[inline(always)]
    fn take(self, score: Self::R, mut best: Self::R, label: Self::L, mut found: Self::L) -> (Self::R, Self::L) {
        for i in 0..4 {
            let more = score[i] > best[i];
            best[i] = if more { score[i] } else { best[i] };
            found[i] = if more { label[i] } else { found[i] };
        }
        (best, found)
    }
    #[inline(always)]
    unsafe fn put(self, labels: Self::L, to: *mut u32) {
        // SAFETY: by contract; an unaligned write needs no alignment.
        unsafe { to.cast::<[u32; 4]>().write_unaligned(labels) }
    }
    #[inline(always)]
    unsafe fn turn(self, from: *const f32, to: *mut f32, width: usize) {
        for v in 0..4 {
            for c in 0..4 {
                // SAFETY: by contract.
                unsafe { *to.add(c * width + v) = *from.add(v * BLOCK + c) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Avx2, Avx512, BLOCK, Search};

    impl Search for Avx512 {
        type L = __m512i;

        #[inline(always)]
        fn label(self, label: u32) -> Self::L {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_set1_epi32(label as i32) }
        }
        #[inline(always)]
        fn take(self, score: Self::R, best: Self::R, label: Self::L, found: Self::L) -> (Self::R, Self::L) {
            // SAFETY: `self` proves AVX-512.
            unsafe {
                let more = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(score, best);
                // Exactly `score > best ? score : best`, with zeros and NaN too.
                (_mm512_max_ps(score, best), _mm512_mask_mov_epi32(found, more, label))
            }
        }
        #[inline(always)]
        unsafe fn put(self, labels: Self::L, to: *mut u32) {
            // SAFETY: `self` proves AVX-512; the memory is the caller's promise.
            unsafe { _mm512_storeu_si512(to.cast(), labels) }
        }
        #[inline(always)]
        unsafe fn turn(self, from: *const f32, to: *mut f32, width: usize) {
            // SAFETY: `self` proves AVX-512; the memory is the caller's promise.
            unsafe {
                let zero = _mm512_setzero_ps();
                let (mut r, mut t) = ([zero; 16], [zero; 16]);
                for i in 0..16 {
                    r[i] = _mm512_loadu_ps(from.add(i * BLOCK));
                }
                // Within quarters of registers: blocks of four by four.
                for i in (0..16).step_by(4) {
                    let a = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
                    let b = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
                    let c = _mm512_castps_pd(_mm512_unpacklo_ps(r[i + 2], r[i + 3]));
                    let d = _mm512_castps_pd(_mm512_unpackhi_ps(r[i + 2], r[i + 3]));
                    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
                }
                // Then the quarters: those of even columns, those of odd ones.
                for i in [0, 8] {
                    for j in 0..4 {
                        r[i + j] = _mm512_shuffle_f32x4::<0x88>(t[i + j], t[i + 4 + j]);
                        r[i + 4 + j] = _mm512_shuffle_f32x4::<0xdd>(t[i + j], t[i + 4 + j]);
                    }
                }
                for j in 0..8 {
                    _mm512_storeu_ps(to.add(j * width), _mm512_shuffle_f32x4::<0x88>(r[j], r[8 + j]));
                    _mm512_storeu_ps(to.add((8 + j) * width), _mm512_shuffle_f32x4::<0xdd>(r[j], r[8 + j]));
                }
            }
        }
    }

    impl Search for Avx2 {
        type L = __m256i;

        #[inline(always)]
        fn label(self, label: u32) -> Self::L {
            // SAFETY: `self` proves AVX2.
            unsafe { _mm256_set1_epi32(label as i32) }
        }
        #[inline(always)]
        fn take(self, score: Self::R, best: Self::R, label: Self::L, found: Self::L) -> (Self::R, Self::L) {
            // SAFETY: `self` proves AVX2.
            unsafe {
                let more = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(score, best));
                // See AVX-512.
                (_mm256_max_ps(score, best), _mm256_blendv_epi8(found, label, more))
            }
        }
        #[inline(always)]
        unsafe fn put(self, labels: Self::L, to: *mut u32) {
            // SAFETY: `self` proves AVX2; the memory is the caller's promise.
            unsafe { _mm256_storeu_si256(to.cast(), labels) }
        }
        #[inline(always)]
        unsafe fn turn(self, from: *const f32, to: *mut f32, width: usize) {
            // SAFETY: `self` proves AVX2; the memory is the caller's promise.
            unsafe {
                let zero = _mm256_setzero_ps();
                let (mut r, mut t) = ([zero; 8], [zero; 8]);
                for i in 0..8 {
                    r[i] = _mm256_loadu_ps(from.add(i * BLOCK));
                }
                for i in [0, 4] {
                    let a = _mm256_castps_pd(_mm256_unpacklo_ps(r[i], r[i + 1]));
                    let b = _mm256_castps_pd(_mm256_unpackhi_ps(r[i], r[i + 1]));
                    let c = _mm256_castps_pd(_mm256_unpacklo_ps(r[i + 2], r[i + 3]));
                    let d = _mm256_castps_pd(_mm256_unpackhi_ps(r[i + 2], r[i + 3]));
                    t[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
                    t[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
                    t[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
                    t[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
                }
                for j in 0..4 {
                    _mm256_storeu_ps(to.add(j * width), _mm256_permute2f128_ps::<0x20>(t[j], t[4 + j]));
                    _mm256_storeu_ps(to.add((4 + j) * width), _mm256_permute2f128_ps::<0x31>(t[j], t[4 + j]));
                }
            }
        }
    }
}
