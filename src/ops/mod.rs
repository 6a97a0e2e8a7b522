//! Floor 4: one file per operation: documentation, shape rule, forward.
//!
//! Every operation takes its inputs by value. The last owner of a tensor gives its memory to the result where the
//! operation can work in place; a clone kept elsewhere is never changed.

mod add;
mod avg_pool;
pub(crate) mod blur;
mod conv3d;
#[doc(hidden)]
pub mod conv3d_grad;
mod conv_transpose3d;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) use cuda::patch;
pub(crate) mod head;
mod head_labels;
mod head_loss;
mod instance_norm;
pub(crate) mod intensity;
mod lazy;
mod leaky_relu;
mod loss;
pub(crate) mod low_resolution;
pub(crate) mod optim;
pub(crate) mod resample;
#[doc(hidden)]
pub mod testing;
mod upsample_nearest;
pub(crate) mod warp;

pub use add::add;
pub use avg_pool::avg_pool;
pub use conv_transpose3d::{ConvTranspose3d, conv_transpose3d, pack_transposed_filter, unpack_transposed_filter};
pub use conv3d::{
    Conv3d, Conv3dMemory, conv3d, conv3d_measured, conv3d_memory, conv3d_residual, conv3d_residual_memory, pack_filter,
    pack_vector, unpack_filter, unpack_vector,
};
pub use head_labels::head_labels;
pub use head_loss::{LossValue, Target, head_loss};
pub use instance_norm::{InstanceNorm, instance_norm};
pub use lazy::{Affine, Moments, Source, Sources};
pub use leaky_relu::leaky_relu;
pub use loss::{LabelMap, Loss, Outputs, loss, weighted_sum};
pub use upsample_nearest::upsample_nearest;

use crate::backend::compute;
use crate::error::{Error, Result};
use crate::tensor::{Device, Dims, Layout, Precision, StoredMut, Tensor};

/// An error if the device is a card: for what has no kernel there.
fn processor(op: &'static str, device: &crate::tensor::Device) -> Result<()> {
    if device.is_cpu() {
        return Ok(());
    }
    Err(Error::unsupported(format!("{op} on {}: there is no kernel for it", device.name())))
}

/// An error if something of the processor's meets something of a card's, or of another card's.
fn same_device(op: &'static str, a: &crate::tensor::Device, b: &crate::tensor::Device) -> Result<()> {
    if a.shares_memory(b) {
        return Ok(());
    }
    Err(Error::Device { what: format!("{op}: a tensor of {} on {}", b.name(), a.name()) })
}

/// Leaves for the operation's card side with its result, if the device is a card.
macro_rules! on_card {
    ($device:expr, $run:expr) => {
        #[cfg(feature = "cuda")]
        if !$device.is_cpu() {
            return $run;
        }
    };
}
use on_card;

/// The sizes of an activation, none of them zero.
fn activation(op: &'static str, dims: &Dims) -> Result<[usize; 5]> {
    if dims.as_slice().len() != 5 || dims.is_empty() {
        return Err(Error::shape(op, format!("input {dims:?}, expected [N, C, D, H, W] without zeros")));
    }
    Ok(dims.five())
}

/// `x` in the layout that the device computes with, stored as floats: for operations that have no form for another storage.
fn floats(op: &'static str, x: Tensor) -> Result<Tensor> {
    let x = blocked(op, x)?;
    if x.precision() == Precision::F32 {
        return Ok(x);
    }
    let mut out = Tensor::empty(*x.dims(), Layout::BLOCKED, x.device())?;
    let to = memory(op, &mut out)?;
    compute!(x.device(), stored::widen_all(x.stored(), to), ());
    Ok(out)
}

/// `x` in the layout that its device computes with, whichever that is.
fn computed_with(op: &'static str, x: Tensor) -> Result<Tensor> {
    on_card!(x.device(), {
        let precision = x.precision();
        cuda::as_voxels(op, x, precision)
    });
    blocked(op, x)
}

/// `x` in the layout that the processor computes with; only the network's input arrives in another.
fn blocked(op: &'static str, x: Tensor) -> Result<Tensor> {
    processor(op, x.device())?;
    if x.layout() == Layout::BLOCKED {
        return Ok(x);
    }
    let [_, c, d, h, w] = activation(op, x.dims())?;
    let mut out = Tensor::empty(*x.dims(), Layout::BLOCKED, x.device())?;
    let to = memory(op, &mut out)?;
    compute!(x.device(), relayout::to_blocked(c, d * h * w, x.as_slice(), to), ());
    Ok(out)
}

/// A gradient that no one else has, to be overwritten.
fn unshared(op: &'static str, g: Tensor) -> Result<Tensor> {
    if g.is_unique() {
        return Ok(g);
    }
    let mut copy = Tensor::empty(*g.dims(), g.layout(), g.device())?;
    memory(op, &mut copy)?.copy_from_slice(g.as_slice());
    Ok(copy)
}

/// A filter whose values do not matter, of so many values where it is the processor's.
fn blank_filter(packed_len: usize, dims: [usize; 5], precision: Precision, device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    let packed_len = if device.is_cpu() { packed_len } else { cuda::packed_len(dims, precision) };
    #[cfg(not(feature = "cuda"))]
    let _ = dims;
    Tensor::empty_in(Dims::from([packed_len]), Layout::PLAIN, precision, device)
}

/// The memory of a tensor that has just been made or found unshared, as it is stored.
fn stored_memory<'t>(op: &'static str, x: &'t mut Tensor) -> Result<StoredMut<'t>> {
    x.stored_mut().ok_or_else(|| Error::shape(op, "the output's memory is shared"))
}

/// The memory of a tensor of floats that has just been made or found unshared.
fn memory<'t>(op: &'static str, x: &'t mut Tensor) -> Result<&'t mut [f32]> {
    x.as_mut_slice().ok_or_else(|| Error::shape(op, "the output's memory is shared"))
}
