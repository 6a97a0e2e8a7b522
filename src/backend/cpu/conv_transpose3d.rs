//! Transposed 3D convolution: the problem, the packed filter, the list of implementations and the reference; the kernels
//! for a filter whose size is its stride.
//!
//! Then no two input voxels reach the same output voxel, so this is a 1x1x1 convolution to taps x O channels whose results
//! are stored apart: output voxel `z * stride + k` of tap k. Vectors are pairs of taps of one output block where there
//! is an even number of taps. With stride 2 along x the two are neighbours in memory, and a tile fills a row without
//! gaps. Any other filter is in [`phases`], the way back of all of them in [`input_gradient`] and [`filter_gradient`].
//!
//! Packed filter: `[output block][tap pair][I][16 per tap]`; with an odd number of taps, `[output block][tap][I][16]`.

mod filter_gradient;
mod input_gradient;
mod phases;
mod tile;

use self::tile::{Kernels, Tile, TileFn};
use super::Shared;
use crate::backend::{Impl, no_implementation, pick};
use crate::base::par;
use crate::error::Result;
use crate::tensor::{BLOCK, Isa, Layout};

/// Sizes of a transposed convolution; nothing but the padding is zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) batch: usize,
    pub(crate) in_channels: usize,
    pub(crate) out_channels: usize,
    /// (D, H, W) of the input.
    pub(crate) input: [usize; 3],
    /// (D, H, W) of the output: `(input - 1) stride + kernel - 2 padding`, or more by less than the stride.
    pub(crate) output: [usize; 3],
    pub(crate) kernel: [usize; 3],
    pub(crate) stride: [usize; 3],
    pub(crate) padding: [usize; 3],
}

impl Geometry {
    fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Taps side by side in the packed filter.
    fn pair(&self) -> usize {
        if self.taps().is_multiple_of(2) { 2 } else { 1 }
    }

    /// Voxels of the input.
    fn voxels(&self) -> usize {
        self.input.iter().product()
    }

    /// Voxels of the output.
    fn out_voxels(&self) -> usize {
        self.output.iter().product()
    }

    /// Channel blocks of the input.
    fn in_blocks(&self) -> usize {
        self.in_channels.div_ceil(BLOCK)
    }

    /// Channel blocks of the output.
    fn blocks(&self) -> usize {
        self.out_channels.div_ceil(BLOCK)
    }

    /// Whether every input voxel becomes a block of output voxels of its own.
    fn is_apart(&self) -> bool {
        self.kernel == self.stride
            && self.padding == [0; 3]
            && (0..3).all(|a| self.output[a] == self.input[a] * self.stride[a])
    }

    /// Where in the filter a tap is.
    fn tap(&self, tap: usize) -> [usize; 3] {
        let [_, kh, kw] = self.kernel;
        [tap / (kh * kw), tap / kw % kh, tap % kw]
    }

    /// The output coordinate that an input coordinate reaches by a tap's, if that is inside.
    fn reached(&self, axis: usize, from: usize, tap: usize) -> Option<usize> {
        (from * self.stride[axis] + tap).checked_sub(self.padding[axis]).filter(|p| *p < self.output[axis])
    }

    /// Where, in an output block, the value of `tap` at input voxel `v` belongs, if that is inside.
    fn target(&self, v: usize, tap: usize) -> Option<usize> {
        let ([_, h, w], tap) = (self.input, self.tap(tap));
        let [z, y, x] = [v / (h * w), v / w % h, v % w];
        Some(self.output_at([self.reached(0, z, tap[0])?, self.reached(1, y, tap[1])?, self.reached(2, x, tap[2])?]))
    }

    /// Where, in an output block, the value of tap 0 at input voxel `v` belongs, without padding.
    fn place(&self, v: usize) -> usize {
        let [_, h, w] = self.input;
        self.output_at([v / (h * w) * self.stride[0], v / w % h * self.stride[1], v % w * self.stride[2]])
    }

    /// How far from there the value of `tap` is.
    fn shift(&self, tap: usize) -> usize {
        self.output_at(self.tap(tap))
    }

    fn output_at(&self, [z, y, x]: [usize; 3]) -> usize {
        ((z * self.output[1] + y) * self.output[2] + x) * BLOCK
    }

    /// Where the weights of a tap of an output block start, and the distance between input channels.
    fn weights(&self, block: usize, tap: usize) -> (usize, usize) {
        let pair = self.pair();
        let panel = (block * self.taps() + tap) / pair;
        (panel * self.in_channels * pair * BLOCK + tap % pair * BLOCK, pair * BLOCK)
    }

