//! What may be asked of a prediction.

use crate::error::{Error, Result};

/// How a v1 model's result is brought back to the image's grid (`--mode` of nnU-Net v1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Mode {
    /// Resample probabilities, then decide. The only mode of v2 models.
    #[default]
    Normal,
    /// v1: decide on the network's grid, then resample the label map linearly per label.
    Fast,
    /// v1: decide on the network's grid, then take the nearest label.
    Fastest,
}

/// Options of a prediction.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PredictOptions {
    /// Distance of neighbouring windows as a fraction of the patch, in (0, 1].
    pub step_size: f64,
    /// Average over mirrored copies, along the axes the model was trained to mirror.
    pub mirroring: bool,
    /// Export of v1 models.
    pub mode: Mode,
    /// Also return class probabilities; takes classes x volume of memory.
    pub probabilities: bool,
    /// Only kernels as accurate as adding up all products one after the other: see [`Ctx::strict`](crate::autograd::Ctx::strict).
    pub strict: bool,
    /// Refuse to start when more bytes than this would be needed, everything counted; live tensors never exceed it.
    pub memory_limit: Option<usize>,
}

impl Default for PredictOptions {
    fn default() -> Self {
        Self {
            step_size: 0.5,
            mirroring: true,
            mode: Mode::Normal,
            probabilities: false,
            strict: false,
            memory_limit: None,
        }
    }
}

impl PredictOptions {
    /// Sets [`PredictOptions::step_size`].
    #[must_use]
    pub fn step_size(mut self, step: f64) -> Self {
        self.step_size = step;
        self
    }

    /// Checks [`PredictOptions::step_size`] against the sizes of a patch, two or three: windows less than a voxel apart would
    /// be the same window many times over.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is below the least that is not, or above 1.
    pub fn check_step_size(&self, patch: &[usize]) -> Result<()> {
        let step = self.step_size;
        let least = patch.iter().map(|&p| 1.0 / p as f64).fold(0.0, f64::max);
        if step >= least && step <= 1.0 {
            return Ok(());
        }
        Err(Error::usage(format!("step size {step} is out of range, expected {least} to 1 for the patch {patch:?}")))
    }

    /// Sets [`PredictOptions::mirroring`].
    #[must_use]
    pub fn mirroring(mut self, on: bool) -> Self {
        self.mirroring = on;
        self
    }

    /// Sets [`PredictOptions::mode`].
    #[must_use]
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets [`PredictOptions::probabilities`].
    #[must_use]
    pub fn probabilities(mut self, on: bool) -> Self {
        self.probabilities = on;
        self
    }

    /// Sets [`PredictOptions::strict`].
    #[must_use]
    pub fn strict(mut self, on: bool) -> Self {
        self.strict = on;
        self
    }

    /// Sets [`PredictOptions::memory_limit`].
    #[must_use]
    pub fn memory_limit(mut self, bytes: Option<usize>) -> Self {
        self.memory_limit = bytes;
        self
    }
}
