//! Floor 1: what a tensor is and where it lives. No arithmetic on values.
//!
//! Logical order is always `[N, C, D, H, W]` with space as (z, y, x); the physical order is the [`Layout`]'s business.

mod arena;
pub(crate) mod buffer;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod cuda;
mod device;
mod dims;
mod dtype;
mod layout;
mod pool;
mod stored;

use std::sync::Arc;

pub use device::{CpuDevice, CudaStatus, Device, Isa, MemoryReport, cuda_status};
pub use dims::Dims;
pub use dtype::{DType, Precision};
pub use layout::{BLOCK, Layout};
pub(crate) use stored::{Stored, StoredMut, narrowed, widened};

use crate::error::{Error, Result};
use buffer::Buffer;

/// An array of numbers on a device, stored as f32, bf16 or (on cards) f16. Cloning shares the memory; an operation that is
/// given the last owner may write in place.
///
/// Invariant: pad lanes (channels past C inside a block) are zero before and after every operation.
#[derive(Debug, Clone)]
pub struct Tensor {
    buf: Arc<Buffer>,
    dims: Dims,
    layout: Layout,
    precision: Precision,
    device: Device,
}

impl Tensor {
    /// Memory for `dims` in `layout`, with unspecified (but initialised) values: the caller writes every element,
    /// pad lanes too.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the device's limit would be exceeded.
    pub(crate) fn empty(dims: Dims, layout: Layout, device: &Device) -> Result<Self> {
        Self::empty_in(dims, layout, Precision::F32, device)
    }

    /// As [`Tensor::empty`], for values that are stored in `precision`.
    ///
    /// # Errors
    /// As [`Tensor::empty`].
    pub(crate) fn empty_in(dims: Dims, layout: Layout, precision: Precision, device: &Device) -> Result<Self> {
        if precision == Precision::F16 && device.is_cpu() {
            return Err(Error::unsupported("float16 on the processor, expected float32 or bfloat16"));
        }
        #[cfg(feature = "cuda")]
        if precision == Precision::Bf16 && device.driver().is_some_and(|d| d.capability()[0] < 8) {
            let what =
                format!("bfloat16 on {}, whose compute capability is below 8.0: expected float16", device.name());
            return Err(Error::unsupported(what));
        }
        let floats = match precision {
            Precision::F32 => layout.len(&dims),
            Precision::Bf16 | Precision::F16 => layout.len(&dims).div_ceil(2),
        };
        let buf = Arc::new(device.alloc(floats)?);
        Ok(Self { buf, dims, layout, precision, device: device.clone() })
    }

    /// Copies `values` in `[N, C, D, H, W]` order to the device, in the plain layout.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of values is not the product of `dims`; [`Error::OutOfMemory`].
    pub fn from_host(values: &[f32], dims: Dims, device: &Device) -> Result<Self> {
        if values.len() != dims.len() {
            return Err(Error::shape("from_host", format!("{} values for {dims:?}", values.len())));
        }
        let mut t = Self::empty(dims, Layout::PLAIN, device)?;
        #[cfg(feature = "cuda")]
        if let (Some(driver), Some(memory)) = (device.driver(), t.cuda()) {
            driver.upload(memory, bytemuck::cast_slice(values))?;
            return Ok(t);
        }
        t.as_mut_slice().ok_or_else(|| Error::shape("from_host", "fresh memory is shared"))?.copy_from_slice(values);
        Ok(t)
    }

    /// The values in `[N, C, D, H, W]` order.
    ///
    /// # Errors
    /// [`Error::Device`] when a card does not hand them out; never of the processor's.
    pub fn to_host(&self) -> Result<Vec<f32>> {
        #[cfg(feature = "cuda")]
        if let (Some(driver), Some(memory)) = (self.device.driver(), self.cuda()) {
            let mut bytes = vec![0u8; self.layout.len(&self.dims) * self.precision.size()];
            driver.download(memory, &mut bytes)?;
            let halves = || bytemuck::pod_collect_to_vec::<u8, u16>(&bytes);
            return Ok(match self.precision {
                Precision::F32 => self.in_order(Stored::F32(&bytemuck::pod_collect_to_vec::<u8, f32>(&bytes))),
                Precision::Bf16 => self.in_order(Stored::Bf16(&halves())),
                Precision::F16 => {
                    let floats: Vec<f32> = halves().into_iter().map(|h| half::f16::from_bits(h).to_f32()).collect();
                    self.in_order(Stored::F32(&floats))
                }
            });
        }
        Ok(self.in_order(self.stored()))
    }

