//! The end of a convolution in parts, `kernels/conv3d_sum.cu`.

use bytemuck::{Pod, Zeroable};

use super::super::launch::{Driver, Files, Launch, files};
use super::super::{BLOCK, Entry, Storage, int, padded};
use super::{OP, Problem};
use crate::error::Result;

static FILES: Files = files!("conv3d_sum");

/// Voxels of a block.
const TILE: usize = 64;
const THREADS: u32 = 128;

/// `SumParams` of `kernels/conv3d_sum.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    sums: u64,
    bias: u64,
    out: u64,
    partials: u64,
    parts: i32,
    batch: i32,
    voxels: i32,
    filters: i32,
}

/// Tiles of a sample of so many voxels, each with its own moments.
pub(super) fn tiles(voxels: usize) -> usize {
    voxels.div_ceil(TILE)
}

/// Parts to add up, checked.
#[derive(Debug)]
pub(super) struct Sum {
    params: Params,
    launch: Launch,
    storage: Storage,
}

impl Sum {
    /// Of a convolution whose result has `voxels` voxels, all samples together.
    pub(super) fn new(p: &Problem<'_>, parts: usize, voxels: usize) -> Result<Sum> {
        let (filters, tiles) = (padded(p.filters), tiles(voxels / p.batch));
        let params = Params {
            sums: p.workspace.map_or(0, |m| m.address),
            bias: p.bias.map_or(Ok(0), |b| b.at_least(filters * 4, OP, "the bias"))?,
            out: p.out.at_least(voxels * filters * p.storage.bytes(), OP, "the result")?,
            partials: p.partials.map_or(Ok(0), |m| m.at_least(p.batch * tiles * 3 * filters * 4, OP, "the moments"))?,
            parts: int(OP, parts)?,
            batch: int(OP, p.batch)?,
            voxels: int(OP, voxels / p.batch)?,
            filters: int(OP, filters)?,
        };
        let mut launch = Launch::line(tiles, THREADS, 0)?;
        launch.grid[1] = int(OP, filters / BLOCK)?.unsigned_abs();
        launch.grid[2] = int(OP, p.batch)?.unsigned_abs();
        Ok(Sum { params, launch, storage: p.storage })
    }

    pub(super) fn run(&self, driver: &dyn Driver) -> Result<()> {
        FILES.launch(driver, &entry(self.storage), self.launch, bytemuck::bytes_of(&self.params))
    }
}

fn entry(storage: Storage) -> String {
    format!("conv3d_sum_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let names = [Storage::Bf16, Storage::F16].map(entry);
    names.into_iter().flat_map(|name| Entry::of(&FILES, name, size_of::<Params>())).collect()
}
