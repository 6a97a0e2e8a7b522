//! What a training takes from `plans.json` and `dataset.json`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::models::{NetworkConfig, StuNetConfig};
use crate::nnunet::json::{self, Field};
use crate::nnunet::labels::LabelSet;
use crate::nnunet::loss::deep_supervision_weights;
use crate::nnunet::model::{
    cut_strides, next_names, patch_size, planned_architecture, pools, previous_name, resolve_configuration,
};

/// Which network is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum NetworkChoice {
    /// The one that the plans describe.
    #[default]
    Planned,
    /// STU-Net of 1.1 million parameters, dims 8 16 32 48 56 56: for trials, and for the demonstration.
    StuNetTiny,
    /// STU-Net-S, 14.6 million parameters.
    StuNetSmall,
    /// STU-Net-B, 58 million.
    StuNetBase,
    /// STU-Net-L, 440 million.
    StuNetLarge,
    /// STU-Net-H, 1457 million.
    StuNetHuge,
}

impl NetworkChoice {
    /// The trainer that nnU-Net's folders are named after.
    #[must_use]
    pub fn trainer(self) -> &'static str {
        match self {
            NetworkChoice::Planned => "nnUNetTrainer",
            NetworkChoice::StuNetTiny => "STUNetTrainer_tiny",
            NetworkChoice::StuNetSmall => "STUNetTrainer_small",
            NetworkChoice::StuNetBase => "STUNetTrainer_base",
            NetworkChoice::StuNetLarge => "STUNetTrainer_large",
            NetworkChoice::StuNetHuge => "STUNetTrainer_huge",
        }
    }

    /// STU-Net of this size.
    fn stunet(self, channels: usize, classes: usize) -> Option<StuNetConfig> {
        let make = match self {
            NetworkChoice::Planned => return None,
            NetworkChoice::StuNetTiny => {
                let small = StuNetConfig::small(channels, classes);
                return Some(StuNetConfig { dims: [8, 16, 32, 48, 56, 56], ..small });
            }
            NetworkChoice::StuNetSmall => StuNetConfig::small,
            NetworkChoice::StuNetBase => StuNetConfig::base,
            NetworkChoice::StuNetLarge => StuNetConfig::large,
            NetworkChoice::StuNetHuge => StuNetConfig::huge,
        };
        Some(make(channels, classes))
    }
}

/// One configuration of a data set's plans, as far as training goes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TrainingPlan {
    /// Where the plans were read.
    pub path: PathBuf,
    /// "3d_fullres" ...
    pub configuration: String,
    /// Name of the plans, "nnUNetPlans" ...
    pub plans_name: String,
    /// Name of the data set.
    pub dataset_name: String,
    /// Voxels (z, y, x) of a patch; a 2D one has a single plane.
    pub patch: [usize; 3],
    /// A 2D configuration.
    pub planar: bool,
    /// Patches of a step.
    pub batch: usize,
    /// Dice over the whole batch.
    pub batch_dice: bool,
    /// Per input channel, whether it was normalised within the nonzero mask.
    pub use_mask: Vec<bool>,
    /// The data set's labels.
    pub labels: LabelSet,
    /// Folder of the preprocessed cases below the data set's.
    pub data_identifier: String,
    /// Strides into all stages but the first.
    pub pools: Vec<[usize; 3]>,
    /// Of a cascade's second stage: the configuration of the first, whose labels are input channels.
    pub previous: Option<String>,
    /// Of a cascade's second stage, once its cases are known: SHA-256 of what the first predicted of them, by which a training
    /// that goes on tells whether it still has the same input.
    pub previous_digest: Option<String>,
    /// Of a cascade's first stage: configurations that take its predictions as input.
    pub next: Vec<String>,
    /// The contents of `plans.json`, with what was changed.
    pub plans: Map<String, Value>,
    /// The contents of `dataset.json`.
    pub dataset: Map<String, Value>,
}

/// Larger than any machine trains with.
const MAX_PATCH: usize = 4096;
const MAX_BATCH: usize = 1 << 16;

impl TrainingPlan {
    /// Ending of the data set's images and label maps.
    #[must_use]
    pub fn file_ending(&self) -> &str {
        self.dataset.get("file_ending").and_then(Value::as_str).unwrap_or(".nii.gz")
    }

