//! Gradients of the 3D convolution: of its input, of its filter and of its bias; the problems, the list of
//! implementations, which of them to take, and the reference.
//!
//! Both problems are told in terms of the convolution's own [`Geometry`], whose `filter_first` and `in_channels` say which
//! of the filter's input channels are meant. A filter's gradient is in the order of the packed filter (see
//! [`super::conv3d::pack_filter`]), pad lanes zero, so that optimizers work on both value by value.

mod dgrad;
pub(super) mod outer;
pub(super) mod wgrad;

use super::conv3d::winograd::{self, Scheme, WeightPlan};
use super::conv3d::{Geometry, Problem, Source, Storage, packed_place, tile};
use super::isa::{Simd, simd_entry};
use crate::base::par;
use crate::tensor::{BLOCK, Isa, Layout, Precision, Stored, StoredMut};

/// The gradient of one source's channels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dgrad<'a> {
    /// Of the convolution, whose input is as it was seen: normalised and repeated.
    pub(crate) geometry: Geometry,
    /// Every voxel of the source stood for this many along each axis, whose gradients are added up.
    pub(crate) factor: [usize; 3],
    /// See [`super::conv3d::pack_filter`].
    pub(crate) filter: Stored<'a>,
    /// Of the output, blocked.
    pub(crate) dy: &'a [f32],
    /// Add to what `dx` holds.
    pub(crate) add: bool,
}

/// The gradient of the filter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wgrad<'a> {
    pub(crate) geometry: Geometry,
    /// One or two, as the convolution read them. A plain one is stored as f32 and neither normalised nor repeated.
    pub(crate) sources: &'a [Source<'a>],
    /// Of the output, blocked.
    pub(crate) dy: &'a [f32],
    /// Add to what `dw` holds.
    pub(crate) add: bool,
}

/// One implementation of each gradient.
struct Algorithm {
    /// Unique within the list.
    name: &'static str,
    /// What the processor must have.
    isa: Isa,
    /// As accurate as adding up the products one after the other.
    strict: bool,
    how: How,
}

enum How {
    /// Minimal filtering with so many outputs per tile along z, and along y and x.
    Winograd(usize, usize),
    Direct(&'static tile::Kernels),
    Reference,
}

/// Where several would take the same time, the first is chosen.
static CONV3D_GRAD: &[Algorithm] = &[
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

/// How far down the list to look.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wish<'n> {
    /// Only this implementation.
    pub(crate) name: Option<&'n str>,
    /// Only implementations as accurate as adding up the products one after the other.
    pub(crate) strict: bool,
}

/// An implementation of the input's gradient, with what it needs.
pub(crate) struct DgradChoice {
    algorithm: &'static Algorithm,
    plan: Option<winograd::Plan>,
    /// Floats of the filter in the form that it takes.
    filter: usize,
    cycles: f64,
}

impl DgradChoice {
    fn new(algorithm: &'static Algorithm, g: &Geometry, factor: [usize; 3]) -> Option<Self> {
        let (plan, filter, cycles) = match algorithm.how {
            // Fewer channels than lanes of a register leave most of the work empty.
            How::Winograd(..) if g.stride != [1; 3] || g.out_channels < BLOCK / 2 => return None,
            How::Winograd(z, xy) => {
                let scheme = Scheme::of(g, z, xy)?.summed(factor)?;
                let turned = dgrad::turned(g, factor);
                let plan = winograd::Plan::new(scheme, algorithm.isa, &turned, &[g.out_channels], Storage::PLAIN);
                // A filter that is transformed for this one use takes some operations for each of its values.
                let cycles = plan.cycles() + 0.5 * plan.kept_filter() as f64;
                let taps: usize = g.kernel.iter().product();
                (Some(plan), taps * g.out_channels * g.in_channels.next_multiple_of(BLOCK), cycles)
            }
            How::Direct(_) => {
                dgrad::fits(factor, g.stride).then_some(())?;
                (None, dgrad::packed_len(g, factor), dgrad::cycles(g, factor))
            }
            How::Reference => (None, 0, f64::INFINITY),
        };
        Some(Self { algorithm, plan, filter, cycles })
    }

    /// The implementation's name.
    pub(crate) fn name(&self) -> &'static str {
        self.algorithm.name
    }

