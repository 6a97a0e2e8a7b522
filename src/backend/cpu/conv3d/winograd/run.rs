//! The passes of a plan, block by block.

use super::Plan;
use super::filter::{self, prepared_place};
use super::gemm::{self, Gemm, Run, cover, widest};
use super::plan::CHUNK;
use super::transform::{self, ForwardZ, From, InPlane, InverseZ, Sums};
use crate::backend::cpu::Shared;
use crate::backend::cpu::conv3d::{Problem, Source, packed_place};
use crate::backend::cpu::lanes::Lanes;
use crate::backend::cpu::stored::SharedOut;
use crate::base::par;
use crate::tensor::{BLOCK, Isa, Precision, StoredMut};

/// Outputs of this many bytes are not worth keeping in a cache.
const STREAM_FROM: usize = 24 << 20;

/// Registers of an instruction set: floats in one, and how many a kernel may keep.
fn registers(isa: Isa) -> (usize, usize) {
    fn of<S: Lanes>() -> (usize, usize) {
        (S::N, S::KEEP)
    }
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::Avx512 => return of::<crate::backend::cpu::isa::Avx512>(),
        Isa::Avx2 => return of::<crate::backend::cpu::isa::Avx2>(),
        _ => {}
    }
    let _ = isa;
    of::<crate::backend::cpu::isa::Scalar>()
}

/// One block of tiles.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) sample: usize,
    /// First tile and number of tiles per axis.
    pub(super) first: [usize; 3],
    pub(super) tiles: [usize; 3],
    /// Its place among all blocks.
    pub(super) index: usize,
}

impl Block {
    /// The `i`-th of all.
    pub(super) fn of(plan: &Plan, i: usize) -> Self {
        let blocks: usize = plan.blocks.iter().product();
        let (sample, b) = (i / blocks, i % blocks);
        let [_, ny, nx] = plan.blocks;
        let pieces = [b / (ny * nx), b / nx % ny, b % nx];
        let pieces = [0, 1, 2].map(|a| plan.piece(a, pieces[a]));
        Self { sample, first: pieces.map(|p| p.0), tiles: pieces.map(|p| p.1), index: i }
    }

    pub(super) fn len(&self) -> usize {
        self.tiles.iter().product()
    }

    /// Tiles of one layer.
    pub(super) fn layer(&self) -> usize {
        self.tiles[1] * self.tiles[2]
    }
}

/// Where voxels go: the first, and values between rows and slices.
#[derive(Clone, Copy)]
pub(super) struct Place<T> {
    pub(super) start: *mut T,
    pub(super) row: usize,
    pub(super) slice: usize,
}

impl<T> Place<T> {
    /// The first voxel of a row.
    pub(super) fn row(&self, z: usize, y: usize) -> *mut T {
        self.start.wrapping_add(z * self.slice + y * self.row)
    }
}

pub(super) struct Job<'a> {
    pub(super) plan: &'a Plan,
    pub(super) p: &'a Problem<'a>,
    /// The filter made once, if there is one.
    kept: &'a [f32],
    inputs: Vec<(usize, usize, usize)>,
    runs: Vec<Run>,
    pub(super) out: SharedOut,
    pub(super) work: Shared,
    /// One slot per block of tiles and output block.
    sums: Shared<Sums>,
    stream: bool,
    add: bool,
}

