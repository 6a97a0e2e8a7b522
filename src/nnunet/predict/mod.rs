//! From image to segmentation.

pub(crate) mod export;
