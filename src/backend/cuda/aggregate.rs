//! Weighted features of windows added to those of the image, `kernels/aggregate.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, Source, SourceParams, Storage, int, ints, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "aggregate";
const THREADS: usize = 256;

static FILES: Files = files!("aggregate");

/// `sum += importance * scale * features` for one window.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of the features.
    pub storage: Storage,
    /// One sample, not repeated.
    pub features: Source,
    /// f32 `[D][H][W]` of the window; 1 without.
    pub importance: Option<Memory>,
    /// f32 `[ring][H][W][channels]` of the image; plane z of the image is plane `z % ring`.
    pub sum: Memory,
    /// f32 `[ring][H][W]`, to which the importance is added.
    pub weight: Option<Memory>,
    /// Planes, height and width of the sums.
    pub ring: [usize; 3],
    /// Channels of the sums, a multiple of 16, and the first of them that the features belong to.
    pub channels: [usize; 2],
    /// Where the window starts in the image.
    pub start: [usize; 3],
    /// Axes along which the window was mirrored.
    pub flip: [bool; 3],
    /// By which all features count.
    pub scale: f32,
}

/// `AggregateParams` of `kernels/aggregate.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    features: SourceParams,
    importance: u64,
    sum: u64,
    weight: u64,
    start: [i32; 3],
    ring: [i32; 3],
    channels: [i32; 2],
    flip: [i32; 3],
    scale: f32,
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit each other or the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let (space, [_, h, w]) = (p.features.space, p.ring);
    let [all, first] = p.channels;
    let c = padded(p.features.channels);
    let inside = space[0] <= p.ring[0] && p.start[1] + space[1] <= h && p.start[2] + space[2] <= w;
    if !inside || p.features.repeat != [1; 3] || first + c > all || all % 8 != 0 || first % 8 != 0 {
        let what = format!("a window of {space:?} at {:?}, channels {:?}, for {:?}", p.start, p.channels, p.ring);
        return Err(Error::shape(OP, what));
    }
    let window = voxels(OP, 1, space)?;
    let planes = voxels(OP, 1, p.ring)?;
    let params = Params {
        features: p.features.params(OP, p.storage, 1)?,
        importance: p.importance.map_or(Ok(0), |m| m.at_least(window * 4, OP, "the importance"))?,
        sum: p.sum.at_least(planes * all * 4, OP, "the sums")?,
        weight: p.weight.map_or(Ok(0), |m| m.at_least(planes * 4, OP, "the weights"))?,
        start: ints(OP, p.start)?,
        ring: ints(OP, p.ring)?,
        channels: [int(OP, all)?, int(OP, first)?],
        flip: p.flip.map(i32::from),
        scale: p.scale,
    };
    int(OP, window * c / 8)?;
    let launch = Launch::line((window * c / 8).div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, &entry(p.storage), launch, bytemuck::bytes_of(&params))
}

fn entry(storage: Storage) -> String {
    format!("{OP}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let names = [Storage::F32, Storage::Bf16, Storage::F16].map(entry);
    names.into_iter().flat_map(|name| Entry::of(&FILES, name, size_of::<Params>())).collect()
}
