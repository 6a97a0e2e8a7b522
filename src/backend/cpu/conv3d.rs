//! 3D convolution: the problem, the packed filter, the list of implementations, which of them to take, and the reference.
//!
//! Packed filter: output channels in groups of two blocks (the last group has one if their number is odd), per group
//! `[kD][kH][kW][I][16 or 32]`. The input channels stay whole, so one packing serves any split of them into sources.

pub(super) mod direct;
mod packed;
pub(super) mod tile;
pub(super) mod winograd;

pub(crate) use self::packed::{pack_filter, unpack_filter};
use self::winograd::{Plan, Scheme};
use super::moments::{Moments, moments};
use crate::base::par;
use crate::tensor::{BLOCK, Dims, Isa, Layout, Precision, Stored, StoredMut};

/// Sizes of a convolution; batch 1 or more, nothing else is zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) batch: usize,
    /// Input channels of all sources together.
    pub(crate) in_channels: usize,
    pub(crate) out_channels: usize,
    /// (D, H, W) of the input.
    pub(crate) input: [usize; 3],
    /// (D, H, W) of the output.
    pub(crate) output: [usize; 3],
    /// 1 or 3 per axis.
    pub(crate) kernel: [usize; 3],
    /// 1 or 2 per axis.
    pub(crate) stride: [usize; 3],
    /// At most half the kernel per axis.
    pub(crate) padding: [usize; 3],
    /// Input channels that the filter was packed with, and which of them is the sources' first.
    pub(crate) filter_inputs: usize,
    pub(crate) filter_first: usize,
}

/// `leaky_relu((x - mean) * scale + shift)`, vectors of `[batch][channels padded to blocks]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) mean: &'a [f32],
    pub(crate) scale: &'a [f32],
    pub(crate) shift: &'a [f32],
    /// In [0, 1]; 1 is no activation.
    pub(crate) slope: f32,
}

/// One input. Its channels follow those of the source before it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) data: Stored<'a>,
    pub(crate) channels: usize,
    /// Plain or blocked; the same for all sources of a problem.
    pub(crate) layout: Layout,
    /// Applied to values as they are read, not to the padding.
    pub(crate) norm: Option<Norm<'a>>,
    /// Every voxel stands for this many along each axis.
    pub(crate) factor: [usize; 3],
}

/// What becomes of a result: `leaky_relu(normalised(out) + result + addend)`, where `out` is what the output holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Residual<'a> {
    pub(crate) norm: Norm<'a>,
    /// A blocked tensor of the output's channels, each of whose voxels stands for as many along each axis.
    pub(crate) addend: Option<(Stored<'a>, [usize; 3])>,
}

/// All but the output, which is blocked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a> {
    pub(crate) geometry: Geometry,
    /// One or two.
    pub(crate) sources: &'a [Source<'a>],
    /// See [`pack_filter`].
    pub(crate) filter: Stored<'a>,
    /// Padded to whole blocks.
    pub(crate) bias: Option<&'a [f32]>,
    /// Direct implementations only.
    pub(crate) residual: Option<Residual<'a>>,
}

/// One implementation.
pub(crate) struct Algorithm {
    /// Unique within the list.
    name: &'static str,
    /// What the processor must have.
    isa: Isa,
    /// As accurate as adding up the products one after the other.
    strict: bool,
    how: How,
}

