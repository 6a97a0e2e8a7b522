//! Direct convolution: which tiles cover the output, and in which order.

use super::tile::{Finish, Kernels, STEPS, Stream, Tile, TileFn};
use super::{Geometry, Problem, Source, Storage, packed_place};
use crate::backend::cpu::Shared;
use crate::backend::cpu::moments::{Moments, moments};
use crate::backend::cpu::stored::{SharedOut, store};
use crate::base::par;
use crate::tensor::{BLOCK, Isa, Layout, Precision, Stored, StoredMut};

/// Multiplications and additions per work item, about a millisecond: enough to make handing it out cheap, little
/// enough to share evenly.
pub(in crate::backend::cpu) const ITEM_FLOPS: usize = 32 << 20;

/// A filter up to this size stays in a level-2 cache while all its output channels are computed item by item; of a
/// larger one, one group of output channels is carried over the whole output before the next.
const FILTER_IN_CACHE: usize = 512 << 10;

/// Longest piece of a row that is done in one go: a multiple of all tile widths. A pointwise convolution is one row.
const SEGMENT: usize = 480;

/// What a thread holds as floats of what is stored as bf16: a segment of every source if any is, of the outputs of a group,
/// and rows of a residual block's addend for a group. Voxels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stage {
    sources: usize,
    outputs: usize,
    addend: usize,
}

impl Stage {
    pub(super) fn new(g: &Geometry, channels: &[usize], storage: Storage) -> Self {
        let halves = |p: Precision, voxels: usize| if p == Precision::Bf16 { voxels } else { 0 };
        let blocks: usize = channels.iter().map(|c| c.div_ceil(BLOCK)).sum();
        Self {
            sources: halves(storage.input, blocks * SEGMENT),
            outputs: halves(storage.output, 2 * SEGMENT),
            addend: halves(storage.addend, 2 * g.output[2]),
        }
    }

    /// Of a problem as it is.
    fn of(p: &Problem<'_>, output: Precision) -> Self {
        let channels: Vec<usize> = p.sources.iter().map(|s| s.channels).collect();
        let halves = p.sources.iter().any(|s| s.data.precision() == Precision::Bf16);
        let input = if halves { Precision::Bf16 } else { Precision::F32 };
        let addend = p.residual.and_then(|r| r.addend).map_or(Precision::F32, |a| a.0.precision());
        Self::new(&p.geometry, &channels, Storage { input, output, addend, in_place: false })
    }

    /// Floats.
    pub(super) fn len(self) -> usize {
        (self.sources + self.outputs + self.addend) * BLOCK
    }
}

/// Writes the convolution of `p` to `out`; `filter` is the one of `p`. With `measure`, returns the moments of
/// `[sample][output block]`. `stages` has [`Stage::len`] floats per thread. Sources stored as bf16 are for pointwise kernels.
pub(super) fn run(
    kernels: &Kernels,
    isa: Isa,
    p: &Problem<'_>,
    filter: &[f32],
    stages: &mut [f32],
    out: StoredMut<'_>,
    measure: bool,
) -> Vec<Moments> {
    // From what the problem is, so that no plan of another one can be too small.
    let stage = Stage::of(p, out.stored().precision());
    assert!(stages.len() >= stage.len() * rayon::current_num_threads(), "working memory for fewer threads");
    let halves_in = stage.sources > 0;
    assert!(!halves_in || p.geometry.kernel == [1; 3], "a kernel of several taps reads floats");
    let plan = Plan::new(kernels, isa, p, filter, (Shared::new(stages), stage), out);
    let parts = par::map(plan.items(), |i| plan.item(i, measure));
    if !measure {
        return Vec::new();
    }
    let blocks = p.geometry.out_channels.div_ceil(BLOCK);
    let mut all = vec![Moments::default(); p.geometry.batch * blocks];
    for (n, block, m) in parts.into_iter().flatten() {
        let of = &mut all[n * blocks + block];
        *of = of.merge(m);
    }
    all
}

