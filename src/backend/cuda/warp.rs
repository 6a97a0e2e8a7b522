//! Affine maps of images and labels, `kernels/warp.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, int, ints, voxels};
use crate::error::{Error, Result};

const OP: &str = "warp";
const THREADS: usize = 256;

static FILES: Files = files!("warp");

/// A box of images and labels, and the grid that they are brought to.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// f32 `[channels][D][H][W]` of the box.
    pub image: Memory,
    /// i16 `[D][H][W]` of the box.
    pub labels: Memory,
    /// f32 `[channels][D][H][W]` of the grid.
    pub image_out: Memory,
    /// i16 `[D][H][W]` of the grid.
    pub labels_out: Memory,
    /// Of the image.
    pub channels: usize,
    /// Voxel `t` of the grid lies at `matrix t + shift` in the box, both as (z, y, x).
    pub matrix: [[f64; 3]; 3],
    /// See `matrix`.
    pub shift: [f64; 3],
    /// Voxels of the box, at least two along every axis that is interpolated.
    pub source: [usize; 3],
    /// Voxels of the grid.
    pub grid: [usize; 3],
    /// Where the box begins in its volume: a place halfway between two voxels is nearer to the even one.
    pub origin: [i64; 3],
    /// Interpolate in planes: plane z of the grid is plane z of the box.
    pub planes: bool,
}

/// `WarpParams` of `kernels/warp.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    image: u64,
    labels: u64,
    image_out: u64,
    labels_out: u64,
    matrix: [[f64; 3]; 3],
    shift: [f64; 3],
    channels: i32,
    source: [i32; 3],
    grid: [i32; 3],
    odd: [i32; 3],
}

/// Fills the grid.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory or each other; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let interpolated = usize::from(p.planes);
    // Places are f32, which count no further.
    let few = p.source[interpolated..].iter().all(|n| (2..1 << 24).contains(n));
    if !few || (p.planes && p.source[0] < p.grid[0]) {
        return Err(Error::shape(OP, format!("a box of {:?} voxels for a grid of {:?}", p.source, p.grid)));
    }
    let (from, to) = (voxels(OP, 1, p.source)?, voxels(OP, 1, p.grid)?);
    voxels(OP, p.channels, p.source)?;
    let params = Params {
        image: p.image.at_least(from * p.channels * 4, OP, "the image")?,
        labels: p.labels.at_least(from * 2, OP, "the labels")?,
        image_out: p.image_out.at_least(to * p.channels * 4, OP, "the grid's image")?,
        labels_out: p.labels_out.at_least(to * 2, OP, "the grid's labels")?,
        matrix: p.matrix,
        shift: p.shift,
        channels: int(OP, p.channels)?,
        source: ints(OP, p.source)?,
        grid: ints(OP, p.grid)?,
        odd: p.origin.map(|o| i32::from(o & 1 == 1)),
    };
    let launch = Launch::line(to.div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, entry(p.planes), launch, bytemuck::bytes_of(&params))
}

const fn entry(planes: bool) -> &'static str {
    if planes { "warp_planes" } else { "warp_volumes" }
}

pub(super) fn entries() -> Vec<Entry> {
    [false, true].iter().flat_map(|p| Entry::of(&FILES, entry(*p).into(), size_of::<Params>())).collect()
}
