//! The ways back on a card. Gradients of activations are stored as these are, sums are f32.

use super::filter::{self, Kept};
use super::{Form, as_voxels, backend, card, describe, memory, norm, note, part, plain, read, unsupported, voxels};
use crate::autograd::{Ctx, Grads, Param, ParamId};
use crate::backend::cuda::conv3d::{dgrad, join, wgrad};
use crate::backend::cuda::instance_norm_grad::{self as norm_grad, Mask};
use crate::backend::cuda::{Storage, channel_sums, padded, pool};
use crate::error::{Error, Result};
use crate::ops::lazy::{Affine, Source};
use crate::ops::{Conv3d, activation};
use crate::tensor::cuda::Driver;
use crate::tensor::{Device, Dims, Layout, Precision, Tensor};

const OP: &str = "conv3d_grad";

/// Checks that a gradient lies as its value.
fn check(op: &'static str, dy: &Tensor, dims: &Dims) -> Result<()> {
    if dy.dims() != dims || dy.layout().block != padded(dims.five()[1]) {
        return Err(Error::shape(op, format!("a gradient of {:?} for a result {dims:?}", dy.dims())));
    }
    Ok(())
}

/// f32 of the length of a channel's values with their padding.
fn vector(channels: usize, like: &Tensor) -> Result<Tensor> {
    plain(padded(channels), like.device())
}

/// Sums of a gradient over samples and voxels: that of a bias.
pub(in crate::ops) fn bias(cx: &mut Ctx<'_>, dy: &Tensor) -> Result<Tensor> {
    const OP: &str = "conv3d bias gradient";
    let clock = cx.clock();
    let [batch, channels, space @ ..] = activation(OP, dy.dims())?;
    let (device, driver) = (cx.device(), card(OP, cx.device())?);
    let out = vector(channels, dy)?;
    let (data, to) = (memory(OP, device, dy)?, memory(OP, device, &out)?);
    let storage = dy.precision().into();
    let mut p = channel_sums::Problem { storage, batch, channels, space, data, workspace: to, out: to };
    let work = plain(channel_sums::workspace(driver, &p)?.div_ceil(4).max(1), device)?;
    p.workspace = memory(OP, device, &work)?;
    channel_sums::run(driver, &p)?;
    note(cx, OP, clock, "channel_sums", 0, || format!("{:?}", dy.dims()))?;
    Ok(out)
}

/// Gradients of a convolution's filter, to `grads`, and of its sources.
pub(in crate::ops) fn conv3d(
    cx: &mut Ctx<'_>,
    grads: &mut Grads,
    sources: Vec<Source>,
    w: &Param,
    how: Conv3d,
    dy: Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let precision = dy.precision();
    let each = |s: Source| {
        let value = s.value.reformed(|x| as_voxels(OP, x, precision))?;
        Ok(Source { value, ..s })
    };
    let sources: Vec<Source> = sources.into_iter().map(each).collect::<Result<_>>()?;
    let dims = super::super::conv3d::concatenated(&sources)?;
    check(OP, &dy, &how.output_dims(&dims, w.dims())?)?;
    let dw = conv3d_filter(cx, &sources, w, how, &dy)?;
    grads.add_param(w.id(), dw)?;
    let mut first = 0;
    let mut all = Vec::with_capacity(sources.len());
    for Source { value, norm, factor } in sources {
        let [_, count, ..] = value.value().dims().five();
        let channels = [first, count];
        first += count;
        if value.node().is_none() && norm.is_none() {
            all.push(None);
            continue;
        }
        let dx = conv3d_input(cx, w, how, &dy, channels, dims.space())?;
        let dx = if factor == [1; 3] { dx } else { pooled(OP, dx, factor, 1.0)? };
        // Weight and bias of a normalisation learn even where its input does not.
        all.push(Some(match norm {
            None => dx,
            Some(n) => n.backward(cx, grads, value.value(), dx)?,
        }));
    }
    Ok(all)
}

