//! Filters in transformed form: made once where they are small and used over and over, on the way where they are large
//! and each value meets few tiles. Making them reads the packed filter once, an eighth of what they would take to read.

use super::Scheme;
use super::axis::{Axis, Kind, by_forward};
use crate::backend::cpu::conv3d::{Geometry, packed_place};
use crate::backend::cpu::isa::simd_entry;
use crate::backend::cpu::lanes::Lanes;
use crate::base::par;
use crate::tensor::{BLOCK, Isa, Stored};

/// One plane of products of one group of output channels, for some input channels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plane {
    pub(super) scheme: Scheme,
    /// Which plane.
    pub(super) p: usize,
    /// Taps `[kD][kH][kW][len]`, floats between taps.
    pub(super) from: *const f32,
    pub(super) tap: usize,
    /// Floats of a tap to transform: input channels times `width`, a multiple of 16.
    pub(super) len: usize,
    /// `[P * P][len]`, floats between products.
    pub(super) to: *mut f32,
    pub(super) product: usize,
}

simd_entry!(unsafe plane = plane_of(a: &Plane));

/// # Safety
/// `len` floats of every tap are readable, and as many of every product at `to` are ours to write.
#[inline(always)]
unsafe fn plane_of<S: Lanes>(s: S, a: &Plane) {
    // SAFETY: this function's own contract.
    unsafe { by_forward!(a.scheme.xy, in_plane::<S>(s, a)) }
}

/// # Safety
/// As [`plane_of`].
#[inline(always)]
unsafe fn in_plane<S: Lanes, X: Axis<L, P, M>, const L: usize, const P: usize, const M: usize>(s: S, a: &Plane) {
    let z = a.scheme.z.filter(a.p);
    let depth = if a.scheme.z == Kind::One { 1 } else { 3 };
    for at in (0..a.len).step_by(S::N) {
        // Columns of taps, each combined along z and transformed along y.
        let mut columns = [[s.splat(0.0); P]; 3];
        for x in 0..3 {
            let mut taps = [s.splat(0.0); 3];
            for y in 0..3 {
                for k in 0..depth {
                    // Three by three taps in the plane, or there would be no scheme.
                    let tap = (k * 3 + y) * 3 + x;
                    // SAFETY: by contract.
                    let v = unsafe { s.load(a.from.wrapping_add(tap * a.tap + at)) };
                    taps[y] = s.fma(s.splat(z[k]), v, taps[y]);
                }
            }
            columns[x] = X::filter(s, &taps);
        }
        for y in 0..P {
            let row = X::filter(s, &[columns[0][y], columns[1][y], columns[2][y]]);
            for x in 0..P {
                // SAFETY: by contract.
                unsafe { s.store(row[x], a.to.wrapping_add((y * P + x) * a.product + at)) }
            }
        }
    }
}

/// Floats of the whole transformed filter of `g`.
pub(super) fn prepared_len(scheme: Scheme, g: &Geometry) -> usize {
    scheme.points().saturating_mul(g.in_channels).saturating_mul(g.out_channels.next_multiple_of(BLOCK))
}

/// Where the plane `p` of the group that starts at output block `block` lies in a prepared filter:
/// `[planes][groups][points of a plane][inputs][width]`.
pub(super) fn prepared_place(scheme: Scheme, g: &Geometry, p: usize, block: usize) -> usize {
    let points = scheme.plane_points();
    (p * g.out_channels.next_multiple_of(BLOCK) + block * BLOCK) * points * g.in_channels
}

/// Transforms the packed filter `packed` of `g` into `out` of [`prepared_len`] floats.
pub(in crate::backend::cpu) fn prepare(isa: Isa, scheme: Scheme, g: &Geometry, packed: Stored<'_>, out: &mut [f32]) {
    let planes = scheme.z.sizes().1;
    let blocks = g.out_channels.div_ceil(BLOCK);
    let groups = blocks.div_ceil(2);
    let to = crate::backend::cpu::Shared::new(out);
    par::for_each(planes * groups, |i| {
        let (p, block) = (i / groups, i % groups * 2);
        let (from, width) = packed_place(g, block);
        let taps = g.kernel.iter().product::<usize>() * g.in_channels * width;
        let packed = packed.part(from..from + taps);
        let a = Plane {
            scheme,
            p,
            from: packed.as_ptr(),
            tap: g.in_channels * width,
            len: g.in_channels * width,
            to: to.ptr().wrapping_add(prepared_place(scheme, g, p, block)),
            product: g.in_channels * width,
        };
        // SAFETY: the packed filter has all taps of the group, and every item has a place of its own in `out`, whose
        // length is `prepared_len`.
        unsafe { plane::on(isa, &a) }
    });
}
