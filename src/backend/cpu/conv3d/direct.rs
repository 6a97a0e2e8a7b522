//! Direct convolution: which tiles cover the output, and in which order.

use super::tile::{Finish, Kernels, STEPS, Stream, Tile, TileFn};
use super::{Geometry, Problem, packed_place};
use crate::backend::cpu::Shared;
use crate::backend::cpu::moments::{Moments, moments};
use crate::base::par;
use crate::tensor::{BLOCK, Isa, Layout};

/// Multiplications and additions per work item, about a millisecond: enough to make handing it out cheap, little
/// enough to share evenly.
const ITEM_FLOPS: usize = 32 << 20;

/// A filter up to this size stays in a level-2 cache while all its output channels are computed item by item; of a
/// larger one, one group of output channels is carried over the whole output before the next.
const FILTER_IN_CACHE: usize = 512 << 10;

/// Longest piece of a row that is done in one go: a multiple of all tile widths. A pointwise convolution is one row.
const SEGMENT: usize = 480;

/// Writes the convolution of `p` to `out`; `filter` is the one of `p`. With `measure`, returns the moments of `[sample][output block]`.
pub(super) fn run(
    kernels: &Kernels,
    isa: Isa,
    p: &Problem<'_>,
    filter: &[f32],
    out: &mut [f32],
    measure: bool,
) -> Vec<Moments> {
    let plan = Plan::new(kernels, p, filter, out);
    if !measure {
        par::for_each(plan.items(), |i| plan.item(i));
        return Vec::new();
    }
    // What an item has written is still in the cache.
    let parts = par::map(plan.items(), |i| {
        plan.item(i);
        plan.written(i).map(|(n, block, x)| (n, block, moments(isa, x))).collect::<Vec<_>>()
    });
    let blocks = p.geometry.out_channels.div_ceil(BLOCK);
    let mut all = vec![Moments::default(); p.geometry.batch * blocks];
    for (n, block, m) in parts.into_iter().flatten() {
        let of = &mut all[n * blocks + block];
        *of = of.merge(m);
    }
    all
}

/// A tile in a segment: first voxel, width, function.
type Span = (usize, usize, TileFn);

/// The tiles of a full segment and of the last one of a row, for groups of one block and of two.
struct Cover {
    full: [Vec<Span>; 2],
    last: [Vec<Span>; 2],
}

struct Plan<'a> {
    p: &'a Problem<'a>,
    filter: &'a [f32],
    /// The problem's geometry, with axes merged where that changes nothing.
    g: Geometry,
    out: Shared,
    /// First output block and number of blocks of each group.
    groups: Vec<(usize, usize)>,
    cover: Cover,
    /// Segments per row, per sample, and per item. An item belongs to one sample.
    per_row: usize,
    segments: usize,
    per_item: usize,
    /// Groups are the outermost loop rather than the innermost.
    by_group: bool,
}

impl<'a> Plan<'a> {
    fn new(kernels: &Kernels, p: &'a Problem<'a>, filter: &'a [f32], out: &mut [f32]) -> Self {
        let mut g = p.geometry;
        let repeated = p.residual.is_some_and(|r| r.addend.is_some());
        if g.kernel == [1; 3] && g.stride == [1; 3] && !repeated {
            // Neighbourhood does not matter: one long row.
            g.input = [1, 1, g.input.iter().product()];
            g.output = g.input;
        }
        let blocks = g.out_channels.div_ceil(BLOCK);
        let pairs = if kernels.two.is_empty() { 0 } else { blocks / 2 };
        let groups: Vec<_> = (0..pairs).map(|i| (2 * i, 2)).chain((2 * pairs..blocks).map(|i| (i, 1))).collect();
        let blocked = p.sources.iter().all(|s| s.layout == Layout::BLOCKED);
        let step = g.stride[2] * if blocked { BLOCK } else { 1 };
        let step = STEPS.iter().position(|s| *s == step).unwrap_or(0);
        let [od, oh, ow] = g.output;
        let per_row = ow.div_ceil(SEGMENT);
        let cover = |len| [kernels.one, kernels.two].map(|widths| cover(widths, step, p.residual.is_some(), len));
        let by_group = filter.len() * 4 > FILTER_IN_CACHE;
        let taps: usize = g.kernel.iter().product();
        let lanes = BLOCK * if by_group { blocks.min(2) } else { blocks };
        let flops = 2 * taps * g.in_channels * lanes * ow.min(SEGMENT);
        Self {
            p,
            filter,
            g,
            out: Shared::new(out),
            groups,
            cover: Cover { full: cover(SEGMENT.min(ow)), last: cover(ow - (per_row - 1) * SEGMENT) },
            per_row,
            segments: od * oh * per_row,
            per_item: (ITEM_FLOPS / flops.max(1)).max(1),
            by_group,
        }
    }

