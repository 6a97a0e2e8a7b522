//! The door for tests and benchmarks: every implementation of every operation by name, and what no user sees of a
//! tensor. No promise of stability.

use super::{Conv3d, ConvTranspose3d, InstanceNorm, LabelMap, Loss, Moments, Sources};
use crate::autograd::{Ctx, Param, Var};
use crate::backend::{cpu, dispatch, names};
use crate::error::Result;
use crate::tensor::{Device, Layout, Precision, Stored, Tensor};

/// Implementations of [`super::conv3d`] on `device`, in order of preference.
#[must_use]
pub fn conv3d_implementations(device: &Device, x: [usize; 5], w: &Param, how: Conv3d) -> Vec<&'static str> {
    let geometry = super::conv3d::geometry(&x.into(), w, None, how);
    geometry.map_or_else(|_| Vec::new(), |(g, _)| cpu::conv3d::names(device.isa(), &g))
}

/// What the rule that chooses an implementation of [`super::conv3d`] holds of one.
#[derive(Debug, Clone, PartialEq)]
pub struct Conv3dEstimate {
    /// The implementation.
    pub name: &'static str,
    /// As accurate as adding up the products one after the other.
    pub strict: bool,
    /// Expected time on one core, in cycles of a core that does a multiply-add of 16 floats in each; NaN on a card.
    pub cycles: f64,
    /// The least of all: the one that is taken.
    pub chosen: bool,
}

/// The rule's estimates for inputs of `channels` each that have sizes `x` together: of all implementations of the device's
/// own instruction set, with `strict` only the accurate ones, and of the one that is taken.
pub fn conv3d_estimates(
    device: &Device,
    x: [usize; 5],
    channels: &[usize],
    w: &Param,
    how: Conv3d,
    strict: bool,
) -> Result<Vec<Conv3dEstimate>> {
    let (g, _) = super::conv3d::geometry(&x.into(), w, None, how)?;
    super::on_card!(device, {
        let (names, taken) = super::cuda::conv3d_variants(device, x, channels, w, how)?;
        let estimate = |name| Conv3dEstimate { name, strict: false, cycles: f64::NAN, chosen: name == taken };
        Ok(names.into_iter().map(estimate).collect())
    });
    Ok(cpu::conv3d::estimates(device.isa(), &g, channels, strict)
        .into_iter()
        .map(|(e, chosen)| Conv3dEstimate { name: e.name(), strict: e.is_strict(), cycles: e.cycles(), chosen })
        .collect())
}

/// Implementations of [`super::conv_transpose3d`] on `device`, in order of preference.
#[must_use]
pub fn conv_transpose3d_implementations(
    device: &Device,
    x: [usize; 5],
    w: &Param,
    how: ConvTranspose3d,
) -> Vec<&'static str> {
    let geometry = super::conv_transpose3d::geometry(&x.into(), w, None, how);
    geometry.map_or_else(|_| Vec::new(), |(g, _)| names(cpu::conv_transpose3d::CONV_TRANSPOSE3D, device.isa(), &g))
}

/// Implementations of the gradients of [`super::conv_transpose3d`] on `device`, in order of preference.
#[must_use]
pub fn conv_transpose3d_gradient_implementations(
    device: &Device,
    x: [usize; 5],
    w: &Param,
    how: ConvTranspose3d,
) -> Vec<&'static str> {
    let geometry = super::conv_transpose3d::geometry(&x.into(), w, None, how);
    geometry.map_or_else(|_| Vec::new(), |(g, _)| names(cpu::conv_transpose3d::GRADIENTS, device.isa(), &g))
}

/// Implementations of the elementwise and normalising operations, of pooling and of upsampling.
#[must_use]
pub fn implementations(device: &Device) -> Vec<&'static str> {
    names(&cpu::instance_norm::INSTANCE_NORM, device.isa(), &())
}

