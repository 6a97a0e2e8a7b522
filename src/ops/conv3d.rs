//! 3D convolution.

mod backward;

use backward::{ConvBackward, ResidualBackward};

use super::lazy::{Affine, Moments, Source, Sources};
use super::{activation, blank_filter, blocked, computed_with, floats, memory, on_card, same_device, stored_memory};
use crate::autograd::{Ctx, Param, Var};
use crate::backend::cpu::conv3d::{self as backend, Choice, Geometry, Problem, Residual, Storage, Wish, packed_len};
use crate::backend::cpu::moments::Moments as BlockMoments;
use crate::backend::{compute, dispatch, no_implementation};
use crate::error::{Error, Result};
use crate::tensor::{BLOCK, Device, Dims, Layout, Precision, Stored, StoredMut, Tensor};

const OP: &str = "conv3d";

/// Stride and zero padding per axis (z, y, x); the kernel size comes from the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv3d {
    /// 1 or 2 per axis.
    pub stride: [usize; 3],
    /// Zeros on each side, at most half the kernel.
    pub padding: [usize; 3],
}

impl Conv3d {
    /// Sizes of the output for an input of sizes `x` `[N, C, D, H, W]` (all sources together) and a filter `w`
    /// `[O, I, kD, kH, kW]`: per axis `(in + 2 padding - kernel) / stride + 1`, rounded down.
    ///
    /// # Errors
    /// [`Error::Shape`] when channels or sizes do not fit, or for a kernel, stride or padding that is not supported.
    pub fn output_dims(&self, x: &Dims, w: &Dims) -> Result<Dims> {
        let [n, c, ..] = activation("conv3d", x)?;
        let [o, i, ..] = w.five();
        if w.as_slice().len() != 5 || w.is_empty() || i != c {
            return Err(Error::shape(
                "conv3d",
                format!("filter {w:?} for an input {x:?}, expected [O, {c}, kD, kH, kW]"),
            ));
        }
        let mut out = [0; 3];
        for a in 0..3 {
            let (k, s, p, size) = (w.space()[a], self.stride[a], self.padding[a], x.space()[a]);
            if !matches!(k, 1 | 3) || !matches!(s, 1 | 2) || p > k / 2 {
                let what =
                    format!("kernel {k}, stride {s}, padding {p} on axis {a}, expected 1 or 3, 1 or 2, <= kernel / 2");
                return Err(Error::shape("conv3d", what));
            }
            let Some(room) = (size + 2 * p).checked_sub(k) else {
                let what = format!("input {x:?} smaller than the filter {w:?} at padding {:?}", self.padding);
                return Err(Error::shape("conv3d", what));
            };
            out[a] = room / s + 1;
        }
        Ok(Dims::from([n, o, out[0], out[1], out[2]]))
    }
}

/// Cross-correlation with a filter and an optional bias per output channel (PyTorch's `Conv3d`, one group, dilation 1):
/// inputs `[N, C, D, H, W]` with C in total as many as the filter's, `w` of sizes `[O, C, kD, kH, kW]` from
/// [`pack_filter`], `b` of size `[O]` from [`pack_vector`], result as [`Conv3d::output_dims`]. A 2D convolution is one
/// with D = 1 and kD = 1. A large input of the result's sizes that has no other owner is overwritten with it.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit; [`Error::OutOfMemory`].
pub fn conv3d<'m>(
    cx: &mut Ctx<'m>,
    x: impl Into<Sources>,
    w: &'m Param,
    b: Option<&'m Param>,
    how: Conv3d,
) -> Result<Var> {
    Ok(run(cx, x.into(), w, b, how, None, false)?.0)
}

/// [`conv3d`], and the moments of its result, taken while it is written.
///
/// # Errors
/// As [`conv3d`].
pub fn conv3d_measured<'m>(
    cx: &mut Ctx<'m>,
    x: impl Into<Sources>,
    w: &'m Param,
    b: Option<&'m Param>,
    how: Conv3d,
) -> Result<(Var, Moments)> {
    run(cx, x.into(), w, b, how, None, true)
}

