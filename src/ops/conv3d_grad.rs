//! Gradients of [`super::conv3d()`], each by itself: the door for tests and benchmarks. No promise of stability.

use std::ops::Range;

use super::conv3d::{Conv3d, concatenated, one_layout, read, sizes};
use super::lazy::Sources;
use super::{activation, memory, same_device};
use crate::autograd::Param;
use crate::backend::cpu::conv3d::Geometry;
use crate::backend::cpu::conv3d_grad::{self as backend, Dgrad, Reading, Wgrad, Wish};
use crate::backend::{compute, dispatch, no_implementation};
use crate::error::{Error, Result};
use crate::tensor::{Device, Dims, Layout, Precision, Tensor};

const OP: &str = "conv3d_grad";

/// A convolution's sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// `[N, C, D, H, W]` of the input, all sources together, as they were seen: repeated.
    pub x: [usize; 5],
    /// `[O, C, kD, kH, kW]` of the filter.
    pub w: [usize; 5],
    /// Stride and padding.
    pub how: Conv3d,
}

impl Layer {
    fn geometry(&self) -> Result<Geometry> {
        let (x, w) = (Dims::from(self.x), Dims::from(self.w));
        activation(OP, &x)?;
        Ok(sizes(&x, &w, &self.how.output_dims(&x, &w)?, self.how))
    }

    /// Floats of the packed filter.
    fn filter_len(&self) -> usize {
        Layout::BLOCKED.padded(self.w[0]) * self.w[1..].iter().product::<usize>()
    }
}

/// Which implementation to take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct By<'n> {
    /// Only this one.
    pub name: Option<&'n str>,
    /// Only those as accurate as adding up the products one after the other.
    pub strict: bool,
}

/// Implementations of [`dgrad`] on `device` that fit, in order of preference.
#[must_use]
pub fn dgrad_implementations(device: &Device, layer: Layer, factor: [usize; 3]) -> Vec<&'static str> {
    layer.geometry().map_or_else(|_| Vec::new(), |g| backend::dgrad_names(device.isa(), &g, factor))
}

/// Implementations of [`wgrad`] on `device` that fit, in order of preference.
///
/// # Errors
/// [`Error::Shape`] when the sources do not fit together.
pub fn wgrad_implementations(device: &Device, x: Sources, w: [usize; 5], how: Conv3d) -> Result<Vec<&'static str>> {
    let inputs = one_layout(x.into_vec())?;
    let g = Layer { x: concatenated(&inputs)?.five(), w, how }.geometry()?;
    let sources: Vec<_> = inputs.iter().map(read).collect();
    let channels: Vec<usize> = sources.iter().map(|s| s.channels).collect();
    Ok(backend::wgrad_names(device.isa(), &g, Reading::of(&sources, &channels)))
}

/// The gradient of one source: of the input's `channels`, summed over the `factor` voxels along each axis that one of
/// the source's voxels stood for, from the output's gradient `dy` and the filter `w`. Added to `into`, if that is
/// given. Returns what ran, too.
///
/// # Errors
/// [`Error::Shape`] when sizes do not fit; [`Error::OutOfMemory`].
pub fn dgrad(
    by: By<'_>,
    layer: Layer,
    dy: &Tensor,
    w: &Param,
    channels: Range<usize>,
    factor: [usize; 3],
    into: Option<Tensor>,
) -> Result<(Tensor, &'static str)> {
    let device = dy.device();
    let w = w.value();
    same_device(OP, device, w.device())?;
    let g = layer.geometry()?;
    gradient(&g, dy)?;
    let fits = channels.start < channels.end && channels.end <= g.in_channels;
    if !fits || (0..3).any(|a| factor[a] == 0 || g.input[a] % factor[a] != 0) || w.stored().len() != layer.filter_len()
    {
        let what = format!("channels {channels:?} of {layer:?}, repeated {factor:?} times, a filter {:?}", w.dims());
        return Err(Error::shape(OP, what));
    }
    let g = Geometry { filter_first: channels.start, in_channels: channels.len(), ..g };
    let [d, h, width] = [0, 1, 2].map(|a| g.input[a] / factor[a]);
    let dims = Dims::from([g.batch, g.in_channels, d, h, width]);
    let wish = Wish { name: by.name, strict: by.strict };
    let choice = dispatch!(device, conv3d_grad::choose_dgrad(&g, factor, wish));
    let choice = choice.ok_or_else(|| no_implementation(OP, by.name))?;
    let (add, mut dx) = target(into, dims, Layout::BLOCKED, device)?;
    let mut work = work(choice.workspace(device.threads()), device)?;
    let p = Dgrad { geometry: g, factor, filter: w.stored(), dy: dy.as_slice(), add };
    let (work, to) = (memory(OP, &mut work)?, memory(OP, &mut dx)?);
    compute!(device, conv3d_grad::dgrad(&choice, &p, work, to), ());
    Ok((dx, choice.name()))
}

