//! Steps of optimizers on parameters where they lie: what the rules of `nn::optim` are made of.

use super::{memory, processor, same_device};
use crate::backend::compute;
use crate::backend::cpu::optim as backend;
use crate::error::{Error, Result};
use crate::tensor::{Device, Precision, Tensor};

pub(crate) use crate::backend::cpu::optim::{Adam, Sgd};

/// A parameter's values and what belongs to them, all in the parameter's order and stored as f32.
#[derive(Debug)]
pub(crate) struct Update<'u, const N: usize, H> {
    pub(crate) value: &'u mut Tensor,
    pub(crate) gradient: &'u Tensor,
    /// What the optimizer keeps.
    pub(crate) kept: &'u mut [Tensor; N],
    pub(crate) how: H,
}

/// One step of stochastic gradient descent on all of `updates`.
///
/// # Errors
/// [`Error::Shape`] when sizes differ; [`Error::Unsupported`] on a card or for values that are not stored as f32.
pub(crate) fn sgd(device: &Device, updates: Vec<Update<'_, 1, Sgd>>, name: Option<&str>) -> Result<()> {
    let updates = updates.into_iter().map(|u| slices(device, u)).collect::<Result<_>>()?;
    compute!(device, optim::sgd(name, updates), Ok(()))
}

/// One step of Adam on all of `updates`.
///
/// # Errors
/// As [`sgd`].
pub(crate) fn adam(device: &Device, updates: Vec<Update<'_, 2, Adam>>, name: Option<&str>) -> Result<()> {
    let updates = updates.into_iter().map(|u| slices(device, u)).collect::<Result<_>>()?;
    compute!(device, optim::adam(name, updates), Ok(()))
}

/// The sum of squares of all values, pad lanes included; not finite exactly if a value is not.
///
/// # Errors
/// [`Error::Unsupported`] on a card or for values that are not stored as f32.
pub(crate) fn squares(x: &Tensor, name: Option<&str>) -> Result<f64> {
    floats(x)?;
    compute!(x.device(), optim::squares(name, x.as_slice()), Ok(0.0))
}

/// An error unless the values are floats of the processor.
pub(crate) fn floats(x: &Tensor) -> Result<()> {
    processor("optim", x.device())?;
    match x.precision() {
        Precision::F32 => Ok(()),
        other => Err(Error::unsupported(format!("training of parameters stored as {}; float32 is", other.name()))),
    }
}

fn slices<'u, const N: usize, H>(device: &Device, u: Update<'u, N, H>) -> Result<backend::Update<'u, N, H>> {
    floats(u.value)?;
    floats(u.gradient)?;
    same_device("optim", device, u.value.device())?;
    let value = memory("optim", u.value)?;
    let gradient = u.gradient.as_slice();
    let mut kept = Vec::with_capacity(N);
    for k in u.kept {
        kept.push(memory("optim", k)?);
    }
    let lens: Vec<usize> = kept.iter().map(|k| k.len()).chain([gradient.len()]).collect();
    match kept.try_into() {
        Ok(kept) if lens.iter().all(|n| *n == value.len()) => Ok(backend::Update { value, gradient, kept, how: u.how }),
        _ => Err(Error::shape("optim", format!("{lens:?} values for a parameter of {}", value.len()))),
    }
}