enum How {
    Direct(&'static tile::Kernels),
    /// Minimal filtering with so many outputs per tile along z, and along y and x.
    Winograd(usize, usize),
    Reference,
}

/// Where several would take the same time, the first is chosen.
static CONV3D: &[Algorithm] = &[
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "winograd_444_avx512", isa: Isa::Avx512, strict: false, how: How::Winograd(4, 4) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "winograd_244_avx512", isa: Isa::Avx512, strict: false, how: How::Winograd(2, 4) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "winograd_422_avx512", isa: Isa::Avx512, strict: true, how: How::Winograd(4, 2) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "winograd_222_avx512", isa: Isa::Avx512, strict: true, how: How::Winograd(2, 2) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "direct_avx512", isa: Isa::Avx512, strict: true, how: How::Direct(&tile::AVX512) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "winograd_444_avx2", isa: Isa::Avx2, strict: false, how: How::Winograd(4, 4) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "winograd_244_avx2", isa: Isa::Avx2, strict: false, how: How::Winograd(2, 4) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "winograd_422_avx2", isa: Isa::Avx2, strict: true, how: How::Winograd(4, 2) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "winograd_222_avx2", isa: Isa::Avx2, strict: true, how: How::Winograd(2, 2) },
    #[cfg(target_arch = "x86_64")]
    Algorithm { name: "direct_avx2", isa: Isa::Avx2, strict: true, how: How::Direct(&tile::AVX2) },
    Algorithm { name: "winograd_444_scalar", isa: Isa::Scalar, strict: false, how: How::Winograd(4, 4) },
    Algorithm { name: "winograd_244_scalar", isa: Isa::Scalar, strict: false, how: How::Winograd(2, 4) },
    Algorithm { name: "winograd_422_scalar", isa: Isa::Scalar, strict: true, how: How::Winograd(4, 2) },
    Algorithm { name: "winograd_222_scalar", isa: Isa::Scalar, strict: true, how: How::Winograd(2, 2) },
    Algorithm { name: "direct_scalar", isa: Isa::Scalar, strict: true, how: How::Direct(&tile::SCALAR) },
    Algorithm { name: "reference", isa: Isa::Scalar, strict: true, how: How::Reference },
];

/// How activations are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Storage {
    /// Of the sources: bf16 if any of them is.
    pub(crate) input: Precision,
    pub(crate) output: Precision,
    /// Of a residual block's addend, if there is one.
    pub(crate) addend: Precision,
    /// The only source may be overwritten.
    pub(crate) in_place: bool,
}

impl Storage {
    /// All as f32, none to be overwritten.
    pub(crate) const PLAIN: Self =
        Self { input: Precision::F32, output: Precision::F32, addend: Precision::F32, in_place: false };
}

/// How far down the list to look.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wish<'n> {
    /// Only this implementation.
    pub(crate) name: Option<&'n str>,
    /// Only implementations as accurate as adding up the products one after the other.
    pub(crate) strict: bool,
    /// Only those that can finish a residual block.
    pub(crate) residual: bool,
}

/// An implementation for a problem, with what it needs.
pub(crate) struct Choice {
    algorithm: &'static Algorithm,
    plan: Option<Plan>,
    /// Floats that each thread of a direct convolution takes to read or write what is not stored as floats.
    stage: usize,
    cycles: f64,
}

impl Choice {
    fn new(algorithm: &'static Algorithm, g: &Geometry, channels: &[usize], storage: Storage) -> Option<Self> {
        let whole = g.filter_inputs == g.in_channels;
        let (plan, cycles) = match algorithm.how {
            // Fewer channels than lanes of a register leave most of the work empty.
            How::Winograd(..) if !whole || g.in_channels < BLOCK / 2 => return None,
            How::Winograd(z, xy) => {
                let plan = Plan::new(Scheme::of(g, z, xy)?, algorithm.isa, g, channels, storage);
                let cycles = plan.cycles();
                (Some(plan), cycles)
            }
            How::Direct(_) => (None, direct_cycles(g)),
            How::Reference => (None, f64::INFINITY),
        };
        let stage =
            if matches!(algorithm.how, How::Direct(_)) { direct::Stage::new(g, channels, storage).len() } else { 0 };
        Some(Self { algorithm, plan, stage, cycles })
    }

    /// The implementation's name.
    pub(crate) fn name(&self) -> &'static str {
        self.algorithm.name
    }

    /// As accurate as adding up the products one after the other.
    pub(crate) fn is_strict(&self) -> bool {
        self.algorithm.strict
    }

    /// Estimated time on one core, in cycles of a core that does one multiply-add of 16 floats in each.
    pub(crate) fn cycles(&self) -> f64 {
        self.cycles
    }

    /// The output replaces the only source, which `forward` is given as what the output holds: its `data` are not read.
    pub(crate) fn is_in_place(&self) -> bool {
        self.plan.as_ref().is_some_and(Plan::is_in_place)
    }

    /// Reads sources stored as bf16.
    pub(crate) fn reads_halves(&self, g: &Geometry) -> bool {
        self.plan.is_some() || (matches!(self.algorithm.how, How::Direct(_)) && g.kernel == [1; 3])
    }

    /// Writes an output stored as bf16.
    pub(crate) fn writes_halves(&self) -> bool {
        !matches!(self.algorithm.how, How::Reference)
    }

    /// Sources may be normalised or repeated while they are read, and have to be blocked.
    pub(crate) fn reads_lazily(&self) -> bool {
        self.plan.is_some()
    }

    /// Floats of a transformed filter that is worth keeping, and what tells it from others.
    pub(crate) fn kept_filter(&self) -> Option<(usize, u64)> {
        let plan = self.plan.as_ref().filter(|p| p.kept_filter() > 0)?;
        Some((plan.kept_filter(), plan.scheme().key()))
    }

    /// Floats of working memory for `threads` threads, to read `filter`.
    pub(crate) fn workspace(&self, threads: usize, filter: Stored<'_>) -> usize {
        self.plan.as_ref().map_or(filter.room() + threads * self.stage, |p| p.workspace(threads))
    }
}

