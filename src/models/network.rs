//! Any of the networks, behind one type.

use super::{Head, Scored, StuNet, StuNetConfig, Unet, UnetConfig, UnetKind};
use crate::autograd::{Ctx, Param, Var};
use crate::error::Result;
use crate::nn::{Module, ParamSource, RandomParams, Scheme};
use crate::tensor::{Device, Precision};

/// The sizes of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetworkConfig {
    /// STU-Net.
    StuNet(StuNetConfig),
    /// A U-Net of nnU-Net.
    Unet(UnetConfig),
}

/// A network with its parameters.
#[derive(Debug)]
#[non_exhaustive]
pub enum Network {
    /// STU-Net.
    StuNet(StuNet),
    /// A U-Net of nnU-Net.
    Unet(Unet),
}

/// The same expression for every network.
macro_rules! each {
    ($of:ident, $value:expr, $n:ident => $e:expr) => {
        match $value {
            $of::StuNet($n) => $e,
            $of::Unet($n) => $e,
        }
    };
}

impl NetworkConfig {
    /// The network's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            NetworkConfig::StuNet(_) => "STU-Net",
            NetworkConfig::Unet(c) => c.kind.class_name(),
        }
    }

    /// Input channels.
    #[must_use]
    pub fn in_channels(&self) -> usize {
        each!(NetworkConfig, self, c => c.in_channels)
    }

    /// Output channels, background included.
    #[must_use]
    pub fn classes(&self) -> usize {
        each!(NetworkConfig, self, c => c.classes)
    }

    /// Strides (z, y, x) into all stages but the first.
    #[must_use]
    pub fn strides(&self) -> &[[usize; 3]] {
        match self {
            NetworkConfig::StuNet(c) => &c.strides,
            NetworkConfig::Unet(c) => c.strides.get(1..).unwrap_or_default(),
        }
    }

    /// A 2D network, which takes slices: samples of depth 1.
    #[must_use]
    pub fn is_planar(&self) -> bool {
        matches!(self, NetworkConfig::Unet(c) if c.planar)
    }

    /// Name and shape of every parameter, in the order of PyTorch's state dict.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        each!(NetworkConfig, self, c => c.parameters())
    }

    /// Other names of parameters in PyTorch's state dict, each with the first; see [`UnetConfig::aliases`].
    #[must_use]
    pub fn aliases(&self) -> Vec<(String, String)> {
        match self {
            NetworkConfig::StuNet(_) => Vec::new(),
            NetworkConfig::Unet(c) => c.aliases(),
        }
    }

    /// Number of trainable parameters.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        each!(NetworkConfig, self, c => c.parameter_count())
    }

    /// Product of the strides per axis: a patch must be a multiple of it.
    #[must_use]
    pub fn divisor(&self) -> [usize; 3] {
        each!(NetworkConfig, self, c => c.divisor())
    }

    /// Multiply-accumulates of one forward pass; see [`StuNetConfig::macs`].
    #[must_use]
    pub fn macs(&self, patch: [usize; 3]) -> u64 {
        each!(NetworkConfig, self, c => c.macs(patch))
    }

    /// Bytes of tensors that a forward pass takes; see [`StuNetConfig::activation_bytes`].
    #[must_use]
    pub fn activation_bytes(&self, patch: [usize; 3], device: &Device, strict: bool, precision: Precision) -> usize {
        each!(NetworkConfig, self, c => c.activation_bytes(patch, device, strict, precision))
    }

    /// Builds the network with parameters from `source`.
    ///
    /// # Errors
    /// [`Model`](crate::Error::Model) when a parameter is missing or has another shape,
    /// [`Unsupported`](crate::Error::Unsupported) for sizes without kernels, [`OutOfMemory`](crate::Error::OutOfMemory).
    pub fn build(&self, source: &dyn ParamSource, device: &Device) -> Result<Network> {
        self.build_with(source, device, Precision::F32)
    }

    /// As [`NetworkConfig::build`], with filters and activations stored in `precision`.
    ///
    /// # Errors
    /// As [`NetworkConfig::build`].
    pub fn build_with(&self, source: &dyn ParamSource, device: &Device, precision: Precision) -> Result<Network> {
        Ok(match self {
            NetworkConfig::StuNet(c) => Network::StuNet(c.build_with(source, device, precision)?),
            NetworkConfig::Unet(c) => Network::Unet(Unet::load(c, source, device, precision)?),
        })
    }

    /// Parameters as a training begins with them. nnU-Net's networks and STU-Net's first trainers begin by [`Scheme::He`],
    /// STU-Net's for nnU-Net 2.2 by [`Scheme::Torch`]; a residual encoder's blocks as their shortcuts, the norm before the
    /// sum zero (`init_last_bn_before_add_to_0`).
    #[must_use]
    pub fn initial(&self, seed: u64, scheme: Scheme) -> RandomParams {
        let source = RandomParams::new(seed, self.parameters().into_iter().collect()).scheme(scheme);
        match self {
            NetworkConfig::Unet(c) if c.kind == UnetKind::ResEnc => source.zeros(|name| name.contains(".conv2.norm.")),
            _ => source,
        }
    }

    /// Builds the network with seeded random parameters, none of them zero but biases: for tests and measurements.
    ///
    /// # Errors
    /// As [`NetworkConfig::build`].
    pub fn build_random(&self, device: &Device, seed: u64) -> Result<Network> {
        self.build_random_with(device, seed, Precision::F32)
    }

    /// As [`NetworkConfig::build_random`], with filters and activations stored in `precision`.
    ///
    /// # Errors
    /// As [`NetworkConfig::build`].
    pub fn build_random_with(&self, device: &Device, seed: u64, precision: Precision) -> Result<Network> {
        let source = RandomParams::new(seed, self.parameters().into_iter().collect());
        self.build_with(&source, device, precision)
    }
}

