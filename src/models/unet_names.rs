//! Names of a U-Net's modules in PyTorch's state dict.

use super::{UnetConfig, UnetKind};

/// The first convolution of a residual encoder.
pub(crate) const STEM: &str = "encoder.stem.convs.0";

/// A block of a residual encoder.
pub(super) fn encoder_block(stage: usize, block: usize) -> String {
    format!("encoder.stages.{stage}.blocks.{block}")
}

/// A block's 1x1x1 convolution, which comes after the pooling where there is one.
pub(super) fn projection(block: &str, stride: [usize; 3]) -> String {
    format!("{block}.skip.{}", usize::from(stride != [1; 3]))
}

impl UnetKind {
    /// A convolution of the `convs` of an encoder stage; of a residual encoder the first of a block. `last`: of the coarsest
    /// stage.
    pub(crate) fn encoder_conv(self, stage: usize, last: bool, conv: usize, convs: usize) -> String {
        match self {
            UnetKind::Plain => format!("encoder.stages.{stage}.0.convs.{conv}"),
            UnetKind::ResEnc => format!("{}.conv1", encoder_block(stage, conv)),
            UnetKind::Generic if last => in_two("conv_blocks_context", stage, conv, convs),
            UnetKind::Generic => format!("conv_blocks_context.{stage}.blocks.{conv}"),
        }
    }

    /// A convolution of the `convs` of a decoder stage, the coarsest of which is 0.
    pub(crate) fn decoder_conv(self, level: usize, conv: usize, convs: usize) -> String {
        match self {
            UnetKind::Plain | UnetKind::ResEnc => format!("decoder.stages.{level}.convs.{conv}"),
            UnetKind::Generic => in_two("conv_blocks_localization", level, conv, convs),
        }
    }

    /// The transposed convolution into a decoder stage.
    pub(crate) fn up(self, level: usize) -> String {
        match self {
            UnetKind::Plain | UnetKind::ResEnc => format!("decoder.transpconvs.{level}"),
            UnetKind::Generic => format!("tu.{level}"),
        }
    }

    /// The scores of a decoder stage.
    pub(crate) fn head(self, level: usize) -> String {
        match self {
            UnetKind::Plain | UnetKind::ResEnc => format!("decoder.seg_layers.{level}"),
            UnetKind::Generic => format!("seg_outputs.{level}"),
        }
    }

    /// The norm after a convolution.
    pub(super) fn norm(self) -> &'static str {
        match self {
            UnetKind::Plain | UnetKind::ResEnc => "norm",
            UnetKind::Generic => "instnorm",
        }
    }
}

impl UnetConfig {
    pub(super) fn encoder_conv(&self, stage: usize, conv: usize) -> String {
        self.kind.encoder_conv(stage, stage + 1 == self.features.len(), conv, self.depth[stage])
    }

    pub(super) fn decoder_conv(&self, level: usize, conv: usize) -> String {
        self.kind.decoder_conv(level, conv, self.decoder_depth[level])
    }
}

/// nnU-Net 1 keeps the last of a stage's convolutions in a sequence of its own.
fn in_two(list: &str, stage: usize, conv: usize, convs: usize) -> String {
    if conv + 1 < convs { format!("{list}.{stage}.0.blocks.{conv}") } else { format!("{list}.{stage}.1.blocks.0") }
}