    /// Values in physical order as `[N, C, D, H, W]`.
    fn in_order(&self, x: Stored<'_>) -> Vec<f32> {
        let d = self.dims.five();
        if self.layout == Layout::PLAIN {
            let mut out = vec![0.0; x.len()];
            x.read(0, &mut out);
            return out;
        }
        let space = d[2] * d[3] * d[4];
        let mut out = vec![0.0; self.dims.len()];
        for (nc, plane) in out.chunks_exact_mut(space.max(1)).enumerate() {
            let start = self.layout.offset(&self.dims, [nc / d[1], nc % d[1], 0, 0, 0]);
            for (i, o) in plane.iter_mut().enumerate() {
                *o = x.get(start + i * self.layout.block);
            }
        }
        out
    }

    /// Logical dimensions.
    #[must_use]
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// Where the memory is.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// As a card's kernels see it, if it is a card's.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> Option<cuda::Memory> {
        self.buf.cuda()
    }

    /// How the values are stored.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The whole memory in physical order, pad lanes included, of a tensor that is stored as f32.
    pub(crate) fn as_slice(&self) -> &[f32] {
        assert!(self.precision == Precision::F32, "bf16 read as f32");
        self.buf.as_slice()
    }

    /// The whole memory for writing, if no other tensor shares it, of a tensor that is stored as f32.
    pub(crate) fn as_mut_slice(&mut self) -> Option<&mut [f32]> {
        assert!(self.precision == Precision::F32, "bf16 written as f32");
        Arc::get_mut(&mut self.buf).map(Buffer::as_mut_slice)
    }

    /// The whole memory in physical order, pad lanes included, of a tensor of the processor's, which has no f16.
    pub(crate) fn stored(&self) -> Stored<'_> {
        match self.precision {
            Precision::F32 => Stored::F32(self.buf.as_slice()),
            Precision::Bf16 | Precision::F16 => {
                Stored::Bf16(&bytemuck::cast_slice(self.buf.as_slice())[..self.layout.len(&self.dims)])
            }
        }
    }

    /// The whole memory for writing, if no other tensor shares it.
    pub(crate) fn stored_mut(&mut self) -> Option<StoredMut<'_>> {
        let len = self.layout.len(&self.dims);
        let memory = Arc::get_mut(&mut self.buf)?.as_mut_slice();
        Some(match self.precision {
            Precision::F32 => StoredMut::F32(memory),
            Precision::Bf16 | Precision::F16 => StoredMut::Bf16(&mut bytemuck::cast_slice_mut(memory)[..len]),
        })
    }

    /// The same number for tensors that share their memory, another one for all others that are alive.
    pub(crate) fn identity(&self) -> usize {
        Arc::as_ptr(&self.buf).addr()
    }

    /// Bytes of its memory, pad lanes included.
    pub(crate) fn bytes(&self) -> usize {
        self.layout.len(&self.dims) * self.precision.size()
    }

    /// True when this is the only owner, so that an operation may write in place.
    pub(crate) fn is_unique(&self) -> bool {
        Arc::strong_count(&self.buf) == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_round_trip_and_shape_error() {
        let dev = Device::cpu();
        let v: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let t = Tensor::from_host(&v, Dims::from([1, 2, 3, 2, 2]), &dev).unwrap();
        assert_eq!(t.to_host().unwrap(), v);
        assert!(Tensor::from_host(&v, Dims::from([1, 2, 3, 2, 3]), &dev).is_err());
    }

    #[test]
    fn blocked_tensor_reads_back_in_logical_order() {
        let dev = Device::cpu();
        let dims = Dims::from([2, 19, 2, 3, 2]);
        let mut t = Tensor::empty(dims, Layout::BLOCKED, &dev).unwrap();
        let layout = t.layout();
        let s = t.as_mut_slice().unwrap();
        s.fill(-1.0);
        let mut k = 0.0;
        for n in 0..2 {
            for c in 0..19 {
                for i in 0..12 {
                    s[layout.offset(&dims, [n, c, i / 6, i / 2 % 3, i % 2])] = k;
                    k += 1.0;
                }
            }
        }
        assert!(t.to_host().unwrap().iter().enumerate().all(|(i, &v)| v == i as f32));
    }
}
