//! Floor 5: parameters, modules, layers. Knows no concrete network.

mod layers;
mod param;

pub use layers::{Conv3d, ConvTranspose3d, InstanceNorm};
pub use param::{ParamSource, filter, transposed_filter, vector};

use crate::autograd::{Ctx, Var};
use crate::error::Result;

/// Something with parameters that maps one value to another.
pub trait Module {
    /// Runs forward; consumes `x`, so that its memory is free as soon as it is no longer needed.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] when `x` does not fit; [`crate::Error::OutOfMemory`].
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var>;
}