/// Writes the convolution of `p` to `out`; returns the sums of every block of tiles, `[sample][block][output block]`.
/// `kept` is the transformed filter of [`Plan::kept_filter`] floats, `work` holds [`Plan::workspace`] floats for the
/// threads of the current pool. Where the plan is in place, `out` holds the only source, whose data are not given again. With
/// `add`, results are added to the floats that `out` holds.
pub(in crate::backend::cpu) fn run(
    plan: &Plan,
    p: &Problem<'_>,
    kept: &[f32],
    work: &mut [f32],
    out: StoredMut<'_>,
    add: bool,
) -> Vec<Sums> {
    assert!(kept.len() >= plan.kept_filter(), "the filter was made for another plan");
    assert!(work.len() >= plan.workspace(rayon::current_num_threads()), "working memory for fewer threads");
    let floats = |channels: usize, size: [usize; 3]| {
        p.geometry.batch * channels.next_multiple_of(BLOCK) * size.iter().product::<usize>()
    };
    for s in p.sources.iter().filter(|_| !plan.in_place) {
        let size = [0, 1, 2].map(|a| p.geometry.input[a] / s.factor[a]);
        assert_eq!(s.data.len(), floats(s.channels, size), "a source of other sizes");
    }
    assert_eq!(plan.halves_out, matches!(out, StoredMut::Bf16(_)), "planned for another storage");
    assert!(plan.halves_in || p.sources.iter().all(|s| s.data.precision() == Precision::F32), "as before");
    assert!(!add || !(plan.halves_out || plan.in_place), "only floats are added to");
    assert_eq!(out.len(), floats(p.geometry.out_channels, p.geometry.output), "an output of other sizes");
    let blocks: usize = plan.blocks.iter().product();
    let mut sums = vec![Sums::default(); p.geometry.batch * blocks * plan.out_blocks];
    let mut runs: Vec<Run> = Vec::new();
    let mut lane = 0;
    for s in p.sources {
        match runs.last_mut() {
            Some(last) if last.0 + last.1 == lane => last.1 += s.channels,
            _ => runs.push((lane, s.channels)),
        }
        lane += s.channels.next_multiple_of(BLOCK);
    }
    let job = Job {
        plan,
        p,
        kept,
        inputs: Plan::input_blocks(p.sources),
        runs,
        stream: out.len() * 4 >= STREAM_FROM && !add,
        add,
        out: SharedOut::new(out),
        work: Shared::new(work),
        sums: Shared::new(&mut sums),
    };
    let all = p.geometry.batch * blocks;
    if plan.shared {
        (0..all).for_each(|i| job.together(&job.block(i)));
    } else if plan.in_place {
        job.in_place();
    } else {
        par::for_each(all, |i| job.alone(&job.block(i)));
    }
    sums
}

