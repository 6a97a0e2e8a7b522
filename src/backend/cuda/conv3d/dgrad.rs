//! The gradient of a convolution's input: at stride 1 a convolution, at stride 2 `kernels/conv3d_back.cu`.

use super::super::launch::{Driver, Files, Launch, Memory, files, shared_limit};
use super::super::{BLOCK, Entry, Source, Storage, int, ints, padded, sources, voxels};
use super::{OP, Params, Plan, THREADS, Wish, output_space};
use crate::error::{Error, Result};

static FILES: Files = files!("conv3d_back");

/// Planes of 8 x 8 voxels of a block.
const PLANES: usize = 2;
/// Channels that a block may have.
const BLOCKS: [usize; 3] = [16, 32, 64];

/// The input's gradient by that of the output, with padding of half the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Of all tensors and the filter.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// Of the output: `[N][D][H][W][padded filters]`, D, H, W from [`output_space`].
    pub dy: Memory,
    /// Output channels without padding.
    pub filters: usize,
    /// `[slab of 16 filters][mirrored tap][padded channels][16]`, see [`pack_mirrored`].
    pub weight: Memory,
    /// Input channels without padding.
    pub channels: usize,
    /// 1 or 3 per axis.
    pub kernel: [usize; 3],
    /// 1 or 2 per axis.
    pub stride: [usize; 3],
    /// D, H, W of the input.
    pub space: [usize; 3],
    /// `[N][D][H][W][padded channels]`.
    pub dx: Memory,
    /// [`Ways::workspace`] bytes, if there are any.
    pub workspace: Option<Memory>,
}

/// How it is solved.
#[derive(Debug, Clone, Copy)]
pub enum Ways {
    /// At stride 1.
    Convolution(Plan),
    /// By classes of voxels; filters of a block, parts of the sum.
    Classes(usize, usize, usize),
}

impl Ways {
    /// Bytes of [`Problem::workspace`].
    #[must_use]
    pub fn workspace(&self) -> usize {
        match self {
            Ways::Convolution(plan) => plan.workspace(),
            Ways::Classes(_, _, bytes) => *bytes,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Ways::Convolution(plan) => plan.name(),
            Ways::Classes(16, ..) => "back_n16",
            Ways::Classes(32, ..) => "back_n32",
            Ways::Classes(64, ..) => "back_n64",
            Ways::Classes(..) => "back",
        }
    }
}

/// The channels `first .. first + count` of a filter `[O, I, kD, kH, kW]` as kernels read it for the gradient of these: taps
/// mirrored, the two sides of channels exchanged.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit.
pub fn pack_mirrored(
    values: &[f32],
    dims: [usize; 5],
    [first, count]: [usize; 2],
    storage: Storage,
) -> Result<Vec<u8>> {
    let [o, i, d, h, w] = dims;
    let taps = d * h * w;
    if values.len() != o * i * taps || first + count > i {
        return Err(Error::shape(OP, format!("channels {first} and {count} more of a filter {dims:?}")));
    }
    let turned: Vec<f32> = (0..count * o * taps)
        .map(|at| {
            let (c, f, t) = (at / (o * taps), at / taps % o, at % taps);
            values[(f * i + first + c) * taps + taps - 1 - t]
        })
        .collect();
    super::pack_weight(&turned, [count, o, d, h, w], &[o], storage)
}

impl Problem {
    fn output(&self) -> [usize; 3] {
        output_space(self.space, self.kernel, self.stride)
    }

    fn is_plain(&self) -> bool {
        self.stride == [1; 3]
    }

    /// At stride 1.
    fn convolution<'s>(&self, source: &'s [Source]) -> super::Problem<'s> {
        super::Problem {
            storage: self.storage,
            batch: self.batch,
            sources: source,
            weight: self.weight,
            bias: None,
            filters: self.channels,
            kernel: self.kernel,
            stride: [1; 3],
            out: self.dx,
            partials: None,
            workspace: self.workspace,
        }
    }

    /// Tiles of a class.
    fn tiles(&self) -> [usize; 3] {
        let class = [0, 1, 2].map(|a| self.space[a].div_ceil(self.stride[a]));
        [class[0].div_ceil(PLANES), class[1].div_ceil(8), class[2].div_ceil(8)]
    }

    /// Dynamic shared memory for so many bricks.
    fn shared(&self, filters: usize, bricks: usize) -> usize {
        // The most taps that a class has.
        let taps = [0, 1, 2].map(|a| if self.stride[a] == 1 { self.kernel[a] } else { self.kernel[a].div_ceil(2) });
        let brick = (PLANES - 1 + taps[0]) * (7 + taps[1]) * 12 * BLOCK * 2;
        let weights = 2 * taps[1] * taps[2] * filters * BLOCK * 2;
        (bricks * brick + weights).max(PLANES * 64 * filters * 2)
    }
}

