//! The first convolution, of few channels given as planes, `kernels/conv3d_first.cu`.

use super::super::launch::{Driver, Files, Launch, Memory, files};
use super::super::{Entry, SourceParams, Storage, int, ints, padded, voxels};
use super::{OP, Params, output_space};
use crate::error::{Error, Result};

static FILES: Files = files!("conv3d_first");

/// Most channels of the input.
pub const CHANNELS: usize = 8;
/// Planes of 8 x 8 voxels of a tile, a warp each.
const PLANES: usize = 4;
/// Blocks for a multiprocessor, of which 4 run at once; they share the tiles.
const EACH: usize = 8;

/// A convolution with padding of half the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Bf16 or F16, of filter and result.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// 1 to [`CHANNELS`].
    pub channels: usize,
    /// `[N][C][D][H][W]`.
    pub planes: Memory,
    /// The input is f32, else stored as the result.
    pub wide: bool,
    /// D, H, W.
    pub space: [usize; 3],
    /// From [`pack_weight`].
    pub weight: Memory,
    /// f32 `[padded filters]`.
    pub bias: Option<Memory>,
    /// Output channels without padding.
    pub filters: usize,
    /// 1 or 3 per axis.
    pub kernel: [usize; 3],
    /// 1 or 2 per axis.
    pub stride: [usize; 3],
    /// `[N][D][H][W][padded filters]`, D, H, W from [`output_space`].
    pub out: Memory,
    /// As [`super::Problem::partials`] for [`tiles`].
    pub partials: Option<Memory>,
}

/// Tiles of a sample whose result has that size, each with its own moments.
#[must_use]
pub fn tiles(out: [usize; 3]) -> usize {
    cut(out).iter().product()
}

fn cut(out: [usize; 3]) -> [usize; 3] {
    [out[0].div_ceil(PLANES), out[1].div_ceil(8), out[2].div_ceil(8)]
}

/// Filters `[O, I, kD, kH, kW]` as the kernel reads them: channels times taps are one axis, padded to 16.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit.
pub fn pack_weight(values: &[f32], dims: [usize; 5], storage: Storage) -> Result<Vec<u8>> {
    let terms = dims[1..].iter().product();
    super::pack_weight(values, [dims[0], terms, 1, 1, 1], &[terms], storage)
}

/// Runs the convolution.
///
/// # Errors
/// [`Error::Shape`] for sizes that are not supported or do not fit the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let known = p.kernel.iter().all(|k| matches!(k, 1 | 3)) && p.stride.iter().all(|s| matches!(s, 1 | 2));
    if !known || !(1..=CHANNELS).contains(&p.channels) || p.storage == Storage::F32 || p.filters == 0 {
        let what = format!("{} channels, {} filters of {:?} at stride {:?}", p.channels, p.filters, p.kernel, p.stride);
        return Err(Error::shape(OP, format!("{what} in {:?}", p.storage)));
    }
    let filters = padded(p.filters);
    let terms = padded(p.channels * p.kernel.iter().product::<usize>());
    let (all, out) = (voxels(OP, p.batch, p.space)?, output_space(p.space, p.kernel, p.stride));
    let block = if filters == 16 { 16 } else { 32 };
    let tiles = cut(out);
    let count = p.batch * tiles.iter().product::<usize>();
    let width = if p.wide { 4 } else { p.storage.bytes() };
    let input = SourceParams {
        data: p.planes.at_least(all * p.channels * width, OP, "the input")?,
        channels: int(OP, p.channels)?,
        space: ints(OP, p.space)?,
        ..SourceParams::default()
    };
    let params = Params {
        sources: [input, SourceParams::default()],
        weight: p.weight.at_least(terms * filters * 2, OP, "the filter")?,
        bias: p.bias.map_or(Ok(0), |b| b.at_least(filters * 4, OP, "the bias"))?,
        out: p.out.at_least(voxels(OP, p.batch, out)? * filters * 2, OP, "the result")?,
        partials: p.partials.map_or(Ok(0), |m| m.at_least(count * 3 * filters * 4, OP, "the moments"))?,
        filters: int(OP, filters)?,
        space: ints(OP, p.space)?,
        out_space: ints(OP, out)?,
        kernel: ints(OP, p.kernel)?,
        stride: ints(OP, p.stride)?,
        tiles: ints(OP, tiles)?,
        bricks: 1,
        batch: int(OP, p.batch)?,
    };
    let edges = [PLANES, 8, 8].into_iter().zip(p.stride).zip(p.kernel).map(|((n, s), k)| (n - 1) * s + k);
    let brick = p.channels * edges.product::<usize>() * 2;
    let shared = terms * block * 2 + brick;
    let groups = filters.div_ceil(block);
    let blocks = (EACH * driver.multiprocessors().max(1) / groups).clamp(1, count);
    let launch = Launch::line(blocks * groups, 32 * int(OP, PLANES)?.unsigned_abs(), shared)?;
    FILES.launch(driver, &entry(block, p.wide, p.storage), launch, bytemuck::bytes_of(&params))
}

fn entry(block: usize, wide: bool, storage: Storage) -> String {
    format!("conv3d_first_n{block}_{}{}", if wide { "f32_" } else { "" }, storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let mut all = Vec::new();
    for storage in [Storage::Bf16, Storage::F16] {
        for wide in [false, true] {
            for block in [16, 32] {
                all.extend(Entry::of(&FILES, entry(block, wide, storage), size_of::<Params>()));
            }
        }
    }
    all
}
