//! A patch from a case to the batch.

use super::intensity::{Channel, Memory};
use super::{AugmentConfig, Parameters, cascade, intensity, spatial};
use crate::error::{Error, Result};
use crate::nnunet::preprocess::labels;
use crate::nnunet::training_case::TrainingCase;
use crate::ops::intensity::{Flip, put_labels};
use crate::ops::warp::{Warp, warp};
use crate::tensor::Isa;

const OP: &str = "augmentation";

/// Does what [`Parameters`] say, on the thread that calls it.
#[derive(Debug, Clone)]
pub struct Augmenter {
    patch: [usize; 3],
    config: Option<AugmentConfig>,
    previous: Vec<u16>,
    isa: Isa,
}

/// Memory that a thread works with, from one patch to the next.
#[derive(Debug, Default)]
pub struct Scratch {
    read: RawPatch,
    /// A patch that was warped.
    image: Vec<f32>,
    labels: Vec<i16>,
    previous: Vec<u16>,
    memory: Memory,
}

/// A patch as it was read from its case, and what is to become of it.
#[derive(Debug, Default)]
pub struct RawPatch {
    /// The patch (channel, z, y, x), or the box that a warp reads.
    pub(super) image: Vec<f32>,
    pub(super) labels: Vec<i16>,
    pub(super) warp: Option<Warp>,
    pub(super) parameters: Parameters,
}

impl Augmenter {
    /// For training. `previous` are the labels of the stage before in a cascade: each becomes one more channel.
    #[must_use]
    pub fn new(config: AugmentConfig, previous: &[u16]) -> Self {
        Self { patch: config.patch, config: Some(config), previous: previous.to_vec(), isa: Isa::detect() }
    }

    /// For validation: patches as they are.
    #[must_use]
    pub fn plain(patch: [usize; 3], previous: &[u16]) -> Self {
        Self { patch, config: None, previous: previous.to_vec(), isa: Isa::detect() }
    }

    /// With an instruction set that the processor has, in place of the best; others are not taken.
    #[must_use]
    pub fn with_isa(mut self, isa: Isa) -> Self {
        if Isa::available().contains(&isa) {
            self.isa = isa;
        }
        self
    }

    /// What may be done to patches; `None` for validation.
    #[must_use]
    pub fn config(&self) -> Option<&AugmentConfig> {
        self.config.as_ref()
    }

    /// Voxels of the patches that are made, along (z, y, x).
    #[must_use]
    pub fn patch(&self) -> [usize; 3] {
        self.patch
    }

    /// Voxels of the patch that is read.
    #[must_use]
    pub fn initial_patch(&self) -> [usize; 3] {
        self.config.as_ref().map_or(self.patch, |c| c.initial_patch)
    }

    /// Channels of the patches of a case with `channels` channels.
    #[must_use]
    pub fn channels(&self, channels: usize) -> usize {
        channels + self.previous.len()
    }

