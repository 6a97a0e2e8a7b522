//! Transposed 3D convolution.

use super::{activation, floats, memory, on_card};
use crate::autograd::{Backward, Ctx, Grads, Param, Var};
use crate::backend::cpu::conv_transpose3d::{Geometry, Gradient, Problem, gradient_room, packed_len};
use crate::backend::{compute, dispatch};
use crate::error::{Error, Result};
use crate::tensor::{Device, Dims, Layout, Precision, Tensor};

const OP: &str = "conv_transpose3d";

/// Stride and padding per axis (z, y, x); the kernel size comes from the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvTranspose3d {
    /// Output voxels from one input voxel to the next, at least 1.
    pub stride: [usize; 3],
    /// Output voxels that are left out at either end.
    pub padding: [usize; 3],
    /// Output voxels more at the far end, less than the stride.
    pub output_padding: [usize; 3],
}

impl ConvTranspose3d {
    /// With a filter of the stride's size, every voxel becomes a block of voxels of its own, as in nnU-Net's decoder.
    #[must_use]
    pub fn upsampling(stride: [usize; 3]) -> Self {
        Self { stride, padding: [0; 3], output_padding: [0; 3] }
    }

    /// Only a stride of the kernel's size without padding, up to 2 voxels, is there on a card.
    #[cfg(feature = "cuda")]
    fn is_upsampling(&self, w: &Param) -> Result<()> {
        let kernel = w.dims().space();
        let known = kernel == self.stride && kernel.iter().all(|k| matches!(k, 1 | 2));
        if known && self.padding == [0; 3] && self.output_padding == [0; 3] {
            return Ok(());
        }
        Err(Error::unsupported(format!("{OP} on a card: {self:?} of a kernel of {kernel:?}")))
    }

    /// Sizes of the output for an input of sizes `x` `[N, C, D, H, W]` and a filter `w` `[C, O, kD, kH, kW]`: per axis
    /// `(in - 1) stride + kernel + output_padding - 2 padding`.
    ///
    /// # Errors
    /// [`Error::Shape`] when channels or sizes do not fit.
    pub fn output_dims(&self, x: &Dims, w: &Dims) -> Result<Dims> {
        let [n, c, input @ ..] = activation(OP, x)?;
        let [i, o, kernel @ ..] = w.five();
        if w.as_slice().len() != 5 || w.is_empty() || i != c {
            return Err(Error::shape(OP, format!("filter {w:?} for an input {x:?}, expected [{c}, O, kD, kH, kW]")));
        }
        let mut out = [0; 3];
        for a in 0..3 {
            let (stride, more) = (self.stride[a], self.output_padding[a]);
            if stride == 0 || more >= stride {
                let what =
                    format!("stride {stride} and output padding {more} on axis {a}, expected less than the stride");
                return Err(Error::shape(OP, what));
            }
            let reach = (input[a] - 1).saturating_mul(stride).saturating_add(kernel[a]).saturating_add(more);
            let size = reach.checked_sub(self.padding[a].saturating_mul(2)).filter(|s| *s > 0);
            let what = || format!("padding {} on axis {a} for an input {x:?} and a filter {w:?}", self.padding[a]);
            out[a] = size.ok_or_else(|| Error::shape(OP, what()))?;
        }
        Ok(Dims::from([n, o, out[0], out[1], out[2]]))
    }
}

/// The adjoint of a convolution in its input (PyTorch's `ConvTranspose3d`, one group, dilation 1): per axis
/// `out[n, o, p] = b[o] + sum over c, z, i of x[n, c, z] * w[c, o, i]` where `p = z * stride + i - padding`. A filter of
/// the stride's size without padding, nnU-Net's, is fastest.
///
/// Input `[N, C, D, H, W]`, `w` of sizes `[C, O, kD, kH, kW]` from [`pack_transposed_filter`], `b` of size `[O]` from
/// [`super::pack_vector`], result as [`ConvTranspose3d::output_dims`].
///
/// # Errors
/// [`Error::Shape`] when the sizes do not fit; [`Error::OutOfMemory`].
pub fn conv_transpose3d<'m>(
    cx: &mut Ctx<'m>,
    x: Var,
    w: &'m Param,
    b: Option<&'m Param>,
    how: ConvTranspose3d,
) -> Result<Var> {
    run(cx, x, w, b, how, None)
}

