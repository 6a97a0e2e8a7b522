//! Names of a U-Net's modules in PyTorch's state dict.

use super::{UnetConfig, UnetKind};

/// The first convolution of a residual encoder.
pub(super) const STEM: &str = "encoder.stem.convs.0";

/// A block of a residual encoder.
pub(super) fn encoder_block(stage: usize, block: usize) -> String {
    format!("encoder.stages.{stage}.blocks.{block}")
}

/// A block's 1x1x1 convolution, which comes after the pooling where there is one.
pub(super) fn projection(block: &str, stride: [usize; 3]) -> String {
    format!("{block}.skip.{}", usize::from(stride != [1; 3]))
}

impl UnetConfig {
    /// A convolution of a stage of an encoder without residual blocks.
    pub(super) fn encoder_conv(&self, stage: usize, conv: usize) -> String {
        match self.kind {
            UnetKind::Generic if stage + 1 < self.features.len() => {
                format!("conv_blocks_context.{stage}.blocks.{conv}")
            }
            UnetKind::Generic => in_two("conv_blocks_context", stage, conv, self.depth[stage]),
            UnetKind::Plain | UnetKind::ResEnc => format!("encoder.stages.{stage}.0.convs.{conv}"),
        }
    }

    /// A convolution of a decoder stage, the coarsest of which is 0.
    pub(super) fn decoder_conv(&self, level: usize, conv: usize) -> String {
        match self.kind {
            UnetKind::Generic => in_two("conv_blocks_localization", level, conv, self.decoder_depth[level]),
            UnetKind::Plain | UnetKind::ResEnc => format!("decoder.stages.{level}.convs.{conv}"),
        }
    }

    /// The transposed convolution into a decoder stage.
    pub(super) fn up(&self, level: usize) -> String {
        match self.kind {
            UnetKind::Generic => format!("tu.{level}"),
            UnetKind::Plain | UnetKind::ResEnc => format!("decoder.transpconvs.{level}"),
        }
    }

    /// The scores of a decoder stage.
    pub(super) fn head(&self, level: usize) -> String {
        match self.kind {
            UnetKind::Generic => format!("seg_outputs.{level}"),
            UnetKind::Plain | UnetKind::ResEnc => format!("decoder.seg_layers.{level}"),
        }
    }

    /// The norm after a convolution.
    pub(super) fn norm(&self) -> &'static str {
        match self.kind {
            UnetKind::Generic => "instnorm",
            UnetKind::Plain | UnetKind::ResEnc => "norm",
        }
    }
}

/// nnU-Net 1 keeps the last of a stage's `convs` convolutions in a sequence of its own.
fn in_two(list: &str, stage: usize, conv: usize, convs: usize) -> String {
    if conv + 1 < convs { format!("{list}.{stage}.0.blocks.{conv}") } else { format!("{list}.{stage}.1.blocks.0") }
}
