//! What is drawn for a patch.

use super::AugmentConfig;
use super::cascade::{self, Operation, Removal};
use crate::base::rng::{Key, Rng};

/// Names a patch: all that is random about it follows from this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// The seed of the training.
    pub seed: u64,
    /// The epoch.
    pub epoch: u32,
    /// The place of the patch in the epoch.
    pub index: u32,
}

/// What numbers are drawn for; part of their key, so the values stay as they are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    Sampling = 1,
    Spatial = 2,
    Noise = 3,
    NoiseField = 4,
    Blur = 5,
    Brightness = 6,
    Contrast = 7,
    LowResolution = 8,
    GammaInverted = 9,
    Gamma = 10,
    Mirror = 11,
    Operations = 12,
    Removals = 13,
}

impl Item {
    pub(crate) fn key(self, purpose: Purpose) -> Key {
        Key { seed: self.seed, words: [purpose as u32, self.index, self.epoch] }
    }

    pub(crate) fn rng(self, purpose: Purpose) -> Rng {
        Rng::keyed(self.key(purpose))
    }
}

/// A rotation and a scale about the middle of the patch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spatial {
    /// Angles about z, y and x in radians. In planes only the last one counts.
    pub angles: [f64; 3],
    /// Above 1 the patch shows more, and all in it is smaller.
    pub scale: f64,
}

/// Noise that is added to all channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noise {
    /// Standard deviation, as its bits.
    sigma: u32,
    field: Key,
}

impl Noise {
    /// Standard deviation.
    #[must_use]
    pub fn sigma(&self) -> f32 {
        f32::from_bits(self.sigma)
    }

    /// The stream of the noise of a channel.
    pub(super) fn field(&self, channel: usize) -> Key {
        let [purpose, index, epoch] = self.field.words;
        Key { words: [purpose | (channel as u32) << 8, index, epoch], ..self.field }
    }
}

/// What is done to a patch, in the order of the fields. A list per channel is empty where nothing is done to any.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Parameters {
    /// `SpatialTransform`; without, the middle of the patch that is read.
    pub spatial: Option<Spatial>,
    /// `GaussianNoiseTransform`.
    pub noise: Option<Noise>,
    /// `GaussianBlurTransform`: standard deviations in voxels along (z, y, x), per channel.
    pub blur: Vec<Option<[f64; 3]>>,
    /// `MultiplicativeBrightnessTransform`: factors per channel.
    pub brightness: Vec<f32>,
    /// `ContrastTransform`: factors per channel.
    pub contrast: Vec<f32>,
    /// `SimulateLowResolutionTransform`: share of the voxels along an axis, per channel.
    pub low_resolution: Vec<Option<f32>>,
    /// `GammaTransform` of the inverted image: exponents per channel.
    pub gamma_inverted: Vec<f32>,
    /// `GammaTransform`: exponents per channel.
    pub gamma: Vec<f32>,
    /// `MirrorTransform`: axes that are reversed.
    pub mirror: [bool; 3],
    /// `ApplyRandomBinaryOperatorTransform`, one after the other.
    pub operations: Vec<Operation>,
    /// `RemoveRandomConnectedComponentFromOneHotEncodingTransform`, one after the other.
    pub removals: Vec<Removal>,
}

impl Parameters {
    /// Draws for a patch of `channels` channels and `previous` labels of the stage before.
    #[must_use]
    pub fn draw(config: &AugmentConfig, channels: usize, previous: usize, item: Item) -> Self {
        let per_channel = |purpose, gate: f64, [low, high]: [f64; 2]| -> Vec<f32> {
            let mut rng = item.rng(purpose);
            let n = if rng.chance(gate) { channels } else { 0 };
            (0..n).map(|_| about_one(&mut rng, low, high) as f32).collect()
        };
        Self {
            spatial: spatial(config, item),
            noise: noise(item),
            blur: blur(item, channels),
            brightness: per_channel(Purpose::Brightness, 0.15, [0.75, 1.25]),
            contrast: per_channel(Purpose::Contrast, 0.15, [0.75, 1.25]),
            low_resolution: low_resolution(item, channels),
            gamma_inverted: per_channel(Purpose::GammaInverted, 0.1, [0.7, 1.5]),
            gamma: per_channel(Purpose::Gamma, 0.3, [0.7, 1.5]),
            mirror: {
                let mut rng = item.rng(Purpose::Mirror);
                config.mirror.map(|allowed| rng.chance(0.5) && allowed)
            },
            operations: cascade::draw_operations(&mut item.rng(Purpose::Operations), previous),
            removals: cascade::draw_removals(&mut item.rng(Purpose::Removals), previous),
        }
    }
}

fn spatial(config: &AugmentConfig, item: Item) -> Option<Spatial> {
    let mut rng = item.rng(Purpose::Spatial);
    let (rotates, scales) = (rng.chance(0.2), rng.chance(0.2));
    let drawn = [(); 3].map(|()| rng.uniform(-config.rotation, config.rotation));
    let scale = rng.uniform(0.7, 1.4);
    (rotates || scales)
        .then_some(Spatial { angles: if rotates { drawn } else { [0.0; 3] }, scale: if scales { scale } else { 1.0 } })
}

/// nnU-Net's configuration calls the standard deviation a variance.
fn noise(item: Item) -> Option<Noise> {
    let mut rng = item.rng(Purpose::Noise);
    let on = rng.chance(0.1);
    let sigma = rng.uniform(0.0, 0.1) as f32;
    on.then(|| Noise { sigma: sigma.to_bits(), field: item.key(Purpose::NoiseField) })
}

fn blur(item: Item, channels: usize) -> Vec<Option<[f64; 3]>> {
    let mut rng = item.rng(Purpose::Blur);
    let n = if rng.chance(0.2) { channels } else { 0 };
    let one = |_| {
        let on = rng.chance(0.5);
        let sigmas = [(); 3].map(|()| rng.uniform(0.5, 1.0));
        on.then_some(sigmas)
    };
    (0..n).map(one).collect()
}

fn low_resolution(item: Item, channels: usize) -> Vec<Option<f32>> {
    let mut rng = item.rng(Purpose::LowResolution);
    let n = if rng.chance(0.25) { channels } else { 0 };
    let one = |_| {
        let on = rng.chance(0.5);
        let scale = rng.uniform(0.5, 1.0) as f32;
        on.then_some(scale)
    };
    (0..n).map(one).collect()
}

/// `BGContrast`: as often below 1 as above.
fn about_one(rng: &mut Rng, low: f64, high: f64) -> f64 {
    if rng.chance(0.5) { rng.uniform(low, 1.0) } else { rng.uniform(1.0, high) }
}