    /// Floats of working memory for `threads` threads.
    pub(crate) fn workspace(&self, threads: usize) -> usize {
        self.filter + self.plan.as_ref().map_or(0, |p| p.kept_filter() + p.workspace(threads))
    }
}

/// What is known of the sources of a filter's gradient before they are there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading<'a> {
    /// Channels of each.
    pub(crate) channels: &'a [usize],
    /// bf16 if any of them is.
    pub(crate) precision: Precision,
    /// Some is normalised or repeated while it is read.
    pub(crate) lazy: bool,
    /// Some is plain.
    pub(crate) plain: bool,
}

impl<'a> Reading<'a> {
    /// Of sources that are there; `channels` are theirs.
    pub(crate) fn of(sources: &[Source<'_>], channels: &'a [usize]) -> Self {
        let halves = sources.iter().any(|s| s.data.precision() == Precision::Bf16);
        Self {
            channels,
            precision: if halves { Precision::Bf16 } else { Precision::F32 },
            lazy: sources.iter().any(|s| s.norm.is_some() || s.factor != [1; 3]),
            plain: sources.iter().any(|s| s.layout == Layout::PLAIN),
        }
    }
}

/// An implementation of the filter's gradient, with what it needs.
pub(crate) struct WgradChoice {
    algorithm: &'static Algorithm,
    plan: WgradPlan,
    cycles: f64,
}

enum WgradPlan {
    Winograd(Box<WeightPlan>),
    Direct(wgrad::Plan),
    Reference,
}

impl WgradChoice {
    fn new(algorithm: &'static Algorithm, g: &Geometry, from: Reading<'_>) -> Option<Self> {
        let (plan, cycles) = match algorithm.how {
            How::Winograd(..) if from.plain || g.in_channels < BLOCK / 2 => return None,
            How::Winograd(z, xy) => {
                let scheme = Scheme::of(g, z, xy)?;
                let plan = WeightPlan::new(scheme, algorithm.isa, g, from.channels, from.precision);
                let cycles = plan.cycles();
                (WgradPlan::Winograd(Box::new(plan)), cycles)
            }
            How::Direct(_) => {
                let plan = wgrad::Plan::new(g, from.channels, from.lazy || from.precision != Precision::F32);
                (WgradPlan::Direct(plan), wgrad::cycles(g, from.channels))
            }
            How::Reference => (WgradPlan::Reference, f64::INFINITY),
        };
        Some(Self { algorithm, plan, cycles })
    }

    /// The implementation's name.
    pub(crate) fn name(&self) -> &'static str {
        self.algorithm.name
    }

    /// Floats of working memory for `threads` threads.
    pub(crate) fn workspace(&self, threads: usize) -> usize {
        match &self.plan {
            WgradPlan::Winograd(plan) => plan.workspace(threads),
            WgradPlan::Direct(plan) => plan.workspace(threads),
            WgradPlan::Reference => 0,
        }
    }
}

/// The entries of the list that the device and `wish` allow.
fn allowed(isa: Isa, wish: Wish<'_>) -> impl Iterator<Item = &'static Algorithm> {
    // Every set has all kinds of implementations, so what is for lesser processors is only taken by name.
    CONV3D_GRAD.iter().filter(move |a| {
        wish.name.map_or(a.isa == isa || matches!(a.how, How::Reference), |n| n == a.name && a.isa <= isa)
            && (a.strict || !wish.strict)
    })
}

/// The implementation of the input's gradient of least estimated time that the device and `wish` allow; a rough one by name
/// only: an error of a filter's gradient stays there, one of an input's gradient goes on from layer to layer.
pub(crate) fn choose_dgrad(isa: Isa, g: &Geometry, factor: [usize; 3], wish: Wish<'_>) -> Option<DgradChoice> {
    let wish = Wish { strict: wish.strict || wish.name.is_none(), ..wish };
    let choices = allowed(isa, wish).filter_map(|a| DgradChoice::new(a, g, factor));
    choices.reduce(|best, c| if c.cycles < best.cycles { c } else { best })
}

/// The same for the filter's gradient.
pub(crate) fn choose_wgrad(isa: Isa, g: &Geometry, from: Reading<'_>, wish: Wish<'_>) -> Option<WgradChoice> {
    let choices = allowed(isa, wish).filter_map(|a| WgradChoice::new(a, g, from));
    choices.reduce(|best, c| if c.cycles < best.cycles { c } else { best })
}

/// The names of all implementations of the input's gradient that fit.
pub(crate) fn dgrad_names(isa: Isa, g: &Geometry, factor: [usize; 3]) -> Vec<&'static str> {
    let fits = CONV3D_GRAD.iter().filter(|a| a.isa <= isa);
    fits.filter_map(|a| DgradChoice::new(a, g, factor)).map(|c| c.name()).collect()
}