/// Multiply-adds of 16 outputs, at the share of the peak that the tiles reach; taps in the padding are left out.
fn direct_cycles(g: &Geometry) -> f64 {
    let taps: f64 = (0..3)
        .map(|a| {
            let inside = |o: usize, k: usize| {
                let i = o * g.stride[a] + k;
                i >= g.padding[a] && i < g.input[a] + g.padding[a]
            };
            (0..g.output[a]).map(|o| (0..g.kernel[a]).filter(|k| inside(o, *k)).count() as f64).sum::<f64>()
        })
        .product();
    let share = if g.stride == [1; 3] { 0.92 } else { 0.85 } * row_share(g.output[2]);
    taps * (g.batch * g.in_channels * g.out_channels.div_ceil(BLOCK)) as f64 / share
}

/// How well tiles do in rows of so many voxels: a vector of weights is read for each tile, and meets as few voxels.
pub(in crate::backend::cpu) fn row_share(voxels: usize) -> f64 {
    voxels as f64 / (voxels as f64 + 3.0)
}

/// The implementation of least estimated time that the device and `wish` allow. `channels` are those of each source.
pub(crate) fn choose(isa: Isa, g: &Geometry, channels: &[usize], storage: Storage, wish: Wish<'_>) -> Option<Choice> {
    // Every set has all kinds of implementations, so what is for lesser processors is only taken by name.
    let allowed = |a: &&'static Algorithm| {
        wish.name.map_or(a.isa == isa, |n| n == a.name && a.isa <= isa)
            && (a.strict || !wish.strict)
            && (!wish.residual || matches!(a.how, How::Direct(_)))
    };
    let choices = CONV3D.iter().filter(allowed).filter_map(|a| Choice::new(a, g, channels, storage));
    choices.reduce(|best, c| if c.cycles < best.cycles { c } else { best })
}

/// What [`choose`] chooses from, and true for its choice. Implementations for lesser processors and the reference are left
/// out.
pub(crate) fn estimates(isa: Isa, g: &Geometry, channels: &[usize], strict: bool) -> Vec<(Choice, bool)> {
    let taken = choose(isa, g, channels, Storage::PLAIN, Wish { strict, ..Wish::default() }).map(|c| c.name());
    let listed = |a: &&'static Algorithm| {
        Some(a.name) == taken || (a.isa == isa && (a.strict || !strict) && !matches!(a.how, How::Reference))
    };
    let choices = CONV3D.iter().filter(listed).filter_map(|a| Choice::new(a, g, channels, Storage::PLAIN));
    choices.map(|c| (Some(c.name()) == taken, c)).map(|(chosen, c)| (c, chosen)).collect()
}

/// The names of all implementations that fit.
pub(crate) fn names(isa: Isa, g: &Geometry) -> Vec<&'static str> {
    let fits = CONV3D.iter().filter(|a| a.isa <= isa);
    fits.filter_map(|a| Choice::new(a, g, &[g.in_channels], Storage::PLAIN)).map(|c| c.name()).collect()
}

/// Transforms a packed filter into the form that `choice` keeps.
pub(crate) fn prepare_filter(_: Isa, choice: &Choice, g: &Geometry, packed: Stored<'_>, out: &mut [f32]) {
    if let Some(plan) = &choice.plan {
        winograd::prepare(choice.algorithm.isa, plan.scheme(), g, packed, out);
    }
}

