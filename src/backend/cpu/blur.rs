//! Filters with one short symmetric kernel per axis, mirrored about the end voxels.

use super::isa::{Simd, simd_entry};
use crate::tensor::{BLOCK, Isa};

/// Longest kernel.
pub(crate) const TAPS: usize = 7;

/// An odd number of weights, of which the one in the middle belongs to the voxel itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Kernel {
    pub(crate) weights: [f32; TAPS],
    /// How many of them: 1, 3, 5 or 7.
    pub(crate) len: usize,
}

/// `to` is `from`, `shape` voxels along (z, y, x), filtered along z, then y, then x. `plane` is memory to work with.
pub(crate) fn blur(
    isa: Isa,
    shape: [usize; 3],
    kernels: &[Kernel; 3],
    from: &[f32],
    plane: &mut Vec<f32>,
    to: &mut [f32],
) {
    // A row with both its mirrored ends behind the plane, so that rows need no special ends.
    plane.resize(2 * shape[1] * shape[2] + shape[2] + 2 * TAPS, 0.0);
    filtered::on(isa, shape, kernels, from, plane, to);
}

simd_entry!(filtered = filter(shape: [usize; 3], kernels: &[Kernel; 3], from: &[f32], plane: &mut [f32], to: &mut [f32]));

/// The voxel that stands for voxel `i` of `n`: `-1` is voxel 1.
#[inline(always)]
fn mirrored(i: isize, n: usize) -> usize {
    let last = n as isize - 1;
    let mut i = i;
    while last > 0 && (i < 0 || i > last) {
        i = if i < 0 { -i } else { 2 * last - i };
    }
    i.clamp(0, last.max(0)) as usize
}

#[inline(always)]
fn filter<S: Simd>(
    s: S,
    [d, h, w]: [usize; 3],
    kernels: &[Kernel; 3],
    from: &[f32],
    plane: &mut [f32],
    to: &mut [f32],
) {
    let size = h * w;
    let (first, rest) = plane.split_at_mut(size);
    let (second, row) = rest.split_at_mut(size);
    for z in 0..d {
        let sources = |i: usize, n: usize, half: usize, k: usize| mirrored(i as isize + k as isize - half as isize, n);
        let mut rows = [&from[..0]; TAPS];
        let half = kernels[0].len / 2;
        for k in 0..kernels[0].len {
            rows[k] = &from[sources(z, d, half, k) * size..][..size];
        }
        combine(s, &kernels[0], &rows, first);
        let half = kernels[1].len / 2;
        for y in 0..h {
            let mut rows = [&first[..0]; TAPS];
            for k in 0..kernels[1].len {
                rows[k] = &first[sources(y, h, half, k) * w..][..w];
            }
            combine(s, &kernels[1], &rows, &mut second[y * w..][..w]);
        }
        let half = kernels[2].len / 2;
        for y in 0..h {
            row[half..half + w].copy_from_slice(&second[y * w..][..w]);
            for k in 0..half {
                row[k] = second[y * w + sources(0, w, half, k)];
                row[half + w + k] = second[y * w + sources(w - 1, w, half, half + 1 + k)];
            }
            let mut rows = [&row[..0]; TAPS];
            for k in 0..kernels[2].len {
                rows[k] = &row[k..k + w];
            }
            combine(s, &kernels[2], &rows, &mut to[z * size + y * w..][..w]);
        }
    }
}

/// The weighted sum of `rows`.
#[inline(always)]
fn combine<S: Simd>(s: S, kernel: &Kernel, rows: &[&[f32]; TAPS], to: &mut [f32]) {
    match kernel.len {
        3 => combine_of::<S, 3>(s, kernel, rows, to),
        5 => combine_of::<S, 5>(s, kernel, rows, to),
        7 => combine_of::<S, 7>(s, kernel, rows, to),
        _ => to.copy_from_slice(rows[0]),
    }
}

#[inline(always)]
fn combine_of<S: Simd, const N: usize>(s: S, kernel: &Kernel, rows: &[&[f32]; TAPS], to: &mut [f32]) {
    let blocks: [&[[f32; BLOCK]]; N] = std::array::from_fn(|k| rows[k].as_chunks().0);
    let whole = to.len() / BLOCK * BLOCK;
    for (i, to) in to.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let mut sum = s.mul(s.splat(kernel.weights[0]), s.load(&blocks[0][i]));
        for k in 1..N {
            sum = s.fma(s.splat(kernel.weights[k]), s.load(&blocks[k][i]), sum);
        }
        s.store(sum, to);
    }
    for i in whole..to.len() {
        to[i] = (0..N).fold(0.0, |sum, k| sum + kernel.weights[k] * rows[k][i]);
    }
}
