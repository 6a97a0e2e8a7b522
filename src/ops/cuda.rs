//! Operations on a card: what they check, which kernels they are made of, and where their results go.
//!
//! Activations are `[N][D][H][W][channels padded to 16]`, in the 16 bits (or f32, the plain reference) in which the filters
//! are stored. Normalisations are applied while they are read, nothing is upsampled or concatenated in memory.

mod conv3d;
mod filter;
mod grad;
mod head_loss;
pub(crate) mod optim;
pub(crate) mod patch;

use std::time::Instant;

use super::lazy::{Affine, CardMoments, Moments, Source};
use super::{Conv3d, InstanceNorm, activation, same_device};
use crate::autograd::{Ctx, Param, Var};
use crate::backend::cuda as backend;
use crate::backend::cuda::{Storage, conv3d as kernels, padded};
use crate::error::{Error, Result};
use crate::tensor::cuda::{Driver, Memory};
use crate::tensor::{Device, Dims, Layout, Precision, Tensor};

use filter::{Form, computed};

pub(super) use conv3d::{conv3d_memory, conv3d_residual, conv3d_residual_memory, conv3d_variants};
pub(crate) use filter::floats;
pub(crate) use grad::zeros;
pub(super) use grad::{
    add, bias, conv_transpose3d, conv_transpose3d_gradients, conv3d as conv3d_gradients,
    instance_norm as instance_norm_gradients, pack_transposed_filter, pooled, spread, unpack_filter,
};
pub(super) use head_loss::{CardTarget, head_loss};

/// A filter of so few input channels is packed for the first convolution, which reads the image as it arrives.
const FIRST: usize = kernels::first::CHANNELS;
const FIRST_NAME: &str = "first";

fn unsupported<T>(op: &str, what: &str) -> Result<T> {
    Err(Error::unsupported(format!("{op} on a card: {what}")))
}

pub(super) fn card<'d>(op: &'static str, device: &'d Device) -> Result<&'d dyn Driver> {
    device.driver().ok_or_else(|| Error::Device { what: format!("{op}: {} is no card", device.name()) })
}

/// Where a tensor of `device` is.
pub(super) fn memory(op: &'static str, device: &Device, t: &Tensor) -> Result<Memory> {
    same_device(op, device, t.device())?;
    t.cuda().ok_or_else(|| Error::shape(op, format!("a tensor of {} on a card", t.device().name())))
}

/// Records an operation that began at `clock`, for which its kernels have to be waited for.
fn note(
    cx: &mut Ctx<'_>,
    op: &'static str,
    clock: Option<Instant>,
    kernel: &'static str,
    macs: u64,
    what: impl FnOnce() -> String,
) -> Result<()> {
    if clock.is_some() {
        card(op, cx.device())?.synchronize()?;
    }
    cx.note(op, clock, kernel, macs, what);
    Ok(())
}

/// Sizes of a convolution, for people, and its multiply-accumulates.
fn describe([o, i, kd, kh, kw]: [usize; 5], stride: [usize; 3], out: &Tensor) -> (String, u64) {
    let [n, _, d, h, w] = out.dims().five();
    let [sz, sy, sx] = stride;
    let macs = [n, o, i, kd, kh, kw, d, h, w].iter().fold(1, |n: u64, &v| n.saturating_mul(v as u64));
    (format!("{i}->{o} {kd}x{kh}x{kw} stride {sz}x{sy}x{sx} at {d}x{h}x{w}"), macs)
}

/// Voxels with their channels side by side.
fn voxels(op: &'static str, dims: Dims, precision: Precision, device: &Device) -> Result<Tensor> {
    let [_, c, ..] = activation(op, &dims)?;
    Tensor::empty_in(dims, Layout { block: padded(c) }, precision, device)
}

/// f32 in no order but its own.
pub(super) fn plain(floats: usize, device: &Device) -> Result<Tensor> {
    Tensor::empty(Dims::from([floats]), Layout::PLAIN, device)
}

