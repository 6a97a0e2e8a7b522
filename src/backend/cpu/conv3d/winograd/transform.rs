//! The four passes around the products: inputs along z, inputs in the plane, products in the plane, products along z.
//!
//! z comes first and last, so that the planes between can be worked on one after the other while they lie in the cache,
//! and so that memory is read and written in whole rows.

use super::axis::{Axis, F2, F4, Forward, Kind, One, S2, S4, Spread, Sums as Summed, by_forward, by_kind, by_spread};
use crate::backend::cpu::isa::simd_entry;
use crate::backend::cpu::lanes::Lanes;
use crate::backend::cpu::moments::Moments;
use crate::tensor::BLOCK;

/// A normalisation that is applied to values as they are read: `leaky_relu((x - mean) * scale + shift)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Affine {
    /// One channel block each.
    pub(super) mean: *const f32,
    pub(super) scale: *const f32,
    pub(super) shift: *const f32,
    /// In [0, 1].
    pub(super) slope: f32,
}

/// Where inputs are.
#[derive(Debug, Clone, Copy)]
pub(super) enum From {
    F32(*const f32),
    /// The upper halves of floats, and room for one row of floats of every slice of a tile.
    Bf16(*const u16, *mut f32),
}

impl From {
    /// The same from value `i` on.
    pub(super) fn at(self, i: usize) -> Self {
        match self {
            From::F32(p) => From::F32(p.wrapping_add(i)),
            From::Bf16(p, room) => From::Bf16(p.wrapping_add(i), room),
        }
    }
}

/// One channel block of one layer of tiles, along z.
#[derive(Debug, Clone, Copy)]
pub(super) struct ForwardZ {
    pub(super) kind: Kind,
    /// What is read are gradients of outputs.
    pub(super) spread: bool,
    /// The block's voxel (0, 0, 0), and values between its rows and slices in memory.
    pub(super) from: From,
    pub(super) row: usize,
    pub(super) slice: usize,
    /// Voxels as the convolution sees them, each repeated from memory `factor` times per axis.
    pub(super) size: [usize; 3],
    pub(super) factor: [usize; 3],
    /// First voxel; may lie in the padding.
    pub(super) first: [isize; 3],
    /// Rows and columns to transform.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// `[P][rows][columns][BLOCK]`, and floats between planes.
    pub(super) to: *mut f32,
    pub(super) plane: usize,
    pub(super) norm: Option<Affine>,
}

simd_entry!(unsafe forward_z = forward_z_of(a: &ForwardZ));

/// # Safety
/// The block at `from` has the voxels that `size` and `factor` say, room with it is ours, `P` planes at `to` are ours to
/// write, and vectors of a normalisation hold a block.
#[inline(always)]
unsafe fn forward_z_of<S: Lanes>(s: S, a: &ForwardZ) {
    // SAFETY: this function's own contract.
    unsafe {
        match a.spread {
            false => by_forward!(a.kind, along_z::<S>(s, a)),
            true => by_spread!(a.kind, along_z::<S>(s, a)),
        }
    }
}

