//! The door for benchmarks: steps of the pipeline that have no public function of their own. No promise of stability.

use super::postprocess;
use super::predict::window;
use super::preprocess::resample::View;
use super::volume::Mask;
use crate::io::LabelData;

pub use super::predict::scores::labels_from_features;

/// Voxels of the nonzero mask of `channel`, (z, y, x), with its holes filled.
#[must_use]
pub fn filled(channel: &Vec<f32>, shape: [usize; 3]) -> usize {
    Mask::nonzero(std::slice::from_ref(channel), &View::whole(shape)).count()
}

/// The largest component of each label of `wanted`; `shape` is (z, y, x).
pub fn keep_largest_components(labels: &mut LabelData, shape: [usize; 3], wanted: &[u16]) {
    postprocess::keep_largest_components(labels, shape, wanted);
}

/// The importance of each voxel of a window.
#[must_use]
pub fn gaussian(patch: [usize; 3]) -> Vec<f32> {
    window::gaussian(patch)
}
