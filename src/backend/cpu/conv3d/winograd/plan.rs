//! How a problem is cut, what memory that takes, and what time.

use super::axis::Kind;
use super::filter::prepared_len;
use crate::backend::cpu::conv3d::{Geometry, Source, Storage};
use crate::tensor::{BLOCK, Isa, Precision};

/// Transformed filters up to this size are made once and kept.
const KEPT_FILTER: usize = 32 << 20;

/// Bytes that a thread's own block may take: most of a level-2 cache, since the filter passes through it, too.
const OWN_BYTES: usize = 1200 << 10;

/// Tiles of a block of a thread's own, at most: enough to read each weight seldom.
const OWN_TILES: usize = 24;

/// Tiles of a block that threads share, at most.
const SHARED_TILES: usize = 128;

/// Bytes of transformed inputs that threads share, at most: they should stay in a level-3 cache.
const SHARED_BYTES: usize = 24 << 20;

/// An output takes its input's place only where its layers have so many blocks that threads seldom wait for the end of one,
/// and the two that wait take half of what is saved at most.
const IN_PLACE_BLOCKS: usize = 8;

/// Bytes of a group's products that stay in a level-2 cache beside inputs and filters.
const PRODUCTS_NEAR: f64 = (768 << 10) as f64;

/// Input channels whose filters are transformed at a time.
pub(super) const CHUNK: usize = 64;

/// A scheme per axis; y and x have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Scheme {
    pub(super) z: Kind,
    pub(super) xy: Kind,
}

impl Scheme {
    /// The scheme with up to `z` and `xy` outputs per tile for the kernel and stride of `g`, if there is one.
    pub(crate) fn of(g: &Geometry, z: usize, xy: usize) -> Option<Self> {
        let kind = |axis: usize, outputs: usize| match (g.kernel[axis], g.stride[axis], outputs) {
            (1, _, _) => Some(Kind::One),
            (3, 1, 2) => Some(Kind::F2),
            (3, 1, 4) => Some(Kind::F4),
            (3, 2, 2) => Some(Kind::S2),
            (3, 2, 4) => Some(Kind::S4),
            _ => None,
        };
        let same = g.kernel[1] == g.kernel[2] && g.stride[1] == g.stride[2];
        // Without three taps in the plane there is nothing to save.
        (same && g.kernel[1] == 3).then_some(())?;
        // Where z has no choice, the name with equal numbers stands for it.
        (g.kernel[0] == 3 || z == xy).then_some(())?;
        Some(Self { z: kind(0, z)?, xy: kind(1, xy)? })
    }

    /// The same with sums over so many neighbouring outputs, if there is one.
    pub(in crate::backend::cpu) fn summed(self, factor: [usize; 3]) -> Option<Self> {
        let kind = |kind: Kind, factor: usize| match (kind, factor) {
            (kind, 1) => Some(kind),
            (Kind::F2, 2) => Some(Kind::F2Sums),
            (Kind::F4, 2) => Some(Kind::F4Sums),
            _ => None,
        };
        (factor[1] == factor[2]).then_some(())?;
        Some(Self { z: kind(self.z, factor[0])?, xy: kind(self.xy, factor[1])? })
    }

    /// A number of its own.
    pub(crate) fn key(self) -> u64 {
        (self.z as u64) << 8 | self.xy as u64
    }

    /// Products of a tile in one plane.
    pub(super) fn plane_points(self) -> usize {
        self.xy.sizes().1.pow(2)
    }

    /// Products of a tile.
    pub(super) fn points(self) -> usize {
        self.z.sizes().1 * self.plane_points()
    }
}

/// Cycles of `n` transforms of so many operations, with all loads and stores.
fn pass(n: usize, operations: usize, loads: usize, stores: usize) -> f64 {
    // A store takes two cycles, a load one; three in four operations find a unit free at once.
    0.75 * (n * operations) as f64 + 0.7 * (loads + 2 * stores) as f64
}

