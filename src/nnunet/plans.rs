//! What a trained model needs to be used: the part of nnU-Net's plans that inference reads, typed and closed, the
//! same for a v1 `plans.pkl`, a v2 `plans.json` and the project's own model folder.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nnunet::dataset::Reader;

/// Whose rules of preprocessing, aggregation and export hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Rules {
    /// nnU-Net 1.7 (the published STU-Net checkpoints): resample, then normalise; softmax averaged.
    NnunetV1,
    /// nnU-Net 2: normalise, then resample; logits averaged.
    NnunetV2,
}

/// Intensity normalisation of one channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Normalization {
    /// Clip to the data set's 0.5 and 99.5 percentiles, then (x - mean) / std of the data set.
    Ct,
    /// (x - mean) / std of the image (v1: "nonCT").
    ZScore,
    /// Unchanged.
    None,
    /// To [0, 1] by the image's own minimum and maximum.
    RescaleTo01,
    /// 0..255 divided by 255.
    RgbTo01,
}

/// Intensity statistics of a channel over the training set's foreground.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Intensity {
    /// Mean.
    pub mean: f64,
    /// Standard deviation (population).
    pub std: f64,
    /// 0.5th percentile.
    pub percentile_00_5: f64,
    /// 99.5th percentile.
    pub percentile_99_5: f64,
}

/// One input channel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Channel {
    /// "CT", "T1" ...
    pub name: String,
    /// Its normalisation.
    pub normalization: Normalization,
    /// Statistics and changes only inside the nonzero mask.
    pub use_mask: bool,
    /// Needed by [`Normalization::Ct`].
    pub intensity: Option<Intensity>,
}

/// How an array is resampled (nnU-Net `resample_data_or_seg_to_shape`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Resampling {
    /// Spline order in general: 0, 1 or 3.
    pub order: u8,
    /// Order along the coarse axis when that is treated apart: 0 or 1.
    pub order_z: u8,
    /// Treat the coarse axis apart always, never, or by the 3:1 rule (`None`).
    pub force_separate_z: Option<bool>,
}

/// What the network's output channels mean.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decision {
    /// One channel per label 0, 1, 2 ...: the largest wins.
    Argmax,
    /// One channel per region; where it is positive, `paint[i]` is written, in order.
    Regions {
        /// The label value that region i writes (`regions_class_order`).
        paint: Vec<u16>,
    },
}

/// Everything inference needs besides weights. Axes are those of the *transposed* array (after `transpose_forward`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InferencePlan {
    /// Whose rules hold.
    pub rules: Rules,
    /// Data set name, for people.
    pub dataset: String,
    /// Trainer name as stored, for people.
    pub trainer: String,
    /// Configuration name, "3d_fullres" ...
    pub configuration: String,
    /// How the data set's files are read and written.
    #[serde(default)]
    pub reader: Reader,
    /// Input channels in order.
    pub channels: Vec<Channel>,
    /// Label names by value, background left out.
    pub labels: Vec<(u16, String)>,
    /// Meaning of the output channels.
    pub decision: Decision,
    /// Output channels of the network.
    pub heads: usize,
    /// Window size in voxels; a 2D configuration's is one slice of the first axis.
    pub patch: [usize; 3],
    /// Target spacing in mm. `None` keeps the image's own, as 2D configurations do along the first axis: the network sees
    /// its slices one by one.
    pub spacing_mm: [Option<f64>; 3],
    /// Array axes are permuted by this before anything else.
    pub transpose_forward: [usize; 3],
    /// The inverse permutation.
    pub transpose_backward: [usize; 3],
    /// Strides of the five poolings.
    pub strides: [[usize; 3]; 5],
    /// Axes that test-time mirroring may flip.
    pub mirror_axes: Vec<usize>,
    /// Resampling of images.
    pub resampling_data: Resampling,
    /// Resampling of the network's output.
    pub resampling_probabilities: Resampling,
    /// v1 only: labels of which the largest component is kept, as its postprocessing.json says; usually empty.
    #[serde(default)]
    pub keep_largest: Vec<u16>,
    /// Of a cascade's second stage: the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<PreviousStage>,
}

/// The stage of a cascade before this one: what it predicts becomes input channels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PreviousStage {
    /// Name of its configuration, "3d_lowres".
    pub configuration: String,
    /// Label values, each of which is a channel of zeros and ones after those of the image.
    pub labels: Vec<u16>,
    /// Resampling of its label map.
    pub resampling: Resampling,
}

/// Larger than any patch that fits a machine; keeps products of sizes far from overflow.
const MAX_PATCH: usize = 4096;

/// The largest patches in use have some 10^7 voxels; a channel of features with this many takes 1 GiB.
const MAX_PATCH_VOXELS: usize = 1 << 28;

/// Spacing of a network's grid for an image whose transposed axes have the spacing `own`.
pub(super) fn target_spacing(planned: [Option<f64>; 3], own: [f64; 3]) -> [f64; 3] {
    std::array::from_fn(|k| planned[k].unwrap_or(own[k]))
}

