//! The microkernel: a few neighbouring output voxels of one row times one or two blocks of output channels, summed in
//! registers over all taps and input channels, with broadcast inputs against vectors of weights.

#[cfg(target_arch = "x86_64")]
use crate::backend::cpu::isa::{Avx2, Avx512};
use crate::backend::cpu::isa::{Scalar, Simd};
use crate::tensor::BLOCK;

/// One source as a tile sees it: runs of channels that lie side by side.
#[derive(Debug, Clone, Copy)]
pub(in crate::backend::cpu) struct Stream {
    /// Where tap (0, 0, 0) of the tile's first voxel is in the first run; may lie outside the input, where no valid
    /// tap reads.
    pub(in crate::backend::cpu) start: *const f32,
    /// Floats between runs, rows and slices.
    pub(in crate::backend::cpu) run: usize,
    pub(in crate::backend::cpu) row: usize,
    pub(in crate::backend::cpu) slice: usize,
    /// Number of runs; 0 for no source.
    pub(in crate::backend::cpu) runs: usize,
    /// Channels per run, and in the last one.
    pub(in crate::backend::cpu) lanes: usize,
    pub(in crate::backend::cpu) last: usize,
}

/// What one tile computes.
#[derive(Debug, Clone, Copy)]
pub(in crate::backend::cpu) struct Tile {
    pub(in crate::backend::cpu) sources: [Stream; 2],
    /// Weights of tap 0, channel 0.
    pub(in crate::backend::cpu) filter: *const f32,
    /// Floats between the weights of neighbouring input channels, and of neighbouring taps.
    pub(in crate::backend::cpu) channel: usize,
    pub(in crate::backend::cpu) tap: usize,
    /// Taps that touch the input: first and one past the last, in z and y.
    pub(in crate::backend::cpu) z: (usize, usize),
    pub(in crate::backend::cpu) y: (usize, usize),
    /// Taps in x to do.
    pub(in crate::backend::cpu) x: (usize, usize),
    /// Kernel sizes in y and x.
    pub(in crate::backend::cpu) kernel: (usize, usize),
    /// The first voxel's leftmost tap lies in the padding; the last voxel's rightmost does.
    pub(in crate::backend::cpu) left: bool,
    pub(in crate::backend::cpu) right: bool,
    /// Output of the first voxel, and floats to the next voxel and to the next output block.
    pub(in crate::backend::cpu) out: *mut f32,
    pub(in crate::backend::cpu) voxel: usize,
    pub(in crate::backend::cpu) block: usize,
    /// Bias of the first block, or null.
    pub(in crate::backend::cpu) bias: *const f32,
    pub(in crate::backend::cpu) finish: Option<Finish>,
}

/// The end of a residual block: what the output holds is normalised, the sums and an addend are added, and leaky ReLU is
/// applied.
#[derive(Debug, Clone, Copy)]
pub(in crate::backend::cpu) struct Finish {
    /// Vectors of the output blocks.
    pub(in crate::backend::cpu) mean: *const f32,
    pub(in crate::backend::cpu) scale: *const f32,
    pub(in crate::backend::cpu) shift: *const f32,
    /// In [0, 1].
    pub(in crate::backend::cpu) slope: f32,
    /// The addend's row for the first block, or null; floats to the next block; output voxels per voxel of it.
    pub(in crate::backend::cpu) addend: *const f32,
    pub(in crate::backend::cpu) addend_block: usize,
    pub(in crate::backend::cpu) factor: usize,
    /// The tile's first voxel.
    pub(in crate::backend::cpu) x: usize,
}

/// # Safety
/// The pointers of the tile lead to what their fields say, for the function's width, blocks and voxel step; no other
/// thread touches the output voxels; the processor has the instruction set.
pub(in crate::backend::cpu) type TileFn = unsafe fn(&Tile);

/// Distances between neighbouring voxels of a row, in floats: plain or blocked, at stride 1 or 2.
pub(in crate::backend::cpu) const STEPS: [usize; 4] = [1, 2, BLOCK, 2 * BLOCK];

