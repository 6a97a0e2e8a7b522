//! The end of a residual block whose shortcut is a convolution, and what is known of a convolution on a card before anything
//! of it is in memory.

use super::{
    FIRST, FIRST_NAME, Form, Inputs, as_voxels, block_end, card, check_strict, computed, describe, memory, note,
};
use super::{read, voxels};
use crate::autograd::{Ctx, Param, Var};
use crate::backend::cuda as backend;
use crate::backend::cuda::conv3d::residual as kernel;
use crate::backend::cuda::{conv3d as kernels, padded};
use crate::error::Result;
use crate::ops::Conv3d;
use crate::ops::lazy::{Affine, Source};
use crate::tensor::cuda::Memory;
use crate::tensor::{Device, Layout, Precision};

const RESIDUAL: &str = "conv3d_residual";

/// The variants that can convolve inputs of `channels` each and sizes `[batch, _, D, H, W]` together with `w`, and which of
/// them is taken.
pub(in crate::ops) fn conv3d_variants(
    device: &Device,
    [batch, _, space @ ..]: [usize; 5],
    channels: &[usize],
    w: &Param,
    how: Conv3d,
) -> Result<(Vec<&'static str>, &'static str)> {
    const OP: &str = "conv3d";
    let [filters, _, kernel @ ..] = w.dims().five();
    if Form::First.exists(w.dims().five(), w.precision()) && channels.len() == 1 {
        return Ok((vec![FIRST_NAME], FIRST_NAME));
    }
    let sizes = Sizes { batch, space, channels, filters, kernel, stride: how.stride, precision: w.precision() };
    let driver = card(OP, device)?;
    sizes.ask(|p, measured| {
        let chosen = kernels::plan(driver, p, measured, kernels::Wish::default())?;
        Ok((kernels::variants(driver, p, measured), chosen.name()))
    })
}

/// A convolution of which nothing is in memory yet.
struct Sizes<'a> {
    batch: usize,
    space: [usize; 3],
    channels: &'a [usize],
    filters: usize,
    kernel: [usize; 3],
    stride: [usize; 3],
    precision: Precision,
}

impl Sizes<'_> {
    /// Asks of it what depends on no memory, with moments where convolutions take them.
    fn ask<T>(&self, f: impl FnOnce(&kernels::Problem<'_>, bool) -> Result<T>) -> Result<T> {
        // Nothing runs, so that there is room everywhere.
        let anywhere = Memory { address: 0, bytes: usize::MAX };
        let plain = |c: &usize| backend::Source::plain(anywhere, *c, self.space);
        let sources: Vec<_> = self.channels.iter().map(plain).collect();
        let p = kernels::Problem {
            storage: self.precision.into(),
            batch: self.batch,
            sources: &sources,
            weight: anywhere,
            bias: None,
            filters: self.filters,
            kernel: self.kernel,
            stride: self.stride,
            out: anywhere,
            partials: None,
            workspace: None,
        };
        f(&p, self.precision != Precision::F32)
    }
}

/// Bytes that a convolution with moments takes beside its input and output: those of the moments, and of sums in parts.
pub(in crate::ops) fn conv3d_memory(
    device: &Device,
    precision: Precision,
    channels: &[usize],
    w: [usize; 5],
    batch: usize,
    space: [usize; 3],
    how: Conv3d,
) -> Result<usize> {
    const OP: &str = "conv3d";
    let [filters, _, kernel @ ..] = w;
    let out = kernels::output_space(space, kernel, how.stride);
    let (tiles, work) = if precision == Precision::F32 {
        (backend::moments::count(out), 0)
    } else {
        let sizes = Sizes { batch, space, channels, filters, kernel, stride: how.stride, precision };
        let driver = card(OP, device)?;
        let plan = sizes.ask(|p, measured| kernels::plan(driver, p, measured, kernels::Wish::default()))?;
        // Few channels may be the image's or an inner layer's.
        let first = Form::First.exists(w, precision) && channels.len() == 1;
        let tiles = if first { kernels::first::tiles(out) } else { 0 };
        (tiles.max(plan.tiles()), plan.workspace())
    };
    Ok(tiles.saturating_mul(batch).saturating_mul(12 * padded(filters)).saturating_add(work))
}

/// See [`crate::ops::conv3d_residual`].
pub(in crate::ops) fn conv3d_residual(
    cx: &mut Ctx<'_>,
    y: Var,
    n: &Affine,
    sources: Vec<Source>,
    w: &Param,
    b: Option<&Param>,
    how: Conv3d,
) -> Result<Var> {
    let (dims, precision) = (w.dims().five(), computed(cx, w));
    let y = as_voxels(RESIDUAL, y.into_value(), precision)?;
    if !is_fused(dims, precision) {
        let shortcut = super::conv3d(cx, sources, w, b, how, None, false)?.0;
        return block_end(cx, y, n, Some(shortcut.value()));
    }
    check_strict(cx, RESIDUAL, precision)?;
    let clock = cx.clock();
    let planes =
        matches!(&sources[..], [x] if x.is_plain() && x.value.value().layout() == Layout::PLAIN) && dims[1] <= FIRST;
    let each: Vec<usize> = sources.iter().map(|s| s.value.value().dims().five()[1]).collect();
    let inputs = Inputs::new(RESIDUAL, sources, precision, planes)?;
    let [batch, channels, space @ ..] = inputs.dims;
    let device = cx.device();
    let at = |t| memory(RESIDUAL, device, t);
    let read: Vec<backend::Source> = match planes {
        true => Vec::new(),
        false => inputs.sources.iter().map(|s| read(RESIDUAL, device, s)).collect::<Result<_>>()?,
    };
    let input = match planes {
        true => kernel::Input::Planes { data: at(inputs.sources[0].value.value())?, channels, space },
        false => kernel::Input::Voxels(&read),
    };
    // Kernels run in order, so that `y` is read before its memory is given to anyone else.
    let out = if y.is_unique() { y.clone() } else { voxels(RESIDUAL, *y.dims(), precision, device)? };
    let [_, filters, result @ ..] = y.dims().five();
    let p = kernel::Problem {
        storage: precision.into(),
        batch,
        input,
        weight: Form::of(RESIDUAL, &each)?.memory(RESIDUAL, cx, w)?,
        bias: b.map(|b| at(b.value())).transpose()?,
        stride: how.stride,
        y: backend::Source {
            norm: Some(super::norm(RESIDUAL, device, n)?),
            ..backend::Source::plain(at(&y)?, filters, result)
        },
        out: at(&out)?,
    };
    kernel::run(card(RESIDUAL, device)?, &p)?;
    let (what, macs) = describe(dims, how.stride, &out);
    note(cx, RESIDUAL, clock, "fused", macs, || what)?;
    Ok(cx.leaf(out))
}

/// See [`crate::ops::conv3d_residual_memory`].
pub(in crate::ops) fn conv3d_residual_memory(precision: Precision, w: [usize; 5], [d, h, width]: [usize; 3]) -> usize {
    let shortcut = [padded(w[0]), d, h, width].iter().fold(precision.size(), |n, &v| n.saturating_mul(v));
    if is_fused(w, precision) { 0 } else { shortcut }
}

/// Whether one kernel does all of it: then nothing is in memory but operands and result.
fn is_fused([_, _, kernel @ ..]: [usize; 5], precision: Precision) -> bool {
    kernel == [1; 3] && precision != Precision::F32
}
