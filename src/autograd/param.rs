//! Parameters: what a model learns.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::tensor::{Dims, Precision, Tensor};

/// Tells parameters apart, for as long as the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(u64);

impl ParamId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What a parameter is to its operation, which decides the order of its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamKind {
    /// `[O, I, kD, kH, kW]`, of a convolution.
    Filter,
    /// `[I, O, kD, kH, kW]`, of a transposed convolution.
    TransposedFilter,
    /// `[C]`: a bias, or the weight of a normalisation.
    Vector,
}

/// A parameter of a model: its values, in the order its device computes with.
#[derive(Debug)]
pub struct Param {
    id: ParamId,
    name: String,
    value: Tensor,
    dims: Dims,
    kind: ParamKind,
    planar: bool,
    /// Other forms of the values that an operation keeps, by its key.
    derived: Mutex<Vec<(u64, Arc<Tensor>)>>,
}

impl Param {
    /// `value` holds the parameter `name` of logical size `dims`, packed for its device: a vector if it has one axis, else
    /// the filter of a convolution.
    pub(crate) fn new(name: impl Into<String>, value: Tensor, dims: Dims) -> Self {
        let kind = if dims.as_slice().len() == 1 { ParamKind::Vector } else { ParamKind::Filter };
        Self { id: ParamId::next(), name: name.into(), value, dims, kind, planar: false, derived: Mutex::default() }
    }

    /// The same as the filter of a transposed convolution.
    pub(crate) fn transposed(self) -> Self {
        Self { kind: ParamKind::TransposedFilter, ..self }
    }

    /// Who it is, to find its gradient.
    #[must_use]
    pub fn id(&self) -> ParamId {
        self.id
    }

    /// Its name in the model's files, as PyTorch would call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Logical sizes: `[O, I, kD, kH, kW]` of a filter (`[I, O, ..]` of a transposed convolution's), `[C]` of a vector.
    #[must_use]
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// Its sizes as files have them: those of [`Param::dims`], but a filter of a 2D network has no axis of depth.
    #[must_use]
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = self.dims.as_slice().to_vec();
        if self.planar && shape.len() == 5 {
            shape.remove(2);
        }
        shape
    }

    /// Makes it one of a 2D network.
    pub(crate) fn set_planar(&mut self) {
        self.planar = true;
    }

    /// What it is to its operation.
    #[must_use]
    pub fn kind(&self) -> ParamKind {
        self.kind
    }

    /// How the values are stored.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.value.precision()
    }

    /// The packed values.
    pub(crate) fn value(&self) -> &Tensor {
        &self.value
    }

    /// The packed values, to be changed: other forms of them are forgotten.
    pub(crate) fn value_mut(&mut self) -> &mut Tensor {
        self.derived.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        &mut self.value
    }

    /// The form of the values that belongs to `key`, made by `make` when it is asked for first.
    pub(crate) fn derived(&self, key: u64, make: impl FnOnce() -> Result<Tensor>) -> Result<Arc<Tensor>> {
        let find = |forms: &[(u64, Arc<Tensor>)]| forms.iter().find(|(k, _)| *k == key).map(|(_, f)| f.clone());
        if let Some(form) = find(&self.forms()) {
            return Ok(form);
        }
        // Not under the lock: a thread that waits for its part of the making may run another pass that asks for the same
        // form. Two passes that both make it make the same.
        let form = Arc::new(make()?);
        let mut forms = self.forms();
        if let Some(form) = find(&forms) {
            return Ok(form);
        }
        forms.push((key, form.clone()));
        Ok(form)
    }

    /// Bytes of all such forms.
    pub(crate) fn derived_bytes(&self) -> usize {
        self.forms().iter().map(|(_, f)| f.bytes()).sum()
    }

    /// All such forms with their keys.
    #[cfg(feature = "cuda")]
    pub(crate) fn all_derived(&self) -> Vec<(u64, Arc<Tensor>)> {
        self.forms().clone()
    }

    fn forms(&self) -> MutexGuard<'_, Vec<(u64, Arc<Tensor>)>> {
        // A list that only grows: a panic elsewhere leaves nothing half done in it.
        self.derived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
