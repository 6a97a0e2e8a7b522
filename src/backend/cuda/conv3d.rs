//! Convolution: from halo bricks in shared memory (`kernels/conv3d.cuh`), of single voxels (`kernels/gemm.cuh`), and the
//! plain reference in f32.

mod boxes;
pub mod dgrad;
pub mod first;
pub mod join;
pub mod residual;
mod sum;
mod trial;
pub mod wgrad;

use bytemuck::{Pod, Zeroable};

use super::launch::{Driver, Files, Launch, Memory, Parameter, files, shared_limit};
use super::{BLOCK, Entry, Source, SourceParams, Storage, gemm, int, ints, padded, sources, voxels};
use crate::error::{Error, Result};

const OP: &str = "conv3d";
const THREADS: u32 = 256;

/// Products of 16 bits that a multiprocessor of compute capability 8.0 adds up in a cycle.
const PRODUCTS: f64 = 1024.0;
/// Bytes that it moves in a cycle from and to the second-level cache, in which the sums of parts stay.
const BYTES: f64 = 32.0;
/// Cycles from the end of a kernel to the work of the next: some 3 microseconds.
const LAUNCH: f64 = 4000.0;

static BF16: Files = files!("conv3d_bf16", bf16);
static F16: Files = files!("conv3d_f16");
static F32: Files = files!("conv3d_f32");
static POINTWISE: Files = files!("conv3d_pointwise");

/// A convolution with padding of half the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// Of everything but bias and moments.
    pub storage: Storage,
    /// Samples.
    pub batch: usize,
    /// One or two, one after the other in channels.
    pub sources: &'a [Source],
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
    /// f32 `[N][tiles][count, mean, squares][padded filters]`: moments of the tiles, from f32 results.
    pub partials: Option<Memory>,
    /// [`Plan::workspace`] bytes, if there are any. Its contents do not matter and are lost.
    pub workspace: Option<Memory>,
}

/// What [`plan`] is to take; what is left open, it chooses.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish<'a> {
    /// The variant of that name.
    pub variant: Option<&'a str>,
    /// So many parts, see [`Plan::parts`].
    pub parts: Option<usize>,
}

/// How a problem is solved.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    variant: &'static Variant,
    parts: usize,
    tiles: usize,
    workspace: usize,
    /// Of blocks that stay: how many there are for each group of filters, at most.
    staying: usize,
}

impl Plan {
    /// Its variant.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.variant.name
    }

    /// Into how many parts the sum over channels and planes of taps is cut, each with blocks of its own: more than one where
    /// there are too few bricks for the card. Parts are added in their order, so that the bytes of a result depend on their
    /// number and the variant, which are the same for the same problem on the same card, and on nothing else.
    #[must_use]
    pub fn parts(&self) -> usize {
        self.parts
    }

    /// Tiles of a sample, each with its own moments: [`Problem::partials`] holds `N * tiles * 3 * padded filters` floats.
    /// None for f32, which is measured by [`super::moments::tiles`] instead.
    #[must_use]
    pub fn tiles(&self) -> usize {
        self.tiles
    }

    /// Bytes of [`Problem::workspace`].
    #[must_use]
    pub fn workspace(&self) -> usize {
        self.workspace
    }
}

/// `Conv3dParams` of `kernels/conv3d.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    sources: [SourceParams; 2],
    weight: u64,
    bias: u64,
    out: u64,
    partials: u64,
    filters: i32,
    space: [i32; 3],
    out_space: [i32; 3],
    kernel: [i32; 3],
    stride: [i32; 3],
    tiles: [i32; 3],
    bricks: i32,
    batch: i32,
}

/// How a variant cuts the problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Planes of 8 x 8 voxels from a halo brick; 3 x 3 taps in the plane at stride 1.
    Brick(usize),
    /// The same for any kernel and stride.
    AnyBrick(usize),
    /// Planes of 8 x 8 voxels from a box of a tensor, by warp groups of compute capability 9.0, on trial; 3 x 3 x 3 taps at
    /// this stride on every axis; at 2, sources that are not repeated.
    Boxes(usize, usize),
    /// As [`Kind::Boxes`] at stride 1 with filters that stay in shared memory, on trial.
    Resident(usize),
    /// Rows of voxels; kernel of one voxel, no moments.
    Pointwise,
    /// A thread a value in f32, no moments.
    Plain,
}

