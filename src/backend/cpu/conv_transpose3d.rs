//! Transposed 3D convolution whose kernel is its stride: the problem, the packed filter, the list of implementations
//! and the reference.
//!
//! No two input voxels reach the same output voxel, so this is a 1x1x1 convolution to taps x O channels whose results
//! are stored apart: output voxel `z * stride + k` of tap k. Vectors are pairs of taps of one output block where there
//! is an even number of taps. With stride 2 along x the two are neighbours in memory, and a tile fills a row without
//! gaps.
//!
//! Packed filter: `[output block][tap pair][I][16 per tap]`; with a single tap, `[output block][I][16]`.

mod tile;

use self::tile::{Kernels, Tile, TileFn};
use super::Shared;
use crate::backend::{Impl, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa, Layout};

/// Sizes of a transposed convolution; nothing is zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) batch: usize,
    pub(crate) in_channels: usize,
    pub(crate) out_channels: usize,
    /// (D, H, W) of the input; the output's are `stride` times as much.
    pub(crate) input: [usize; 3],
    /// 1 or 2 per axis; the kernel, too.
    pub(crate) stride: [usize; 3],
}

impl Geometry {
    fn taps(&self) -> usize {
        self.stride.iter().product()
    }

    /// Voxels of the input.
    fn voxels(&self) -> usize {
        self.input.iter().product()
    }

    fn blocks(&self) -> usize {
        self.out_channels.div_ceil(BLOCK)
    }

    /// Where, in an output block, the value of tap 0 at input voxel `v` belongs.
    fn place(&self, v: usize) -> usize {
        let [_, h, w] = self.input;
        self.output_at([v / (h * w) * self.stride[0], v / w % h * self.stride[1], v % w * self.stride[2]])
    }

    /// How far from there the value of `tap` is.
    fn shift(&self, tap: usize) -> usize {
        let [_, sh, sw] = self.stride;
        self.output_at([tap / (sh * sw), tap / sw % sh, tap % sw])
    }

    fn output_at(&self, [z, y, x]: [usize; 3]) -> usize {
        ((z * self.input[1] * self.stride[1] + y) * self.input[2] * self.stride[2] + x) * BLOCK
    }

    /// Where the weights of a tap of an output block start, and the distance between input channels.
    fn weights(&self, block: usize, tap: usize) -> (usize, usize) {
        let taps = self.taps();
        let pair = taps.min(2);
        let panel = (block * taps + tap) / pair;
        (panel * self.in_channels * pair * BLOCK + tap % pair * BLOCK, pair * BLOCK)
    }
}

/// All but the output; input and output are blocked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a> {
    pub(crate) geometry: Geometry,
    pub(crate) input: &'a [f32],
    /// See [`pack_filter`].
    pub(crate) filter: &'a [f32],
    /// Padded to whole blocks.
    pub(crate) bias: Option<&'a [f32]>,
}

type Run = fn(&Problem<'_>, &mut [f32]);

pub(crate) static CONV_TRANSPOSE3D: &[Impl<(), Run>] = &[
    #[cfg(target_arch = "x86_64")]
    Impl { name: "direct_avx512", isa: Isa::Avx512, supports: any, run: |p, out| run(&tile::AVX512, p, out) },
    #[cfg(target_arch = "x86_64")]
    Impl { name: "direct_avx2", isa: Isa::Avx2, supports: any, run: |p, out| run(&tile::AVX2, p, out) },
    Impl { name: "direct_scalar", isa: Isa::Scalar, supports: any, run: |p, out| run(&tile::SCALAR, p, out) },
    Impl { name: "reference", isa: Isa::Scalar, supports: any, run: reference },
];

fn any((): &()) -> bool {
    true
}

/// Writes the transposed convolution of `p` to `out`, pad lanes too.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem<'_>, out: &mut [f32]) -> Result<()> {
    let i = pick(CONV_TRANSPOSE3D, isa, &(), name).ok_or_else(|| no_implementation("conv_transpose3d", name))?;
    (i.run)(p, out);
    Ok(())
}