/// Writes the convolution of `p` to `out`, pad lanes too. `kept` is what [`prepare_filter`] made, `work` has the floats
/// that [`Choice::workspace`] asks for. With `measure`, returns the moments of `[sample][output block]`.
pub(crate) fn forward(
    isa: Isa,
    choice: &Choice,
    p: &Problem<'_>,
    kept: &[f32],
    work: &mut [f32],
    out: StoredMut<'_>,
    measure: bool,
) -> Vec<Moments> {
    let g = &p.geometry;
    let blocks = g.batch * g.out_channels.div_ceil(BLOCK);
    match (&choice.algorithm.how, &choice.plan) {
        (How::Direct(kernels), _) => {
            let (filter, stage) = work.split_at_mut(p.filter.room());
            direct::run(kernels, isa, p, p.filter.floats(isa, filter), stage, out, measure)
        }
        (_, Some(plan)) => {
            let sums = winograd::run(plan, p, kept, work, out, false);
            let per_sample = sums.len() / g.batch;
            let of = |i: usize| {
                let (n, block) = (i / (blocks / g.batch), i % (blocks / g.batch));
                let parts = sums[n * per_sample..][..per_sample].iter().skip(block).step_by(blocks / g.batch);
                parts.fold(Moments::default(), |m, s| m.merge(s.moments()))
            };
            if measure { (0..blocks).map(of).collect() } else { Vec::new() }
        }
        _ => {
            let StoredMut::F32(out) = out else { unreachable!("the reference stores floats") };
            reference(p, p.filter.floats(isa, work), out);
            let len = out.len() / blocks.max(1);
            if measure { out.chunks_exact(len).map(|x| moments(isa, x)).collect() } else { Vec::new() }
        }
    }
}

/// Floats of a packed filter.
pub(crate) fn packed_len([o, i, kd, kh, kw]: [usize; 5]) -> usize {
    Layout::BLOCKED.padded(o) * i * kd * kh * kw
}

/// Where the weights of output block `block` start: the place of tap 0 and the sources' first channel, and the distance
/// between input channels.
pub(super) fn packed_place(g: &Geometry, block: usize) -> (usize, usize) {
    let blocks = g.out_channels.div_ceil(BLOCK);
    let first = block / 2 * 2;
    let width = BLOCK * (blocks - first).min(2);
    let taps: usize = g.kernel.iter().product();
    (first * BLOCK * taps * g.filter_inputs + g.filter_first * width + (block - first) * BLOCK, width)
}

/// The definition, one output value at a time.
fn reference(p: &Problem<'_>, filter: &[f32], out: &mut [f32]) {
    let g = &p.geometry;
    let [od, oh, ow] = g.output;
    let blocks = g.out_channels.div_ceil(BLOCK);
    par::chunks_mut(out, od * oh * ow * BLOCK, |i, out| {
        let (n, block) = (i / blocks, i % blocks);
        let (weights, width) = packed_place(g, block);
        for (v, o) in out.iter_mut().enumerate() {
            let (lane, voxel) = (v % BLOCK, v / BLOCK);
            let at = [voxel / (oh * ow), voxel / ow % oh, voxel % ow];
            let bias = p.bias.map_or(0.0, |b| b[block * BLOCK + lane]);
            *o = bias + dot(p, n, at, &filter[weights + lane..], width);
        }
    });
}

/// Sum over taps and input channels for one output value.
fn dot(p: &Problem<'_>, n: usize, at: [usize; 3], weights: &[f32], width: usize) -> f32 {
    let g = &p.geometry;
    let [kd, kh, kw] = g.kernel;
    let mut sum = 0.0;
    for tap in 0..kd * kh * kw {
        let k = [tap / (kh * kw), tap / kw % kh, tap % kw];
        let mut x = [0; 3];
        let mut inside = true;
        for a in 0..3 {
            // Wraps to a huge number left of the input.
            x[a] = (at[a] * g.stride[a] + k[a]).wrapping_sub(g.padding[a]);
            inside &= x[a] < g.input[a];
        }
        if !inside {
            continue;
        }
        let mut c = 0;
        for s in p.sources {
            let dims = Dims::from([g.batch, s.channels, g.input[0], g.input[1], g.input[2]]);
            // Channels of a block lie side by side.
            for first in (0..s.channels).step_by(s.layout.block) {
                let from = s.layout.offset(&dims, [n, first, x[0], x[1], x[2]]);
                for k in 0..s.layout.block.min(s.channels - first) {
                    sum += s.data.get(from + k) * weights[(tap * g.filter_inputs + c) * width];
                    c += 1;
                }
            }
        }
    }
    sum
}
