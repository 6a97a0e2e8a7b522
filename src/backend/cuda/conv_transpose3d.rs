//! Transposed convolution whose kernel is its stride, `kernels/conv_transpose3d.cu`.

use super::launch::{Driver, Files, Launch, Memory, files};
use super::{Entry, Source, Storage, conv3d, gemm, int, ints, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "conv_transpose3d";
const THREADS: usize = 256;

static FILES: Files = files!("conv_transpose3d");

/// Every input voxel becomes a box of `kernel` voxels.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of everything but the bias.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Not repeated.
    pub source: Source,
    /// From [`pack_weight`].
    pub weight: Memory,
    /// f32 `[padded filters]`.
    pub bias: Option<Memory>,
    /// Output channels without padding.
    pub filters: usize,
    /// Kernel and stride.
    pub kernel: [usize; 3],
    /// `[N][kD * D][kH * H][kW * W][padded filters]`.
    pub out: Memory,
}

/// Filters `[I, O, kD, kH, kW]` as the kernel reads them.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit.
pub fn pack_weight(values: &[f32], dims: [usize; 5], storage: Storage) -> Result<Vec<u8>> {
    let [i, o, d, h, w] = dims;
    let taps = d * h * w;
    if values.len() != i * o * taps {
        return Err(Error::shape(OP, format!("{} filter values of {dims:?}", values.len())));
    }
    let swapped: Vec<f32> = (0..o * i * taps)
        .map(|at| {
            let (f, c, t) = (at / (i * taps), at / taps % i, at % taps);
            values[(c * o + f) * taps + t]
        })
        .collect();
    conv3d::pack_weight(&swapped, [o, i, d, h, w], &[i], storage)
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let taps: usize = p.kernel.iter().product();
    if p.source.repeat != [1; 3] || taps == 0 || p.filters == 0 {
        return Err(Error::shape(OP, format!("kernel {:?}, source repeated {:?}", p.kernel, p.source.repeat)));
    }
    let (filters, space) = (padded(p.filters), p.source.space);
    let mut params = gemm::params(OP, p.storage, p.batch, &[p.source], p.weight, p.bias, p.filters)?;
    let weights = taps * padded(p.source.channels) * filters;
    params.weight = p.weight.at_least(weights * p.storage.bytes(), OP, "the filter")?;
    params.space = ints(OP, space)?;
    params.kernel = ints(OP, p.kernel)?;
    let out = voxels(OP, p.batch, [0, 1, 2].map(|a| space[a] * p.kernel[a]))?;
    params.out = p.out.at_least(out * filters * p.storage.bytes(), OP, "the result")?;
    int(OP, out)?;
    let rows = voxels(OP, p.batch, space)?;
    let block = gemm::block(filters);
    let blocks = match p.storage {
        Storage::F32 => (out * filters).div_ceil(THREADS),
        _ => rows.div_ceil(gemm::ROWS) * filters.div_ceil(block) * taps,
    };
    let launch = Launch::line(blocks, THREADS as u32, 0)?;
    FILES.launch(driver, &entry(block, p.storage), launch, bytemuck::bytes_of(&params))
}

fn entry(block: usize, storage: Storage) -> String {
    match storage {
        Storage::F32 => format!("{OP}_f32"),
        _ => format!("{OP}_n{block}_{}", storage.name()),
    }
}

pub(super) fn entries() -> Vec<Entry> {
    let halves = [Storage::Bf16, Storage::F16].into_iter().flat_map(|s| gemm::BLOCKS.map(|b| entry(b, s)));
    let names = halves.chain([entry(0, Storage::F32)]);
    names.flat_map(|name| Entry::of(&FILES, name, size_of::<gemm::Params>())).collect()
}
