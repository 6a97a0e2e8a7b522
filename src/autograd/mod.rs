//! Floor 3: the context of a pass, forward and back. Names no operation.

mod checkpoint;
mod param;
mod tape;

use std::time::Instant;

pub use param::{Param, ParamId, ParamKind};
pub use tape::{Backward, Grads, NodeId, Saved};

use crate::error::Result;
use crate::tensor::{Device, Precision, Tensor};
use tape::Tape;

/// What a pass needs and no tensor knows: where it runs, how precisely, and whether it is recorded for the way back.
/// `'m` is the borrow of the model whose parameters the pass reads, so that they need no reference counts and cannot
/// change meanwhile.
#[derive(Debug)]
pub struct Ctx<'m> {
    device: Device,
    tape: Option<Tape<'m>>,
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

impl<'m> Ctx<'m> {
    /// A pass that remembers nothing: a value's memory is free as soon as its last use is over.
    #[must_use]
    pub fn infer(device: &Device) -> Self {
        Self { device: device.clone(), tape: None, strict: false, precision: Precision::F32, steps: None }
    }

    /// A pass that is recorded, for [`Ctx::backward`].
    #[must_use]
    pub fn train(device: &Device) -> Self {
        Self { tape: Some(Tape::new()), ..Self::infer(device) }
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

    /// A value that enters the pass from outside and needs no gradient.
    #[must_use]
    pub fn leaf(&mut self, value: Tensor) -> Var {
        Var { value, node: None }
    }

    /// A value that enters the pass from outside and whose gradient is wanted, see [`Grads::variable`].
    #[must_use]
    pub fn variable(&mut self, value: Tensor) -> Var {
        let node = self.tape.as_mut().map(|t| t.push(*value.dims(), &[], None));
        Var { value, node }
    }

    /// The result of an operation on values with these nodes. `op` is asked for its way back only when the pass is
    /// recorded.
    #[must_use]
    pub fn record(
        &mut self,
        value: Tensor,
        inputs: &[Option<NodeId>],
        op: impl FnOnce() -> Box<dyn Backward<'m> + 'm>,
    ) -> Var {
        let node = self.tape.as_mut().map(|t| t.push(*value.dims(), inputs, Some(op())));
        Var { value, node }
    }

    /// Runs `part` without recording it: for an operation that is made of others and has its own way back.
    pub(crate) fn unrecorded<T>(&mut self, part: impl FnOnce(&mut Self) -> T) -> T {
        let tape = self.tape.take();
        let done = part(self);
        self.tape = tape;
        done
    }

    /// True when operations have to keep what their way back needs.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.tape.is_some()
    }

    /// What each recorded operation keeps, in order.
    #[must_use]
    pub fn saved(&self) -> Vec<Saved> {
        self.tape.as_ref().map_or_else(Vec::new, Tape::saved)
    }
}

/// A value in a pass. Moving a `Var` into its last use lets the operation reuse its memory; a skip connection is a
/// visible `clone()`, which copies no data.
#[derive(Debug, Clone)]
pub struct Var {
    pub(crate) value: Tensor,
    node: Option<NodeId>,
}

impl Var {
    /// The tensor.
    #[must_use]
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Where it was recorded, if it was.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        self.node
    }

    /// The same values in another order or storage.
    pub(crate) fn reformed(self, form: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Var> {
        Ok(Var { value: form(self.value)?, node: self.node })
    }

    /// The tensor, giving up the variable.
    #[must_use]
    pub fn into_value(self) -> Tensor {
        self.value
    }
}
