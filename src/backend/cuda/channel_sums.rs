//! Sums of a tensor over samples and voxels, for each channel: the gradient of a bias. `kernels/channel_sums.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{BLOCK, Entry, Storage, int, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "channel_sums";
const THREADS: u32 = 256;
/// Voxels that a part has at least: eight of each thread.
const LEAST: usize = 1024;
/// Blocks that are worth starting for each multiprocessor.
const EACH: usize = 4;

static FILES: Files = files!("channel_sums");

/// A tensor and its sums.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
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
    /// [`workspace`] bytes. Its contents do not matter and are lost.
    pub workspace: Memory,
    /// f32 `[padded channels]`.
    pub out: Memory,
}

/// `ChannelSumsParams` of `kernels/channel_sums.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    data: u64,
    sums: u64,
    out: u64,
    voxels: u64,
    channels: i32,
    parts: i32,
}

/// Voxels of all samples, and into how many parts they are cut; the same for the same card.
fn parts(driver: &dyn Driver, p: &Problem) -> Result<(usize, usize)> {
    if p.channels == 0 {
        return Err(Error::shape(OP, "no channels"));
    }
    let all = voxels(OP, p.batch, p.space)?;
    let side = EACH * driver.multiprocessors().max(1) / (padded(p.channels) / BLOCK);
    Ok((all, all.div_ceil(LEAST).min(side).max(1)))
}

/// Bytes of [`Problem::workspace`].
///
/// # Errors
/// [`Error::Shape`] for sizes that are not supported.
pub fn workspace(driver: &dyn Driver, p: &Problem) -> Result<usize> {
    Ok(parts(driver, p)?.1 * padded(p.channels) * 4)
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes that are not supported or do not fit the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let (all, parts) = parts(driver, p)?;
    let channels = padded(p.channels);
    let params = Params {
        data: p.data.at_least(all * channels * p.storage.bytes(), OP, "the tensor")?,
        sums: p.workspace.at_least(parts * channels * 4, OP, "the workspace")?,
        out: p.out.at_least(channels * 4, OP, "the result")?,
        voxels: all as u64,
        channels: int(OP, channels)?,
        parts: int(OP, parts)?,
    };
    let mut launch = Launch::line(parts, THREADS, 0)?;
    launch.grid[1] = int(OP, channels / BLOCK)?.unsigned_abs();
    FILES.launch(driver, &entry(p.storage), launch, bytemuck::bytes_of(&params))?;
    FILES.launch(driver, MERGE, Launch::line(channels / BLOCK, THREADS, 0)?, bytemuck::bytes_of(&params))
}

const MERGE: &str = "channel_sums_merge";

fn entry(storage: Storage) -> String {
    format!("{OP}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let names = [Storage::F32, Storage::Bf16, Storage::F16].map(entry).into_iter().chain([MERGE.into()]);
    names.flat_map(|name| Entry::of(&FILES, name, size_of::<Params>())).collect()
}
