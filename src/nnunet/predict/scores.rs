//! Scores that exist as a whole volume: made into labels by the same streaming export as a prediction's.

use super::export::{Export, Planes, Scores};
use crate::base::par;
use crate::error::{Error, Result};
use crate::io::LabelData;
use crate::nnunet::dataset::Reader;
use crate::nnunet::plans::{Channel, Decision, InferencePlan, Normalization, Resampling, Rules};
use crate::nnunet::preprocess::Properties;
use crate::nnunet::preprocess::resample::zeros;
use crate::ops::head::LinearHead;
use crate::tensor::Device;

/// Scores of a whole image, (z, y, x, channel).
pub(super) struct Stored<'a> {
    pub(super) scores: &'a [f32],
    pub(super) channels: usize,
    pub(super) shape: [usize; 3],
}

impl Planes for Stored<'_> {
    fn channels(&self) -> usize {
        self.channels
    }

    fn shape(&self) -> [usize; 3] {
        self.shape
    }

    fn plane(&mut self, z: usize, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.scores[z * out.len()..][..out.len()]);
        Ok(())
    }
}

/// Passes planes on and keeps them, so that they can be asked for again.
pub(super) struct Kept<'a> {
    source: &'a mut dyn Planes,
    planes: Vec<f32>,
    /// Planes that are there.
    done: usize,
}

impl<'a> Kept<'a> {
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(super) fn new(source: &'a mut dyn Planes) -> Result<Self> {
        let values = source.shape().iter().fold(source.channels(), |n, &d| n.saturating_mul(d));
        Ok(Self { planes: zeros(values, "the network's output")?, source, done: 0 })
    }
}

impl Planes for Kept<'_> {
    fn channels(&self) -> usize {
        self.source.channels()
    }

    fn shape(&self) -> [usize; 3] {
        self.source.shape()
    }

    fn plane(&mut self, z: usize, out: &mut [f32]) -> Result<()> {
        let n = out.len();
        while self.done <= z {
            self.source.plane(self.done, &mut self.planes[self.done * n..][..n])?;
            self.done += 1;
        }
        out.copy_from_slice(&self.planes[z * n..][..n]);
        Ok(())
    }
}

/// Labels on a grid of `to` voxels from scores (z, y, x, class) on a grid of `from` voxels over the same space: each
/// class is interpolated linearly and the first of the largest wins. Two planes of scores and the labels are all the
/// memory this takes.
///
/// # Errors
/// [`Error::Shape`] when `scores` has another length than `from` and `classes` say, or a size is zero.
pub fn labels_from_scores(
    scores: &[f32],
    classes: usize,
    from: [usize; 3],
    to: [usize; 3],
    device: &Device,
) -> Result<LabelData> {
    let expected = from.iter().try_fold(classes, |n, &d| n.checked_mul(d));
    if expected != Some(scores.len()) || scores.is_empty() || to.contains(&0) {
        let what = format!("{} scores for {classes} classes on {from:?} voxels, to {to:?}", scores.len());
        return Err(Error::shape("labels_from_scores", what));
    }
    let (plan, properties) = (plain(classes), whole(to));
    let export = Export { plan: &plan, properties: &properties, scores: Scores::Logits, head: None, isa: device.isa() };
    device.install(|| export.labels(&mut Stored { scores, channels: classes, shape: from }))
}

/// As [`labels_from_scores`] from inputs of the network's last layer: `weight` is (class, channel), `bias` (class), and
/// every plane of the grid holds the same `plane` (y, x, channel).
///
/// # Errors
/// [`Error::Shape`] when the lengths do not fit each other, or a size is zero.
pub fn labels_from_features(
    plane: &[f32],
    [weight, bias]: [&[f32]; 2],
    from: [usize; 3],
    to: [usize; 3],
    device: &Device,
) -> Result<LabelData> {
    let head = LinearHead::new(weight, bias)?;
    if plane.len() != from[1] * from[2] * head.channels() || from.contains(&0) || to.contains(&0) {
        let what = format!("{} values of {} channels on {from:?} voxels, to {to:?}", plane.len(), head.channels());
        return Err(Error::shape("labels_from_features", what));
    }
    let (plan, properties) = (plain(head.classes()), whole(to));
    let (scores, head) = (Scores::Logits, Some(&head));
    let export = Export { plan: &plan, properties: &properties, scores, head, isa: device.isa() };
    device.install(|| export.labels(&mut Repeated { plane, shape: from }))
}

/// An image of `shape` voxels without a margin.
fn whole(shape: [usize; 3]) -> Properties {
    Properties {
        spacing_mm: [1.0; 3],
        shape_before_cropping: shape,
        bbox: shape.map(|n| [0, n]),
        shape_after_cropping: shape,
    }
}

/// The same plane over and over, (y, x, channel).
struct Repeated<'a> {
    plane: &'a [f32],
    shape: [usize; 3],
}

impl Planes for Repeated<'_> {
    fn channels(&self) -> usize {
        self.plane.len() / (self.shape[1] * self.shape[2])
    }

    fn shape(&self) -> [usize; 3] {
        self.shape
    }

    fn plane(&mut self, _: usize, out: &mut [f32]) -> Result<()> {
        let row = out.len() / self.shape[1];
        par::chunks_mut(out, row, |y, out| out.copy_from_slice(&self.plane[y * row..][..row]));
        Ok(())
    }
}

/// A plan without anything but a number of classes.
fn plain(heads: usize) -> InferencePlan {
    let resampling = Resampling { order: 1, order_z: 0, force_separate_z: Some(false) };
    InferencePlan {
        rules: Rules::NnunetV2,
        dataset: String::new(),
        trainer: String::new(),
        configuration: String::new(),
        reader: Reader::default(),
        channels: vec![Channel {
            name: String::new(),
            normalization: Normalization::None,
            use_mask: false,
            intensity: None,
        }],
        labels: (1..heads).map(|l| (l as u16, format!("label_{l}"))).collect(),
        decision: Decision::Argmax,
        heads,
        patch: [1; 3],
        spacing_mm: [Some(1.0); 3],
        transpose_forward: [0, 1, 2],
        transpose_backward: [0, 1, 2],
        strides: [[1; 3]; 5],
        mirror_axes: Vec::new(),
        resampling_data: resampling,
        resampling_probabilities: resampling,
        keep_largest: Vec::new(),
        previous: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_score_wins_between_voxels() {
        let device = Device::cpu();
        // Along x: class 1 leads by 3 at the first voxel, class 0 by 1 at the second; the lead changes at 3/4 of the
        // way from one centre to the other.
        let scores = [0.0, 3.0, 1.0, 0.0];
        let labels = labels_from_scores(&scores, 2, [1, 1, 2], [1, 1, 16], &device).unwrap();
        let expected: Vec<u16> = (0..16).map(|o| u16::from((f64::from(o) + 0.5) / 8.0 - 0.5 < 0.75)).collect();
        assert_eq!(labels.iter().collect::<Vec<_>>(), expected);
        assert!(labels_from_scores(&scores, 3, [1, 1, 2], [1, 1, 4], &device).is_err());
        assert!(labels_from_scores(&scores, 2, [1, 1, 2], [1, 0, 4], &device).is_err());
    }
}
