//! A channel seen through a coarser grid: the nearest voxel at each of its points, then interpolated linearly.

use super::intensity::Map;
use super::isa::{Simd, simd_entry};
use crate::tensor::{BLOCK, Isa};

/// `x`, `shape` voxels along (z, y, x), becomes what a grid of `coarse` voxels over the same space knows of `map(x)`.
/// `memory` is memory to work with.
pub(crate) fn low_resolution(
    isa: Isa,
    shape: [usize; 3],
    coarse: [usize; 3],
    map: Map,
    x: &mut [f32],
    memory: &mut Vec<f32>,
) {
    if shape.contains(&0) || coarse.contains(&0) {
        return;
    }
    let sampled: [Vec<usize>; 3] = std::array::from_fn(|k| nearest(shape[k], coarse[k]));
    let taps: [Vec<Tap>; 3] = std::array::from_fn(|k| between(shape[k], coarse[k]));
    // Rows of the coarse grid, already interpolated along x, and one before that.
    memory.resize(coarse[0] * coarse[1] * shape[2] + coarse[2], 0.0);
    resampled::on(isa, shape, coarse, map, &sampled, &taps, x, memory);
}

simd_entry!(resampled = resample(
    shape: [usize; 3], coarse: [usize; 3], map: Map, sampled: &[Vec<usize>; 3], taps: &[Vec<Tap>; 3], x: &mut [f32],
    memory: &mut [f32]
));

/// `(i, j, w)`: the sample `(1 - w) in[i] + w in[j]`.
type Tap = (usize, usize, f32);

/// PyTorch's "nearest-exact", in single precision as there: the voxel of `n` in which the middle of each of `m` lies.
fn nearest(n: usize, m: usize) -> Vec<usize> {
    let scale = n as f32 / m as f32;
    (0..m).map(|i| (((i as f32 + 0.5) * scale) as usize).min(n - 1)).collect()
}

/// PyTorch's "linear" without aligned corners: the middles of `n` voxels among those of `m`.
fn between(n: usize, m: usize) -> Vec<Tap> {
    let scale = m as f32 / n as f32;
    let tap = |i: usize| {
        let at = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
        let before = (at as usize).min(m - 1);
        (before, (before + 1).min(m - 1), at - before as f32)
    };
    (0..n).map(tap).collect()
}

#[inline(always)]
fn resample<S: Simd>(
    s: S,
    [d, h, w]: [usize; 3],
    [cd, ch, cw]: [usize; 3],
    map: Map,
    sampled: &[Vec<usize>; 3],
    taps: &[Vec<Tap>; 3],
    x: &mut [f32],
    memory: &mut [f32],
) {
    let (rows, coarse) = memory.split_at_mut(cd * ch * w);
    for z in 0..cd {
        for y in 0..ch {
            let from = &x[(sampled[0][z] * h + sampled[1][y]) * w..][..w];
            for (to, &i) in coarse[..cw].iter_mut().zip(&sampled[2]) {
                *to = map.of(from[i]);
            }
            for (to, &(i, j, share)) in rows[(z * ch + y) * w..][..w].iter_mut().zip(&taps[2]) {
                *to = coarse[i] + share * (coarse[j] - coarse[i]);
            }
        }
    }
    for z in 0..d {
        let (z0, z1, fz) = taps[0][z];
        for y in 0..h {
            let (y0, y1, fy) = taps[1][y];
            let row = |z: usize, y: usize| &rows[(z * ch + y) * w..][..w];
            let from = [row(z0, y0), row(z0, y1), row(z1, y0), row(z1, y1)];
            blend(s, from, fy, fz, &mut x[(z * h + y) * w..][..w]);
        }
    }
}

/// Four rows interpolated along y and z.
#[inline(always)]
fn blend<S: Simd>(s: S, from: [&[f32]; 4], fy: f32, fz: f32, to: &mut [f32]) {
    let whole = to.len() / BLOCK * BLOCK;
    let blocks = from.map(|r| r.as_chunks::<BLOCK>().0);
    let (vy, vz) = (s.splat(fy), s.splat(fz));
    for (i, to) in to.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let [a, b, c, d] = [0, 1, 2, 3].map(|k: usize| s.load(&blocks[k][i]));
        let (near, far) = (s.fma(vy, s.sub(b, a), a), s.fma(vy, s.sub(d, c), c));
        s.store(s.fma(vz, s.sub(far, near), near), to);
    }
    for i in whole..to.len() {
        let [a, b, c, d] = from.map(|r| r[i]);
        let (near, far) = (a + fy * (b - a), c + fy * (d - c));
        to[i] = near + fz * (far - near);
    }
}