/// How to solve it.
///
/// # Errors
/// [`Error::Shape`] for sizes that are not supported.
pub fn plan(driver: &dyn Driver, p: &Problem) -> Result<Ways> {
    let source = [Source::plain(p.dy, p.filters, p.output())];
    if p.is_plain() {
        return Ok(Ways::Convolution(super::plan(driver, &p.convolution(&source), false, Wish::default())?));
    }
    if p.storage == Storage::F32 {
        return Ok(Ways::Classes(0, 1, 0));
    }
    let channels = padded(p.channels);
    let filters = if channels <= 32 { channels } else { 64 };
    let blocks = p.batch * p.tiles().iter().product::<usize>() * channels.div_ceil(filters) * 8;
    let parts = (2 * driver.multiprocessors() / blocks.max(1)).clamp(1, padded(p.filters) / BLOCK);
    let work = if parts == 1 { 0 } else { parts * voxels(OP, p.batch, p.space)? * channels * 4 };
    Ok(Ways::Classes(filters, parts, work))
}

/// Runs it as it was planned.
///
/// # Errors
/// [`Error::Shape`] for sizes that are not supported or do not fit the memory or the plan; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem, plan: &Ways) -> Result<()> {
    let known = p.kernel.iter().all(|k| matches!(k, 1 | 3)) && p.stride.iter().all(|s| matches!(s, 1 | 2));
    if !known || p.channels == 0 || p.filters == 0 {
        let what = format!("{} channels of {:?} at stride {:?}", p.channels, p.kernel, p.stride);
        return Err(Error::shape(OP, what));
    }
    let out = p.output();
    let source = [Source::plain(p.dy, p.filters, out)];
    let (block, parts) = match plan {
        Ways::Convolution(plan) => return super::run(driver, &p.convolution(&source), plan),
        Ways::Classes(block, parts, _) => (*block, *parts),
    };
    if p.is_plain() || (block == 0) != (p.storage == Storage::F32) {
        return Err(Error::shape(OP, "another gradient was planned"));
    }
    let (channels, slabs, size) = (padded(p.channels), padded(p.filters) / BLOCK, p.storage.bytes());
    let all = voxels(OP, p.batch, p.space)? * channels;
    let to = match parts {
        1 => p.dx.at_least(all * size, OP, "the input's gradient")?,
        _ => {
            let room = p.workspace.unwrap_or(Memory { address: 0, bytes: 0 });
            room.at_least(parts * all * 4, OP, "the workspace")?
        }
    };
    let weights = slabs * p.kernel.iter().product::<usize>() * channels * BLOCK;
    let limit = shared_limit(driver);
    let bricks = if slabs.div_ceil(parts) > 1 && p.shared(block, 2) <= limit { 2 } else { 1 };
    let tiles = p.tiles();
    let params = Params {
        sources: sources(OP, p.storage, p.batch, &source)?,
        weight: p.weight.at_least(weights * size, OP, "the filter")?,
        bias: 0,
        out: to,
        partials: 0,
        filters: int(OP, channels)?,
        space: ints(OP, out)?,
        out_space: ints(OP, p.space)?,
        kernel: ints(OP, p.kernel)?,
        stride: ints(OP, p.stride)?,
        tiles: ints(OP, tiles)?,
        bricks: int(OP, bricks)?,
        batch: int(OP, p.batch)?,
    };
    if block == 0 {
        let launch = Launch::line(all.div_ceil(THREADS as usize), THREADS, 0)?;
        return FILES.launch(driver, &entry(0, p.storage), launch, bytemuck::bytes_of(&params));
    }
    let blocks = p.batch * tiles.iter().product::<usize>() * channels.div_ceil(block);
    let mut launch = Launch::line(blocks, THREADS, p.shared(block, bricks))?;
    launch.grid[1] = int(OP, parts)?.unsigned_abs();
    launch.grid[2] = 8;
    let convolution = p.convolution(&source);
    let end = (parts > 1).then(|| super::sum::Sum::new(&convolution, parts, all / channels)).transpose()?;
    FILES.launch(driver, &entry(block, p.storage), launch, bytemuck::bytes_of(&params))?;
    end.map_or(Ok(()), |s| s.run(driver))
}

fn entry(block: usize, storage: Storage) -> String {
    match storage {
        Storage::F32 => "conv3d_back_f32".into(),
        _ => format!("conv3d_back_n{block}_{}", storage.name()),
    }
}

pub(super) fn entries() -> Vec<Entry> {
    let halves = [Storage::Bf16, Storage::F16].into_iter().flat_map(|s| BLOCKS.map(|b| entry(b, s)));
    let names = halves.chain([entry(0, Storage::F32)]);
    names.flat_map(|name| Entry::of(&FILES, name, size_of::<Params>())).collect()
}
