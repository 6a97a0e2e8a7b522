//! The sizes of nnU-Net's U-Nets, and what follows from them.

use serde::{Deserialize, Serialize};

use super::unet_names::{STEM, encoder_block, projection};
use crate::error::{Error, Result};
use crate::ops;
use crate::tensor::{BLOCK, Device, Precision};

/// Which of nnU-Net's U-Nets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UnetKind {
    /// `PlainConvUNet`: stages of convolutions.
    #[serde(rename = "PlainConvUNet")]
    Plain,
    /// `ResidualEncoderUNet`: a stem and stages of residual blocks, a decoder of convolutions.
    #[serde(rename = "ResidualEncoderUNet")]
    ResEnc,
    /// `Generic_UNet` of nnU-Net 1, with convolutions for its ways down and up: a `PlainConvUNet`, but for transposed
    /// convolutions and heads without a bias, and kernels of decoder stages, which are those of the next coarser stage.
    #[serde(rename = "Generic_UNet")]
    Generic,
}

impl UnetKind {
    /// The name of its class in nnU-Net's plans, without the module.
    #[must_use]
    pub fn class_name(self) -> &'static str {
        match self {
            UnetKind::Plain => "PlainConvUNet",
            UnetKind::ResEnc => "ResidualEncoderUNet",
            UnetKind::Generic => "Generic_UNet",
        }
    }

    /// The one that nnU-Net 2 has under a class's name, with or without its module.
    #[must_use]
    pub fn of_class(name: &str) -> Option<Self> {
        let class = name.rsplit('.').next().unwrap_or(name);
        [UnetKind::Plain, UnetKind::ResEnc].into_iter().find(|k| k.class_name() == class)
    }
}

/// Sizes that make a U-Net of nnU-Net: instance norm with eps 1e-5 and leaky ReLU of slope 0.01 throughout. A 2D network is
/// one of depth 1 with kernels `[1, k, k]` whose files hold filters of four axes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnetConfig {
    /// Which of them.
    #[serde(rename = "class")]
    pub kind: UnetKind,
    /// Input channels.
    pub in_channels: usize,
    /// Output channels, background included.
    pub classes: usize,
    /// Channels of each stage, finest first.
    pub features: Vec<usize>,
    /// Kernel sizes (z, y, x) of each stage, 1 or 3.
    pub kernels: Vec<[usize; 3]>,
    /// Strides (z, y, x) into each stage, 1 or 2; the first stage has none.
    pub strides: Vec<[usize; 3]>,
    /// Convolutions, or residual blocks, of each encoder stage.
    pub depth: Vec<usize>,
    /// Convolutions of each decoder stage, coarsest first.
    pub decoder_depth: Vec<usize>,
    /// Whether convolutions have a bias.
    pub conv_bias: bool,
    /// Whether heads have one; those of nnU-Net 2 always do.
    #[serde(default = "always")]
    pub head_bias: bool,
    /// A 2D network.
    pub planar: bool,
}

fn always() -> bool {
    true
}

/// A list of names and shapes that grows.
struct Parameters {
    planar: bool,
    norm: &'static str,
    out: Vec<(String, Vec<usize>)>,
}

impl Parameters {
    fn filter(&mut self, name: &str, channels: [usize; 2], kernel: [usize; 3]) {
        let space = if self.planar { &kernel[1..] } else { &kernel[..] };
        self.out.push((format!("{name}.weight"), [&channels, space].concat()));
    }

    fn vector(&mut self, name: &str, what: &str, len: usize) {
        self.out.push((format!("{name}.{what}"), vec![len]));
    }

    fn conv_norm(&mut self, name: &str, out: usize, inputs: usize, kernel: [usize; 3], bias: bool) {
        self.filter(&format!("{name}.conv"), [out, inputs], kernel);
        if bias {
            self.vector(&format!("{name}.conv"), "bias", out);
        }
        let norm = format!("{name}.{}", self.norm);
        self.vector(&norm, "weight", out);
        self.vector(&norm, "bias", out);
    }
}

/// More stages than any image has octaves.
const MAX_STAGES: usize = 16;
/// More of anything than any machine computes; keeps products far from overflow.
const MAX_SIZE: usize = 1 << 16;

