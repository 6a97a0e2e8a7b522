//! Gradient of a convolution's filters, `kernels/conv3d_wgrad.cuh` and `kernels/conv3d_wgrad.cu`.

use bytemuck::{Pod, Zeroable};

use super::super::launch::{Driver, Files, Launch, Memory, files, shared_limit};
use super::super::{BLOCK, Entry, Source, SourceParams, Storage, int, ints, padded, sources, voxels};
use super::{BYTES, LAUNCH, PRODUCTS};
use crate::error::{Error, Result};

const OP: &str = "conv3d_wgrad";
const THREADS: usize = 256;
/// Values of a block of the kernel that adds parts up.
const SUMS: usize = 128;
/// The most parts that a grid has.
const PARTS: usize = 65535;
/// Bytes of sums of parts that are not exceeded for the sake of more parts.
const WORKSPACE: usize = 64 << 20;
/// Slabs of channels of a block where there are few taps.
const SLABS: usize = 4;
/// Voxels of a brick that it can divide by multiplying.
const BRICK: usize = 3855;

static BF16: Files = files!("conv3d_wgrad_bf16", bf16);
static F16: Files = files!("conv3d_wgrad_f16");
static F32: Files = files!("conv3d_wgrad");

/// For every channel, tap and filter the sum over samples and voxels of what the filter's tap read of the channel times
/// the gradient of the filter's result.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// Of the sources and of `dy`.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// What the convolution read: one or two, one after the other in channels.
    pub sources: &'a [Source],
    /// Gradient of the result: not repeated, its channels are the filters, its size is that of [`output_space`].
    pub dy: Source,
    /// 1, 2 or 3 per axis; padding is 1 for 3 and else 0.
    pub kernel: [usize; 3],
    /// 1 or 2 per axis.
    pub stride: [usize; 3],
    /// Where filters and channels change places, see [`Problem::out`].
    pub transpose: bool,
    /// Into how many parts the sum over voxels is cut, each with blocks of its own; as many as keep the card busy if
    /// that is left open. Parts are added in an order of their own: the same card always gives the same bytes.
    pub parts: Option<usize>,
    /// f32 `[slab of 16 channels][tap][padded filter][16]` as from [`super::pack_weight`], the padding of each source
    /// zero as that of filters; transposed `[slab of 16 filters][tap][padded channel][16]`: [`values`] in both.
    pub out: Memory,
    /// [`workspace`] bytes, if there are any. Its contents do not matter and are lost.
    pub workspace: Option<Memory>,
}

/// `WgradParams` of `kernels/conv3d_wgrad.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    sources: [SourceParams; 2],
    dy: SourceParams,
    out: u64,
    space: [i32; 3],
    kernel: [i32; 3],
    stride: [i32; 3],
    step: [i32; 3],
    tiles: [i32; 3],
    planes: i32,
    pitch: i32,
    bricks: i32,
    slabs: i32,
    taps: i32,
    rows: i32,
    columns: i32,
    voxels: i32,
    by_rows: u32,
    by_columns: u32,
    slab_bytes: i32,
    brick_bytes: i32,
    batch: i32,
    transpose: i32,
    unused: i32,
}

/// `WgradSumParams` of `kernels/conv3d_wgrad.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct SumParams {
    sums: u64,
    out: u64,
    values: u64,
    parts: i32,
    unused: i32,
}

/// Blocks of a kernel for 16-bit storage.
#[derive(Debug)]
struct Variant {
    name: &'static str,
    /// Filters of a block.
    filters: usize,
    /// Taps of all slabs of a block, at most.
    taps: usize,
    /// Blocks that a multiprocessor has at once.
    each: usize,
    /// Shared memory in which warps that have the same taps add up their sums.
    sums: usize,
    /// Estimate of how much of the matrix units it keeps busy, from what it reads of shared memory for a product.
    efficiency: f64,
}

/// Those for few taps first.
const VARIANTS: [Variant; 6] = [
    Variant { name: "few_n64", filters: 64, taps: 4, each: 2, sums: 32 << 10, efficiency: 1.0 },
    Variant { name: "few_n32", filters: 32, taps: 4, each: 2, sums: 32 << 10, efficiency: 0.9 },
    Variant { name: "few_n16", filters: 16, taps: 4, each: 2, sums: 16 << 10, efficiency: 0.6 },
    Variant { name: "n64", filters: 64, taps: 28, each: 1, sums: 0, efficiency: 1.0 },
    Variant { name: "n32", filters: 32, taps: 32, each: 2, sums: 0, efficiency: 0.8 },
    Variant { name: "n16", filters: 16, taps: 32, each: 2, sums: 0, efficiency: 0.5 },
];

