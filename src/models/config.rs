//! The sizes of a STU-Net, and what follows from them.

use super::StuNet;
use crate::error::Result;
use crate::nn::{ParamSource, RandomParams};
use crate::ops;
use crate::tensor::{BLOCK, Device, Precision};

/// State-dict prefix, number of blocks, input channels of the first block, width.
type Stage = (String, usize, usize, usize);

/// Sizes that make one member of the family. Kernels are 3x3x3 throughout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StuNetConfig {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels, background included.
    pub classes: usize,
    /// Residual blocks of the six encoder stages.
    pub depth: [usize; 6],
    /// Residual blocks of the five decoder stages, deepest first.
    pub decoder_depth: [usize; 5],
    /// Channels of the six stages.
    pub dims: [usize; 6],
    /// Strides (z, y, x) into stages 1 to 5; `[1, 1, 1]` is a stage without pooling.
    pub strides: [[usize; 3]; 5],
}

impl StuNetConfig {
    fn scaled(in_channels: usize, classes: usize, base: usize, depth: usize) -> Self {
        Self {
            in_channels,
            classes,
            depth: [depth; 6],
            decoder_depth: [depth; 5],
            dims: [1, 2, 4, 8, 16, 16].map(|m| m * base),
            strides: [[2, 2, 2]; 5],
        }
    }

    /// STU-Net-S: 14.6 M parameters with 1 input channel and 105 classes.
    #[must_use]
    pub fn small(in_channels: usize, classes: usize) -> Self {
        Self::scaled(in_channels, classes, 16, 1)
    }

    /// STU-Net-B: 58.3 M parameters.
    #[must_use]
    pub fn base(in_channels: usize, classes: usize) -> Self {
        Self::scaled(in_channels, classes, 32, 1)
    }

    /// STU-Net-L: 440.3 M parameters.
    #[must_use]
    pub fn large(in_channels: usize, classes: usize) -> Self {
        Self::scaled(in_channels, classes, 64, 2)
    }

    /// STU-Net-H: 1457.3 M parameters.
    #[must_use]
    pub fn huge(in_channels: usize, classes: usize) -> Self {
        Self::scaled(in_channels, classes, 96, 3)
    }

    /// The same network with other strides.
    #[must_use]
    pub fn with_strides(mut self, strides: [[usize; 3]; 5]) -> Self {
        self.strides = strides;
        self
    }