/// A tile in a segment: first voxel, width, function.
pub(in crate::backend::cpu) type Span = (usize, usize, TileFn);

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
    isa: Isa,
    out: SharedOut,
    /// Sources are gathered as floats, segment by segment.
    halves_in: bool,
    /// One per thread: sources `[block][SEGMENT][BLOCK]`, outputs `[2][SEGMENT][BLOCK]`, addend `[2][row][BLOCK]`.
    stages: (Shared, Stage),
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
    fn new(
        kernels: &Kernels,
        isa: Isa,
        p: &'a Problem<'a>,
        filter: &'a [f32],
        stages: (Shared, Stage),
        out: StoredMut<'_>,
    ) -> Self {
        let halves_in = stages.1.sources > 0;
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
        let step = if halves_in { BLOCK } else { g.stride[2] * if blocked { BLOCK } else { 1 } };
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
            isa,
            out: SharedOut::new(out),
            halves_in,
            stages,
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

    /// Does an item; with `measure`, returns sample, block and moments of what it wrote, which is still in the cache.
    fn item(&self, i: usize, measure: bool) -> Vec<(usize, usize, Moments)> {
        let (n, groups, segments) = self.part(i);
        let mut parts: Vec<(usize, usize, Moments)> = Vec::new();
        for segment in segments {
            let row = Row::of(self, n, segment);
            let sources = self.sources(&row);
            for &(block, blocks) in groups {
                match self.out {
                    SharedOut::F32(out) => {
                        let start = out.ptr().wrapping_add(self.place(&row, block));
                        self.tiles(&row, sources, block, blocks, start, self.g.output.iter().product());
                    }
                    SharedOut::Bf16(out) => self.staged_tiles(&row, sources, block, blocks, out, |block, x| {
                        if measure {
                            let m = moments(self.isa, x);
                            match parts.iter_mut().find(|p| p.1 == block) {
                                Some(p) => p.2 = p.2.merge(m),
                                None => parts.push((n, block, m)),
                            }
                        }
                    }),
                }
            }
        }
        if let (true, SharedOut::F32(out)) = (measure, self.out) {
            parts.extend(self.written(i, out).map(|(n, block, x)| (n, block, moments(self.isa, x))));
        }
        parts
    }

    /// Sample, block and values of what an item has written: its segments lie one after the other.
    fn written(&self, i: usize, out: Shared) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let (n, groups, segments) = self.part(i);
        let [od, oh, ow] = self.g.output;
        let voxel = |s: usize| s / self.per_row * ow + s % self.per_row * SEGMENT;
        let (first, last) = (voxel(segments.start), voxel(segments.end));
        let blocks = self.g.out_channels.div_ceil(BLOCK);
        groups.iter().flat_map(|(block, blocks)| *block..block + blocks).map(move |block| {
            let at = (n * blocks + block) * od * oh * ow;
            let values = out.ptr().wrapping_add((at + first) * BLOCK);
            // SAFETY: the item's own segments of this block, which it has just written and no one else touches.
            (n, block, unsafe { std::slice::from_raw_parts(values, (last - first) * BLOCK) })
        })
    }

    /// Where in the output the first voxel of a piece of a row is.
    fn place(&self, row: &Row, block: usize) -> usize {
        let [od, oh, ow] = self.g.output;
        let blocks = self.g.out_channels.div_ceil(BLOCK);
        ((((row.n * blocks + block) * od + row.z) * oh + row.y) * ow + row.first) * BLOCK
    }

    /// One piece of a row, for one group of output channels, to `out`, whose blocks have `voxels`.
    fn tiles(&self, row: &Row, sources: [Stream; 2], block: usize, blocks: usize, out: *mut f32, voxels: usize) {
        let g = &self.g;
        let [kd, kh, kw] = g.kernel;
        let (filter, channel) = packed_place(&self.p.geometry, block);
        let mut tile = Tile {
            sources,
            filter: self.filter[filter..].as_ptr(),
            channel,
            tap: channel * g.filter_inputs,
            z: valid(row.z, kd, g.stride[0], g.padding[0], g.input[0]),
            y: valid(row.y, kh, g.stride[1], g.padding[1], g.input[1]),
            x: (0, kw),
            kernel: (kh, kw),
            left: false,
            right: false,
            out,
            voxel: BLOCK,
            block: voxels * BLOCK,
            bias: self.p.bias.map_or(std::ptr::null(), |b| b[block * BLOCK..].as_ptr()),
            finish: self.finish(row, block, blocks),
        };
        let step = if self.halves_in { 1 } else { g.stride[2] };
        for &(offset, width, f) in &self.spans(row)[blocks - 1] {
            let x = row.first + offset;
            for (s, first) in tile.sources.iter_mut().zip(sources) {
                s.start = first.start.wrapping_add(offset * step * s.lanes);
            }
            tile.left = x == 0 && g.padding[2] > 0;
            tile.right = (x + width - 1) * g.stride[2] + kw - 1 - g.padding[2] >= g.input[2];
            tile.out = out.wrapping_add(offset * BLOCK);
            if let Some(f) = &mut tile.finish {
                f.x = x;
            }
            // Taps outside the input are excluded by `z`, `y`, `left` and `right`: padding is at most one, so at most one
            // voxel at either end of a row is concerned. The spans cover each segment once, and each segment belongs to
            // one item.
            // SAFETY: sources, filter, bias, and the vectors and addend of `finish` have the sizes of the problem, which
            // the operation checked, or lie in this thread's stage; no one else writes these voxels; the device has the
            // function's instruction set.
            unsafe { f(&tile) }
        }
    }

    /// As [`Plan::tiles`], through floats in this thread's stage; `look` sees them before they are rounded.
    fn staged_tiles(
        &self,
        row: &Row,
        sources: [Stream; 2],
        block: usize,
        blocks: usize,
        out: Shared<u16>,
        mut look: impl FnMut(usize, &[f32]),
    ) {
        let start = self.stage(self.stages.1.sources);
        // What a block of the group holds in the output and in the stage.
        let each = |b: usize| {
            let to = out.ptr().wrapping_add(self.place(row, block + b));
            // SAFETY: this segment of the output belongs to this item, the stage to this thread, which has no other
            // reference to either now; both have so many voxels.
            unsafe {
                let floats = start.wrapping_add(b * SEGMENT * BLOCK);
                let floats = std::slice::from_raw_parts_mut(floats, row.len * BLOCK);
                (std::slice::from_raw_parts_mut(to, row.len * BLOCK), floats)
            }
        };
        if self.p.residual.is_some() {
            for (halves, floats) in (0..blocks).map(each) {
                Stored::Bf16(halves).widen(self.isa, 0, floats);
            }
        }
        self.tiles(row, sources, block, blocks, start, SEGMENT);
        for b in 0..blocks {
            let (halves, floats) = each(b);
            look(block + b, floats);
            store(self.isa, floats, StoredMut::Bf16(halves));
        }
    }

    fn spans(&self, row: &Row) -> &[Vec<Span>; 2] {
        if row.last { &self.cover.last } else { &self.cover.full }
    }

    /// Voxel `at` of this thread's stage.
    fn stage(&self, at: usize) -> *mut f32 {
        let thread = rayon::current_thread_index().unwrap_or(0);
        self.stages.0.ptr().wrapping_add(thread * self.stages.1.len() + at * BLOCK)
    }

    /// What becomes of the results of a row.
    fn finish(&self, row: &Row, block: usize, blocks: usize) -> Option<Finish> {
        let r = self.p.residual?;
        let all = self.g.out_channels.div_ceil(BLOCK);
        let vector = |v: &[f32]| v[(row.n * all + block) * BLOCK..].as_ptr();
        let (addend, addend_block, factor) = match r.addend {
            Some((values, f)) => {
                let [d, h, w] = [0, 1, 2].map(|a| self.g.output[a] / f[a]);
                let start = (((row.n * all + block) * d + row.z / f[0]) * h + row.y / f[1]) * w * BLOCK;
                let next = d * h * w * BLOCK;
                match values {
                    Stored::F32(values) => (values[start..].as_ptr(), next, f[2]),
                    Stored::Bf16(_) => {
                        let to = self.stage(self.stages.1.sources + self.stages.1.outputs);
                        for b in 0..blocks {
                            // SAFETY: after sources and outputs, the stage has two rows for the addend, and this thread
                            // no other reference to them.
                            let to = unsafe { std::slice::from_raw_parts_mut(to.add(b * w * BLOCK), w * BLOCK) };
                            values.widen(self.isa, start + b * next, to);
                        }
                        (to.cast_const(), w * BLOCK, f[2])
                    }
                }
            }
            None => (std::ptr::null(), 0, 1),
        };
        let n = &r.norm;
        let (mean, scale, shift) = (vector(n.mean), vector(n.scale), vector(n.shift));
        Some(Finish { mean, scale, shift, slope: n.slope, addend, addend_block, factor, x: 0 })
    }

    /// The sources as the first tile of a piece of a row sees them.
    fn sources(&self, row: &Row) -> [Stream; 2] {
        let mut staged = 0;
        [0, 1].map(|i| match self.p.sources.get(i) {
            None => Stream { start: std::ptr::null(), run: 0, row: 0, slice: 0, runs: 0, lanes: 0, last: 0 },
            Some(s) if self.halves_in => {
                let first = staged;
                staged += s.channels.div_ceil(BLOCK);
                self.gathered(s, row, self.stage(first * SEGMENT))
            }
            Some(s) => self.stream(s, row),
        })
    }

    /// A source in memory.
    fn stream(&self, s: &Source<'_>, at: &Row) -> Stream {
        let g = &self.g;
        let [d, h, w] = g.input;
        let Stored::F32(data) = s.data else { unreachable!("halves are gathered") };
        let lanes = s.layout.block;
        let runs = s.channels.div_ceil(lanes);
        let (row, slice, run) = (w * lanes, h * w * lanes, d * h * w * lanes);
        let back = g.padding[0] * slice + g.padding[1] * row + g.padding[2] * lanes;
        let [z, y, x] = [at.z * g.stride[0], at.y * g.stride[1], at.first * g.stride[2]];
        let first = at.n * runs * run + z * slice + y * row + x * lanes;
        let start = data.as_ptr().wrapping_add(first).wrapping_sub(back);
        Stream { start, run, row, slice, runs, lanes, last: s.channels - (runs - 1) * lanes }
    }

    /// The voxels of a blocked source that a pointwise kernel reads for a piece of a row, as floats one after the other.
    fn gathered(&self, s: &Source<'_>, at: &Row, to: *mut f32) -> Stream {
        let g = &self.g;
        let [d, h, w] = g.input;
        let runs = s.channels.div_ceil(BLOCK);
        let step = g.stride[2];
        for run in 0..runs {
            let first = (((at.n * runs + run) * d + at.z * g.stride[0]) * h + at.y * g.stride[1]) * w + at.first * step;
            // SAFETY: the stage has a segment for every channel block of the sources, and this thread no other
            // reference to this one.
            let to = unsafe { std::slice::from_raw_parts_mut(to.add(run * SEGMENT * BLOCK), at.len * BLOCK) };
            if step == 1 {
                s.data.widen(self.isa, first * BLOCK, to);
                continue;
            }
            for (x, to) in to.chunks_exact_mut(BLOCK).enumerate() {
                s.data.read((first + x * step) * BLOCK, to);
            }
        }
        let run = SEGMENT * BLOCK;
        Stream { start: to, run, row: 0, slice: 0, runs, lanes: BLOCK, last: s.channels - (runs - 1) * BLOCK }
    }
}

/// A piece of a row of the output.
struct Row {
    n: usize,
    z: usize,
    y: usize,
    /// First voxel and number of voxels.
    first: usize,
    len: usize,
    /// The last piece of its row.
    last: bool,
}

impl Row {
    /// The `i`-th piece of sample `n`.
    fn of(plan: &Plan<'_>, n: usize, i: usize) -> Self {
        let [_, oh, ow] = plan.g.output;
        let (part, row) = (i % plan.per_row, i / plan.per_row);
        let first = part * SEGMENT;
        let len = SEGMENT.min(ow - first);
        Self { n, z: row / oh, y: row % oh, first, len, last: part + 1 == plan.per_row }
    }
}

/// Taps of output coordinate `at` that lie inside the input.
fn valid(at: usize, kernel: usize, stride: usize, padding: usize, input: usize) -> (usize, usize) {
    let first = at * stride;
    (padding.saturating_sub(first), kernel.min((input + padding).saturating_sub(first)))
}

/// Covers `len` voxels with the cheapest sequence of tiles, wide ones first.
pub(in crate::backend::cpu) fn cover(
    widths: &[(usize, [[TileFn; 2]; 4])],
    step: usize,
    finish: bool,
    len: usize,
) -> Vec<Span> {
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