impl Variant {
    /// The one that wastes least.
    fn of(taps: usize, filters: usize) -> &'static Variant {
        let (few, many) = VARIANTS.split_at(3);
        let fit = if taps <= few[0].taps { few } else { many };
        let cost = |v: &Variant| filters.next_multiple_of(v.filters) as f64 / v.efficiency;
        fit[1..].iter().fold(&fit[0], |best, v| if cost(v) < cost(best) { v } else { best })
    }
}

/// Bricks of 8 x 8 voxels of the result in some planes.
#[derive(Debug, Clone, Copy)]
struct Brick {
    planes: usize,
    slabs: usize,
    /// Buffers for it.
    bricks: usize,
    /// Of the input, in voxels.
    depth: usize,
    rows: usize,
    columns: usize,
    pitch: usize,
    slab_bytes: usize,
    bytes: usize,
}

impl Brick {
    fn new(
        planes: usize,
        slabs: usize,
        bricks: usize,
        kernel: [usize; 3],
        stride: [usize; 3],
        filters: usize,
    ) -> Brick {
        let (rows, columns) = (7 * stride[1] + kernel[1], 7 * stride[2] + kernel[2]);
        let pitch = if stride[2] == 2 { 20 } else { columns.next_multiple_of(4) };
        let depth = (planes - 1) * stride[0] + kernel[0];
        let slab_bytes = depth * rows * pitch * BLOCK * 2;
        let bytes = slabs * slab_bytes + planes * 64 * filters * 2;
        Brick { planes, slabs, bricks, depth, rows, columns, pitch, slab_bytes, bytes }
    }

    fn voxels(&self) -> usize {
        self.depth * self.rows * self.columns
    }

    /// Two buffers are worth more than many slabs, and those more than many planes.
    fn best(v: &Variant, p: &Problem<'_>, stride: [usize; 3], limit: usize) -> Result<Brick> {
        let taps: usize = p.kernel.iter().product();
        let most = (v.taps / taps).min(SLABS).min(slabs(p));
        let brick = |planes, slabs, bricks| Brick::new(planes, slabs, bricks, p.kernel, stride, v.filters);
        for room in [limit / v.each, limit] {
            for bricks in [2, 1] {
                for slabs in (1..=most).rev() {
                    // As many for each block.
                    let slabs = self::slabs(p).div_ceil(self::slabs(p).div_ceil(slabs));
                    let planes = [8, 4, 2, 1].into_iter().filter(|n| *n < 2 * p.dy.space[0]);
                    let mut all = planes.map(|planes| brick(planes, slabs, bricks));
                    if let Some(b) = all.find(|b| b.bricks * b.bytes <= room && b.voxels() <= BRICK) {
                        return Ok(b);
                    }
                }
            }
        }
        Err(Error::unsupported(format!("{OP} of {:?} at stride {:?} with {limit} bytes of memory", p.kernel, p.stride)))
    }
}

/// How a problem is solved.
struct Plan {
    variant: Option<&'static Variant>,
    brick: Brick,
    /// Of the brick: an axis without neighbours is read where it is needed only.
    stride: [usize; 3],
    step: [usize; 3],
    tiles: [usize; 3],
    /// Blocks of a part.
    grid: [usize; 2],
    parts: usize,
}

