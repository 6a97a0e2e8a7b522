//! What preprocessing needs of a plan.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::resample::new_shape;
use crate::error::{Error, Result};
use crate::nnunet::plans::{
    Channel, InferencePlan, Resampling, Rules, check_channels, check_resampling, check_transposes, target_spacing,
};

/// How images become what a configuration's network sees. Axes are those of the *transposed* array.
///
/// Read by [`preprocess_plan`](crate::nnunet::model::preprocess_plan), or a part of an [`InferencePlan`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PreprocessPlan {
    /// Whose rules hold.
    pub rules: Rules,
    /// Input channels in order.
    pub channels: Vec<Channel>,
    /// Array axes are permuted by this before anything else.
    pub transpose_forward: [usize; 3],
    /// The inverse permutation.
    pub transpose_backward: [usize; 3],
    /// Target spacing in mm; `None` keeps the image's own, as 2D configurations do along the first axis.
    pub spacing_mm: [Option<f64>; 3],
    /// Resampling of images.
    pub resampling_data: Resampling,
    /// Resampling of label maps.
    pub resampling_labels: Resampling,
}

impl From<&InferencePlan> for PreprocessPlan {
    fn from(plan: &InferencePlan) -> Self {
        Self {
            rules: plan.rules,
            channels: plan.channels.clone(),
            transpose_forward: plan.transpose_forward,
            transpose_backward: plan.transpose_backward,
            spacing_mm: plan.spacing_mm,
            resampling_data: plan.resampling_data,
            // Without a stage before no label map is asked; nnU-Net's default.
            resampling_labels: plan
                .previous
                .as_ref()
                .map_or(Resampling { order: 1, order_z: 0, force_separate_z: None }, |p| p.resampling),
        }
    }
}

impl PreprocessPlan {
    /// Checks that the parts fit each other.
    pub(crate) fn validate(&self, file: &Path) -> Result<()> {
        check_channels(&self.channels, file)?;
        check_transposes(self.transpose_forward, self.transpose_backward, file)?;
        if let Some(s) = self.spacing_mm.iter().flatten().find(|s| !(s.is_finite() && **s > 0.0)) {
            return Err(Error::model(file, "spacing", format!("{s}, expected positive lengths in mm")));
        }
        check_resampling(self.resampling_data, file)?;
        check_resampling(self.resampling_labels, file)
    }

    /// Spacing of the network's grid for an image whose transposed axes have the spacing `own`.
    pub(super) fn target_spacing(&self, own: [f64; 3]) -> [f64; 3] {
        target_spacing(self.spacing_mm, own)
    }

    /// Shape on the network's grid (transposed axes) of a whole image of `shape` voxels and `spacing_mm`, both (z, y, x); the
    /// nonzero region, which is kept, is at most that.
    ///
    /// # Errors
    /// [`Error::Input`] for spacings that cannot be; [`Error::Usage`] when the transposes do not undo each other.
    pub(crate) fn largest_shape(&self, shape: [usize; 3], spacing_mm: [f64; 3]) -> Result<[usize; 3]> {
        let (forward, backward) = (self.transpose_forward, self.transpose_backward);
        if (0..3).any(|k| forward.get(backward[k]) != Some(&k)) {
            let what = format!("the plans' transposes {forward:?} and {backward:?} do not undo each other");
            return Err(Error::usage(what));
        }
        let own = forward.map(|a| spacing_mm[a]);
        new_shape(forward.map(|a| shape[a]), own, self.target_spacing(own))
    }
}