    /// Gathers, for `out.len() / 16` voxels of the input from `first` on, what the output block that starts at `block` has
    /// where `tap` puts them; zeros outside.
    fn gather(&self, block: &[f32], tap: usize, first: usize, out: &mut [f32]) {
        let ([_, h, w], tap) = (self.input, self.tap(tap));
        let (block, _) = block.as_chunks::<BLOCK>();
        let (mut out, _) = out.as_chunks_mut::<BLOCK>();
        let (mut row, mut x) = (first / w, first % w);
        while !out.is_empty() {
            let (now, rest) = out.split_at_mut(out.len().min(w - x));
            match (self.reached(0, row / h, tap[0]), self.reached(1, row % h, tap[1])) {
                (Some(z), Some(y)) => {
                    let line = &block[(z * self.output[1] + y) * self.output[2]..][..self.output[2]];
                    for (x, to) in (x..).zip(now) {
                        *to = self.reached(2, x, tap[2]).map_or([0.0; BLOCK], |x| line[x]);
                    }
                }
                _ => now.fill([0.0; BLOCK]),
            }
            (out, row, x) = (rest, row + 1, 0);
        }
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

pub(crate) static CONV_TRANSPOSE3D: &[Impl<Geometry, Run>] = &[
    #[cfg(target_arch = "x86_64")]
    Impl {
        name: "direct_avx512",
        isa: Isa::Avx512,
        supports: Geometry::is_apart,
        run: |p, o| run(&tile::AVX512, p, o),
    },
    #[cfg(target_arch = "x86_64")]
    Impl { name: "direct_avx2", isa: Isa::Avx2, supports: Geometry::is_apart, run: |p, o| run(&tile::AVX2, p, o) },
    Impl {
        name: "direct_scalar",
        isa: Isa::Scalar,
        supports: Geometry::is_apart,
        run: |p, o| run(&tile::SCALAR, p, o),
    },
    #[cfg(target_arch = "x86_64")]
    Impl { name: "phases_avx512", isa: Isa::Avx512, supports: any, run: |p, o| phases::run(&tile::AVX512, p, o) },
    #[cfg(target_arch = "x86_64")]
    Impl { name: "phases_avx2", isa: Isa::Avx2, supports: any, run: |p, o| phases::run(&tile::AVX2, p, o) },
    Impl { name: "phases_scalar", isa: Isa::Scalar, supports: any, run: |p, o| phases::run(&tile::SCALAR, p, o) },
    Impl { name: "reference", isa: Isa::Scalar, supports: any, run: reference },
];

fn any(_: &Geometry) -> bool {
    true
}

/// What both gradients of values are made of, all blocked but the packed filter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gradient<'a> {
    pub(crate) geometry: Geometry,
    pub(crate) input: &'a [f32],
    pub(crate) filter: &'a [f32],
    /// By the output.
    pub(crate) output: &'a [f32],
}

type Back = fn(Isa, &Gradient<'_>, &mut [f32], &mut [f32]);

/// The ways back to the input and to the filter, each with room to work and its result.
pub(crate) struct Ways {
    input: Back,
    filter: Back,
}

pub(crate) static GRADIENTS: &[Impl<Geometry, Ways>] = &[
    #[cfg(target_arch = "x86_64")]
    Impl { name: "direct_avx512", isa: Isa::Avx512, supports: any, run: DIRECT },
    #[cfg(target_arch = "x86_64")]
    Impl { name: "direct_avx2", isa: Isa::Avx2, supports: any, run: DIRECT },
    Impl { name: "direct_scalar", isa: Isa::Scalar, supports: any, run: DIRECT },
    Impl {
        name: "reference",
        isa: Isa::Scalar,
        supports: any,
        run: Ways { input: input_gradient::reference, filter: filter_gradient::reference },
    },
];

const DIRECT: Ways = Ways { input: input_gradient::run, filter: filter_gradient::run };

/// Floats of room that [`input_gradient`] and [`filter_gradient`] work in.
pub(crate) fn gradient_room(g: &Geometry) -> [usize; 2] {
    [input_gradient::room(g), filter_gradient::room(g)]
}

/// Writes the gradient by the input to `out`.
pub(crate) fn input_gradient(
    isa: Isa,
    name: Option<&str>,
    p: &Gradient<'_>,
    room: &mut [f32],
    out: &mut [f32],
) -> Result<()> {
    let i = pick(GRADIENTS, isa, &p.geometry, name).ok_or_else(|| no_implementation("conv_transpose3d", name))?;
    (i.run.input)(i.isa, p, room, out);
    Ok(())
}

/// Writes the gradient by the packed filter to `out`, in the filter's order.
pub(crate) fn filter_gradient(
    isa: Isa,
    name: Option<&str>,
    p: &Gradient<'_>,
    room: &mut [f32],
    out: &mut [f32],
) -> Result<()> {
    let i = pick(GRADIENTS, isa, &p.geometry, name).ok_or_else(|| no_implementation("conv_transpose3d", name))?;
    (i.run.filter)(i.isa, p, room, out);
    Ok(())
}

/// Writes the transposed convolution of `p` to `out`, pad lanes too.
pub(crate) fn forward(isa: Isa, name: Option<&str>, p: &Problem<'_>, out: &mut [f32]) -> Result<()> {
    let i =
        pick(CONV_TRANSPOSE3D, isa, &p.geometry, name).ok_or_else(|| no_implementation("conv_transpose3d", name))?;
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
    let pair = if taps.is_multiple_of(2) { 2 } else { 1 };
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
    let pair = if taps.is_multiple_of(2) { 2 } else { 1 };
    par::chunks_mut(out, o * taps, |c, out| {
        for (channel, out) in out.chunks_exact_mut(taps).enumerate() {
            let start = channel / BLOCK * i * taps * BLOCK + channel % BLOCK;
            for (t, v) in out.iter_mut().enumerate() {
                *v = packed[start + ((t / pair * i + c) * pair + t % pair) * BLOCK];
            }
        }
    });
}

/// The definition: every input voxel's products, one tap after the other.
fn reference(p: &Problem<'_>, out: &mut [f32]) {
    let g = &p.geometry;
    let (voxels, blocks) = (g.voxels(), g.blocks());
    par::chunks_mut(out, g.out_voxels() * BLOCK, |i, out| {
        let (n, block) = (i / blocks, i % blocks);
        let input = &p.input[n * g.in_blocks() * BLOCK * voxels..];
        let bias = p.bias.map_or([0.0; BLOCK], |b| b.as_chunks::<BLOCK>().0[block]);
        out.as_chunks_mut::<BLOCK>().0.fill(bias);
        for tap in 0..g.taps() {
            let (weights, channel) = g.weights(block, tap);
            for v in 0..voxels {
                let Some(to) = g.target(v, tap) else { continue };
                for (lane, out) in out[to..to + BLOCK].iter_mut().enumerate() {
                    for c in 0..g.in_channels {
                        let x = input[(c / BLOCK * voxels + v) * BLOCK + c % BLOCK];
                        *out += x * p.filter[weights + c * channel + lane];
                    }
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

/// Voxels of a segment, of so many floats each.
fn segment(floats: usize) -> usize {
    (SEGMENT / floats / WIDEST).max(1) * WIDEST
}

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
        let (tiles, width) = if g.pair() > 1 && !kernels.two.is_empty() { (kernels.two, 2) } else { (kernels.one, 1) };
        let segment = segment(Layout::BLOCKED.padded(g.in_channels));
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
        let runs = g.in_blocks();
        let out = self.out.ptr().wrapping_add((n * g.blocks() + block) * g.taps() * run);
        let tile = Tile {
            input: self.p.input[n * runs * run + first * BLOCK..].as_ptr(),
            run,
            runs,
            last: g.in_channels - (runs - 1) * BLOCK,
            filter: self.p.filter[filter..].as_ptr(),
            channel,
            bias: self.p.bias.map_or(std::ptr::null(), |b| b[block * BLOCK..].as_ptr()),
            add: false,
            out: out.wrapping_add(g.shift(tap)),
            places: places.as_ptr(),
            second: if self.width > 1 { g.shift(tap + 1) - g.shift(tap) } else { 0 },
            stream: self.stream,
        };
        // SAFETY: input, filter and bias have the sizes of the problem (checked by the operation that built it); tiles
        // follow each other through the segment; segments, groups and samples have output voxels of their own; the output
        // is aligned where `stream` says so; the list of implementations offers these functions only to devices with
        // their instruction set.
        unsafe { tile.row(self.tiles, places.len()) };
    }
}