impl InferencePlan {
    /// Input channels of the network: the image's, and those of the stage before.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.channels.len() + self.previous.as_ref().map_or(0, |p| p.labels.len())
    }

    /// Whether this is a 2D configuration.
    #[must_use]
    pub fn is_planar(&self) -> bool {
        self.spacing_mm[0].is_none()
    }

    /// Checks that the parts fit each other, whatever file they came from.
    pub(crate) fn validate(&self, file: &Path) -> Result<()> {
        let bad = |field: &str, what: String| Err(Error::model(file, field, what));
        check_channels(&self.channels, file)?;
        check_transposes(self.transpose_forward, self.transpose_backward, file)?;
        let possible = |s: &Option<f64>| s.is_some_and(|s| s.is_finite() && (1e-2..=1e3).contains(&s));
        if !self.spacing_mm[usize::from(self.is_planar())..].iter().all(possible) {
            let what = "expected lengths from 0.01 to 1000 mm, of which that of the first axis may be missing";
            return bad("spacing", format!("{:?}, {what}", self.spacing_mm));
        }
        if self.is_planar() && (self.patch[0] != 1 || self.mirror_axes.contains(&0)) {
            let what = format!("{:?} mirrored along {:?}, expected single slices", self.patch, self.mirror_axes);
            return bad("patch_size", what);
        }
        if self.strides.iter().flatten().any(|s| !matches!(s, 1 | 2)) {
            return Err(Error::unsupported(format!("strides {:?} of {}: only 1 and 2", self.strides, file.display())));
        }
        for (axis, &p) in self.patch.iter().enumerate() {
            let pooled: usize = self.strides.iter().map(|s| s[axis]).product();
            if p == 0 || p > MAX_PATCH || p % pooled != 0 {
                let what =
                    format!("{:?}, expected multiples of the strides' product {pooled} up to {MAX_PATCH}", self.patch);
                return bad("patch_size", what);
            }
        }
        // At most MAX_PATCH each: no overflow.
        if self.patch.iter().product::<usize>() > MAX_PATCH_VOXELS {
            return bad("patch_size", format!("{:?}, expected at most {MAX_PATCH_VOXELS} voxels", self.patch));
        }
        if self.mirror_axes.iter().enumerate().any(|(i, a)| *a > 2 || self.mirror_axes[..i].contains(a)) {
            return bad("mirror_axes", format!("{:?}, expected different axes of 0, 1, 2", self.mirror_axes));
        }
        check_resampling(self.resampling_data, file)?;
        check_resampling(self.resampling_probabilities, file)?;
        if let Some(previous) = &self.previous {
            check_resampling(previous.resampling, file)?;
            if previous.labels.is_empty() || previous.labels.contains(&0) {
                let what = "a stage before without labels, or with background among them";
                return bad("previous", what.into());
            }
        }
        let heads = match &self.decision {
            Decision::Argmax => self.labels.len() + 1,
            Decision::Regions { paint } => paint.len(),
        };
        if heads != self.heads || !(1..=usize::from(u16::MAX)).contains(&heads) {
            return bad("heads", format!("{} output channels for {heads} classes", self.heads));
        }
        if self.decision == Decision::Argmax && self.labels.iter().enumerate().any(|(i, l)| usize::from(l.0) != i + 1) {
            return bad("labels", "values expected to be 1, 2, 3 ... without gaps".into());
        }
        if let Some(l) = self.keep_largest.iter().find(|l| !self.labels.iter().any(|(v, _)| v == *l)) {
            return bad("keep_largest", format!("label {l} is not among the labels"));
        }
        Ok(())
    }
}

/// Checks that there are channels, and that each can be normalised.
pub(super) fn check_channels(channels: &[Channel], file: &Path) -> Result<()> {
    let bad = |field: &str, what: String| Err(Error::model(file, field, what));
    if channels.is_empty() {
        return bad("channels", "none, expected at least one input channel".into());
    }
    for c in channels {
        let Some(i) = c.intensity else {
            if c.normalization == Normalization::Ct {
                return bad("intensity", format!("missing for channel {:?}, needed by CT normalisation", c.name));
            }
            continue;
        };
        // Finite in f32, in which the voxels are normalised.
        let [mean, lo, hi] = [i.mean, i.percentile_00_5, i.percentile_99_5].map(|v| v as f32);
        let std = i.std.max(1e-8) as f32;
        if ![mean, std, (lo - mean) / std, (hi - mean) / std].iter().all(|v| v.is_finite())
            || !i.std.is_finite()
            || i.std < 0.0
            || i.percentile_00_5 > i.percentile_99_5
        {
            return bad("intensity", format!("{i:?} of channel {:?} is no set of statistics", c.name));
        }
    }
    Ok(())
}

/// Checks that two permutations of the axes undo each other.
pub(super) fn check_transposes(forward: [usize; 3], backward: [usize; 3], file: &Path) -> Result<()> {
    let mut axes = forward;
    axes.sort_unstable();
    if axes != [0, 1, 2] {
        let what = format!("{forward:?}, expected a permutation of 0, 1, 2");
        return Err(Error::model(file, "transpose_forward", what));
    }
    if (0..3).any(|i| backward.get(forward[i]) != Some(&i)) {
        let what = format!("{backward:?}, expected the inverse of transpose_forward {forward:?}");
        return Err(Error::model(file, "transpose_backward", what));
    }
    Ok(())
}

/// Checks that there are splines of these orders.
pub(super) fn check_resampling(r: Resampling, file: &Path) -> Result<()> {
    if matches!(r.order, 0 | 1 | 3) && matches!(r.order_z, 0 | 1) {
        return Ok(());
    }
    let (o, z) = (r.order, r.order_z);
    let what = format!("resampling of order {o} and order_z {z} in {}: 0, 1, 3 and 0, 1 are", file.display());
    Err(Error::unsupported(what))
}
