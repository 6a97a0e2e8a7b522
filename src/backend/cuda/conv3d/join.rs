//! The gradient of a filter of two sources whose channels do not fill whole blocks, `kernels/conv3d_join.cu`.

use bytemuck::{Pod, Zeroable};

use super::super::launch::{Driver, Files, Launch, Memory, files};
use super::super::{BLOCK, Entry, int, padded};
use super::THREADS;
use crate::error::{Error, Result};

const OP: &str = "conv3d_join";

static FILES: Files = files!("conv3d_join");

/// A gradient as [`super::wgrad`] leaves it of two sources.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of the two sources.
    pub channels: [usize; 2],
    /// Output channels without padding.
    pub filters: usize,
    /// Of the kernel, all axes together.
    pub taps: usize,
    /// f32 `[slab of 16 channels of either source][tap][padded filter][16]`.
    pub apart: Memory,
    /// f32 `[slab of 16 channels][tap][padded filter][16]`, channels of the second source right after those of the first.
    pub out: Memory,
}

/// `JoinParams` of `kernels/conv3d_join.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    apart: u64,
    out: u64,
    rows: i32,
    first: i32,
    channels: i32,
    unused: i32,
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let [a, b] = p.channels;
    let rows = p.taps * padded(p.filters);
    if a == 0 || b == 0 || rows == 0 {
        return Err(Error::shape(OP, format!("{a} and {b} channels, {} filters of {} taps", p.filters, p.taps)));
    }
    let (apart, slabs) = ((padded(a) + padded(b)) * rows * 4, padded(a + b) / BLOCK);
    let params = Params {
        apart: p.apart.at_least(apart, OP, "the two parts")?,
        out: p.out.at_least(slabs * BLOCK * rows * 4, OP, "the gradient")?,
        rows: int(OP, rows)?,
        first: int(OP, a)?,
        channels: int(OP, a + b)?,
        unused: 0,
    };
    let launch = Launch::line((slabs * rows).div_ceil(THREADS as usize), THREADS, 0)?;
    FILES.launch(driver, ENTRY, launch, bytemuck::bytes_of(&params))
}

const ENTRY: &str = "conv3d_join_f32";

pub(super) fn entries() -> Vec<Entry> {
    Entry::of(&FILES, ENTRY.into(), size_of::<Params>())
}