fn conv3d_filter(cx: &mut Ctx<'_>, sources: &[Source], w: &Param, how: Conv3d, dy: &Tensor) -> Result<Tensor> {
    const OP: &str = "conv3d filter gradient";
    let clock = cx.clock();
    let (device, driver) = (cx.device(), card(OP, cx.device())?);
    let [filters, _, kernel @ ..] = w.dims().five();
    let from: Vec<_> = sources.iter().map(|s| read(OP, device, s)).collect::<Result<_>>()?;
    let channels: Vec<usize> = from.iter().map(|s| s.channels).collect();
    let form = Form::of(OP, &channels)?;
    let dw = plain(filter::floats(w)?, device)?;
    let p = wgrad::Problem {
        storage: dy.precision().into(),
        batch: dy.dims().five()[0],
        sources: &from,
        dy: backend::Source::plain(memory(OP, device, dy)?, filters, dy.dims().space()),
        kernel,
        stride: how.stride,
        transpose: false,
        parts: None,
        out: memory(OP, device, &dw)?,
        workspace: None,
    };
    match (form, &channels[..]) {
        (Form::Halves, &[a, b]) => {
            let apart = plain((padded(a) + padded(b)) * kernel.iter().product::<usize>() * padded(filters), device)?;
            summed(driver, device, wgrad::Problem { out: memory(OP, device, &apart)?, ..p })?;
            let (apart, out) = (memory(OP, device, &apart)?, p.out);
            let taps = kernel.iter().product();
            join::run(driver, &join::Problem { channels: [a, b], filters, taps, apart, out })?;
        }
        _ => summed(driver, device, p)?,
    }
    let (what, macs) = describe(w.dims().five(), how.stride, dy);
    note(cx, OP, clock, "wgrad", macs, || what)?;
    Ok(dw)
}

/// Runs it with memory for sums in parts, which goes back to the pool: what comes after runs after it.
fn summed(driver: &dyn Driver, device: &Device, p: wgrad::Problem<'_>) -> Result<()> {
    let work = wgrad::workspace(driver, &p)?;
    let work = (work > 0).then(|| plain(work.div_ceil(4), device)).transpose()?;
    let workspace = work.as_ref().map(|t| memory(OP, device, t)).transpose()?;
    wgrad::run(driver, &wgrad::Problem { workspace, ..p })
}

/// Of the channels `[first, count]` of a convolution's input of size `space`.
fn conv3d_input(
    cx: &mut Ctx<'_>,
    w: &Param,
    how: Conv3d,
    dy: &Tensor,
    [first, count]: [usize; 2],
    space: [usize; 3],
) -> Result<Tensor> {
    const OP: &str = "conv3d input gradient";
    let clock = cx.clock();
    let (device, driver, precision) = (cx.device(), card(OP, cx.device())?, dy.precision());
    let [filters, _, kernel @ ..] = w.dims().five();
    let batch = dy.dims().five()[0];
    let [d, h, width] = space;
    let dx = voxels(OP, Dims::from([batch, count, d, h, width]), precision, device)?;
    let weight = filter::kept(OP, device, w, precision, Kept::Mirrored(first, count))?;
    let mut p = dgrad::Problem {
        storage: precision.into(),
        batch,
        dy: memory(OP, device, dy)?,
        filters,
        weight: memory(OP, device, &weight)?,
        channels: count,
        kernel,
        stride: how.stride,
        space,
        dx: memory(OP, device, &dx)?,
        workspace: None,
    };
    let plan = dgrad::plan(driver, &p)?;
    let work = (plan.workspace() > 0).then(|| plain(plan.workspace().div_ceil(4), device)).transpose()?;
    p.workspace = work.as_ref().map(|t| memory(OP, device, t)).transpose()?;
    dgrad::run(driver, &p, &plan)?;
    let (what, macs) = describe([filters, count, kernel[0], kernel[1], kernel[2]], how.stride, dy);
    note(cx, OP, clock, plan.name(), macs, || what)?;
    Ok(dx)
}

/// Sums over blocks of `kernel` voxels, times `scale`.
pub(in crate::ops) fn pooled(op: &'static str, x: Tensor, kernel: [usize; 3], scale: f32) -> Result<Tensor> {
    let [batch, channels, space @ ..] = activation(op, x.dims())?;
    let [d, h, w] = [0, 1, 2].map(|a| space[a] / kernel[a].max(1));
    let out = voxels(op, Dims::from([batch, channels, d, h, w]), x.precision(), x.device())?;
    let (fine, coarse) = (memory(op, x.device(), &x)?, memory(op, x.device(), &out)?);
    let p = pool::Problem { storage: x.precision().into(), batch, channels, space, kernel, fine, coarse, scale };
    pool::sum(card(op, x.device())?, &p)?;
    Ok(out)
}

