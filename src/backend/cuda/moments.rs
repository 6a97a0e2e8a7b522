//! Moments for instance normalisation, `kernels/moments.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{BLOCK, Entry, Storage, int, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "moments";
/// Tiles of a stored tensor, in voxels.
const TILE: usize = 512;
/// Tiles that a block takes at once.
const STRANDS: u32 = 64;

static FILES: Files = files!("moments");

/// Tiles to put together.
#[derive(Debug, Clone, Copy)]
pub struct Merge {
    /// Samples.
    pub batch: usize,
    /// Channels without padding.
    pub channels: usize,
    /// Voxels of a sample.
    pub voxels: usize,
    /// Tiles of a sample.
    pub tiles: usize,
    /// f32 `[N][tiles][count, mean, squares][padded channels]`.
    pub partials: Memory,
    /// f32 `[padded channels]`, zero for the padding.
    pub weight: Memory,
    /// f32 `[padded channels]`, zero for the padding.
    pub bias: Memory,
    /// Added to the variance.
    pub eps: f32,
    /// f32 `[N][mean, scale, shift][padded channels]`.
    pub norm: Memory,
    /// f32 `[N][padded channels]` for one over the deviation, which the way back asks for.
    pub inverses: Option<Memory>,
}

/// `MergeParams` of `kernels/moments.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct MergeParams {
    partials: u64,
    weight: u64,
    bias: u64,
    norm: u64,
    inverses: u64,
    inverse: f64,
    tiles: i32,
    channels: i32,
    eps: f32,
    unused: i32,
}

/// The normalisation that the moments and the layer's weight and bias make.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn merge(driver: &dyn Driver, p: &Merge) -> Result<()> {
    let c = padded(p.channels);
    if p.voxels == 0 || p.tiles == 0 || c == 0 || p.batch == 0 {
        return Err(Error::shape(OP, format!("{} tiles of {} voxels", p.tiles, p.voxels)));
    }
    let params = MergeParams {
        partials: p.partials.at_least(p.batch * p.tiles * 3 * c * 4, OP, "the moments")?,
        weight: p.weight.at_least(c * 4, OP, "the weight")?,
        bias: p.bias.at_least(c * 4, OP, "the bias")?,
        norm: p.norm.at_least(p.batch * 3 * c * 4, OP, "the normalisation")?,
        inverses: p.inverses.map_or(Ok(0), |m| m.at_least(p.batch * c * 4, OP, "the inverses"))?,
        inverse: 1.0 / p.voxels as f64,
        tiles: int(OP, p.tiles)?,
        channels: int(OP, c)?,
        eps: p.eps,
        unused: 0,
    };
    let mut launch = Launch::line(c / BLOCK, BLOCK as u32 * STRANDS, 0)?;
    launch.grid[1] = int(OP, p.batch)? as u32;
    FILES.launch(driver, "moments_merge", launch, bytemuck::bytes_of(&params))
}

/// A tensor that is in memory.
#[derive(Debug, Clone, Copy)]
pub struct Tiles {
    /// Of the tensor.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Channels without padding.
    pub channels: usize,
    /// D, H, W.
    pub space: [usize; 3],
    /// `[N][D][H][W][padded channels]`.
    pub data: Memory,
    /// f32 `[N][count][count, mean, squares][padded channels]` for the count of [`count`].
    pub partials: Memory,
}

/// `TilesParams` of `kernels/moments.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct TilesParams {
    data: u64,
    partials: u64,
    voxels: i32,
    channels: i32,
    tiles: i32,
    unused: i32,
}

/// Tiles of a sample.
#[must_use]
pub fn count(space: [usize; 3]) -> usize {
    space.iter().product::<usize>().div_ceil(TILE)
}

/// Moments of the tensor's tiles.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn tiles(driver: &dyn Driver, p: &Tiles) -> Result<()> {
    let (c, tiles) = (padded(p.channels), count(p.space));
    let all = voxels(OP, p.batch, p.space)?;
    let params = TilesParams {
        data: p.data.at_least(all * c * p.storage.bytes(), OP, "the tensor")?,
        partials: p.partials.at_least(p.batch * tiles * 3 * c * 4, OP, "the moments")?,
        voxels: int(OP, all / p.batch)?,
        channels: int(OP, c)?,
        tiles: int(OP, tiles)?,
        unused: 0,
    };
    let mut launch = Launch::line(tiles, 2 * STRANDS, 0)?;
    launch.grid[1] = int(OP, c / BLOCK)? as u32;
    launch.grid[2] = int(OP, p.batch)? as u32;
    FILES.launch(driver, &tiles_entry(p.storage), launch, bytemuck::bytes_of(&params))
}

fn tiles_entry(storage: Storage) -> String {
    format!("moments_tiles_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let tiles = [Storage::F32, Storage::Bf16, Storage::F16].map(|s| (tiles_entry(s), size_of::<TilesParams>()));
    let all = tiles.into_iter().chain([("moments_merge".into(), size_of::<MergeParams>())]);
    all.flat_map(|(name, params)| Entry::of(&FILES, name, params)).collect()
}
