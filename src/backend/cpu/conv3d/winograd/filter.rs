//! Filters in transformed form: made once where they are small and used over and over, on the way where they are large
//! and each value meets few tiles. Making them reads the packed filter once, an eighth of what they would take to read.

use super::Scheme;
use crate::backend::cpu::conv3d::{Geometry, packed_place};
use crate::backend::cpu::isa::simd_entry;
use crate::backend::cpu::lanes::Lanes;
use crate::base::par;
use crate::tensor::{BLOCK, Isa};

/// The transforms of the three axes as f32, `[P][3]` each.
#[derive(Debug, Clone)]
pub(super) struct Matrices {
    z: Vec<[f32; 3]>,
    xy: Vec<[f32; 3]>,
}

impl Matrices {
    pub(super) fn new(scheme: Scheme) -> Self {
        let narrow = |m: Vec<[f64; 3]>| m.into_iter().map(|r| r.map(|v| v as f32)).collect();
        Self { z: narrow(scheme.z.filter()), xy: narrow(scheme.xy.filter()) }
    }
}

/// One plane of products of one group of output channels, for some input channels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plane<'a> {
    pub(super) matrices: &'a Matrices,
    /// Which plane.
    pub(super) p: usize,
    /// Packed taps `[kD][kH][kW][inputs][width]` of the group from the first input channel on; floats between taps.
    pub(super) from: *const f32,
    pub(super) tap: usize,
    pub(super) kernel: [usize; 3],
    /// Floats of a tap to transform: input channels times `width`, a multiple of 16.
    pub(super) len: usize,
    /// `[P * P][len]`.
    pub(super) to: *mut f32,
}

simd_entry!(unsafe plane = plane_of(a: &Plane<'_>));

/// # Safety
/// `len` floats of every tap are readable, and `P * P * len` floats at `to` are ours to write.
#[inline(always)]
unsafe fn plane_of<S: Lanes>(s: S, a: &Plane<'_>) {
    let [kd, kh, kw] = a.kernel;
    let (gz, xy) = (&a.matrices.z[a.p], &a.matrices.xy);
    let points = xy.len();
    for at in (0..a.len).step_by(S::N) {
        let mut taps = [s.splat(0.0); 9];
        for (k, t) in taps.iter_mut().enumerate().take(kh * kw) {
            for (z, g) in gz.iter().enumerate().take(kd) {
                // SAFETY: by contract.
                let v = unsafe { s.load(a.from.wrapping_add((z * kh * kw + k) * a.tap + at)) };
                *t = s.fma(s.splat(*g), v, *t);
            }
        }
        for (y, gy) in xy.iter().enumerate() {
            let mut row = [s.splat(0.0); 3];
            for (x, r) in row.iter_mut().enumerate().take(kw) {
                for (k, g) in gy.iter().enumerate().take(kh) {
                    *r = s.fma(s.splat(*g), taps[k * kw + x], *r);
                }
            }
            for (x, gx) in xy.iter().enumerate() {
                let v = s.fma(s.splat(gx[2]), row[2], s.fma(s.splat(gx[1]), row[1], s.mul(s.splat(gx[0]), row[0])));
                // SAFETY: by contract.
                unsafe { s.store(v, a.to.wrapping_add((y * points + x) * a.len + at)) }
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
pub(in super::super) fn prepare(isa: Isa, scheme: Scheme, g: &Geometry, packed: &[f32], out: &mut [f32]) {
    let matrices = Matrices::new(scheme);
    let planes = scheme.z.sizes().1;
    let blocks = g.out_channels.div_ceil(BLOCK);
    let groups = blocks.div_ceil(2);
    let to = crate::backend::cpu::Shared::new(out);
    par::for_each(planes * groups, |i| {
        let (p, block) = (i / groups, i % groups * 2);
        let (from, width) = packed_place(g, block);
        let a = Plane {
            matrices: &matrices,
            p,
            from: packed[from..].as_ptr(),
            tap: g.in_channels * width,
            kernel: g.kernel,
            len: g.in_channels * width,
            to: to.ptr().wrapping_add(prepared_place(scheme, g, p, block)),
        };
        // SAFETY: the packed filter has all taps of the group, and every item has a place of its own in `out`, whose
        // length is `prepared_len`.
        unsafe { plane::on(isa, &a) }
    });
}