/// How a problem is cut.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(super) scheme: Scheme,
    pub(super) isa: Isa,
    pub(super) g: Geometry,
    /// Outputs and inputs per tile, and the distance of neighbouring tiles' inputs.
    pub(super) outputs: [usize; 3],
    pub(super) inputs: [usize; 3],
    pub(super) step: [usize; 3],
    pub(super) planes: usize,
    pub(super) points: usize,
    /// Tiles, blocks of tiles, and tiles of the largest block.
    pub(super) tiles: [usize; 3],
    pub(super) blocks: [usize; 3],
    pub(super) block: [usize; 3],
    /// Channel blocks of all inputs together, and of the output.
    pub(super) in_blocks: usize,
    pub(super) out_blocks: usize,
    /// Floats between tiles of transformed inputs.
    pub(super) row: usize,
    /// Threads work on one block together.
    pub(super) shared: bool,
    /// The output replaces the input, see [`super::ring`].
    pub(super) in_place: bool,
    /// The inputs are gradients of outputs, see [`super::weight`].
    pub(super) spread: bool,
    /// Some source is stored as bf16; the output is.
    pub(super) halves_in: bool,
    pub(super) halves_out: bool,
}

impl Plan {
    /// Cuts the problem `g` whose sources have `channels` each. Where the output may take the place of the only source, it
    /// does so if that is worth it.
    pub(crate) fn new(scheme: Scheme, isa: Isa, g: &Geometry, channels: &[usize], storage: Storage) -> Self {
        let ((lz, pz, mz), (l, p, m)) = (scheme.z.sizes(), scheme.xy.sizes());
        let outputs = [mz, m, m];
        let tiles = [0, 1, 2].map(|a| g.output[a].div_ceil(outputs[a]));
        let in_blocks: usize = channels.iter().map(|c| c.div_ceil(BLOCK)).sum();
        let mut row = in_blocks * BLOCK;
        // Rows of tiles a power of two apart would fall into the same sets of a cache.
        if row.is_multiple_of(64) {
            row += BLOCK;
        }
        let mut plan = Self {
            scheme,
            isa,
            g: *g,
            outputs,
            inputs: [lz, l, l],
            step: [0, 1, 2].map(|a| outputs[a] * g.stride[a]),
            planes: pz,
            points: p * p,
            tiles,
            blocks: tiles,
            block: [1; 3],
            in_blocks,
            out_blocks: g.out_channels.div_ceil(BLOCK),
            row,
            shared: false,
            in_place: false,
            spread: false,
            halves_in: storage.input == Precision::Bf16,
            halves_out: storage.output == Precision::Bf16,
        };
        let all: usize = tiles.iter().product();
        // A filter that is used for few tiles is better made on the way.
        plan.shared = 4 * prepared_len(scheme, g) > KEPT_FILTER || all * g.batch < 4 * OWN_TILES;
        if plan.shared {
            let most = (SHARED_BYTES / (4 * scheme.points() * row)).clamp(8, SHARED_TILES);
            plan.cut(|b| b.iter().product::<usize>() <= most);
        } else {
            let size = |b: [usize; 3]| b.iter().product::<usize>();
            let base = plan.clone();
            plan.cut(|b| size(b) <= OWN_TILES && (size(b) <= 8 || 4 * base.own_floats(b) <= OWN_BYTES));
            let fits = channels == [g.out_channels] && g.input == g.output && storage.input == storage.output;
            let voxels: usize = g.output.iter().product();
            let saved = g.batch * plan.out_blocks * BLOCK * voxels * storage.output.size();
            let worth = plan.blocks[1] * plan.blocks[2] >= IN_PLACE_BLOCKS && 2 * 4 * plan.two_layers() <= saved;
            plan.in_place = storage.in_place && fits && worth;
        }
        plan
    }

    pub(crate) fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Chooses the largest blocks that `fits` allows: whole rows if possible, as square as that leaves.
    pub(super) fn cut(&mut self, fits: impl Fn([usize; 3]) -> bool) {
        // Sizes that cut an axis evenly.
        let sizes = |axis: usize| {
            let tiles = self.tiles[axis];
            let mut sizes: Vec<usize> = (1..=tiles).map(|pieces| tiles.div_ceil(pieces)).collect();
            sizes.dedup();
            sizes
        };
        let [zs, ys, xs] = [0, 1, 2].map(sizes);
        let mut best = ([1; 3], 0.0);
        for &z in &zs {
            for &y in &ys {
                for &x in &xs {
                    let b = [z, y, x];
                    if !fits(b) {
                        continue;
                    }
                    // Work that neighbouring tiles share, and how full the blocks are.
                    let size = (z * y * x) as f64;
                    let [rows, columns] = self.footprint(b);
                    let overlap = (rows * columns) as f64 / (y * self.step[1] * x * self.step[2]) as f64;
                    let pieces: f64 = b.iter().zip(&self.tiles).map(|(b, t)| t.div_ceil(*b) as f64).product();
                    let full = self.tiles.iter().product::<usize>() as f64 / (pieces * size);
                    // Few tiles read every weight often.
                    let score = full * size / (size + 4.0) / (1.0 + 0.15 * (overlap - 1.0));
                    if score > best.1 {
                        best = (b, score);
                    }
                }
            }
        }
        self.block = best.0;
        self.blocks = [0, 1, 2].map(|a| self.tiles[a].div_ceil(self.block[a]));
    }

