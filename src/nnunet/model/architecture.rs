//! Which network a file of weights holds, told from the names and shapes of its tensors alone.

use serde::{Deserialize, Serialize};

use super::unet;
use crate::error::{Error, Result};
use crate::io::weights::Weights;
use crate::models::{NetworkConfig, StuNetConfig, UnetConfig};
use crate::nnunet::plans::InferencePlan;
use crate::tensor::DType;

const ENCODER: &str = "conv_blocks_context";
const DECODER: &str = "conv_blocks_localization";

/// A network and its sizes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Architecture {
    /// STU-Net (Huang et al. 2023): six encoder and five decoder stages of residual blocks.
    #[serde(rename = "stunet")]
    StuNet {
        /// Channels of each encoder stage, finest first.
        dims: [usize; 6],
        /// Residual blocks of each encoder stage.
        depth: [usize; 6],
        /// Residual blocks of each decoder stage, coarsest first.
        decoder_depth: [usize; 5],
        /// Input channels.
        in_channels: usize,
        /// Output channels.
        classes: usize,
    },
    /// A U-Net of nnU-Net.
    #[serde(rename = "unet")]
    Unet(UnetConfig),
}

impl Architecture {
    /// Tells the network from its tensors and checks that every tensor of it is there, with the right shape and a
    /// floating-point type, and no other.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another network, [`Error::Model`] naming the first tensor that does not fit.
    pub fn infer(weights: &Weights) -> Result<Self> {
        if let Some(net) = unet::infer(weights)?.map(Architecture::Unet) {
            net.check(weights)?;
            return Ok(net);
        }
        if weights.shape("seg_outputs.4.weight").is_none() && weights.shape(&conv(ENCODER, 0, 0, "conv1")).is_none() {
            return Err(other_network(weights));
        }
        let dim = |name: &str, axis: usize| -> Result<usize> {
            let shape = weights.shape(name).ok_or_else(|| missing(weights, name, "STU-Net"))?;
            match shape {
                [_, _, _, _, _] if shape[axis] > 0 => Ok(shape[axis]),
                _ => {
                    let what = format!("shape {shape:?}, expected five axes, none empty: a 3D convolution");
                    Err(Error::model(weights.path(), name, what))
                }
            }
        };
        let blocks = |part: &str, s: usize| {
            (0..).take_while(|&b| weights.shape(&conv(part, s, b, "conv1")).is_some()).count().max(1)
        };
        let mut dims = [0; 6];
        for (s, d) in dims.iter_mut().enumerate() {
            *d = dim(&conv(ENCODER, s, 0, "conv1"), 0)?;
        }
        let net = Architecture::StuNet {
            dims,
            depth: std::array::from_fn(|s| blocks(ENCODER, s)),
            decoder_depth: std::array::from_fn(|u| blocks(DECODER, u)),
            in_channels: dim(&conv(ENCODER, 0, 0, "conv1"), 1)?,
            classes: dim("seg_outputs.4.weight", 0)?,
        };
        net.check(weights)?;
        Ok(net)
    }

    /// Checks that the tensors are exactly those of this network.
    pub(super) fn check(&self, weights: &Weights) -> Result<()> {
        let config = self.config([[1; 3]; 5]);
        let (expected, network) = (config.parameters(), config.name());
        for (name, shape) in &expected {
            let found = weights.shape(name).ok_or_else(|| missing(weights, name, network))?;
            if found != shape {
                return Err(Error::model(weights.path(), name, format!("shape {found:?}, expected {shape:?}")));
            }
            let dtype = weights.dtype(name);
            if !matches!(dtype, Some(DType::F32 | DType::F64 | DType::F16 | DType::Bf16)) {
                return Err(Error::model(weights.path(), name, "not of a floating-point type"));
            }
        }
        if weights.names().len() != expected.len() {
            // PyTorch writes some tensors under several names.
            let aliases = config.aliases();
            let names = expected.iter().map(|(n, _)| n).chain(aliases.iter().map(|(n, _)| n));
            let known: std::collections::HashSet<&String> = names.collect();
            if let Some(name) = weights.names().iter().find(|n| !known.contains(n)) {
                return Err(Error::model(weights.path(), name, format!("not a tensor of {network}")));
            }
        }
        Ok(())
    }

    /// Checks that the network takes and gives what the plan says.
    pub(super) fn check_plan(&self, plan: &InferencePlan, weights: &Weights) -> Result<()> {
        let config = self.config(plan.strides);
        let (in_channels, classes, names) = (config.in_channels(), config.classes(), config.parameters());
        let first = names.first().map_or("state_dict", |(n, _)| n.as_str());
        let last = names.iter().rev().map(|(n, _)| n.as_str()).find(|n| n.ends_with(".weight")).unwrap_or("state_dict");
        if in_channels != plan.inputs() {
            let what = format!("{in_channels} input channels, the plan has {}", plan.inputs());
            return Err(Error::model(weights.path(), first, what));
        }
        if classes != plan.heads {
            let what = format!("{classes} output channels, the plan has {}", plan.heads);
            return Err(Error::model(weights.path(), last, what));
        }
        if config.is_planar() != plan.is_planar() {
            let of = |planar: bool| if planar { "2D" } else { "3D" };
            let what = format!("a {} network, the plan is {}", of(config.is_planar()), of(plan.is_planar()));
            return Err(Error::model(weights.path(), first, what));
        }
        let (patch, divisor) = (plan.patch, config.divisor());
        if (0..3).any(|a| !patch[a].is_multiple_of(divisor[a])) {
            let what = format!("strides of product {divisor:?}, which do not divide the plan's patch {patch:?}");
            return Err(Error::model(weights.path(), "state_dict", what));
        }
        Ok(())
    }

    /// Name and shape of every tensor, in PyTorch's order of registration.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.config([[1; 3]; 5]).parameters()
    }

    /// The network, ready to be built. A STU-Net's strides are those given; a U-Net has its own.
    #[must_use]
    pub fn config(&self, strides: [[usize; 3]; 5]) -> NetworkConfig {
        match self {
            Architecture::StuNet { dims, depth, decoder_depth, in_channels, classes } => StuNetConfig {
                in_channels: *in_channels,
                classes: *classes,
                depth: *depth,
                decoder_depth: *decoder_depth,
                dims: *dims,
                strides,
            }
            .into(),
            Architecture::Unet(config) => config.clone().into(),
        }
    }
}

fn conv(part: &str, stage: usize, block: usize, layer: &str) -> String {
    format!("{part}.{stage}.{block}.{layer}.weight")
}

fn missing(weights: &Weights, name: &str, network: &str) -> Error {
    Error::model(weights.path(), name, format!("missing: not a complete {network}"))
}

/// Names the network that the tensors belong to, as far as it is known.
fn other_network(weights: &Weights) -> Error {
    let names: Vec<&str> = weights.names().iter().take(3).map(String::as_str).collect();
    let known = "this version runs STU-Net, PlainConvUNet, ResidualEncoderUNet and nnU-Net v1's Generic_UNet";
    Error::unsupported(format!("{}: an unknown network with tensors {names:?} ...; {known}", weights.path().display()))
}