    /// Makes the patch whose initial patch begins at voxel `lower` of the case: its channels, then one channel per label of
    /// the stage before, to `image` (channel, z, y, x), and its labels, -1 turned into 0, to `target` (z, y, x).
    ///
    /// # Errors
    /// [`Error::Shape`] when the outputs or the parameters have other sizes, and what [`TrainingCase::crop`] reports.
    pub fn run(
        &self,
        case: &dyn TrainingCase,
        lower: [i64; 3],
        parameters: &Parameters,
        scratch: &mut Scratch,
        image: &mut [f32],
        target: &mut [u16],
    ) -> Result<()> {
        let (channels, volume) = (case.channels(), self.patch.iter().product::<usize>());
        if volume == 0 {
            return Err(Error::shape(OP, format!("a patch of {:?} voxels", self.patch)));
        }
        if image.len() != self.channels(channels) * volume || target.len() != volume {
            let found = format!("{} and {} values", image.len(), target.len());
            return Err(Error::shape(OP, format!("{found} for {channels} channels of {:?} voxels", self.patch)));
        }
        let cascade = usize::from(!self.previous.is_empty());
        if case.label_channels() < 1 + cascade {
            return Err(Error::shape(OP, "a case without the labels of the stage before"));
        }
        let (images, one_hot) = image.split_at_mut(channels * volume);
        let flip = Flip { shape: self.patch, axes: parameters.mirror };
        let labels = match &self.config {
            None => {
                parameters.check(channels, self.previous.len())?;
                scratch.labels.resize(case.label_channels() * volume, 0);
                case.crop(lower, self.patch, images, &mut scratch.labels)?;
                &scratch.labels
            }
            Some(config) => {
                self.read(case, lower, parameters.clone(), &mut scratch.read)?;
                let Scratch { read, image, labels, memory, .. } = scratch;
                let (image, labels) = match &read.warp {
                    Some(how) => {
                        image.resize(channels * volume, 0.0);
                        labels.resize(case.label_channels() * volume, 0);
                        warp(self.isa, how, &read.image, &read.labels, image, labels);
                        (image, &*labels)
                    }
                    None => (&mut read.image, &read.labels),
                };
                let each = image.chunks_exact_mut(volume).zip(images.chunks_exact_mut(volume));
                for (c, (x, out)) in each.enumerate() {
                    let mut channel = Channel::new(self.isa, config.patch, x, memory);
                    intensity::transform(config, parameters, c, &mut channel)?;
                    let outside = intensity::masked(config, c).then_some(&labels[..volume]);
                    channel.put(parameters.mirror, outside, out);
                }
                labels
            }
        };
        put_labels(self.isa, flip, &labels[..volume], target);
        if cascade == 1 {
            scratch.previous.resize(volume, 0);
            put_labels(self.isa, flip, &labels[volume..2 * volume], &mut scratch.previous);
            labels::one_hot(&scratch.previous, &self.previous, one_hot);
            let flat = self.config.as_ref().is_some_and(|c| c.two_d);
            cascade::apply(&parameters.operations, &parameters.removals, self.patch, flat, one_hot);
        }
        Ok(())
    }

    /// Reads what the patch needs whose initial patch begins at voxel `lower` of the case, for whoever does to it what the
    /// parameters say.
    ///
    /// # Errors
    /// As [`Augmenter::run`]; [`Error::Usage`] without augmentation.
    pub fn read(
        &self,
        case: &dyn TrainingCase,
        lower: [i64; 3],
        parameters: Parameters,
        to: &mut RawPatch,
    ) -> Result<()> {
        let config = self
            .config
            .as_ref()
            .ok_or_else(|| Error::usage("a patch to augment: expected an augmenter for training"))?;
        parameters.check(case.channels(), self.previous.len())?;
        to.parameters = parameters;
        to.warp = match to.parameters.spatial {
            Some(spatial) => Some(spatial::source(config, spatial, case, lower, &mut to.image, &mut to.labels)?),
            None => {
                let volume: usize = self.patch.iter().product();
                to.image.resize(case.channels() * volume, 0.0);
                to.labels.resize(case.label_channels() * volume, 0);
                let skip = |k: usize| (config.initial_patch[k] / 2) as i64 - (self.patch[k] / 2) as i64;
                let middle = std::array::from_fn(|k| lower[k] + skip(k));
                case.crop(middle, self.patch, &mut to.image, &mut to.labels)?;
                None
            }
        };
        Ok(())
    }
}

impl Parameters {
    fn check(&self, channels: usize, previous: usize) -> Result<()> {
        let lists = [
            self.blur.len(),
            self.brightness.len(),
            self.contrast.len(),
            self.low_resolution.len(),
            self.gamma_inverted.len(),
            self.gamma.len(),
        ];
        if lists.iter().any(|n| *n != 0 && *n != channels) {
            return Err(Error::shape(OP, format!("parameters for {lists:?} channels, expected {channels} or none")));
        }
        let named = self.operations.iter().map(|o| o.channel).chain(self.removals.iter().map(|r| r.channel)).max();
        match named {
            Some(channel) if channel >= previous => {
                Err(Error::shape(OP, format!("label {channel} of the {previous} of the stage before")))
            }
            _ => Ok(()),
        }
    }
}
