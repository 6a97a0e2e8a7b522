//! Where nnU-Net keeps data: options, or else the environment variables that nnU-Net reads. No other file reads them.

use std::path::{Path, PathBuf};

use stunet::nnunet::dataset::Dataset;
use stunet::nnunet::lookup;
use stunet::{Device, Error, Result};

use super::args::DeviceArgs;

const FOLDERS: &str = "Folders";

/// Work on raw data sets: where they are, on what device, and whether progress shows.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct RawWorkArgs {
    /// No progress bar
    #[arg(long, display_order = 100)]
    no_progress: bool,
    #[command(flatten)]
    pub(super) raw: RawArgs,
    #[command(flatten)]
    pub(super) device: DeviceArgs,
}

/// Data sets by number or name, and the work on them.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct DatasetsArgs {
    /// Data sets: numbers such as 4, or names such as Dataset004_Hippocampus
    #[arg(short, long = "dataset", value_name = "DATASET", required = true, num_args = 1..)]
    datasets: Vec<String>,
    #[command(flatten)]
    work: RawWorkArgs,
}

/// Work that brings data sets from the raw to the preprocessed folder.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct PreparationArgs {
    #[command(flatten)]
    datasets: DatasetsArgs,
    #[command(flatten)]
    preprocessed: PreprocessedArgs,
}

/// [`PreparationArgs`] with all opened.
#[derive(Debug)]
pub(super) struct Preparation {
    pub(super) datasets: Vec<Dataset>,
    /// Where each has or gets a folder of its name.
    pub(super) preprocessed: PathBuf,
    pub(super) device: Device,
    pub(super) show: bool,
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

impl RawWorkArgs {
    pub(super) fn shows_progress(&self) -> bool {
        !self.no_progress
    }
}

impl DatasetsArgs {
    /// Opens the device and each of the data sets, all before any work begins.
    pub(super) fn open(&self) -> Result<(Vec<Dataset>, Device)> {
        let device = self.work.device.open()?;
        let raw = self.work.raw.folder()?;
        let datasets = self.datasets.iter().map(|name| open(&lookup::dataset_folder(&raw, name)?));
        Ok((datasets.collect::<Result<_>>()?, device))
    }

    pub(super) fn shows_progress(&self) -> bool {
        self.work.shows_progress()
    }
}

impl PreparationArgs {
    /// Opens all before any work begins.
    pub(super) fn open(&self) -> Result<Preparation> {
        let (datasets, device) = self.datasets.open()?;
        let preprocessed = self.preprocessed.folder()?;
        Ok(Preparation { datasets, preprocessed, device, show: self.datasets.shows_progress() })
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
        what: format!("set the environment variable {variable}, or name the folder with {name}"),
    })
}
