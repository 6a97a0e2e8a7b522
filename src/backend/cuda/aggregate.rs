//! Weighted features of windows, or scores made of them, added to those of the image, `kernels/aggregate.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, Source, SourceParams, Storage, int, ints, padded, resample, voxels};
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
    /// Channels of the sums, a multiple of 8, and the first of them that the features belong to.
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

/// What becomes of the scores of a voxel before they are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// Softmax over the classes.
    Softmax,
    /// Each class by itself.
    Sigmoid,
}

/// `sum += importance * scale * activation(filter features + bias)` for one window. Scores are in f32 and nowhere in memory.
#[derive(Debug, Clone, Copy)]
pub struct Scores {
    /// With sums of [`lanes`] channels that begin with the first.
    pub window: Problem,
    /// f32 from [`resample::pack_filter`], of the features' channels with their padding.
    pub filter: Memory,
    /// f32 from [`pack_bias`](super::head_labels::pack_bias).
    pub bias: Memory,
    /// At least 1.
    pub classes: usize,
    /// Of the scores.
    pub activation: Activation,
}

/// `ScoresParams` of `kernels/aggregate.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct ScoresParams {
    window: Params,
    filter: u64,
    bias: u64,
    classes: i32,
    scored: i32,
    how: i32,
    tile: i32,
}

/// Channels of sums of that many classes' scores.
#[must_use]
pub const fn lanes(classes: usize) -> usize {
    classes.next_multiple_of(4)
}

/// Whether scores can be made of features of so many channels.
#[must_use]
pub fn scores_supported(driver: &dyn Driver, channels: usize) -> bool {
    resample::tile(driver, padded(channels)).is_some()
}

/// Adds scores.
///
/// # Errors
/// As [`run`]; [`Error::Unsupported`] when the features do not fit a block's shared memory.
pub fn run_scores(driver: &dyn Driver, p: &Scores) -> Result<()> {
    let (channels, classes) = (padded(p.window.features.channels), padded(p.classes));
    let Some((tile, shared)) = resample::tile(driver, channels) else {
        return Err(Error::unsupported(format!("{OP} of scores of {channels} channels")));
    };
    if p.classes == 0 || p.window.channels != [lanes(p.classes), 0] {
        let what = format!("sums of channels {:?} for {} classes", p.window.channels, p.classes);
        return Err(Error::shape(OP, what));
    }
    let params = ScoresParams {
        window: params(&p.window)?,
        filter: p.filter.at_least(classes * channels * 4, OP, "the filter")?,
        bias: p.bias.at_least(classes * 4, OP, "the bias")?,
        classes: int(OP, classes)?,
        scored: int(OP, p.classes)?,
        how: match p.activation {
            Activation::Identity => 0,
            Activation::Softmax => 1,
            Activation::Sigmoid => 2,
        },
        tile: int(OP, tile)?,
    };
    let window = voxels(OP, 1, p.window.features.space)?;
    int(OP, window + tile)?;
    let launch = Launch::line(window.div_ceil(tile), tile as u32 / 2, shared)?;
    FILES.launch(driver, &scores_entry(p.window.storage), launch, bytemuck::bytes_of(&params))
}

/// Adds features.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit each other or the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let [all, first] = p.channels;
    let c = padded(p.features.channels);
    if first + c > all || all % 8 != 0 || first % 8 != 0 {
        return Err(Error::shape(OP, format!("{c} channels for {:?} of the sums", p.channels)));
    }
    let params = params(p)?;
    let chunks = voxels(OP, 1, p.features.space)? * c / 8;
    int(OP, chunks)?;
    let launch = Launch::line(chunks.div_ceil(THREADS), THREADS as u32, 0)?;
    FILES.launch(driver, &entry(p.storage), launch, bytemuck::bytes_of(&params))
}

/// Of a window that lies inside of the sums.
fn params(p: &Problem) -> Result<Params> {
    let (space, [_, h, w], [all, first]) = (p.features.space, p.ring, p.channels);
    let inside = space[0] <= p.ring[0] && p.start[1] + space[1] <= h && p.start[2] + space[2] <= w;
    if !inside || p.features.repeat != [1; 3] {
        let what = format!("a window of {space:?} at {:?}, channels {:?}, for {:?}", p.start, p.channels, p.ring);
        return Err(Error::shape(OP, what));
    }
    let window = voxels(OP, 1, space)?;
    let planes = voxels(OP, 1, p.ring)?;
    Ok(Params {
        features: p.features.params(OP, p.storage, 1)?,
        importance: p.importance.map_or(Ok(0), |m| m.at_least(window * 4, OP, "the importance"))?,
        sum: p.sum.at_least(planes * all * 4, OP, "the sums")?,
        weight: p.weight.map_or(Ok(0), |m| m.at_least(planes * 4, OP, "the weights"))?,
        start: ints(OP, p.start)?,
        ring: ints(OP, p.ring)?,
        channels: [int(OP, all)?, int(OP, first)?],
        flip: p.flip.map(i32::from),
        scale: p.scale,
    })
}

fn entry(storage: Storage) -> String {
    format!("{OP}_{}", storage.name())
}

fn scores_entry(storage: Storage) -> String {
    format!("{OP}_scores_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let storages = [Storage::F32, Storage::Bf16, Storage::F16];
    let features = storages.map(|s| (entry(s), size_of::<Params>()));
    let scores = storages.map(|s| (scores_entry(s), size_of::<ScoresParams>()));
    features.into_iter().chain(scores).flat_map(|(name, params)| Entry::of(&FILES, name, params)).collect()
}
