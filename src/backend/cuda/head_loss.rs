//! The last 1x1x1 layer, cross-entropy and soft Dice of its scores, and the gradients by its input, filter and bias,
//! without scores or their gradient in memory; `kernels/head_loss.cu` and `kernels/head_loss_terms.cu`. The loss is
//! that of `src/ops/loss.rs`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files, shared_limit};
use super::{BLOCK, Entry, Storage, int, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "head_loss";
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Columns that a block of the merging kernel has, and its threads.
const MERGED: (usize, u32) = (32, 1024);
/// Classes that a block has of the filter's gradient, in blocks of 16.
const CHUNKS: usize = 8;
/// Blocks that are worth starting for each multiprocessor.
const EACH: usize = 2;

static FILES: Files = files!("head_loss");
static TERMS: Files = files!("head_loss_terms");

/// Classes that are regions of labels.
#[derive(Debug, Clone, Copy)]
pub struct Regions {
    /// u16 from [`pack_regions`].
    pub members: Memory,
    /// Its length divided by the number of 16 classes.
    pub rows: usize,
}

/// A layer and the truth that its scores are compared with.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of features, filter and the features' gradient.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// D, H, W.
    pub space: [usize; 3],
    /// `[N][D][H][W][padded channels]`.
    pub features: Memory,
    /// Channels without padding.
    pub channels: usize,
    /// `[slab of 16 channels][padded classes][16]`, as [`super::conv3d::pack_weight`] gives it.
    pub weight: Memory,
    /// f32 `[padded classes]`.
    pub bias: Option<Memory>,
    /// 1 to 65536 without padding.
    pub classes: usize,
    /// u16 `[N][D][H][W]`.
    pub labels: Memory,
    /// Class i is label i without, and a voxel's probabilities are a softmax; with, each is a sigmoid.
    pub regions: Option<Regions>,
    /// Voxels of this label take no part.
    pub ignore: Option<u16>,
    /// Intersections and volumes are of the whole batch.
    pub batch_dice: bool,
    /// f32, [`slopes_bytes`] in all: how the loss grows with what it is made of. [`forward`] leaves it for
    /// [`backward`].
    pub slopes: Memory,
    /// [`workspace_bytes`]; nothing in it is kept.
    pub workspace: Memory,
}

/// The weights of the loss, as in `src/ops/loss.rs`.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Weight of the cross-entropy.
    pub cross_entropy: f64,
    /// Only the largest cross-entropies count: not supported.
    pub top: Option<f64>,
    /// Weight of Dice.
    pub dice: f64,
    /// Class 0 counts in Dice.
    pub background: bool,
    /// Added to numerator and denominator.
    pub smooth: f64,
}

/// What [`backward`] writes.
#[derive(Debug, Clone, Copy)]
pub struct Gradients {
    /// All gradients are multiplied by this.
    pub scale: f32,
    /// As the features.
    pub features: Memory,
    /// f32 `[slab of 16 channels][padded classes][16]`.
    pub weight: Memory,
    /// f32 `[padded classes]`.
    pub bias: Option<Memory>,
}

/// Labels that are wanted at another size.
#[derive(Debug, Clone, Copy)]
pub struct Labels {
    /// Samples.
    pub batch: usize,
    /// D, H, W of the labels.
    pub from_space: [usize; 3],
    /// u16 `[N][D][H][W]`.
    pub labels: Memory,
    /// D, H, W of the result.
    pub space: [usize; 3],
    /// u16 `[N][D][H][W]`.
    pub out: Memory,
}

/// `HeadLossParams` of `kernels/head_loss.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    features: u64,
    weight: u64,
    bias: u64,
    labels: u64,
    members: u64,
    slopes: u64,
    partials: u64,
    gradient: u64,
    channels: i32,
    classes: i32,
    real: i32,
    voxels: i32,
    batch: i32,
    tiles: i32,
    rows: i32,
    ignore: i32,
    by_sample: i32,
    width: i32,
    scale: f32,
    unused: i32,
}

/// `MergeParams` of `kernels/head_loss_terms.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct MergeParams {
    from: u64,
    to: u64,
    rest: u64,
    rows: i32,
    stride: i32,
    columns: i32,
    split: i32,
}

/// `TermsParams` of `kernels/head_loss_terms.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct TermsParams {
    sums: u64,
    slopes: u64,
    value: u64,
    cross_entropy: f64,
    dice: f64,
    smooth: f64,
    count: f64,
    classes: i32,
    real: i32,
    first: i32,
    batch: i32,
    by_sample: i32,
    unused: i32,
}