impl Plan {
    fn new(driver: &dyn Driver, p: &Problem<'_>) -> Result<Plan> {
        check(p)?;
        let alone = |a: usize| p.kernel[a] == 1;
        let stride = [0, 1, 2].map(|a| if alone(a) { 1 } else { p.stride[a] });
        let step = [0, 1, 2].map(|a| if alone(a) { p.stride[a] } else { 1 });
        let filters = padded(p.dy.channels);
        let taps: usize = p.kernel.iter().product();
        let space = p.dy.space;
        if p.storage == Storage::F32 {
            // A piece of the work is a row.
            let blocks = (values(p) / 8).div_ceil(THREADS);
            let cycles = (8 * space[2]) as f64;
            let parts = parts(driver, p, blocks, p.batch * space[0] * space[1], 2, cycles)?;
            let brick = Brick::new(1, 1, 1, p.kernel, stride, BLOCK);
            return Ok(Plan { variant: None, brick, stride, step, tiles: [1; 3], grid: [blocks, 1], parts });
        }
        let v = Variant::of(taps, filters);
        let brick = Brick::best(v, p, stride, shared_limit(driver))?;
        let tiles = [space[0].div_ceil(brick.planes), space[1].div_ceil(8), space[2].div_ceil(8)];
        let grid = [filters.div_ceil(v.filters), slabs(p).div_ceil(brick.slabs)];
        let products = (brick.planes * 64 * brick.slabs * BLOCK * taps * v.filters) as f64;
        let cycles = v.each as f64 * products / (PRODUCTS * v.efficiency);
        let pieces = p.batch * tiles.iter().product::<usize>();
        let parts = parts(driver, p, grid[0] * grid[1], pieces, v.each, cycles)?;
        Ok(Plan { variant: Some(v), brick, stride, step, tiles, grid, parts })
    }

    fn workspace(&self, p: &Problem<'_>) -> usize {
        if self.parts == 1 { 0 } else { self.parts * values(p) * 4 }
    }
}

/// Into how many parts work of so many pieces, `cycles` each, is cut: those expected to be done first, of waves of
/// blocks and of the traffic of all parts.
fn parts(
    driver: &dyn Driver,
    p: &Problem<'_>,
    blocks: usize,
    pieces: usize,
    each: usize,
    cycles: f64,
) -> Result<usize> {
    let possible = pieces.min(PARTS);
    if let Some(n) = p.parts {
        let refused = || Error::unsupported(format!("{OP} in {n} parts, expected 1 to {possible}"));
        return if (1..=possible).contains(&n) { Ok(n) } else { Err(refused()) };
    }
    let multiprocessors = driver.multiprocessors().max(1);
    let side = each * multiprocessors;
    let values = values(p);
    let room = WORKSPACE / (values * 4);
    let cost = |n: usize| {
        let work = ((blocks * n).div_ceil(side) * pieces.div_ceil(n)) as f64 * cycles;
        let traffic = (2 * 4 * values * n) as f64 / (BYTES * multiprocessors as f64);
        if n == 1 { work } else { work + LAUNCH + traffic }
    };
    let most = (2 * side / blocks.max(1)).min(possible).min(room);
    Ok((2..=most).fold(1, |best, n| if cost(n) < cost(best) { n } else { best }))
}

fn slabs(p: &Problem<'_>) -> usize {
    p.sources.iter().map(|s| padded(s.channels) / BLOCK).sum()
}

/// D, H, W of the result of a convolution with this padding; nothing where the kernel does not fit.
#[must_use]
pub fn output_space(input: [usize; 3], kernel: [usize; 3], stride: [usize; 3]) -> Option<[usize; 3]> {
    let mut out = [0; 3];
    for a in 0..3 {
        let room = input[a] + kernel[a].checked_sub(1)? / 2 * 2;
        out[a] = room.checked_sub(kernel[a])?.checked_div(stride[a])? + 1;
    }
    Some(out)
}

/// Values of [`Problem::out`].
#[must_use]
pub fn values(p: &Problem<'_>) -> usize {
    slabs(p) * p.kernel.iter().product::<usize>() * padded(p.dy.channels) * BLOCK
}

/// Bytes of [`Problem::workspace`].
///
/// # Errors
/// As [`run`], but for the memory.
pub fn workspace(driver: &dyn Driver, p: &Problem<'_>) -> Result<usize> {
    Ok(Plan::new(driver, p)?.workspace(p))
}

