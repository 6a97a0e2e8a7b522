//! Floor 1: what a tensor is and where it lives. No arithmetic on values.
//!
//! Logical order is always `[N, C, D, H, W]` with space as (z, y, x); the physical order is the [`Layout`]'s business.

mod arena;
pub(crate) mod buffer;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod dims;
mod dtype;
mod layout;
mod pool;

use std::sync::Arc;

pub use device::{CpuDevice, CudaStatus, Device, Isa, MemoryReport, cuda_status};
pub use dims::Dims;
pub use dtype::{DType, Precision};
pub use layout::{BLOCK, Layout};

use crate::error::{Error, Result};
use buffer::Buffer;

/// An array of f32 on a device. Cloning shares the memory; an operation that is given the last owner may write in
/// place.
///
/// Invariant: pad lanes (channels past C inside a block) are zero before and after every operation.
#[derive(Debug, Clone)]
pub struct Tensor {
    buf: Arc<Buffer>,
    dims: Dims,
    layout: Layout,
    device: Device,
}

impl Tensor {
    /// Memory for `dims` in `layout`, with unspecified (but initialised) values: the caller writes every element,
    /// pad lanes too.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the device's limit would be exceeded.
    pub(crate) fn empty(dims: Dims, layout: Layout, device: &Device) -> Result<Self> {
        let buf = Arc::new(device.alloc(layout.len(&dims))?);
        Ok(Self { buf, dims, layout, device: device.clone() })
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
        t.as_mut_slice().ok_or_else(|| Error::shape("from_host", "fresh memory is shared"))?.copy_from_slice(values);
        Ok(t)
    }

    /// The values in `[N, C, D, H, W]` order.
    #[must_use]
    pub fn to_host(&self) -> Vec<f32> {
        let (d, x) = (self.dims.five(), self.as_slice());
        if self.layout == Layout::PLAIN {
            return x.to_vec();
        }
        let space = d[2] * d[3] * d[4];
        let mut out = vec![0.0; self.dims.len()];
        for (nc, plane) in out.chunks_exact_mut(space.max(1)).enumerate() {
            let start = self.layout.offset(&self.dims, [nc / d[1], nc % d[1], 0, 0, 0]);
            for (o, v) in plane.iter_mut().zip(x[start..].iter().step_by(self.layout.block)) {
                *o = *v;
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

    /// The whole memory in physical order, pad lanes included.
    pub(crate) fn as_slice(&self) -> &[f32] {
        self.buf.as_slice()
    }

    /// The whole memory for writing, if no other tensor shares it.
    pub(crate) fn as_mut_slice(&mut self) -> Option<&mut [f32]> {
        Arc::get_mut(&mut self.buf).map(Buffer::as_mut_slice)
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
        assert_eq!(t.to_host(), v);
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
        assert!(t.to_host().iter().enumerate().all(|(i, &v)| v == i as f32));
    }
}
