//! The way forward for a filter of any size, stride and padding.
//!
//! Output voxels that are a stride apart form a grid, one per phase; the same taps reach all voxels of it. Voxels of a
//! segment of a grid gather the input that each tap reads, zeros outside, and add its products by the tiles of the way
//! forward.

use super::tile::{Kernels, Tile};
use super::{Geometry, Problem, segment};
use crate::backend::cpu::Shared;
use crate::base::par;
use crate::tensor::BLOCK;

/// The output voxels `first + i stride`, per axis.
#[derive(Debug, Clone, Copy)]
struct Phase {
    first: [usize; 3],
    /// Voxels.
    size: [usize; 3],
}

impl Phase {
    fn new(g: &Geometry, phase: usize) -> Self {
        let [_, sh, sw] = g.stride;
        let first = [phase / (sh * sw), phase / sw % sh, phase % sw];
        let size = [0, 1, 2].map(|a| g.output[a].saturating_sub(first[a]).div_ceil(g.stride[a]));
        Self { first, size }
    }

    fn voxels(&self) -> usize {
        self.size.iter().product()
    }

    fn at(&self, v: usize) -> [usize; 3] {
        let [_, h, w] = self.size;
        [v / (h * w), v / w % h, v % w]
    }

    /// Where, in an output block, voxel `v` is.
    fn place(&self, g: &Geometry, v: usize) -> usize {
        let at = self.at(v);
        g.output_at([0, 1, 2].map(|a| self.first[a] + at[a] * g.stride[a]))
    }

    /// The input voxel that `tap` reads for voxel 0, if it reads any for this grid; the others' follow it.
    fn source(&self, g: &Geometry, tap: usize) -> Option<[isize; 3]> {
        let (tap, mut from) = (g.tap(tap), [0; 3]);
        for a in 0..3 {
            let (to, stride) = (self.first[a] as isize + g.padding[a] as isize - tap[a] as isize, g.stride[a] as isize);
            if to % stride != 0 {
                return None;
            }
            from[a] = to / stride;
        }
        Some(from)
    }
}

/// A segment of a grid of a sample.
#[derive(Debug, Clone, Copy)]
struct Item {
    sample: usize,
    phase: Phase,
    first: usize,
    voxels: usize,
}

/// Writes the transposed convolution of `p` to `out`.
pub(super) fn run(kernels: &Kernels, p: &Problem<'_>, out: &mut [f32]) {
    let g = &p.geometry;
    let segment = segment(g.in_blocks() * BLOCK);
    let mut items = Vec::new();
    for sample in 0..g.batch {
        for phase in (0..g.stride.iter().product()).map(|i| Phase::new(g, i)) {
            let all = phase.voxels();
            items.extend((0..all).step_by(segment).map(|first| {
                let voxels = segment.min(all - first);
                Item { sample, phase, first, voxels }
            }));
        }
    }
    let out = Shared::new(out);
    par::for_each_with(items.len(), Vec::new, |read, i| item(kernels, p, &items[i], read, out));
}

fn item(kernels: &Kernels, p: &Problem<'_>, item: &Item, read: &mut Vec<f32>, out: Shared) {
    let g = &p.geometry;
    let Item { sample, phase, first, voxels } = *item;
    let places: Vec<usize> = (first..first + voxels).map(|v| phase.place(g, v)).collect();
    let block_out = |block: usize| out.ptr().wrapping_add((sample * g.blocks() + block) * g.out_voxels() * BLOCK);
    for block in 0..g.blocks() {
        let bias = p.bias.map_or([0.0; BLOCK], |b| b.as_chunks::<BLOCK>().0[block]);
        for place in &places {
            // SAFETY: a place is a vector of the output block, and no other item has a voxel of this grid's segment.
            unsafe { block_out(block).wrapping_add(*place).cast::<[f32; BLOCK]>().write(bias) };
        }
    }
    let run = voxels * BLOCK;
    read.resize(g.in_blocks() * run, 0.0);
    for tap in 0..g.taps() {
        let Some(from) = phase.source(g, tap) else { continue };
        gather(p, item, from, read);
        for block in 0..g.blocks() {
            let (filter, channel) = g.weights(block, tap);
            let tile = Tile {
                input: read.as_ptr(),
                run,
                runs: g.in_blocks(),
                last: g.in_channels - (g.in_blocks() - 1) * BLOCK,
                filter: p.filter[filter..].as_ptr(),
                channel,
                bias: std::ptr::null(),
                add: true,
                out: block_out(block),
                places: places.as_ptr(),
                second: 0,
                stream: false,
            };
            // SAFETY: `read` holds the segment of every input block, the filter a block of weights for each of their
            // channels; the output was written above and is this item's own; the list of implementations offers these
            // functions only to devices with their instruction set.
            unsafe { tile.row(kernels.one, voxels) };
        }
    }
}

/// The input that a tap reads, `from` for the grid's voxel 0, of all input blocks.
fn gather(p: &Problem<'_>, item: &Item, from: [isize; 3], read: &mut [f32]) {
    let g = &p.geometry;
    let source = |v: usize| {
        let at = item.phase.at(v);
        let mut index = 0;
        for a in 0..3 {
            let i = at[a].checked_add_signed(from[a]).filter(|i| *i < g.input[a])?;
            index = index * g.input[a] + i;
        }
        Some(index)
    };
    let sources: Vec<Option<usize>> = (item.first..item.first + item.voxels).map(source).collect();
    let (input, _) = p.input.as_chunks::<BLOCK>();
    for (block, read) in read.chunks_exact_mut(item.voxels * BLOCK).enumerate() {
        let input = &input[(item.sample * g.in_blocks() + block) * g.voxels()..][..g.voxels()];
        for (to, from) in read.as_chunks_mut::<BLOCK>().0.iter_mut().zip(&sources) {
            *to = from.map_or([0.0; BLOCK], |i| input[i]);
        }
    }
}
