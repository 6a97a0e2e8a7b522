//! Values of one channel on the host, before there are tensors: maps, statistics, power curves, noise.

pub(crate) use crate::backend::cpu::intensity::{Flip, Map, Power, Stats, add_noise, power, put, put_labels, stats};
