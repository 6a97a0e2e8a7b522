//! A convolution whose output takes the place of its input.
//!
//! Layers of blocks are done in order of z. A layer reads one slice of the layer before it, and its neighbours read its
//! own slices, so its outputs wait in a ring of two layers: the blocks of layer k put the outputs of layer k - 2 in
//! their place, which no one reads any more, and leave theirs where those were.

use super::run::{Block, Job, Place};
use crate::backend::cpu::isa::simd_entry;
use crate::backend::cpu::lanes::Lanes;
use crate::backend::cpu::stored::SharedOut;
use crate::base::par;
use crate::tensor::BLOCK;

/// Layers that wait.
const WAITING: usize = 2;

impl Job<'_> {
    /// All blocks, in the place of the input.
    pub(super) fn in_place(&self) {
        let [layers, ny, nx] = self.plan.blocks;
        let per_layer = ny * nx;
        for sample in 0..self.p.geometry.batch {
            let block = |layer: usize, i: usize| self.block((sample * layers + layer) * per_layer + i);
            for layer in 0..layers + WAITING {
                par::for_each(per_layer, |i| {
                    if layer >= WAITING {
                        self.put_back(&block(layer - WAITING, i));
                    }
                    if layer < layers {
                        self.alone(&block(layer, i));
                    }
                });
            }
        }
    }

    /// Where the outputs of channel block `block` of the `z`-th layer of tiles of `b` wait.
    pub(super) fn waiting(&self, b: &Block, block: usize, z: usize) -> Place<f32> {
        let plan = self.plan;
        let [layers, ny, nx] = plan.blocks;
        let (layer, i) = (b.index / (ny * nx) % layers, b.index % (ny * nx));
        let [rows, columns] = plan.output_area();
        let slices = block * plan.block[0] * plan.outputs[0] + z * plan.outputs[0];
        let at = (layer % WAITING * ny * nx + i) * plan.output_floats() + slices * rows * columns * BLOCK;
        let ring = self.work.ptr().wrapping_add(plan.workspace(rayon::current_num_threads()) - plan.ring());
        Place { start: ring.wrapping_add(at), row: columns * BLOCK, slice: rows * columns * BLOCK }
    }

    /// Puts the outputs of `b` in their place.
    fn put_back(&self, b: &Block) {
        for block in 0..self.plan.out_blocks {
            // SAFETY: this block's outputs are complete, in a part of the ring that is only its own. Their place is read
            // by layers up to the next, which is over.
            unsafe { self.put(b, block, self.waiting(b, block, 0)) }
        }
    }

    /// Copies the outputs of channel block `block` of `b` to their place, rounded if they are not stored as floats.
    ///
    /// # Safety
    /// They are complete at `from`, and no one reads or writes their place.
    pub(super) unsafe fn put(&self, b: &Block, block: usize, from: Place<f32>) {
        let plan = self.plan;
        let first = [0, 1, 2].map(|a| b.first[a] * plan.outputs[a]);
        let size = [0, 1, 2].map(|a| (b.tiles[a] * plan.outputs[a]).min(self.p.geometry.output[a] - first[a]));
        // SAFETY: by contract; the place is that of voxels that exist, and only this block's. Tensors are aligned to 64
        // bytes.
        unsafe {
            match self.out {
                SharedOut::F32(out) => put::on(plan.isa, from, self.place(out, b.sample, block, first), size),
                SharedOut::Bf16(out) => put_halves::on(plan.isa, from, self.place(out, b.sample, block, first), size),
            }
        }
    }
}

simd_entry!(unsafe put = put_of(from: Place<f32>, to: Place<f32>, size: [usize; 3]));
simd_entry!(unsafe put_halves = put_halves_of(from: Place<f32>, to: Place<u16>, size: [usize; 3]));

/// Copies so many slices, rows and columns, past the caches: what is written is next read when all of it is there.
///
/// # Safety
/// The voxels are readable and writable, and `to` is aligned to a block.
#[inline(always)]
unsafe fn put_of<S: Lanes>(s: S, from: Place<f32>, to: Place<f32>, size: [usize; 3]) {
    for i in 0..size[0] * size[1] {
        let (from, to) = (from.row(i / size[1], i % size[1]), to.row(i / size[1], i % size[1]));
        for x in (0..size[2] * BLOCK).step_by(S::N) {
            // SAFETY: by contract.
            unsafe { s.stream(s.load(from.wrapping_add(x)), to.wrapping_add(x)) }
        }
    }
    s.fence();
}

/// Copies so many slices, rows and columns, rounded to bf16.
///
/// # Safety
/// The voxels are readable and writable.
#[inline(always)]
unsafe fn put_halves_of<S: Lanes>(s: S, from: Place<f32>, to: Place<u16>, size: [usize; 3]) {
    for i in 0..size[0] * size[1] {
        let (from, to) = (from.row(i / size[1], i % size[1]), to.row(i / size[1], i % size[1]));
        for x in (0..size[2] * BLOCK).step_by(S::N) {
            // SAFETY: by contract.
            unsafe { s.narrow(s.load(from.wrapping_add(x)), to.wrapping_add(x)) }
        }
    }
}
