//! Where a training stands, beside its tensors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::nn::{GradScaler, PolyLr};

/// A number of a log; JSON has no NaN, which stands for a class that no case has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(from = "Option<f64>", into = "Option<f64>")]
pub struct Logged(pub f64);

impl From<Option<f64>> for Logged {
    fn from(v: Option<f64>) -> Self {
        Self(v.unwrap_or(f64::NAN))
    }
}

impl From<Logged> for Option<f64> {
    fn from(v: Logged) -> Self {
        Some(v.0).filter(|v| v.is_finite())
    }
}

/// What nnU-Net logs, one entry per epoch in each list. Trainers of other people log more, which is passed over.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Logs {
    /// Mean Dice of the foreground classes in validation patches.
    pub mean_fg_dice: Vec<Logged>,
    /// Its exponential moving average.
    pub ema_fg_dice: Vec<Logged>,
    /// Dice by class or region.
    pub dice_per_class_or_region: Vec<Vec<Logged>>,
    /// Mean loss in training.
    pub train_losses: Vec<Logged>,
    /// Mean loss in validation.
    pub val_losses: Vec<Logged>,
    /// Learning rates.
    pub lrs: Vec<Logged>,
    /// Seconds since 1970.
    pub epoch_start_timestamps: Vec<Logged>,
    /// Seconds since 1970.
    pub epoch_end_timestamps: Vec<Logged>,
}

/// What is trained, in nnU-Net's terms.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Name of the trainer, "nnUNetTrainer".
    pub trainer: String,
    /// Name of the configuration, "3d_fullres".
    pub configuration: String,
    /// "0", "1" ... or "all".
    pub fold: String,
    /// The contents of `plans.json`.
    pub plans: Map<String, Value>,
    /// The contents of `dataset.json`.
    pub dataset: Map<String, Value>,
    /// Axes along which patches are mirrored; `None` without mirroring.
    pub mirror_axes: Option<Vec<usize>>,
}

/// Where a training stands, beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingState {
    /// Epochs that are over: the number of the next one.
    pub epoch: u32,
    /// Optimizer steps that are over, without those skipped; of nnU-Net's file, whose SGD does not count them, 250 per epoch.
    pub step: u64,
    /// What batches, loss and the order of sums follow from, by name: a training goes on with the same only, unless it is asked
    /// for recomputation anew.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub settings: Map<String, Value>,
    /// Losses of the steps of an epoch that is not over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub losses: Vec<f64>,
    /// Of all random numbers.
    pub seed: u64,
    /// How far each stream of random numbers is, by its purpose.
    pub counters: BTreeMap<String, u64>,
    /// Learning rates.
    pub schedule: PolyLr,
    /// What the loss is multiplied by, of a training in float16 on a card; a file of nnU-Net has one of every training on a card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaler: Option<GradScaler>,
    /// The best moving average of the Dice so far.
    pub best_ema: Option<f64>,
    /// What was logged.
    pub logs: Logs,
    /// What is trained.
    pub origin: Origin,
}

impl TrainingState {
    /// Where a training with nnU-Net's learning rates begins.
    #[must_use]
    pub fn new(seed: u64, origin: Origin) -> Self {
        Self {
            epoch: 0,
            step: 0,
            settings: Map::new(),
            losses: Vec::new(),
            seed,
            counters: BTreeMap::new(),
            schedule: PolyLr::NNUNET,
            scaler: None,
            best_ema: None,
            logs: Logs::default(),
            origin,
        }
    }
}
