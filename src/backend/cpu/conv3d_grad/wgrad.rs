//! The weights' gradient as sums over voxels, tap by tap, of products of inputs with gradients of outputs.
//!
//! The outputs are cut into chunks whose values stay in a level-2 cache for all taps. Where there are few weights, pieces
//! of the outputs have sums of their own, put together in a fixed order.

use std::ops::Range;

use super::Wgrad;
use super::outer::{Outer, OuterFn, cover};
use crate::backend::cpu::Shared;
use crate::backend::cpu::conv3d::{Geometry, Source, packed_place};
use crate::base::par;
use crate::tensor::{BLOCK, Isa, Layout, Stored};

/// Voxels of a chunk of outputs: two blocks of so many lie in a level-2 cache.
const CHUNK: usize = 2048;

/// Voxels whose inputs and gradients stay in a level-1 cache for all channels and the taps of a row. From a level-2 cache
/// the sums would wait: they take 128 bytes for every six multiply-adds.
pub(in crate::backend::cpu) const NEAR: usize = 128;

/// Work items, at least, for processors of many cores.
const ITEMS: usize = 64;

/// How a problem is cut.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Channel blocks of all inputs together, and of the output.
    in_blocks: usize,
    out_blocks: usize,
    taps: usize,
    /// Slices and rows of a chunk of outputs, and how many chunks a sample has along each.
    chunk: [usize; 2],
    chunks: [usize; 2],
    pieces: usize,
    /// Floats that each thread takes to read a chunk of a source that is not in memory as it is seen.
    stage: usize,
}

impl Plan {
    /// `lazy`: some source is normalised or repeated while it is read, or stored as bf16.
    pub(super) fn new(g: &Geometry, channels: &[usize], lazy: bool) -> Self {
        let [d, h, w] = g.output;
        let rows = (CHUNK / w).max(1);
        // A chunk's taps reach into neighbouring slices and rows: about as many of one as of the other.
        let z = d.min((rows as f64).sqrt() as usize).max(1);
        let y = h.min(rows / z).max(1);
        let z = d.min(rows / y).max(1);
        let chunks = [d.div_ceil(z), h.div_ceil(y)];
        let in_blocks: usize = channels.iter().map(|c| c.div_ceil(BLOCK)).sum();
        let out_blocks = g.out_channels.div_ceil(BLOCK);
        let pieces = ITEMS.div_ceil(in_blocks * out_blocks).min(g.batch * chunks[0] * chunks[1]);
        let reach = |axis: usize, n: usize| ((n - 1) * g.stride[axis] + g.kernel[axis]).min(g.input[axis]);
        // One row more, in which halves become floats.
        let stage = if lazy { (reach(0, z) * reach(1, y) + 1) * g.input[2] * BLOCK } else { 0 };
        Self { in_blocks, out_blocks, taps: g.kernel.iter().product(), chunk: [z, y], chunks, pieces, stage }
    }

    /// Floats of a piece's sums: `[input block][output block][tap][16][16]`.
    fn sums(&self) -> usize {
        self.in_blocks * self.out_blocks * self.taps * BLOCK * BLOCK
    }

    /// Floats of all pieces' sums, if they are not those of the whole.
    fn partials(&self) -> usize {
        if self.pieces > 1 { self.pieces * self.sums() } else { 0 }
    }

    /// Floats of working memory for `threads` threads.
    pub(super) fn workspace(&self, threads: usize) -> usize {
        self.partials() + threads * self.stage
    }
}

/// Multiply-adds of 16 weights, at the share of the peak that the sums reach.
pub(super) fn cycles(g: &Geometry, channels: &[usize]) -> f64 {
    let taps: f64 =
        (0..3).map(|a| (0..g.kernel[a]).map(|k| outputs(g, a, k, 0..g.output[a]).len() as f64).sum::<f64>()).product();
    // A single channel takes two loads for each multiply-add.
    let lanes: usize = channels.iter().map(|c| if *c == 1 { 2 } else { *c }).sum();
    taps * (g.batch * lanes * g.out_channels.div_ceil(BLOCK)) as f64 / 0.85
}

/// Those of the outputs `of` whose tap `k` meets an input, along one axis.
fn outputs(g: &Geometry, axis: usize, k: usize, of: Range<usize>) -> Range<usize> {
    let (s, p) = (g.stride[axis], g.padding[axis]);
    let first = of.start.max(p.saturating_sub(k).div_ceil(s));
    let end = (g.input[axis] + p).saturating_sub(k).div_ceil(s);
    first..of.end.min(end).max(first)
}

/// One channel block of a source: source, block in it, and the first of its channels among all.
type Inputs = (usize, usize, usize);

struct Job<'a> {
    plan: &'a Plan,
    p: &'a Wgrad<'a>,
    isa: Isa,
    inputs: Vec<Inputs>,
    /// Sums of pieces, and then each thread's stage.
    work: Shared,
    dw: Shared,
}

