//! The filter's gradient with fewer products: the transpose of minimal filtering.
//!
//! A filter's transform meets the inputs' in products that are linear in each, so its gradient is, point by point, a sum
//! over all tiles of the inputs' transforms times those of the outputs' gradients, and goes back through the transpose of
//! the filter's transform. That last step is done after every block of tiles, so that what is kept between blocks are
//! weights and not the many more points.

use super::axis::Kind;
use super::run::{Block, inputs_along_z, inputs_in_plane};
use super::{Plan, Scheme};
use crate::backend::cpu::Shared;
use crate::backend::cpu::conv3d::{Geometry, Source, Storage, packed_place};
use crate::backend::cpu::conv3d_grad::Wgrad;
use crate::backend::cpu::conv3d_grad::outer::{Outer, OuterFn, cover};
use crate::backend::cpu::conv3d_grad::wgrad::NEAR;
use crate::backend::cpu::isa::simd_entry;
use crate::backend::cpu::lanes::Lanes;
use crate::base::par;
use crate::tensor::{BLOCK, Isa, Layout, Precision, Stored};

/// Tiles of a block, at most: sums of so many products lose little in f32.
const TILES: usize = 1024;

/// Bytes of both transforms, at most: a small part of a level-3 cache, and a point's panels fit a level-2 cache.
const BYTES: usize = 8 << 20;

/// Bytes of the sums of pairs of channel blocks that are made at a time: small against a level-3 cache.
const SUMS_BYTES: usize = 8 << 20;

/// Floats between points of a pair's sums; not a power of two, which would share few sets of a cache.
const POINT: usize = BLOCK * BLOCK + BLOCK;

/// Input channels of a pair that go back to weights in one work item.
const BACK: usize = 4;

/// How a problem is cut.
#[derive(Debug, Clone)]
pub(in crate::backend::cpu) struct WeightPlan {
    x: Plan,
    /// The same tiles of the outputs' gradients.
    dy: Plan,
    /// Pairs of channel blocks that are done at a time.
    together: usize,
}

impl WeightPlan {
    /// Cuts the problem `g` whose sources have `channels` each, some stored in `precision`.
    pub(in crate::backend::cpu) fn new(
        scheme: Scheme,
        isa: Isa,
        g: &Geometry,
        channels: &[usize],
        precision: Precision,
    ) -> Self {
        let mut x = Plan::new(scheme, isa, g, channels, Storage { input: precision, ..Storage::PLAIN });
        let mut row = x.out_blocks * BLOCK;
        if row.is_multiple_of(64) {
            row += BLOCK;
        }
        x.shared = true;
        let most = (BYTES / (4 * scheme.points() * (x.row + row))).clamp(8, TILES);
        x.cut(|b| b.iter().product::<usize>() <= most);
        let mut dy = x.clone();
        dy.g.input = g.output;
        dy.g.padding = [0; 3];
        dy.inputs = x.outputs;
        dy.step = x.outputs;
        dy.in_blocks = x.out_blocks;
        (dy.row, dy.spread, dy.halves_in) = (row, true, false);
        let together = (SUMS_BYTES / (4 * scheme.points() * POINT)).clamp(1, x.in_blocks * x.out_blocks);
        Self { x, dy, together }
    }

    fn sums(&self) -> usize {
        self.together * self.x.scheme.points() * POINT
    }

    /// Floats of a thread's scratch: planes of one layer of tiles, and a row of halves as floats.
    fn scratch(&self) -> usize {
        self.x.slab(self.x.block).max(self.dy.slab(self.dy.block)) + self.x.row_floats()
    }

    /// Floats of working memory for `threads` threads.
    pub(in crate::backend::cpu) fn workspace(&self, threads: usize) -> usize {
        self.x.common() + self.dy.common() + self.sums() + threads * self.scratch()
    }

    /// Estimated time on one core, in cycles of a core that does one multiply-add of 16 floats in each.
    pub(in crate::backend::cpu) fn cycles(&self) -> f64 {
        let (x, dy, points) = (&self.x, &self.dy, self.x.scheme.points() as f64);
        let size = |v: &[usize; 3]| v.iter().product::<usize>() as f64;
        let tiles = size(&x.tiles) * x.g.batch as f64;
        let (i, o) = (x.in_blocks as f64, x.out_blocks as f64);
        // Lines that pass through a level-3 cache: all are written once, and read for each round of pairs.
        let lines = (i + o) * (1.0 + i * o / self.together as f64);
        let products = points * (BLOCK as f64 * i * o * 1.6 + 12.0 * lines);
        let tile = i * x.inputs_cycles() + o * dy.inputs_cycles() + products;
        // Back to weights, for each point of each input channel.
        let back = size(&x.blocks) * x.g.batch as f64 * i * o * BLOCK as f64 * 40.0 * points;
        // At stride 2 a pair's sums are larger than a level-2 cache: as measured.
        let share = if x.g.stride == [1; 3] { 1.0 } else { 2.0 };
        share * (tiles * tile + back)
    }
}