/// `LabelsParams` of `kernels/head_loss_terms.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct LabelsParams {
    from: u64,
    to: u64,
    from_space: [i32; 3],
    space: [i32; 3],
    batch: i32,
    unused: i32,
}

/// How a problem is cut into blocks.
#[derive(Debug, Clone, Copy)]
struct Cut {
    voxels: usize,
    channels: usize,
    classes: usize,
    /// Of a sample, forward and backward.
    tiles: [usize; 2],
    /// Of a sample forward, of all and a group of channels and classes backward.
    blocks: [usize; 2],
    /// Groups of channels and of classes, backward.
    groups: [usize; 2],
    /// Slabs of a group of channels.
    slabs: usize,
    /// Sets of sums of a block, backward.
    parts: usize,
}

impl Cut {
    fn new(driver: &dyn Driver, p: &Problem) -> Result<Cut> {
        let all = voxels(OP, p.batch, p.space)?;
        int(OP, all)?;
        if p.channels == 0 || !(1..=1 << 16).contains(&p.classes) {
            return Err(Error::shape(OP, format!("{} classes of {} channels", p.classes, p.channels)));
        }
        let (n, channels, classes) = (all / p.batch, padded(p.channels), padded(p.classes));
        let wide = p.storage == Storage::F32;
        let slabs = if wide { channels / BLOCK } else { held(channels, 2).unwrap_or(4) };
        let chunks = classes / BLOCK;
        let groups = if wide { [1, 1] } else { [(channels / BLOCK).div_ceil(slabs), chunks.div_ceil(CHUNKS)] };
        let tiles = [n.div_ceil(if wide { 128 } else { 256 }), n.div_ceil(128)];
        // All with about as many tiles.
        let even =
            |tiles: usize, of: usize| tiles.div_ceil(tiles.div_ceil((EACH * driver.multiprocessors() / of).max(1)));
        Ok(Cut {
            voxels: n,
            channels,
            classes,
            tiles,
            blocks: [even(tiles[0], p.batch), even(tiles[1] * p.batch, groups[0] * groups[1])],
            groups,
            slabs,
            parts: if wide { 1 } else { WARPS / chunks.next_power_of_two().min(CHUNKS) },
        })
    }

    /// Sums of a block or a sample, forward.
    fn columns(&self) -> usize {
        3 * self.classes + 2
    }

    /// Values of the filter and the bias.
    fn parameters(&self) -> usize {
        self.classes * (self.channels + 1)
    }

    /// Values of the workspace, forward and backward; forward the samples' sums come after those of blocks.
    fn workspace(&self, batch: usize) -> [usize; 2] {
        [batch * (self.blocks[0] + 1) * self.columns(), self.blocks[1] * self.parts * self.parameters()]
    }
}

/// Slabs of an entry that has so many `channels` in registers, of the most that one may have.
fn held(channels: usize, most: usize) -> Option<usize> {
    [2, 4].into_iter().find(|s| channels <= s * BLOCK && *s <= most)
}

/// Bytes of [`Problem::slopes`].
#[must_use]
pub fn slopes_bytes(batch: usize, classes: usize, batch_dice: bool) -> usize {
    let groups = if batch_dice { 1 } else { batch };
    (groups * 2 * padded(classes) + 1) * 4
}

/// Bytes of [`Problem::workspace`], which need not be there yet.
///
/// # Errors
/// [`Error::Shape`] for sizes that kernels cannot count.
pub fn workspace_bytes(driver: &dyn Driver, p: &Problem) -> Result<usize> {
    let [forward, backward] = Cut::new(driver, p)?.workspace(p.batch);
    Ok(forward.max(backward) * 4)
}

/// Regions as the kernel reads them: region `i` consists of the labels `regions[i]`. A row for each label and one for
/// all higher ones, a bit for each region.
#[must_use]
pub fn pack_regions(regions: &[Vec<u16>]) -> Vec<u16> {
    let chunks = regions.len().div_ceil(BLOCK);
    let rows = regions.iter().flatten().map(|l| usize::from(*l) + 2).max().unwrap_or(1);
    let mut packed = vec![0; rows * chunks];
    for (i, region) in regions.iter().enumerate() {
        for &label in region {
            packed[usize::from(label) * chunks + i / BLOCK] |= 1 << (i % BLOCK);
        }
    }
    packed
}

