//! The last 1x1x1 layer and the decision, `kernels/head_labels.cu`.

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, files, shared_limit};
use super::{BLOCK, Entry, Source, SourceParams, Storage, conv3d, int, padded, voxels};
use crate::error::{Error, Result};

const OP: &str = "head_labels";
const THREADS: usize = 256;

static FILES: Files = files!("head_labels");

/// The label of every voxel.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of features and filter; f32 for sums over windows.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Not repeated; f32 ones not normalised.
    pub features: Source,
    /// From [`pack_weight`].
    pub weight: Memory,
    /// f32 from [`pack_bias`].
    pub bias: Memory,
    /// 1 to 65536.
    pub classes: usize,
    /// f32 `[N][D][H][W]`: what f32 features are divided by.
    pub divisor: Option<Memory>,
    /// u16 `[N][D][H][W]`.
    pub labels: Memory,
}

/// `HeadParams` of `kernels/head_labels.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    features: SourceParams,
    weight: u64,
    bias: u64,
    divisor: u64,
    labels: u64,
    classes: i32,
    voxels: i32,
    batch: i32,
    unused: i32,
}

/// Weights `[classes][channels]` as the kernel reads them.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit.
pub fn pack_weight(values: &[f32], [classes, channels]: [usize; 2], storage: Storage) -> Result<Vec<u8>> {
    if storage != Storage::F32 {
        return conv3d::pack_weight(values, [classes, channels, 1, 1, 1], &[channels], storage);
    }
    if values.len() != classes * channels {
        return Err(Error::shape(OP, format!("{} weights, {classes} classes, {channels} channels", values.len())));
    }
    let mut packed = vec![0.0; padded(classes) * padded(channels)];
    for (row, to) in values.chunks_exact(channels).zip(packed.chunks_exact_mut(padded(channels))) {
        to[..channels].copy_from_slice(row);
    }
    Ok(storage.store(&packed))
}

/// A bias for each class; classes that only fill the last block never win.
#[must_use]
pub fn pack_bias(values: &[f32]) -> Vec<f32> {
    let mut bias = values.to_vec();
    bias.resize(padded(values.len()), f32::NEG_INFINITY);
    bias
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes that do not fit the memory; [`Error::Unsupported`] when the filter does not fit a block's
/// shared memory; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem) -> Result<()> {
    let wide = p.storage == Storage::F32;
    let odd = p.features.repeat != [1; 3] || (wide && p.features.norm.is_some()) || (!wide && p.divisor.is_some());
    if odd || !(1..=1 << 16).contains(&p.classes) {
        return Err(Error::shape(OP, format!("{} classes from {:?} in {:?}", p.classes, p.features, p.storage)));
    }
    let (channels, classes) = (padded(p.features.channels), padded(p.classes));
    let all = voxels(OP, p.batch, p.features.space)?;
    int(OP, all)?;
    let shared = if wide { BLOCK * channels * 4 } else { (THREADS + classes) * channels * 2 };
    if shared > shared_limit(driver) {
        return Err(Error::unsupported(format!("{OP} of {} channels and {} classes", p.features.channels, p.classes)));
    }
    let params = Params {
        features: p.features.params(OP, p.storage, p.batch)?,
        weight: p.weight.at_least(channels * classes * p.storage.bytes(), OP, "the filter")?,
        bias: p.bias.at_least(classes * 4, OP, "the bias")?,
        divisor: p.divisor.map_or(Ok(0), |d| d.at_least(all * 4, OP, "the divisor"))?,
        labels: p.labels.at_least(all * 2, OP, "the labels")?,
        classes: int(OP, classes)?,
        voxels: int(OP, all / p.batch)?,
        batch: int(OP, p.batch)?,
        unused: 0,
    };
    let launch = Launch::line(all.div_ceil(THREADS), THREADS as u32, shared)?;
    FILES.launch(driver, &entry(p.storage), launch, bytemuck::bytes_of(&params))
}

fn entry(storage: Storage) -> String {
    format!("{OP}_{}", storage.name())
}

pub(super) fn entries() -> Vec<Entry> {
    let names = [Storage::F32, Storage::Bf16, Storage::F16].map(entry);
    names.into_iter().flat_map(|name| Entry::of(&FILES, name, size_of::<Params>())).collect()
}