    /// Reads the configuration `name` of the plans at `path`; `dataset.json` lies beside them.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Model`] naming file and field.
    pub fn read(path: &Path, name: &str) -> Result<Self> {
        let dataset_path = path.with_file_name("dataset.json");
        let (plans, dataset) = (json::read(path)?, json::read(&dataset_path)?);
        let root = Field::root(path, &plans);
        let resolved = Value::Object(resolve_configuration(&root.need("configurations")?, name)?);
        let conf = Field::at(path, format!("configurations.{name}"), &resolved);
        let (patch, planar) = patch_size(&conf, MAX_PATCH)?;
        let use_mask = conf.need("use_mask_for_norm")?.items()?.iter().map(Field::bool).collect::<Result<Vec<_>>>()?;
        let text = |f: &Field<'_>, key: &str| f.get(key).map(|v| v.str().map(str::to_string)).transpose();
        let default = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let plans_name = text(&root, "plans_name")?.unwrap_or(default);
        let object = |v: &Value| v.as_object().cloned().unwrap_or_default();
        Ok(Self {
            path: path.into(),
            configuration: name.into(),
            dataset_name: text(&root, "dataset_name")?.unwrap_or_default(),
            patch,
            planar,
            batch: conf.need("batch_size")?.usize(MAX_BATCH)?,
            batch_dice: conf.get("batch_dice").map_or(Ok(false), |b| b.bool())?,
            use_mask,
            labels: LabelSet::of(&Field::root(&dataset_path, &dataset))?,
            data_identifier: text(&conf, "data_identifier")?.unwrap_or_else(|| format!("{plans_name}_{name}")),
            pools: pools(&conf, planar)?,
            previous: previous_name(&conf)?,
            previous_digest: None,
            next: next_names(&conf)?,
            plans: object(&plans),
            dataset: object(&dataset),
            plans_name,
        })
    }

    /// The same with other sizes of patch and batch, which the plans then say, too.
    ///
    /// # Errors
    /// [`Error::Usage`] when a 2D patch has planes, or a size is zero or larger than 4096.
    pub fn with_sizes(mut self, patch: Option<[usize; 3]>, batch: Option<usize>) -> Result<Self> {
        let name = self.configuration.clone();
        let mut change = |key: &str, value: Value| {
            if let Some(c) = self.plans.get_mut("configurations").and_then(|c| c.get_mut(&name)) {
                c[key] = value;
            }
        };
        if let Some(patch) = patch {
            if patch.iter().any(|p| !(1..=MAX_PATCH).contains(p)) || (self.planar && patch[0] != 1) {
                let what = if self.planar { "1 and two sizes" } else { "three sizes" };
                return Err(Error::usage(format!("patch {patch:?}: expected {what} of 1 to {MAX_PATCH} voxels")));
            }
            change("patch_size", json!(patch[usize::from(self.planar)..]));
            self.patch = patch;
        }
        if let Some(batch) = batch {
            if !(1..=MAX_BATCH).contains(&batch) {
                return Err(Error::usage(format!("batch {batch}: expected 1 to {MAX_BATCH}")));
            }
            change("batch_size", json!(batch));
            self.batch = batch;
        }
        Ok(self)
    }

    /// The network's sizes.
    ///
    /// # Errors
    /// [`Error::Model`], [`Error::Unsupported`] when the plans describe none that there is; [`Error::Usage`] for a patch
    /// that it cannot pool.
    pub fn network(&self, choice: NetworkChoice) -> Result<NetworkConfig> {
        let (channels, classes) = (self.use_mask.len() + self.previous_labels().len(), self.labels.heads());
        let config = match choice.stunet(channels, classes) {
            Some(_) if self.planar => {
                return Err(Error::unsupported(
                    "a 2D configuration of STU-Net, which has 3D convolutions only; 3D ones are",
                ));
            }
            Some(stunet) => stunet.with_strides(cut_strides(self.pools.iter().copied().map(Ok))?).into(),
            None => planned_architecture(&self.path, &self.configuration, channels, classes)?.config([[1; 3]; 5]),
        };
        let divisor = config.divisor();
        if (0..3).any(|a| !self.patch[a].is_multiple_of(divisor[a])) {
            let what = format!("patch {:?}: expected multiples of {divisor:?}, the product of all strides", self.patch);
            return Err(Error::usage(what));
        }
        Ok(config)
    }

    /// Labels of the stage before that are input channels; none but in a cascade's second stage.
    #[must_use]
    pub fn previous_labels(&self) -> &[u16] {
        if self.previous.is_some() { self.labels.foreground_labels() } else { &[] }
    }

    /// How much each of a network's outputs counts, the largest first. nnU-Net derives targets from the plan's poolings,
    /// whatever the network's: a STU-Net on a plan of four poolings has an output without a target, and on one of six
    /// poolings a target without an output.
    #[must_use]
    pub fn supervision(&self) -> Vec<f64> {
        deep_supervision_weights(self.pools.len())
    }
}