#[derive(Debug)]
struct Variant {
    name: &'static str,
    /// Filters of a block.
    filters: usize,
    kind: Kind,
    /// Warps along the voxels, each with sums of its own.
    warps: usize,
    /// Estimate of how much of the matrix units it keeps busy, from what it reads of shared memory for a product and from what
    /// waits for it; the units of warp groups are twice as fast.
    efficiency: f64,
}

const VARIANTS: [Variant; 19] = [
    Variant { name: "resident_n32", filters: 32, kind: Kind::Resident(4), warps: 8, efficiency: 1.6 },
    Variant { name: "resident_n16", filters: 16, kind: Kind::Resident(4), warps: 8, efficiency: 1.0 },
    Variant { name: "tma_n128", filters: 128, kind: Kind::Boxes(4, 1), warps: 8, efficiency: 1.6 },
    Variant { name: "tma_n96", filters: 96, kind: Kind::Boxes(4, 1), warps: 8, efficiency: 1.6 },
    Variant { name: "tma_n64", filters: 64, kind: Kind::Boxes(8, 1), warps: 8, efficiency: 1.6 },
    Variant { name: "tma_n32", filters: 32, kind: Kind::Boxes(4, 1), warps: 8, efficiency: 1.4 },
    Variant { name: "tma_s2_n128", filters: 128, kind: Kind::Boxes(2, 2), warps: 8, efficiency: 1.2 },
    Variant { name: "tma_s2_n64", filters: 64, kind: Kind::Boxes(4, 2), warps: 8, efficiency: 1.2 },
    Variant { name: "tma_s2_n32", filters: 32, kind: Kind::Boxes(4, 2), warps: 8, efficiency: 0.8 },
    Variant { name: "n64", filters: 64, kind: Kind::Brick(4), warps: 4, efficiency: 1.0 },
    Variant { name: "n32", filters: 32, kind: Kind::Brick(8), warps: 8, efficiency: 1.0 },
    Variant { name: "n16", filters: 16, kind: Kind::Brick(8), warps: 8, efficiency: 0.8 },
    Variant { name: "pointwise_n64", filters: 64, kind: Kind::Pointwise, warps: 0, efficiency: 1.0 },
    Variant { name: "pointwise_n32", filters: 32, kind: Kind::Pointwise, warps: 0, efficiency: 0.9 },
    Variant { name: "pointwise_n16", filters: 16, kind: Kind::Pointwise, warps: 0, efficiency: 0.8 },
    Variant { name: "any_n64", filters: 64, kind: Kind::AnyBrick(2), warps: 4, efficiency: 0.7 },
    Variant { name: "any_n32", filters: 32, kind: Kind::AnyBrick(2), warps: 4, efficiency: 0.5 },
    Variant { name: "any_n16", filters: 16, kind: Kind::AnyBrick(2), warps: 8, efficiency: 0.35 },
    Variant { name: "plain", filters: BLOCK, kind: Kind::Plain, warps: 0, efficiency: 1.0 },
];

impl Variant {
    /// Whether the card can solve the problem so, if it does what the variant counts on.
    fn supports(&self, p: &Problem<'_>, measured: bool, driver: &dyn Driver) -> bool {
        let half = p.storage != Storage::F32;
        let limit = shared_limit(driver);
        if self.shared(p, 1, limit).0 + self.sums() > limit {
            return false;
        }
        match self.kind {
            Kind::Brick(_) => half && p.stride == [1; 3] && p.kernel[1..] == [3; 2],
            Kind::Boxes(..) | Kind::Resident(_) => {
                let stride = self.stride();
                let whole = p.sources.iter().skip(2 - stride).all(|s| s.repeat == [1; 3]);
                half && whole && p.stride == [stride; 3] && p.kernel == [3; 3] && driver.capability() == [9, 0]
            }
            Kind::AnyBrick(_) => half,
            Kind::Pointwise => half && p.kernel == [1; 3] && !measured,
            Kind::Plain => !half && !measured,
        }
    }