/// The end of a residual block in one pass: `leaky_relu(normalised(y) + conv3d(x))`, in place in `y` when it has no other
/// owner. Of two sources the first may be repeated: it is convolved before, at its own size, which gives the same
/// numbers if the kernel is one voxel.
///
/// # Errors
/// As [`conv3d`].
pub fn conv3d_residual<'m>(
    cx: &mut Ctx<'m>,
    y: Var,
    norm: &Affine,
    x: impl Into<Sources>,
    w: &'m Param,
    b: Option<&'m Param>,
    how: Conv3d,
) -> Result<Var> {
    let inputs = x.into().into_vec();
    if !cx.is_recorded() {
        return residual(cx, y, norm, inputs, w, b, how);
    }
    let nodes: Vec<_> = [y.node()].into_iter().chain(inputs.iter().map(|s| s.value.node())).collect();
    let (raw, sources) = (computed_with(OP, y.value().clone())?, inputs.clone());
    let out = cx.unrecorded(|cx| residual(cx, y, norm, inputs, w, b, how))?.into_value();
    let conv = ConvBackward { sources, w, b, how };
    let result = out.clone();
    Ok(cx.record(out, &nodes, || Box::new(ResidualBackward { y: raw, norm: norm.clone(), result, conv })))
}

/// [`conv3d_residual`] of a pass that is not recorded.
fn residual(
    cx: &mut Ctx<'_>,
    y: Var,
    norm: &Affine,
    mut inputs: Vec<Source>,
    w: &Param,
    b: Option<&Param>,
    how: Conv3d,
) -> Result<Var> {
    same_device(OP, cx.device(), y.value().device())?;
    all_here(cx, w, &inputs)?;
    let (mut g, _) = geometry(&concatenated(&inputs)?, w, b, how)?;
    let [d, h, width] = g.output;
    let expected = Dims::from([g.batch, g.out_channels, d, h, width]);
    if *y.value().dims() != expected {
        let what = format!("residual of {expected:?} for {:?}", y.value().dims());
        return Err(Error::shape(OP, what));
    }
    norm.is_readable(OP, &expected)?;
    on_card!(cx.device(), super::cuda::conv3d_residual(cx, y, norm, inputs, w, b, how));
    // A repeated first source becomes an addend that is repeated.
    let mut addend: Option<(Var, [usize; 3])> = None;
    let mut bias = b;
    let pointwise = g.kernel == [1; 3] && g.stride == [1; 3];
    if pointwise && inputs.len() == 2 && inputs[0].norm.is_none() && inputs[0].factor != [1; 3] {
        let low = inputs.remove(0);
        let space = low.value.value().dims().space();
        let channels = low.value.value().dims().five()[1];
        let part = Geometry { in_channels: channels, input: space, output: space, ..g };
        let factor = low.factor;
        let wish = Wish { strict: cx.is_strict(), ..Wish::default() };
        let (low, _) = compute(cx, vec![Source::from(low.value)], part, w, bias.take(), wish, false)?;
        addend = Some((low, factor));
        g.filter_first = channels;
        g.in_channels -= channels;
    }
    let inputs = inputs.into_iter().map(|s| if s.is_plain() { Ok(s) } else { s.made(cx) }).collect::<Result<_>>()?;
    let inputs = one_layout(inputs)?;
    let clock = cx.clock();
    let mut y = owned(y)?;
    let channels: Vec<usize> = inputs.iter().map(|s| s.value.value().dims().five()[1]).collect();
    let wish = Wish { residual: true, strict: cx.is_strict(), ..Wish::default() };
    let part = addend.as_ref().map_or(Precision::F32, |(low, _)| low.value().precision());
    let storage = Storage { input: precision(&inputs), output: y.precision(), addend: part, in_place: false };
    let choice = choose(cx, &g, &channels, storage, wish)?;
    let inputs = if choice.reads_halves(&g) { inputs } else { all_floats(inputs)? };
    let filter = packed(w);
    let mut work = workspace(cx, &choice, filter)?;
    let sources: Vec<_> = inputs.iter().map(read).collect();
    let residual =
        Residual { norm: norm.norm(), addend: addend.as_ref().map(|(low, factor)| (low.value().stored(), *factor)) };
    let p = Problem {
        geometry: g,
        sources: &sources,
        filter,
        bias: bias.map(|b| b.value().as_slice()),
        residual: Some(residual),
    };
    let work = room(&mut work)?;
    let to = stored_memory(OP, &mut y)?;
    compute!(cx.device(), conv3d::forward(&choice, &p, &[], work, to, false), Vec::new());
    cx.note("conv3d_residual", clock, choice.name(), macs(&g), || describe(&g));
    Ok(cx.leaf(y))
}

