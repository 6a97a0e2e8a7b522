//! Floor 4: one file per operation: documentation, shape rule, forward.

mod conv3d;
mod instance_norm;

pub use conv3d::{Conv3d, Sources, conv3d, pack_filter, pack_vector};
pub use instance_norm::{InstanceNorm, instance_norm};