    /// Tiles of a sample along each axis.
    fn tiles(&self, out: [usize; 3]) -> [usize; 3] {
        match self.kind {
            Kind::Brick(planes) | Kind::AnyBrick(planes) | Kind::Boxes(planes, _) | Kind::Resident(planes) => {
                [out[0].div_ceil(planes), out[1].div_ceil(8), out[2].div_ceil(8)]
            }
            Kind::Pointwise | Kind::Plain => [1; 3],
        }
    }

    /// What can be cut into parts: slabs of channels, most of them times planes of taps.
    fn stages(&self, p: &Problem<'_>) -> usize {
        match self.kind {
            Kind::Brick(_) | Kind::AnyBrick(_) => slabs(p) * p.kernel[0],
            Kind::Boxes(..) => slabs(p),
            Kind::Resident(_) | Kind::Pointwise | Kind::Plain => 1,
        }
    }

    /// Estimate of the cycles that it takes in so many parts: waves of blocks times the work of a block, and for what is added
    /// up afterwards another launch and the traffic of all parts.
    fn cycles(&self, p: &Problem<'_>, out: [usize; 3], multiprocessors: usize, parts: usize) -> f64 {
        let (blocks, voxels) = self.blocks(p, out);
        let taps = p.kernel.iter().product::<usize>() * BLOCK * slabs(p);
        let part = taps as f64 / self.stages(p) as f64 * self.stages(p).div_ceil(parts) as f64;
        let waves = (blocks * parts).div_ceil(multiprocessors) as f64;
        let products = waves * (self.filters * voxels) as f64 * part / (PRODUCTS * self.efficiency);
        if parts == 1 {
            return products;
        }
        let sums = p.batch * out.iter().product::<usize>() * padded(p.filters) * parts;
        products + LAUNCH + (2 * 4 * sums) as f64 / (BYTES * multiprocessors as f64)
    }

    /// Numbers of parts to choose from: as many as there are stages, and until every multiprocessor has two blocks.
    fn parts(&self, p: &Problem<'_>, out: [usize; 3], multiprocessors: usize) -> std::ops::RangeInclusive<usize> {
        1..=(2 * multiprocessors / self.blocks(p, out).0.max(1)).clamp(1, self.stages(p))
    }

    /// Blocks of a part, and voxels of each.
    fn blocks(&self, p: &Problem<'_>, out: [usize; 3]) -> (usize, usize) {
        let groups = padded(p.filters).div_ceil(self.filters);
        let voxels = p.batch * out.iter().product::<usize>();
        match self.kind {
            Kind::Brick(planes) | Kind::AnyBrick(planes) | Kind::Boxes(planes, _) | Kind::Resident(planes) => {
                (p.batch * self.tiles(out).iter().product::<usize>() * groups, planes * 64)
            }
            Kind::Pointwise => (voxels.div_ceil(gemm::ROWS) * groups, gemm::ROWS),
            Kind::Plain => (voxels * padded(p.filters), 1),
        }
    }

    /// Static shared memory: three sums a filter and warp.
    fn sums(&self) -> usize {
        3 * self.warps * self.filters * 4
    }

    /// Along every axis, of those that know one only.
    fn stride(&self) -> usize {
        if let Kind::Boxes(_, stride) = self.kind { stride } else { 1 }
    }

    /// Counts on what only a card can confirm.
    fn on_trial(&self) -> bool {
        matches!(self.kind, Kind::Boxes(..) | Kind::Resident(_))
    }