/// Floats of a packed filter.
pub(crate) fn packed_len([i, o, kd, kh, kw]: [usize; 5]) -> usize {
    Layout::BLOCKED.padded(o) * i * kd * kh * kw
}

/// Packs `values` in `[I, O, kD, kH, kW]` order into `out` of [`packed_len`] floats. Lanes past O become zero.
pub(crate) fn pack_filter(_: Isa, values: &[f32], [i, o, kd, kh, kw]: [usize; 5], out: &mut [f32]) {
    let taps = kd * kh * kw;
    let pair = taps.clamp(1, 2);
    par::chunks_mut(out, i * taps * BLOCK, |block, out| {
        out.fill(0.0);
        let first = block * BLOCK;
        for c in 0..i {
            for lane in 0..BLOCK.min(o - first) {
                let from = &values[(c * o + first + lane) * taps..][..taps];
                for (t, v) in from.iter().enumerate() {
                    out[((t / pair * i + c) * pair + t % pair) * BLOCK + lane] = *v;
                }
            }
        }
    });
}

/// Writes a filter packed by [`pack_filter`] to `out` in `[I, O, kD, kH, kW]` order.
pub(crate) fn unpack_filter(_: Isa, packed: &[f32], [i, o, kd, kh, kw]: [usize; 5], out: &mut [f32]) {
    let taps = kd * kh * kw;
    let pair = taps.clamp(1, 2);
    par::chunks_mut(out, o * taps, |c, out| {
        for (channel, out) in out.chunks_exact_mut(taps).enumerate() {
            let start = channel / BLOCK * i * taps * BLOCK + channel % BLOCK;
            for (t, v) in out.iter_mut().enumerate() {
                *v = packed[start + ((t / pair * i + c) * pair + t % pair) * BLOCK];
            }
        }
    });
}

/// The definition, one output value at a time.
fn reference(p: &Problem<'_>, out: &mut [f32]) {
    let g = &p.geometry;
    let (voxels, taps, blocks) = (g.voxels(), g.taps(), g.blocks());
    par::chunks_mut(out, voxels * taps * BLOCK, |i, out| {
        let (n, block) = (i / blocks, i % blocks);
        let input = &p.input[n * Layout::BLOCKED.padded(g.in_channels) * voxels..];
        for v in 0..voxels {
            for tap in 0..taps {
                let (weights, channel) = g.weights(block, tap);
                let to = g.place(v) + g.shift(tap);
                for (lane, out) in out[to..to + BLOCK].iter_mut().enumerate() {
                    let mut sum = p.bias.map_or(0.0, |b| b[block * BLOCK + lane]);
                    for c in 0..g.in_channels {
                        let x = input[(c / BLOCK * voxels + v) * BLOCK + c % BLOCK];
                        sum += x * p.filter[weights + c * channel + lane];
                    }
                    *out = sum;
                }
            }
        }
    });
}

/// Multiplications and additions per work item, somewhat less than a tenth of a millisecond: enough to make handing it out cheap,
/// little enough to share even the smallest layers evenly.
const ITEM_FLOPS: usize = 8 << 20;

/// Floats of the input that one item reads, 256 KiB: they stay in a level-2 cache while the item's groups of weights
/// pass over them.
const SEGMENT: usize = 1 << 16;

/// Segments are multiples of the widest tile of every instruction set, so that only a sample's last one needs narrow
/// tiles.
const WIDEST: usize = 24;

/// Outputs from this number of floats on are written past the caches: no cache holds 32 MiB of them until they are read
/// again, and a line that is written whole need not be read first. Worth a tenth of the time of nnU-Net's last layer.
const STREAM_FROM: usize = 8 << 20;

/// Writes the transposed convolution of `p` to `out`.
fn run(kernels: &Kernels, p: &Problem<'_>, out: &mut [f32]) {
    let plan = Plan::new(kernels, p, out);
    par::for_each(plan.segments * p.geometry.batch * plan.parts, |i| plan.item(i));
}

