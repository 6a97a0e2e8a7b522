//! Floor 3: the context of a forward pass. Names no operation.

use std::marker::PhantomData;

use crate::tensor::{Device, Dims, Tensor};

/// What a forward pass needs and no tensor knows: where it runs. `'m` is the borrow of the model whose parameters
/// the pass reads, so that they need no reference counts and cannot change meanwhile.
#[derive(Debug)]
pub struct Ctx<'m> {
    device: Device,
    model: PhantomData<&'m ()>,
}

impl Ctx<'_> {
    /// A pass that remembers nothing: a value's memory is free as soon as its last use is over.
    #[must_use]
    pub fn infer(device: &Device) -> Self {
        Self { device: device.clone(), model: PhantomData }
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
}

impl Param {
    /// `value` holds a parameter of logical size `dims`, packed for its device.
    pub(crate) fn new(value: Tensor, dims: Dims) -> Self {
        Self { value, dims }
    }

    /// Logical sizes: `[O, I, kD, kH, kW]` of a filter (`[I, O, ..]` of a transposed convolution's), `[C]` of a vector.
    #[must_use]
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// The packed values.
    pub(crate) fn value(&self) -> &Tensor {
        &self.value
    }
}