/// What a convolution takes beside inputs, filter and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Conv3dMemory {
    /// Bytes of working memory while it runs.
    pub working: usize,
    /// Bytes of another form of its filter that is kept from then on.
    pub kept: usize,
    /// The output takes the place of the only source, if that has no other owner.
    pub in_place: bool,
}

/// What a convolution of these sizes takes on `device`. `channels` are those of each source, `w` the filter's sizes,
/// both stored in `precision`, `input` (D, H, W) of the `batch` samples of the input; `owned` if a single source has no other
/// owner.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit.
pub fn conv3d_memory(
    device: &Device,
    strict: bool,
    precision: Precision,
    channels: &[usize],
    w: [usize; 5],
    batch: usize,
    input: [usize; 3],
    how: Conv3d,
    owned: bool,
) -> Result<Conv3dMemory> {
    let [d, h, width] = input;
    let x = Dims::from([batch, channels.iter().sum(), d, h, width]);
    let g = sizes(&x, &w.into(), &how.output_dims(&x, &w.into())?, how);
    on_card!(device, {
        let working = super::cuda::conv3d_memory(device, precision, channels, w, batch, input, how)?;
        Ok(Conv3dMemory { working, kept: 0, in_place: false })
    });
    let wish = Wish { strict, ..Wish::default() };
    let storage = Storage { input: precision, output: precision, in_place: owned, ..Storage::PLAIN };
    planned(device, &g, channels, w, storage, wish)
}

/// Bytes that [`conv3d_residual`] takes on `device` beside its operands, its result in the place of `y`. `channels` are those
/// of each source, of which the first of two is repeated `repeat` times per axis; the rest as for [`conv3d_memory`].
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit.
pub fn conv3d_residual_memory(
    device: &Device,
    strict: bool,
    precision: Precision,
    channels: &[usize],
    repeat: [usize; 3],
    w: [usize; 5],
    input: [usize; 3],
    how: Conv3d,
) -> Result<usize> {
    let [d, h, width] = input;
    let x = Dims::from([1, channels.iter().sum(), d, h, width]);
    let out = how.output_dims(&x, &w.into())?;
    on_card!(device, Ok(super::cuda::conv3d_residual_memory(precision, w, out.space())));
    let mut g = sizes(&x, &w.into(), &out, how);
    let wish = Wish { strict, ..Wish::default() };
    let mut storage = Storage { input: precision, output: precision, ..Storage::PLAIN };
    let (mut addend, mut before, mut rest) = (0, 0, channels);
    if let [first, last] = channels
        && repeat != [1; 3]
        && g.kernel == [1; 3]
        && g.stride == [1; 3]
    {
        let space = [0, 1, 2].map(|a| input[a] / repeat[a].max(1));
        let lanes = [Layout::BLOCKED.padded(w[0]), space[0], space[1], space[2]];
        addend = lanes.iter().fold(precision.size(), |n, &v| n.saturating_mul(v));
        let part = Geometry { in_channels: *first, input: space, output: space, ..g };
        before = planned(device, &part, &[*first], w, storage, wish)?.working;
        (g.filter_first, g.in_channels, rest) = (*first, *last, &channels[1..]);
        storage.addend = precision;
    }
    let after = planned(device, &g, rest, w, storage, Wish { residual: true, ..wish })?.working;
    Ok(before.max(after).saturating_add(addend))
}

