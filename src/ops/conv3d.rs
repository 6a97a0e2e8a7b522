//! 3D convolution.

use super::{activation, blocked, memory};
use crate::autograd::{Ctx, Param, Var};
use crate::backend::cpu::conv3d::{Geometry, Problem, Source, packed_len};
use crate::backend::dispatch;
use crate::error::{Error, Result};
use crate::tensor::{Device, Dims, Layout, Tensor};

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

/// One input, or two that are read as if concatenated along the channels, which is never done in memory.
#[derive(Debug)]
pub enum Sources {
    /// One tensor.
    One(Var),
    /// The first tensor's channels, then the second's.
    Two(Var, Var),
}

impl Sources {
    /// The same sources once more; no data is copied.
    #[must_use]
    pub fn share(&self) -> Self {
        match self {
            Sources::One(a) => Sources::One(a.clone()),
            Sources::Two(a, b) => Sources::Two(a.clone(), b.clone()),
        }
    }
}

/// Cross-correlation with a filter and an optional bias per output channel (PyTorch's `Conv3d`, one group, dilation 1):
/// inputs `[N, C, D, H, W]` with C in total as many as the filter's, `w` of sizes `[O, C, kD, kH, kW]` from
/// [`pack_filter`], `b` of size `[O]` from [`pack_vector`], result as [`Conv3d::output_dims`]. A 2D convolution is one
/// with D = 1 and kD = 1.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit; [`Error::OutOfMemory`].
pub fn conv3d<'m>(cx: &mut Ctx<'m>, x: Sources, w: &'m Param, b: Option<&'m Param>, how: Conv3d) -> Result<Var> {
    run(cx, x, w, b, how, None)
}

pub(super) fn run(
    cx: &mut Ctx<'_>,
    x: Sources,
    w: &Param,
    b: Option<&Param>,
    how: Conv3d,
    name: Option<&str>,
) -> Result<Var> {
    let mut inputs = match x {
        Sources::One(a) => vec![a.into_value()],
        Sources::Two(a, b) => vec![a.into_value(), b.into_value()],
    };
    let dims = concatenated(&inputs)?;
    let geometry = geometry(&dims, w, b, how)?;
    // Only sources of one layout can be walked together.
    if inputs.iter().any(|t| t.layout() == Layout::BLOCKED) {
        inputs = inputs.into_iter().map(|t| blocked("conv3d", t)).collect::<Result<_>>()?;
    }
    let sources: Vec<Source<'_>> = inputs
        .iter()
        .map(|t| Source { data: t.as_slice(), channels: t.dims().five()[1], layout: t.layout() })
        .collect();
    let [d, h, width] = geometry.output;
    let out_dims = Dims::from([geometry.batch, geometry.out_channels, d, h, width]);
    let mut out = Tensor::empty(out_dims, Layout::BLOCKED, cx.device())?;
    let p =
        Problem { geometry, sources: &sources, filter: w.value().as_slice(), bias: b.map(|b| b.value().as_slice()) };
    dispatch!(cx.device(), conv3d::forward(name, &p, memory("conv3d", &mut out)?))?;
    Ok(cx.leaf(out))
}

/// Sizes of the sources side by side.
fn concatenated(inputs: &[Tensor]) -> Result<Dims> {
    let mut all: Option<[usize; 5]> = None;
    for t in inputs {
        let [n, c, d, h, w] = activation("conv3d", t.dims())?;
        all = match all {
            None => Some([n, c, d, h, w]),
            Some([n0, c0, d0, h0, w0]) if [n0, d0, h0, w0] == [n, d, h, w] => Some([n, c0 + c, d, h, w]),
            Some(first) => {
                let what =
                    format!("sources of sizes {first:?} and {:?}, expected to differ in channels only", t.dims());
                return Err(Error::shape("conv3d", what));
            }
        };
    }
    all.map(Dims::from).ok_or_else(|| Error::shape("conv3d", "no source"))
}

/// The problem's sizes, with every buffer's length checked against them.
pub(super) fn geometry(x: &Dims, w: &Param, b: Option<&Param>, how: Conv3d) -> Result<Geometry> {
    let out = how.output_dims(x, w.dims())?;
    let [o, i, ..] = w.dims().five();
    if w.value().as_slice().len() != packed_len(w.dims().five()) {
        return Err(Error::shape("conv3d", format!("filter {:?} is not packed", w.dims())));
    }
    if let Some(b) = b
        && (b.dims().as_slice() != [o] || b.value().as_slice().len() != Layout::BLOCKED.padded(o))
    {
        return Err(Error::shape("conv3d", format!("bias of size {:?}, expected [{o}]", b.dims())));
    }
    Ok(Geometry {
        batch: x.five()[0],
        in_channels: i,
        out_channels: o,
        input: x.space(),
        output: out.space(),
        kernel: w.dims().space(),
        stride: how.stride,
        padding: how.padding,
    })
}

/// Packs a filter given in `[O, I, kD, kH, kW]` order for `device`. One packing serves one source and any two.
///
/// # Errors
/// [`Error::Shape`] when the number of values is not the product of `dims`; [`Error::OutOfMemory`].
pub fn pack_filter(values: &[f32], dims: [usize; 5], device: &Device) -> Result<Tensor> {
    if values.len() != dims.iter().product::<usize>() {
        return Err(Error::shape("pack_filter", format!("{} values for a filter {dims:?}", values.len())));
    }
    let mut out = Tensor::empty(Dims::from([packed_len(dims)]), Layout::PLAIN, device)?;
    let to = memory("pack_filter", &mut out)?;
    dispatch!(device, conv3d::pack_filter(values, dims, to));
    Ok(out)
}

/// Pads a vector of one value per channel with zeros to whole channel blocks.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub fn pack_vector(values: &[f32], device: &Device) -> Result<Tensor> {
    let mut out = Tensor::empty(Dims::from([Layout::BLOCKED.padded(values.len())]), Layout::PLAIN, device)?;
    let (real, pad) = memory("pack_vector", &mut out)?.split_at_mut(values.len());
    real.copy_from_slice(values);
    pad.fill(0.0);
    Ok(out)
}
