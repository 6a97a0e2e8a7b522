//! The door for tests and benchmarks: steps of the pipeline that have no public function of their own. No promise of stability.

#[cfg(feature = "cuda")]
use super::augment::{Augmenter, CardBatch, RawPatch};
use super::postprocess;
use super::predict::window;
use super::preprocess::resample::View;
use super::volume::Mask;
#[cfg(feature = "cuda")]
use crate::error::Result;
use crate::io::LabelData;
#[cfg(feature = "cuda")]
use crate::tensor::Device;

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

/// A batch of patches augmented on a card: images `[N, C, D, H, W]` and labels `[N, D, H, W]`.
///
/// # Errors
/// [`crate::Error::Shape`] for patches of unequal sizes; those of the device.
#[cfg(feature = "cuda")]
pub fn augmented(how: &Augmenter, raw: &[RawPatch], device: &Device) -> Result<(Vec<f32>, Vec<u16>)> {
    let (image, labels) = CardBatch::default().make(how, raw, device)?;
    let mut out = vec![0; raw.len() * how.patch().iter().product::<usize>()];
    crate::ops::cuda::read_labels(&labels, &mut out)?;
    Ok((image.to_host()?, out))
}

/// The importance of each voxel of a window.
#[must_use]
pub fn gaussian(patch: [usize; 3]) -> Vec<f32> {
    window::gaussian(patch)
}
