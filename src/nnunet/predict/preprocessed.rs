//! Cases that are on the network's grid already, as those that a training is validated on.

use super::{Needs, Prediction, Predictor, Prepared, Segmented};
use crate::base::progress::Progress;
use crate::error::{Error, Result};
use crate::io::{Geometry, LabelData};
use crate::nnunet::preprocess::Preprocessed;

impl Predictor {
    /// Segments a preprocessed case onto the grid of the image that it was made from (nnU-Net's
    /// `perform_actual_validation`).
    ///
    /// # Errors
    /// [`Error::Input`] when the case has other channels than the model, or was not made from an image of this grid; as
    /// [`Predictor::predict_with`].
    pub fn predict_preprocessed(
        &mut self,
        case: Preprocessed,
        geometry: Geometry,
        progress: &mut dyn Progress,
    ) -> Result<Prediction> {
        Ok(self.predict_stages(case, geometry, &[], progress)?.0)
    }

    /// As [`Predictor::predict_preprocessed`], and the labels on the grids of the stages of a cascade that follow: `next` are
    /// their shapes, (z, y, x) as they are preprocessed (nnU-Net `resample_and_save`).
    ///
    /// # Errors
    /// As [`Predictor::predict_preprocessed`].
    pub fn predict_stages(
        &mut self,
        case: Preprocessed,
        geometry: Geometry,
        next: &[[usize; 3]],
        progress: &mut dyn Progress,
    ) -> Result<(Prediction, Vec<LabelData>)> {
        self.validate()?;
        let (found, expected) = (case.channels, self.plan.inputs());
        if found != expected {
            return Err(Error::input(format!("{found} channels, the model expects {expected}")));
        }
        let whole = self.plan.transpose_forward.map(|a| geometry.shape[a]);
        if case.properties.shape_before_cropping != whole {
            let what =
                format!("preprocessed from {:?} voxels, the grid has {whole:?}", case.properties.shape_before_cropping);
            return Err(Error::input(what));
        }
        let needs = self.admitted(&geometry, self.plan.channels.len(), self.standing()?)?;
        if !next.is_empty() {
            self.check_kept(case.shape, needs)?;
        }
        self.limited(|this| {
            this.device.install(|| {
                let prepared = Prepared { case, seconds: 0.0 };
                let segmented = this.segment(&prepared, geometry, next, progress)?;
                let stages = segmented.stages;
                Ok((this.finish(Segmented { stages: Vec::new(), ..segmented })?, stages))
            })
        })
    }

    /// Refuses what the limit does not allow where the network's whole output is kept for several grids.
    fn check_kept(&self, shape: [usize; 3], needs: Needs) -> Result<()> {
        let channels = self.plan_sweep(shape, self.card_room()?)?.channels();
        let kept = shape.iter().fold(4 * channels, |n, &d| n.saturating_mul(d));
        let asked = needs.alone().saturating_add(kept);
        match self.options.memory_limit {
            Some(limit) if asked > limit => {
                let what = "this prediction for the next stage".into();
                Err(Error::OutOfMemory { what, asked: asked.saturating_sub(needs.held), in_use: needs.held, limit })
            }
            _ => Ok(()),
        }
    }
}
