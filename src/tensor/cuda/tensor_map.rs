//! Tensors that kernels copy boxes of: plain numbers until the driver encodes them for a launch.
#![allow(unsafe_code)]

use std::ffi::c_void;

use cudarc::driver::sys;

use super::calls::{MapCalls, check};

/// Bytes of an encoded map.
pub const MAP: usize = 128;

/// A dense tensor of 16-bit values in five dimensions, the innermost first, and the box that one copy of a kernel takes of it.
///
/// What lies outside of the tensor arrives as zeros. Rows of the box are at most 32 bytes long; their two halves of 16 bytes
/// change places in every other 128 bytes of shared memory (`CU_TENSOR_MAP_SWIZZLE_32B`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap {
    /// Where the tensor starts, a multiple of 16.
    pub address: u64,
    /// Values along each dimension; a multiple of 8 along the first.
    pub sizes: [usize; 5],
    /// Values of the box along each dimension, at most 256.
    pub tile: [u32; 5],
}

impl TensorMap {
    /// Bytes between neighbours along each dimension but the first.
    #[must_use]
    pub fn strides(&self) -> [u64; 4] {
        let mut bytes = 2;
        [0, 1, 2, 3].map(|i| {
            bytes *= self.sizes[i] as u64;
            bytes
        })
    }

    /// What a kernel is given for it.
    ///
    /// # Errors
    /// Says in the driver's words what it refuses.
    pub(super) fn encode(&self, calls: &MapCalls) -> Result<[u8; MAP], String> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, strides, steps) = (self.sizes.map(|n| n as u64), self.strides(), [1; 5]);
        // SAFETY: five sizes, boxes and steps and four strides, as the rank says; the result is a live variable aligned as its
        // type. The address is only written down.
        let code = unsafe {
            (calls.cuTensorMapEncodeTiled)(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                5,
                self.address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                self.tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", code)?;
        Ok(bytemuck::cast(map.opaque))
    }
}

/// The one parameter of an entry: a struct of encoded maps and then these bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter<'a> {
    /// Each [`MAP`] bytes.
    pub maps: &'a [TensorMap],
    /// What stands behind them.
    pub bytes: &'a [u8],
}

impl<'a> From<&'a [u8]> for Parameter<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Parameter { maps: &[], bytes }
    }
}
