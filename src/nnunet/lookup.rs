//! Where nnU-Net keeps data sets, `DatasetNNN_Name`, and trained models:
//! `nnUNet_results/DatasetNNN_Name/TRAINER__PLANS__CONFIGURATION`.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A model by nnU-Net's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName {
    /// Data set number ("4", "004") or folder name ("Dataset004_Hippocampus").
    pub dataset: String,
    /// "3d_fullres", "3d_lowres" ...
    pub configuration: String,
    /// "nnUNetTrainer", "STUNetTrainer_base" ...
    pub trainer: String,
    /// "nnUNetPlans" ...
    pub plans: String,
}

impl ModelName {
    /// The model's folder below `results` (nnU-Net's `nnUNet_results`).
    ///
    /// # Errors
    /// [`Error::Usage`] that lists what is there when the data set or the model is not, or when two data sets carry
    /// the same number.
    pub fn find(&self, results: &Path) -> Result<PathBuf> {
        let dataset = dataset_folder(results, &self.dataset)?;
        let wanted = format!("{}__{}__{}", self.trainer, self.plans, self.configuration);
        let folder = dataset.join(&wanted);
        if folder.is_dir() {
            return Ok(folder);
        }
        let there: Vec<String> = folders(&dataset)?.into_iter().filter(|n| n.split("__").count() == 3).collect();
        Err(Error::usage(format!("{}: no model {wanted} in it, {}", dataset.display(), listing(&there))))
    }
}

/// The folder of a data set below `folder` (nnU-Net's `nnUNet_raw`, `nnUNet_preprocessed` or `nnUNet_results`), by its number
/// ("4", "004") or name ("Dataset004_Hippocampus").
///
/// # Errors
/// [`Error::Usage`] that lists what is there when the data set is not, or when two carry the same number; [`Error::Io`].
pub fn dataset_folder(folder: &Path, dataset: &str) -> Result<PathBuf> {
    let there: Vec<String> = folders(folder)?.into_iter().filter(|n| n.starts_with("Dataset")).collect();
    let found: Vec<&String> = match dataset.parse::<u32>() {
        Ok(id) => there.iter().filter(|n| number(n) == Some(id)).collect(),
        Err(_) => there.iter().filter(|n| **n == dataset).collect(),
    };
    match found.as_slice() {
        [one] => Ok(folder.join(one)),
        [] => {
            let what = format!("{}: no data set {dataset} in it, {}", folder.display(), listing(&there));
            Err(Error::usage(what))
        }
        several => {
            let several: Vec<String> = several.iter().map(|s| (*s).clone()).collect();
            Err(Error::usage(format!(
                "{}: several data sets have number {dataset}, name one of: {}",
                folder.display(),
                several.join(", ")
            )))
        }
    }
}

/// The number in `Dataset004_Name`.
pub(crate) fn number(name: &str) -> Option<u32> {
    name.strip_prefix("Dataset")?.split_once('_')?.0.parse().ok()
}

fn listing(names: &[String]) -> String {
    if names.is_empty() { "there is none".into() } else { format!("there are: {}", names.join(", ")) }
}

/// Names of the folders in `path`, sorted.
fn folders(path: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(path).map_err(|e| Error::io("list", path, e))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("list", path, e))?;
        if entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}