    /// Dynamic shared memory, and how many bricks it holds: two, so that one is loaded while the other is computed with, where
    /// there is more than one and room.
    fn shared(&self, p: &Problem<'_>, stages: usize, limit: usize) -> (usize, usize) {
        let planes = match self.kind {
            Kind::Brick(planes) | Kind::AnyBrick(planes) => planes,
            Kind::Resident(planes) => return (boxes::resident(planes, slabs(p), self.filters), 2),
            Kind::Boxes(planes, stride) => return (boxes::shared(planes, stride, self.filters), 2),
            Kind::Pointwise | Kind::Plain => return (0, 1),
        };
        let row = BLOCK * 2;
        let pitch = if p.stride[2] == 2 { 20 } else { 12 };
        let depth = (planes - 1) * p.stride[0] + p.kernel[0];
        let brick = depth * (7 * p.stride[1] + p.kernel[1]) * pitch * row;
        let weights = 2 * p.kernel[1] * p.kernel[2] * self.filters * row;
        let results = planes * 64 * self.filters * 2;
        let bricks = if stages > 1 && 2 * brick + weights + self.sums() <= limit { 2 } else { 1 };
        ((bricks * brick + weights).max(results), bricks)
    }
}

/// Whether voxels of a source are read more than once.
fn repeats(p: &Problem<'_>) -> bool {
    p.sources.iter().any(|s| s.repeat != [1; 3])
}

fn slabs(p: &Problem<'_>) -> usize {
    p.sources.iter().map(|s| padded(s.channels) / BLOCK).sum()
}

/// D, H, W of the result.
#[must_use]
pub fn output_space(input: [usize; 3], kernel: [usize; 3], stride: [usize; 3]) -> [usize; 3] {
    [0, 1, 2].map(|a| (input[a] + kernel[a].saturating_sub(1) / 2 * 2).saturating_sub(kernel[a]) / stride[a].max(1) + 1)
}

