//! The way back to the input: a convolution of the output's gradient, with the filter's stride.
//!
//! Voxels of a segment gather what all taps made of them, side by side as channels, so that what is left is a 1x1x1
//! convolution of taps x O channels, by the tiles of the way forward. The filter is turned around for it:
//! `[block or two of I][tap][O padded][16 per block]`.

use super::tile::{self, Kernels, Tile, TileFn};
use super::{Geometry, Gradient, ITEM_FLOPS, segment};
use crate::backend::cpu::Shared;
use crate::base::par;
use crate::tensor::{BLOCK, Isa};

/// Floats of the filter turned around.
pub(super) fn room(g: &Geometry) -> usize {
    g.in_blocks() * BLOCK * depth(g)
}

/// Channels of the 1x1x1 convolution.
fn depth(g: &Geometry) -> usize {
    g.taps() * g.blocks() * BLOCK
}

fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &tile::AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &tile::AVX2,
        _ => &tile::SCALAR,
    }
}

/// Writes the gradient by the input to `out`, pad lanes too.
pub(super) fn run(isa: Isa, p: &Gradient<'_>, room: &mut [f32], out: &mut [f32]) {
    let g = &p.geometry;
    let kernels = kernels(isa);
    let width = if kernels.two.is_empty() { 1 } else { 2 };
    let filter = &mut room[..self::room(g)];
    par::chunks_mut(filter, width * BLOCK * depth(g), |group, out| turn(p, group * width, out));
    let filter = &*filter;
    let segment = segment(depth(g));
    let groups = g.in_blocks().div_ceil(width);
    let flops = 2 * depth(g) * width * BLOCK * segment.min(g.voxels());
    let parts = groups.div_ceil((ITEM_FLOPS / flops).max(1));
    let plan = Plan {
        p,
        filter,
        out: Shared::new(out),
        kernels,
        width,
        segment,
        segments: g.voxels().div_ceil(segment),
        groups,
        per_part: groups.div_ceil(parts),
        places: (0..segment).map(|v| v * BLOCK).collect(),
    };
    let parts = groups.div_ceil(plan.per_part);
    let items = plan.segments * g.batch * parts;
    par::for_each_with(items, Vec::new, |taps, i| plan.item(taps, i / parts, i % parts));
}

/// The filter of the input blocks from `first` on, as many as `out` has room for.
fn turn(p: &Gradient<'_>, first: usize, out: &mut [f32]) {
    let g = &p.geometry;
    let width = out.len() / (BLOCK * depth(g));
    let lanes = BLOCK * g.blocks();
    for (row, out) in out.chunks_exact_mut(width * BLOCK).enumerate() {
        let (tap, o) = (row / lanes, row % lanes);
        let (start, channel) = g.weights(o / BLOCK, tap);
        for (lane, out) in out.iter_mut().enumerate() {
            let c = first * BLOCK + lane;
            *out = if c < g.in_channels { p.filter[start + c * channel + o % BLOCK] } else { 0.0 };
        }
    }
}

/// Work is cut into segments of the input's voxels times parts of its channel blocks.
struct Plan<'a> {
    p: &'a Gradient<'a>,
    filter: &'a [f32],
    out: Shared,
    kernels: &'a Kernels,
    /// Channel blocks of a group.
    width: usize,
    /// Voxels per segment, segments per sample.
    segment: usize,
    segments: usize,
    /// Groups in all and per part.
    groups: usize,
    per_part: usize,
    /// Of the voxels of a segment in a channel block.
    places: Vec<usize>,
}

impl Plan<'_> {
    fn item(&self, taps: &mut Vec<f32>, i: usize, part: usize) {
        let g = &self.p.geometry;
        let (n, first) = (i / self.segments, i % self.segments * self.segment);
        let voxels = self.segment.min(g.voxels() - first);
        let run = voxels * BLOCK;
        taps.resize(g.taps() * g.blocks() * run, 0.0);
        for (i, to) in taps.chunks_exact_mut(run).enumerate() {
            let (tap, block) = (i / g.blocks(), i % g.blocks());
            g.gather(&self.p.output[(n * g.blocks() + block) * g.out_voxels() * BLOCK..], tap, first, to);
        }
        for group in part * self.per_part..self.groups.min((part + 1) * self.per_part) {
            let block = group * self.width;
            let width = self.width.min(g.in_blocks() - block);
            let tiles: &[(usize, TileFn)] = if width == 2 { self.kernels.two } else { self.kernels.one };
            let tile = Tile {
                input: taps.as_ptr(),
                run,
                runs: g.taps() * g.blocks(),
                last: BLOCK,
                filter: self.filter[block * BLOCK * depth(g)..].as_ptr(),
                channel: width * BLOCK,
                bias: std::ptr::null(),
                add: false,
                out: self.out.ptr().wrapping_add(((n * g.in_blocks() + block) * g.voxels() + first) * BLOCK),
                places: self.places.as_ptr(),
                second: g.voxels() * BLOCK,
                stream: false,
            };
            // SAFETY: `taps` holds a segment of every tap's blocks, the turned filter a row of `width` blocks for each of
            // their lanes, `places` a segment's; segments, groups and samples have output voxels of their own; the list of
            // implementations offers these functions only to devices with their instruction set.
            unsafe { tile.row(tiles, voxels) };
        }
    }
}

/// The definition, one value at a time.
pub(super) fn reference(_: Isa, p: &Gradient<'_>, _: &mut [f32], out: &mut [f32]) {
    let g = &p.geometry;
    let (in_blocks, blocks) = (g.in_blocks(), g.blocks());
    par::chunks_mut(out, g.voxels() * BLOCK, |i, out| {
        let (n, first) = (i / in_blocks, i % in_blocks * BLOCK);
        for (v, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            out.fill(0.0);
            for tap in 0..g.taps() {
                let Some(at) = g.target(v, tap) else { continue };
                for o in 0..g.out_channels {
                    let dy = p.output[(n * blocks + o / BLOCK) * g.out_voxels() * BLOCK + at + o % BLOCK];
                    let (start, channel) = g.weights(o / BLOCK, tap);
                    for (lane, out) in out.iter_mut().enumerate().take(g.in_channels - first.min(g.in_channels)) {
                        *out += dy * p.filter[start + (first + lane) * channel + o % BLOCK];
                    }
                }
            }
        }
    });
}
