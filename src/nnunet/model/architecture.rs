//! Which network a file of weights holds, told from the names and shapes of its tensors alone.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::io::weights::Weights;
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
}

impl Architecture {
    /// STU-Net S, B, L or H by its base width and blocks per stage.
    #[must_use]
    pub fn stunet(base: usize, blocks: usize, in_channels: usize, classes: usize) -> Self {
        let dims = [1, 2, 4, 8, 16, 16].map(|m| m * base);
        Architecture::StuNet { dims, depth: [blocks; 6], decoder_depth: [blocks; 5], in_channels, classes }
    }

    /// Tells the network from its tensors and checks that every tensor of it is there, with the right shape and a
    /// floating-point type, and no other.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another network, [`Error::Model`] naming the first tensor that does not fit.
    pub fn infer(weights: &Weights) -> Result<Self> {
        if weights.shape("seg_outputs.4.weight").is_none() && weights.shape(&conv(ENCODER, 0, 0, "conv1")).is_none() {
            return Err(other_network(weights));
        }
        let dim = |name: &str, axis: usize| -> Result<usize> {
            let shape = weights.shape(name).ok_or_else(|| missing(weights, name))?;
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
        let expected = self.tensors();
        for (name, shape) in &expected {
            let found = weights.shape(name).ok_or_else(|| missing(weights, name))?;
            if found != shape {
                return Err(Error::model(weights.path(), name, format!("shape {found:?}, expected {shape:?}")));
            }
            let dtype = weights.dtype(name);
            if !matches!(dtype, Some(DType::F32 | DType::F64 | DType::F16 | DType::Bf16)) {
                return Err(Error::model(weights.path(), name, "not of a floating-point type"));
            }
        }
        if weights.names().len() != expected.len() {
            let known: std::collections::HashSet<&str> = expected.iter().map(|(n, _)| n.as_str()).collect();
            if let Some(name) = weights.names().iter().find(|n| !known.contains(n.as_str())) {
                return Err(Error::model(weights.path(), name, "not a tensor of STU-Net"));
            }
        }
        Ok(())
    }

    /// Checks that the network takes and gives what the plan says.
    pub(super) fn check_plan(&self, plan: &InferencePlan, weights: &Weights) -> Result<()> {
        let Architecture::StuNet { in_channels, classes, .. } = *self;
        if in_channels != plan.channels.len() {
            let what = format!("{in_channels} input channels, the plan has {}", plan.channels.len());
            return Err(Error::model(weights.path(), conv(ENCODER, 0, 0, "conv1"), what));
        }
        if classes != plan.heads {
            let what = format!("{classes} output channels, the plan has {}", plan.heads);
            return Err(Error::model(weights.path(), "seg_outputs.4.weight", what));
        }
        Ok(())
    }

    /// Name and shape of every tensor, in PyTorch's order of registration.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Architecture::StuNet { dims, depth, decoder_depth, in_channels, classes } = self;
        let mut out = Vec::new();
        for s in 0..6 {
            let input = if s == 0 { *in_channels } else { dims[s - 1] };
            stage(&mut out, ENCODER, s, input, dims[s], depth[s]);
        }
        for u in 0..5 {
            push(&mut out, &format!("upsample_layers.{u}.conv"), &[dims[4 - u], dims[5 - u], 1, 1, 1]);
        }
        for u in 0..5 {
            stage(&mut out, DECODER, u, dims[4 - u].saturating_mul(2), dims[4 - u], decoder_depth[u]);
        }
        for u in 0..5 {
            push(&mut out, &format!("seg_outputs.{u}"), &[*classes, dims[4 - u], 1, 1, 1]);
        }
        out
    }

