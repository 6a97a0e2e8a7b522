//! What is known of a convolution on a card before anything of it is in memory.

use super::{FIRST_NAME, Form, card, storage};
use crate::autograd::Param;
use crate::backend::cuda as backend;
use crate::backend::cuda::{conv3d as kernels, padded};
use crate::error::Result;
use crate::ops::Conv3d;
use crate::tensor::cuda::Memory;
use crate::tensor::{Device, Precision};

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
    if Form::First.takes(w.dims().five(), w.precision(), how.stride) && channels.len() == 1 {
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
            storage: storage(self.precision),
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
    space: [usize; 3],
    how: Conv3d,
) -> Result<usize> {
    const OP: &str = "conv3d";
    let [filters, _, kernel @ ..] = w;
    let out = kernels::output_space(space, kernel, how.stride);
    let (tiles, work) = if Form::First.takes(w, precision, how.stride) && channels.len() == 1 {
        (kernels::first::tiles(space), 0)
    } else if precision == Precision::F32 {
        (backend::moments::count(out), 0)
    } else {
        let sizes = Sizes { batch: 1, space, channels, filters, kernel, stride: how.stride, precision };
        let driver = card(OP, device)?;
        let plan = sizes.ask(|p, measured| kernels::plan(driver, p, measured, kernels::Wish::default()))?;
        (plan.tiles(), plan.workspace())
    };
    Ok(tiles.saturating_mul(12 * padded(filters)).saturating_add(work))
}
