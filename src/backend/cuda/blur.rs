//! Filters along one axis, `kernels/blur.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, int, voxels};
use crate::error::{Error, Result};

const OP: &str = "blur";
const THREADS: usize = 256;
/// Longest kernel.
pub const TAPS: usize = 7;

static FILES: Files = files!("blur");

/// A channel, and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// f32 `[D][H][W]`.
    pub from: Memory,
    /// f32 `[D][H][W]`, other memory.
    pub to: Memory,
    /// D, H, W.
    pub shape: [usize; 3],
    /// 0 for z, 1 for y, 2 for x.
    pub axis: usize,
    /// The one in the middle belongs to the voxel itself.
    pub weights: [f32; TAPS],
    /// How many of them: 1, 3, 5 or 7.
    pub taps: usize,
}

/// `BlurParams` of `kernels/blur.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    from: u64,
    to: u64,
    values: u64,
    inner: u64,
    length: i32,
    taps: i32,
    weights: [f32; TAPS],
    unused: i32,
}

/// The filtered channel; voxels outside are those mirrored about the end voxels.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    if p.axis > 2 || p.taps > TAPS || p.taps.is_multiple_of(2) || p.from.address == p.to.address {
        return Err(Error::shape(OP, format!("{} taps along axis {}, in place or not", p.taps, p.axis)));
    }
    let values = voxels(OP, 1, p.shape)?;
    let params = Params {
        from: p.from.at_least(values * 4, OP, "the channel")?,
        to: p.to.at_least(values * 4, OP, "the result")?,
        values: values as u64,
        inner: p.shape[p.axis + 1..].iter().product::<usize>() as u64,
        length: int(OP, p.shape[p.axis])?,
        taps: int(OP, p.taps)?,
        weights: p.weights,
        unused: 0,
    };
    let launch = Launch::line(values.div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, ENTRY, launch, bytemuck::bytes_of(&params))
}

const ENTRY: &str = "blur_axis";

pub(super) fn entries() -> Vec<Entry> {
    Entry::of(&FILES, ENTRY.into(), size_of::<Params>())
}
