//! A channel seen through a coarser grid, `kernels/low_resolution.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, intensity, ints, voxels};
use crate::error::{Error, Result};

const OP: &str = "low_resolution";
const THREADS: usize = 256;

static FILES: Files = files!("low_resolution");

/// A channel, and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// f32 `[D][H][W]`.
    pub from: Memory,
    /// f32 `[D][H][W]`, other memory.
    pub to: Memory,
    /// [`intensity::STATE`] bytes: `from`'s values as [`intensity`] knows them.
    pub state: Memory,
    /// D, H, W.
    pub shape: [usize; 3],
    /// Voxels of the coarse grid.
    pub coarse: [usize; 3],
}

/// `LowResolutionParams` of `kernels/low_resolution.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    from: u64,
    to: u64,
    state: u64,
    shape: [i32; 3],
    coarse: [i32; 3],
    down: [f32; 3],
    up: [f32; 3],
}

/// What the coarse grid knows of the channel.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    if p.coarse.contains(&0) || p.from.address == p.to.address {
        return Err(Error::shape(OP, format!("a coarse grid of {:?} voxels, in place or not", p.coarse)));
    }
    let values = voxels(OP, 1, p.shape)?;
    let ratio = |a: [usize; 3], b: [usize; 3]| [0, 1, 2].map(|k| a[k] as f32 / b[k] as f32);
    let params = Params {
        from: p.from.at_least(values * 4, OP, "the channel")?,
        to: p.to.at_least(values * 4, OP, "the result")?,
        state: p.state.at_least(intensity::STATE, OP, "what is known of the values")?,
        shape: ints(OP, p.shape)?,
        coarse: ints(OP, p.coarse)?,
        down: ratio(p.shape, p.coarse),
        up: ratio(p.coarse, p.shape),
    };
    let launch = Launch::line(values.div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, OP, launch, bytemuck::bytes_of(&params))
}

pub(super) fn entries() -> Vec<Entry> {
    Entry::of(&FILES, OP.into(), size_of::<Params>())
}