/// The names of all implementations of the filter's gradient that fit.
pub(crate) fn wgrad_names(isa: Isa, g: &Geometry, from: Reading<'_>) -> Vec<&'static str> {
    let fits = CONV3D_GRAD.iter().filter(|a| a.isa <= isa);
    fits.filter_map(|a| WgradChoice::new(a, g, from)).map(|c| c.name()).collect()
}

/// Floats of a blocked activation.
fn floats(g: &Geometry, channels: usize, size: [usize; 3]) -> usize {
    g.batch * Layout::BLOCKED.padded(channels) * size.iter().product::<usize>()
}

/// Floats of the packed filter.
fn filter_len(g: &Geometry) -> usize {
    Layout::BLOCKED.padded(g.out_channels) * g.filter_inputs * g.kernel.iter().product::<usize>()
}

/// Writes the gradient of a source of `in_channels` channels to `dx`, a blocked activation of the source's sizes (the
/// input's by `factor`), pad lanes too. `work` has the floats that [`DgradChoice::workspace`] asks for.
///
/// Along each axis `dx[i] = sum_k w[k] dy[(i + padding - k) / stride]` over the taps that divide evenly and meet an output.
pub(crate) fn dgrad(_: Isa, choice: &DgradChoice, p: &Dgrad<'_>, work: &mut [f32], dx: &mut [f32]) {
    let g = &p.geometry;
    assert_eq!(p.dy.len(), floats(g, g.out_channels, g.output), "an output's gradient of other sizes");
    assert!((0..3).all(|a| g.input[a].is_multiple_of(p.factor[a])), "a source that is not repeated evenly");
    let size = [0, 1, 2].map(|a| g.input[a] / p.factor[a]);
    assert_eq!(dx.len(), floats(g, g.in_channels, size), "an input's gradient of other sizes");
    assert_eq!(p.filter.len(), filter_len(g), "a filter of other sizes");
    assert!(g.filter_first + g.in_channels <= g.filter_inputs, "more channels than the filter has");
    let (filter, work) = work.split_at_mut(choice.filter);
    match (&choice.algorithm.how, &choice.plan) {
        (How::Direct(kernels), _) => dgrad::run(kernels, p, filter, dx),
        (_, Some(plan)) => dgrad_winograd(choice.algorithm.isa, plan, p, filter, work, dx),
        _ => dgrad_reference(p, size, dx),
    }
}

/// By the convolution's own engine.
fn dgrad_winograd(
    isa: Isa,
    plan: &winograd::Plan,
    p: &Dgrad<'_>,
    filter: &mut [f32],
    work: &mut [f32],
    dx: &mut [f32],
) {
    let g = dgrad::turned(&p.geometry, p.factor);
    dgrad::repack(&p.geometry, p.filter, &dgrad::turned_taps(&p.geometry), filter);
    let (kept, work) = work.split_at_mut(plan.kept_filter());
    if !kept.is_empty() {
        winograd::prepare(isa, plan.scheme(), &g, Stored::F32(filter), kept);
    }
    let dy = Source {
        data: Stored::F32(p.dy),
        channels: g.in_channels,
        layout: Layout::BLOCKED,
        norm: None,
        factor: [1; 3],
    };
    let add = p.add;
    let p = &Problem { geometry: g, sources: &[dy], filter: Stored::F32(filter), bias: None, residual: None };
    winograd::run(plan, p, kept, work, StoredMut::F32(dx), add);
}

/// Writes the gradient of the sources' part of the filter to its place in `dw`, which has the sizes of the packed filter;
/// other input channels' places stay as they are. Samples are added up. `work` has the floats that
/// [`WgradChoice::workspace`] asks for.
pub(crate) fn wgrad(_: Isa, choice: &WgradChoice, p: &Wgrad<'_>, work: &mut [f32], dw: &mut [f32]) {
    let g = &p.geometry;
    assert_eq!(p.dy.len(), floats(g, g.out_channels, g.output), "an output's gradient of other sizes");
    assert_eq!(dw.len(), filter_len(g), "a filter's gradient of other sizes");
    assert_eq!(p.sources.iter().map(|s| s.channels).sum::<usize>(), g.in_channels, "sources of other channels");
    assert!(g.filter_first + g.in_channels <= g.filter_inputs, "more channels than the filter has");
    for s in p.sources {
        assert!((0..3).all(|a| g.input[a].is_multiple_of(s.factor[a])), "a source that is not repeated evenly");
        let size: usize = (0..3).map(|a| g.input[a] / s.factor[a]).product();
        assert_eq!(s.data.len(), g.batch * s.layout.padded(s.channels) * size, "a source of other sizes");
        let plain = s.norm.is_none() && s.factor == [1; 3] && s.data.precision() == Precision::F32;
        assert!(s.layout == Layout::BLOCKED || plain, "a plain source that is not read as it is");
    }
    let isa = choice.algorithm.isa;
    match &choice.plan {
        WgradPlan::Winograd(plan) => winograd::weight_gradient(plan, p, work, dw),
        WgradPlan::Direct(plan) => wgrad::run(plan, isa, p, work, dw),
        WgradPlan::Reference => wgrad_reference(p, dw),
    }
}

/// The definition, one value at a time.
fn dgrad_reference(p: &Dgrad<'_>, [d, h, w]: [usize; 3], dx: &mut [f32]) {
    let g = &p.geometry;
    let [od, oh, ow] = g.output;
    let taps: usize = g.kernel.iter().product();
    let (blocks, out_blocks) = (g.in_channels.div_ceil(BLOCK), g.out_channels.div_ceil(BLOCK));
    par::chunks_mut(dx, d * h * w * BLOCK, |i, dx| {
        let (n, block) = (i / blocks, i % blocks);
        for (v, dx) in dx.iter_mut().enumerate() {
            let (channel, voxel) = (block * BLOCK + v % BLOCK, v / BLOCK);
            let at = [voxel / (h * w), voxel / w % h, voxel % w];
            let mut sum = if p.add { *dx } else { 0.0 };
            let pairs = (0..p.factor.iter().product()).flat_map(|r| (0..taps).map(move |k| (r, k)));
            for (r, tap) in pairs.filter(|_| channel < g.in_channels) {
                let [_, fh, fw] = p.factor;
                let r = [r / (fh * fw), r / fw % fh, r % fw];
                let k = [tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]];
                // Wraps to a huge number left of the output.
                let to = [0, 1, 2].map(|a| (at[a] * p.factor[a] + r[a] + g.padding[a]).wrapping_sub(k[a]));
                if (0..3).any(|a| to[a] % g.stride[a] != 0 || to[a] / g.stride[a] >= g.output[a]) {
                    continue;
                }
                let o = (to[0] / g.stride[0] * oh + to[1] / g.stride[1]) * ow + to[2] / g.stride[2];
                for c in 0..g.out_channels {
                    let (place, width) = packed_place(g, c / BLOCK);
                    let weight = p.filter.get(place + (tap * g.filter_inputs + channel) * width + c % BLOCK);
                    sum += weight * p.dy[((n * out_blocks + c / BLOCK) * od * oh * ow + o) * BLOCK + c % BLOCK];
                }
            }
            *dx = sum;
        }
    });
}

