//! Blocks of voxels to their sum, voxels to blocks of copies, and the sum of two tensors, `kernels/pool.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, Storage, int, ints, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "pool";
const THREADS: usize = 256;

static FILES: Files = files!("pool");

/// A tensor, and one with a voxel for each whole block of its voxels.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of both.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Channels without padding.
    pub channels: usize,
    /// D, H, W of the fine one.
    pub space: [usize; 3],
    /// Voxels of a block, at least one of which fits in the fine tensor.
    pub kernel: [usize; 3],
    /// `[N][D][H][W][padded channels]`.
    pub fine: Memory,
    /// `[N][D / kD][H / kH][W / kW][padded channels]`, rounded down.
    pub coarse: Memory,
    /// Of every value that is written.
    pub scale: f32,
}

/// `PoolParams` of `kernels/pool.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    fine: u64,
    coarse: u64,
    batch: i32,
    channels: i32,
    space: [i32; 3],
    kernel: [i32; 3],
    coarse_space: [i32; 3],
    scale: f32,
    unused: i32,
    unused_too: i32,
}

/// The coarse tensor: sums over blocks, times the factor.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn sum(driver: &dyn Driver, p: &Problem) -> Result<()> {
    run(driver, p, "sum")
}

/// The fine tensor: copies of the coarse voxels, times the factor, zero past the last whole block.
///
/// # Errors
/// As [`sum`].
pub fn spread(driver: &dyn Driver, p: &Problem) -> Result<()> {
    run(driver, p, "spread")
}

fn run(driver: &dyn Driver, p: &Problem, way: &str) -> Result<()> {
    if p.kernel.contains(&0) {
        return Err(Error::shape(OP, format!("blocks of {:?} voxels", p.kernel)));
    }
    let coarse = [0, 1, 2].map(|a| p.space[a] / p.kernel[a]);
    let (c, size) = (padded(p.channels), p.storage.bytes());
    let values = |space| Ok::<_, Error>(voxels(OP, p.batch, space)? * c);
    let (fine, few) = (values(p.space)?, values(coarse)?);
    let params = Params {
        fine: p.fine.at_least(fine * size, OP, "the fine tensor")?,
        coarse: p.coarse.at_least(few * size, OP, "the coarse tensor")?,
        batch: int(OP, p.batch)?,
        channels: int(OP, c)?,
        space: ints(OP, p.space)?,
        kernel: ints(OP, p.kernel)?,
        coarse_space: ints(OP, coarse)?,
        scale: p.scale,
        unused: 0,
        unused_too: 0,
    };
    let chunks = if way == "sum" { few } else { fine } / 8;
    let launch = Launch::line(chunks.div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, &entry(way, p.storage), launch, bytemuck::bytes_of(&params))
}

/// `AddParams` of `kernels/pool.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct AddParams {
    a: u64,
    b: u64,
    out: u64,
    chunks: u64,
}

/// `out = a + b` of that many values, a multiple of 8; `out` may be either.
///
/// # Errors
/// As [`sum`].
pub fn add(driver: &dyn Driver, storage: Storage, values: usize, a: Memory, b: Memory, out: Memory) -> Result<()> {
    if values == 0 || !values.is_multiple_of(8) {
        return Err(Error::shape(OP, format!("a sum of {values} values, expected a multiple of 8")));
    }
    let at = |m: Memory| m.at_least(values * storage.bytes(), OP, "a term of a sum");
    let params = AddParams { a: at(a)?, b: at(b)?, out: at(out)?, chunks: values as u64 / 8 };
    let launch = Launch::line((values / 8).div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, &entry("add", storage), launch, bytemuck::bytes_of(&params))
}

fn entry(what: &str, storage: Storage) -> String {
    format!("{OP}_{what}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let size = |what| if what == "add" { size_of::<AddParams>() } else { size_of::<Params>() };
    let storages = [Storage::F32, Storage::Bf16, Storage::F16];
    let all = storages.into_iter().flat_map(|s| ["sum", "spread", "add"].map(|w| (entry(w, s), size(w))));
    all.flat_map(|(name, params)| Entry::of(&FILES, name, params)).collect()
}
