//! Floor 5: parameters, modules, layers. Knows no concrete network.

mod init;
mod layers;
mod optim;
mod param;

pub use init::{RandomParams, Scheme};
pub use layers::{Conv3d, ConvTranspose3d, InstanceNorm};
pub use optim::{Optimizer, PolyLr, Rule, StepNorms};
pub use param::{ParamSource, filter, pack, set_values, transposed_filter, unpack, values, vector};

use crate::autograd::{Ctx, Param, Var};
use crate::error::Result;

/// Something with parameters that maps one value to another.
pub trait Module {
    /// Runs forward; consumes `x`, so that its memory is free as soon as it is no longer needed.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] when `x` does not fit; [`crate::Error::OutOfMemory`].
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var>;

    /// Shows every parameter, in the order in which PyTorch's module of the same network registers them: files of optimizers
    /// count them so.
    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param));

    /// As [`Module::params`], to be changed.
    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param));
}
