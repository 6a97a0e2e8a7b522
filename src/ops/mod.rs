//! Floor 4: one file per operation: documentation, shape rule, forward.

mod conv3d;
pub(crate) mod head;
mod instance_norm;

pub use conv3d::{Conv3d, Sources, conv3d, pack_filter, pack_vector};
pub use instance_norm::{InstanceNorm, instance_norm};

/// skeleton
pub fn upsample_nearest(
    _cx: &mut crate::autograd::Ctx<'_>,
    x: crate::autograd::Var,
    _f: [usize; 3],
) -> crate::Result<crate::autograd::Var> {
    Ok(x)
}