/// What the implementation that is chosen takes.
fn planned(
    device: &Device,
    g: &Geometry,
    channels: &[usize],
    w: [usize; 5],
    storage: Storage,
    wish: Wish<'_>,
) -> Result<Conv3dMemory> {
    let choice = dispatch!(device, conv3d::choose(g, channels, storage, wish));
    let choice = choice.ok_or_else(|| no_implementation(OP, None))?;
    let halves = storage.input == Precision::Bf16;
    // The filter as floats, and sources that are read so.
    let widened = if halves && !choice.reads_lazily() { packed_len(w) } else { 0 };
    let lanes: usize = channels.iter().map(|c| Layout::BLOCKED.padded(*c)).sum();
    let sources = if halves && !choice.reads_halves(g) { lanes * g.input.iter().product::<usize>() } else { 0 };
    let work = choice.workspace(device.threads(), Stored::F32(&[])) + widened + sources;
    Ok(Conv3dMemory {
        working: work.saturating_mul(4),
        kept: choice.kept_filter().map_or(0, |k| k.0.saturating_mul(4)),
        in_place: choice.is_in_place(),
    })
}

/// The tensor itself if no one else has it, else a copy.
fn owned(y: Var) -> Result<Tensor> {
    let y = blocked(OP, y.into_value())?;
    if y.is_unique() {
        return Ok(y);
    }
    let mut copy = Tensor::empty_in(*y.dims(), Layout::BLOCKED, y.precision(), y.device())?;
    match (stored_memory(OP, &mut copy)?, y.stored()) {
        (StoredMut::F32(to), Stored::F32(from)) => to.copy_from_slice(from),
        (StoredMut::Bf16(to), Stored::Bf16(from)) => to.copy_from_slice(from),
        _ => return Err(Error::shape(OP, "a copy in another precision")),
    }
    Ok(copy)
}

pub(super) fn run<'m>(
    cx: &mut Ctx<'m>,
    x: Sources,
    w: &'m Param,
    b: Option<&'m Param>,
    how: Conv3d,
    name: Option<&str>,
    measure: bool,
) -> Result<(Var, Moments)> {
    let inputs = x.into_vec();
    all_here(cx, w, &inputs)?;
    on_card!(cx.device(), {
        geometry(&concatenated(&inputs)?, w, b, how)?;
        if !cx.is_recorded() {
            return super::cuda::conv3d(cx, inputs, w, b, how, name, measure);
        }
        let (sources, nodes) = (inputs.clone(), inputs.iter().map(|s| s.value.node()).collect::<Vec<_>>());
        let (y, moments) = cx.unrecorded(|cx| super::cuda::conv3d(cx, inputs, w, b, how, name, measure))?;
        let y = cx.record(y.into_value(), &nodes, || Box::new(ConvBackward { sources, w, b, how }));
        Ok((y, moments))
    });
    let (g, _) = geometry(&concatenated(&inputs)?, w, b, how)?;
    // Errors of values become errors of gradients, from layer to layer.
    let wish = Wish { name, strict: cx.is_strict() || cx.is_recorded(), ..Wish::default() };
    if !cx.is_recorded() {
        return compute(cx, inputs, g, w, b, wish, measure);
    }
    let sources = inputs.clone();
    let nodes: Vec<_> = sources.iter().map(|s| s.value.node()).collect();
    let (y, moments) = cx.unrecorded(|cx| compute(cx, inputs, g, w, b, wish, measure))?;
    let y = cx.record(y.into_value(), &nodes, || Box::new(ConvBackward { sources, w, b, how }));
    Ok((y, moments))
}

/// Checks that filter and inputs are where the pass runs.
fn all_here(cx: &Ctx<'_>, w: &Param, inputs: &[Source]) -> Result<()> {
    same_device(OP, cx.device(), w.value().device())?;
    inputs.iter().try_for_each(|s| same_device(OP, cx.device(), s.value.value().device()))
}

