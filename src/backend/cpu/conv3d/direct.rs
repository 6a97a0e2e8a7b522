//! Direct convolution: which tiles cover the output, and in which order.

use super::tile::{Kernels, STEPS, Stream, Tile, TileFn};
use super::{Geometry, Problem, packed_place};
use crate::backend::cpu::Shared;
use crate::base::par;
use crate::tensor::{BLOCK, Layout};

/// Multiplications and additions per work item, about a millisecond: enough to make handing it out cheap, little
/// enough to share evenly.
const ITEM_FLOPS: usize = 32 << 20;

/// A filter up to this size stays in a level-2 cache while all its output channels are computed item by item; of a
/// larger one, one group of output channels is carried over the whole output before the next.
const FILTER_IN_CACHE: usize = 512 << 10;

/// Longest piece of a row that is one piece of work: a multiple of all tile widths.
const SEGMENT: usize = 480;

/// Writes the convolution of `p` to `out`.
pub(super) fn run(kernels: &Kernels, p: &Problem<'_>, out: &mut [f32]) {
    let plan = Plan::new(kernels, p, out);
    par::for_each(plan.items(), |i| plan.item(i));
}

/// A tile in a row: first voxel, width, function.
type Span = (usize, usize, TileFn);

struct Plan<'a> {
    p: &'a Problem<'a>,
    /// The problem's geometry, with axes merged where that changes nothing.
    g: Geometry,
    out: Shared,
    /// First output block and number of blocks of each group, and the tiles of each row segment.
    groups: Vec<(usize, usize)>,
    one: Vec<Vec<Span>>,
    two: Vec<Vec<Span>>,
    /// Rows per item; items per slice.
    rows: usize,
    strips: usize,
    /// Groups are the outermost loop rather than the innermost.
    by_group: bool,
}

impl<'a> Plan<'a> {
    fn new(kernels: &Kernels, p: &'a Problem<'a>, out: &mut [f32]) -> Self {
        let mut g = p.geometry;
        if g.kernel == [1; 3] && g.stride == [1; 3] {
            // Neighbourhood does not matter: one long row.
            g.input = [1, 1, g.input.iter().product()];
            g.output = g.input;
        }
        let blocks = g.out_channels.div_ceil(BLOCK);
        let pairs = if kernels.two.is_empty() { 0 } else { blocks / 2 };
        let groups = (0..pairs).map(|i| (2 * i, 2)).chain((2 * pairs..blocks).map(|i| (i, 1))).collect();
        let blocked = p.sources.iter().all(|s| s.layout == Layout::BLOCKED);
        let step = g.stride[2] * if blocked { BLOCK } else { 1 };
        let step = STEPS.iter().position(|s| *s == step).unwrap_or(0);
        let cover = |widths: &[(usize, [TileFn; 4])]| {
            let starts = (0..g.output[2]).step_by(SEGMENT);
            starts.map(|x| cover(widths, step, x, SEGMENT.min(g.output[2] - x))).collect::<Vec<_>>()
        };
        let taps: usize = g.kernel.iter().product();
        let row_flops = 2 * taps * g.in_channels * blocks * BLOCK * g.output[2].min(SEGMENT);
        let rows = (ITEM_FLOPS / row_flops.max(1)).clamp(1, g.output[1]);
        Self {
            p,
            g,
            out: Shared::new(out),
            groups,
            one: cover(kernels.one),
            two: cover(kernels.two),
            rows,
            strips: g.output[1].div_ceil(rows),
            by_group: p.filter.len() * 4 > FILTER_IN_CACHE,
        }
    }

    fn segments(&self) -> usize {
        self.one.len()
    }

    /// Pieces of work of one group.
    fn places(&self) -> usize {
        self.g.batch * self.g.output[0] * self.strips * self.segments()
    }

    fn items(&self) -> usize {
        self.places() * if self.by_group { self.groups.len() } else { 1 }
    }

    fn item(&self, i: usize) {
        let places = self.places();
        if self.by_group {
            self.strip(self.groups[i / places], i % places);
        } else {
            for group in &self.groups {
                self.strip(*group, i);
            }
        }
    }