/// [`super::conv3d`] by one implementation.
pub fn conv3d<'m>(
    name: &str,
    cx: &mut Ctx<'m>,
    x: impl Into<Sources>,
    w: &'m Param,
    b: Option<&'m Param>,
    how: Conv3d,
) -> Result<(Var, Moments)> {
    super::conv3d::run(cx, x.into(), w, b, how, Some(name), true)
}

/// [`super::conv_transpose3d`] by one implementation.
pub fn conv_transpose3d<'m>(
    name: &str,
    cx: &mut Ctx<'m>,
    x: Var,
    w: &'m Param,
    b: Option<&'m Param>,
    how: ConvTranspose3d,
) -> Result<Var> {
    super::conv_transpose3d::run(cx, x, w, b, how, Some(name))
}

/// The gradients of [`super::conv_transpose3d`] by its input, filter and bias, by one implementation.
pub fn conv_transpose3d_gradients(
    name: &str,
    cx: &Ctx<'_>,
    x: &Var,
    w: &Param,
    b: Option<&Param>,
    how: ConvTranspose3d,
    dy: &Var,
) -> Result<[Option<Tensor>; 3]> {
    super::conv_transpose3d::gradients(cx, x.value().clone(), w, b, how, dy.value(), Some(name))
}

/// [`super::instance_norm`] by one implementation.
pub fn instance_norm(
    name: &str,
    cx: &mut Ctx<'_>,
    x: Var,
    [w, b]: [&Param; 2],
    residual: Option<Var>,
    how: InstanceNorm,
) -> Result<Var> {
    super::instance_norm::run(cx, x, w, b, residual, how, Some(name))
}

/// [`super::leaky_relu`] by one implementation.
pub fn leaky_relu(name: &str, cx: &mut Ctx<'_>, x: Var, slope: f32) -> Result<Var> {
    super::leaky_relu::run(cx, x, slope, Some(name))
}

/// [`super::add`] by one implementation.
pub fn add(name: &str, cx: &mut Ctx<'_>, a: Var, b: Var) -> Result<Var> {
    super::add::run(cx, a, b, Some(name))
}

/// [`super::avg_pool`] by one implementation.
pub fn avg_pool(name: &str, cx: &mut Ctx<'_>, x: Var, kernel: [usize; 3]) -> Result<Var> {
    super::avg_pool::run(cx, x, kernel, Some(name))
}

/// The gradient of [`super::avg_pool`] by its input of sizes `dims`, by one implementation.
pub fn avg_pool_gradient(
    name: &str,
    cx: &mut Ctx<'_>,
    dy: &Tensor,
    dims: [usize; 5],
    kernel: [usize; 3],
) -> Result<Tensor> {
    super::avg_pool::input_gradient(cx, dy, dims.into(), kernel, Some(name))
}

/// [`super::upsample_nearest`] by one implementation.
pub fn upsample_nearest(name: &str, cx: &mut Ctx<'_>, x: Var, factor: [usize; 3]) -> Result<Var> {
    super::upsample_nearest::run(cx, x, factor, Some(name))
}

/// [`super::loss`] by one implementation.
pub fn loss(name: &str, cx: &mut Ctx<'_>, logits: Var, target: &LabelMap, how: &Loss) -> Result<(Var, f64)> {
    super::loss::run(cx, logits, target, how, Some(name))
}

/// [`super::head_labels`] by one implementation.
pub fn head_labels(name: &str, cx: &mut Ctx<'_>, x: Var, weight: &[f32], bias: &[f32]) -> Result<Vec<u16>> {
    super::head_labels::run(cx, x, weight, bias, Some(name))
}

/// [`super::head_labels`] whose labels nobody reads: on a card they stay there, and are not waited for.
pub fn head_labels_unread(cx: &mut Ctx<'_>, x: Var, weight: &[f32], bias: &[f32]) -> Result<()> {
    super::head_labels::unread(cx, x, weight, bias)
}

/// A filter parameter from values in `[O, I, kD, kH, kW]` order.
pub fn filter(values: &[f32], dims: [usize; 5], device: &Device) -> Result<Param> {
    stored_filter(values, dims, Precision::F32, device)
}

