//! Planes of f32 to voxels and back, mirrored on the way, and windows of an image, `kernels/relayout.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, Storage, int, ints, padded, voxels};
use crate::error::Result;

const OP: &str = "relayout";
const THREADS: usize = 256;

static FILES: Files = files!("relayout");

/// A tensor in both layouts.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of the voxels.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Without padding.
    pub channels: usize,
    /// D, H, W.
    pub space: [usize; 3],
    /// f32 `[N][C][D][H][W]`.
    pub planes: Memory,
    /// `[N][D][H][W][padded C]`.
    pub values: Memory,
    /// Axes along which the copy is mirrored.
    pub flip: [bool; 3],
}

/// `RelayoutParams` of `kernels/relayout.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    planes: u64,
    values: u64,
    batch: i32,
    channels: i32,
    space: [i32; 3],
    flip: [i32; 3],
}

/// Planes to voxels.
///
/// # Errors
/// [`crate::Error::Shape`] for sizes that do not fit the memory; [`crate::Error::Device`].
pub fn to_voxels(driver: &dyn Driver, p: &Problem) -> Result<()> {
    run(driver, p, "to")
}

/// Voxels to planes.
///
/// # Errors
/// As [`to_voxels`].
pub fn from_voxels(driver: &dyn Driver, p: &Problem) -> Result<()> {
    run(driver, p, "from")
}

fn run(driver: &dyn Driver, p: &Problem, way: &str) -> Result<()> {
    let (all, c) = (voxels(OP, p.batch, p.space)?, padded(p.channels));
    let params = Params {
        planes: p.planes.at_least(all * p.channels * 4, OP, "the planes")?,
        values: p.values.at_least(all * c * p.storage.bytes(), OP, "the voxels")?,
        batch: int(OP, p.batch)?,
        channels: int(OP, p.channels)?,
        space: ints(OP, p.space)?,
        flip: p.flip.map(i32::from),
    };
    let mut launch = Launch::line((all / p.batch).div_ceil(THREADS), THREADS as u32, 0)?;
    launch.grid[1] = int(OP, c / 8)? as u32;
    launch.grid[2] = int(OP, p.batch)? as u32;
    FILES.launch(driver, &entry(p.storage, way), launch, bytemuck::bytes_of(&params))
}

/// A window of an image.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Of both.
    pub channels: usize,
    /// f32 `[C][D][H][W]`.
    pub image: Memory,
    /// D, H, W of the image.
    pub image_space: [usize; 3],
    /// f32 `[C][D][H][W]`.
    pub window: Memory,
    /// D, H, W of the window.
    pub space: [usize; 3],
    /// Where the window starts; outside of the image are zeros.
    pub start: [i32; 3],
    /// Axes along which the window is mirrored.
    pub flip: [bool; 3],
}

/// `WindowParams` of `kernels/relayout.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct WindowParams {
    image: u64,
    window: u64,
    channels: i32,
    image_space: [i32; 3],
    space: [i32; 3],
    start: [i32; 3],
    flip: [i32; 3],
    unused: i32,
}

/// Copies a window out of an image.
///
/// # Errors
/// As [`to_voxels`].
pub fn window(driver: &dyn Driver, p: &Window) -> Result<()> {
    let (from, to) = (voxels(OP, 1, p.image_space)?, voxels(OP, 1, p.space)?);
    let params = WindowParams {
        image: p.image.at_least(from * p.channels * 4, OP, "the image")?,
        window: p.window.at_least(to * p.channels * 4, OP, "the window")?,
        channels: int(OP, p.channels)?,
        image_space: ints(OP, p.image_space)?,
        space: ints(OP, p.space)?,
        start: p.start,
        flip: p.flip.map(i32::from),
        unused: 0,
    };
    let mut launch = Launch::line(to.div_ceil(THREADS), THREADS as u32, 0)?;
    launch.grid[1] = int(OP, p.channels)? as u32;
    FILES.launch(driver, "relayout_window", launch, bytemuck::bytes_of(&params))
}

fn entry(storage: Storage, way: &str) -> String {
    format!("{OP}_{way}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let both = ["to", "from"].into_iter();
    let names = both.flat_map(|way| [Storage::F32, Storage::Bf16, Storage::F16].map(|s| entry(s, way)));
    let copies = names.map(|name| (name, size_of::<Params>()));
    let all = copies.chain([("relayout_window".into(), size_of::<WindowParams>())]);
    all.flat_map(|(name, params)| Entry::of(&FILES, name, params)).collect()
}
