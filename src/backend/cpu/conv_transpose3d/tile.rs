//! The microkernel: a few input voxels times one or two taps of a block of output channels, summed in registers over
//! all input channels, with broadcast inputs against vectors of weights.

#[cfg(target_arch = "x86_64")]
use crate::backend::cpu::isa::{Avx2, Avx512};
use crate::backend::cpu::isa::{Scalar, Simd};
use crate::tensor::BLOCK;

/// What one tile computes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    /// First voxel, first channel.
    pub(super) input: *const f32,
    /// Floats between blocks of input channels.
    pub(super) run: usize,
    /// Blocks of input channels, and channels in the last one.
    pub(super) runs: usize,
    pub(super) last: usize,
    /// Weights of the first tap, channel 0; floats to the next input channel. The second tap's follow the first's.
    pub(super) filter: *const f32,
    pub(super) channel: usize,
    /// Bias of the output block, or null.
    pub(super) bias: *const f32,
    /// Add to what the output holds, in place of the bias.
    pub(super) add: bool,
    /// Where the first tap's results go: this, plus each voxel's place.
    pub(super) out: *mut f32,
    pub(super) places: *const usize,
    /// Floats from the first tap's result to the second's.
    pub(super) second: usize,
    /// Write past the caches.
    pub(super) stream: bool,
}

impl Tile {
    /// Where the vector of a voxel and a tap goes.
    ///
    /// # Safety
    /// The place of `v` is readable.
    #[inline(always)]
    unsafe fn output(&self, v: usize, k: usize) -> *mut [f32; BLOCK] {
        // SAFETY: by contract.
        let place = unsafe { *self.places.add(v) };
        self.out.wrapping_add(place + k * self.second).cast()
    }

    /// Runs tiles side by side over `voxels` voxels; `tiles` are their widths with their functions, wide ones first and
    /// the last of width one.
    ///
    /// # Safety
    /// That of [`TileFn`], for all these voxels.
    pub(super) unsafe fn row(mut self, tiles: &[(usize, TileFn)], voxels: usize) {
        let mut left = voxels;
        for &(width, f) in tiles {
            while left >= width {
                // SAFETY: by contract, with `width` of the voxels left.
                unsafe { f(&self) };
                self.input = self.input.wrapping_add(width * BLOCK);
                self.places = self.places.wrapping_add(width);
                left -= width;
            }
        }
    }
}

/// # Safety
/// The pointers of the tile lead to what their fields say, for the function's voxels and taps; no other thread touches
/// the output vectors, which hold values where `add` is set, which are aligned to 64 bytes where `stream` is set; the processor has the instruction set.
pub(super) type TileFn = unsafe fn(&Tile);

/// The microkernels of one instruction set, per number of taps (one; two, where registers allow): numbers of voxels,
/// large to small and ending with 1, each with its function.
pub(super) struct Kernels {
    pub(super) one: &'static [(usize, TileFn)],
    pub(super) two: &'static [(usize, TileFn)],
}

macro_rules! widths {
    ($f:ident, $taps:literal, [$($w:literal),*]) => { &[$(($w, $f::<$w, $taps>)),*] };
}

/// 32 registers of a block each: up to 24 sums, the weights, one input.
#[cfg(target_arch = "x86_64")]
pub(super) static AVX512: Kernels =
    Kernels { one: widths!(avx512, 1, [24, 16, 12, 8, 4, 2, 1]), two: widths!(avx512, 2, [12, 8, 6, 4, 2, 1]) };

/// 16 registers of half a block: 12 sums, the weights, one input.
#[cfg(target_arch = "x86_64")]
pub(super) static AVX2: Kernels = Kernels { one: widths!(avx2, 1, [6, 4, 2, 1]), two: &[] };

pub(super) static SCALAR: Kernels = Kernels { one: widths!(scalar, 1, [2, 1]), two: &[] };

/// Orders what this thread streamed before all that follows; needed before another thread may read it.
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// # Safety
/// See [`TileFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn avx512<const W: usize, const T: usize>(t: &Tile) {
    // SAFETY: this function's own contract.
    unsafe { tile::<Avx512, W, T>(Avx512::new(), t) }
}

/// # Safety
/// See [`TileFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const W: usize, const T: usize>(t: &Tile) {
    // SAFETY: this function's own contract.
    unsafe { tile::<Avx2, W, T>(Avx2::new(), t) }
}

/// # Safety
/// See [`TileFn`].
unsafe fn scalar<const W: usize, const T: usize>(t: &Tile) {
    // SAFETY: this function's own contract.
    unsafe { tile::<Scalar, W, T>(Scalar, t) }
}

/// # Safety
/// See [`TileFn`].
#[inline(always)]
unsafe fn tile<S: Simd, const W: usize, const T: usize>(s: S, t: &Tile) {
    let bias = if t.bias.is_null() {
        s.splat(0.0)
    } else {
        // SAFETY: by contract a non-null bias has a block.
        s.load(unsafe { &*t.bias.cast::<[f32; BLOCK]>() })
    };
    let mut sums = [[bias; T]; W];
    if t.add {
        for v in 0..W {
            for k in 0..T {
                // SAFETY: by contract W places are readable, and T vectors at each of them are ours.
                sums[v][k] = unsafe { s.load(&*t.output(v, k)) };
            }
        }
    }
    let (mut input, mut weights) = (t.input, t.filter);
    for i in 0..t.runs {
        let lanes = if i + 1 == t.runs { t.last } else { BLOCK };
        for lane in 0..lanes {
            let mut w = [bias; T];
            for k in 0..T {
                // SAFETY: by contract T blocks of weights are readable for every input channel.
                w[k] = s.load(unsafe { &*weights.add(k * BLOCK).cast::<[f32; BLOCK]>() });
            }
            for v in 0..W {
                // SAFETY: by contract `lanes` channels of this block are readable at each of the W voxels.
                let x = s.splat(unsafe { *input.add(v * BLOCK + lane) });
                for k in 0..T {
                    sums[v][k] = s.fma(x, w[k], sums[v][k]);
                }
            }
            weights = weights.wrapping_add(t.channel);
        }
        input = input.wrapping_add(t.run);
    }
    for v in 0..W {
        for k in 0..T {
            // SAFETY: by contract W places are readable, and T vectors at each of them are ours to write, aligned where
            // `stream` is set.
            unsafe {
                let out = t.output(v, k);
                if t.stream {
                    s.stream(sums[v][k], out);
                } else {
                    s.store(sums[v][k], &mut *out);
                }
            }
        }
    }
}
