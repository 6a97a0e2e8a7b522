//! Floor 5: parameters, modules, layers. Knows no concrete network.
//!
//! A network of one's own, and its training:
//!
//! ```
//! use stunet::autograd::{Ctx, Grads, Param, Var};
//! use stunet::nn::{Conv3d, Module, Optimizer, RandomParams};
//! use stunet::ops::{self, LabelMap, Loss, Outputs};
//! use stunet::tensor::{Dims, Tensor};
//! use stunet::{Device, Result};
//!
//! struct Tiny(Conv3d, Conv3d);
//!
//! impl Module for Tiny {
//!     fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
//!         let x = self.0.run(cx, x)?;
//!         let x = ops::leaky_relu(cx, x, 0.01)?;
//!         self.1.run(cx, x)
//!     }
//!     fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
//!         [&self.0, &self.1].into_iter().for_each(|l| l.params(visit));
//!     }
//!     fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
//!         [&mut self.0, &mut self.1].into_iter().for_each(|l| l.params_mut(visit));
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let device = Device::cpu();
//! let shapes = [("a", vec![8, 1, 3, 3, 3]), ("b", vec![2, 8, 1, 1, 1])];
//! let source = RandomParams::new(1, shapes.into_iter().map(|(n, s)| (format!("{n}.weight"), s)).collect());
//! let layer = |name, out, inputs, k| Conv3d::load(&source, name, out, inputs, [k; 3], [1; 3], &device);
//! let mut net = Tiny(layer("a", 8, 1, 3)?, layer("b", 2, 8, 1)?);
//!
//! let image: Vec<f32> = (0..512).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
//! let bright: Vec<u16> = image.iter().map(|v| u16::from(*v > 0.0)).collect();
//! let target = LabelMap::new(bright, [1, 8, 8, 8])?;
//! let mut optimizer = Optimizer::nnunet();
//! let mut losses = Vec::new();
//! for _ in 0..40 {
//!     let mut cx = Ctx::train(&device); // records what runs in it
//!     let x = cx.leaf(Tensor::from_host(&image, Dims::from([1, 1, 8, 8, 8]), &device)?);
//!     let y = net.forward(&mut cx, x)?;
//!     let (loss, value) = ops::loss(&mut cx, y, &target, &Loss::new(Outputs::Labels))?;
//!     let mut grads = Grads::new();
//!     cx.backward(loss, &mut grads)?;
//!     drop(cx); // it borrows the parameters, which change now
//!     let mut params = Vec::new();
//!     net.params_mut(&mut |p| params.push(p));
//!     optimizer.step(params, &mut grads, 0.01)?;
//!     losses.push(value);
//! }
//! assert!(losses[39] < losses[0] - 0.5, "{losses:?}");
//! # Ok(())
//! # }
//! ```

mod init;
mod layers;
mod optim;
mod param;
mod scaler;

pub use init::{RandomParams, Scheme};
pub use layers::{Conv3d, ConvTranspose3d, InstanceNorm};
pub use optim::{Optimizer, PolyLr, Rule, StepNorms};
pub use param::{ParamSource, filter, pack, set_values, transposed_filter, unpack, values, vector};
pub use scaler::GradScaler;

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