/// One convolution of checked sizes.
fn compute(
    cx: &mut Ctx<'_>,
    inputs: Vec<Source>,
    g: Geometry,
    w: &Param,
    b: Option<&Param>,
    wish: Wish<'_>,
    measure: bool,
) -> Result<(Var, Moments)> {
    let channels: Vec<usize> = inputs.iter().map(|s| s.value.value().dims().five()[1]).collect();
    let in_place = inputs.len() == 1 && inputs[0].factor == [1; 3] && inputs[0].value.value().is_unique();
    let storage = Storage { input: precision(&inputs), output: cx.precision(), in_place, ..Storage::PLAIN };
    let choice = choose(cx, &g, &channels, storage, wish)?;
    let inputs = if choice.reads_halves(&g) { inputs } else { all_floats(inputs)? };
    let lazy = choice.reads_lazily();
    let inputs: Vec<Source> =
        inputs.into_iter().map(|s| if lazy || s.is_plain() { Ok(s) } else { s.made(cx) }).collect::<Result<_>>()?;
    let mut inputs = if lazy { all_blocked(inputs)? } else { one_layout(inputs)? };
    let clock = cx.clock();
    let [d, h, width] = g.output;
    let out_dims = Dims::from([g.batch, g.out_channels, d, h, width]);
    let filter = packed(w);
    let kept = match choice.kept_filter() {
        None => None,
        Some((len, key)) => Some(w.derived(key, || {
            let mut out = cx.device().unplanned(|| Tensor::empty(Dims::from([len]), Layout::PLAIN, cx.device()))?;
            let to = memory(OP, &mut out)?;
            compute!(cx.device(), conv3d::prepare_filter(&choice, &g, filter, to), ());
            Ok(out)
        })?),
    };
    // In place, the output begins as the only source.
    let replaced = inputs.pop_if(|_| choice.is_in_place());
    let (mut out, norm) = match replaced {
        Some(s) => (s.value.into_value(), s.norm),
        None => {
            let precision = if choice.writes_halves() { cx.precision() } else { Precision::F32 };
            (Tensor::empty_in(out_dims, Layout::BLOCKED, precision, cx.device())?, None)
        }
    };
    let mut work = workspace(cx, &choice, filter)?;
    let mut sources: Vec<_> = inputs.iter().map(read).collect();
    if choice.is_in_place() {
        let norm = norm.as_deref().map(Affine::norm);
        sources.push(backend::Source {
            data: Stored::F32(&[]),
            channels: channels[0],
            layout: Layout::BLOCKED,
            norm,
            factor: [1; 3],
        });
    }
    let p = Problem { geometry: g, sources: &sources, filter, bias: b.map(|b| b.value().as_slice()), residual: None };
    let work = room(&mut work)?;
    let kept = kept.as_ref().map_or(&[][..], |t| t.as_slice());
    let to = stored_memory(OP, &mut out)?;
    let unknown = || vec![BlockMoments::default(); g.batch * g.out_channels.div_ceil(BLOCK)];
    let moments = compute!(cx.device(), conv3d::forward(&choice, &p, kept, work, to, measure), unknown());
    cx.note(OP, clock, choice.name(), macs(&g), || describe(&g));
    Ok((cx.leaf(out), Moments::new(g.out_channels, moments)))
}

fn choose(cx: &Ctx<'_>, g: &Geometry, channels: &[usize], storage: Storage, wish: Wish<'_>) -> Result<Choice> {
    let found = dispatch!(cx.device(), conv3d::choose(g, channels, storage, wish));
    found.ok_or_else(|| no_implementation(OP, wish.name))
}

/// A filter as the backend reads it.
fn packed(w: &Param) -> Stored<'_> {
    w.value().stored()
}