    /// Items of one sample and one group, or of all groups together.
    fn ranges(&self) -> usize {
        self.segments.div_ceil(self.per_item)
    }

    fn items(&self) -> usize {
        self.g.batch * self.ranges() * if self.by_group { self.groups.len() } else { 1 }
    }

    /// Sample, groups and segments of an item. Groups are outermost, so that their filters stay in the cache.
    fn part(&self, i: usize) -> (usize, &[(usize, usize)], std::ops::Range<usize>) {
        let (n, range) = (i / self.ranges() % self.g.batch, i % self.ranges());
        let group = i / self.ranges() / self.g.batch;
        let groups = if self.by_group { &self.groups[group..=group] } else { &self.groups[..] };
        (n, groups, range * self.per_item..self.segments.min((range + 1) * self.per_item))
    }

    fn item(&self, i: usize) {
        let (n, groups, segments) = self.part(i);
        for segment in segments {
            for group in groups {
                self.segment(n, segment, *group);
            }
        }
    }

    /// Sample, block and values of what an item has written: its segments lie one after the other.
    fn written(&self, i: usize) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let (n, groups, segments) = self.part(i);
        let [od, oh, ow] = self.g.output;
        let voxel = |s: usize| s / self.per_row * ow + s % self.per_row * SEGMENT;
        let (first, last) = (voxel(segments.start), voxel(segments.end));
        let blocks = self.g.out_channels.div_ceil(BLOCK);
        groups.iter().flat_map(|(block, blocks)| *block..block + blocks).map(move |block| {
            let at = (n * blocks + block) * od * oh * ow;
            let values = self.out.ptr().wrapping_add((at + first) * BLOCK);
            // SAFETY: the item's own segments of this block, which it has just written and no one else touches.
            (n, block, unsafe { std::slice::from_raw_parts(values, (last - first) * BLOCK) })
        })
    }

    /// One piece of a row, for one group of output channels.
    fn segment(&self, n: usize, i: usize, (block, blocks): (usize, usize)) {
        let oh = self.g.output[1];
        let (part, row) = (i % self.per_row, i / self.per_row);
        let (z, y) = (row / oh, row % oh);
        let cover = if part + 1 == self.per_row { &self.cover.last } else { &self.cover.full };
        self.tiles(n, block, z, y, part * SEGMENT, &cover[blocks - 1]);
    }

    fn tiles(&self, n: usize, block: usize, z: usize, y: usize, first: usize, spans: &[Span]) {
        let g = &self.g;
        let [od, oh, ow] = g.output;
        let [kd, kh, kw] = g.kernel;
        let (filter, channel) = packed_place(&self.p.geometry, block);
        let all_blocks = g.out_channels.div_ceil(BLOCK);
        let out = (((n * all_blocks + block) * od + z) * oh + y) * ow * BLOCK;
        let mut tile = Tile {
            sources: [self.stream(0, n, z, y), self.stream(1, n, z, y)],
            filter: self.filter[filter..].as_ptr(),
            channel,
            tap: channel * g.filter_inputs,
            z: valid(z, kd, g.stride[0], g.padding[0], g.input[0]),
            y: valid(y, kh, g.stride[1], g.padding[1], g.input[1]),
            kernel: (kh, kw),
            left: false,
            right: false,
            out: self.out.ptr().wrapping_add(out),
            block: od * oh * ow * BLOCK,
            bias: self.p.bias.map_or(std::ptr::null(), |b| b[block * BLOCK..].as_ptr()),
            finish: self.finish(n, block, z, y),
        };
        let (starts, out) = (tile.sources.map(|s| s.start), tile.out);
        for &(x, width, f) in spans {
            let x = first + x;
            for (s, start) in tile.sources.iter_mut().zip(starts) {
                s.start = start.wrapping_add(x * g.stride[2] * s.lanes);
            }
            tile.left = x == 0 && g.padding[2] > 0;
            tile.right = (x + width - 1) * g.stride[2] + kw - 1 - g.padding[2] >= g.input[2];
            tile.out = out.wrapping_add(x * BLOCK);
            if let Some(f) = &mut tile.finish {
                f.x = x;
            }
            // Taps outside the input are excluded by `z`, `y`, `left` and `right`: padding is at most one, so at most one
            // voxel at either end of a row is concerned. The spans cover each segment once, and each segment belongs to
            // one item.
            // SAFETY: sources, filter, bias, and the vectors and addend of `finish` have the sizes of the problem, which
            // the operation checked; no one else writes these voxels; the device has the function's instruction set.
            unsafe { f(&tile) }
        }
    }

    /// What becomes of the results of a row.
    fn finish(&self, n: usize, block: usize, z: usize, y: usize) -> Option<Finish> {
        let r = self.p.residual?;
        let all = self.g.out_channels.div_ceil(BLOCK);
        let vector = |v: &[f32]| v[(n * all + block) * BLOCK..].as_ptr();
        let (addend, addend_block, factor) = match r.addend {
            Some((values, f)) => {
                let [d, h, w] = [0, 1, 2].map(|a| self.g.output[a] / f[a]);
                let row = (((n * all + block) * d + z / f[0]) * h + y / f[1]) * w * BLOCK;
                (values[row..].as_ptr(), d * h * w * BLOCK, f[2])
            }
            None => (std::ptr::null(), 0, 1),
        };
        let n = &r.norm;
        let (mean, scale, shift) = (vector(n.mean), vector(n.scale), vector(n.shift));
        Some(Finish { mean, scale, shift, slope: n.slope, addend, addend_block, factor, x: 0 })
    }

    /// Source `i` as the first tile of a row sees it.
    fn stream(&self, i: usize, n: usize, z: usize, y: usize) -> Stream {
        let g = &self.g;
        let [d, h, w] = g.input;
        let Some(s) = self.p.sources.get(i) else {
            return Stream { start: std::ptr::null(), run: 0, row: 0, slice: 0, runs: 0, lanes: 0, last: 0 };
        };
        let lanes = s.layout.block;
        let runs = s.channels.div_ceil(lanes);
        let (row, slice, run) = (w * lanes, h * w * lanes, d * h * w * lanes);
        let back = g.padding[0] * slice + g.padding[1] * row + g.padding[2] * lanes;
        let at = n * runs * run + z * g.stride[0] * slice + y * g.stride[1] * row;
        let start = s.data.as_ptr().wrapping_add(at).wrapping_sub(back);
        Stream { start, run, row, slice, runs, lanes, last: s.channels - (runs - 1) * lanes }
    }
}