/// For each product of an axis, what the three taps count in it.
type Taps = [[f32; 3]; 9];

fn taps(kind: Kind) -> Taps {
    std::array::from_fn(|p| if p < kind.sizes().1 { kind.filter(p) } else { [0.0; 3] })
}

struct Job<'a> {
    plan: &'a WeightPlan,
    p: &'a Wgrad<'a>,
    dy: Source<'a>,
    /// Channel blocks of the sources: source, block in it, first lane in a tile's row.
    inputs: Vec<(usize, usize, usize)>,
    /// The first channel of each among all.
    channels: Vec<usize>,
    kernels: Vec<(usize, OuterFn)>,
    /// What the taps count in the products of the filter's transform along z, and along y and x.
    taps: [Taps; 2],
    work: Shared,
    dw: Shared,
}

/// Writes the gradient of `p` to its place in `dw`; `work` has [`WeightPlan::workspace`] floats for the threads of the
/// current pool.
pub(in crate::backend::cpu) fn weight_gradient(plan: &WeightPlan, p: &Wgrad<'_>, work: &mut [f32], dw: &mut [f32]) {
    assert!(work.len() >= plan.workspace(rayon::current_num_threads()), "working memory for fewer threads");
    let halves = p.sources.iter().any(|s| s.data.precision() == Precision::Bf16);
    assert!(plan.x.halves_in || !halves, "planned for another storage");
    let mut channels = Vec::new();
    let mut first = 0;
    for s in p.sources {
        channels.extend((0..s.channels.div_ceil(BLOCK)).map(|b| first + b * BLOCK));
        first += s.channels;
    }
    let dy = Source {
        data: Stored::F32(p.dy),
        channels: p.geometry.out_channels,
        layout: Layout::BLOCKED,
        norm: None,
        factor: [1; 3],
    };
    let job = Job {
        plan,
        p,
        dy,
        inputs: Plan::input_blocks(p.sources),
        channels,
        kernels: cover(plan.x.isa, BLOCK, false),
        taps: [plan.x.scheme.z, plan.x.scheme.xy].map(taps),
        work: Shared::new(work),
        dw: Shared::new(dw),
    };
    let (pairs, points) = (plan.x.in_blocks * plan.x.out_blocks, plan.x.planes * plan.x.side());
    for i in 0..p.geometry.batch * plan.x.blocks.iter().product::<usize>() {
        let b = Block::of(&plan.x, i);
        par::for_each((plan.x.in_blocks + plan.x.out_blocks) * b.tiles[0], |i| job.transform(&b, i));
        for first in (0..pairs).step_by(plan.together) {
            let n = plan.together.min(pairs - first);
            par::for_each(points, |row| job.products(&b, row, first, n));
            let add = p.add || i > 0;
            par::for_each(n * BLOCK / BACK, |i| {
                job.back(i * BACK / BLOCK, first + i * BACK / BLOCK, i * BACK % BLOCK, add);
            });
        }
    }
}