/// How sources are stored: as bf16 if any of them is.
fn precision(inputs: &[Source]) -> Precision {
    let halves = inputs.iter().any(|s| s.value.value().precision() == Precision::Bf16);
    if halves { Precision::Bf16 } else { Precision::F32 }
}

fn workspace(cx: &Ctx<'_>, choice: &Choice, filter: Stored<'_>) -> Result<Option<Tensor>> {
    match choice.workspace(cx.device().threads(), filter) {
        0 => Ok(None),
        n => Tensor::empty(Dims::from([n]), Layout::PLAIN, cx.device()).map(Some),
    }
}

fn room(work: &mut Option<Tensor>) -> Result<&mut [f32]> {
    work.as_mut().map_or(Ok(&mut []), |t| memory(OP, t))
}

/// A source as the backend reads it.
pub(super) fn read(s: &Source) -> backend::Source<'_> {
    let t = s.value.value();
    backend::Source {
        data: t.stored(),
        channels: t.dims().five()[1],
        layout: t.layout(),
        norm: s.norm.as_deref().map(Affine::norm),
        factor: s.factor,
    }
}

/// Only sources of one layout can be walked together.
/// Sources in channel blocks, unless all are planes that are read as they are.
pub(super) fn one_layout(inputs: Vec<Source>) -> Result<Vec<Source>> {
    let as_it_is = |s: &Source| s.value.value().layout() != Layout::BLOCKED && s.is_plain();
    if inputs.iter().all(as_it_is) { Ok(inputs) } else { all_blocked(inputs) }
}

fn all_blocked(inputs: Vec<Source>) -> Result<Vec<Source>> {
    let each = |s: Source| Ok(Source { value: s.value.reformed(|x| blocked(OP, x))?, ..s });
    inputs.into_iter().map(each).collect()
}

fn all_floats(inputs: Vec<Source>) -> Result<Vec<Source>> {
    if precision(&inputs) == Precision::F32 {
        return Ok(inputs);
    }
    let each = |s: Source| Ok(Source { value: s.value.reformed(|x| floats(OP, x))?, ..s });
    inputs.into_iter().map(each).collect()
}

fn macs(g: &Geometry) -> u64 {
    let n = [g.batch, g.in_channels, g.out_channels].into_iter().chain(g.kernel).chain(g.output);
    n.fold(1, |n, v| n.saturating_mul(v as u64))
}

fn describe(g: &Geometry) -> String {
    let by = |v: [usize; 3]| format!("{}x{}x{}", v[0], v[1], v[2]);
    format!("{}->{} {} stride {} at {}", g.in_channels, g.out_channels, by(g.kernel), by(g.stride), by(g.output))
}

/// Sizes of the sources side by side.
pub(super) fn concatenated(inputs: &[Source]) -> Result<Dims> {
    let mut all: Option<[usize; 5]> = None;
    for s in inputs {
        let [n, c, d, h, w] = s.dims(OP)?;
        all = match all {
            None => Some([n, c, d, h, w]),
            Some([n0, c0, d0, h0, w0]) if [n0, d0, h0, w0] == [n, d, h, w] => Some([n, c0 + c, d, h, w]),
            Some(first) => {
                let what = format!(
                    "sources of sizes {first:?} and {:?}, expected to differ in channels only",
                    [n, c, d, h, w]
                );
                return Err(Error::shape(OP, what));
            }
        };
    }
    all.map(Dims::from).ok_or_else(|| Error::shape(OP, "no source"))
}

/// The problem's sizes, with every buffer's length checked against them, and those of the output.
pub(super) fn geometry(x: &Dims, w: &Param, b: Option<&Param>, how: Conv3d) -> Result<(Geometry, Dims)> {
    let out = how.output_dims(x, w.dims())?;
    let [o, ..] = w.dims().five();
    if w.value().device().is_cpu() && packed(w).len() != packed_len(w.dims().five()) {
        return Err(Error::shape(OP, format!("filter {:?} is not packed", w.dims())));
    }
    if let Some(b) = b
        && (b.dims().as_slice() != [o] || b.value().dims().len() != Layout::BLOCKED.padded(o))
    {
        return Err(Error::shape(OP, format!("bias of size {:?}, expected [{o}]", b.dims())));
    }
    Ok((sizes(x, w.dims(), &out, how), out))
}