    /// Tiles of the `i`-th piece along an axis: first and number.
    pub(super) fn piece(&self, axis: usize, i: usize) -> (usize, usize) {
        let (tiles, n) = (self.tiles[axis], self.blocks[axis]);
        let first = tiles * i / n;
        (first, tiles * (i + 1) / n - first)
    }

    /// Products of a tile along y and x.
    pub(super) fn side(&self) -> usize {
        self.scheme.xy.sizes().1
    }

    /// Rows and columns of inputs that a block of tiles reads.
    pub(super) fn footprint(&self, [_, y, x]: [usize; 3]) -> [usize; 2] {
        [(y - 1) * self.step[1] + self.inputs[1], (x - 1) * self.step[2] + self.inputs[2]]
    }

    /// Floats between points of transformed inputs of `tiles` tiles. Not a multiple of a page, see `row`.
    pub(super) fn inputs_point(&self, tiles: usize) -> usize {
        tiles * self.row + BLOCK
    }

    /// Floats between points of products of `tiles` tiles and `width` channels.
    pub(super) fn products_point(&self, tiles: usize, width: usize) -> usize {
        tiles * width + BLOCK
    }

    /// Floats of the planes that a block's inputs along z take, per channel block and layer of tiles.
    pub(super) fn slab(&self, block: [usize; 3]) -> usize {
        let [rows, columns] = self.footprint(block);
        self.planes * rows * columns * BLOCK
    }

    /// Floats of a block's outputs before the last step, per output block and layer of tiles.
    pub(super) fn results(&self, [_, y, x]: [usize; 3]) -> usize {
        self.planes * y * self.outputs[1] * x * self.outputs[2] * BLOCK
    }

    /// Floats that a thread needs for a block of its own: inputs along z, one plane of inputs, of products, outputs.
    fn own_floats(&self, block: [usize; 3]) -> usize {
        let tiles = block.iter().product();
        self.in_blocks * block[0] * self.slab(block)
            + self.points * (self.inputs_point(tiles) + self.products_point(tiles, 2 * BLOCK))
            + self.out_blocks * block[0] * self.results(block)
    }

    /// Floats that a thread needs for its part of a shared block: one channel block's inputs along z, or products,
    /// outputs and filters of a group.
    fn part_floats(&self) -> usize {
        let tiles = self.block.iter().product();
        let group = self.planes * self.points * self.products_point(tiles, 2 * BLOCK)
            + 2 * self.results(self.block)
            + (self.points + self.g.kernel.iter().product::<usize>()) * (CHUNK * 2 * BLOCK + BLOCK);
        self.slab(self.block).max(group)
    }

    /// Floats of a thread's scratch for its part of the passes.
    fn passes(&self) -> usize {
        if self.shared { self.part_floats() } else { self.own_floats(self.block) }.next_multiple_of(1024) + BLOCK
    }

    /// Floats of one row of inputs in all slices of a tile, before the first pass, where they are not stored as floats.
    pub(super) fn row_floats(&self) -> usize {
        if self.halves_in { self.inputs[0] * self.footprint(self.block)[1] * BLOCK } else { 0 }
    }

    /// Floats of a block's outputs of one channel block, where they are not stored as floats, unless they wait in the ring.
    fn stage_floats(&self) -> usize {
        if self.halves_out && !self.in_place { self.output_floats() / self.out_blocks } else { 0 }
    }

    /// Where in a thread's scratch inputs and outputs are floats that are not stored as such.
    pub(super) fn stages(&self) -> (usize, usize) {
        (self.passes(), self.passes() + self.row_floats())
    }

    /// Floats of a thread's scratch.
    pub(super) fn scratch(&self) -> usize {
        self.passes() + self.row_floats() + self.stage_floats()
    }

    /// Floats of inputs that threads share.
    pub(super) fn common(&self) -> usize {
        let tiles = self.block.iter().product();
        if self.shared { self.planes * self.points * self.inputs_point(tiles) } else { 0 }
    }