pub(super) fn run<'m>(
    cx: &mut Ctx<'m>,
    x: Var,
    w: &'m Param,
    b: Option<&'m Param>,
    how: ConvTranspose3d,
    name: Option<&str>,
) -> Result<Var> {
    let (geometry, dims) = geometry(x.value().dims(), w, b, how)?;
    on_card!(cx.device(), {
        how.is_upsampling(w)?;
        let node = x.node();
        let (y, input) = super::cuda::conv_transpose3d(cx, x.into_value(), w, b, dims)?;
        Ok(cx.record(y, &[node], || Box::new(Recorded { input, w, b, how })))
    });
    let (node, input) = (x.node(), x.into_value());
    let x = floats(OP, input.clone())?;
    let mut out = Tensor::empty(dims, Layout::BLOCKED, cx.device())?;
    let (filter, bias) = (w.value().as_slice(), b.map(|b| b.value().as_slice()));
    let p = Problem { geometry, input: x.as_slice(), filter, bias };
    compute!(cx.device(), conv_transpose3d::forward(name, &p, memory(OP, &mut out)?), Ok(()))?;
    Ok(cx.record(out, &[node], || Box::new(Recorded { input, w, b, how })))
}

/// What the way back needs.
struct Recorded<'m> {
    /// As it came.
    input: Tensor,
    w: &'m Param,
    b: Option<&'m Param>,
    how: ConvTranspose3d,
}

impl<'m> Backward<'m> for Recorded<'m> {
    fn name(&self) -> &'static str {
        OP
    }

    fn saved<'s>(&'s self, visit: &mut dyn FnMut(&'s Tensor)) {
        visit(&self.input);
    }

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, grads: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self { input, w, b, how } = *self;
        #[cfg(feature = "cuda")]
        let [dx, dw, db] = match cx.device().is_cpu() {
            true => gradients(cx, input, w, b, how, &dy, None)?,
            false => super::cuda::conv_transpose3d_gradients(cx, input, w, b, &dy)?,
        };
        #[cfg(not(feature = "cuda"))]
        let [dx, dw, db] = gradients(cx, input, w, b, how, &dy, None)?;
        for (p, g) in [(Some(w), dw), (b, db)] {
            if let (Some(p), Some(g)) = (p, g) {
                grads.add_param(p.id(), g)?;
            }
        }
        Ok(vec![dx])
    }
}

/// Gradients by the input, the filter and, where there is one, the bias; those of parameters in their packed order.
pub(super) fn gradients(
    cx: &Ctx<'_>,
    x: Tensor,
    w: &Param,
    b: Option<&Param>,
    how: ConvTranspose3d,
    dy: &Tensor,
    name: Option<&str>,
) -> Result<[Option<Tensor>; 3]> {
    let (geometry, dims) = geometry(x.dims(), w, b, how)?;
    if *dy.dims() != dims || dy.layout() != Layout::BLOCKED {
        return Err(Error::shape(OP, format!("a gradient of {:?} for a result {dims:?}", dy.dims())));
    }
    let device = cx.device();
    let x = floats(OP, x)?;
    let p = Gradient { geometry, input: x.as_slice(), filter: w.value().as_slice(), output: dy.as_slice() };
    let like = |t: &Tensor| Tensor::empty(*t.dims(), t.layout(), device);
    let [turned, slices] = gradient_room(&geometry);
    // One after the other, in the same room.
    let mut room = Tensor::empty(Dims::from([turned.max(slices)]), Layout::PLAIN, device)?;
    let room = memory(OP, &mut room)?;
    let (mut dx, mut dw) = (like(&x)?, like(w.value())?);
    compute!(device, conv_transpose3d::input_gradient(name, &p, room, memory(OP, &mut dx)?), Ok(()))?;
    compute!(device, conv_transpose3d::filter_gradient(name, &p, room, memory(OP, &mut dw)?), Ok(()))?;
    let mut db = b.map(|b| like(b.value())).transpose()?;
    if let Some(db) = &mut db {
        let space = geometry.output.iter().product();
        let to = memory(OP, db)?;
        compute!(device, channel_sums::channel_sums(space, dy.as_slice(), to), ());
    }
    Ok([Some(dx), Some(dw), db])
}

