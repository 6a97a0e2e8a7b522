//! How a training goes.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::nnunet::augment::AugmentConfig;
use crate::nnunet::loss::Criterion;
use crate::nnunet::train::{NetworkChoice, Recompute, TrainingPlan, mirror_axes};
use crate::tensor::{Device, Precision};

/// Options of a training; what is `None` is as nnU-Net's trainer has it, or as the plans say.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TrainOptions {
    /// Name of the trainer, by which the results' folder is called; that of the network by default.
    pub trainer: Option<String>,
    /// Which network.
    #[serde(skip)]
    pub network: NetworkChoice,
    /// A checkpoint or model folder whose weights the training begins with, but for its heads.
    pub pretrained: Option<PathBuf>,
    /// Epochs; 1000.
    pub epochs: Option<u32>,
    /// Steps of an epoch.
    pub iterations: u32,
    /// Batches that an epoch is validated on.
    pub val_iterations: u32,
    /// Learning rate of the first epoch; 0.01, of a fine-tuning 0.001.
    pub learning_rate: Option<f64>,
    /// Fine-tuning rates, whatever the training begins with: trainers named `_ft`.
    pub fine_tuning: bool,
    /// Patches of a step.
    pub batch: Option<usize>,
    /// Voxels (z, y, x) of a patch.
    pub patch: Option<[usize; 3]>,
    /// Share of patches that are put on foreground.
    pub oversample: f64,
    /// Whether each patch is put on foreground with that probability, instead of the last ones of a batch.
    pub probabilistic: bool,
    /// What is minimised.
    #[serde(skip)]
    pub criterion: Criterion,
    /// The coarser outputs learn too.
    pub deep_supervision: bool,
    /// Patches are changed at random.
    pub augmentation: bool,
    /// On a card patches are changed there, from the same random numbers; not in a cascade.
    pub augment_on_device: bool,
    /// Axes that may be mirrored; all of the patch by default.
    pub mirror_axes: Option<Vec<usize>>,
    /// Of all random numbers.
    pub seed: u64,
    /// How activations are stored.
    #[serde(skip)]
    pub precision: Precision,
    /// Only kernels as accurate as plain summation.
    pub strict: bool,
    /// Whether to keep only the inputs of stages and run each once more on the way back.
    pub recompute: Recompute,
    /// Threads that prepare batches.
    pub workers: usize,
    /// Epochs between two checkpoints.
    pub save_every: u32,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            trainer: None,
            network: NetworkChoice::Planned,
            pretrained: None,
            epochs: None,
            iterations: 250,
            val_iterations: 50,
            learning_rate: None,
            fine_tuning: false,
            batch: None,
            patch: None,
            oversample: 0.33,
            probabilistic: false,
            criterion: Criterion::DiceCe,
            deep_supervision: true,
            augmentation: true,
            augment_on_device: false,
            mirror_axes: None,
            seed: 0,
            precision: Precision::F32,
            strict: false,
            recompute: Recompute::Auto,
            workers: 2,
            save_every: 50,
        }
    }
}