/// Names of the variants that can solve the problem, with moments or without. Those that a card has to confirm are tried on it
/// the first time that they are asked for; what does not pass is not named, and [`Driver::findings`] says why.
#[must_use]
pub fn variants(driver: &dyn Driver, p: &Problem<'_>, measured: bool) -> Vec<&'static str> {
    let fit = VARIANTS.iter().filter(|v| v.supports(p, measured, driver));
    fit.filter(|v| trial::passes(driver, v, p).unwrap_or(false)).map(|v| v.name).collect()
}

/// The variant and the number of parts that are wished, or those expected to be done first; with moments if `measured`. One
/// that a card has to confirm is taken by name only, and as by [`variants`] tried on the card first, which takes memory for
/// a moment.
///
/// # Errors
/// As [`run`]; [`Error::Unsupported`] when nothing fits the wish; [`Error::OutOfMemory`].
pub fn plan(driver: &dyn Driver, p: &Problem<'_>, measured: bool, wish: Wish<'_>) -> Result<Plan> {
    let out = output_space(check(p)?, p.kernel, p.stride);
    let multiprocessors = driver.multiprocessors().max(1);
    let mut fit = Vec::new();
    for v in &VARIANTS {
        // A kernel that waits for what never comes would not end, trial or not: until a card has run them as they are now,
        // those on trial are for whoever asks by name.
        let asked = wish.variant.map_or(!v.on_trial(), |n| n == v.name) && v.supports(p, measured, driver);
        if asked && trial::passes(driver, v, p)? {
            fit.push(v);
        }
    }
    let ways = fit.into_iter().flat_map(|v| {
        let all = wish.parts.map_or_else(|| v.parts(p, out, multiprocessors), |n| n..=n);
        all.filter(|n| (1..=v.stages(p)).contains(n)).map(move |parts| (v, parts))
    });
    let cycles = |(v, parts): &(&Variant, usize)| v.cycles(p, out, multiprocessors, *parts);
    let best = ways.min_by(|a, b| cycles(a).total_cmp(&cycles(b)));
    let Some((variant, parts)) = best else {
        return Err(Error::unsupported(format!("{OP} has no variant for {wish:?} of this problem")));
    };
    let voxels = voxels(OP, p.batch, out)?;
    let (tiles, workspace) = match parts {
        1 => (variant.tiles(out).iter().product(), 0),
        _ => (sum::tiles(voxels / p.batch), parts * voxels * padded(p.filters) * 4),
    };
    let staying = multiprocessors / padded(p.filters).div_ceil(variant.filters);
    Ok(Plan { variant, parts, tiles, workspace, staying })
}

/// Filters `[O, I, kD, kH, kW]` as the kernel reads them, `[slab of 16 channels][tap][padded filter][16]`; `channels` are
/// those of each source, which are padded each.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit.
pub fn pack_weight(values: &[f32], dims: [usize; 5], channels: &[usize], storage: Storage) -> Result<Vec<u8>> {
    let [o, i, kernel @ ..] = dims;
    let taps: usize = kernel.iter().product();
    if values.len() != o * i * taps || channels.iter().sum::<usize>() != i {
        return Err(Error::shape(OP, format!("{} filter values of {dims:?} for {channels:?} channels", values.len())));
    }
    let filters = padded(o);
    let slabs: usize = channels.iter().map(|c| padded(*c) / BLOCK).sum();
    let mut packed = vec![0.0; slabs * taps * filters * BLOCK];
    let (mut first, mut start) = (0, 0);
    for &count in channels {
        for f in 0..o {
            for c in 0..count {
                let slab = start + c / BLOCK;
                for t in 0..taps {
                    let at = ((slab * taps + t) * filters + f) * BLOCK + c % BLOCK;
                    packed[at] = values[(f * i + first + c) * taps + t];
                }
            }
        }
        first += count;
        start += padded(count) / BLOCK;
    }
    Ok(storage.store(&packed))
}

/// Checks what does not depend on the variant; the input's size.
fn check(p: &Problem<'_>) -> Result<[usize; 3]> {
    // A kernel of 2 is the way back of a transposed convolution.
    let known = |(k, s)| matches!((k, s), (1 | 3, 1 | 2) | (2, 2));
    let ok = p.kernel.into_iter().zip(p.stride).all(known);
    if !ok || p.filters == 0 {
        let what = format!("{} filters of {:?} at stride {:?} in {:?}", p.filters, p.kernel, p.stride, p.storage);
        return Err(Error::shape(OP, what));
    }
    sources(OP, p.storage, p.batch, p.sources)?;
    Ok(p.sources[0].read_space())
}

/// Runs the convolution as it was planned.
///
/// # Errors
/// [`Error::Shape`] for sizes, kernels and strides that are not supported or do not fit the memory or the plan;
/// [`Error::Device`].
pub fn run(driver: &dyn Driver, p: &Problem<'_>, plan: &Plan) -> Result<()> {
    let space = check(p)?;
    let out = output_space(space, p.kernel, p.stride);
    let (v, parts) = (plan.variant, plan.parts);
    if !v.supports(p, p.partials.is_some(), driver) || parts > v.stages(p) {
        return Err(Error::shape(OP, format!("another problem was planned for {} in {parts} parts", v.name)));
    }
    if v.kind == Kind::Pointwise {
        return pointwise(driver, p, v, out);
    }
    let filters = padded(p.filters);
    let (slabs, taps) = (slabs(p), p.kernel.iter().product::<usize>());
    // A part may begin with the last plane of a slab.
    let most = (v.stages(p).div_ceil(parts) + 2 * (p.kernel[0] - 1)) / p.kernel[0];
    let (shared, bricks) = v.shared(p, if parts == 1 { slabs } else { most.min(slabs) }, shared_limit(driver));
    let tiles = v.tiles(out);
    let size = p.storage.bytes();
    let ints = |n| ints(OP, n);
    let count = p.batch * tiles.iter().product::<usize>();
    let all = voxels(OP, p.batch, out)?;
    // What a whole convolution writes itself, one in parts leaves to the kernel that adds them up.
    let (to, bias, partials) = if parts == 1 {
        (p.out.at_least(all * filters * size, OP, "the result")?, p.bias, p.partials)
    } else {
        let room = p.workspace.unwrap_or(Memory { address: 0, bytes: 0 });
        (room.at_least(parts * all * filters * 4, OP, "the workspace")?, None, None)
    };
    let params = Params {
        sources: sources(OP, p.storage, p.batch, p.sources)?,
        weight: p.weight.at_least(slabs * taps * filters * BLOCK * size, OP, "the filter")?,
        bias: bias.map_or(Ok(0), |b| b.at_least(filters * 4, OP, "the bias"))?,
        out: to,
        partials: partials.map_or(Ok(0), |m| m.at_least(count * 3 * filters * 4, OP, "the moments"))?,
        filters: int(OP, filters)?,
        space: ints(space)?,
        out_space: ints(out)?,
        kernel: ints(p.kernel)?,
        stride: ints(p.stride)?,
        tiles: ints(tiles)?,
        bricks: int(OP, bricks)?,
        batch: int(OP, p.batch)?,
    };
    let (blocks, _) = v.blocks(p, out);
    let blocks = if v.kind == Kind::Plain { blocks.div_ceil(THREADS as usize) } else { blocks };
    let mut launch = Launch::line(blocks, THREADS, shared)?;
    launch.grid[1] = int(OP, parts)?.unsigned_abs();
    // What is refused is refused before anything runs.
    let end = (parts > 1).then(|| sum::Sum::new(p, parts, all)).transpose()?;
    let (files, entry) = (files(v, p.storage), entry(v, p.storage));
    if let Kind::Boxes(planes, _) | Kind::Resident(planes) = v.kind {
        if v.kind == Kind::Resident(planes) {
            let groups = filters.div_ceil(v.filters);
            launch.grid[0] = int(OP, blocks.min(plan.staying.max(1) * groups))?.unsigned_abs();
        }
        launch.block[0] = boxes::BLOCK_THREADS;
        let (maps, params) = (boxes::maps(p, planes, v.filters)?, boxes::Params { params, unused: [0; 14] });
        files.launch(driver, &entry, launch, Parameter { maps: &maps, bytes: bytemuck::bytes_of(&params) })?;
    } else {
        files.launch(driver, &entry, launch, bytemuck::bytes_of(&params))?;
    }
    end.map_or(Ok(()), |s| s.run(driver))
}

fn pointwise(driver: &dyn Driver, p: &Problem<'_>, v: &Variant, out: [usize; 3]) -> Result<()> {
    let mut params = gemm::params(OP, p.storage, p.batch, p.sources, p.weight, p.bias, p.filters)?;
    params.space = ints(OP, out)?;
    params.stride = ints(OP, p.stride)?;
    let rows = voxels(OP, p.batch, out)?;
    int(OP, rows + gemm::ROWS)?;
    let values = rows * padded(p.filters);
    params.out = p.out.at_least(values * p.storage.bytes(), OP, "the result")?;
    let launch = Launch::line(v.blocks(p, out).0, THREADS, 0)?;
    files(v, p.storage).launch(driver, &entry(v, p.storage), launch, bytemuck::bytes_of(&params))
}

fn files(v: &Variant, storage: Storage) -> &'static Files {
    match (v.kind, storage) {
        (Kind::Plain, _) => &F32,
        (Kind::Pointwise, _) => &POINTWISE,
        (Kind::Resident(_), _) => boxes::resident_files(storage),
        (Kind::Boxes(_, stride), _) => boxes::files(storage, stride),
        (_, Storage::F16) => &F16,
        _ => &BF16,
    }
}

fn entry(v: &Variant, storage: Storage) -> String {
    if v.kind == Kind::Plain { "conv3d_f32".into() } else { format!("conv3d_{}_{}", v.name, storage.name()) }
}

pub(super) fn entries() -> Vec<Entry> {
    let mut all =
        [dgrad::entries(), first::entries(), join::entries(), residual::entries(), sum::entries(), wgrad::entries()]
            .concat();
    for v in &VARIANTS {
        let params = match v.kind {
            Kind::Pointwise => size_of::<gemm::Params>(),
            Kind::Boxes(..) | Kind::Resident(_) => boxes::PARAMS,
            _ => size_of::<Params>(),
        };
        let storages: &[Storage] = if v.kind == Kind::Plain { &[Storage::F32] } else { &[Storage::Bf16, Storage::F16] };
        all.extend(storages.iter().flat_map(|s| Entry::of(files(v, *s), entry(v, *s), params)));
    }
    all
}