/// The definition, one block of values at a time.
fn wgrad_reference(p: &Wgrad<'_>, dw: &mut [f32]) {
    let g = &p.geometry;
    let [od, oh, ow] = g.output;
    let out_blocks = g.out_channels.div_ceil(BLOCK);
    let taps: usize = g.kernel.iter().product();
    let mut first = 0;
    for s in p.sources {
        let sums = par::map(out_blocks * taps * s.channels, |i| {
            let (block, tap, c) = (i / (taps * s.channels), i / s.channels % taps, i % s.channels);
            let k = [tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]];
            let mut sum = [0.0; BLOCK];
            for v in 0..g.batch * od * oh * ow {
                let (n, o) = (v / (od * oh * ow), v % (od * oh * ow));
                let at = [o / (oh * ow), o / ow % oh, o % ow];
                // Wraps to a huge number left of the input.
                let at = [0, 1, 2].map(|a| (at[a] * g.stride[a] + k[a]).wrapping_sub(g.padding[a]));
                if (0..3).all(|a| at[a] < g.input[a]) {
                    let x = value(g, s, n, c, at);
                    let dy = &p.dy[((n * out_blocks + block) * od * oh * ow + o) * BLOCK..][..BLOCK];
                    sum.iter_mut().zip(dy).for_each(|(s, dy)| *s += x * dy);
                }
            }
            sum
        });
        for (i, sum) in sums.iter().enumerate() {
            let (block, tap, c) = (i / (taps * s.channels), i / s.channels % taps, i % s.channels);
            let (place, width) = packed_place(g, block);
            let to = &mut dw[place + (tap * g.filter_inputs + first + c) * width..][..BLOCK];
            to.iter_mut().zip(sum).for_each(|(to, s)| *to = if p.add { *to + s } else { *s });
        }
        first += s.channels;
    }
}

