//! Floor 0: knows nothing of tensors.

pub(crate) mod json;
pub(crate) mod mt19937;
pub(crate) mod par;
pub mod progress;
pub(crate) mod rng;
