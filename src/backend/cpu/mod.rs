//! CPU kernels: scalar reference, AVX2 and AVX-512, chosen at run time.
pub(crate) mod head;