pub(super) fn sizes(x: &Dims, w: &Dims, out: &Dims, how: Conv3d) -> Geometry {
    let [o, i, ..] = w.five();
    Geometry {
        batch: x.five()[0],
        in_channels: i,
        out_channels: o,
        input: x.space(),
        output: out.space(),
        kernel: w.space(),
        stride: how.stride,
        padding: how.padding,
        filter_inputs: i,
        filter_first: 0,
    }
}

/// Packs a filter given in `[O, I, kD, kH, kW]` order for `device`, to be stored in `precision`. One packing serves one
/// source and any two.
///
/// # Errors
/// [`Error::Shape`] when the number of values is not the product of `dims`; [`Error::OutOfMemory`].
pub fn pack_filter(values: &[f32], dims: [usize; 5], precision: Precision, device: &Device) -> Result<Tensor> {
    if device.is_rehearsal() {
        return blank_filter(packed_len(dims), dims, precision, device);
    }
    if values.len() != dims.iter().product::<usize>() {
        return Err(Error::shape("pack_filter", format!("{} values for a filter {dims:?}", values.len())));
    }
    on_card!(device, super::cuda::pack_filter(values, dims, precision, device));
    let mut out = Tensor::empty_in(Dims::from([packed_len(dims)]), Layout::PLAIN, precision, device)?;
    let to = stored_memory("pack_filter", &mut out)?;
    dispatch!(device, conv3d::pack_filter(values, dims, to));
    Ok(out)
}

/// Pads a vector of one value per channel with zeros to whole channel blocks.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub fn pack_vector(values: &[f32], device: &Device) -> Result<Tensor> {
    on_card!(device, super::cuda::pack_vector(values, device));
    let mut out = Tensor::empty(Dims::from([Layout::BLOCKED.padded(values.len())]), Layout::PLAIN, device)?;
    let (real, pad) = memory("pack_vector", &mut out)?.split_at_mut(values.len());
    real.copy_from_slice(values);
    pad.fill(0.0);
    Ok(out)
}

/// The values of a filter of sizes `[O, I, kD, kH, kW]` from [`pack_filter`], in that order. What was stored as bf16 comes
/// back rounded.
///
/// # Errors
/// [`Error::Shape`] when `packed` is no packed filter of these sizes, or on a card not stored as f32; [`Error::Device`].
pub fn unpack_filter(packed: &Tensor, dims: [usize; 5]) -> Result<Vec<f32>> {
    on_card!(packed.device(), super::cuda::unpack_filter(packed, [dims[0], dims[1], dims[2] * dims[3] * dims[4]]));
    if packed.stored().len() != packed_len(dims) {
        return Err(Error::shape("unpack_filter", format!("{} values for a filter {dims:?}", packed.stored().len())));
    }
    let mut out = vec![0.0; dims.iter().product()];
    dispatch!(packed.device(), conv3d::unpack_filter(packed.stored(), dims, &mut out));
    Ok(out)
}

/// The `len` values of a vector from [`pack_vector`].
///
/// # Errors
/// [`Error::Shape`] when `packed` is no padded vector of this length; [`Error::Device`].
pub fn unpack_vector(packed: &Tensor, len: usize) -> Result<Vec<f32>> {
    on_card!(packed.device(), {
        let mut values = packed.to_host()?;
        if values.len() != Layout::BLOCKED.padded(len) {
            return Err(Error::shape("unpack_vector", format!("{} values for a vector of {len}", values.len())));
        }
        values.truncate(len);
        Ok(values)
    });
    let values = packed.stored();
    if values.len() != Layout::BLOCKED.padded(len) {
        return Err(Error::shape("unpack_vector", format!("{} values for a vector of {len}", values.len())));
    }
    Ok(values.part(0..len).into_owned())
}
