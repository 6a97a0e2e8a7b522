//! Floor 3: the context of a forward pass. Names no operation.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::error::Result;
use crate::tensor::{Device, Dims, Precision, Tensor};

/// What a forward pass needs and no tensor knows: where it runs. `'m` is the borrow of the model whose parameters
/// the pass reads, so that they need no reference counts and cannot change meanwhile.
#[derive(Debug)]
pub struct Ctx<'m> {
    device: Device,
    model: PhantomData<&'m ()>,
    strict: bool,
    precision: Precision,
    steps: Option<Vec<Step>>,
}

/// One operation of a pass, as [`Ctx::traced`] records it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Step {
    /// The operation.
    pub operation: &'static str,
    /// Its sizes.
    pub what: String,
    /// Which implementation ran.
    pub implementation: &'static str,
    /// Wall time.
    pub seconds: f64,
    /// Multiply-accumulates that the operation stands for, however few were done; 0 where it has none.
    pub macs: u64,
}

impl Ctx<'_> {
    /// A pass that remembers nothing: a value's memory is free as soon as its last use is over.
    #[must_use]
    pub fn infer(device: &Device) -> Self {
        Self { device: device.clone(), model: PhantomData, strict: false, precision: Precision::F32, steps: None }
    }

    /// With `on`, only implementations as accurate as adding up all products one after the other. Without, which is
    /// how a pass begins, faster ones whose rounding errors are a few times larger.
    #[must_use]
    pub fn strict(mut self, on: bool) -> Self {
        self.strict = on;
        self
    }

    /// A pass whose convolutions store their results in `precision`.
    #[must_use]
    pub fn storing(mut self, precision: Precision) -> Self {
        self.set_precision(precision);
        self
    }

    /// As [`Ctx::storing`], from here on; returns what was before.
    pub(crate) fn set_precision(&mut self, precision: Precision) -> Precision {
        std::mem::replace(&mut self.precision, precision)
    }

    /// How results are stored.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// A pass that records what takes its time, convolutions, normalisations and heads; see [`Ctx::steps`].
    #[must_use]
    pub fn traced(mut self) -> Self {
        self.steps = Some(Vec::new());
        self
    }

    /// What has been recorded so far, if the pass is [`Ctx::traced`].
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        self.steps.as_deref().unwrap_or_default()
    }

    pub(crate) fn is_strict(&self) -> bool {
        self.strict
    }

    /// The time, if anyone wants to know.
    pub(crate) fn clock(&self) -> Option<Instant> {
        self.steps.is_some().then(Instant::now)
    }

    /// Records an operation that began at `clock`.
    pub(crate) fn note(
        &mut self,
        operation: &'static str,
        clock: Option<Instant>,
        implementation: &'static str,
        macs: u64,
        what: impl FnOnce() -> String,
    ) {
        if let (Some(steps), Some(clock)) = (&mut self.steps, clock) {
            let seconds = clock.elapsed().as_secs_f64();
            steps.push(Step { operation, what: what(), implementation, seconds, macs });
        }
    }

    /// The device of this pass.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A value that enters the pass from outside.
    #[must_use]
    pub fn leaf(&mut self, value: Tensor) -> Var {
        Var { value }
    }
}

/// A value in a forward pass. Moving a `Var` into its last use lets the operation reuse its memory; a skip
/// connection is a visible `clone()`, which copies no data.
#[derive(Debug, Clone)]
pub struct Var {
    pub(crate) value: Tensor,
}

impl Var {
    /// The tensor.
    #[must_use]
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The tensor, giving up the variable.
    #[must_use]
    pub fn into_value(self) -> Tensor {
        self.value
    }
}

/// A parameter of a model: its values, in the order its device computes with.
#[derive(Debug)]
pub struct Param {
    value: Tensor,
    dims: Dims,
    /// Other forms of the values that an operation keeps, by its key.
    derived: Mutex<Vec<(u64, Arc<Tensor>)>>,
}

impl Param {
    /// `value` holds a parameter of logical size `dims`, packed for its device.
    pub(crate) fn new(value: Tensor, dims: Dims) -> Self {
        Self { value, dims, derived: Mutex::default() }
    }

    /// Logical sizes: `[O, I, kD, kH, kW]` of a filter (`[I, O, ..]` of a transposed convolution's), `[C]` of a vector.
    #[must_use]
    pub fn dims(&self) -> &Dims {
        &self.dims
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
        self.forms().iter().map(|(_, f)| 4 * f.as_slice().len()).sum()
    }

    fn forms(&self) -> MutexGuard<'_, Vec<(u64, Arc<Tensor>)>> {
        // A list that only grows: a panic elsewhere leaves nothing half done in it.
        self.derived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