/// The microkernels of one instruction set: per number of output blocks (one; two, where registers allow) the
/// available widths, wide to narrow and ending with 1, each with two functions per entry of [`STEPS`]: one that stores its
/// sums, one that finishes a residual block with them. (One that could do both would keep its sums in memory.)
pub(in crate::backend::cpu) struct Kernels {
    pub(in crate::backend::cpu) one: &'static [(usize, [[TileFn; 2]; 4])],
    pub(in crate::backend::cpu) two: &'static [(usize, [[TileFn; 2]; 4])],
}

/// Rows of a [`Kernels`] table from a function generic over width, blocks and step.
macro_rules! widths {
    ($f:ident, $blocks:literal, [$($w:literal),*]) => {
        &[$(($w, [
            [$f::<$w, $blocks, 1, false>, $f::<$w, $blocks, 1, true>],
            [$f::<$w, $blocks, 2, false>, $f::<$w, $blocks, 2, true>],
            [$f::<$w, $blocks, 16, false>, $f::<$w, $blocks, 16, true>],
            [$f::<$w, $blocks, 32, false>, $f::<$w, $blocks, 32, true>],
        ])),*]
    };
}

/// 32 registers of a block each: up to 24 sums, the weights, one input.
#[cfg(target_arch = "x86_64")]
pub(in crate::backend::cpu) static AVX512: Kernels =
    Kernels { one: widths!(avx512, 1, [24, 16, 12, 8, 4, 2, 1]), two: widths!(avx512, 2, [12, 8, 6, 4, 2, 1]) };

/// 16 registers of half a block: 12 sums, the weights, one input.
#[cfg(target_arch = "x86_64")]
pub(in crate::backend::cpu) static AVX2: Kernels = Kernels { one: widths!(avx2, 1, [6, 4, 2, 1]), two: &[] };

pub(in crate::backend::cpu) static SCALAR: Kernels = Kernels { one: widths!(scalar, 1, [2, 1]), two: &[] };

/// # Safety
/// See [`TileFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn avx512<const W: usize, const B: usize, const STEP: usize, const FINISH: bool>(t: &Tile) {
    // SAFETY: this function's own contract.
    unsafe { tile::<Avx512, W, B, STEP, FINISH>(Avx512::new(), t) }
}

/// # Safety
/// See [`TileFn`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const W: usize, const B: usize, const STEP: usize, const FINISH: bool>(t: &Tile) {
    // SAFETY: this function's own contract.
    unsafe { tile::<Avx2, W, B, STEP, FINISH>(Avx2::new(), t) }
}

/// # Safety
/// See [`TileFn`].
unsafe fn scalar<const W: usize, const B: usize, const STEP: usize, const FINISH: bool>(t: &Tile) {
    // SAFETY: this function's own contract.
    unsafe { tile::<Scalar, W, B, STEP, FINISH>(Scalar, t) }
}

/// # Safety
/// See [`TileFn`].
#[inline(always)]
unsafe fn tile<S: Simd, const W: usize, const B: usize, const STEP: usize, const FINISH: bool>(s: S, t: &Tile) {
    let mut sums = [[s.splat(0.0); B]; W];
    let (kh, kw) = t.kernel;
    for z in t.z.0..t.z.1 {
        for y in t.y.0..t.y.1 {
            for x in t.x.0..t.x.1 {
                let mut weights = t.filter.wrapping_add(((z * kh + y) * kw + x) * t.tap);
                // Voxels whose tap lies in the padding are left out; the sums stay in the same registers.
                let (left, right) = (t.left && x == 0, t.right && x + 1 == kw);
                for source in &t.sources {
                    let step = if STEP < BLOCK { 1 } else { BLOCK };
                    let mut input = source.start.wrapping_add(z * source.slice + y * source.row + x * step);
                    for i in 0..source.runs {
                        let lanes = if i + 1 == source.runs { source.last } else { source.lanes };
                        // SAFETY: by contract `lanes` channels are readable at every voxel of the range, and their
                        // weights at `weights`.
                        unsafe {
                            match (left, right) {
                                (false, false) => {
                                    run::<S, W, B, STEP, 0, 0>(s, &mut sums, input, weights, t.channel, lanes)
                                }
                                (true, false) => {
                                    run::<S, W, B, STEP, 1, 0>(s, &mut sums, input, weights, t.channel, lanes)
                                }
                                (false, true) => {
                                    run::<S, W, B, STEP, 0, 1>(s, &mut sums, input, weights, t.channel, lanes)
                                }
                                // Only a kernel of width 1 could need both at once, and it has no padding.
                                (true, true) => {}
                            }
                        }
                        input = input.wrapping_add(source.run);
                        weights = weights.wrapping_add(lanes * t.channel);
                    }
                }
            }
        }
    }
    if let (true, Some(f)) = (FINISH, &t.finish) {
        // Through memory: the loop below is too long to be unrolled, and sums that it indexes could not stay in registers
        // above.
        let mut results = [[[0.0; BLOCK]; B]; W];
        for i in 0..W {
            for b in 0..B {
                s.store(sums[i][b], &mut results[i][b]);
            }
        }
        // SAFETY: by contract.
        return unsafe { finish(s, t, f, &results) };
    }
    for b in 0..B {
        // SAFETY: by contract a bias that is there has B blocks.
        let bias = unsafe { bias(s, t, b) };
        for i in 0..W {
            // SAFETY: by contract W voxels of B blocks are ours to write.
            let out = unsafe { &mut *t.out.add(b * t.block + i * t.voxel).cast::<[f32; BLOCK]>() };
            s.store(s.add(sums[i][b], bias), out);
        }
    }
}

