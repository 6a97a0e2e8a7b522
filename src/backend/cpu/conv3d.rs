//! 3D convolution: the problem, the packed filter, the list of implementations and the reference.
//!
//! Packed filter: output channels in groups of two blocks (the last group has one if their number is odd), per group
//! `[kD][kH][kW][I][16 or 32]`. The input channels stay whole, so one packing serves any split of them into sources.

mod direct;
mod tile;

use crate::backend::{Impl, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Dims, Isa, Layout};

/// Sizes of a convolution; batch 1 or more, nothing else is zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) batch: usize,
    /// Input channels of all sources together.
    pub(crate) in_channels: usize,
    pub(crate) out_channels: usize,
    /// (D, H, W) of the input.
    pub(crate) input: [usize; 3],
    /// (D, H, W) of the output.
    pub(crate) output: [usize; 3],
    /// 1 or 3 per axis.
    pub(crate) kernel: [usize; 3],
    /// 1 or 2 per axis.
    pub(crate) stride: [usize; 3],
    /// At most half the kernel per axis.
    pub(crate) padding: [usize; 3],
}

/// One input. Its channels follow those of the source before it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) channels: usize,
    /// Plain or blocked; the same for all sources of a problem.
    pub(crate) layout: Layout,
}

/// All but the output, which is blocked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a> {
    pub(crate) geometry: Geometry,
    /// One or two.
    pub(crate) sources: &'a [Source<'a>],
    /// See [`pack_filter`].
    pub(crate) filter: &'a [f32],
    /// Padded to whole blocks.
    pub(crate) bias: Option<&'a [f32]>,
}

type Run = fn(&Problem<'_>, &mut [f32]);

pub(crate) static CONV3D: &[Impl<Geometry, Run>] = &[
    #[cfg(target_arch = "x86_64")]
    Impl { name: "direct_avx512", isa: Isa::Avx512, supports: any, run: |p, out| direct::run(&tile::AVX512, p, out) },
    #[cfg(target_arch = "x86_64")]
    Impl { name: "direct_avx2", isa: Isa::Avx2, supports: any, run: |p, out| direct::run(&tile::AVX2, p, out) },
    Impl { name: "direct_scalar", isa: Isa::Scalar, supports: any, run: |p, out| direct::run(&tile::SCALAR, p, out) },
    Impl { name: "reference", isa: Isa::Scalar, supports: any, run: reference },
];

fn any(_: &Geometry) -> bool {
    true
}

/// Writes the convolution of `p` to `out`, pad lanes too.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem<'_>, out: &mut [f32]) -> Result<()> {
    let i = pick(CONV3D, isa, &p.geometry, name).ok_or_else(|| no_implementation("conv3d", name))?;
    (i.run)(p, out);
    Ok(())
}

/// Floats of a packed filter.
pub(crate) fn packed_len([o, i, kd, kh, kw]: [usize; 5]) -> usize {
    Layout::BLOCKED.padded(o) * i * kd * kh * kw
}

/// Where the weights of output block `block` start: the place of tap 0, input channel 0, and the distance between
/// input channels.
fn packed_place(g: &Geometry, block: usize) -> (usize, usize) {
    let blocks = g.out_channels.div_ceil(BLOCK);
    let first = block / 2 * 2;
    let width = BLOCK * (blocks - first).min(2);
    let taps: usize = g.kernel.iter().product();
    (first * BLOCK * taps * g.in_channels + (block - first) * BLOCK, width)
}

/// Packs `values` in `[O, I, kD, kH, kW]` order into `out` of [`packed_len`] floats. Lanes past O become zero.
pub(crate) fn pack_filter(_: Isa, values: &[f32], [o, i, kd, kh, kw]: [usize; 5], out: &mut [f32]) {
    let taps = kd * kh * kw;
    par::chunks_mut(out, 2 * BLOCK * i * taps, |group, out| {
        let width = out.len() / (i * taps).max(1);
        out.fill(0.0);
        let first = group * 2 * BLOCK;
        for c in 0..i {
            for lane in 0..width.min(o - first) {
                let from = &values[((first + lane) * i + c) * taps..][..taps];
                for (t, v) in from.iter().enumerate() {
                    out[(t * i + c) * width + lane] = *v;
                }
            }
        }
    });
}

/// The definition, one output value at a time.
fn reference(p: &Problem<'_>, out: &mut [f32]) {
    let g = &p.geometry;
    let [od, oh, ow] = g.output;
    let blocks = g.out_channels.div_ceil(BLOCK);
    par::chunks_mut(out, od * oh * ow * BLOCK, |i, out| {
        let (n, block) = (i / blocks, i % blocks);
        let (weights, width) = packed_place(g, block);
        for (v, o) in out.iter_mut().enumerate() {
            let (lane, voxel) = (v % BLOCK, v / BLOCK);
            let at = [voxel / (oh * ow), voxel / ow % oh, voxel % ow];
            let bias = p.bias.map_or(0.0, |b| b[block * BLOCK + lane]);
            *o = bias + dot(p, n, at, &p.filter[weights + lane..], width);
        }
    });
}

/// Sum over taps and input channels for one output value.
fn dot(p: &Problem<'_>, n: usize, at: [usize; 3], weights: &[f32], width: usize) -> f32 {
    let g = &p.geometry;
    let [kd, kh, kw] = g.kernel;
    let mut sum = 0.0;
    for tap in 0..kd * kh * kw {
        let k = [tap / (kh * kw), tap / kw % kh, tap % kw];
        let mut x = [0; 3];
        let mut inside = true;
        for a in 0..3 {
            // Wraps to a huge number left of the input.
            x[a] = (at[a] * g.stride[a] + k[a]).wrapping_sub(g.padding[a]);
            inside &= x[a] < g.input[a];
        }
        if !inside {
            continue;
        }
        let mut c = 0;
        for s in p.sources {
            let dims = Dims::from([g.batch, s.channels, g.input[0], g.input[1], g.input[2]]);
            for channel in 0..s.channels {
                let x = s.data[s.layout.offset(&dims, [n, channel, x[0], x[1], x[2]])];
                sum += x * weights[(tap * g.in_channels + c) * width];
                c += 1;
            }
        }
    }
    sum
}