/// Work is cut into segments of the input's voxels times parts of the groups of vectors. Tiles are not cut at the end of
/// a row: rows of the deepest levels are shorter than a tile.
struct Plan<'a> {
    p: &'a Problem<'a>,
    out: Shared,
    /// Write past the caches.
    stream: bool,
    /// Tile functions, wide ones first.
    tiles: &'a [(usize, TileFn)],
    /// Vectors per group: taps of one output block.
    width: usize,
    /// Voxels per segment, segments per sample.
    segment: usize,
    segments: usize,
    /// Groups in all and per part; parts.
    groups: usize,
    per_part: usize,
    parts: usize,
}

impl<'a> Plan<'a> {
    fn new(kernels: &'a Kernels, p: &'a Problem<'a>, out: &mut [f32]) -> Self {
        let g = &p.geometry;
        let voxels = g.voxels();
        let (tiles, width) = if g.taps() > 1 && !kernels.two.is_empty() { (kernels.two, 2) } else { (kernels.one, 1) };
        let segment = (SEGMENT / Layout::BLOCKED.padded(g.in_channels) / WIDEST).max(1) * WIDEST;
        let groups = g.blocks() * g.taps() / width;
        let flops = 2 * g.in_channels * width * BLOCK * segment.min(voxels);
        let parts = groups.div_ceil((ITEM_FLOPS / flops).max(1));
        let per_part = groups.div_ceil(parts);
        Self {
            p,
            // Streaming stores need aligned vectors; a tensor's memory is aligned.
            stream: out.len() >= STREAM_FROM && out.as_ptr().addr().is_multiple_of(4 * BLOCK),
            out: Shared::new(out),
            tiles,
            width,
            segment,
            segments: voxels.div_ceil(segment),
            groups,
            per_part,
            parts: groups.div_ceil(per_part),
        }
    }

    fn item(&self, i: usize) {
        let g = &self.p.geometry;
        let (part, i) = (i % self.parts, i / self.parts);
        let (segment, n) = (i % self.segments, i / self.segments);
        let first = segment * self.segment;
        let places: Vec<usize> = (first..g.voxels().min(first + self.segment)).map(|v| g.place(v)).collect();
        for group in part * self.per_part..self.groups.min((part + 1) * self.per_part) {
            self.group(n, group * self.width, first, &places);
        }
        if self.stream {
            tile::fence();
        }
    }

    /// All tiles of a segment for one group, whose first vector is `vector`.
    fn group(&self, n: usize, vector: usize, first: usize, places: &[usize]) {
        let g = &self.p.geometry;
        let (block, tap) = (vector / g.taps(), vector % g.taps());
        let (filter, channel) = g.weights(block, tap);
        let run = g.voxels() * BLOCK;
        let runs = g.in_channels.div_ceil(BLOCK);
        let out = self.out.ptr().wrapping_add((n * g.blocks() + block) * g.taps() * run);
        let mut tile = Tile {
            input: self.p.input[n * runs * run + first * BLOCK..].as_ptr(),
            run,
            runs,
            last: g.in_channels - (runs - 1) * BLOCK,
            filter: self.p.filter[filter..].as_ptr(),
            channel,
            bias: self.p.bias.map_or(std::ptr::null(), |b| b[block * BLOCK..].as_ptr()),
            out: out.wrapping_add(g.shift(tap)),
            places: places.as_ptr(),
            second: g.shift(tap + 1) - g.shift(tap),
            stream: self.stream,
        };
        let mut left = places.len();
        for &(width, f) in self.tiles {
            while left >= width {
                // SAFETY: input, filter and bias have the sizes of the problem (checked by the operation that built it);
                // tiles follow each other through the segment, with `width` voxels left of it; segments, groups and
                // samples have output voxels of their own; the output is aligned where `stream` says so; the list of
                // implementations offers this function only to devices with its instruction set.
                unsafe { f(&tile) };
                tile.input = tile.input.wrapping_add(width * BLOCK);
                tile.places = tile.places.wrapping_add(width);
                left -= width;
            }
        }
    }
}
