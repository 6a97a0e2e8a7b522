//! Patches augmented on a card, by the parameters and in the order of the processor.

use super::intensity::{Values, masked, transform};
use super::{AugmentConfig, Augmenter, RawPatch};
use crate::base::rng::Key;
use crate::error::{Error, Result};
use crate::ops::blur::Kernel;
use crate::ops::patch::{self, Batch, Channel, Patch, Room};
use crate::tensor::{Device, Tensor};

/// Memory for a batch on a card; it is the same from one batch to the next.
#[derive(Debug, Default)]
pub(crate) struct CardBatch {
    room: Room,
    batch: Batch,
}

impl CardBatch {
    /// Takes the memory that patches need on their way: no warp reads more than the initial patch with a voxel around it.
    pub(crate) fn reserve(&mut self, config: &AugmentConfig, channels: usize, device: &Device) -> Result<()> {
        let voxels = |shape: [usize; 3]| shape.iter().fold(1usize, |n, d| n.saturating_mul(*d));
        let source = voxels(config.initial_patch.map(|n| n + 2));
        self.room.reserve(source, voxels(config.patch), channels, device)
    }

    /// The patches as `[N, C, D, H, W]`, and their labels, u16 `[N][D][H][W]`, two to a float. Waits for nothing.
    pub(crate) fn make(&mut self, how: &Augmenter, raw: &[RawPatch], device: &Device) -> Result<(Tensor, Tensor)> {
        let config = how.config().ok_or_else(|| Error::usage("patches to augment: expected a loader that augments"))?;
        let [d, h, w] = config.patch;
        let Self { room, batch } = self;
        let mut made = None;
        for (n, one) in raw.iter().enumerate() {
            let warp = one.warp.as_ref();
            let mut patch = Patch::new(device, room, config.patch, &one.image, &one.labels, warp)?;
            let channels = patch.channels();
            let (image, labels) = match &made {
                Some(made) => made,
                None => made.insert(batch.tensors([raw.len(), channels, d, h, w], device)?),
            };
            for c in 0..channels {
                let to = patch.place(image, n, c)?;
                let mut channel = patch.channel(c)?;
                transform(config, &one.parameters, c, &mut channel)?;
                channel.put(one.parameters.mirror, masked(config, c), to)?;
            }
            patch.put_labels(one.parameters.mirror, labels, n)?;
        }
        made.ok_or_else(|| Error::shape("augmentation", "a batch without patches"))
    }

    /// Patches that are made, and their labels, as [`CardBatch::make`] gives them.
    pub(crate) fn send(
        &mut self,
        image: &[f32],
        labels: &[u16],
        dims: [usize; 5],
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let (to, to_labels) = self.batch.tensors(dims, device)?;
        patch::send(device, &to, bytemuck::cast_slice(image))?;
        patch::send(device, &to_labels, bytemuck::cast_slice(labels))?;
        Ok((to, to_labels))
    }
}

impl Values for Channel<'_> {
    fn noise(&mut self, sigma: f32, key: Key) -> Result<()> {
        Channel::noise(self, sigma, key)
    }

    fn blur(&mut self, kernels: &[Kernel; 3]) -> Result<()> {
        Channel::blur(self, kernels)
    }

    fn affine(&mut self, scale: f64, shift: f64) -> Result<()> {
        Channel::affine(self, scale, shift)
    }

    fn contrast(&mut self, factor: f64) -> Result<()> {
        Channel::contrast(self, factor)
    }

    fn low_resolution(&mut self, coarse: [usize; 3]) -> Result<()> {
        Channel::low_resolution(self, coarse)
    }

    fn gamma(&mut self, gamma: f32) -> Result<()> {
        Channel::gamma(self, gamma)
    }
}