impl Job<'_> {
    /// The `i`-th block of all.
    pub(super) fn block(&self, i: usize) -> Block {
        Block::of(self.plan, i)
    }

    /// Scratch of this thread.
    fn scratch(&self) -> *mut f32 {
        let thread = rayon::current_thread_index().unwrap_or(0);
        self.work.ptr().wrapping_add(self.plan.common() + thread * self.plan.scratch())
    }

    /// A block by one thread.
    pub(super) fn alone(&self, b: &Block) {
        let plan = self.plan;
        let tiles = b.len();
        let slab = plan.slab(b.tiles);
        let results = plan.results(b.tiles);
        let inputs = self.scratch();
        let columns = inputs.wrapping_add(self.inputs.len() * b.tiles[0] * slab);
        let inputs_point = plan.inputs_point(tiles);
        let products = columns.wrapping_add(plan.points * inputs_point);
        let ends = products.wrapping_add(plan.points * plan.products_point(tiles, 2 * BLOCK));
        for (i, at) in self.inputs.iter().enumerate() {
            for z in 0..b.tiles[0] {
                self.inputs_along_z(b, *at, z, inputs.wrapping_add((i * b.tiles[0] + z) * slab));
            }
        }
        for p in 0..plan.planes {
            for (i, at) in self.inputs.iter().enumerate() {
                for z in 0..b.tiles[0] {
                    let from = inputs.wrapping_add((i * b.tiles[0] + z) * slab + p * (slab / plan.planes));
                    self.inputs_in_plane(b, from, columns.wrapping_add(z * b.layer() * plan.row + at.2), inputs_point);
                }
            }
            for block in (0..plan.out_blocks).step_by(2) {
                let width = BLOCK * (plan.out_blocks - block).min(2);
                let pieces = self.pieces(tiles, width);
                let filter = self.kept[prepared_place(plan.scheme, &plan.g, p, block)..].as_ptr();
                let g = Gemm {
                    points: plan.points,
                    inputs: columns,
                    tile: plan.row,
                    inputs_point,
                    runs: &self.runs,
                    filter,
                    filter_point: plan.g.in_channels * width,
                    width,
                    outputs: products,
                    outputs_point: plan.products_point(tiles, width),
                    pieces: &pieces,
                    add: false,
                };
                // SAFETY: the matrices lie in this thread's scratch, sized by the plan for its largest block, and in
                // the kept filter, whose length was checked.
                unsafe { gemm::gemm::on(plan.isa, &g) }
                for k in 0..width / BLOCK {
                    for z in 0..b.tiles[0] {
                        let to =
                            ends.wrapping_add(((block + k) * b.tiles[0] + z) * results + p * (results / plan.planes));
                        let from = products.wrapping_add(z * b.layer() * width + k * BLOCK);
                        self.outputs_in_plane(b, from, width, g.outputs_point, to);
                    }
                }
            }
        }
        for block in 0..plan.out_blocks {
            let mut sums = Sums::default();
            for z in 0..b.tiles[0] {
                let from = ends.wrapping_add((block * b.tiles[0] + z) * results);
                self.outputs_along_z(b, block, z, from, &mut sums);
            }
            self.keep(b, block, sums);
        }
    }

    /// A block by all threads: first its inputs, divided by channel blocks, then its outputs.
    fn together(&self, b: &Block) {
        let plan = self.plan;
        let (tiles, slab) = (b.len(), plan.slab(b.tiles));
        let inputs_point = plan.inputs_point(tiles);
        par::for_each(self.inputs.len(), |i| {
            let (at, scratch) = (self.inputs[i], self.scratch());
            for z in 0..b.tiles[0] {
                self.inputs_along_z(b, at, z, scratch);
                for p in 0..plan.planes {
                    let to = p * plan.points * inputs_point + z * b.layer() * plan.row + at.2;
                    let from = scratch.wrapping_add(p * (slab / plan.planes));
                    self.inputs_in_plane(b, from, self.work.ptr().wrapping_add(to), inputs_point);
                }
            }
        });
        par::for_each(plan.out_blocks.div_ceil(2), |group| self.group(b, group * 2));
    }

    /// One group of output channels of a shared block, whose inputs are ready.
    fn group(&self, b: &Block, block: usize) {
        let plan = self.plan;
        let g = &self.p.geometry;
        let tiles = b.len();
        let results = plan.results(b.tiles);
        let (inputs_point, (taps, width)) = (plan.inputs_point(tiles), packed_place(g, block));
        let pieces = self.pieces(tiles, width);
        let products = self.scratch();
        let outputs_point = plan.products_point(tiles, width);
        let ends = products.wrapping_add(plan.planes * plan.points * outputs_point);
        let made = ends.wrapping_add(2 * results);
        let raw = made.wrapping_add(plan.points * (CHUNK * 2 * BLOCK + BLOCK));
        let mut first = 0;
        // Input channels in pieces whose filters fit the cache; their lanes in a tile's row may have gaps.
        for &(lane, channels) in &self.runs {
            for done in (0..channels).step_by(CHUNK) {
                let n = CHUNK.min(channels - done);
                // Taps and products a power of two apart would share the same few sets of a cache; the taps are in memory.
                let tap = n * width + BLOCK;
                for k in 0..g.kernel.iter().product() {
                    let from = taps + (k * g.in_channels + first) * width;
                    // SAFETY: this thread's scratch has room for the taps of a chunk after a plane's transformed filter.
                    let to = unsafe { std::slice::from_raw_parts_mut(raw.wrapping_add(k * tap), n * width) };
                    self.p.filter.widen(plan.isa, from, to);
                }
                for p in 0..plan.planes {
                    let f = filter::Plane {
                        scheme: plan.scheme,
                        p,
                        from: raw,
                        tap,
                        len: n * width,
                        to: made,
                        product: tap,
                    };
                    let runs = [(lane + done, n)];
                    let products = Gemm {
                        points: plan.points,
                        inputs: self.work.ptr().wrapping_add(p * plan.points * inputs_point),
                        tile: plan.row,
                        inputs_point,
                        runs: &runs,
                        filter: made,
                        filter_point: tap,
                        width,
                        outputs: products.wrapping_add(p * plan.points * outputs_point),
                        outputs_point,
                        pieces: &pieces,
                        add: first > 0,
                    };
                    // SAFETY: the packed filter holds all taps of the group; products and filters lie in this thread's
                    // scratch, sized by the plan; the shared inputs are complete and no longer written.
                    unsafe {
                        filter::plane::on(plan.isa, &f);
                        gemm::gemm::on(plan.isa, &products);
                    }
                }
                first += n;
            }
        }
        for k in 0..width / BLOCK {
            let mut sums = Sums::default();
            for z in 0..b.tiles[0] {
                for p in 0..plan.planes {
                    let from = p * plan.points * outputs_point + z * b.layer() * width + k * BLOCK;
                    let to = ends.wrapping_add(p * (results / plan.planes));
                    self.outputs_in_plane(b, products.wrapping_add(from), width, outputs_point, to);
                }
                self.outputs_along_z(b, block + k, z, ends, &mut sums);
            }
            self.keep(b, block + k, sums);
        }
    }

    fn pieces(&self, tiles: usize, width: usize) -> Vec<(usize, usize)> {
        let (n, keep) = registers(self.plan.isa);
        cover(tiles, widest(n, keep, width))
    }

    /// One channel block of one layer of tiles, as the convolution's input along z.
    fn inputs_along_z(&self, b: &Block, (source, block, _): (usize, usize, usize), z: usize, to: *mut f32) {
        let s = &self.p.sources[source];
        // SAFETY: the source has the sizes of the problem, checked by `run`, so this block has all its voxels; in place, its
        // values are there until `in_place` has had all readers pass; `to` lies in this thread's scratch, which the plan
        // made large enough.
        unsafe { inputs_along_z(self.plan, s, self.from(s), b, block, z, to) }
    }

    fn inputs_in_plane(&self, b: &Block, from: *const f32, to: *mut f32, product: usize) {
        // SAFETY: `from` is a plane that `inputs_along_z` made for this block; each channel block of the tiles' rows at
        // `to` is written by one thread.
        unsafe { inputs_in_plane(self.plan, b, from, to, product) }
    }

    fn outputs_in_plane(&self, b: &Block, from: *const f32, tile: usize, product: usize, to: *mut f32) {
        let plan = self.plan;
        let (side, width) = (plan.outputs[1], b.tiles[2] * plan.outputs[2]);
        let a = InPlane {
            kind: plan.scheme.xy,
            spread: false,
            tiles: [b.tiles[1], b.tiles[2]],
            from,
            from_tile: [b.tiles[2] * tile, tile],
            from_value: [product, plan.side() * product],
            to,
            to_tile: [side * width * BLOCK, side * BLOCK],
            to_value: [BLOCK, width * BLOCK],
        };
        // SAFETY: `from` holds the products of this block's layer, `to` a plane of its results, both in this thread's
        // scratch.
        unsafe { transform::inverse_xy::on(plan.isa, &a) }
    }

    fn outputs_along_z(&self, b: &Block, block: usize, z: usize, from: *const f32, sums: &mut Sums) {
        let (plan, g) = (self.plan, &self.p.geometry);
        let columns = b.tiles[2] * plan.outputs[2];
        let first = [0, 1, 2].map(|a| (b.first[a] + if a == 0 { z } else { 0 }) * plan.outputs[a]);
        let most = [plan.outputs[0], b.tiles[1] * plan.outputs[1], columns];
        let place = match self.out {
            _ if plan.in_place => self.waiting(b, block, z),
            SharedOut::F32(out) => self.place(out, b.sample, block, first),
            SharedOut::Bf16(_) => self.staged(z),
        };
        let a = InverseZ {
            kind: plan.scheme.z,
            from,
            plane: plan.results(b.tiles) / plan.planes,
            columns,
            size: [0, 1, 2].map(|a| most[a].min(g.output[a] - first[a])),
            to: place.start,
            row: place.row,
            slice: place.slice,
            bias: self.p.bias.map_or(std::ptr::null(), |v| v[block * BLOCK..].as_ptr()),
            stream: self.stream && !plan.in_place && !plan.halves_out,
            add: self.add,
        };
        // SAFETY: `from` holds the results of this block's layer; tiles are cut so that each output voxel belongs to
        // one block, and only voxels inside the output are written. Tensors are aligned to 64 bytes. In place, the
        // block's outputs wait in a part of the ring that is only its own; else, as halves, in this thread's scratch.
        unsafe { transform::inverse_z::on(plan.isa, &a, sums) }
    }

    /// The output's voxel `first`.
    pub(super) fn place<T>(&self, out: Shared<T>, sample: usize, block: usize, first: [usize; 3]) -> Place<T> {
        let [d, h, w] = self.p.geometry.output;
        let at = (((sample * self.plan.out_blocks + block) * d + first[0]) * h + first[1]) * w + first[2];
        Place { start: out.ptr().wrapping_add(at * BLOCK), row: w * BLOCK, slice: h * w * BLOCK }
    }

    /// Where this thread has outputs of the `z`-th layer of tiles before they are rounded.
    fn staged(&self, z: usize) -> Place<f32> {
        let [rows, columns] = self.plan.output_area();
        let slice = rows * columns * BLOCK;
        let start = self.scratch().wrapping_add(self.plan.stages().1 + z * self.plan.outputs[0] * slice);
        Place { start, row: columns * BLOCK, slice }
    }

    /// A source as it is stored.
    fn from(&self, s: &Source<'_>) -> From {
        let room = || self.scratch().wrapping_add(self.plan.stages().0);
        match (self.plan.in_place, self.out) {
            (true, SharedOut::F32(out)) => From::F32(out.ptr()),
            (true, SharedOut::Bf16(out)) => From::Bf16(out.ptr(), room()),
            (false, ..) => s.from(room()),
        }
    }

    /// What is left to do when all outputs of a channel block are there.
    fn keep(&self, b: &Block, block: usize, sums: Sums) {
        if self.plan.halves_out && !self.plan.in_place {
            // SAFETY: this thread has just made them; each voxel of the output belongs to one block.
            unsafe { self.put(b, block, self.staged(0)) }
        }
        // SAFETY: each block of tiles and output block has a slot of its own.
        unsafe { self.sums.ptr().wrapping_add(b.index * self.plan.out_blocks + block).write(sums) }
    }
}