/// A value of a source as the convolution sees it.
fn value(g: &Geometry, s: &Source<'_>, n: usize, c: usize, at: [usize; 3]) -> f32 {
    let size = [0, 1, 2].map(|a| g.input[a] / s.factor[a]);
    let at = [0, 1, 2].map(|a| at[a] / s.factor[a]);
    let dims = [g.batch, s.channels, size[0], size[1], size[2]].into();
    let x = s.data.get(s.layout.offset(&dims, [n, c, at[0], at[1], at[2]]));
    s.norm.map_or(x, |norm| {
        let i = n * Layout::BLOCKED.padded(s.channels) + c;
        let v = (x - norm.mean[i]) * norm.scale[i] + norm.shift[i];
        v.max(v * norm.slope)
    })
}

/// Voxels that are added up in f32 before they go on in f64.
const VOXELS: usize = 256;

/// Voxels of a work item.
const PART: usize = 64 * VOXELS;

simd_entry!(sum = sum_of(dy: &[f32]) -> [f64; BLOCK]);

/// The gradient of the bias: sums over samples and voxels of `dy`, a blocked activation of `channels` channels and `space`
/// voxels each, to `db` of whole blocks.
pub(crate) fn bias_grad(isa: Isa, channels: usize, space: usize, dy: &[f32], add: bool, db: &mut [f32]) {
    let blocks = channels.div_ceil(BLOCK);
    assert_eq!(db.len(), blocks * BLOCK, "a bias of other sizes");
    assert!(space > 0 && dy.len().is_multiple_of(blocks * space * BLOCK), "an output's gradient of other sizes");
    let parts = space.div_ceil(PART);
    let sums = par::map(dy.len() / (space * BLOCK) * parts, |i| {
        let of = &dy[i / parts * space * BLOCK..][..space * BLOCK];
        sum::on(isa, &of[i % parts * PART * BLOCK..space.min((i % parts + 1) * PART) * BLOCK])
    });
    for (b, db) in db.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let of = sums.chunks(parts).skip(b).step_by(blocks).flatten();
        let total = of.fold([0.0; BLOCK], |t: [f64; BLOCK], s| std::array::from_fn(|i| t[i] + s[i]));
        db.iter_mut().zip(total).for_each(|(db, t)| *db = if add { *db + t as f32 } else { t as f32 });
    }
}

#[inline(always)]
fn sum_of<S: Simd>(s: S, dy: &[f32]) -> [f64; BLOCK] {
    let mut total = [0.0; BLOCK];
    for part in dy.as_chunks::<BLOCK>().0.chunks(VOXELS) {
        let (fours, rest) = part.as_chunks::<4>();
        // Four sums each, to hide the latency of the addition.
        let mut sums = [s.splat(0.0); 4];
        for v in fours {
            for k in 0..4 {
                sums[k] = s.add(sums[k], s.load(&v[k]));
            }
        }
        for v in rest {
            sums[0] = s.add(sums[0], s.load(v));
        }
        let mut sum = [0.0; BLOCK];
        s.store(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])), &mut sum);
        total.iter_mut().zip(sum).for_each(|(t, s)| *t += f64::from(s));
    }
    total
}