impl UnetConfig {
    /// Checks that the sizes make a network that there are kernels for.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming what does not fit.
    pub fn validate(&self) -> Result<()> {
        let (n, name) = (self.features.len(), self.kind.class_name());
        let bad = |what: String| Err(Error::unsupported(format!("{name}: {what}")));
        if !(2..=MAX_STAGES).contains(&n) {
            return bad(format!("{n} stages, expected 2 to {MAX_STAGES}"));
        }
        let lengths = [self.kernels.len(), self.strides.len(), self.depth.len(), self.decoder_depth.len() + 1];
        if lengths != [n; 4] {
            return bad(format!("{lengths:?} kernels, strides, encoder and decoder depths (and 1) for {n} stages"));
        }
        let sizes = self.features.iter().chain([&self.in_channels, &self.classes]).chain(&self.depth);
        if let Some(v) = sizes.chain(&self.decoder_depth).find(|v| !(1..=MAX_SIZE).contains(*v)) {
            return bad(format!("{v} channels, convolutions or blocks, expected 1 to {MAX_SIZE}"));
        }
        if let Some(k) = self.kernels.iter().find(|k| k.iter().any(|k| !matches!(k, 1 | 3))) {
            return bad(format!("kernel {k:?}; 1 and 3 per axis are"));
        }
        if let Some(s) = self.strides.iter().find(|s| s.iter().any(|s| !matches!(s, 1 | 2))) {
            return bad(format!("stride {s:?}; 1 and 2 per axis are"));
        }
        if self.strides[0] != [1; 3] {
            return bad(format!("stride {:?} into the first stage; none is", self.strides[0]));
        }
        // nnU-Net 1 keeps the last convolution of these stages apart, and always has one before it.
        let last = self.depth.iter().rev().take(1).chain(&self.decoder_depth);
        if self.kind == UnetKind::Generic && last.clone().any(|&d| d < 2) {
            return bad("one convolution in the last encoder stage or a decoder stage, expected at least two".into());
        }
        if self.planar && self.kernels.iter().chain(&self.strides).any(|v| v[0] != 1) {
            return bad("a kernel or stride along z in a 2D network".into());
        }
        Ok(())
    }

