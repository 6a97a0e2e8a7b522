//! Resampling of lines of an image on the host, before there are tensors: the axes of nnU-Net's resampling.

pub(crate) use crate::backend::cpu::resample::{Four, LANES, Lane, Pair, cubic, linear, prefilter};
