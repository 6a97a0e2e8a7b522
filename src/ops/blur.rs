//! Separable filters of one channel on the host, before there are tensors.

pub(crate) use crate::backend::cpu::blur::{Kernel, TAPS, blur};