    /// Name and shape of every parameter, by their first names in PyTorch's state dict, in its order.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = Parameters { planar: self.planar, norm: self.kind.norm(), out: Vec::new() };
        let f = &self.features;
        // nnU-Net 1 registers the way up first.
        match self.kind {
            UnetKind::Generic => {
                self.decoder_parameters(&mut list);
                self.encoder_parameters(&mut list);
            }
            UnetKind::Plain | UnetKind::ResEnc => {
                self.encoder_parameters(&mut list);
                self.decoder_parameters(&mut list);
            }
        }
        for u in 0..f.len() - 1 {
            let s = f.len() - 2 - u;
            // A transposed convolution's filter begins with its inputs.
            list.filter(&self.kind.up(u), [f[s + 1], f[s]], self.strides[s + 1]);
            if self.up_bias() {
                list.vector(&self.kind.up(u), "bias", f[s]);
            }
        }
        for u in 0..f.len() - 1 {
            list.filter(&self.kind.head(u), [self.classes, f[f.len() - 2 - u]], [1; 3]);
            if self.head_bias {
                list.vector(&self.kind.head(u), "bias", self.classes);
            }
        }
        list.out
    }

    fn encoder_parameters(&self, list: &mut Parameters) {
        let (f, k, bias) = (&self.features, &self.kernels, self.conv_bias);
        if self.kind == UnetKind::ResEnc {
            list.conv_norm(STEM, f[0], self.in_channels, k[0], bias);
        }
        for s in 0..f.len() {
            for (b, i) in self.block_inputs(s).into_iter().enumerate() {
                match self.kind {
                    UnetKind::Plain | UnetKind::Generic => {
                        list.conv_norm(&self.encoder_conv(s, b), f[s], i, k[s], bias);
                    }
                    UnetKind::ResEnc => {
                        let block = encoder_block(s, b);
                        list.conv_norm(&format!("{block}.conv1"), f[s], i, k[s], bias);
                        list.conv_norm(&format!("{block}.conv2"), f[s], f[s], k[s], bias);
                        if i != f[s] {
                            list.conv_norm(&projection(&block, self.stride(s, b)), f[s], i, [1; 3], false);
                        }
                    }
                }
            }
        }
    }

    fn decoder_parameters(&self, list: &mut Parameters) {
        let f = &self.features;
        for u in 0..f.len() - 1 {
            let s = f.len() - 2 - u;
            for c in 0..self.decoder_depth[u] {
                let inputs = if c == 0 { 2 * f[s] } else { f[s] };
                list.conv_norm(&self.decoder_conv(u, c), f[s], inputs, self.decoder_kernel(s), self.conv_bias);
            }
        }
    }

    /// Other names of parameters in PyTorch's state dict, each with the first: what a file needs that PyTorch is to load
    /// strictly. Convolutions and norms stand in a list, too, and the encoder in the decoder.
    #[must_use]
    pub fn aliases(&self) -> Vec<(String, String)> {
        let mut out = Vec::new();
        if self.kind == UnetKind::Generic {
            return out;
        }
        for (name, _) in self.parameters() {
            let listed =
                [(".conv.", ".all_modules.0."), (".norm.", ".all_modules.1.")].into_iter().find_map(|(a, b)| {
                    let at = name.rfind(a)?;
                    Some(format!("{}{b}{}", &name[..at], &name[at + a.len()..]))
                });
            let names: Vec<String> = [Some(name.clone()), listed].into_iter().flatten().collect();
            out.extend(names[1..].iter().map(|n| (n.clone(), name.clone())));
            if name.starts_with("encoder.") {
                out.extend(names.iter().map(|n| (format!("decoder.{n}"), name.clone())));
            }
        }
        out
    }

    /// The kernel of a decoder stage that has the size of encoder stage `stage`.
    pub(super) fn decoder_kernel(&self, stage: usize) -> [usize; 3] {
        self.kernels[stage + usize::from(self.kind == UnetKind::Generic)]
    }

    fn up_bias(&self) -> bool {
        self.conv_bias && self.kind != UnetKind::Generic
    }

    /// The stride of a convolution or block of an encoder stage.
    pub(super) fn stride(&self, stage: usize, block: usize) -> [usize; 3] {
        if block == 0 { self.strides[stage] } else { [1; 3] }
    }

    /// Input channels of the convolutions or blocks of an encoder stage.
    pub(super) fn block_inputs(&self, stage: usize) -> Vec<usize> {
        let first = match (stage, self.kind) {
            (0, UnetKind::Plain | UnetKind::Generic) => self.in_channels,
            (0, UnetKind::ResEnc) => self.features[0],
            (s, _) => self.features[s - 1],
        };
        let mut inputs = vec![self.features[stage]; self.depth[stage]];
        inputs[0] = first;
        inputs
    }

    /// Number of trainable parameters.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        self.parameters().iter().map(|(_, s)| s.iter().map(|&d| d as u64).product::<u64>()).sum()
    }

    /// Product of the strides per axis: a patch must be a multiple of it.
    #[must_use]
    pub fn divisor(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| self.strides.iter().map(|s| s[a]).product())
    }

    /// (D, H, W) of each stage for a patch.
    fn spaces(&self, patch: [usize; 3]) -> Vec<[usize; 3]> {
        let mut space = patch;
        let next = |s: &[usize; 3]| {
            space = [0, 1, 2].map(|a| space[a] / s[a].max(1));
            space
        };
        self.strides.iter().map(next).collect()
    }

    /// Multiply-accumulates of one forward pass over a patch (z, y, x), full-resolution head only. Sizes too large to
    /// count give `u64::MAX`.
    #[must_use]
    pub fn macs(&self, patch: [usize; 3]) -> u64 {
        let product = |sizes: &[usize]| sizes.iter().fold(1u64, |n, &s| n.saturating_mul(s as u64));
        let (f, spaces) = (&self.features, self.spaces(patch));
        let conv = |s: usize, i: usize, k: [usize; 3]| {
            product(&[f[s], i]).saturating_mul(product(&k)).saturating_mul(product(&spaces[s]))
        };
        let mut total = product(&[f[0], self.classes]).saturating_mul(product(&spaces[0]));
        let mut add = |macs: u64| total = total.saturating_add(macs);
        if self.kind == UnetKind::ResEnc {
            add(conv(0, self.in_channels, self.kernels[0]));
        }
        for s in 0..f.len() {
            for i in self.block_inputs(s) {
                add(conv(s, i, self.kernels[s]));
                if self.kind == UnetKind::ResEnc {
                    add(conv(s, f[s], self.kernels[s]));
                    if i != f[s] {
                        add(conv(s, i, [1; 3]));
                    }
                }
            }
        }
        for u in 0..f.len() - 1 {
            let s = f.len() - 2 - u;
            // Every output voxel of the way up has one tap.
            add(conv(s, f[s + 1], [1; 3]));
            for c in 0..self.decoder_depth[u] {
                add(conv(s, if c == 0 { 2 * f[s] } else { f[s] }, self.decoder_kernel(s)));
            }
        }
        total
    }

    /// Bytes of tensors that a forward pass on `device` takes at its peak beside the parameters, up to the last features
    /// and with the input; see [`StuNetConfig::activation_bytes`](super::StuNetConfig::activation_bytes). The first size of a
    /// 2D network's patch is the number of its slices, each a sample of depth 1.
    #[must_use]
    pub fn activation_bytes(&self, patch: [usize; 3], device: &Device, strict: bool, precision: Precision) -> usize {
        self.plan_memory(patch, device, strict, precision).map_or(usize::MAX, |(peak, kept)| peak.saturating_add(kept))
    }

    /// Those of [`UnetConfig::activation_bytes`] that stay after a pass: filters in another form, kept by each network.
    #[must_use]
    pub fn kept_bytes(&self, patch: [usize; 3], device: &Device, strict: bool, precision: Precision) -> usize {
        self.plan_memory(patch, device, strict, precision).map_or(usize::MAX, |(_, kept)| kept)
    }

    /// The peak without filters that are kept, and these. Follows the order in which [`super::Unet::features`] runs.
    fn plan_memory(
        &self,
        patch: [usize; 3],
        device: &Device,
        strict: bool,
        precision: Precision,
    ) -> Option<(usize, usize)> {
        let (f, spaces) = (&self.features, self.spaces(patch));
        let bytes = |s: usize, channels: usize, size: usize| {
            let voxels = spaces[s].iter().try_fold(size, |n, &d| n.checked_mul(d))?;
            voxels.checked_mul(channels.next_multiple_of(BLOCK))
        };
        let t = |s: usize| bytes(s, f[s], precision.size());
        let (mut peak, mut kept, mut ups) = (0usize, 0usize, 0usize);
        // One convolution into stage `s` beside `live` bytes, its input among them if no one else reads that (`owned`).
        let mut conv = |live: usize, channels: &[usize], s: usize, k: [usize; 3], stride: [usize; 3], owned: bool| {
            let input = if stride == [1; 3] { spaces[s] } else { spaces[s - 1] };
            let [kd, kh, kw] = k;
            let w = [f[s], channels.iter().sum(), kd, kh, kw];
            let how = ops::Conv3d { stride, padding: k.map(|k| k / 2) };
            let (batch, input) = if self.planar { (input[0], [1, input[1], input[2]]) } else { (1, input) };
            let m = ops::conv3d_memory(device, strict, precision, channels, w, batch, input, how, owned).ok()?;
            // Memory that is used again may be a quarter larger.
            kept = kept.checked_add(m.kept + m.kept / 4)?;
            let output = if m.in_place { 0 } else { t(s)? };
            peak = peak.max(live.checked_add(output)?.checked_add(m.working)?);
            Some(())
        };
        let mut skips = spaces[0].iter().try_fold(4usize, |n, &d| n.checked_mul(d))?.checked_mul(self.in_channels)?;
        if self.kind == UnetKind::ResEnc {
            conv(skips, &[self.in_channels], 0, self.kernels[0], [1; 3], false)?;
            skips = skips.checked_add(t(0)?)?;
        }
        for s in 0..f.len() {
            let (size, k) = (t(s)?, self.kernels[s]);
            for (b, i) in self.block_inputs(s).into_iter().enumerate() {
                let stride = self.stride(s, b);
                // From the second on, the output of the one before is this one's input and no skip.
                let before = if b == 0 { 0 } else { size };
                match self.kind {
                    UnetKind::Plain | UnetKind::Generic => {
                        conv(skips.checked_add(before)?, &[i], s, k, stride, b > 0)?;
                    }
                    UnetKind::ResEnc => {
                        let live = skips.checked_add(before)?;
                        conv(live, &[i], s, k, stride, false)?;
                        let live = live.checked_add(size)?;
                        conv(live, &[f[s]], s, k, [1; 3], true)?;
                        let mut live = live;
                        if stride != [1; 3] {
                            // Means are floats, and so is what they are of.
                            let whole = if precision == Precision::F32 { 0 } else { bytes(s - 1, i, 4)? };
                            live = live.checked_add(bytes(s, i, 4)?)?.checked_add(whole)?;
                        }
                        if i != f[s] {
                            conv(live, &[i], s, [1; 3], [1; 3], false)?;
                        } else {
                            conv(live, &[f[s]], s, [1; 3], [1; 3], true)?;
                        }
                    }
                }
            }
            // The stem's output is gone when the first stage has run.
            skips = if s == 0 && self.kind == UnetKind::ResEnc { skips } else { skips.checked_add(size)? };
        }
        for u in 0..f.len() - 1 {
            let s = f.len() - 2 - u;
            let (low, up) = (t(s + 1)?, bytes(s, f[s], 4)?);
            // The voxels that it reads are floats, as its result is.
            let whole = if precision == Precision::F32 { 0 } else { bytes(s + 1, f[s + 1], 4)? };
            ups = ups.max(skips.checked_add(up)?.checked_add(whole)?);
            skips = skips.checked_sub(low)?;
            let live = skips.checked_add(up)?;
            for c in 0..self.decoder_depth[u] {
                match c {
                    0 => conv(live, &[f[s], f[s]], s, self.decoder_kernel(s), [1; 3], false)?,
                    _ => conv(skips, &[f[s]], s, self.decoder_kernel(s), [1; 3], true)?,
                }
            }
            // In the place of the skip there is the level's output now.
        }
        Some((peak.max(ups), kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(kind: UnetKind, depth: &[usize], decoder: usize) -> UnetConfig {
        UnetConfig {
            kind,
            in_channels: 1,
            classes: 3,
            features: vec![32, 64, 128, 256, 320, 320],
            kernels: vec![[3; 3]; 6],
            strides: [[1; 3]].into_iter().chain([[2; 3]; 5]).collect(),
            depth: depth.to_vec(),
            decoder_depth: vec![decoder; 5],
            conv_bias: true,
            head_bias: true,
            planar: false,
        }
    }

    /// What PyTorch counts in nnU-Net's usual networks: parameters, and entries of the state dict.
    #[test]
    fn parameter_counts_of_nnunet() {
        let plain = net(UnetKind::Plain, &[2; 6], 2);
        let residual = net(UnetKind::ResEnc, &[1, 3, 4, 6, 6, 6], 1);
        for (net, count, entries) in [(plain, 31_196_399, 292), (residual, 102_350_575, 956)] {
            assert_eq!(net.parameter_count(), count);
            let mut names: Vec<String> = net.parameters().into_iter().map(|(n, _)| n).collect();
            names.extend(net.aliases().into_iter().map(|(n, _)| n));
            assert_eq!(names.len(), entries);
            names.sort();
            names.dedup();
            assert_eq!(names.len(), entries, "a name that stands twice");
        }
    }

    #[test]
    fn sizes_without_kernels_are_named() {
        let changed = |change: fn(&mut UnetConfig)| {
            let mut c = net(UnetKind::Plain, &[2; 6], 2);
            change(&mut c);
            c.validate().unwrap_err().to_string()
        };
        assert!(net(UnetKind::Plain, &[2; 6], 2).validate().is_ok());
        assert!(changed(|c| c.kernels[1] = [5, 3, 3]).contains("kernel [5, 3, 3]"));
        assert!(changed(|c| c.strides[2] = [4, 1, 1]).contains("stride [4, 1, 1]"));
        assert!(changed(|c| c.strides[0] = [2; 3]).contains("first stage"));
        assert!(changed(|c| c.features.truncate(1)).contains("1 stages"));
        assert!(changed(|c| c.decoder_depth.push(1)).contains("for 6 stages"));
        assert!(changed(|c| c.depth[3] = 0).contains(": 0 channels"));
        assert!(changed(|c| c.planar = true).contains("2D"));
    }
}
