//! What convolutions of single voxels and transposed convolutions share, `kernels/gemm.cuh`.

use bytemuck::{Pod, Zeroable};

use super::{BLOCK, Source, SourceParams, Storage, int, padded, sources};
use crate::error::Result;
use crate::tensor::cuda::Memory;

/// Voxels of a block.
pub(super) const ROWS: usize = 128;
/// Filters that a block may have.
pub(super) const BLOCKS: [usize; 3] = [16, 32, WIDEST];
/// The most of them.
pub(super) const WIDEST: usize = 64;

/// Filters of a block, of so many with their padding.
pub(super) fn block(filters: usize) -> usize {
    if filters <= 32 { filters } else { 64 }
}

/// How `kernels/voxels.cuh` cuts a problem: the blocks of a sample and a group of filters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Filters of a block.
    pub(super) filters: usize,
    /// Voxels of a tile.
    pub(super) tile: usize,
    /// Dynamic shared memory.
    pub(super) shared: usize,
    /// Blocks that are worth starting for each multiprocessor; those walk over the tiles.
    pub(super) each: usize,
}

impl Cut {
    /// Blocks of a sample and a group, all with about as many tiles, and of the whole launch.
    pub(super) fn blocks(&self, batch: usize, voxels: usize, filters: usize, multiprocessors: usize) -> (usize, usize) {
        let (tiles, groups) = (voxels.div_ceil(self.tile), filters.div_ceil(self.filters));
        let wished = self.each.saturating_mul(multiprocessors) / (batch * groups);
        let blocks = tiles.div_ceil(tiles.div_ceil(wished.max(1)));
        (blocks, blocks * batch * groups)
    }
}

/// `GemmParams` of `kernels/gemm.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Params {
    pub(super) sources: [SourceParams; 2],
    pub(super) weight: u64,
    pub(super) bias: u64,
    pub(super) out: u64,
    pub(super) filters: i32,
    pub(super) batch: i32,
    /// Voxels that are computed.
    pub(super) space: [i32; 3],
    /// Of the input that is read.
    pub(super) stride: [i32; 3],
    /// Taps that are scattered.
    pub(super) kernel: [i32; 3],
    /// Of a sample and a group of filters, for `kernels/voxels.cuh`.
    pub(super) blocks: i32,
}

/// Without `space`, `stride`, `kernel` and `out`; the filter of one tap.
pub(super) fn params(
    op: &'static str,
    storage: Storage,
    batch: usize,
    from: &[Source],
    weight: Memory,
    bias: Option<Memory>,
    filters: usize,
) -> Result<Params> {
    over(op, sources(op, storage, batch, from)?, storage, batch, weight, bias, filters)
}

/// The same of sources that are checked.
pub(super) fn over(
    op: &'static str,
    sources: [SourceParams; 2],
    storage: Storage,
    batch: usize,
    weight: Memory,
    bias: Option<Memory>,
    filters: usize,
) -> Result<Params> {
    let channels: usize = sources.iter().map(|s| s.channels as usize).sum();
    debug_assert_eq!(channels % BLOCK, 0);
    let filters = padded(filters);
    Ok(Params {
        sources,
        weight: weight.at_least(channels * filters * storage.bytes(), op, "the filter")?,
        bias: bias.map_or(Ok(0), |b| b.at_least(filters * 4, op, "the bias"))?,
        out: 0,
        filters: int(op, filters)?,
        batch: int(op, batch)?,
        space: [0; 3],
        stride: [1; 3],
        kernel: [1; 3],
        blocks: 0,
    })
}
