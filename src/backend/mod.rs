//! Floor 2: arithmetic on buffers. No gradients, no policy.

pub(crate) mod cpu;