/// # Safety
/// As [`forward_z_of`].
#[inline(always)]
unsafe fn along_z<S: Lanes, X: Forward<L, P>, const L: usize, const P: usize, const M: usize>(s: S, a: &ForwardZ) {
    let inside = |at: isize, size: usize| at >= 0 && (at as usize) < size;
    let mut valid = [false; L];
    let mut slices = [0; L];
    for l in 0..L {
        let z = a.first[0] + l as isize;
        valid[l] = inside(z, a.size[0]);
        if valid[l] {
            slices[l] = z as usize / a.factor[0] * a.slice;
        }
    }
    // Columns before `left` and from `right` on lie in the padding.
    let left = a.columns.min(a.first[2].min(0).unsigned_abs());
    let right = (a.size[2] as isize - a.first[2]).clamp(left as isize, a.columns as isize) as usize;
    for y in 0..a.rows {
        let to = a.to.wrapping_add(y * a.columns * BLOCK);
        let at = a.first[1] + y as isize;
        let (left, right) = if inside(at, a.size[1]) { (left, right) } else { (a.columns, a.columns) };
        for x in (0..left).chain(right..a.columns) {
            for i in (0..P).flat_map(|p| (0..BLOCK / S::N).map(move |part| (p, part))) {
                // SAFETY: column x of row y of plane p is ours to write, by contract.
                unsafe { s.store(s.splat(0.0), to.wrapping_add(i.0 * a.plane + x * BLOCK + i.1 * S::N)) }
            }
        }
        if left >= right {
            continue;
        }
        let offset = at as usize / a.factor[1] * a.row;
        let starts = match a.from {
            From::F32(from) => slices.map(|slice| from.wrapping_add(slice + offset)),
            From::Bf16(from, room) => {
                let [first, last] = [left, right - 1].map(|x| (a.first[2] + x as isize) as usize / a.factor[2]);
                let mut starts = [room.cast_const(); L];
                for l in (0..L).filter(|l| valid[*l]) {
                    let row = room.wrapping_add(l * a.columns * BLOCK);
                    let from = from.wrapping_add(slices[l] + offset + first * BLOCK);
                    // SAFETY: by contract; a row has at most as many voxels in memory as columns.
                    unsafe { widen_row(s, from, row, (last + 1 - first) * BLOCK) }
                    starts[l] = row.cast_const().wrapping_sub(first * BLOCK);
                }
                starts
            }
        };
        let row = Row { starts, valid, first: a.first[2], left, right, factor: a.factor[2], to, plane: a.plane };
        // SAFETY: by contract; the columns given are those inside the volume.
        unsafe {
            match (&a.norm, valid.iter().all(|v| *v), a.factor[2]) {
                (None, true, 1) => row_z::<S, X, L, P, false, true, false>(s, &row, None),
                (None, _, 1) => row_z::<S, X, L, P, false, false, false>(s, &row, None),
                (None, _, _) => row_z::<S, X, L, P, false, false, true>(s, &row, None),
                (norm, true, 1) => row_z::<S, X, L, P, true, true, false>(s, &row, norm.as_ref()),
                (norm, _, _) => row_z::<S, X, L, P, true, false, true>(s, &row, norm.as_ref()),
            }
        }
    }
}

/// # Safety
/// `len` halves are readable, as many floats writable; whole channel blocks.
#[inline(always)]
unsafe fn widen_row<S: Lanes>(s: S, from: *const u16, to: *mut f32, len: usize) {
    for i in (0..len).step_by(S::N) {
        // SAFETY: by contract.
        unsafe { s.store(s.widen(from.wrapping_add(i)), to.wrapping_add(i)) }
    }
}

/// The columns of one row that lie inside the volume.
struct Row<const L: usize> {
    /// Voxel 0 of the row in each input plane.
    starts: [*const f32; L],
    valid: [bool; L],
    /// The voxel of column 0.
    first: isize,
    left: usize,
    right: usize,
    factor: usize,
    to: *mut f32,
    plane: usize,
}

/// # Safety
/// Valid planes are readable at the columns' voxels, `P` planes are writable, `norm` holds whole blocks.
#[inline(always)]
unsafe fn row_z<
    S: Lanes,
    X: Forward<L, P>,
    const L: usize,
    const P: usize,
    const NORM: bool,
    const WHOLE: bool,
    const REPEATED: bool,
>(
    s: S,
    row: &Row<L>,
    norm: Option<&Affine>,
) {
    let zero = s.splat(0.0);
    for part in (0..BLOCK).step_by(S::N) {
        let (mut mean, mut scale, mut shift, mut slope) = (zero, zero, zero, zero);
        if let (true, Some(n)) = (NORM, norm) {
            // SAFETY: by contract.
            unsafe {
                mean = s.load(n.mean.wrapping_add(part));
                scale = s.load(n.scale.wrapping_add(part));
                shift = s.load(n.shift.wrapping_add(part));
            }
            slope = s.splat(n.slope);
        }
        for x in row.left..row.right {
            let voxel = (row.first + x as isize) as usize;
            let voxel = if REPEATED { (voxel as u32 / row.factor as u32) as usize } else { voxel };
            let at = voxel * BLOCK + part;
            let mut d = [zero; L];
            for l in 0..L {
                if WHOLE || row.valid[l] {
                    // SAFETY: by contract.
                    d[l] = unsafe { s.load(row.starts[l].wrapping_add(at)) };
                    if NORM {
                        let v = s.fma(s.sub(d[l], mean), scale, shift);
                        // The leaky ReLU, since the slope is at most one.
                        d[l] = s.max(v, s.mul(v, slope));
                    }
                }
            }
            let t = X::forward(s, &d);
            for p in 0..P {
                // SAFETY: by contract.
                unsafe { s.store(t[p], row.to.wrapping_add(p * row.plane + x * BLOCK + part)) }
            }
        }
    }
}