/// Taps of output coordinate `at` that lie inside the input.
fn valid(at: usize, kernel: usize, stride: usize, padding: usize, input: usize) -> (usize, usize) {
    let first = at * stride;
    (padding.saturating_sub(first), kernel.min((input + padding).saturating_sub(first)))
}

/// Covers `len` voxels with the cheapest sequence of tiles, wide ones first.
fn cover(widths: &[(usize, [[TileFn; 2]; 4])], step: usize, finish: bool, len: usize) -> Vec<Span> {
    /// Time of a tile per tap and channel, in quarters of a voxel's: at least the latency of a sum, and some overhead.
    fn cost(width: usize) -> usize {
        4 * width.max(2) + 3
    }
    if widths.is_empty() {
        return Vec::new();
    }
    // Cheapest cost of each length and the last tile to use for it.
    let mut best = vec![(0, 0); len + 1];
    for n in 1..=len {
        let options = widths.iter().enumerate().filter(|(_, w)| w.0 <= n);
        best[n] = options.map(|(i, w)| (best[n - w.0].0 + cost(w.0), i)).min().unwrap_or((usize::MAX, 0));
    }
    let mut chosen = Vec::new();
    let mut left = len;
    while left > 0 {
        let (width, functions) = widths[best[left].1];
        chosen.push((width, functions[step][usize::from(finish)]));
        left -= width;
    }
    chosen.sort_by_key(|c| std::cmp::Reverse(c.0));
    let mut x = 0;
    let mut spans = Vec::with_capacity(chosen.len());
    for (width, function) in chosen {
        spans.push((x, width, function));
        x += width;
    }
    spans
}