/// Where the sums of one pair of blocks are: the first, and floats between channels and between taps.
#[derive(Clone, Copy)]
struct Sums {
    start: *mut f32,
    channel: usize,
    tap: usize,
}

/// A source's values in memory: the first channel of voxel (0, 0, 0) of one channel block, floats between slices, rows and
/// voxels, and between channels.
#[derive(Clone, Copy)]
struct View {
    start: *const f32,
    step: [usize; 3],
    channel: usize,
}

/// Writes the gradient of `p` to its place in `dw`; `work` has [`Plan::workspace`] floats for the threads of the pool.
pub(super) fn run(plan: &Plan, isa: Isa, p: &Wgrad<'_>, work: &mut [f32], dw: &mut [f32]) {
    assert!(work.len() >= plan.workspace(rayon::current_num_threads()), "working memory for fewer threads");
    let mut inputs = Vec::new();
    let mut first = 0;
    for (i, s) in p.sources.iter().enumerate() {
        inputs.extend((0..s.channels.div_ceil(BLOCK)).map(|b| (i, b, first + b * BLOCK)));
        first += s.channels;
    }
    let job = Job { plan, p, isa, inputs, work: Shared::new(work), dw: Shared::new(dw) };
    let pairs = plan.in_blocks * plan.out_blocks;
    par::for_each(plan.pieces * pairs, |i| job.sums(i / pairs, i % pairs));
    if plan.pieces > 1 {
        par::for_each(pairs * plan.taps, |i| job.reduce(i / plan.taps, i % plan.taps));
    }
}

