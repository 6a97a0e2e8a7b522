//! Where parameter values come from, and how they go back.

use std::borrow::Cow;

use crate::autograd::{Param, ParamKind};
use crate::error::{Error, Result};
use crate::ops;
use crate::tensor::{Device, Precision, Tensor};

/// A named source of parameter values: a weight file, an initialiser, a test.
pub trait ParamSource {
    /// Sizes of the tensor `name`, or `None` when the source has no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// Values of the tensor `name` in row-major order (PyTorch's `[O, I, kD, kH, kW]` for a filter,
    /// `[I, O, kD, kH, kW]` for a transposed one).
    ///
    /// # Errors
    /// [`Error::Model`] when the tensor is missing or damaged.
    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>>;

    /// The error for `name`, naming the file.
    fn error(&self, name: &str, what: String) -> Error;
}

/// Reads a filter `[O, I, kD, kH, kW]` and packs it for the device, to be stored in `precision`.
///
/// # Errors
/// Whatever the source says; [`Error::Model`] when the shape differs from `dims`.
pub fn filter(
    source: &dyn ParamSource,
    name: &str,
    dims: [usize; 5],
    precision: Precision,
    device: &Device,
) -> Result<Param> {
    let values = expect(source, name, &dims)?;
    Ok(Param::new(name, ops::pack_filter(&values, dims, precision, device)?, dims.into()))
}

/// Reads a filter `[I, O, kD, kH, kW]` of a transposed convolution and packs it for the device.
///
/// # Errors
/// As [`filter`].
pub fn transposed_filter(source: &dyn ParamSource, name: &str, dims: [usize; 5], device: &Device) -> Result<Param> {
    let values = expect(source, name, &dims)?;
    Ok(Param::new(name, ops::pack_transposed_filter(&values, dims, device)?, dims.into()).transposed())
}

/// Reads a vector `[C]`, padded with zeros to whole channel blocks.
///
/// # Errors
/// As [`filter`].
pub fn vector(source: &dyn ParamSource, name: &str, len: usize, device: &Device) -> Result<Param> {
    let values = expect(source, name, &[len])?;
    Ok(Param::new(name, ops::pack_vector(&values, device)?, [len].into()))
}

/// The values of a parameter in PyTorch's order, as [`ParamSource::values`] gives them.
///
/// # Errors
/// [`Error::Shape`] for a parameter on a card that is not stored as f32; [`Error::Device`].
pub fn values(p: &Param) -> Result<Vec<f32>> {
    unpack(p, p.value())
}

/// Replaces the values of a parameter by others in PyTorch's order.
///
/// # Errors
/// [`Error::Shape`] when their number is another; [`Error::OutOfMemory`].
pub fn set_values(p: &mut Param, values: &[f32]) -> Result<()> {
    let value = pack(p, values, p.precision())?;
    *p.value_mut() = value;
    Ok(())
}

/// Values that lie as those of `p` do, its gradient for one, in PyTorch's order.
///
/// # Errors
/// [`Error::Shape`] when `packed` lies otherwise; [`Error::Device`].
pub fn unpack(p: &Param, packed: &Tensor) -> Result<Vec<f32>> {
    match p.kind() {
        ParamKind::Filter => ops::unpack_filter(packed, p.dims().five()),
        ParamKind::TransposedFilter => ops::unpack_transposed_filter(packed, p.dims().five()),
        ParamKind::Vector => ops::unpack_vector(packed, p.dims().len()),
    }
}

/// Values in PyTorch's order as those of `p` lie, filters stored in `precision`.
///
/// # Errors
/// [`Error::Shape`] when their number is another; [`Error::OutOfMemory`].
pub fn pack(p: &Param, values: &[f32], precision: Precision) -> Result<Tensor> {
    let device = p.value().device();
    if values.len() != p.dims().len() {
        return Err(Error::shape("pack", format!("{} values for {:?}: {}", values.len(), p.dims(), p.name())));
    }
    device.unplanned(|| match p.kind() {
        ParamKind::Filter => ops::pack_filter(values, p.dims().five(), precision, device),
        ParamKind::TransposedFilter => ops::pack_transposed_filter(values, p.dims().five(), device),
        ParamKind::Vector => ops::pack_vector(values, device),
    })
}

fn expect<'s>(source: &'s dyn ParamSource, name: &str, dims: &[usize]) -> Result<Cow<'s, [f32]>> {
    match source.shape(name) {
        Some(s) if s == dims => source.values(name),
        Some(s) => Err(source.error(name, format!("shape {s:?}, expected {dims:?}"))),
        None => Err(source.error(name, format!("missing, expected a tensor of shape {dims:?}"))),
    }
}
