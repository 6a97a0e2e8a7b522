//! Sums over windows interpolated to a plane of the image, the last 1x1x1 layer and the decision, `kernels/resample.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files, shared_limit};
use super::{BLOCK, Entry, int, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "resample_labels";
const ENTRY: &str = "resample_labels_f32";

/// Voxels of a block, the larger the better as far as its features fit into shared memory; each thread takes two.
const TILES: [usize; 4] = [256, 128, 64, 32];

/// Channels that are read at once.
const QUAD: usize = 4;

static FILES: Files = files!("resample");

/// A coordinate of the image: `(1 - w) grid[i] + w grid[j]` for `(i, j, w)`; where `w` is 0, `j` is not looked at.
pub type Tap = (usize, usize, f32);

/// The labels of a plane of the image.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// f32 `[ring][H][W][channels]`.
    pub sum: Memory,
    /// f32 `[ring][H][W]`: what the sums are divided by.
    pub counted: Memory,
    /// Planes, height and width of the sums.
    pub ring: [usize; 3],
    /// Channels of the sums, a multiple of 4.
    pub channels: usize,
    /// Planes of the ring between which the plane lies, and the weight of the second; weight 0: only the first is read.
    pub between: Tap,
    /// Where the grid begins in the sums, y and x.
    pub pad: [usize; 2],
    /// Height and width of the grid, to which taps refer.
    pub grid: [usize; 2],
    /// f32 from [`pack_filter`].
    pub filter: Memory,
    /// f32 from [`pack_bias`](super::head_labels::pack_bias).
    pub bias: Memory,
    /// From [`pack_names`].
    pub names: Memory,
    /// Classes of the layer, 1 to 65536.
    pub classes: usize,
    /// The layer's classes are painted over each other where they exceed this; without, the first of the largest wins.
    pub threshold: Option<f32>,
    /// From [`pack_taps`], of the grid's height and width.
    pub taps: [Memory; 2],
    /// Height and width of the image.
    pub size: [usize; 2],
    /// Labels `[height][width]`, u16 or u8.
    pub labels: Memory,
    /// Labels are u16.
    pub wide: bool,
    /// u32 that becomes 1 where a feature is no finite number.
    pub odd: Memory,
}

/// `ResampleParams` of `kernels/resample.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    sum: u64,
    counted: u64,
    filter: u64,
    bias: u64,
    names: u64,
    rows: u64,
    columns: u64,
    labels: u64,
    odd: u64,
    planes: [i32; 2],
    between: f32,
    ring: [i32; 2],
    pad: [i32; 2],
    channels: i32,
    classes: i32,
    size: [i32; 2],
    tile: i32,
    wide: i32,
    painted: i32,
    threshold: f32,
    unused: i32,
}

/// Weights `[classes][channels]` as the kernel reads them, by groups of 16 classes.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit.
pub fn pack_filter(values: &[f32], [classes, channels]: [usize; 2]) -> Result<Vec<f32>> {
    if values.len() != classes * channels || !channels.is_multiple_of(QUAD) {
        return Err(Error::shape(OP, format!("{} weights, {classes} classes, {channels} channels", values.len())));
    }
    let mut packed = vec![0.0; padded(classes) * channels];
    for (class, row) in values.chunks_exact(channels).enumerate() {
        let to = packed[class / BLOCK * channels * BLOCK + class % BLOCK..].iter_mut().step_by(BLOCK);
        to.zip(row).for_each(|(t, v)| *t = *v);
    }
    Ok(packed)
}

/// The label of each class.
#[must_use]
pub fn pack_names(labels: &[u16]) -> Vec<u32> {
    let mut names: Vec<u32> = labels.iter().map(|l| u32::from(*l)).collect();
    names.resize(padded(labels.len()), 0);
    names
}

