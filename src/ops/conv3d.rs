//! 3D convolution.

use crate::autograd::{Ctx, Param, Var};
use crate::error::Result;
use crate::tensor::{Device, Tensor};

/// Stride and zero padding per axis (z, y, x); the kernel size comes from the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv3d {
    /// 1 or 2 per axis.
    pub stride: [usize; 3],
    /// Zeros on each side.
    pub padding: [usize; 3],
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

/// See the owner of this file.
pub fn conv3d<'m>(cx: &mut Ctx<'m>, x: Sources, w: &'m Param, b: Option<&'m Param>, how: Conv3d) -> Result<Var> {
    let _ = (cx.device(), w.value(), b, how, &x);
    Err(crate::Error::shape("conv3d", "skeleton"))
}

/// Packs.
pub fn pack_filter(values: &[f32], dims: [usize; 5], _inputs: &[usize], device: &Device) -> Result<Tensor> {
    Tensor::from_host(values, dims.into(), device)
}

/// Packs.
pub fn pack_vector(values: &[f32], device: &Device) -> Result<Tensor> {
    Tensor::from_host(values, [values.len()].into(), device)
}
