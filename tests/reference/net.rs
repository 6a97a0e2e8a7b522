//! The networks, built from the names and shapes of their parameters.

use std::collections::BTreeMap;

use super::tape::{Array, Tape, Var};
use crate::common::golden_train::Kind;

/// Of leaky ReLU below zero.
pub const SLOPE: f64 = 0.01;
const ONE: [usize; 3] = [1, 1, 1];

/// An instance norm right behind a convolution with a bias: the bias has no effect.
#[derive(Debug, Clone)]
pub struct Cancelled {
    /// Name of the bias.
    pub bias: String,
    /// What the norm reads.
    pub x: Var,
    pub gain: Var,
    /// What it gives; its gradient is kept.
    pub y: Var,
}

/// A leaky ReLU.
#[derive(Debug, Clone)]
pub struct Kinks {
    /// Name of the norm before it, in a residual block the last one before the sum.
    pub norm: String,
    /// The first result between that norm's input and the leaky ReLU: that of the convolution before the norm.
    pub first: Var,
    pub x: Var,
    /// Its gradient is kept.
    pub y: Var,
}

/// One pass of a network.
#[derive(Debug)]
pub struct Pass {
    /// Logits, the full resolution first.
    pub outputs: Vec<Var>,
    /// Where the parameters are on the tape.
    pub parameters: BTreeMap<String, Var>,
    pub cancelled: Vec<Cancelled>,
    /// In the order of their computation.
    pub kinks: Vec<Kinks>,
}

impl Pass {
    /// Runs the network of these parameters; `strides` lead from each resolution to the next.
    pub fn run(
        tape: &mut Tape,
        kind: Kind,
        strides: &[[usize; 3]],
        parameters: &BTreeMap<String, Array>,
        x: Array,
    ) -> Self {
        let parameters = parameters.iter().map(|(n, p)| (n.clone(), tape.parameter(p.clone()))).collect();
        let x = tape.constant(x);
        let mut net = Net { tape, parameters, cancelled: Vec::new(), kinks: Vec::new() };
        let outputs = match kind {
            Kind::StuNet => net.stunet(strides, x),
            Kind::Plain => net.unet(strides, x, Net::plain_stage),
            Kind::ResidualEncoder => {
                let x = net.conv_norm_relu("encoder.stem.convs.0", x, ONE);
                net.unet(strides, x, Net::residual_stage)
            }
        };
        Self { outputs, parameters: net.parameters, cancelled: net.cancelled, kinks: net.kinks }
    }
}

struct Net<'t> {
    tape: &'t mut Tape,
    parameters: BTreeMap<String, Var>,
    cancelled: Vec<Cancelled>,
    kinks: Vec<Kinks>,
}

/// A norm's result.
#[derive(Clone)]
struct Normed {
    y: Var,
    norm: String,
    /// What the convolution before the norm gives.
    first: Var,
}