    /// Some rows of one slice, for one group of output channels.
    fn strip(&self, (block, blocks): (usize, usize), place: usize) {
        let g = &self.g;
        let (segment, place) = (place % self.segments(), place / self.segments());
        let (strip, place) = (place % self.strips, place / self.strips);
        let (z, n) = (place % g.output[0], place / g.output[0]);
        let spans = if blocks == 2 { &self.two[segment] } else { &self.one[segment] };
        for y in strip * self.rows..g.output[1].min((strip + 1) * self.rows) {
            self.row(n, block, z, y, spans);
        }
    }

    fn row(&self, n: usize, block: usize, z: usize, y: usize, spans: &[Span]) {
        let g = &self.g;
        let [od, oh, ow] = g.output;
        let [kd, kh, kw] = g.kernel;
        let (filter, channel) = packed_place(&self.p.geometry, block);
        let all_blocks = g.out_channels.div_ceil(BLOCK);
        let out = (((n * all_blocks + block) * od + z) * oh + y) * ow * BLOCK;
        let mut tile = Tile {
            sources: [self.stream(0, n, z, y), self.stream(1, n, z, y)],
            filter: self.p.filter[filter..].as_ptr(),
            channel,
            tap: channel * g.in_channels,
            z: valid(z, kd, g.stride[0], g.padding[0], g.input[0]),
            y: valid(y, kh, g.stride[1], g.padding[1], g.input[1]),
            kernel: (kh, kw),
            left: false,
            right: false,
            out: self.out.ptr().wrapping_add(out),
            block: od * oh * ow * BLOCK,
            bias: self.p.bias.map_or(std::ptr::null(), |b| b[block * BLOCK..].as_ptr()),
        };
        let (starts, out) = (tile.sources.map(|s| s.start), tile.out);
        for &(x, width, f) in spans {
            for (s, start) in tile.sources.iter_mut().zip(starts) {
                s.start = start.wrapping_add(x * g.stride[2] * voxel(s));
            }
            tile.left = x == 0 && g.padding[2] > 0;
            tile.right = (x + width - 1) * g.stride[2] + kw - 1 - g.padding[2] >= g.input[2];
            tile.out = out.wrapping_add(x * BLOCK);
            // SAFETY: the sources, the filter and the bias have the sizes of the problem (checked by the operation
            // that built it); taps outside the input are excluded by `z`, `y`, `left` and `right` (padding is at most
            // one, so at most one voxel at either end of a row is concerned); the spans cover each row once and each
            // row belongs to one item, so no one else writes there; the list of implementations offers this function
            // only to devices with its instruction set.
            unsafe { f(&tile) }
        }
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

/// Floats between neighbouring input voxels.
fn voxel(s: &Stream) -> usize {
    s.lanes
}

/// Taps of output coordinate `at` that lie inside the input.
fn valid(at: usize, kernel: usize, stride: usize, padding: usize, input: usize) -> (usize, usize) {
    let first = at * stride;
    (padding.saturating_sub(first), kernel.min((input + padding).saturating_sub(first)))
}

/// Covers `len` voxels from `x` with the cheapest sequence of tiles, wide ones first.
fn cover(widths: &[(usize, [TileFn; 4])], step: usize, mut x: usize, len: usize) -> Vec<Span> {
    /// A tile's time per tap and channel in units of a fourth of a voxel's: overhead, and the latency of a sum's chain.
    fn cost(width: usize) -> usize {
        4 * width.max(2) + 3
    }
    if widths.is_empty() {
        return Vec::new();
    }
    let mut best = vec![(0, 0); len + 1];
    for n in 1..=len {
        let options = widths.iter().enumerate().filter(|(_, w)| w.0 <= n);
        best[n] = options.map(|(i, w)| (best[n - w.0].0 + cost(w.0), i)).min().unwrap_or((usize::MAX, 0));
    }
    let mut spans = Vec::new();
    let mut left = len;
    while left > 0 {
        let (width, functions) = widths[best[left].1];
        spans.push((width, functions[step]));
        left -= width;
    }
    spans.sort_by_key(|s| std::cmp::Reverse(s.0));
    let mut place = |(width, f): (usize, TileFn)| {
        x += width;
        (x - width, width, f)
    };
    spans.into_iter().map(&mut place).collect()
}