impl Job<'_> {
    /// The transforms of one channel block of one layer of tiles: of the inputs, then of the outputs' gradients.
    fn transform(&self, b: &Block, i: usize) {
        let thread = rayon::current_thread_index().unwrap_or(0);
        let common = self.plan.x.common() + self.plan.dy.common() + self.plan.sums();
        let scratch = self.work.ptr().wrapping_add(common + thread * self.plan.scratch());
        let room = scratch.wrapping_add(self.plan.scratch() - self.plan.x.row_floats());
        let (block, z) = (i / b.tiles[0], i % b.tiles[0]);
        let (plan, source, part, lane, start) = match self.inputs.get(block) {
            Some((source, part, lane)) => (&self.plan.x, &self.p.sources[*source], *part, *lane, self.work.ptr()),
            None => {
                let part = block - self.inputs.len();
                (&self.plan.dy, &self.dy, part, part * BLOCK, self.work.ptr().wrapping_add(self.plan.x.common()))
            }
        };
        let product = plan.inputs_point(b.len());
        let slab = plan.slab(b.tiles);
        // SAFETY: sources and `dy` have the sizes of the problem, checked by `wgrad`; the scratch is this thread's, and this
        // channel block of the layer's tiles this item's.
        unsafe {
            inputs_along_z(plan, source, source.from(room), b, part, z, scratch);
            for p in 0..plan.planes {
                let to = start.wrapping_add(p * plan.points * product + z * b.layer() * plan.row + lane);
                inputs_in_plane(plan, b, scratch.wrapping_add(p * (slab / plan.planes)), to, product);
            }
        }
    }

    /// Where the sums of a pair are that is the `slot`-th of those that are done together.
    fn sums(&self, slot: usize) -> *mut f32 {
        let first = self.plan.x.common() + self.plan.dy.common();
        self.work.ptr().wrapping_add(first + slot * self.plan.x.scheme.points() * POINT)
    }

    /// The sums of products of one row of points, for `n` pairs from pair `first` on.
    fn products(&self, b: &Block, row: usize, first: usize, n: usize) {
        let (x, dy) = (&self.plan.x, &self.plan.dy);
        let points = row * x.side()..(row + 1) * x.side();
        // All pairs of a point, whose panels stay in the cache.
        for (point, slot) in points.flat_map(|p| (0..n).map(move |slot| (p, slot))) {
            let pair = first + slot;
            let lane = self.inputs[pair / x.out_blocks].2;
            let out_lane = pair % x.out_blocks * BLOCK;
            let from = self.work.ptr().wrapping_add(point * x.inputs_point(b.len()) + lane);
            let with = self.work.ptr().wrapping_add(x.common() + point * dy.inputs_point(b.len()) + out_lane);
            for (tile, &(channel, function)) in
                (0..b.len()).step_by(NEAR).flat_map(|t| self.kernels.iter().map(move |k| (t, k)))
            {
                let sum = Outer {
                    x: from.wrapping_add(tile * x.row + channel),
                    x_step: [0, 0, x.row],
                    y: with.wrapping_add(tile * dy.row),
                    y_step: [0, 0, dy.row],
                    size: [1, 1, NEAR.min(b.len() - tile)],
                    to: self.sums(slot).wrapping_add(point * POINT + channel * BLOCK),
                    to_step: BLOCK,
                    add: tile > 0,
                };
                // SAFETY: both transforms are complete and no longer written; the point's sums are this item's; the device
                // has the function's instruction set.
                unsafe { function(&sum) }
            }
        }
    }

    /// From the sums of some input channels of a pair to weights.
    fn back(&self, slot: usize, pair: usize, first: usize, add: bool) {
        let (plan, g) = (&self.plan.x, &self.p.geometry);
        let (source, part, _) = self.inputs[pair / plan.out_blocks];
        let (place, width) = packed_place(g, pair % plan.out_blocks);
        for c in first..(first + BACK).min(self.p.sources[source].channels - part * BLOCK) {
            let channel = self.channels[pair / plan.out_blocks] + c;
            let a = Back {
                scheme: plan.scheme,
                taps: &self.taps,
                from: self.sums(slot).wrapping_add(c * BLOCK),
                to: self.dw.ptr().wrapping_add(place + channel * width),
                tap: g.filter_inputs * width,
                add,
            };
            // SAFETY: the pair's sums are complete; this channel's weights of the output block are this item's.
            unsafe { back::on(plan.isa, &a) }
        }
    }
}

/// The sums of one input channel with a block of output channels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Back<'a> {
    scheme: Scheme,
    taps: &'a [Taps; 2],
    /// `[P][P * P][POINT]`.
    from: *const f32,
    /// A block of weights of tap 0, and floats to the next tap.
    to: *mut f32,
    tap: usize,
    /// Add to what is there.
    add: bool,
}

simd_entry!(unsafe back = back_of(a: &Back<'_>));

/// # Safety
/// A block is readable at every point, and writable at every tap.
#[inline(always)]
unsafe fn back_of<S: Lanes>(s: S, a: &Back<'_>) {
    let depth = if a.scheme.z == Kind::One { 1 } else { 3 };
    let [z, xy] = a.taps;
    let (planes, side) = (a.scheme.z.sizes().1, a.scheme.xy.sizes().1);
    for part in (0..BLOCK).step_by(S::N) {
        let mut taps = [[[s.splat(0.0); 3]; 3]; 3];
        for p in 0..planes {
            let mut plane = [[s.splat(0.0); 3]; 3];
            for y in 0..side {
                let mut row = [s.splat(0.0); 3];
                for x in 0..side {
                    let point = (p * side + y) * side + x;
                    // SAFETY: by contract.
                    let v = unsafe { s.load(a.from.wrapping_add(point * POINT + part)) };
                    add_taps(s, xy[x], &mut row, v);
                }
                for x in 0..3 {
                    for k in 0..3 {
                        plane[k][x] = s.fma(s.splat(xy[y][k]), row[x], plane[k][x]);
                    }
                }
            }
            for (k, i) in (0..depth).flat_map(|k| (0..9).map(move |i| (k, i))) {
                taps[k][i / 3][i % 3] = s.fma(s.splat(z[p][k]), plane[i / 3][i % 3], taps[k][i / 3][i % 3]);
            }
        }
        for i in 0..depth * 9 {
            let to = a.to.wrapping_add(i * a.tap + part);
            let mut v = taps[i / 9][i / 3 % 3][i % 3];
            // SAFETY: by contract.
            unsafe {
                if a.add {
                    v = s.add(v, s.load(to));
                }
                s.store(v, to);
            }
        }
    }
}

/// Adds `v` to what the three taps have of one product.
#[inline(always)]
fn add_taps<S: Lanes>(s: S, weights: [f32; 3], taps: &mut [S::R; 3], v: S::R) {
    for k in 0..3 {
        taps[k] = s.fma(s.splat(weights[k]), v, taps[k]);
    }
}