impl Net<'_> {
    fn has(&self, name: &str) -> bool {
        self.parameters.contains_key(name)
    }

    fn get(&self, name: &str) -> Var {
        *self.parameters.get(name).unwrap_or_else(|| panic!("no parameter {name}"))
    }

    fn add_bias(&mut self, name: &str, y: Var) -> Var {
        let bias = format!("{name}.bias");
        if self.has(&bias) { self.tape.bias(y, self.get(&bias)) } else { y }
    }

    /// Padded by half the kernel.
    fn conv(&mut self, name: &str, x: Var, stride: [usize; 3]) -> Var {
        let w = self.get(&format!("{name}.weight"));
        let padding = self.tape.value(w).space().map(|k| k / 2);
        let y = self.tape.conv3d(x, w, stride, padding);
        self.add_bias(name, y)
    }

    fn conv_norm(&mut self, conv: &str, norm: String, x: Var, stride: [usize; 3]) -> Normed {
        let first = self.tape.next();
        let x = self.conv(conv, x, stride);
        let (gain, shift) = (self.get(&format!("{norm}.weight")), self.get(&format!("{norm}.bias")));
        let y = self.tape.instance_norm(x, gain, shift);
        let bias = format!("{conv}.bias");
        if self.has(&bias) {
            self.tape.keep(y);
            self.cancelled.push(Cancelled { bias, x, gain, y });
        }
        Normed { y, norm, first }
    }

    fn relu(&mut self, Normed { y: x, norm, first }: Normed) -> Var {
        let y = self.tape.leaky_relu(x, SLOPE);
        self.tape.keep(y);
        self.kinks.push(Kinks { norm, first, x, y });
        y
    }

    /// Of the sum with a block's shortcut.
    fn add_relu(&mut self, y: Normed, shortcut: Var) -> Var {
        let sum = self.tape.add(y.y, shortcut);
        self.relu(Normed { y: sum, ..y })
    }

    /// STU-Net's block: two convolutions, and a shortcut that is a convolution where the file has one.
    fn stunet_block(&mut self, name: &str, x: Var, stride: [usize; 3]) -> Var {
        let at = |part: &str| format!("{name}.{part}");
        let y = self.conv_norm(&at("conv1"), at("norm1"), x, stride);
        let y = self.relu(y);
        let y = self.conv_norm(&at("conv2"), at("norm2"), y, ONE);
        let shortcut = if self.has(&at("conv3.weight")) { self.conv(&at("conv3"), x, stride) } else { x };
        self.add_relu(y, shortcut)
    }

    fn stunet_stage(&mut self, name: &str, x: Var, stride: [usize; 3]) -> Var {
        let mut x = self.stunet_block(&format!("{name}.0"), x, stride);
        for block in (1..).map(|b| format!("{name}.{b}")) {
            if !self.has(&format!("{block}.conv1.weight")) {
                break;
            }
            x = self.stunet_block(&block, x, ONE);
        }
        x
    }

    fn stunet(&mut self, strides: &[[usize; 3]], x: Var) -> Vec<Var> {
        let mut skips = vec![self.stunet_stage("conv_blocks_context.0", x, ONE)];
        for (s, stride) in strides.iter().enumerate() {
            let name = format!("conv_blocks_context.{}", s + 1);
            skips.push(self.stunet_stage(&name, skips[s], *stride));
        }
        let mut x = skips[strides.len()];
        let mut outputs = Vec::new();
        for (u, stride) in strides.iter().rev().enumerate() {
            let up = self.tape.upsample_nearest(x, *stride);
            let up = self.conv(&format!("upsample_layers.{u}.conv"), up, ONE);
            let both = self.tape.concat(up, skips[strides.len() - 1 - u]);
            x = self.stunet_stage(&format!("conv_blocks_localization.{u}"), both, ONE);
            outputs.push(self.conv(&format!("seg_outputs.{u}"), x, ONE));
        }
        outputs.reverse();
        outputs
    }

    fn conv_norm_relu(&mut self, name: &str, x: Var, stride: [usize; 3]) -> Var {
        let y = self.conv_norm(&format!("{name}.conv"), format!("{name}.norm"), x, stride);
        self.relu(y)
    }

    /// Convolutions in a row, the first with the stride.
    fn stacked(&mut self, name: &str, x: Var, stride: [usize; 3]) -> Var {
        let mut x = self.conv_norm_relu(&format!("{name}.convs.0"), x, stride);
        for conv in (1..).map(|i| format!("{name}.convs.{i}")) {
            if !self.has(&format!("{conv}.conv.weight")) {
                break;
            }
            x = self.conv_norm_relu(&conv, x, ONE);
        }
        x
    }

    fn plain_stage(&mut self, name: &str, x: Var, stride: [usize; 3]) -> Var {
        self.stacked(&format!("{name}.0"), x, stride)
    }

    /// nnU-Net's `BasicBlockD`: the shortcut is averaged where the block has a stride, and projected, without a bias,
    /// where it changes the channels.
    fn residual_block(&mut self, name: &str, x: Var, stride: [usize; 3]) -> Var {
        let y = self.conv_norm_relu(&format!("{name}.conv1"), x, stride);
        let y = self.conv_norm(&format!("{name}.conv2.conv"), format!("{name}.conv2.norm"), y, ONE);
        let pooled = stride != ONE;
        let mut shortcut = if pooled { self.tape.avg_pool(x, stride) } else { x };
        let projection = format!("{name}.skip.{}", usize::from(pooled));
        if self.has(&format!("{projection}.conv.weight")) {
            shortcut = self.conv_norm(&format!("{projection}.conv"), format!("{projection}.norm"), shortcut, ONE).y;
        }
        self.add_relu(y, shortcut)
    }

    fn residual_stage(&mut self, name: &str, x: Var, stride: [usize; 3]) -> Var {
        let mut x = self.residual_block(&format!("{name}.blocks.0"), x, stride);
        for block in (1..).map(|b| format!("{name}.blocks.{b}")) {
            if !self.has(&format!("{block}.conv1.conv.weight")) {
                break;
            }
            x = self.residual_block(&block, x, ONE);
        }
        x
    }

    /// nnU-Net's U-Net with an encoder of such stages.
    fn unet(
        &mut self,
        strides: &[[usize; 3]],
        x: Var,
        stage: impl Fn(&mut Self, &str, Var, [usize; 3]) -> Var,
    ) -> Vec<Var> {
        let mut skips = vec![stage(self, "encoder.stages.0", x, ONE)];
        for (s, stride) in strides.iter().enumerate() {
            skips.push(stage(self, &format!("encoder.stages.{}", s + 1), skips[s], *stride));
        }
        let mut x = skips[strides.len()];
        let mut outputs = Vec::new();
        for (u, stride) in strides.iter().rev().enumerate() {
            let name = format!("decoder.transpconvs.{u}");
            let w = self.get(&format!("{name}.weight"));
            let up = self.tape.conv_transpose3d(x, w, *stride);
            let up = self.add_bias(&name, up);
            let both = self.tape.concat(up, skips[strides.len() - 1 - u]);
            x = self.stacked(&format!("decoder.stages.{u}"), both, ONE);
            outputs.push(self.conv(&format!("decoder.seg_layers.{u}"), x, ONE));
        }
        outputs.reverse();
        outputs
    }
}
