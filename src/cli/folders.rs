//! Where nnU-Net keeps data: options, or else the environment variables that nnU-Net reads. No other file reads them.

use std::path::{Path, PathBuf};

use stunet::nnunet::dataset::Dataset;
use stunet::nnunet::lookup;
use stunet::{Error, Result};

const FOLDERS: &str = "Folders";

/// Data sets by number or name.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct DatasetsArgs {
    /// Data sets: numbers such as 4, or names such as Dataset004_Hippocampus
    #[arg(short, long = "dataset", value_name = "DATASET", required = true, num_args = 1..)]
    datasets: Vec<String>,
}

/// The folder of raw data sets.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct RawArgs {
    /// Raw data sets [default: $nnUNet_raw]
    #[arg(long, value_name = "FOLDER", help_heading = FOLDERS)]
    raw: Option<PathBuf>,
}

/// The folder of fingerprints, plans and preprocessed data.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct PreprocessedArgs {
    /// Fingerprints, plans, preprocessed cases [default: $nnUNet_preprocessed]
    #[arg(long, value_name = "FOLDER", help_heading = FOLDERS)]
    preprocessed: Option<PathBuf>,
}

/// The folder of trained models.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct ResultsArgs {
    /// Trained models [default: $nnUNet_results]
    #[arg(long, value_name = "FOLDER", help_heading = FOLDERS)]
    results: Option<PathBuf>,
}

impl DatasetsArgs {
    /// Opens each of them below `raw`, all before any work begins.
    pub(super) fn open(&self, raw: &RawArgs) -> Result<Vec<Dataset>> {
        let raw = raw.folder()?;
        self.datasets.iter().map(|name| open(&lookup::dataset_folder(&raw, name)?)).collect()
    }
}

/// Opens a raw data set; variables in its list of files are those of the environment.
pub(super) fn open(folder: &Path) -> Result<Dataset> {
    Dataset::open_with(folder, &|name| std::env::var(name).ok())
}

impl RawArgs {
    /// The folder.
    pub(super) fn folder(&self) -> Result<PathBuf> {
        given(self.raw.as_ref(), "nnUNet_raw", "--raw")
    }
}

impl PreprocessedArgs {
    /// The folder.
    pub(super) fn folder(&self) -> Result<PathBuf> {
        given(self.preprocessed.as_ref(), "nnUNet_preprocessed", "--preprocessed")
    }
}

impl ResultsArgs {
    /// The folder.
    pub(super) fn folder(&self) -> Result<PathBuf> {
        given(self.results.as_ref(), "nnUNet_results", "--results")
    }
}

fn given(option: Option<&PathBuf>, variable: &str, name: &str) -> Result<PathBuf> {
    let set = || std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    option.cloned().or_else(set).ok_or_else(|| Error::Usage {
        what: format!("-d needs the environment variable {variable}, or name the folder with {name}"),
    })
}
