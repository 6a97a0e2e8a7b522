//! The products: for each point of the transformed plane, tiles x inputs times inputs x outputs.

use crate::backend::cpu::isa::simd_entry;
use crate::backend::cpu::lanes::Lanes;

/// Input channels that lie side by side: first in a tile's row, and how many. The filter's rows follow without gaps.
pub(super) type Run = (usize, usize);

/// All points of one transformed plane, for one group of output channels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gemm<'a> {
    /// Number of matrices.
    pub(super) points: usize,
    /// Inputs `[points][tiles]`, floats between tiles and between points.
    pub(super) inputs: *const f32,
    pub(super) tile: usize,
    pub(super) inputs_point: usize,
    pub(super) runs: &'a [Run],
    /// Filter `[points][inputs][width]`, floats between points; `width` is 16 or 32.
    pub(super) filter: *const f32,
    pub(super) filter_point: usize,
    pub(super) width: usize,
    /// Outputs `[points][tiles][width]`, floats between points.
    pub(super) outputs: *mut f32,
    pub(super) outputs_point: usize,
    /// Tiles: for each piece its first tile and how many, as [`cover`] cuts them.
    pub(super) pieces: &'a [(usize, usize)],
    /// Add to the outputs that are there.
    pub(super) add: bool,
}

/// Cuts `tiles` into pieces of at most `most` that kernels exist for, as wide and as even as possible.
pub(super) fn cover(tiles: usize, most: usize) -> Vec<(usize, usize)> {
    let pieces = tiles.div_ceil(most).max(1);
    let mut out = Vec::new();
    let mut first = 0;
    for i in 0..pieces {
        let mut left = tiles * (i + 1) / pieces - first;
        while left > 0 {
            let n = WIDTHS.iter().copied().find(|w| *w <= left.min(most)).unwrap_or(1);
            out.push((first, n));
            first += n;
            left -= n;
        }
    }
    out
}

/// Tiles that a kernel exists for.
const WIDTHS: [usize; 10] = [16, 12, 10, 8, 6, 5, 4, 3, 2, 1];

/// The widest kernel to use for groups of `width` outputs with registers of `n` floats of which `keep` may be kept.
pub(super) fn widest(n: usize, keep: usize, width: usize) -> usize {
    if width == n { WIDTHS[0] } else { keep / 2 }
}

/// The kernel for `$n` tiles, of those of the widths listed and of 1.
macro_rules! pieces {
    ($n:expr, $f:ident :: <$s:ty, $r:literal> $arguments:tt, [$($w:literal),*]) => {
        match $n {
            $($w => $f::<$s, $w, $r> $arguments,)*
            _ => $f::<$s, 1, $r> $arguments,
        }
    };
}

simd_entry!(unsafe gemm = gemm_of(g: &Gemm<'_>));

/// # Safety
/// The matrices are where the fields say, and the outputs are ours to write.
#[inline(always)]
unsafe fn gemm_of<S: Lanes>(s: S, g: &Gemm<'_>) {
    for point in 0..g.points {
        let inputs = g.inputs.wrapping_add(point * g.inputs_point);
        let filter = g.filter.wrapping_add(point * g.filter_point);
        let outputs = g.outputs.wrapping_add(point * g.outputs_point);
        let mut panel = 0;
        while panel < g.width {
            let (filter, outputs) = (filter.wrapping_add(panel), outputs.wrapping_add(panel));
            // The next matrix of weights comes from a more distant cache, and no prefetcher follows across a page.
            let mut ahead = panel == 0 && point + 1 < g.points;
            let two = panel + 2 * S::N <= g.width;
            for &(first, n) in g.pieces {
                let (i, o) = (inputs.wrapping_add(first * g.tile), outputs.wrapping_add(first * g.width));
                // SAFETY: by contract.
                unsafe {
                    match two {
                        true => pieces!(n, piece::<S, 2>(s, g, i, filter, o, ahead), [12, 10, 8, 6, 5, 4, 3, 2]),
                        false => pieces!(n, piece::<S, 1>(s, g, i, filter, o, ahead), [16, 12, 10, 8, 6, 5, 4, 3, 2]),
                    }
                }
                ahead = false;
            }
            panel += if two { 2 * S::N } else { S::N };
        }
    }
}

/// `T` tiles times `R` registers of outputs. `ahead`: ask for the next point's weights.
///
/// # Safety
/// As [`gemm_of`].
#[inline(always)]
unsafe fn piece<S: Lanes, const T: usize, const R: usize>(
    s: S,
    g: &Gemm<'_>,
    inputs: *const f32,
    filter: *const f32,
    outputs: *mut f32,
    ahead: bool,
) {
    let mut sums = [[s.splat(0.0); R]; T];
    if g.add {
        for t in 0..T {
            for r in 0..R {
                // SAFETY: by contract.
                sums[t][r] = unsafe { s.load(outputs.wrapping_add(t * g.width + r * S::N)) };
            }
        }
    }
    let mut weights = filter;
    let distance = if ahead { g.filter_point } else { 0 };
    for &(first, n) in g.runs {
        let inputs = inputs.wrapping_add(first);
        for k in 0..n {
            if ahead {
                s.prefetch(weights.wrapping_add(distance));
                if g.width > 16 {
                    s.prefetch(weights.wrapping_add(distance + 16));
                }
            }
            let mut w = [s.splat(0.0); R];
            for r in 0..R {
                // SAFETY: by contract.
                w[r] = unsafe { s.load(weights.wrapping_add(r * S::N)) };
            }
            for t in 0..T {
                // SAFETY: by contract.
                let x = s.splat(unsafe { *inputs.wrapping_add(t * g.tile + k) });
                for r in 0..R {
                    sums[t][r] = s.fma(x, w[r], sums[t][r]);
                }
            }
            weights = weights.wrapping_add(g.width);
        }
    }
    for t in 0..T {
        for r in 0..R {
            // SAFETY: by contract.
            unsafe { s.store(sums[t][r], outputs.wrapping_add(t * g.width + r * S::N)) }
        }
    }
}
