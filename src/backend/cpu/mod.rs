//! CPU kernels: scalar reference, AVX2 and AVX-512, chosen at run time.
//!
//! Work is cut by the problem's shape, never by the number of threads, and every output value is computed by one
//! thread in one fixed order, so the bytes are the same for any number of threads.
#![allow(unsafe_code)]

pub(crate) mod add;
pub(crate) mod avg_pool;
pub(crate) mod blur;
pub(crate) mod channel_sums;
pub(crate) mod conv3d;
pub(crate) mod conv3d_grad;
pub(crate) mod conv_transpose3d;
pub(crate) mod elementary;
pub(crate) mod head;
pub(crate) mod head_argmax;
pub(crate) mod head_labels;
pub(crate) mod instance_norm;
pub(crate) mod instance_norm_grad;
pub(crate) mod intensity;
pub(crate) mod isa;
pub(crate) mod lanes;
pub(crate) mod leaky_relu;
pub(crate) mod loss;
pub(crate) mod low_resolution;
pub(crate) mod moments;
pub(crate) mod optim;
pub(crate) mod probe;
pub(crate) mod relayout;
pub(crate) mod resample;
pub(crate) mod stored;
pub(crate) mod upsample_nearest;
pub(crate) mod warp;

use crate::tensor::BLOCK;

/// Floats per piece of a memory-bound parallel loop: 256 KiB, large against the cost of handing out a piece, small
/// against a level-2 cache.
pub(crate) const PIECE: usize = 1 << 16;

/// Sixteen floats on a cache line of their own.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Line(pub(crate) [f32; BLOCK]);

/// The start of an output that several threads write at places of their own.
pub(crate) struct Shared<T = f32>(*mut T);

// SAFETY: only an address; whoever writes through it promises that no two threads touch the same element.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(out: &mut [T]) -> Self {
        Self(out.as_mut_ptr())
    }

    pub(crate) fn ptr(self) -> *mut T {
        self.0
    }
}