    /// Name and shape of every parameter, in the order of STU-Net's PyTorch state dict.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut out = Vec::new();
        let mut push = |name: String, shape: &[usize]| {
            out.push((format!("{name}.weight"), shape.to_vec()));
            out.push((format!("{name}.bias"), shape[..1].to_vec()));
        };
        let stages = self.stages();
        let stage = |push: &mut dyn FnMut(String, &[usize]), (prefix, blocks, first_in, w): &Stage| {
            for b in 0..*blocks {
                let i = if b == 0 { *first_in } else { *w };
                push(format!("{prefix}.{b}.conv1"), &[*w, i, 3, 3, 3]);
                push(format!("{prefix}.{b}.norm1"), &[*w]);
                push(format!("{prefix}.{b}.conv2"), &[*w, *w, 3, 3, 3]);
                push(format!("{prefix}.{b}.norm2"), &[*w]);
                if b == 0 {
                    push(format!("{prefix}.{b}.conv3"), &[*w, i, 1, 1, 1]);
                }
            }
        };
        stages[..6].iter().for_each(|s| stage(&mut push, s));
        for u in 0..5 {
            push(format!("upsample_layers.{u}.conv"), &[self.dims[4 - u], self.dims[5 - u], 1, 1, 1]);
        }
        stages[6..].iter().for_each(|s| stage(&mut push, s));
        for u in 0..5 {
            push(format!("seg_outputs.{u}"), &[self.classes, self.dims[4 - u], 1, 1, 1]);
        }
        out
    }

    /// (state-dict prefix, blocks, input channels of the first block, width) of every residual stage.
    fn stages(&self) -> Vec<Stage> {
        let encoder = (0..6).map(|s| {
            let first_in = if s == 0 { self.in_channels } else { self.dims[s - 1] };
            (format!("conv_blocks_context.{s}"), self.depth[s], first_in, self.dims[s])
        });
        let decoder = (0..5).map(|u| {
            let w = self.dims[4 - u];
            (format!("conv_blocks_localization.{u}"), self.decoder_depth[u], w.saturating_mul(2), w)
        });
        encoder.chain(decoder).collect()
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

    /// Voxels of each of the six stages for a patch of `patch` voxels.
    fn voxels(&self, patch: [usize; 3]) -> [usize; 6] {
        let mut v = [patch.iter().fold(1, |n: usize, &p| n.saturating_mul(p)); 6];
        for s in 0..5 {
            v[s + 1] = v[s] / self.strides[s].iter().product::<usize>().max(1);
        }
        v
    }

    /// Multiply-accumulates of one forward pass over a patch (z, y, x), full-resolution head only. The 1x1x1
    /// convolutions before upsampling are counted at the resolution they run at: before it. Sizes too large to count
    /// give `u64::MAX`.
    #[must_use]
    pub fn macs(&self, patch: [usize; 3]) -> u64 {
        let voxels = self.voxels(patch);
        let product = |sizes: &[usize]| sizes.iter().fold(1u64, |n, &s| n.saturating_mul(s as u64));
        let stage = |blocks: usize, first_in: usize, w: usize, v: usize| {
            product(&[first_in, w, 28, v]).saturating_add(product(&[w, w, 27, v])).saturating_add(product(&[
                blocks - 1,
                w,
                w,
                54,
                v,
            ]))
        };
        let mut total = 0u64;
        for (k, (_, blocks, first_in, w)) in self.stages().into_iter().enumerate() {
            let macs = stage(blocks.max(1), first_in, w, voxels[if k < 6 { k } else { 10 - k }]);
            total = total.saturating_add(macs);
        }
        for u in 0..5 {
            total = total.saturating_add(product(&[self.dims[5 - u], self.dims[4 - u], voxels[5 - u]]));
        }
        total.saturating_add(product(&[self.dims[0], self.classes, voxels[0]]))
    }

    /// Bytes of tensors that a forward pass on `device` takes at its peak beside the parameters, up to the last features
    /// and with the input: activations, the convolutions' working memory, and forms of filters that they keep from the
    /// first pass on. Follows the order in which [`StuNet::features`] runs. Sizes too large to count give `usize::MAX`.
    #[must_use]
    pub fn activation_bytes(&self, patch: [usize; 3], device: &Device, strict: bool, precision: Precision) -> usize {
        self.plan_memory(patch, device, strict, precision).map_or(usize::MAX, |(peak, kept)| peak.saturating_add(kept))
    }

    /// Those of [`StuNetConfig::activation_bytes`] that stay after a pass: filters in another form, kept by each network.
    #[must_use]
    pub fn kept_bytes(&self, patch: [usize; 3], device: &Device, strict: bool, precision: Precision) -> usize {
        self.plan_memory(patch, device, strict, precision).map_or(usize::MAX, |(_, kept)| kept)
    }

    /// The peak without filters that are kept, and these.
    fn plan_memory(
        &self,
        patch: [usize; 3],
        device: &Device,
        strict: bool,
        precision: Precision,
    ) -> Option<(usize, usize)> {
        let mut space = [patch; 6];
        for s in 0..5 {
            space[s + 1] = [0, 1, 2].map(|a| space[s][a] / self.strides[s][a].max(1));
        }
        let voxels = |s: usize| space[s].iter().try_fold(precision.size(), |n, &d| n.checked_mul(d));
        let t = |s: usize, of: usize| voxels(s)?.checked_mul(self.dims[of].next_multiple_of(BLOCK));
        let (mut peak, mut most, mut kept) = (0usize, 0usize, 0usize);
        // One convolution of a stage beside `live` bytes, its input among them if no one else reads that (`owned`).
        let mut conv = |live: usize, channels: &[usize], s: usize, stride: [usize; 3], owned: bool| {
            let strided = stride != [1; 3];
            let w = [self.dims[s], channels.iter().sum(), 3, 3, 3];
            let input = space[s - usize::from(strided)];
            let how = ops::Conv3d { stride, padding: [1; 3] };
            let m = ops::conv3d_memory(device, strict, precision, channels, w, 1, input, how, owned).ok()?;
            // Memory that is used again may be a quarter larger.
            kept = kept.checked_add(m.kept + m.kept / 4)?;
            let output = if m.in_place { 0 } else { t(s, s)? };
            peak = peak.max(live.checked_add(output)?.checked_add(m.working)?);
            Some(())
        };
        // The end of a stage's first block beside `live` bytes, its inputs and the second convolution's output among them.
        let end = |live: usize, channels: &[usize], repeat: [usize; 3], s: usize, stride: [usize; 3]| {
            let w = [self.dims[s], channels.iter().sum(), 1, 1, 1];
            let input = space[s - usize::from(stride != [1; 3])];
            let how = ops::Conv3d { stride, padding: [0; 3] };
            let more = ops::conv3d_residual_memory(device, strict, precision, channels, repeat, w, input, how).ok()?;
            live.checked_add(more)
        };
        // The second convolution of a block has the only use of the first's output.
        let mut skips = space[0].iter().try_fold(4usize, |n, &d| n.checked_mul(d))?.checked_mul(self.in_channels)?;
        for s in 0..6 {
            let size = t(s, s)?;
            let live = skips.checked_add(size)?;
            let (from, stride) =
                if s == 0 { (self.in_channels, [1; 3]) } else { (self.dims[s - 1], self.strides[s - 1]) };
            conv(skips, &[from], s, stride, false)?;
            conv(live, &[self.dims[s]], s, [1; 3], true)?;
            most = most.max(end(live, &[from], [1; 3], s, stride)?);
            for _ in 1..self.depth[s] {
                conv(live, &[self.dims[s]], s, [1; 3], false)?;
                conv(live.checked_add(size)?, &[self.dims[s]], s, [1; 3], true)?;
            }
            skips = live;
        }
        for u in 0..5 {
            let s = 4 - u;
            let (size, low) = (t(s, s)?, t(s + 1, s)?);
            // What is below this level is gone once its channels are mixed.
            skips -= t(s + 1, s + 1)?;
            let live = skips.checked_add(low)?;
            let both = [self.dims[s], self.dims[s]];
            conv(live, &both, s, [1; 3], false)?;
            conv(live.checked_add(size)?, &[self.dims[s]], s, [1; 3], true)?;
            most = most.max(end(live.checked_add(size)?, &both, self.strides[s], s, [1; 3])?);
            for _ in 1..self.decoder_depth[u] {
                let live = live.checked_add(size)?;
                conv(live, &[self.dims[s]], s, [1; 3], false)?;
                conv(live.checked_add(size)?, &[self.dims[s]], s, [1; 3], true)?;
            }
        }
        Some((peak.max(most), kept))
    }

    /// Builds the network with parameters from `source`.
    ///
    /// # Errors
    /// [`Model`](crate::Error::Model) when a parameter is missing or has another shape,
    /// [`OutOfMemory`](crate::Error::OutOfMemory).
    pub fn build(&self, source: &dyn ParamSource, device: &Device) -> Result<StuNet> {
        self.build_with(source, device, Precision::F32)
    }

    /// As [`StuNetConfig::build`], with filters and activations stored in `precision`. Parameters are read one at a time:
    /// beside the network, one of them is in memory.
    ///
    /// # Errors
    /// As [`StuNetConfig::build`].
    pub fn build_with(&self, source: &dyn ParamSource, device: &Device, precision: Precision) -> Result<StuNet> {
        StuNet::load(self, source, device, precision)
    }

    /// Builds the network with seeded random parameters.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory).
    pub fn build_random(&self, device: &Device, seed: u64) -> Result<StuNet> {
        self.build_random_with(device, seed, Precision::F32)
    }

    /// As [`StuNetConfig::build_random`], with filters and activations stored in `precision`.
    ///
    /// # Errors
    /// As [`StuNetConfig::build_random`].
    pub fn build_random_with(&self, device: &Device, seed: u64, precision: Precision) -> Result<StuNet> {
        let source = RandomParams::new(seed, self.parameters().into_iter().collect());
        self.build_with(&source, device, precision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAMILY: [fn(usize, usize) -> StuNetConfig; 4] =
        [StuNetConfig::small, StuNetConfig::base, StuNetConfig::large, StuNetConfig::huge];

    /// The counts of STU-Net's paper, to the last digit.
    #[test]
    fn parameter_counts_of_the_paper() {
        let counts = FAMILY.map(|f| (f(1, 105).parameter_count(), f(1, 105).parameters().len()));
        assert_eq!(counts, [(14_596_941, 130), (58_262_669, 130), (440_302_605, 218), (1_457_326_221, 306)]);
    }

    /// The README of STU-Net gives 0.13, 0.51, 3.81 and 12.60 at 128^3, counting a multiply-accumulate as one and the
    /// upsampling's 1x1x1 convolutions after it, where ours run before.
    #[test]
    fn macs_of_the_paper() {
        for (f, tera) in FAMILY.iter().zip([0.13, 0.51, 3.81, 12.60]) {
            let macs = f(1, 105).macs([128; 3]) as f64 / 1e12;
            assert!((macs / tera - 1.0).abs() < 0.06, "{macs} against {tera}");
        }
    }
}