fn params(p: &Problem, cut: &Cut) -> Result<Params> {
    let bytes = p.storage.bytes();
    let all = cut.voxels * p.batch;
    let (members, rows) = match &p.regions {
        None => (0, 0),
        Some(r) if r.rows == 0 => return Err(Error::shape(OP, "regions without a row")),
        Some(r) => {
            (r.members.at_least(r.rows * cut.classes / BLOCK * 2, OP, "the regions")?, int(OP, r.rows * cut.classes)?)
        }
    };
    Ok(Params {
        features: p.features.at_least(all * cut.channels * bytes, OP, "the features")?,
        weight: p.weight.at_least(cut.channels * cut.classes * bytes, OP, "the filter")?,
        bias: p.bias.map_or(Ok(0), |b| b.at_least(cut.classes * 4, OP, "the bias"))?,
        labels: p.labels.at_least(all * 2, OP, "the labels")?,
        members,
        slopes: p.slopes.at_least(slopes_bytes(p.batch, p.classes, p.batch_dice), OP, "the slopes")?,
        partials: 0,
        gradient: 0,
        channels: int(OP, cut.channels)?,
        classes: int(OP, cut.classes)?,
        real: int(OP, p.classes)?,
        voxels: int(OP, cut.voxels)?,
        batch: int(OP, p.batch)?,
        tiles: 0,
        rows: rows / int(OP, cut.classes)?,
        ignore: p.ignore.map_or(-1, i32::from),
        by_sample: i32::from(!p.batch_dice),
        width: int(OP, WARPS / cut.parts)?,
        scale: 1.0,
        unused: 0,
    })
}

/// Sums the rows of each of so many groups.
fn merge(driver: &dyn Driver, params: &MergeParams, groups: i32) -> Result<()> {
    let mut launch = Launch::line((params.columns as usize).div_ceil(MERGED.0), MERGED.1, 0)?;
    launch.grid[1] = groups as u32;
    TERMS.launch(driver, "head_loss_merge", launch, bytemuck::bytes_of(params))
}

/// The loss, as one f32 in `value`, and its slopes. NaN when a label is neither a class nor ignored; without a voxel
/// that takes part the cross-entropy is 0.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory or weights that contradict each other; [`Error::Unsupported`]
/// for [`Terms::top`] and for more classes than a block has shared memory for; [`Error::Device`].
pub fn forward(driver: &dyn Driver, p: &Problem, terms: &Terms, value: Memory) -> Result<()> {
    if terms.top.is_some() {
        return Err(Error::unsupported(format!("{OP} of the largest cross-entropies")));
    }
    let first = usize::from(!terms.background);
    let numbers = [terms.cross_entropy, terms.dice, terms.smooth];
    if numbers.iter().any(|v| !v.is_finite()) || terms.smooth < 0.0 || (terms.dice != 0.0 && p.classes == first) {
        return Err(Error::shape(OP, format!("{terms:?} of {} classes", p.classes)));
    }
    let cut = Cut::new(driver, p)?;
    let (blocks, columns) = (cut.blocks[0], cut.columns());
    let workspace = p.workspace.at_least(cut.workspace(p.batch)[0] * 4, OP, "the workspace")?;
    let mut params = params(p, &cut)?;
    params.partials = workspace;
    params.tiles = int(OP, cut.tiles[0])?;
    let shared = WARPS * 3 * cut.classes * 4;
    if shared > shared_limit(driver) - 1024 {
        return Err(Error::unsupported(format!("{OP} of {} classes", p.classes)));
    }
    let sums = workspace + (p.batch * blocks * columns * 4) as u64;
    let last = TermsParams {
        sums,
        slopes: params.slopes,
        value: value.at_least(4, OP, "the loss")?,
        cross_entropy: terms.cross_entropy,
        dice: terms.dice,
        smooth: terms.smooth,
        count: match (p.regions, p.ignore) {
            (Some(_), None) => (p.batch * cut.voxels) as f64 * p.classes as f64,
            _ => 0.0,
        },
        classes: params.classes,
        real: params.real,
        first: int(OP, first)?,
        batch: params.batch,
        by_sample: params.by_sample,
        unused: 0,
    };
    let mut launch = Launch::line(blocks, THREADS as u32, shared)?;
    launch.grid[1] = int(OP, p.batch)? as u32;
    FILES.launch(driver, &entry("forward", p.storage, held(cut.channels, 4)), launch, bytemuck::bytes_of(&params))?;
    let columns = int(OP, columns)?;
    let rows = MergeParams {
        from: workspace,
        to: sums,
        rest: 0,
        rows: int(OP, blocks)?,
        stride: columns,
        columns,
        split: columns,
    };
    merge(driver, &rows, params.batch)?;
    TERMS.launch(driver, "head_loss_terms", Launch::line(1, THREADS as u32, 0)?, bytemuck::bytes_of(&last))
}