/// Every voxel `kernel` times, times `scale`, as a tensor of sizes `dims`.
pub(in crate::ops) fn spread(
    op: &'static str,
    x: Tensor,
    dims: Dims,
    kernel: [usize; 3],
    scale: f32,
) -> Result<Tensor> {
    let [batch, channels, space @ ..] = activation(op, &dims)?;
    let out = voxels(op, dims, x.precision(), x.device())?;
    let (fine, coarse) = (memory(op, x.device(), &out)?, memory(op, x.device(), &x)?);
    let p = pool::Problem { storage: x.precision().into(), batch, channels, space, kernel, fine, coarse, scale };
    pool::spread(card(op, x.device())?, &p)?;
    Ok(out)
}

/// The sum of two activations that are stored alike.
pub(in crate::ops) fn add(op: &'static str, a: Tensor, b: Tensor) -> Result<Tensor> {
    let precision = a.precision();
    let (a, b) = (as_voxels(op, a, precision)?, as_voxels(op, b, precision)?);
    // Kernels run in order, so that either may be the place of the result.
    let (a, b) = if a.is_unique() { (a, b) } else { (b, a) };
    let out = if a.is_unique() { a.clone() } else { voxels(op, *a.dims(), precision, a.device())? };
    let at = |t: &Tensor| memory(op, a.device(), t);
    let values = a.layout().len(a.dims());
    pool::add(card(op, a.device())?, precision.into(), values, at(&a)?, at(&b)?, at(&out)?)?;
    Ok(out)
}

/// See [`Affine::backward`] and, with the result of a sum, [`Affine::backward_added`]: the gradient of `x`, and what is given
/// for what was added.
pub(in crate::ops) fn instance_norm(
    cx: &mut Ctx<'_>,
    grads: &mut Grads,
    n: &Affine,
    params: [ParamId; 2],
    x: &Tensor,
    result: Option<&Tensor>,
    dy: Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    const OP: &str = "instance_norm backward";
    let clock = cx.clock();
    let [batch, channels, space @ ..] = activation(OP, x.dims())?;
    check(OP, &dy, x.dims())?;
    let device = cx.device();
    let at = |t: &Tensor| memory(OP, device, t);
    let planes = n.card().ok_or_else(|| Error::shape(OP, "a normalisation of the processor's on a card"))?;
    let floats = batch * padded(channels);
    let like = |t: &Tensor| voxels(OP, *t.dims(), dy.precision(), device);
    // In place where no one else has the gradient.
    let own = if dy.is_unique() { dy.clone() } else { like(&dy)? };
    let (dx, masked) = match result {
        None => (own.clone(), None),
        Some(_) => (like(&dy)?, Some(&own)),
    };
    let (partials, sums) = (plain(norm_grad::partials(batch, channels, space), device)?, plain(2 * floats, device)?);
    let (dweight, dbias) = (vector(channels, x)?, vector(channels, x)?);
    let p = norm_grad::Problem {
        storage: Storage::from(dy.precision()),
        batch,
        channels,
        space,
        x: at(x)?,
        norm: norm(OP, device, n)?,
        inverses: part(planes, 3 * floats, floats)?,
        dy: at(&dy)?,
        mask: match (result, masked) {
            (Some(r), Some(m)) => Mask::Added { result: at(r)?, masked: at(m)? },
            _ => Mask::Normalised,
        },
        partials: at(&partials)?,
        sums: at(&sums)?,
        dweight: at(&dweight)?,
        dbias: at(&dbias)?,
        dx: at(&dx)?,
    };
    if x.precision() != dy.precision() {
        return unsupported(OP, "a gradient stored otherwise than its value");
    }
    norm_grad::run(card(OP, device)?, &p)?;
    note(cx, OP, clock, "instance_norm_grad", 0, || format!("{:?}", x.dims()))?;
    grads.add_param(params[0], dweight)?;
    grads.add_param(params[1], dbias.clone())?;
    Ok((dx, own, dbias))
}

/// Zeros in the memory of a gradient, without an upload.
pub(crate) fn zeros(p: &Param) -> Result<Tensor> {
    let device = p.value().device();
    let t = plain(filter::floats(p)?, device)?;
    super::clear(&t, 0, t.dims().len())?;
    Ok(t)
}

