//! Affine maps of images and labels on the host, before there are tensors.

pub(crate) use crate::backend::cpu::warp::{Warp, warp};