/// The gradients of the loss whose slopes [`forward`] has left.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn backward(driver: &dyn Driver, p: &Problem, to: &Gradients) -> Result<()> {
    let cut = Cut::new(driver, p)?;
    let (blocks, size) = (cut.blocks[1], cut.channels * cut.classes);
    let all = cut.voxels * p.batch * cut.channels;
    let workspace = p.workspace.at_least(cut.workspace(p.batch)[1] * 4, OP, "the workspace")?;
    let mut params = params(p, &cut)?;
    params.partials = workspace;
    params.tiles = int(OP, cut.tiles[1])?;
    int(OP, cut.tiles[1] * p.batch)?;
    params.gradient = to.features.at_least(all * p.storage.bytes(), OP, "the features' gradient")?;
    params.scale = to.scale;
    let weight = to.weight.at_least(size * 4, OP, "the filter's gradient")?;
    let bias = to.bias.map_or(Ok(0), |b| b.at_least(cut.classes * 4, OP, "the bias's gradient"))?;
    let shared = match p.storage {
        Storage::F32 => 0,
        _ => ((cut.classes / BLOCK).min(CHUNKS) + cut.slabs.min(cut.channels / BLOCK)) * 128 * BLOCK * 2,
    };
    let mut launch = Launch::line(blocks, THREADS as u32, shared)?;
    launch.grid[1] = int(OP, cut.groups[0])? as u32;
    launch.grid[2] = int(OP, cut.groups[1])? as u32;
    FILES.launch(driver, &entry("backward", p.storage, held(cut.channels, 2)), launch, bytemuck::bytes_of(&params))?;
    let rows = MergeParams {
        from: workspace,
        to: weight,
        rest: bias,
        rows: int(OP, blocks * cut.parts)?,
        stride: int(OP, cut.parameters())?,
        // Those of the bias are the last.
        columns: int(OP, if to.bias.is_some() { cut.parameters() } else { size })?,
        split: int(OP, size)?,
    };
    merge(driver, &rows, 1)
}

/// Labels at another size: along each axis voxel `i` of `to` has that of voxel `(2 i + 1) from / (2 to)`, rounded down.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn labels(driver: &dyn Driver, p: &Labels) -> Result<()> {
    let (from, to) = (voxels(OP, p.batch, p.from_space)?, voxels(OP, p.batch, p.space)?);
    int(OP, to)?;
    for a in 0..3 {
        int(OP, p.space[a].saturating_mul(p.from_space[a]).saturating_mul(2))?;
    }
    let params = LabelsParams {
        from: p.labels.at_least(from * 2, OP, "the labels")?,
        to: p.out.at_least(to * 2, OP, "the labels at another size")?,
        from_space: super::ints(OP, p.from_space)?,
        space: super::ints(OP, p.space)?,
        batch: int(OP, p.batch)?,
        unused: 0,
    };
    let launch = Launch::line(to.div_ceil(THREADS), THREADS as u32, 0)?;
    TERMS.launch(driver, "head_loss_labels", launch, bytemuck::bytes_of(&params))
}

/// The entry of a pass that has so many slabs in registers.
fn entry(pass: &str, storage: Storage, slabs: Option<usize>) -> String {
    match (storage, slabs) {
        (Storage::F32, _) => format!("{OP}_{pass}_f32"),
        (_, Some(slabs)) => format!("{OP}_{pass}_c{}_{}", slabs * BLOCK, storage.name()),
        (_, None) => format!("{OP}_{pass}_any_{}", storage.name()),
    }
}

pub(super) fn entries() -> Vec<Entry> {
    let mut names = vec![entry("forward", Storage::F32, None), entry("backward", Storage::F32, None)];
    for storage in [Storage::Bf16, Storage::F16] {
        names.extend([None, Some(2), Some(4)].map(|slabs| entry("forward", storage, slabs)));
        names.extend([None, Some(2)].map(|slabs| entry("backward", storage, slabs)));
    }
    let main = names.into_iter().flat_map(|name| Entry::of(&FILES, name, size_of::<Params>()));
    let terms = [
        ("head_loss_merge", size_of::<MergeParams>()),
        ("head_loss_terms", size_of::<TermsParams>()),
        ("head_loss_labels", size_of::<LabelsParams>()),
    ];
    main.chain(terms.into_iter().flat_map(|(name, params)| Entry::of(&TERMS, name.into(), params))).collect()
}