/// Channel block `block` of source `s`, which is at `from`, for layer `z` of the tiles of `b`: along z.
///
/// # Safety
/// `from` has the voxels of the plan's input, and `to` room for a slab, which is ours.
pub(super) unsafe fn inputs_along_z(
    plan: &Plan,
    s: &Source<'_>,
    from: From,
    b: &Block,
    block: usize,
    z: usize,
    to: *mut f32,
) {
    let g = &plan.g;
    let [d, h, w] = [0, 1, 2].map(|a| g.input[a] / s.factor[a]);
    let vector = b.sample * s.channels.div_ceil(BLOCK) + block;
    let [rows, columns] = plan.footprint(b.tiles);
    let tile = [b.first[0] + z, b.first[1], b.first[2]];
    let a = ForwardZ {
        kind: plan.scheme.z,
        spread: plan.spread,
        from: from.at(vector * d * h * w * BLOCK),
        row: w * BLOCK,
        slice: h * w * BLOCK,
        size: g.input,
        factor: s.factor,
        first: [0, 1, 2].map(|a| (tile[a] * plan.step[a]) as isize - g.padding[a] as isize),
        rows,
        columns,
        to,
        plane: rows * columns * BLOCK,
        norm: s.affine(vector),
    };
    // SAFETY: by contract.
    unsafe { transform::forward_z::on(plan.isa, &a) }
}

/// One plane of what [`inputs_along_z`] made, to the tiles' rows at `to`, `product` floats between products.
///
/// # Safety
/// `from` is such a plane, and the channel block of the tiles' rows at `to` is ours.
pub(super) unsafe fn inputs_in_plane(plan: &Plan, b: &Block, from: *const f32, to: *mut f32, product: usize) {
    let columns = plan.footprint(b.tiles)[1];
    let step = plan.step[1];
    let a = InPlane {
        kind: plan.scheme.xy,
        spread: plan.spread,
        tiles: [b.tiles[1], b.tiles[2]],
        from,
        from_tile: [step * columns * BLOCK, step * BLOCK],
        from_value: [columns * BLOCK, BLOCK],
        to,
        to_tile: [b.tiles[2] * plan.row, plan.row],
        to_value: [plan.side() * product, product],
    };
    // SAFETY: by contract.
    unsafe { transform::forward_xy::on(plan.isa, &a) }
}