    /// Number of parameters.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        self.tensors().iter().map(|(_, s)| s.iter().map(|&d| d as u64).product::<u64>()).sum()
    }

    /// Multiply-accumulate operations of the convolutions for one patch (the four outputs of deep supervision, which
    /// inference leaves out, not counted).
    #[must_use]
    pub fn macs(&self, patch: [usize; 3], strides: &[[usize; 3]; 5]) -> u64 {
        let Architecture::StuNet { dims, depth, decoder_depth, in_channels, classes } = self;
        let mut size = patch;
        let mut voxels = [0u64; 6];
        for (s, v) in voxels.iter_mut().enumerate() {
            if s > 0 {
                // Padding of half a kernel: a stride rounds up.
                size = std::array::from_fn(|a| size[a].div_ceil(strides[s - 1][a].max(1)));
            }
            *v = size.iter().map(|&d| d as u64).product();
        }
        let block = |input: usize, out: usize, blocks: usize| {
            let (i, o, b) = (input as u64, out as u64, blocks as u64);
            27 * i * o + 27 * o * o + i * o + (b - 1) * 54 * o * o
        };
        let mut total = 0;
        for s in 0..6 {
            let input = if s == 0 { *in_channels } else { dims[s - 1] };
            total += voxels[s] * block(input, dims[s], depth[s]);
        }
        for u in 0..5 {
            let (d, v) = (dims[4 - u], voxels[4 - u]);
            total += v * ((dims[5 - u] * d) as u64 + block(2 * d, d, decoder_depth[u]));
        }
        total + voxels[0] * (dims[0] * classes) as u64
    }
}

fn conv(part: &str, stage: usize, block: usize, layer: &str) -> String {
    format!("{part}.{stage}.{block}.{layer}.weight")
}

fn missing(weights: &Weights, name: &str) -> Error {
    Error::model(weights.path(), name, "missing: not a complete STU-Net")
}

fn push(out: &mut Vec<(String, Vec<usize>)>, name: &str, weight: &[usize]) {
    out.push((format!("{name}.weight"), weight.to_vec()));
    out.push((format!("{name}.bias"), weight[..1].to_vec()));
}

fn stage(out: &mut Vec<(String, Vec<usize>)>, part: &str, s: usize, input: usize, c: usize, blocks: usize) {
    for b in 0..blocks {
        let i = if b == 0 { input } else { c };
        let at = format!("{part}.{s}.{b}");
        push(out, &format!("{at}.conv1"), &[c, i, 3, 3, 3]);
        push(out, &format!("{at}.norm1"), &[c]);
        push(out, &format!("{at}.conv2"), &[c, c, 3, 3, 3]);
        push(out, &format!("{at}.norm2"), &[c]);
        if b == 0 {
            push(out, &format!("{at}.conv3"), &[c, i, 1, 1, 1]);
        }
    }
}

/// Names the network that the tensors belong to, as far as it is known.
fn other_network(weights: &Weights) -> Error {
    let has = |prefix: &str| weights.names().iter().any(|n| n.starts_with(prefix));
    let what = if has("encoder.stem.") || has("encoder.stages.0.blocks.") {
        "this is a ResidualEncoderUNet of nnU-Net v2"
    } else if has("encoder.stages.0.0.convs.") {
        "this is a PlainConvUNet of nnU-Net v2"
    } else if has("conv_blocks_context.0.blocks.") {
        "this is a Generic_UNet of nnU-Net v1"
    } else {
        let names: Vec<&str> = weights.names().iter().take(3).map(String::as_str).collect();
        let what = format!("{}: an unknown network with tensors {names:?}", weights.path().display());
        return Error::unsupported(format!("{what} ...; this version runs STU-Net only"));
    };
    Error::unsupported(format!("{}: {what}; this version runs STU-Net only", weights.path().display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_of_the_paper() {
        let counts = [(16, 1), (32, 1), (64, 2), (96, 3)].map(|(base, blocks)| {
            let net = Architecture::stunet(base, blocks, 1, 105);
            (net.parameter_count(), net.tensors().len())
        });
        assert_eq!(counts, [(14_596_941, 130), (58_262_669, 130), (440_302_605, 218), (1_457_326_221, 306)]);
    }

    #[test]
    fn flops_of_the_paper() {
        // STU-Net's README: 0.13, 0.51, 3.81, 12.60 TFLOPs at 128^3, counting a multiply-accumulate as one and giving
        // what a hook-based counter gives, which leaves the strides of the plan open.
        let strides = [[2, 2, 2]; 5];
        for (base, blocks, tera) in [(16, 1, 0.13), (32, 1, 0.51), (64, 2, 3.81), (96, 3, 12.60)] {
            let macs = Architecture::stunet(base, blocks, 1, 105).macs([128; 3], &strides) as f64 / 1e12;
            assert!((macs / tera - 1.0).abs() < 0.06, "{base}: {macs} against {tera}");
        }
    }
}