/// `bytes` on the device, as values of `precision`.
fn upload(op: &'static str, bytes: &[u8], precision: Precision, device: &Device) -> Result<Tensor> {
    let dims = Dims::from([bytes.len() / precision.size()]);
    let t = Tensor::empty_in(dims, Layout::PLAIN, precision, device)?;
    card(op, device)?.upload(memory(op, device, &t)?, bytes)?;
    Ok(t)
}

/// See [`super::pack_filter`].
pub(super) fn pack_filter(values: &[f32], dims: [usize; 5], precision: Precision, device: &Device) -> Result<Tensor> {
    let (storage, i) = (Storage::from(precision), dims[1]);
    let mut bytes = kernels::pack_weight(values, dims, &[i], storage)?;
    if Form::Halves.exists(dims, precision) {
        bytes.extend(kernels::pack_weight(values, dims, &[i / 2; 2], storage)?);
    }
    if Form::First.exists(dims, precision) {
        bytes.extend(kernels::first::pack_weight(values, dims, storage)?);
    }
    upload("pack_filter", &bytes, precision, device)
}

/// Values of a filter that [`pack_filter`] makes.
pub(super) fn packed_len(dims: [usize; 5], precision: Precision) -> usize {
    let forms = [Form::Whole, Form::Halves, Form::First].into_iter().filter(|f| f.exists(dims, precision));
    forms.map(|f| f.terms(dims)).sum::<usize>() * padded(dims[0])
}

/// See [`super::pack_vector`].
pub(super) fn pack_vector(values: &[f32], device: &Device) -> Result<Tensor> {
    let mut all = values.to_vec();
    all.resize(padded(values.len()), 0.0);
    upload("pack_vector", bytemuck::cast_slice(&all), Precision::F32, device)
}

/// `x` as voxels in `precision`; only the network's input arrives as planes.
pub(super) fn as_voxels(op: &'static str, x: Tensor, precision: Precision) -> Result<Tensor> {
    if x.layout() == Layout::PLAIN {
        let [batch, channels, space @ ..] = activation(op, x.dims())?;
        let out = voxels(op, *x.dims(), precision, x.device())?;
        let (planes, values) = (memory(op, x.device(), &x)?, memory(op, x.device(), &out)?);
        let storage = Storage::from(precision);
        let p = backend::relayout::Problem { storage, batch, channels, space, planes, values, flip: [false; 3] };
        backend::relayout::to_voxels(card(op, x.device())?, &p)?;
        return Ok(out);
    }
    if x.precision() != precision || x.layout().block != padded(x.dims().five()[1]) {
        let (x, beside) = (x.precision().name(), precision.name());
        return unsupported(op, &format!("values in {x} beside {beside}, or in another layout"));
    }
    Ok(x)
}

/// A source as kernels read it. Keeps nothing alive: whoever calls does.
fn read(op: &'static str, device: &Device, s: &Source) -> Result<backend::Source> {
    let [_, channels, space @ ..] = s.value.value().dims().five();
    Ok(backend::Source {
        data: memory(op, device, s.value.value())?,
        channels,
        space,
        repeat: s.factor,
        norm: s.norm.as_deref().map(|n| norm(op, device, n)).transpose()?,
    })
}

/// A normalisation with its leaky ReLU.
fn norm(op: &'static str, device: &Device, n: &Affine) -> Result<backend::Norm> {
    let Some(planes) = n.card() else {
        return Err(Error::shape(op, "a normalisation of the processor's on a card"));
    };
    Ok(backend::Norm { planes: memory(op, device, planes)?, slope: n.slope() })
}

/// What a convolution works on, as tensors that live until its kernels are launched: work on one card is done in order, so
/// their memory may then be given to what comes after.
struct Inputs {
    sources: Vec<Source>,
    dims: [usize; 5],
}

impl Inputs {
    fn new(op: &'static str, sources: Vec<Source>, precision: Precision, planes: bool) -> Result<Self> {
        let dims = super::conv3d::concatenated(&sources)?.five();
        let each = |s: Source| {
            let value = if planes { s.value } else { s.value.reformed(|x| as_voxels(op, x, precision))? };
            Ok(Source { value, ..s })
        };
        Ok(Self { sources: sources.into_iter().map(each).collect::<Result<_>>()?, dims })
    }
}