/// A pass in the plane, for one channel block of one layer of tiles: values of each tile along one axis, then along the
/// other. Steps are floats.
#[derive(Debug, Clone, Copy)]
pub(super) struct InPlane {
    pub(super) kind: Kind,
    /// The values are gradients of outputs; on the way to products only.
    pub(super) spread: bool,
    /// Along y and x.
    pub(super) tiles: [usize; 2],
    pub(super) from: *const f32,
    /// To the next tile along y and x; to the next value along the axis that comes second, and first.
    pub(super) from_tile: [usize; 2],
    pub(super) from_value: [usize; 2],
    pub(super) to: *mut f32,
    /// The same of the results.
    pub(super) to_tile: [usize; 2],
    pub(super) to_value: [usize; 2],
}

simd_entry!(unsafe forward_xy = forward_xy_of(a: &InPlane));
simd_entry!(unsafe inverse_xy = inverse_xy_of(a: &InPlane));

/// Inputs to products, x first.
///
/// # Safety
/// The blocks of `L` by `L` values of all tiles are readable, and those of `P` by `P` products are ours to write.
#[inline(always)]
unsafe fn forward_xy_of<S: Lanes>(s: S, a: &InPlane) {
    // SAFETY: this function's own contract, in each arm.
    unsafe {
        match (a.kind, S::KEEP >= 20) {
            (Kind::F2 | Kind::F2Sums, _) if a.spread => plane_forward::<S, Spread<F2>, 2, 4, 3, 4>(s, a),
            (Kind::F4 | Kind::F4Sums, _) if a.spread => plane_forward::<S, Spread<F4>, 4, 6, 3, 3>(s, a),
            (Kind::S2, _) if a.spread => plane_forward::<S, Spread<S2>, 2, 5, 3, 5>(s, a),
            (Kind::S4, _) if a.spread => plane_forward::<S, Spread<S4>, 4, 9, 3, 3>(s, a),
            (Kind::One, _) => plane_forward::<S, One, 1, 1, 1, 1>(s, a),
            (Kind::F2 | Kind::F2Sums, true) => plane_forward::<S, F2, 4, 4, 2, 4>(s, a),
            (Kind::F2 | Kind::F2Sums, false) => plane_forward::<S, F2, 4, 4, 2, 2>(s, a),
            (Kind::F4 | Kind::F4Sums, _) => plane_forward::<S, F4, 6, 6, 4, 3>(s, a),
            (Kind::S2, true) => plane_forward::<S, S2, 5, 5, 2, 5>(s, a),
            (Kind::S2, false) => plane_forward::<S, S2, 5, 5, 2, 1>(s, a),
            (Kind::S4, true) => plane_forward::<S, S4, 9, 9, 4, 2>(s, a),
            (Kind::S4, false) => plane_forward::<S, S4, 9, 9, 4, 1>(s, a),
        }
    }
}

/// Products to outputs, y first.
///
/// # Safety
/// The blocks of `P` by `P` products of all tiles are readable, and those of `M` by `M` outputs are ours to write.
#[inline(always)]
unsafe fn inverse_xy_of<S: Lanes>(s: S, a: &InPlane) {
    // SAFETY: this function's own contract, in each arm.
    unsafe {
        match (a.kind, S::KEEP >= 20) {
            (Kind::One, _) => plane_inverse::<S, One, 1, 1, 1, 1>(s, a),
            (Kind::F2, _) => plane_inverse::<S, F2, 4, 4, 2, 2>(s, a),
            (Kind::F2Sums, _) => plane_inverse::<S, Summed<F2>, 4, 4, 1, 1>(s, a),
            (Kind::F4Sums, _) => plane_inverse::<S, Summed<F4>, 6, 6, 2, 2>(s, a),
            (Kind::F4, true) => plane_inverse::<S, F4, 6, 6, 4, 4>(s, a),
            (Kind::F4, false) => plane_inverse::<S, F4, 6, 6, 4, 2>(s, a),
            (Kind::S2, _) => plane_inverse::<S, S2, 5, 5, 2, 2>(s, a),
            (Kind::S4, true) => plane_inverse::<S, S4, 9, 9, 4, 2>(s, a),
            (Kind::S4, false) => plane_inverse::<S, S4, 9, 9, 4, 1>(s, a),
        }
    }
}