/// Taps of an axis of `n` voxels.
///
/// # Errors
/// [`Error::Shape`] for one that points elsewhere.
pub fn pack_taps(taps: &[Tap], n: usize) -> Result<Vec<[u32; 4]>> {
    let pack = |&(i, j, w): &Tap| {
        let j = if w == 0.0 { i } else { j };
        if i.max(j) >= n {
            return Err(Error::shape(OP, format!("voxels {i} and {j} of {n}")));
        }
        Ok([int(OP, i)? as u32, int(OP, j)? as u32, w.to_bits(), 0])
    };
    taps.iter().map(pack).collect()
}

/// The voxels of a block, if the features of any number of them fit into its shared memory.
pub(super) fn tile(driver: &dyn Driver, channels: usize) -> Option<(usize, usize)> {
    let shared = |tile: usize| (tile + BLOCK) * channels * 4;
    TILES.into_iter().map(|t| (t, shared(t))).find(|(_, bytes)| *bytes <= shared_limit(driver))
}

/// Whether features of so many channels can be worked on.
#[must_use]
pub fn supports(driver: &dyn Driver, channels: usize) -> bool {
    channels.is_multiple_of(QUAD) && tile(driver, channels).is_some()
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit each other or the memory; [`Error::Unsupported`] when the features do not
/// fit a block's shared memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let [planes, h, w] = p.ring;
    let (first, second, between) = p.between;
    let second = if between == 0.0 { first } else { second };
    let fits = first.max(second) < planes && p.pad[0] + p.grid[0] <= h && p.pad[1] + p.grid[1] <= w;
    if !fits || !p.channels.is_multiple_of(QUAD) || !(1..=1 << 16).contains(&p.classes) {
        let what = format!("a grid of {:?} at {:?}, planes {first} and {second}, of {:?}", p.grid, p.pad, p.ring);
        return Err(Error::shape(OP, format!("{what}, {} channels, {} classes", p.channels, p.classes)));
    }
    let Some((tile, shared)) = tile(driver, p.channels) else {
        return Err(Error::unsupported(format!("{OP} of {} channels", p.channels)));
    };
    let [height, width] = p.size;
    let (sums, all, classes) = (voxels(OP, 1, p.ring)?, voxels(OP, 1, [1, height, width])?, padded(p.classes));
    let params = Params {
        sum: p.sum.at_least(sums * p.channels * 4, OP, "the sums")?,
        counted: p.counted.at_least(sums * 4, OP, "what was counted")?,
        filter: p.filter.at_least(classes * p.channels * 4, OP, "the filter")?,
        bias: p.bias.at_least(classes * 4, OP, "the bias")?,
        names: p.names.at_least(classes * 4, OP, "the labels' names")?,
        rows: p.taps[0].at_least(height * 16, OP, "the rows")?,
        columns: p.taps[1].at_least(width * 16, OP, "the columns")?,
        labels: p.labels.at_least(all * if p.wide { 2 } else { 1 }, OP, "the labels")?,
        odd: p.odd.at_least(4, OP, "what is odd")?,
        planes: [int(OP, first)?, int(OP, second)?],
        between,
        ring: [int(OP, h)?, int(OP, w)?],
        pad: [int(OP, p.pad[0])?, int(OP, p.pad[1])?],
        channels: int(OP, p.channels)?,
        classes: int(OP, classes)?,
        size: [int(OP, height)?, int(OP, width)?],
        tile: int(OP, tile)?,
        wide: i32::from(p.wide),
        painted: i32::from(p.threshold.is_some()),
        threshold: p.threshold.unwrap_or(f32::NEG_INFINITY),
        unused: 0,
    };
    int(OP, all + tile)?;
    let launch = Launch::line(all.div_ceil(tile), tile as u32 / 2, shared)?;
    FILES.launch(driver, ENTRY, launch, bytemuck::bytes_of(&params))
}

pub(super) fn entries() -> Vec<Entry> {
    Entry::of(&FILES, ENTRY.into(), size_of::<Params>())
}
