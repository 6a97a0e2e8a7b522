//! The microkernel of weight gradients: products of some input channels with one block of output channels, summed in
//! registers over a box of voxels, with broadcast inputs against vectors of output gradients.

#[cfg(target_arch = "x86_64")]
use crate::backend::cpu::isa::{Avx2, Avx512};
use crate::backend::cpu::isa::{Scalar, Simd};
use crate::tensor::{BLOCK, Isa};

/// A sum over voxels: `to[c][o] = sum_v x[v][c] y[v][o]`.
#[derive(Debug, Clone, Copy)]
pub(in crate::backend::cpu) struct Outer {
    /// The first channel at the first voxel, and floats between slices, rows and voxels.
    pub(in crate::backend::cpu) x: *const f32,
    pub(in crate::backend::cpu) x_step: [usize; 3],
    /// One block of channels at the first voxel, and the same distances.
    pub(in crate::backend::cpu) y: *const f32,
    pub(in crate::backend::cpu) y_step: [usize; 3],
    /// Slices, rows and voxels.
    pub(in crate::backend::cpu) size: [usize; 3],
    /// A block for the first channel, and floats to that for the next.
    pub(in crate::backend::cpu) to: *mut f32,
    pub(in crate::backend::cpu) to_step: usize,
    /// Add to what is there.
    pub(in crate::backend::cpu) add: bool,
}

/// # Safety
/// At every voxel the function's number of channels is readable at `x`, side by side, and a block at `y`; as many blocks
/// at `to` are ours to write; the processor has the instruction set.
pub(in crate::backend::cpu) type OuterFn = unsafe fn(&Outer);

/// Channels and functions, wide to narrow and ending with 1. Narrow ones keep several sums per channel, of every second or
/// fourth voxel, to hide the latency of a multiply-add.
type Widths = &'static [(usize, OuterFn)];

/// 32 registers of a block each.
#[cfg(target_arch = "x86_64")]
static AVX512: Widths = &[
    (16, avx512::<16, 1>),
    (12, avx512::<12, 1>),
    (8, avx512::<8, 1>),
    (4, avx512::<4, 2>),
    (2, avx512::<2, 4>),
    (1, avx512::<1, 8>),
];

/// 16 registers of half a block: 12 sums, the gradients, one input.
#[cfg(target_arch = "x86_64")]
static AVX2: Widths = &[(6, avx2::<6, 1>), (4, avx2::<4, 1>), (2, avx2::<2, 2>), (1, avx2::<1, 4>)];

static SCALAR: Widths = &[(2, scalar::<2, 1>), (1, scalar::<1, 2>)];

fn widths(isa: Isa) -> Widths {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => AVX2,
        _ => SCALAR,
    }
}

/// Kernels that do `channels` channels together: first channel and function of each. With `apart`, channels do not lie side
/// by side and go one by one.
pub(in crate::backend::cpu) fn cover(isa: Isa, channels: usize, apart: bool) -> Vec<(usize, OuterFn)> {
    let mut out = Vec::new();
    let mut first = 0;
    while first < channels {
        let fits = |w: &&(usize, OuterFn)| w.0 == 1 || (!apart && w.0 <= channels - first);
        let Some(&(width, f)) = widths(isa).iter().find(fits) else { break };
        out.push((first, f));
        first += width;
    }
    out
}

/// # Safety
/// See [`OuterFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn avx512<const T: usize, const U: usize>(o: &Outer) {
    // SAFETY: this function's own contract.
    unsafe { outer::<Avx512, T, U>(Avx512::new(), o) }
}

/// # Safety
/// See [`OuterFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const T: usize, const U: usize>(o: &Outer) {
    // SAFETY: this function's own contract.
    unsafe { outer::<Avx2, T, U>(Avx2::new(), o) }
}

/// # Safety
/// See [`OuterFn`].
unsafe fn scalar<const T: usize, const U: usize>(o: &Outer) {
    // SAFETY: this function's own contract.
    unsafe { outer::<Scalar, T, U>(Scalar, o) }
}

/// `T` channels, each with `U` sums.
///
/// # Safety
/// See [`OuterFn`].
#[inline(always)]
unsafe fn outer<S: Simd, const T: usize, const U: usize>(s: S, o: &Outer) {
    let mut sums = [[s.splat(0.0); T]; U];
    let [slices, rows, voxels] = o.size;
    for z in 0..slices {
        for r in 0..rows {
            let mut x = o.x.wrapping_add(z * o.x_step[0] + r * o.x_step[1]);
            let mut y = o.y.wrapping_add(z * o.y_step[0] + r * o.y_step[1]);
            for _ in 0..voxels / U {
                for u in 0..U {
                    // SAFETY: by contract.
                    unsafe { voxel(s, &mut sums[u], x, y) }
                    x = x.wrapping_add(o.x_step[2]);
                    y = y.wrapping_add(o.y_step[2]);
                }
            }
            for _ in 0..voxels % U {
                // SAFETY: by contract.
                unsafe { voxel(s, &mut sums[0], x, y) }
                x = x.wrapping_add(o.x_step[2]);
                y = y.wrapping_add(o.y_step[2]);
            }
        }
    }
    for t in 0..T {
        let mut sum = sums[0][t];
        for u in 1..U {
            sum = s.add(sum, sums[u][t]);
        }
        // SAFETY: by contract.
        let to = unsafe { &mut *o.to.wrapping_add(t * o.to_step).cast::<[f32; BLOCK]>() };
        if o.add {
            sum = s.add(sum, s.load(to));
        }
        s.store(sum, to);
    }
}

/// # Safety
/// `T` floats are readable at `x` and a block at `y`.
#[inline(always)]
unsafe fn voxel<S: Simd, const T: usize>(s: S, sums: &mut [S::V; T], x: *const f32, y: *const f32) {
    // SAFETY: by contract.
    let y = s.load(unsafe { &*y.cast::<[f32; BLOCK]>() });
    for t in 0..T {
        // SAFETY: by contract.
        sums[t] = s.fma(s.splat(unsafe { *x.wrapping_add(t) }), y, sums[t]);
    }
}