/// The gradient of a filter of sizes `w`, in the order of the packed filter, from the sources that the convolution read and
/// its output's gradient `dy`. Added to `into`, if that is given. Returns what ran, too.
///
/// # Errors
/// [`Error::Shape`] when sizes do not fit; [`Error::OutOfMemory`].
pub fn wgrad(
    by: By<'_>,
    x: Sources,
    w: [usize; 5],
    how: Conv3d,
    dy: &Tensor,
    into: Option<Tensor>,
) -> Result<(Tensor, &'static str)> {
    let device = dy.device();
    let inputs = one_layout(x.into_vec())?;
    inputs.iter().try_for_each(|s| same_device(OP, device, s.value.value().device()))?;
    let layer = Layer { x: concatenated(&inputs)?.five(), w, how };
    let g = layer.geometry()?;
    gradient(&g, dy)?;
    let sources: Vec<_> = inputs.iter().map(read).collect();
    let channels: Vec<usize> = sources.iter().map(|s| s.channels).collect();
    let from = Reading::of(&sources, &channels);
    let wish = Wish { name: by.name, strict: by.strict };
    let choice = dispatch!(device, conv3d_grad::choose_wgrad(&g, from, wish));
    let choice = choice.ok_or_else(|| no_implementation(OP, by.name))?;
    let (add, mut dw) = target(into, Dims::from([layer.filter_len()]), Layout::PLAIN, device)?;
    let mut work = work(choice.workspace(device.threads()), device)?;
    let p = Wgrad { geometry: g, sources: &sources, dy: dy.as_slice(), add };
    let (work, to) = (memory(OP, &mut work)?, memory(OP, &mut dw)?);
    compute!(device, conv3d_grad::wgrad(&choice, &p, work, to), ());
    Ok((dw, choice.name()))
}

/// The gradient of the bias, padded to whole blocks: sums of `dy` over samples and voxels. Added to `into`, if that is given.
///
/// # Errors
/// [`Error::Shape`] when sizes do not fit; [`Error::OutOfMemory`].
pub fn bias_grad(dy: &Tensor, into: Option<Tensor>) -> Result<Tensor> {
    let [_, channels, d, h, w] = activation(OP, dy.dims())?;
    let device = dy.device();
    let dims = Dims::from([Layout::BLOCKED.padded(channels)]);
    let (add, mut db) = target(into, dims, Layout::PLAIN, device)?;
    let to = memory(OP, &mut db)?;
    compute!(device, conv3d_grad::bias_grad(channels, d * h * w, dy.as_slice(), add, to), ());
    Ok(db)
}

/// Checks that `dy` is a blocked tensor of floats of the output's sizes.
fn gradient(g: &Geometry, dy: &Tensor) -> Result<()> {
    let [d, h, w] = g.output;
    let dims = Dims::from([g.batch, g.out_channels, d, h, w]);
    if *dy.dims() != dims || dy.layout() != Layout::BLOCKED || dy.precision() != Precision::F32 {
        let what = format!("an output's gradient {:?}, expected {dims:?}, blocked, stored as floats", dy.dims());
        return Err(Error::shape(OP, what));
    }
    Ok(())
}

/// Where a gradient goes, and whether it is added to what is there.
fn target(into: Option<Tensor>, dims: Dims, layout: Layout, device: &Device) -> Result<(bool, Tensor)> {
    match into {
        None => Ok((false, Tensor::empty(dims, layout, device)?)),
        Some(t) if *t.dims() == dims && t.layout() == layout && t.precision() == Precision::F32 => Ok((true, t)),
        Some(t) => Err(Error::shape(OP, format!("a gradient of {dims:?} added to {:?}", t.dims()))),
    }
}

fn work(floats: usize, device: &Device) -> Result<Tensor> {
    Tensor::empty(Dims::from([floats.max(1)]), Layout::PLAIN, device)
}