/// See [`crate::ops::conv_transpose3d`].
pub(in crate::ops) fn conv_transpose3d(
    cx: &mut Ctx<'_>,
    x: Tensor,
    w: &Param,
    b: Option<&Param>,
    out: Dims,
) -> Result<(Tensor, Tensor)> {
    use backend::conv_transpose3d as kernel;
    const OP: &str = "conv_transpose3d";
    let clock = cx.clock();
    let precision = filter::computed(cx, w);
    let x = as_voxels(OP, x, precision)?;
    let [batch, channels, space @ ..] = activation(OP, x.dims())?;
    let [_, filters, size @ ..] = w.dims().five();
    let device = cx.device();
    let y = voxels(OP, out, precision, device)?;
    let held = (precision != w.precision()).then(|| filter::kept(OP, device, w, precision, Kept::Same)).transpose()?;
    let weight = memory(OP, device, held.as_deref().unwrap_or(w.value()))?;
    let p = kernel::Problem {
        storage: precision.into(),
        batch,
        source: backend::Source::plain(memory(OP, device, &x)?, channels, space),
        weight,
        bias: b.map(|b| memory(OP, device, b.value())).transpose()?,
        filters,
        kernel: size,
        out: memory(OP, device, &y)?,
    };
    kernel::run(card(OP, device)?, &p)?;
    let macs =
        [batch, channels, filters].iter().chain(&space).chain(&size).fold(1, |n: u64, &v| n.saturating_mul(v as u64));
    note(cx, OP, clock, "gemm", macs, || format!("{channels}->{filters} {size:?} at {space:?}"))?;
    Ok((y, x))
}

/// The gradients of it by its input, filter and bias.
pub(in crate::ops) fn conv_transpose3d_gradients(
    cx: &mut Ctx<'_>,
    x: Tensor,
    w: &Param,
    b: Option<&Param>,
    dy: &Tensor,
) -> Result<[Option<Tensor>; 3]> {
    use backend::conv3d as kernel;
    const OP: &str = "conv_transpose3d backward";
    let precision = dy.precision();
    let x = as_voxels(OP, x, precision)?;
    let [batch, channels, space @ ..] = activation(OP, x.dims())?;
    let [_, filters, size @ ..] = w.dims().five();
    let device = cx.device();
    let driver = card(OP, device)?;
    let large = [0, 1, 2].map(|a| space[a] * size[a]);
    // The input's is a convolution of the result's, whose kernel is its stride.
    let dx = voxels(OP, *x.dims(), precision, device)?;
    let weight = filter::kept(OP, device, w, precision, Kept::Turned)?;
    let from = [backend::Source::plain(memory(OP, device, dy)?, filters, large)];
    let mut p = kernel::Problem {
        storage: precision.into(),
        batch,
        sources: &from,
        weight: memory(OP, device, &weight)?,
        bias: None,
        filters: channels,
        kernel: size,
        stride: size,
        out: memory(OP, device, &dx)?,
        partials: None,
        workspace: None,
    };
    let plan = kernel::plan(driver, &p, false, kernel::Wish::default())?;
    let work = (plan.workspace() > 0).then(|| plain(plan.workspace().div_ceil(4), device)).transpose()?;
    p.workspace = work.as_ref().map(|t| memory(OP, device, t)).transpose()?;
    kernel::run(driver, &p, &plan)?;
    // The filter's is that of this convolution, the two sides exchanged.
    let dw = plain(filter::floats(w)?, device)?;
    let p = wgrad::Problem {
        storage: precision.into(),
        batch,
        sources: &from,
        dy: backend::Source::plain(memory(OP, device, &x)?, channels, space),
        kernel: size,
        stride: size,
        transpose: true,
        parts: None,
        out: memory(OP, device, &dw)?,
        workspace: None,
    };
    summed(driver, device, p)?;
    let db = b.map(|_| bias(cx, dy)).transpose()?;
    Ok([Some(dx), Some(dw), db])
}

/// A filter of a transposed convolution, packed.
pub(in crate::ops) fn pack_transposed_filter(values: &[f32], dims: [usize; 5], device: &Device) -> Result<Tensor> {
    let bytes = backend::conv_transpose3d::pack_weight(values, dims, Storage::F32)?;
    super::upload("pack_transposed_filter", &bytes, Precision::F32, device)
}

/// The values of a filter that learns, `[O, I, taps]` with the sizes as given.
pub(in crate::ops) fn unpack_filter(packed: &Tensor, [o, i, taps]: [usize; 3]) -> Result<Vec<f32>> {
    const OP: &str = "unpack_filter";
    let wide = padded(o);
    let all = packed.layout() == Layout::PLAIN && packed.dims().len() >= padded(i) * taps * wide;
    if packed.precision() != Precision::F32 || !all {
        return Err(Error::shape(OP, format!("{:?} for a filter of {o} by {i} channels, {taps} taps", packed.dims())));
    }
    let values = packed.to_host()?;
    let at = |f: usize, c: usize, t: usize| values[(((c / 16) * taps + t) * wide + f) * 16 + c % 16];
    Ok((0..o * i * taps).map(|n| at(n / (i * taps), n / taps % i, n % taps)).collect())
}
