//! The way back of instance normalisation with leaky ReLU, `kernels/instance_norm_grad.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{BLOCK, Entry, Norm, Storage, int, moments, padded, voxels};
use crate::error::Result;

const OP: &str = "instance_norm_grad";
const THREADS: usize = 256;
/// Tiles that a block takes at once.
const STRANDS: u32 = 64;

static FILES: Files = files!("instance_norm_grad");

/// What leaky ReLU did is told by the normalised value, or by the sign of what came out where something was added before it.
#[derive(Debug, Clone, Copy)]
pub enum Mask {
    /// The normalised value's sign.
    Normalised,
    /// Of what was added too.
    Added {
        /// As it came out of leaky ReLU.
        result: Memory,
        /// For the gradient before leaky ReLU, which is that of what was added; may be the memory of `dy`.
        masked: Memory,
    },
}

/// A tensor that was normalised, and the gradient of what became of it.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of all tensors.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Channels without padding.
    pub channels: usize,
    /// D, H, W.
    pub space: [usize; 3],
    /// Before it was normalised.
    pub x: Memory,
    /// How, and the slope of leaky ReLU.
    pub norm: Norm,
    /// f32 `[N][padded channels]`, from [`moments::merge`].
    pub inverses: Memory,
    /// Of the result.
    pub dy: Memory,
    /// See [`Mask`].
    pub mask: Mask,
    /// Room for [`partials`] floats.
    pub partials: Memory,
    /// Room for `N * 2 * padded channels` floats.
    pub sums: Memory,
    /// f32 `[padded channels]`, for the gradient of the layer's weight.
    pub dweight: Memory,
    /// f32 `[padded channels]`, of its bias.
    pub dbias: Memory,
    /// Of `x`; may be the memory of `dy`, unless that holds the masked one.
    pub dx: Memory,
}

/// `NormGradParams` of `kernels/instance_norm_grad.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    x: u64,
    norm: u64,
    inverses: u64,
    dy: u64,
    result: u64,
    masked: u64,
    partials: u64,
    sums: u64,
    dx: u64,
    voxels: i32,
    channels: i32,
    tiles: i32,
    batch: i32,
    slope: f32,
    unused: i32,
}

/// `NormMergeParams` there.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct MergeParams {
    partials: u64,
    sums: u64,
    dweight: u64,
    dbias: u64,
    inverse: f64,
    tiles: i32,
    channels: i32,
    batch: i32,
    unused: i32,
}

/// Floats of [`Problem::partials`].
#[must_use]
pub fn partials(batch: usize, channels: usize, space: [usize; 3]) -> usize {
    batch * moments::count(space) * 2 * padded(channels)
}

/// Runs it.
///
/// # Errors
/// [`crate::Error::Shape`] for sizes that do not fit the memory; [`crate::Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let (c, tiles) = (padded(p.channels), moments::count(p.space));
    let all = voxels(OP, p.batch, p.space)?;
    let bytes = all * c * p.storage.bytes();
    let tensor = |m: Memory, what| m.at_least(bytes, OP, what);
    let (result, masked) = match p.mask {
        Mask::Normalised => (0, 0),
        Mask::Added { result, masked } => {
            (tensor(result, "the result")?, tensor(masked, "the gradient before leaky ReLU")?)
        }
    };
    let params = Params {
        x: tensor(p.x, "the input")?,
        norm: p.norm.planes.at_least(p.batch * 3 * c * 4, OP, "the normalisation")?,
        inverses: p.inverses.at_least(p.batch * c * 4, OP, "the inverses")?,
        dy: tensor(p.dy, "the result's gradient")?,
        result,
        masked,
        partials: p.partials.at_least(partials(p.batch, p.channels, p.space) * 4, OP, "the partial sums")?,
        sums: p.sums.at_least(p.batch * 2 * c * 4, OP, "the sums")?,
        dx: tensor(p.dx, "the input's gradient")?,
        voxels: int(OP, all / p.batch)?,
        channels: int(OP, c)?,
        tiles: int(OP, tiles)?,
        batch: int(OP, p.batch)?,
        slope: p.norm.slope,
        unused: 0,
    };
    let merge = MergeParams {
        partials: params.partials,
        sums: params.sums,
        dweight: p.dweight.at_least(c * 4, OP, "the weight's gradient")?,
        dbias: p.dbias.at_least(c * 4, OP, "the bias's gradient")?,
        inverse: p.batch as f64 / all as f64,
        tiles: params.tiles,
        channels: params.channels,
        batch: params.batch,
        unused: 0,
    };
    let mut by_tiles = Launch::line(tiles, 2 * STRANDS, 0)?;
    by_tiles.grid[1] = int(OP, c / BLOCK)?.unsigned_abs();
    by_tiles.grid[2] = int(OP, p.batch)?.unsigned_abs();
    let by_channels = Launch::line(c / BLOCK, BLOCK as u32 * STRANDS, 0)?;
    let by_values = Launch::line((all * c / 8).div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, &entry("sums", p.storage), by_tiles, bytemuck::bytes_of(&params))?;
    FILES.launch(driver, MERGE, by_channels, bytemuck::bytes_of(&merge))?;
    FILES.launch(driver, &entry("input", p.storage), by_values, bytemuck::bytes_of(&params))
}

const MERGE: &str = "instance_norm_grad_merge";

fn entry(what: &str, storage: Storage) -> String {
    format!("{OP}_{what}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let storages = [Storage::F32, Storage::Bf16, Storage::F16];
    let both = storages.into_iter().flat_map(|s| ["sums", "input"].map(|w| (entry(w, s), size_of::<Params>())));
    let all = both.chain([(MERGE.into(), size_of::<MergeParams>())]);
    all.flat_map(|(name, params)| Entry::of(&FILES, name, params)).collect()
}
