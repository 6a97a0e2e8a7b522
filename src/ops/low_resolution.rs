//! Images seen through coarser grids, on the host, before there are tensors.

pub(crate) use crate::backend::cpu::low_resolution::low_resolution;
