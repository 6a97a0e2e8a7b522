//! The models of a data set.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::SelectOptions;
use crate::error::{Error, Result};
use crate::nnunet::dataset::DatasetJson;
use crate::nnunet::json::{self, Field};
use crate::nnunet::model::{previous_name, resolve_configuration};

/// Configurations that are looked for where none is named, in nnU-Net's order.
pub const CONFIGURATIONS: [&str; 4] = ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"];

/// A trained model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Model {
    /// "nnUNetTrainer", "STUNetTrainer_base" ...
    pub trainer: String,
    /// "nnUNetPlans" ...
    pub plans: String,
    /// "3d_fullres" ...
    pub configuration: String,
    /// Of a cascade's second stage: the configuration of the first.
    pub previous: Option<String>,
    /// Its folder, with one for each fold.
    pub folder: PathBuf,
}

impl Model {
    /// `TRAINER__PLANS__CONFIGURATION`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}__{}__{}", self.trainer, self.plans, self.configuration)
    }

    /// The data set that it was trained on.
    pub(super) fn description(&self) -> Result<DatasetJson> {
        DatasetJson::read(&self.folder.join("dataset.json"))
    }

    /// The command that trains `fold`, without its options.
    pub(super) fn training(&self, fold: &str) -> String {
        let dataset = self.folder.parent().map(super::name_of).unwrap_or_default();
        let (configuration, trainer, plans) = (&self.configuration, &self.trainer, &self.plans);
        format!("stunet train -d {dataset} -c {configuration} -f {fold} --trainer {trainer} -p {plans}")
    }
}

/// The models that are compared, in nnU-Net's order (`filter_available_models`): of each trainer the configurations, of each
/// of these the plans. Configurations that the plans do not have are left out: small data sets have no `3d_lowres`.
pub(super) fn available(results: &Path, preprocessed: &Path, options: &SelectOptions) -> Result<Vec<Model>> {
    let names = match &options.configurations {
        Some(names) => names.clone(),
        None => CONFIGURATIONS.map(str::to_owned).to_vec(),
    };
    let named = options.configurations.is_some();
    let mut plans: BTreeMap<&String, (PathBuf, Value)> = BTreeMap::new();
    for name in &options.plans {
        let path = preprocessed.join(format!("{name}.json"));
        let value = json::read(&path)?;
        plans.insert(name, (path, value));
    }
    let mut found: Vec<Model> = Vec::new();
    for trainer in &options.trainers {
        for configuration in &names {
            for name in &options.plans {
                let (path, value) = &plans[name];
                let configurations = Field::root(path, value).need("configurations")?;
                if configurations.get(configuration).is_none() {
                    if named {
                        tracing::warn!("{}: no configuration {configuration:?}, left out", path.display());
                    }
                    continue;
                }
                let resolved = resolve_configuration(&configurations, configuration)?;
                let resolved = Value::Object(resolved);
                let previous = previous_name(&Field::at(path, format!("configurations.{configuration}"), &resolved))?;
                let (trainer, plans, configuration) = (trainer.clone(), name.clone(), configuration.clone());
                let mut model = Model { trainer, plans, configuration, previous, folder: PathBuf::new() };
                model.folder = results.join(model.name());
                if !model.folder.is_dir() {
                    let train = model.training("FOLD");
                    let what = format!("not trained; train every fold with '{train} --npz', or leave it out with -c");
                    if named || options.strict {
                        return Err(Error::dataset(&model.folder, "folder", what));
                    }
                    tracing::warn!("{}: not trained, left out", model.folder.display());
                    continue;
                }
                // What is named twice is compared once, as nnU-Net keeps results by name.
                if !found.contains(&model) {
                    found.push(model);
                }
            }
        }
    }
    if found.is_empty() {
        let (trainers, plans) = (options.trainers.join(", "), options.plans.join(", "));
        let what = format!("no model of {trainers} with {plans} among {}", names.join(", "));
        return Err(Error::usage(format!("{}: {what}", results.display())));
    }
    Ok(found)
}