impl TrainOptions {
    /// nnU-Net's and STU-Net's defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What a trainer's name stands for: `STUNetTrainer_base`, `STUNetTrainer_base_ft`, `nnUNetTrainer_250epochs`,
    /// `nnUNetTrainerNoMirroring`, `nnUNetTrainerDiceLoss` ...
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a name that is none of those.
    pub fn of_trainer(name: &str) -> Result<Self> {
        let mut out = Self { trainer: Some(name.into()), ..Self::default() };
        let unknown = || {
            let what = "STUNetTrainer_{tiny,small,base,large,huge} with _ft or _ep4k after it, and nnUNetTrainer with \
                        epochs, NoMirroring, NoDA, NoDeepSupervision, CELoss, DiceLoss, Topk10Loss, DiceTopK10Loss, \
                        DiceCELoss_noSmooth or probabilisticOversampling_033 are";
            Error::unsupported(format!("trainer {name:?}; {what}"))
        };
        if let Some(rest) = name.strip_prefix("STUNetTrainer_") {
            let mut parts = rest.split('_');
            out.network = match parts.next() {
                Some("tiny") => NetworkChoice::StuNetTiny,
                Some("small") => NetworkChoice::StuNetSmall,
                Some("base") => NetworkChoice::StuNetBase,
                Some("large") => NetworkChoice::StuNetLarge,
                Some("huge") => NetworkChoice::StuNetHuge,
                _ => return Err(unknown()),
            };
            for part in parts {
                match part {
                    "ft" => out.fine_tuning = true,
                    "ep2k" => out.epochs = Some(2000),
                    "ep4k" => out.epochs = Some(4000),
                    _ => return Err(unknown()),
                }
            }
            return Ok(out);
        }
        let rest = name.strip_prefix("nnUNetTrainer").ok_or_else(unknown)?;
        for part in rest.split('_').filter(|p| !p.is_empty()) {
            let epochs = part.strip_suffix("epochs").or(part.strip_suffix("epoch")).and_then(|n| n.parse().ok());
            match part {
                "NoMirroring" => out.mirror_axes = Some(Vec::new()),
                "NoDA" => out.augmentation = false,
                "NoDeepSupervision" => out.deep_supervision = false,
                "CELoss" => out.criterion = Criterion::Ce,
                "DiceLoss" => out.criterion = Criterion::Dice,
                "Topk10Loss" => out.criterion = Criterion::TopK10,
                "DiceTopK10Loss" => out.criterion = Criterion::DiceTopK10,
                "DiceCELoss" | "noSmooth" => out.criterion = Criterion::DiceCeNoSmooth,
                "probabilisticOversampling" => out.probabilistic = true,
                "033" | "010" if out.probabilistic => out.oversample = if part == "033" { 0.33 } else { 0.1 },
                _ if epochs.is_some() => out.epochs = epochs,
                _ => return Err(unknown()),
            }
        }
        // Without a number nnU-Net takes the share that batches of the plan's size happen to have.
        if out.probabilistic && !(rest.ends_with("_033") || rest.ends_with("_010")) {
            return Err(unknown());
        }
        Ok(out)
    }