/// See [`super::conv3d`] and [`super::conv3d_measured`]; by the variant `name` if there is one.
pub(super) fn conv3d(
    cx: &mut Ctx<'_>,
    sources: Vec<Source>,
    w: &Param,
    b: Option<&Param>,
    how: Conv3d,
    name: Option<&str>,
    measure: bool,
) -> Result<(Var, Moments)> {
    const OP: &str = "conv3d";
    let [filters, channels, kernel @ ..] = w.dims().five();
    if how.padding != kernel.map(|k| k / 2) {
        return unsupported(OP, &format!("padding {:?} of a kernel of {kernel:?}", how.padding));
    }
    let clock = cx.clock();
    let driver = card(OP, cx.device())?;
    let precision = computed(cx, w);
    check_strict(cx, OP, precision)?;
    // The image as it arrives; inner layers of so few channels have voxels.
    let first = Form::First.exists(w.dims().five(), precision)
        && sources.iter().all(|s| s.is_plain() && s.value.value().layout() == Layout::PLAIN);
    let each: Vec<usize> = sources.iter().map(|s| s.value.value().dims().five()[1]).collect();
    let form = if first { Form::First } else { Form::of(OP, &each)? };
    let inputs = Inputs::new(OP, sources, precision, first)?;
    let [batch, _, space @ ..] = inputs.dims;
    let [d, h, width] = kernels::output_space(space, kernel, how.stride);
    let out = voxels(OP, Dims::from([batch, filters, d, h, width]), precision, cx.device())?;
    let device = cx.device();
    let weight = form.memory(OP, cx, w)?;
    let bias = b.map(|b| memory(OP, device, b.value())).transpose()?;
    let to = memory(OP, device, &out)?;
    let partials = |tiles: usize| plain(batch * tiles * 3 * padded(filters), cx.device());
    let storage = Storage::from(precision);
    let mut moments = None;
    let kernel_name = if first {
        let planes = memory(OP, device, inputs.sources[0].value.value())?;
        let mut p = kernels::first::Problem {
            storage,
            batch,
            channels,
            planes,
            wide: true,
            space,
            weight,
            bias,
            filters,
            kernel,
            stride: how.stride,
            out: to,
            partials: None,
        };
        if measure {
            let tiles = kernels::first::tiles([d, h, width]);
            let t = partials(tiles)?;
            p.partials = Some(memory(OP, device, &t)?);
            moments = Some((t, tiles));
        }
        kernels::first::run(driver, &p)?;
        FIRST_NAME
    } else {
        let read: Vec<_> = inputs.sources.iter().map(|s| read(OP, device, s)).collect::<Result<_>>()?;
        let mut p = kernels::Problem {
            storage,
            batch,
            sources: &read,
            weight,
            bias,
            filters,
            kernel,
            stride: how.stride,
            out: to,
            partials: None,
            workspace: None,
        };
        let measure = measure && storage != Storage::F32;
        let plan = kernels::plan(driver, &p, measure, kernels::Wish { variant: name, parts: None })?;
        if measure {
            let t = partials(plan.tiles())?;
            p.partials = Some(memory(OP, device, &t)?);
            moments = Some((t, plan.tiles()));
        }
        run(device, driver, p, &plan)?
    };
    let (what, macs) = describe(w.dims().five(), how.stride, &out);
    note(cx, OP, clock, kernel_name, macs, || what)?;
    let out = cx.leaf(out);
    let moments = match moments {
        Some((partials, tiles)) => CardMoments { partials, tiles, batch, voxels: d * h * width },
        None if measure => measured(out.value())?,
        None => return Ok((out, Moments::new(filters, Vec::new()))),
    };
    Ok((out, Moments::on_card(filters, moments)))
}