/// As [`filter`], stored in `precision`.
pub fn stored_filter(values: &[f32], dims: [usize; 5], precision: Precision, device: &Device) -> Result<Param> {
    Ok(Param::new("filter", super::pack_filter(values, dims, precision, device)?, dims.into()))
}

/// A filter parameter of a transposed convolution from values in `[I, O, kD, kH, kW]` order.
pub fn transposed_filter(values: &[f32], dims: [usize; 5], device: &Device) -> Result<Param> {
    Ok(Param::new("filter", super::pack_transposed_filter(values, dims, device)?, dims.into()).transposed())
}

/// A vector parameter.
pub fn vector(values: &[f32], device: &Device) -> Result<Param> {
    Ok(Param::new("vector", super::pack_vector(values, device)?, [values.len()].into()))
}

/// Implementations of the steps of optimizers on `device`.
#[must_use]
pub fn optim_implementations(device: &Device) -> Vec<&'static str> {
    names(&cpu::optim::SGD, device.isa(), &())
}

/// The whole memory of a parameter, pad lanes included.
#[must_use]
pub fn memory_of(p: &Param) -> Vec<f32> {
    let values = p.value().stored();
    values.part(0..values.len()).into_owned()
}

/// The tensor in the layout in which activations pass between operations.
pub fn blocked(x: Tensor) -> Result<Tensor> {
    super::blocked("testing", x)
}

/// The tensor in the layout in which activations pass between operations, stored in `precision`.
pub fn stored(x: Tensor, precision: Precision) -> Result<Tensor> {
    super::on_card!(x.device(), super::cuda::as_voxels("testing", x, precision));
    let x = blocked(x)?;
    let mut out = Tensor::empty_in(*x.dims(), Layout::BLOCKED, precision, x.device())?;
    let to = super::stored_memory("testing", &mut out)?;
    dispatch!(x.device(), stored::store(x.as_slice(), to));
    Ok(out)
}

/// True when the tensor is blocked and every pad lane is zero.
#[must_use]
pub fn padding_is_zero(x: &Tensor) -> bool {
    let [_, c, d, h, w] = x.dims().five();
    let lanes = Layout::BLOCKED.block;
    let space = d * h * w;
    x.layout() == Layout::BLOCKED
        && (0..x.stored().len() / (space * lanes).max(1)).all(|i| {
            let real = lanes.min(c - i % c.div_ceil(lanes) * lanes);
            (0..space).all(|v| (real..lanes).all(|lane| x.stored().get((i * space + v) * lanes + lane) == 0.0))
        })
}

/// Where the tensor's memory is: equal before and after an operation that worked in place.
#[must_use]
pub fn address(x: &Tensor) -> usize {
    match x.stored() {
        Stored::F32(v) => v.as_ptr().addr(),
        Stored::Bf16(v) => v.as_ptr().addr(),
    }
}

/// What a card reaches with values stored in `precision`: operations per second of products in registers, a multiply-add
/// counted as two, and bytes per second of a copy in its memory, read and written. Takes some milliseconds, and memory that it
/// gives back.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) of the processor, see [`spin`]; [`Error::Device`](crate::Error::Device).
pub fn peaks(device: &Device, precision: Precision) -> Result<(f64, f64)> {
    #[cfg(feature = "cuda")]
    if let Some(driver) = device.driver() {
        let start = std::time::Instant::now();
        let storage = crate::backend::cuda::Storage::from(precision);
        return crate::backend::cuda::probe::peaks(driver, storage, &mut || start.elapsed().as_secs_f64());
    }
    Err(crate::error::Error::unsupported(format!("a card's peak in {} of {}", precision.name(), device.name())))
}

/// Runs multiply-adds in registers on all of the device's threads for some milliseconds and returns their number, a
/// multiply-add counted as two: divided by the time, the peak to hold kernels against.
#[must_use]
pub fn spin(device: &Device) -> f64 {
    if !device.is_cpu() {
        return f64::NAN;
    }
    let threads = device.threads();
    dispatch!(device, probe::spin(threads))
}