/// Checks what does not depend on the card.
fn check(p: &Problem<'_>) -> Result<()> {
    let known = p.kernel.iter().all(|k| matches!(k, 1..=3)) && p.stride.iter().all(|s| matches!(s, 1 | 2));
    let some = p.dy.channels > 0 && p.sources.iter().all(|s| s.channels > 0);
    if !known || !some || p.dy.repeat != [1; 3] {
        let what = format!("{} filters of {:?} at stride {:?}", p.dy.channels, p.kernel, p.stride);
        return Err(Error::shape(OP, format!("{what}, the gradient repeated {:?}", p.dy.repeat)));
    }
    sources(OP, p.storage, p.batch, p.sources)?;
    let input = p.sources[0].read_space();
    let out = output_space(input, p.kernel, p.stride);
    if out == Some(p.dy.space) {
        return Ok(());
    }
    let what =
        format!("kernel {:?} at stride {:?} on {input:?} with a gradient of {:?}", p.kernel, p.stride, p.dy.space);
    Err(Error::shape(OP, format!("{what}, expected {}", out.map_or("more voxels".into(), |o| format!("{o:?}")))))
}

/// Runs it.
///
/// # Errors
/// [`Error::Shape`] for sizes, kernels and strides that are not supported or do not fit the memory;
/// [`Error::Unsupported`] for more parts than there are pieces, and for what the card does not know; [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem<'_>) -> Result<()> {
    let plan = Plan::new(driver, p)?;
    let (brick, values) = (plan.brick, values(p));
    let out = p.out.at_least(values * 4, OP, "the result")?;
    let to = match plan.parts {
        1 => out,
        _ => {
            let room = p.workspace.unwrap_or(Memory { address: 0, bytes: 0 });
            room.at_least(plan.workspace(p), OP, "the workspace")?
        }
    };
    let count = |n| int(OP, n);
    // What the kernel counts.
    count(voxels(OP, p.batch, p.dy.space)?)?;
    count(values)?;
    let by = |n: usize| (65536 / n + 1) as u32;
    let params = Params {
        sources: sources(OP, p.storage, p.batch, p.sources)?,
        dy: p.dy.params(OP, p.storage, p.batch)?,
        out: to,
        space: ints(OP, p.sources[0].read_space())?,
        kernel: ints(OP, p.kernel)?,
        stride: ints(OP, plan.stride)?,
        step: ints(OP, plan.step)?,
        tiles: ints(OP, plan.tiles)?,
        planes: count(brick.planes)?,
        pitch: count(brick.pitch)?,
        bricks: count(brick.bricks)?,
        slabs: count(brick.slabs)?,
        taps: count(p.kernel.iter().product())?,
        rows: count(brick.rows)?,
        columns: count(brick.columns)?,
        voxels: count(brick.voxels())?,
        by_rows: by(brick.rows),
        by_columns: by(brick.columns),
        slab_bytes: count(brick.slab_bytes)?,
        brick_bytes: count(brick.bytes)?,
        batch: count(p.batch)?,
        transpose: i32::from(p.transpose),
        unused: 0,
    };
    let shared = plan.variant.map_or(0, |v| (brick.bricks * brick.bytes).max(v.sums));
    let mut launch = Launch::line(plan.grid[0], THREADS as u32, shared)?;
    launch.grid[1] = count(plan.grid[1])?.unsigned_abs();
    launch.grid[2] = count(plan.parts)?.unsigned_abs();
    let files = match p.storage {
        Storage::F32 => &F32,
        Storage::Bf16 => &BF16,
        Storage::F16 => &F16,
    };
    files.launch(driver, &entry(plan.variant, p.storage), launch, bytemuck::bytes_of(&params))?;
    if plan.parts == 1 {
        return Ok(());
    }
    let sum = SumParams { sums: to, out, values: values as u64, parts: count(plan.parts)?, unused: 0 };
    let launch = Launch::line(values / SUMS, THREADS as u32, 0)?;
    F32.launch(driver, "conv3d_wgrad_sum", launch, bytemuck::bytes_of(&sum))
}

fn entry(v: Option<&Variant>, storage: Storage) -> String {
    v.map_or_else(|| format!("{OP}_f32"), |v| format!("{OP}_{}_{}", v.name, storage.name()))
}

pub(super) fn entries() -> Vec<Entry> {
    let params = size_of::<Params>();
    let mut all = Entry::of(&F32, entry(None, Storage::F32), params);
    all.extend(Entry::of(&F32, "conv3d_wgrad_sum".into(), size_of::<SumParams>()));
    for v in &VARIANTS {
        all.extend(Entry::of(&BF16, entry(Some(v), Storage::Bf16), params));
        all.extend(Entry::of(&F16, entry(Some(v), Storage::F16), params));
    }
    all
}
