//! NVIDIA kernels: what they are given, on which grid they run, and how filters lie for them. The kernels themselves are
//! CUDA C++ in `kernels/`, compiled to `ptx/` when they change, never when the crate is built.
//!
//! Every sum has a fixed order: the same input gives the same bytes on the same device. No kernel adds to memory that
//! another block adds to.

pub mod aggregate;
pub mod blur;
pub mod channel_sums;
pub mod conv3d;
pub mod conv_transpose3d;
mod gemm;
pub mod head_labels;
pub mod head_loss;
pub mod instance_norm;
pub mod instance_norm_grad;
pub mod intensity;
mod launch;
pub mod low_resolution;
pub mod moments;
pub mod optim;
pub mod pool;
pub mod probe;
pub mod relayout;
pub mod resample;
pub mod warp;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::tensor::Precision;
use crate::tensor::cuda::{Memory, Module};
use launch::Files;

/// Channels are padded to a multiple of this; pad channels hold zero.
pub const BLOCK: usize = 16;

/// How activations and filters are stored. Arithmetic is f32 in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// The plain reference: one thread a value.
    F32,
    /// 8 exponent bits.
    Bf16,
    /// 5 exponent bits.
    F16,
}

impl Storage {
    /// Bytes of a value.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Storage::F32 => 4,
            Storage::Bf16 | Storage::F16 => 2,
        }
    }

    /// How entries' names end.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Storage::F32 => "f32",
            Storage::Bf16 => "bf16",
            Storage::F16 => "f16",
        }
    }

    /// The values as they are stored: rounded to nearest, ties to even.
    #[must_use]
    pub fn store(self, values: &[f32]) -> Vec<u8> {
        match self {
            Storage::F32 => bytemuck::cast_slice(values).to_vec(),
            Storage::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Storage::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        }
    }

    /// The stored values.
    #[must_use]
    pub fn load(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.as_chunks::<2>().0.iter();
        match self {
            Storage::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Storage::Bf16 => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Storage::F16 => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        }
    }
}

impl From<Precision> for Storage {
    fn from(p: Precision) -> Self {
        match p {
            Precision::F32 => Storage::F32,
            Precision::Bf16 => Storage::Bf16,
            Precision::F16 => Storage::F16,
        }
    }
}

/// Channels with their padding.
#[must_use]
pub const fn padded(channels: usize) -> usize {
    channels.next_multiple_of(BLOCK)
}

/// A normalisation that is known but not applied: `leaky_relu((x - mean) * scale + shift)`.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// f32 `[N][mean, scale, shift][padded channels]`.
    pub planes: Memory,
    /// Slope of the leaky ReLU for negative values, 1 for none.
    pub slope: f32,
}

/// A tensor that an operation reads: `[N][D][H][W][padded channels]`.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// The values.
    pub data: Memory,
    /// Channels without padding.
    pub channels: usize,
    /// D, H, W of the tensor itself.
    pub space: [usize; 3],
    /// How often each voxel is read along each axis: 1, or 2 for nearest upsampling.
    pub repeat: [usize; 3],
    /// Applied as it is read.
    pub norm: Option<Norm>,
}

impl Source {
    /// A tensor that is read as it is.
    #[must_use]
    pub fn plain(data: Memory, channels: usize, space: [usize; 3]) -> Source {
        Source { data, channels, space, repeat: [1; 3], norm: None }
    }

    /// D, H, W as it is read.
    #[must_use]
    pub fn read_space(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| self.space[a] * self.repeat[a])
    }

    fn params(&self, op: &'static str, storage: Storage, batch: usize) -> Result<SourceParams> {
        let channels = padded(self.channels);
        let [d, h, w] = self.space;
        let values = voxels(op, batch, self.space)? * channels;
        let mut shift = [0; 3];
        for a in 0..3 {
            shift[a] = match self.repeat[a] {
                1 => 0,
                2 => 1,
                n => return Err(Error::shape(op, format!("a source repeated {n} times, expected 1 or 2"))),
            };
        }
        let norm = match &self.norm {
            Some(n) => n.planes.at_least(batch * 3 * channels * 4, op, "the normalisation")?,
            None => 0,
        };
        Ok(SourceParams {
            data: self.data.at_least(values * storage.bytes(), op, "a source")?,
            norm,
            channels: int(op, channels)?,
            space: [int(op, d)?, int(op, h)?, int(op, w)?],
            shift,
            slope: self.norm.map_or(1.0, |n| n.slope),
        })
    }
}

/// `Source` of `kernels/common.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
struct SourceParams {
    data: u64,
    norm: u64,
    channels: i32,
    space: [i32; 3],
    shift: [i32; 3],
    slope: f32,
}

/// One source, or two of equal size as they are read.
fn sources(op: &'static str, storage: Storage, batch: usize, from: &[Source]) -> Result<[SourceParams; 2]> {
    let fits = match from {
        [_] => true,
        [a, b] => a.read_space() == b.read_space(),
        _ => false,
    };
    if !fits {
        let sizes: Vec<_> = from.iter().map(Source::read_space).collect();
        return Err(Error::shape(op, format!("sources of sizes {sizes:?}, expected one or two of equal size")));
    }
    let b = from.get(1).map_or(Ok(SourceParams::default()), |s| s.params(op, storage, batch))?;
    Ok([from[0].params(op, storage, batch)?, b])
}

/// A number for a kernel.
fn int(op: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::shape(op, format!("{n} is too large")))
}

/// Three numbers for a kernel.
fn ints(op: &'static str, n: [usize; 3]) -> Result<[i32; 3]> {
    Ok([int(op, n[0])?, int(op, n[1])?, int(op, n[2])?])
}

/// Voxels of a batch; those of one sample must be countable by a kernel.
fn voxels(op: &'static str, batch: usize, space: [usize; 3]) -> Result<usize> {
    let one = space.iter().try_fold(1usize, |n, &s| n.checked_mul(s)).filter(|n| i32::try_from(*n).is_ok());
    match one.and_then(|n| n.checked_mul(batch)) {
        Some(n) if n > 0 => Ok(n),
        _ => Err(Error::shape(op, format!("a batch of {batch} of {space:?} voxels"))),
    }
}

/// An entry of a PTX file and the size of its parameter, for a test.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Where it is.
    pub module: Module,
    /// Its name.
    pub name: String,
    /// Size of the struct that it is given.
    pub params: usize,
}

impl Entry {
    fn of(files: &Files, name: String, params: usize) -> Vec<Entry> {
        files.of(&name).into_iter().map(|module| Entry { module, name: name.clone(), params }).collect()
    }
}

/// All entries that the host side may run.
#[must_use]
pub fn entries() -> Vec<Entry> {
    let all = [
        aggregate::entries(),
        blur::entries(),
        channel_sums::entries(),
        conv3d::entries(),
        conv_transpose3d::entries(),
        head_labels::entries(),
        head_loss::entries(),
        instance_norm::entries(),
        instance_norm_grad::entries(),
        intensity::entries(),
        low_resolution::entries(),
        moments::entries(),
        optim::entries(),
        pool::entries(),
        probe::entries(),
        relayout::entries(),
        resample::entries(),
        warp::entries(),
    ];
    all.concat()
}