    /// Checks ranges.
    pub(super) fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::usage(what));
        if self.epochs == Some(0) || self.iterations == 0 || self.save_every == 0 {
            return bad("epochs, iterations and epochs between checkpoints: expected at least 1".into());
        }
        if let Some(lr) = self.learning_rate.filter(|lr| !(lr.is_finite() && *lr > 0.0)) {
            return bad(format!("learning rate {lr}: expected a positive number"));
        }
        if !(0.0..=1.0).contains(&self.oversample) {
            return bad(format!("share of foreground patches {}: expected 0 to 1", self.oversample));
        }
        if !(1..=256).contains(&self.workers) {
            return bad(format!("{} workers: expected 1 to 256", self.workers));
        }
        Ok(())
    }

    /// What may be done to patches, if anything.
    pub(super) fn augmentation(&self, plan: &TrainingPlan) -> Result<Option<AugmentConfig>> {
        if !self.augmentation {
            return Ok(None);
        }
        let first = usize::from(plan.planar);
        let mut config = AugmentConfig::new(&plan.patch[first..], &plan.use_mask)?;
        let axes = mirror_axes(plan, self).unwrap_or_default();
        config.mirror = [0, 1, 2].map(|a| a >= first && axes.contains(&(a - first)));
        Ok(Some(config))
    }

    /// [`TrainOptions::augmentation`] on `device`, where that is asked for and possible.
    pub(super) fn augmentation_on(&self, plan: &TrainingPlan, device: &Device) -> Result<Option<AugmentConfig>> {
        if !self.augment_on_device {
            return Ok(None);
        }
        if device.is_cpu() {
            let what = "augmentation on a card: the training is on the processor, expected --device cuda";
            return Err(Error::usage(what));
        }
        if !self.augmentation {
            return Err(Error::usage(
                "augmentation on a card: the trainer has none, expected one that augments patches",
            ));
        }
        if !plan.previous_labels().is_empty() {
            let what = "augmentation on a card of a cascade's second stage; on the processor it is";
            return Err(Error::unsupported(what));
        }
        self.augmentation(plan)
    }

    /// Learning rate of the first epoch.
    pub(super) fn initial_rate(&self) -> f64 {
        let tuned = self.fine_tuning || self.pretrained.is_some();
        self.learning_rate.unwrap_or(if tuned { FINE_TUNING } else { FROM_SCRATCH })
    }

    /// What batches and loss follow from.
    pub(super) fn settings(&self, plan: &TrainingPlan) -> Map<String, Value> {
        let mut value = json!({
            "seed": self.seed,
            "iterations": self.iterations,
            "val_iterations": self.val_iterations,
            "batch": plan.batch,
            "patch": plan.patch,
            "oversample": self.oversample,
            "probabilistic": self.probabilistic,
            "augmentation": match self.augment_on_device {
                // Sums in another order: not the same bytes.
                true if self.augmentation => json!("on a card"),
                _ => json!(self.augmentation),
            },
            "mirror_axes": self.mirror_axes,
            "criterion": format!("{:?}", self.criterion),
            "deep_supervision": self.deep_supervision,
            "precision": format!("{:?}", self.precision),
            "strict": self.strict,
        });
        if let Some(digest) = &plan.previous_digest {
            value["previous_stage"] = digest.as_str().into();
        }
        value.as_object().cloned().unwrap_or_default()
    }

    /// Name of the trainer.
    #[must_use]
    pub fn trainer_name(&self) -> String {
        let fine = if self.pretrained.is_some() && self.network != NetworkChoice::Planned { "_ft" } else { "" };
        self.trainer.clone().unwrap_or_else(|| format!("{}{fine}", self.network.trainer()))
    }
}

/// nnU-Net's and STU-Net's.
const FROM_SCRATCH: f64 = 1e-2;
/// STU-Net's `STUNetTrainer_*_ft`.
const FINE_TUNING: f64 = 1e-3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_trainers_say_what_they_do() {
        let of = |name: &str| TrainOptions::of_trainer(name).unwrap();
        assert_eq!(of("nnUNetTrainer"), TrainOptions { trainer: Some("nnUNetTrainer".into()), ..TrainOptions::new() });
        assert_eq!(of("nnUNetTrainer_250epochs").epochs, Some(250));
        assert_eq!(of("nnUNetTrainer_1epoch").epochs, Some(1));
        let both = of("nnUNetTrainer_2000epochs_NoMirroring");
        assert_eq!((both.epochs, both.mirror_axes), (Some(2000), Some(vec![])));
        let tuned = of("STUNetTrainer_large_ft");
        assert_eq!((tuned.network, tuned.initial_rate()), (NetworkChoice::StuNetLarge, 1e-3));
        assert_eq!(of("nnUNetTrainerDiceCELoss_noSmooth").criterion, Criterion::DiceCeNoSmooth);
        assert_eq!(of("nnUNetTrainer_probabilisticOversampling_010").oversample, 0.1);
        for bad in ["", "MyTrainer", "STUNetTrainer", "STUNetTrainer_base_x", "nnUNetTrainerDA5"] {
            assert!(TrainOptions::of_trainer(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fine_tuning_is_slower_and_called_so() {
        let mut o = TrainOptions { network: NetworkChoice::StuNetBase, ..TrainOptions::new() };
        assert_eq!((o.trainer_name().as_str(), o.initial_rate()), ("STUNetTrainer_base", 1e-2));
        o.pretrained = Some("base.model".into());
        assert_eq!((o.trainer_name().as_str(), o.initial_rate()), ("STUNetTrainer_base_ft", 1e-3));
    }
}