/// The problem's sizes, with every buffer's length checked against them, and those of the result.
pub(super) fn geometry(x: &Dims, w: &Param, b: Option<&Param>, how: ConvTranspose3d) -> Result<(Geometry, Dims)> {
    let out = how.output_dims(x, w.dims())?;
    let [batch, in_channels, input @ ..] = x.five();
    let [_, out_channels, kernel @ ..] = w.dims().five();
    if w.value().device().is_cpu() && w.value().dims().len() != packed_len(w.dims().five()) {
        return Err(Error::shape(OP, format!("filter {:?} is not packed", w.dims())));
    }
    if let Some(b) = b
        && (b.dims().as_slice() != [out_channels] || b.value().dims().len() != Layout::BLOCKED.padded(out_channels))
    {
        return Err(Error::shape(OP, format!("bias of size {:?}, expected [{out_channels}]", b.dims())));
    }
    let (output, stride, padding) = (out.space(), how.stride, how.padding);
    Ok((Geometry { batch, in_channels, out_channels, input, output, kernel, stride, padding }, out))
}

/// Packs a filter given in `[I, O, kD, kH, kW]` order for `device`.
///
/// # Errors
/// [`Error::Shape`] when the number of values is not the product of `dims`; [`Error::OutOfMemory`].
pub fn pack_transposed_filter(values: &[f32], dims: [usize; 5], device: &Device) -> Result<Tensor> {
    if device.is_rehearsal() {
        let [i, o, kernel @ ..] = dims;
        let whole = kernel.iter().fold(Layout::BLOCKED.padded(i) * Layout::BLOCKED.padded(o), |n, k| n * k);
        let len = if device.is_cpu() { packed_len(dims) } else { whole };
        return Tensor::empty(Dims::from([len]), Layout::PLAIN, device);
    }
    if values.len() != dims.iter().product::<usize>() {
        let what = format!("{} values for a filter {dims:?}", values.len());
        return Err(Error::shape("pack_transposed_filter", what));
    }
    on_card!(device, super::cuda::pack_transposed_filter(values, dims, device));
    let mut out = Tensor::empty(Dims::from([packed_len(dims)]), Layout::PLAIN, device)?;
    let to = memory("pack_transposed_filter", &mut out)?;
    dispatch!(device, conv_transpose3d::pack_filter(values, dims, to));
    Ok(out)
}

/// The values of a filter of sizes `[I, O, kD, kH, kW]` from [`pack_transposed_filter`], in that order.
///
/// # Errors
/// [`Error::Shape`] when `packed` is no packed filter of these sizes; [`Error::Device`].
pub fn unpack_transposed_filter(packed: &Tensor, dims: [usize; 5]) -> Result<Vec<f32>> {
    on_card!(packed.device(), {
        let [i, o, d, h, w] = dims;
        let (taps, turned) = (d * h * w, super::cuda::unpack_filter(packed, [o, i, d * h * w])?);
        let at = |n: usize| turned[(n / taps % o * i + n / (o * taps)) * taps + n % taps];
        Ok((0..turned.len()).map(at).collect())
    });
    if packed.precision() != Precision::F32 || packed.as_slice().len() != packed_len(dims) {
        return Err(Error::shape("unpack_transposed_filter", format!("{:?} for a filter {dims:?}", packed.dims())));
    }
    let mut out = vec![0.0; dims.iter().product()];
    dispatch!(packed.device(), conv_transpose3d::unpack_filter(packed.as_slice(), dims, &mut out));
    Ok(out)
}
