//! The end of a residual block, and normalisation by itself, `kernels/instance_norm.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, Source, SourceParams, Storage, int, ints, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "instance_norm";
const THREADS: usize = 256;

static FILES: Files = files!("instance_norm");

/// `leaky_relu(normalised(x) + shortcut)`.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of all tensors.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Not repeated.
    pub x: Source,
    /// Of the same size.
    pub shortcut: Option<Source>,
    /// For negative values, 1 for none.
    pub slope: f32,
    /// As `x`; may be the memory of `x` or of the shortcut, as every value is read before it is written.
    pub out: Memory,
}

/// `NormParams` of `kernels/instance_norm.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    sources: [SourceParams; 2],
    out: u64,
    batch: i32,
    space: [i32; 3],
    slope: f32,
    unused: i32,
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit each other or the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let space = p.x.space;
    let fits = |s: Source| s.repeat == [1; 3] && s.space == space && s.channels == p.x.channels;
    if !fits(p.x) || p.shortcut.is_some_and(|s| !fits(s)) {
        return Err(Error::shape(OP, format!("{:?} for {:?}", p.shortcut, p.x)));
    }
    let values = voxels(OP, p.batch, space)? * padded(p.x.channels);
    let source = |s: Option<Source>| match s {
        Some(s) => s.params(OP, p.storage, p.batch),
        None => Ok(SourceParams::default()),
    };
    let params = Params {
        sources: [source(Some(p.x))?, source(p.shortcut)?],
        out: p.out.at_least(values * p.storage.bytes(), OP, "the result")?,
        batch: int(OP, p.batch)?,
        space: ints(OP, space)?,
        slope: p.slope,
        unused: 0,
    };
    let launch = Launch::line((values / 8).div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, &entry(p.storage), launch, bytemuck::bytes_of(&params))
}

fn entry(storage: Storage) -> String {
    format!("{OP}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let names = [Storage::F32, Storage::Bf16, Storage::F16].map(entry);
    names.into_iter().flat_map(|name| Entry::of(&FILES, name, size_of::<Params>())).collect()
}
