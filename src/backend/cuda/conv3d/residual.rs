//! The end of a residual block whose shortcut is a convolution with a kernel of one voxel, `kernels/conv3d_residual.cu`.

use bytemuck::{Pod, Zeroable};

use super::super::gemm::Cut;
use super::super::launch::{Driver, Files, Launch, Memory, files};
use super::super::{BLOCK, Entry, Source, SourceParams, Storage, gemm, int, ints, padded, voxels};
use super::{OP, THREADS, first};
use crate::error::{Error, Result};

static FILES: Files = files!("conv3d_residual");

/// What the shortcut reads.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// One or two, one after the other in channels.
    Voxels(&'a [Source]),
    /// The image as it arrives, f32 `[N][C][D][H][W]`.
    Planes {
        /// The values.
        data: Memory,
        /// C, 1 to [`first::CHANNELS`].
        channels: usize,
        /// D, H, W.
        space: [usize; 3],
    },
}

/// `leaky_relu(normalised(y) + convolution(input))`, rounded once.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// Bf16 or F16, of filter, `y`, result, and input unless that is planes.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Of the shortcut.
    pub input: Input<'a>,
    /// From [`super::pack_weight`], of a kernel of one voxel.
    pub weight: Memory,
    /// f32 `[padded filters]`.
    pub bias: Option<Memory>,
    /// 1 or 2 per axis.
    pub stride: [usize; 3],
    /// Not repeated, of the result's size, normalised: the slope is that of the leaky ReLU after the sum.
    pub y: Source,
    /// As `y`; may be its memory.
    pub out: Memory,
}

/// `ResidualParams` of `kernels/gemm.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    gemm: gemm::Params,
    y: u64,
    norm: u64,
    slope: f32,
    channels: i32,
}

/// Most voxels that are few: too few blocks of eight warps for a card.
const FEW: usize = 2048;
/// Bytes of the weights of all channels that a block may keep in shared memory.
const WEIGHTS: usize = 32 << 10;
/// Blocks for a multiprocessor, of which 2 to 4 run at once: a multiple of all of these.
const EACH: usize = 12;
/// Filters and voxels of a block that cuts the channels.
const DEEP: [usize; 2] = [32, 32];

/// Which kernel: its name, and how it cuts the problem unless that is `kernels/gemm.cuh`'s own way. It depends on sizes
/// alone, so that a result does not depend on the card.
fn way(planes: bool, voxels: usize, slabs: usize, filters: usize) -> (String, Option<Cut>) {
    let weights = |block: usize| slabs * block * BLOCK * 2;
    let constants = |block: usize| 4 * 4 * block;
    if !planes && voxels <= FEW && slabs >= 16 {
        let [block, tile] = DEEP;
        let shared = THREADS as usize * tile * block / 32 * 4 + constants(block);
        return ("deep".into(), Some(Cut { filters: block, tile, shared, each: usize::MAX }));
    }
    let block = gemm::block(filters);
    let block = if block == 64 && (weights(64) > WEIGHTS || voxels <= FEW && !planes) { 32 } else { block };
    if weights(block) > WEIGHTS {
        return ("wide".into(), None);
    }
    let tile = if planes && block == 16 { 256 } else { 128 };
    let name = format!("{}n{block}", if planes { "planes_" } else { "" });
    (name, Some(Cut { filters: block, tile, shared: weights(block) + constants(block), each: EACH }))
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes that are not supported or do not fit each other or the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem<'_>) -> Result<()> {
    let space = match p.input {
        Input::Voxels(sources) => sources.first().map_or([0; 3], Source::read_space),
        Input::Planes { space, .. } => space,
    };
    let (out, filters) = ([0, 1, 2].map(|a| space[a].div_ceil(p.stride[a].max(1))), p.y.channels);
    let known = p.storage != Storage::F32 && filters > 0 && p.stride.iter().all(|s| matches!(s, 1 | 2));
    let Some(norm) = p.y.norm.filter(|_| known && p.y.repeat == [1; 3] && p.y.space == out) else {
        let what = format!("the end of a block of {space:?} at stride {:?} for {:?} in {:?}", p.stride, p.y, p.storage);
        return Err(Error::shape(OP, what));
    };
    let (mut gemm, channels) = match p.input {
        Input::Voxels(sources) => (gemm::params(OP, p.storage, p.batch, sources, p.weight, p.bias, filters)?, 0),
        Input::Planes { data, channels, space } => {
            if !(1..=first::CHANNELS).contains(&channels) {
                return Err(Error::shape(OP, format!("planes of {channels} channels")));
            }
            let values = voxels(OP, p.batch, space)? * channels;
            let planes = SourceParams {
                data: data.at_least(values * 4, OP, "the input")?,
                channels: int(OP, padded(channels))?,
                space: ints(OP, space)?,
                ..SourceParams::default()
            };
            (
                gemm::over(OP, [planes, SourceParams::default()], p.storage, p.batch, p.weight, p.bias, filters)?,
                channels,
            )
        }
    };
    let rows = voxels(OP, p.batch, out)?;
    int(OP, rows + gemm::ROWS)?;
    let (planes, slabs) = (channels > 0, gemm.sources.iter().map(|s| s.channels as usize).sum::<usize>() / BLOCK);
    let (name, cut) = way(planes, rows, slabs, padded(filters));
    let y = p.y.params(OP, p.storage, p.batch)?;
    gemm.space = ints(OP, out)?;
    gemm.stride = ints(OP, p.stride)?;
    gemm.out = p.out.at_least(rows * padded(filters) * p.storage.bytes(), OP, "the result")?;
    let (count, shared) = match cut {
        Some(cut) => {
            let (blocks, all) = cut.blocks(p.batch, rows / p.batch, padded(filters), driver.multiprocessors().max(1));
            gemm.blocks = int(OP, blocks)?;
            (all, cut.shared)
        }
        None => (rows.div_ceil(gemm::ROWS) * padded(filters).div_ceil(gemm::WIDEST), 0),
    };
    let params = Params { gemm, y: y.data, norm: y.norm, slope: norm.slope, channels: int(OP, channels)? };
    let launch = Launch::line(count, THREADS, shared)?;
    FILES.launch(driver, &entry(&name, p.storage), launch, bytemuck::bytes_of(&params))
}

fn entry(name: &str, storage: Storage) -> String {
    format!("conv3d_residual_{name}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let blocks = ["", "planes_"].into_iter().flat_map(|p| gemm::BLOCKS.map(|b| format!("{p}n{b}")));
    let names: Vec<String> = blocks.chain(["deep".into(), "wide".into()]).collect();
    let all = [Storage::Bf16, Storage::F16].into_iter().flat_map(|s| names.iter().map(move |n| entry(n, s)));
    all.flat_map(|name| Entry::of(&FILES, name, size_of::<Params>())).collect()
}
