//! Layers: parameters bound to an operation.

use super::{Module, ParamSource, filter, transposed_filter, vector};
use crate::autograd::{Backward, Ctx, Grads, Param, Var};
use crate::error::Result;
use crate::ops::{self, Affine, Moments, Sources};
use crate::tensor::{Device, Precision, Tensor};

/// `y` as the result of something that `p` is a parameter of but does not change: its gradient is zero, which is not the
/// same as none, for an optimizer with weight decay.
fn without_effect<'m>(cx: &mut Ctx<'m>, y: Var, p: &'m Param) -> Var {
    if !cx.is_recorded() {
        return y;
    }
    let node = y.node();
    cx.record(y.into_value(), &[node], || Box::new(WithoutEffect(p)))
}

struct WithoutEffect<'m>(&'m Param);

impl<'m> Backward<'m> for WithoutEffect<'m> {
    fn name(&self) -> &'static str {
        "without effect"
    }

    fn saved<'s>(&'s self, _: &mut dyn FnMut(&'s Tensor)) {}

    fn backward(self: Box<Self>, cx: &mut Ctx<'m>, grads: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if !cx.device().is_cpu() {
            grads.add_param(self.0.id(), crate::ops::cuda::zeros(self.0)?)?;
            return Ok(vec![Some(dy)]);
        }
        let dims = *self.0.value().dims();
        grads.add_param(self.0.id(), Tensor::from_host(&vec![0.0; dims.len()], dims, cx.device())?)?;
        Ok(vec![Some(dy)])
    }
}

/// 3D convolution with bias. The padding keeps the size at stride 1 (half the kernel per axis).
#[derive(Debug)]
pub struct Conv3d {
    weight: Param,
    bias: Option<Param>,
    how: ops::Conv3d,
}

impl Conv3d {
    /// Loads `{name}.weight` of shape `[out, inputs, kD, kH, kW]` and, where the source has it, `{name}.bias` of shape
    /// `[out]`.
    ///
    /// # Errors
    /// Whatever the source says; [`crate::Error::Model`] for a missing tensor or another shape.
    pub fn load(
        source: &dyn ParamSource,
        name: &str,
        out: usize,
        inputs: usize,
        kernel: [usize; 3],
        stride: [usize; 3],
        device: &Device,
    ) -> Result<Self> {
        Self::load_with(source, name, out, inputs, kernel, stride, Precision::F32, device)
    }

    /// As [`Conv3d::load`], with the weights stored in `precision`.
    ///
    /// # Errors
    /// As [`Conv3d::load`].
    pub fn load_with(
        source: &dyn ParamSource,
        name: &str,
        out: usize,
        inputs: usize,
        kernel: [usize; 3],
        stride: [usize; 3],
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        let [kd, kh, kw] = kernel;
        let dims = [out, inputs, kd, kh, kw];
        let bias = format!("{name}.bias");
        Ok(Self {
            weight: filter(source, &format!("{name}.weight"), dims, precision, device)?,
            bias: source.shape(&bias).map(|_| vector(source, &bias, out, device)).transpose()?,
            how: ops::Conv3d { stride, padding: kernel.map(|k| k / 2) },
        })
    }

    /// Runs on one or two sources (two: as if concatenated along the channels).
    ///
    /// # Errors
    /// As [`Module::forward`].
    pub fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: impl Into<Sources>) -> Result<Var> {
        ops::conv3d(cx, x, &self.weight, self.bias.as_ref(), self.how)
    }

    /// The loss of its result, for a layer of single voxels; see [`ops::head_loss()`].
    ///
    /// # Errors
    /// As [`ops::head_loss()`].
    pub fn run_loss<'m>(
        &'m self,
        cx: &mut Ctx<'m>,
        x: Var,
        target: &ops::Target,
        how: &ops::Loss,
    ) -> Result<(Var, ops::LossValue)> {
        ops::head_loss(cx, x, &self.weight, self.bias.as_ref(), target, how)
    }

    /// Bytes of the filter's other forms, which it keeps from its first run on.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        self.weight.derived_bytes()
    }

    /// Runs without the bias, which a normalisation takes out again, and takes the moments for it.
    ///
    /// # Errors
    /// As [`Module::forward`].
    pub fn run_measured<'m>(&'m self, cx: &mut Ctx<'m>, x: impl Into<Sources>) -> Result<(Var, Moments)> {
        let (y, moments) = ops::conv3d_measured(cx, x, &self.weight, None, self.how)?;
        Ok((self.bias.iter().fold(y, |y, b| without_effect(cx, y, b)), moments))
    }

    /// `leaky_relu(normalised(y) + run(x))`: the end of a residual block, in the memory of `y`.
    ///
    /// # Errors
    /// As [`Module::forward`].
    pub fn run_residual<'m>(&'m self, cx: &mut Ctx<'m>, y: Var, norm: &Affine, x: impl Into<Sources>) -> Result<Var> {
        ops::conv3d_residual(cx, y, norm, x, &self.weight, self.bias.as_ref(), self.how)
    }
}