/// A pass in the plane by [`Axis::forward`] or [`Axis::inverse`], `$n` values to `$m` along each axis. `TOGETHER` lines of
/// results of the first axis are kept at a time, as many as registers hold well, and what they have in common with other
/// lines is done again for those.
macro_rules! plane_pass {
    ($name:ident, $axis:ident<$($of:ident),*>, $transform:ident, $n:ident, $m:ident) => {
        /// # Safety
        /// The tiles' values are readable, and their results are ours to write.
        #[inline(always)]
        unsafe fn $name<
            S: Lanes,
            X: $axis<$($of),*>,
            const L: usize,
            const P: usize,
            const M: usize,
            const TOGETHER: usize,
        >(
            s: S,
            a: &InPlane,
        ) {
            for i in 0..a.tiles[0] * a.tiles[1] {
                let (y, x) = (i / a.tiles[1], i % a.tiles[1]);
                let from = a.from.wrapping_add(y * a.from_tile[0] + x * a.from_tile[1]);
                let to = a.to.wrapping_add(y * a.to_tile[0] + x * a.to_tile[1]);
                for part in (0..BLOCK).step_by(S::N) {
                    for first in (0..$m).step_by(TOGETHER) {
                        let mut kept = [[s.splat(0.0); $n]; TOGETHER];
                        for second in 0..$n {
                            let mut d = [s.splat(0.0); $n];
                            for k in 0..$n {
                                let at = second * a.from_value[0] + k * a.from_value[1] + part;
                                // SAFETY: by contract.
                                d[k] = unsafe { s.load(from.wrapping_add(at)) };
                            }
                            let t = X::$transform(s, &d);
                            for k in 0..TOGETHER {
                                if first + k < $m {
                                    kept[k][second] = t[first + k];
                                }
                            }
                        }
                        for k in 0..TOGETHER {
                            if first + k < $m {
                                let t = X::$transform(s, &kept[k]);
                                for second in 0..$m {
                                    let at = second * a.to_value[0] + (first + k) * a.to_value[1] + part;
                                    // SAFETY: by contract.
                                    unsafe { s.store(t[second], to.wrapping_add(at)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    };
}

plane_pass!(plane_forward, Forward<L, P>, forward, L, P);
plane_pass!(plane_inverse, Axis<L, P, M>, inverse, P, M);

/// The last step, for one layer of tiles and one output block: along z, and to memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct InverseZ {
    pub(super) kind: Kind,
    /// `[P][rows][columns][BLOCK]`, floats between planes, voxels between rows.
    pub(super) from: *const f32,
    pub(super) plane: usize,
    pub(super) columns: usize,
    /// Slices, rows and columns that exist in the output.
    pub(super) size: [usize; 3],
    /// The output's first voxel; floats between its rows and slices.
    pub(super) to: *mut f32,
    pub(super) row: usize,
    pub(super) slice: usize,
    /// One block, or null.
    pub(super) bias: *const f32,
    /// Write past the caches.
    pub(super) stream: bool,
    /// Add to what is there.
    pub(super) add: bool,
}

/// Sums of deviations from `about` and of their squares, for one channel block. Sums of few values that lie near to
/// `about`, so that f32 is enough; they are put together in f64.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::backend::cpu) struct Sums {
    count: u32,
    about: [f32; BLOCK],
    first: [f32; BLOCK],
    second: [f32; BLOCK],
}

impl Sums {
    /// The same as mean and squared deviations from it.
    pub(in crate::backend::cpu) fn moments(&self) -> Moments {
        let mut m = Moments { count: f64::from(self.count), ..Moments::default() };
        if self.count > 0 {
            for c in 0..BLOCK {
                let (first, second) = (f64::from(self.first[c]), f64::from(self.second[c]));
                let off = first / m.count;
                m.mean[c] = f64::from(self.about[c]) + off;
                m.squares[c] = (second - off * first).max(0.0);
            }
        }
        m
    }
}

simd_entry!(unsafe inverse_z = inverse_z_of(a: &InverseZ, sums: &mut Sums));

/// # Safety
/// `P` planes of the rows and columns that exist are readable at `from`; the output's voxels are ours to write, whole
/// registers aligned if `stream`.
#[inline(always)]
unsafe fn inverse_z_of<S: Lanes>(s: S, a: &InverseZ, sums: &mut Sums) {
    // SAFETY: this function's own contract.
    unsafe { by_kind!(a.kind, back_along_z::<S>(s, a, sums)) }
}

/// # Safety
/// As [`inverse_z_of`].
#[inline(always)]
unsafe fn back_along_z<S: Lanes, X: Axis<L, P, M>, const L: usize, const P: usize, const M: usize>(
    s: S,
    a: &InverseZ,
    sums: &mut Sums,
) {
    // SAFETY: this function's own contract, in each arm.
    unsafe {
        // Half a cache line written past the caches would be written to memory by itself.
        match (a.size[0] >= M, a.stream && S::N == BLOCK) {
            (true, true) => rows_back::<S, X, L, P, M, true, true>(s, a, sums),
            (true, false) => rows_back::<S, X, L, P, M, true, false>(s, a, sums),
            (false, _) => rows_back::<S, X, L, P, M, false, false>(s, a, sums),
        }
    }
}

/// # Safety
/// As [`inverse_z_of`].
#[inline(always)]
unsafe fn rows_back<
    S: Lanes,
    X: Axis<L, P, M>,
    const L: usize,
    const P: usize,
    const M: usize,
    const WHOLE: bool,
    const STREAM: bool,
>(
    s: S,
    a: &InverseZ,
    sums: &mut Sums,
) {
    let zero = s.splat(0.0);
    let fresh = sums.count == 0;
    for part in (0..BLOCK).step_by(S::N) {
        // SAFETY: a bias that is there holds a block, by contract.
        let bias = if a.bias.is_null() { zero } else { unsafe { s.load(a.bias.wrapping_add(part)) } };
        // SAFETY: the arrays hold a block.
        let (mut about, mut first, mut second) = unsafe {
            let load = |v: &[f32; BLOCK]| s.load(v.as_ptr().wrapping_add(part));
            (load(&sums.about), load(&sums.first), load(&sums.second))
        };
        for y in 0..a.size[1] {
            // Sums of a row by themselves: shorter chains, smaller errors.
            let (mut f, mut q) = ([zero; M], [zero; M]);
            for x in 0..a.size[2] {
                let mut m = [zero; P];
                for p in 0..P {
                    let at = p * a.plane + (y * a.columns + x) * BLOCK + part;
                    // SAFETY: by contract.
                    m[p] = unsafe { s.load(a.from.wrapping_add(at)) };
                }
                let t = X::inverse(s, &m);
                for z in 0..M {
                    if WHOLE || z < a.size[0] {
                        let mut v = s.add(t[z], bias);
                        let to = a.to.wrapping_add(z * a.slice + y * a.row + x * BLOCK + part);
                        if !STREAM && a.add {
                            // SAFETY: by contract.
                            v = s.add(v, unsafe { s.load(to) });
                        }
                        if fresh && y == 0 && x == 0 && z == 0 {
                            about = v;
                        }
                        let d = s.sub(v, about);
                        f[z] = s.add(f[z], d);
                        q[z] = s.fma(d, d, q[z]);
                        // SAFETY: by contract.
                        unsafe { if STREAM { s.stream(v, to) } else { s.store(v, to) } }
                    }
                }
            }
            for z in 0..M {
                first = s.add(first, f[z]);
                second = s.add(second, q[z]);
            }
        }
        // SAFETY: the arrays hold a block.
        unsafe {
            s.store(about, sums.about.as_mut_ptr().wrapping_add(part));
            s.store(first, sums.first.as_mut_ptr().wrapping_add(part));
            s.store(second, sums.second.as_mut_ptr().wrapping_add(part));
        }
    }
    sums.count += (a.size[0].min(M) * a.size[1] * a.size[2]) as u32;
    if STREAM {
        s.fence();
    }
}
