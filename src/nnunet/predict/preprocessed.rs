//! Cases that are on the network's grid already, as those that a training is validated on.

use super::{Prediction, Predictor, Prepared};
use crate::base::progress::Progress;
use crate::error::{Error, Result};
use crate::io::Geometry;
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
        self.validate()?;
        let (found, expected) = (case.channels, self.plan.channels.len());
        if found != expected {
            return Err(Error::input(format!("{found} channels, the model expects {expected}")));
        }
        let whole = self.plan.transpose_forward.map(|a| geometry.shape[a]);
        if case.properties.shape_before_cropping != whole {
            let what =
                format!("preprocessed from {:?} voxels, the grid has {whole:?}", case.properties.shape_before_cropping);
            return Err(Error::input(what));
        }
        self.check_memory(&geometry, found)?;
        self.limited(|this| {
            this.device.install(|| {
                let prepared = Prepared { case, seconds: 0.0 };
                this.finish(this.segment(&prepared, geometry, progress)?)
            })
        })
    }
}