/// Sums of a strict pass are of values that nothing was rounded of.
fn check_strict(cx: &Ctx<'_>, op: &str, precision: Precision) -> Result<()> {
    if cx.is_strict() && precision != Precision::F32 {
        return unsupported(op, &format!("strictly, stored as {}; expected f32", precision.name()));
    }
    Ok(())
}

/// Runs a convolution with memory for sums in parts, which goes back to the pool: what comes after runs after it.
fn run(device: &Device, driver: &dyn Driver, p: kernels::Problem<'_>, plan: &kernels::Plan) -> Result<&'static str> {
    let work = (plan.workspace() > 0).then(|| plain(plan.workspace() / 4, device)).transpose()?;
    let workspace = work.as_ref().map(|t| memory("conv3d", device, t)).transpose()?;
    kernels::run(driver, &kernels::Problem { workspace, ..p }, plan)?;
    Ok(plan.name())
}

/// Moments of a tensor that is in memory.
fn measured(x: &Tensor) -> Result<CardMoments> {
    const OP: &str = "instance_norm";
    let [batch, channels, space @ ..] = activation(OP, x.dims())?;
    let tiles = backend::moments::count(space);
    let partials = plain(batch * tiles * 3 * padded(channels), x.device())?;
    let p = backend::moments::Tiles {
        storage: Storage::from(x.precision()),
        batch,
        channels,
        space,
        data: memory(OP, x.device(), x)?,
        partials: memory(OP, x.device(), &partials)?,
    };
    backend::moments::tiles(card(OP, x.device())?, &p)?;
    Ok(CardMoments { partials, tiles, batch, voxels: space.iter().product() })
}

/// f32 `[N][mean, scale, shift][padded channels]` for a layer's weight and bias, and after them `[N][padded channels]`, one over
/// the deviations.
pub(super) fn affine(channels: usize, m: &CardMoments, w: &Param, b: &Param, eps: f32) -> Result<Tensor> {
    const OP: &str = "instance_norm";
    let device = m.partials.device();
    let floats = m.batch * padded(channels);
    let planes = plain(4 * floats, device)?;
    let p = backend::moments::Merge {
        batch: m.batch,
        channels,
        voxels: m.voxels,
        tiles: m.tiles,
        partials: memory(OP, device, &m.partials)?,
        weight: memory(OP, device, w.value())?,
        bias: memory(OP, device, b.value())?,
        eps,
        norm: memory(OP, device, &planes)?,
        inverses: Some(part(&planes, 3 * floats, floats)?),
    };
    backend::moments::merge(card(OP, device)?, &p)?;
    Ok(planes)
}

/// `leaky_relu(normalised(x) + shortcut)`, in place in `x` if it has no other owner.
fn block_end(cx: &mut Ctx<'_>, x: Tensor, n: &Affine, shortcut: Option<&Tensor>) -> Result<Var> {
    const OP: &str = "instance_norm";
    let clock = cx.clock();
    let [batch, channels, space @ ..] = activation(OP, x.dims())?;
    let device = cx.device();
    let whole = backend::Norm { slope: 1.0, ..norm(OP, device, n)? };
    let from =
        backend::Source { norm: Some(whole), ..backend::Source::plain(memory(OP, device, &x)?, channels, space) };
    let plain = |t: &Tensor| {
        let [_, channels, space @ ..] = t.dims().five();
        Ok(backend::Source::plain(memory(OP, device, t)?, channels, space))
    };
    let (storage, slope) = (Storage::from(x.precision()), n.slope());
    let shortcut = shortcut.map(plain).transpose()?;
    // Kernels run in order, so that `x` is read before its memory is given to anyone else.
    let out = if x.is_unique() { x.clone() } else { voxels(OP, *x.dims(), x.precision(), cx.device())? };
    let p =
        backend::instance_norm::Problem { storage, batch, x: from, shortcut, slope, out: memory(OP, device, &out)? };
    backend::instance_norm::run(card(OP, cx.device())?, &p)?;
    note(cx, OP, clock, "instance_norm", 0, || format!("{:?}", out.dims()))?;
    Ok(cx.leaf(out))
}

/// See [`Affine::apply`].
pub(super) fn apply(cx: &mut Ctx<'_>, x: Var, n: &Affine, residual: Option<Var>) -> Result<Var> {
    const OP: &str = "instance_norm";
    let precision = x.value().precision();
    let x = as_voxels(OP, x.into_value(), precision)?;
    let residual = residual.map(|r| as_voxels(OP, r.into_value(), precision)).transpose()?;
    block_end(cx, x, n, residual.as_ref())
}

/// See [`super::instance_norm`].
pub(super) fn instance_norm(
    cx: &mut Ctx<'_>,
    x: Var,
    w: &Param,
    b: &Param,
    residual: Option<Var>,
    how: InstanceNorm,
) -> Result<Var> {
    let channels = activation("instance_norm", x.value().dims())?[1];
    let precision = x.value().precision();
    let x = x.reformed(|x| as_voxels("instance_norm", x, precision))?;
    let moments = Moments::on_card(channels, measured(x.value())?);
    Affine::new(&moments, w, b, how)?.apply(cx, x, residual)
}

/// See [`super::head_labels`]; its labels stay on the card, where [`read_labels`] finds them.
pub(super) fn head_labels(cx: &mut Ctx<'_>, x: Var, weight: &[f32], bias: &[f32]) -> Result<Tensor> {
    const OP: &str = "head_labels";
    use backend::head_labels as kernel;
    let clock = cx.clock();
    let precision = x.value().precision();
    let x = as_voxels(OP, x.into_value(), precision)?;
    let [batch, channels, space @ ..] = activation(OP, x.dims())?;
    let (driver, device) = (card(OP, cx.device())?, cx.device());
    let w =
        upload(OP, &kernel::pack_weight(weight, [bias.len(), channels], Storage::from(precision))?, precision, device)?;
    let b = upload(OP, bytemuck::cast_slice(&kernel::pack_bias(bias)), Precision::F32, device)?;
    // Two labels have the room of a float.
    let out = plain((batch * space.iter().product::<usize>()).div_ceil(2), device)?;
    let p = kernel::Problem {
        storage: Storage::from(precision),
        batch,
        features: backend::Source::plain(memory(OP, device, &x)?, channels, space),
        weight: memory(OP, device, &w)?,
        bias: memory(OP, device, &b)?,
        classes: bias.len(),
        divisor: None,
        labels: memory(OP, device, &out)?,
    };
    kernel::run(driver, &p)?;
    let macs = [batch, channels, bias.len()].iter().chain(&space).fold(1, |n: u64, &v| n.saturating_mul(v as u64));
    note(cx, OP, clock, "head_labels", macs, || format!("{channels}->{} at {space:?}", bias.len()))?;
    Ok(out)
}

/// Copies the labels of [`head_labels`], all of them.
pub(crate) fn read_labels(from: &Tensor, labels: &mut [u16]) -> Result<()> {
    const OP: &str = "head_labels";
    card(OP, from.device())?.download(memory(OP, from.device(), from)?, bytemuck::cast_slice_mut(labels))
}

/// A network's last layer on a card, where windows' scores are summed.
#[derive(Debug)]
pub(crate) struct ScoreLayer {
    filter: Tensor,
    bias: Tensor,
    classes: usize,
    activation: backend::aggregate::Activation,
}

impl ScoreLayer {
    /// Of `weight` `[classes][features]` and `bias` `[classes]`; `how` is done to the scores of a voxel.
    pub(crate) fn new(weight: &[f32], bias: &[f32], how: super::head::Activation, device: &Device) -> Result<Self> {
        use backend::aggregate::Activation;
        const OP: &str = "aggregate";
        let classes = bias.len();
        let features = weight.len() / classes.max(1);
        let mut rows = vec![0.0; classes * padded(features)];
        for (row, to) in weight.chunks_exact(features.max(1)).zip(rows.chunks_exact_mut(padded(features).max(1))) {
            to[..features].copy_from_slice(row);
        }
        let filter = backend::resample::pack_filter(&rows, [classes, padded(features)])?;
        let floats = |v: &[f32]| upload(OP, bytemuck::cast_slice(v), Precision::F32, device);
        Ok(Self {
            filter: floats(&filter)?,
            bias: floats(&backend::head_labels::pack_bias(bias))?,
            classes,
            activation: match how {
                super::head::Activation::Identity => Activation::Identity,
                super::head::Activation::Softmax => Activation::Softmax,
                super::head::Activation::Sigmoid => Activation::Sigmoid,
            },
        })
    }

    /// Channels of the sums of that many classes.
    pub(crate) const fn lanes(classes: usize) -> usize {
        backend::aggregate::lanes(classes)
    }

    /// Whether there is one for so many features.
    pub(crate) fn is_supported(device: &Device, features: usize) -> bool {
        device.driver().is_some_and(|d| backend::aggregate::scores_supported(d, features))
    }
}

/// Adds a window's features `[1, C, D, H, W]`, or the scores that `layer` makes of them, times `scale` and the window's
/// importance if there is one, to the sums of an image: `[ring][H][W][channels]` of size `ring`, of whose channels the
/// window's begin at `first`; and the importance to `counted`, `[ring][H][W]`.
pub(crate) fn aggregate(
    features: &Tensor,
    layer: Option<&ScoreLayer>,
    importance: Option<&Tensor>,
    sum: &Tensor,
    counted: Option<&Tensor>,
    ring: [usize; 3],
    [channels, first]: [usize; 2],
    start: [usize; 3],
    flip: [bool; 3],
    scale: f32,
) -> Result<()> {
    const OP: &str = "aggregate";
    let [_, c, space @ ..] = activation(OP, features.dims())?;
    let device = features.device();
    let p = backend::aggregate::Problem {
        storage: Storage::from(features.precision()),
        features: backend::Source::plain(memory(OP, device, features)?, c, space),
        importance: importance.map(|t| memory(OP, device, t)).transpose()?,
        sum: memory(OP, device, sum)?,
        weight: counted.map(|t| memory(OP, device, t)).transpose()?,
        ring,
        channels: [channels, first],
        start,
        flip,
        scale,
    };
    let driver = card(OP, device)?;
    let Some(l) = layer else { return backend::aggregate::run(driver, &p) };
    let (filter, bias) = (memory(OP, device, &l.filter)?, memory(OP, device, &l.bias)?);
    let (classes, activation) = (l.classes, l.activation);
    backend::aggregate::run_scores(driver, &backend::aggregate::Scores { window: p, filter, bias, classes, activation })
}

/// Some of the floats of a tensor, from place `at` on.
pub(super) fn part(t: &Tensor, at: usize, floats: usize) -> Result<Memory> {
    let all = memory("part", t.device(), t)?;
    if (at + floats) * 4 > all.bytes {
        return Err(Error::shape("part", format!("{floats} floats from {at} of {} bytes", all.bytes)));
    }
    Ok(Memory { address: all.address + 4 * at as u64, bytes: 4 * floats })
}

/// Sets them to zero.
pub(crate) fn clear(t: &Tensor, at: usize, floats: usize) -> Result<()> {
    card("clear", t.device())?.memset(part(t, at, floats)?, 0)
}

/// Writes all of them.
pub(crate) fn write(t: &Tensor, values: &[f32]) -> Result<()> {
    card("write", t.device())?.upload(part(t, 0, values.len())?, bytemuck::cast_slice(values))
}

/// Reads them.
pub(crate) fn download(t: &Tensor, at: usize, to: &mut [f32]) -> Result<()> {
    card("download", t.device())?.download(part(t, at, to.len())?, bytemuck::cast_slice_mut(to))
}

/// An activation as the processor has them.
pub(crate) fn to_processor(x: &Tensor, host: &Device) -> Result<Tensor> {
    super::blocked("to_processor", Tensor::from_host(&x.to_host()?, *x.dims(), host)?)
}