impl Job<'_> {
    /// The channels of a pair of blocks that exist.
    fn channels(&self, pair: usize) -> usize {
        let (source, block, _) = self.inputs[pair / self.plan.out_blocks];
        BLOCK.min(self.p.sources[source].channels - block * BLOCK)
    }

    /// Where in the result a pair's sums belong.
    fn place(&self, pair: usize) -> Sums {
        let g = &self.p.geometry;
        let (place, width) = packed_place(g, pair % self.plan.out_blocks);
        let first = self.inputs[pair / self.plan.out_blocks].2;
        let start = self.dw.ptr().wrapping_add(place + first * width);
        Sums { start, channel: width, tap: g.filter_inputs * width }
    }

    /// Where a piece has its own.
    fn partial(&self, piece: usize, pair: usize) -> Sums {
        let at = piece * self.plan.sums() + pair * self.plan.taps * BLOCK * BLOCK;
        Sums { start: self.work.ptr().wrapping_add(at), channel: BLOCK, tap: BLOCK * BLOCK }
    }

    /// The sums of a piece of the outputs for one pair of blocks.
    fn sums(&self, piece: usize, pair: usize) {
        let plan = self.plan;
        let whole = plan.pieces == 1;
        let to = if whole { self.place(pair) } else { self.partial(piece, pair) };
        let channels = self.channels(pair);
        if !whole || !self.p.add {
            for (tap, c) in (0..plan.taps).flat_map(|t| (0..channels).map(move |c| (t, c))) {
                // SAFETY: the pair's sums belong to this item.
                unsafe { block(to.start.wrapping_add(tap * to.tap + c * to.channel)).fill(0.0) }
            }
        }
        let (source, part, _) = self.inputs[pair / plan.out_blocks];
        let apart = self.p.sources[source].layout == Layout::PLAIN;
        let kernels = cover(self.isa, channels, apart);
        let all = self.p.geometry.batch * plan.chunks[0] * plan.chunks[1];
        for chunk in all * piece / plan.pieces..all * (piece + 1) / plan.pieces {
            let (sample, i) = (chunk / (plan.chunks[0] * plan.chunks[1]), chunk % (plan.chunks[0] * plan.chunks[1]));
            let range = |axis: usize, i: usize| {
                let n = plan.chunk[axis];
                i * n..self.p.geometry.output[axis].min((i + 1) * n)
            };
            let of = [range(0, i / plan.chunks[1]), range(1, i % plan.chunks[1])];
            let view = self.view(&self.p.sources[source], sample, part, &of);
            self.chunk(&view, sample, pair % plan.out_blocks, &of, &kernels, to);
        }
    }

    /// Adds the products of a chunk of outputs, some rows at a time.
    fn chunk(
        &self,
        view: &View,
        sample: usize,
        out_block: usize,
        of: &[Range<usize>; 2],
        kernels: &[(usize, OuterFn)],
        to: Sums,
    ) {
        let rows = (NEAR / self.p.geometry.output[2]).clamp(1, of[1].len());
        let slices = (NEAR / (rows * self.p.geometry.output[2])).max(1);
        for z in of[0].clone().step_by(slices) {
            for y in of[1].clone().step_by(rows) {
                let near = [z..of[0].end.min(z + slices), y..of[1].end.min(y + rows)];
                self.rows(view, sample, out_block, &near, kernels, to);
            }
        }
    }

    /// Adds the products of some rows of outputs, tap by tap.
    fn rows(
        &self,
        view: &View,
        sample: usize,
        out_block: usize,
        of: &[Range<usize>; 2],
        kernels: &[(usize, OuterFn)],
        to: Sums,
    ) {
        let g = &self.p.geometry;
        let [od, oh, ow] = g.output;
        let dy = (sample * self.plan.out_blocks + out_block) * od * oh * ow * BLOCK;
        for tap in 0..self.plan.taps {
            let [_, kh, kw] = g.kernel;
            let k = [tap / (kh * kw), tap / kw % kh, tap % kw];
            let outputs =
                [outputs(g, 0, k[0], of[0].clone()), outputs(g, 1, k[1], of[1].clone()), outputs(g, 2, k[2], 0..ow)];
            if outputs.iter().any(Range::is_empty) {
                continue;
            }
            let at = [0, 1, 2].map(|a| outputs[a].start * g.stride[a] + k[a] - g.padding[a]);
            let x = view.start.wrapping_add((0..3).map(|a| at[a] * view.step[a]).sum());
            let first = (outputs[0].start * oh + outputs[1].start) * ow + outputs[2].start;
            for &(channel, function) in kernels {
                let sum = Outer {
                    x: x.wrapping_add(channel * view.channel),
                    x_step: [0, 1, 2].map(|a| g.stride[a] * view.step[a]),
                    y: self.p.dy[dy + first * BLOCK..].as_ptr(),
                    y_step: [oh * ow * BLOCK, ow * BLOCK, BLOCK],
                    size: [0, 1, 2].map(|a| outputs[a].len()),
                    to: to.start.wrapping_add(tap * to.tap + channel * to.channel),
                    to_step: to.channel,
                    add: true,
                };
                // SAFETY: `outputs` are those whose tap lies inside the inputs; sources and `dy` have the sizes of the
                // problem, checked by `wgrad`, or lie in this thread's stage; the sums belong to this item; the device
                // has the function's instruction set.
                unsafe { function(&sum) }
            }
        }
    }

    /// Inputs that a chunk of outputs meets.
    fn view(&self, s: &Source<'_>, sample: usize, part: usize, of: &[Range<usize>; 2]) -> View {
        let g = &self.p.geometry;
        let [d, h, w] = g.input;
        let lanes = s.layout.block;
        let step = [h * w * lanes, w * lanes, lanes];
        match s.data {
            Stored::F32(v) if s.norm.is_none() && s.factor == [1; 3] => {
                // Plain, every channel is a block of its own.
                let run = sample * s.channels.div_ceil(lanes) + part * (BLOCK / lanes);
                View {
                    start: v[run * d * h * w * lanes..].as_ptr(),
                    step,
                    channel: if lanes == 1 { d * h * w } else { 1 },
                }
            }
            _ => {
                let rows = [0, 1].map(|a| {
                    let first = (of[a].start * g.stride[a]).saturating_sub(g.padding[a]);
                    let last = (of[a].end - 1) * g.stride[a] + g.kernel[a] - g.padding[a];
                    first.min(g.input[a])..last.min(g.input[a])
                });
                let thread = rayon::current_thread_index().unwrap_or(0);
                let stage = self.work.ptr().wrapping_add(self.plan.partials() + thread * self.plan.stage);
                let to = stage.wrapping_add(w * BLOCK);
                let (first, count) = ([rows[0].start, rows[1].start], [rows[0].len(), rows[1].len()]);
                let vector = sample * s.channels.div_ceil(BLOCK) + part;
                // SAFETY: the source has the sizes of the problem, checked by `wgrad`; this thread's stage has a row, and
                // then as many rows and slices as a chunk of outputs reaches.
                unsafe { s.read_rows(self.isa, g.input, vector, first, count, stage, to) }
                let step = [count[1] * w * BLOCK, w * BLOCK, BLOCK];
                View { start: to.wrapping_sub(first[0] * step[0] + first[1] * step[1]), step, channel: 1 }
            }
        }
    }

    /// Adds up the pieces' sums of one tap of a pair of blocks.
    fn reduce(&self, pair: usize, tap: usize) {
        let to = self.place(pair);
        for c in 0..self.channels(pair) {
            // SAFETY: this weight's block belongs to this item, and the pieces' sums are complete.
            let to = unsafe { block(to.start.wrapping_add(tap * to.tap + c * to.channel)) };
            if !self.p.add {
                to.fill(0.0);
            }
            for piece in 0..self.plan.pieces {
                let from = self.partial(piece, pair);
                // SAFETY: as above.
                let from = unsafe { block(from.start.wrapping_add(tap * from.tap + c * from.channel)) };
                to.iter_mut().zip(from).for_each(|(to, v)| *to += *v);
            }
        }
    }
}

/// # Safety
/// A block at `at` is ours while the reference lives.
unsafe fn block<'b>(at: *mut f32) -> &'b mut [f32; BLOCK] {
    // SAFETY: by contract.
    unsafe { &mut *at.cast() }
}
