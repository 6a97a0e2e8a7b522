//! The door for tests of the CUDA backend: its kernels through any [`cuda::driver::Driver`]. No promise of stability.

pub use super::cuda;