/// # Safety
/// A bias that is there has a block `b`.
#[inline(always)]
unsafe fn bias<S: Simd>(s: S, t: &Tile, b: usize) -> S::V {
    if t.bias.is_null() {
        return s.splat(0.0);
    }
    // SAFETY: by contract.
    s.load(unsafe { &*t.bias.add(b * BLOCK).cast::<[f32; BLOCK]>() })
}

/// # Safety
/// See [`TileFn`]; the addend has a voxel for every `factor` voxels of the row, in B blocks.
#[inline(always)]
unsafe fn finish<S: Simd, const W: usize, const B: usize>(
    s: S,
    t: &Tile,
    f: &Finish,
    results: &[[[f32; BLOCK]; B]; W],
) {
    let slope = s.splat(f.slope);
    for b in 0..B {
        // SAFETY: by contract the vectors have B blocks.
        let (bias, [mean, scale, shift]) = unsafe {
            let vector = |v: *const f32| s.load(&*v.add(b * BLOCK).cast::<[f32; BLOCK]>());
            (bias(s, t, b), [f.mean, f.scale, f.shift].map(vector))
        };
        for i in 0..W {
            // SAFETY: by contract W voxels of B blocks are ours to write.
            let out = unsafe { &mut *t.out.add(b * t.block + i * t.voxel).cast::<[f32; BLOCK]>() };
            let mut v = s.add(s.load(&results[i][b]), bias);
            if !f.addend.is_null() {
                // A division takes longer than all else here.
                let voxel = match f.factor {
                    1 => f.x + i,
                    2 => (f.x + i) / 2,
                    n => (f.x + i) / n,
                };
                // SAFETY: by contract.
                v = s.add(v, s.load(unsafe { &*f.addend.add(b * f.addend_block + voxel * BLOCK).cast() }));
            }
            let v = s.add(v, s.fma(s.sub(s.load(out), mean), scale, shift));
            // The leaky ReLU, since the slope is at most one.
            s.store(s.max(v, s.mul(v, slope)), out);
        }
    }
}

/// Adds one tap of `lanes` channels to the sums of voxels `LEFT..W - RIGHT`.
///
/// # Safety
/// `lanes` floats are readable at `input` plus `STEP` times each of those voxels, and B blocks at `weights` plus
/// `channel` times each lane.
#[inline(always)]
unsafe fn run<S: Simd, const W: usize, const B: usize, const STEP: usize, const LEFT: usize, const RIGHT: usize>(
    s: S,
    sums: &mut [[S::V; B]; W],
    input: *const f32,
    weights: *const f32,
    channel: usize,
    lanes: usize,
) {
    for lane in 0..lanes {
        let mut w = [s.splat(0.0); B];
        for b in 0..B {
            // SAFETY: by contract.
            w[b] = s.load(unsafe { &*weights.add(lane * channel + b * BLOCK).cast::<[f32; BLOCK]>() });
        }
        for i in LEFT..W.saturating_sub(RIGHT) {
            // SAFETY: by contract.
            let x = s.splat(unsafe { *input.wrapping_add(i * STEP).add(lane) });
            for b in 0..B {
                sums[i][b] = s.fma(x, w[b], sums[i][b]);
            }
        }
    }
}
