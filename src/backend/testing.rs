//! The door for tests of the CUDA backend: its kernels through any [`crate::tensor::cuda::Driver`]. No promise of stability.

pub use super::cuda;