impl Module for Conv3d {
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        self.run(cx, x)
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        visit(&self.weight);
        self.bias.iter().for_each(visit);
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        visit(&mut self.weight);
        self.bias.iter_mut().for_each(visit);
    }
}

/// Transposed 3D convolution whose kernel is its stride: every voxel becomes a block of `stride` voxels (nnU-Net's way
/// up).
#[derive(Debug)]
pub struct ConvTranspose3d {
    weight: Param,
    bias: Option<Param>,
    how: ops::ConvTranspose3d,
}

impl ConvTranspose3d {
    /// Loads `{name}.weight` of shape `[inputs, out, stride ..]` and, where the source has it, `{name}.bias` of shape
    /// `[out]`.
    ///
    /// # Errors
    /// As [`Conv3d::load`].
    pub fn load(
        source: &dyn ParamSource,
        name: &str,
        out: usize,
        inputs: usize,
        stride: [usize; 3],
        device: &Device,
    ) -> Result<Self> {
        let [d, h, w] = stride;
        let bias = format!("{name}.bias");
        Ok(Self {
            weight: transposed_filter(source, &format!("{name}.weight"), [inputs, out, d, h, w], device)?,
            bias: source.shape(&bias).map(|_| vector(source, &bias, out, device)).transpose()?,
            how: ops::ConvTranspose3d::upsampling(stride),
        })
    }

    /// Bytes of the filter's other forms, which it keeps from its first run on.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        self.weight.derived_bytes()
    }
}

impl Module for ConvTranspose3d {
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        ops::conv_transpose3d(cx, x, &self.weight, self.bias.as_ref(), self.how)
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        visit(&self.weight);
        self.bias.iter().for_each(visit);
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        visit(&mut self.weight);
        self.bias.iter_mut().for_each(visit);
    }
}

/// Instance normalisation with affine parameters, eps 1e-5.
#[derive(Debug)]
pub struct InstanceNorm {
    weight: Param,
    bias: Param,
}

impl InstanceNorm {
    /// Loads `{name}.weight` and `{name}.bias`, both of shape `[channels]`.
    ///
    /// # Errors
    /// As [`Conv3d::load`].
    pub fn load(source: &dyn ParamSource, name: &str, channels: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            weight: vector(source, &format!("{name}.weight"), channels, device)?,
            bias: vector(source, &format!("{name}.bias"), channels, device)?,
        })
    }

    /// Normalises, then adds `residual`, then applies leaky ReLU of `slope`, each where given, in one pass.
    ///
    /// # Errors
    /// As [`Module::forward`].
    pub fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Var, residual: Option<Var>, slope: Option<f32>) -> Result<Var> {
        ops::instance_norm(cx, x, &self.weight, &self.bias, residual, ops::InstanceNorm { eps: 1e-5, slope })
    }
}

impl InstanceNorm {
    /// The normalisation of an activation with these moments, and leaky ReLU of `slope` where given, to be applied later.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] when the channels do not fit.
    pub fn affine(&self, moments: &Moments, slope: Option<f32>) -> Result<Affine> {
        Affine::new(moments, &self.weight, &self.bias, ops::InstanceNorm { eps: 1e-5, slope })
    }
}

impl Module for InstanceNorm {
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        self.run(cx, x, None, None)
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        [&self.weight, &self.bias].into_iter().for_each(visit);
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        [&mut self.weight, &mut self.bias].into_iter().for_each(visit);
    }
}