    /// Rows and columns of the largest block's outputs.
    pub(super) fn output_area(&self) -> [usize; 2] {
        [1, 2].map(|a| self.block[a] * self.outputs[a])
    }

    /// Floats of the outputs of one block.
    pub(super) fn output_floats(&self) -> usize {
        self.out_blocks * self.block[0] * self.outputs[0] * self.output_area().iter().product::<usize>() * BLOCK
    }

    /// Floats of the outputs of two layers of blocks.
    fn two_layers(&self) -> usize {
        2 * self.blocks[1] * self.blocks[2] * self.output_floats()
    }

    /// Floats of the outputs that wait until their place is no longer read.
    pub(super) fn ring(&self) -> usize {
        if self.in_place { self.two_layers() } else { 0 }
    }

    /// Floats of working memory for `threads` threads.
    pub(crate) fn workspace(&self, threads: usize) -> usize {
        self.common() + threads * self.scratch() + self.ring()
    }

    /// The output replaces the input.
    pub(crate) fn is_in_place(&self) -> bool {
        self.in_place
    }

    /// Floats of the transformed filter to keep, or 0 when it is made on the way.
    pub(crate) fn kept_filter(&self) -> usize {
        if self.shared { 0 } else { prepared_len(self.scheme, &self.g) }
    }

    /// The same of one tile's inputs of one channel block, up to the products.
    pub(super) fn inputs_cycles(&self) -> f64 {
        let ([lz, lxy, _], pz, pxy) = (self.inputs, self.planes, self.side());
        let operations = |kind: Kind| if self.spread { kind.operations().1 } else { kind.operations().0 };
        let (fz, fxy) = (operations(self.scheme.z), operations(self.scheme.xy));
        let area = self.footprint(self.block);
        let per_tile = (area[0] * area[1]) as f64 / (self.block[1] * self.block[2]) as f64;
        per_tile * (0.75 * fz as f64 + 0.7 * (lz + 2 * pz) as f64)
            + pz as f64 * pass(lxy + pxy, fxy, lxy * lxy, pxy * pxy)
    }

    /// Estimated time on one core, in cycles of a core that does one multiply-add of 16 floats in each.
    pub(crate) fn cycles(&self) -> f64 {
        let ([mz, mxy, _], pz, pxy) = (self.outputs, self.planes, self.side());
        let ((_, iz, _), (_, ixy, gxy)) = (self.scheme.z.operations(), self.scheme.xy.operations());
        let inputs = self.inputs_cycles();
        let outputs = pz as f64 * pass(pxy + mxy, ixy, pxy * pxy, mxy * mxy)
            + (mxy * mxy) as f64 * (0.75 * iz as f64 + 0.7 * (pz + 2 * mz) as f64);
        let tiles = (self.tiles.iter().product::<usize>() * self.g.batch) as f64;
        let block: f64 = self.block.iter().product::<usize>() as f64;
        let (i, o) = (self.g.in_channels as f64, self.out_blocks as f64);
        let products = self.scheme.points() as f64 * i * o;
        let mut cycles = tiles * (self.in_blocks as f64 * inputs + o * outputs + products * 1.12 * (1.0 + 0.6 / block));
        if self.shared {
            let taps = self.g.kernel.iter().product::<usize>() as f64;
            let filter = pz as f64 * (2.0 * taps + 0.75 * ((3 + pxy) * gxy) as f64 + 1.4 * (pxy * pxy) as f64);
            cycles += (tiles / block).ceil() * i * o * (filter + 4.0 * taps);
            // Lines of a level-3 cache, six cycles each: every group of output channels reads all inputs, and the products of
            // all planes are added to chunk by chunk.
            let points = self.scheme.points() as f64;
            let mut lines = (o / 2.0).ceil() * (self.row / BLOCK) as f64;
            if points * block * (4 * 2 * BLOCK) as f64 > PRODUCTS_NEAR {
                lines += 2.0 * o * (i / CHUNK as f64).ceil();
            }
            cycles += 6.0 * tiles * points * lines;
        }
        cycles
    }

    /// Channel blocks of the sources one after the other: source, block in it, and first lane in a tile's row.
    pub(super) fn input_blocks(sources: &[Source<'_>]) -> Vec<(usize, usize, usize)> {
        let blocks = sources.iter().enumerate().flat_map(|(s, x)| (0..x.channels.div_ceil(BLOCK)).map(move |b| (s, b)));
        blocks.enumerate().map(|(i, (s, b))| (s, b, i * BLOCK)).collect()
    }
}
