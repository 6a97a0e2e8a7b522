//! Transposed 3D convolution whose kernel is its stride.

use super::{activation, floats, memory, processor};
use crate::autograd::{Ctx, Param, Var};
use crate::backend::cpu::conv_transpose3d::{Geometry, Problem, packed_len};
use crate::backend::dispatch;
use crate::error::{Error, Result};
use crate::tensor::{Device, Dims, Layout, Precision, Tensor};

/// Every voxel becomes a block of voxels, by a filter whose size is also the stride (PyTorch's `ConvTranspose3d` with
/// `kernel_size = stride`, 1 or 2 per axis, no padding, one group, as in nnU-Net's decoder):
/// `out[n, o, z * k + i] = b[o] + sum over c of x[n, c, z] * w[c, o, i]`, per axis for `i` in `0..k`.
///
/// Input `[N, C, D, H, W]`, `w` of sizes `[C, O, kD, kH, kW]` from [`pack_transposed_filter`], `b` of size `[O]` from
/// [`super::pack_vector`], result `[N, O, D * kD, H * kH, W * kW]`.
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit; [`Error::OutOfMemory`].
pub fn conv_transpose3d<'m>(cx: &mut Ctx<'m>, x: Var, w: &'m Param, b: Option<&'m Param>) -> Result<Var> {
    run(cx, x, w, b, None)
}

pub(super) fn run(cx: &mut Ctx<'_>, x: Var, w: &Param, b: Option<&Param>, name: Option<&str>) -> Result<Var> {
    processor("conv_transpose3d", cx.device())?;
    let geometry = geometry(x.value().dims(), w, b)?;
    let x = floats("conv_transpose3d", x.into_value())?;
    let [d, h, width] = [0, 1, 2].map(|a| geometry.input[a].saturating_mul(geometry.stride[a]));
    let dims = Dims::from([geometry.batch, geometry.out_channels, d, h, width]);
    let mut out = Tensor::empty(dims, Layout::BLOCKED, cx.device())?;
    let (filter, bias) = (w.value().as_slice(), b.map(|b| b.value().as_slice()));
    let p = Problem { geometry, input: x.as_slice(), filter, bias };
    dispatch!(cx.device(), conv_transpose3d::forward(name, &p, memory("conv_transpose3d", &mut out)?))?;
    Ok(cx.leaf(out))
}

/// The problem's sizes, with every buffer's length checked against them.
fn geometry(x: &Dims, w: &Param, b: Option<&Param>) -> Result<Geometry> {
    let [batch, channels, input @ ..] = activation("conv_transpose3d", x)?;
    let error = |what| Err(Error::shape("conv_transpose3d", what));
    let [i, o, stride @ ..] = w.dims().five();
    if w.dims().as_slice().len() != 5 || w.dims().is_empty() || i != channels {
        return error(format!("filter {:?} for an input {x:?}, expected [{channels}, O, kD, kH, kW]", w.dims()));
    }
    if stride.iter().any(|s| *s > 2) {
        return error(format!("kernel and stride {stride:?}, expected 1 or 2 per axis"));
    }
    if w.value().as_slice().len() != packed_len(w.dims().five()) {
        return error(format!("filter {:?} is not packed", w.dims()));
    }
    if let Some(b) = b
        && (b.dims().as_slice() != [o] || b.value().as_slice().len() != Layout::BLOCKED.padded(o))
    {
        return error(format!("bias of size {:?}, expected [{o}]", b.dims()));
    }
    Ok(Geometry { batch, in_channels: i, out_channels: o, input, stride })
}

/// Packs a filter given in `[I, O, kD, kH, kW]` order for `device`.
///
/// # Errors
/// [`Error::Shape`] when the number of values is not the product of `dims`; [`Error::OutOfMemory`].
pub fn pack_transposed_filter(values: &[f32], dims: [usize; 5], device: &Device) -> Result<Tensor> {
    if values.len() != dims.iter().product::<usize>() {
        let what = format!("{} values for a filter {dims:?}", values.len());
        return Err(Error::shape("pack_transposed_filter", what));
    }
    processor("pack_transposed_filter", device)?;
    let mut out = Tensor::empty(Dims::from([packed_len(dims)]), Layout::PLAIN, device)?;
    let to = memory("pack_transposed_filter", &mut out)?;
    dispatch!(device, conv_transpose3d::pack_filter(values, dims, to));
    Ok(out)
}

/// The values of a filter of sizes `[I, O, kD, kH, kW]` from [`pack_transposed_filter`], in that order.
///
/// # Errors
/// [`Error::Shape`] when `packed` is no packed filter of these sizes; [`Error::Unsupported`] on a card.
pub fn unpack_transposed_filter(packed: &Tensor, dims: [usize; 5]) -> Result<Vec<f32>> {
    processor("unpack_transposed_filter", packed.device())?;
    if packed.precision() != Precision::F32 || packed.as_slice().len() != packed_len(dims) {
        return Err(Error::shape("unpack_transposed_filter", format!("{:?} for a filter {dims:?}", packed.dims())));
    }
    let mut out = vec![0.0; dims.iter().product()];
    dispatch!(packed.device(), conv_transpose3d::unpack_filter(packed.as_slice(), dims, &mut out));
    Ok(out)
}
