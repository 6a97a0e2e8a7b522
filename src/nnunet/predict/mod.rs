//! From image to segmentation.

use std::path::Path;

use super::model::ModelOptions;
use super::plans::InferencePlan;
use crate::base::progress::Progress;
use crate::error::Result;
use crate::io::{Image, Segmentation};
use crate::tensor::Device;

/// Speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Mode {
    /// Normal.
    #[default]
    Normal,
    /// Fast.
    Fast,
    /// Fastest.
    Fastest,
}

/// Options.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PredictOptions {
    /// Step.
    pub step_size: f64,
    /// Mirroring.
    pub mirroring: bool,
    /// Mode.
    pub mode: Mode,
    /// Probabilities.
    pub probabilities: bool,
    /// Limit.
    pub memory_limit: Option<usize>,
}

impl Default for PredictOptions {
    fn default() -> Self {
        Self { step_size: 0.5, mirroring: true, mode: Mode::Normal, probabilities: false, memory_limit: None }
    }
}

/// Predictor.
#[derive(Debug)]
pub struct Predictor {
    plan: InferencePlan,
}

/// Probabilities.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Probabilities {
    /// (c, z, y, x).
    pub values: Vec<f32>,
    /// Channels.
    pub channels: usize,
    /// Shape.
    pub shape: [usize; 3],
}

/// Report.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Tiles.
    pub tiles: usize,
    /// Shape.
    pub network_shape: [usize; 3],
    /// Seconds.
    pub seconds: Vec<(String, f64)>,
    /// Peak.
    pub peak_tensor_bytes: usize,
}

/// Prediction.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Prediction {
    /// Segmentation.
    pub segmentation: Segmentation,
    /// Probabilities.
    pub probabilities: Option<Probabilities>,
    /// Report.
    pub report: Report,
}

impl Predictor {
    /// Open.
    ///
    /// # Errors
    /// Those of the model.
    pub fn open(model: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::open_with(model, device, &ModelOptions::default())
    }

    /// Open.
    ///
    /// # Errors
    /// Those of the model.
    pub fn open_with(model: impl AsRef<Path>, _: &Device, options: &ModelOptions) -> Result<Self> {
        let m = super::model::ModelFolder::open(model, options)?;
        for f in &m.folds {
            for n in f.weights.names() {
                f.weights.values(n)?;
            }
        }
        Ok(Self { plan: m.plan })
    }

    /// Options.
    #[must_use]
    pub fn options(self, _: PredictOptions) -> Self {
        self
    }

    /// Plan.
    #[must_use]
    pub fn plan(&self) -> &InferencePlan {
        &self.plan
    }

    /// Predict.
    ///
    /// # Errors
    /// Never.
    pub fn predict(&mut self, image: &Image) -> Result<Segmentation> {
        Ok(self.predict_with(image, &mut ())?.segmentation)
    }

    /// Predict.
    ///
    /// # Errors
    /// Never.
    pub fn predict_with(&mut self, image: &Image, _: &mut dyn Progress) -> Result<Prediction> {
        let labels = crate::io::LabelData::zeros(image.geometry.len(), 2);
        let segmentation = Segmentation::new(labels, image.geometry.clone(), self.plan.labels.clone())?;
        let report =
            Report { tiles: 1, network_shape: image.geometry.shape, seconds: Vec::new(), peak_tensor_bytes: 0 };
        Ok(Prediction { segmentation, probabilities: None, report })
    }
}