impl Network {
    /// The same, but with `on` recorded passes keep only the inputs of stages; see [`StuNet::recomputing`].
    #[must_use]
    pub fn recomputing(self, on: bool) -> Self {
        match self {
            Network::StuNet(n) => Network::StuNet(n.recomputing(on)),
            Network::Unet(n) => Network::Unet(n.recomputing(on)),
        }
    }

    /// The network's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Network::StuNet(_) => "STU-Net",
            Network::Unet(n) => n.config().kind.class_name(),
        }
    }

    /// Input channels.
    #[must_use]
    pub fn in_channels(&self) -> usize {
        each!(Network, self, n => n.config().in_channels)
    }

    /// Output channels, background included.
    #[must_use]
    pub fn classes(&self) -> usize {
        each!(Network, self, n => n.config().classes)
    }

    /// A 2D network, which takes slices: samples of depth 1.
    #[must_use]
    pub fn is_planar(&self) -> bool {
        matches!(self, Network::Unet(n) if n.config().planar)
    }

    /// Channels that the full-resolution head reads.
    #[must_use]
    pub fn head_features(&self) -> usize {
        match self {
            Network::StuNet(n) => n.config().dims[0],
            Network::Unet(n) => n.config().features[0],
        }
    }

    /// Name and shape of every parameter; see [`NetworkConfig::parameters`].
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        each!(Network, self, n => n.config().parameters())
    }

    /// Number of trainable parameters.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        each!(Network, self, n => n.config().parameter_count())
    }

    /// Strides (z, y, x) into all stages but the first.
    #[must_use]
    pub fn strides(&self) -> &[[usize; 3]] {
        match self {
            Network::StuNet(n) => &n.config().strides,
            Network::Unet(n) => n.config().strides.get(1..).unwrap_or_default(),
        }
    }

    /// Bytes of tensors that a pass over a patch takes at its peak; see [`StuNetConfig::activation_bytes`].
    #[must_use]
    pub fn activation_bytes(&self, patch: [usize; 3], device: &Device, strict: bool) -> usize {
        each!(Network, self, n => n.config().activation_bytes(patch, device, strict, n.precision()))
    }

    /// Those that stay after a pass; see [`StuNetConfig::kept_bytes`].
    #[must_use]
    pub fn planned_kept_bytes(&self, patch: [usize; 3], device: &Device, strict: bool) -> usize {
        each!(Network, self, n => n.config().kept_bytes(patch, device, strict, n.precision()))
    }

    /// Bytes of filters in other forms, which convolutions keep from the first pass on.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        each!(Network, self, n => n.kept_bytes())
    }

    /// How its filters, and the activations of a pass, are stored.
    #[must_use]
    pub fn precision(&self) -> Precision {
        each!(Network, self, n => n.precision())
    }

    /// The full-resolution head.
    ///
    /// # Errors
    /// As [`StuNet::head`].
    pub fn head(&self) -> Result<&Head> {
        each!(Network, self, n => n.head())
    }

    /// Everything but the full-resolution head; see [`StuNet::features`].
    ///
    /// # Errors
    /// As [`StuNet::features`].
    pub fn features<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        each!(Network, self, n => n.features(cx, x))
    }

    /// All heads' logits, the full resolution first; see [`StuNet::forward_all`].
    ///
    /// # Errors
    /// As [`StuNet::features`].
    pub fn forward_all<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Vec<Var>> {
        each!(Network, self, n => n.forward_all(cx, x))
    }

    /// All heads with the features that they read, the full resolution first; see [`StuNet::forward_heads`].
    ///
    /// # Errors
    /// As [`StuNet::features`].
    pub fn forward_heads<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Vec<Scored<'m>>> {
        each!(Network, self, n => n.forward_heads(cx, x))
    }

    /// The label of every voxel; see [`StuNet::labels`].
    ///
    /// # Errors
    /// As [`StuNet::features`].
    pub fn labels<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Vec<u16>> {
        each!(Network, self, n => n.labels(cx, x))
    }
}

impl Module for Network {
    fn forward<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> Result<Var> {
        each!(Network, self, n => n.forward(cx, x))
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        each!(Network, self, n => n.params(visit));
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        each!(Network, self, n => n.params_mut(visit));
    }
}

impl From<StuNet> for Network {
    fn from(net: StuNet) -> Self {
        Network::StuNet(net)
    }
}

impl From<Unet> for Network {
    fn from(net: Unet) -> Self {
        Network::Unet(net)
    }
}

impl From<StuNetConfig> for NetworkConfig {
    fn from(config: StuNetConfig) -> Self {
        NetworkConfig::StuNet(config)
    }
}

impl From<UnetConfig> for NetworkConfig {
    fn from(config: UnetConfig) -> Self {
        NetworkConfig::Unet(config)
    }
}
