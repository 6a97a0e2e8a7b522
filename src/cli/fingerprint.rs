//! `stunet fingerprint`.

use std::path::{Path, PathBuf};

use stunet::nnunet::dataset::Dataset;
use stunet::nnunet::fingerprint::{self, Fingerprint};
use stunet::{Device, Error, Result};

use super::args::DeviceArgs;
use super::folders::{DatasetsArgs, PreprocessedArgs, RawArgs};
use super::output::{self, say_warning};
use super::progress::{self, Bar};

/// Read what planning needs of a data set: spacings, shapes, intensities
///
/// Writes the dataset_fingerprint.json that nnU-Net would write to the folder of preprocessed data.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet fingerprint -d 4
  stunet fingerprint -d 4 --verify --clean")]
pub(super) struct Args {
    #[command(flatten)]
    datasets: DatasetsArgs,
    /// Look for faults first, as 'stunet verify' does
    #[arg(long)]
    verify: bool,
    /// Make it anew where it is already there
    #[arg(long)]
    clean: bool,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
    #[command(flatten)]
    raw: RawArgs,
    #[command(flatten)]
    preprocessed: PreprocessedArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let device = args.device.open()?;
    let datasets = args.datasets.open(&args.raw)?;
    let preprocessed = args.preprocessed.folder()?;
    progress::catch_interrupts();
    output::show_library_warnings();
    for dataset in &datasets {
        if !checked(dataset, &preprocessed, &device, !args.no_progress, args.verify, args.clean)? {
            let path = preprocessed.join(&dataset.name).join(fingerprint::FILE);
            say_warning(&format!("{}: kept as it is, --clean makes it anew", path.display()));
        }
        output::path(&preprocessed.join(&dataset.name).join(fingerprint::FILE))?;
    }
    Ok(())
}

/// Looks for faults if asked to, and makes the fingerprint unless it is there or wanted anew; whether it was made.
pub(super) fn checked(
    dataset: &Dataset,
    preprocessed: &Path,
    device: &Device,
    show: bool,
    verify: bool,
    clean: bool,
) -> Result<bool> {
    if verify {
        let mut bar = Bar::new(&dataset.name, show, false);
        if let Some(fault) = dataset.verify(device, &mut bar)?.into_iter().next() {
            return Err(fault);
        }
    }
    let there = preprocessed.join(&dataset.name).join(fingerprint::FILE).is_file();
    if there && !clean {
        return Ok(false);
    }
    extract(dataset, preprocessed, device, show).map(|_| true)
}

/// Writes a data set's fingerprint to its folder below `preprocessed`.
pub(super) fn extract(dataset: &Dataset, preprocessed: &Path, device: &Device, show: bool) -> Result<Fingerprint> {
    let folder: PathBuf = preprocessed.join(&dataset.name);
    // Before hours of reading: a folder that cannot be made is told of at once.
    std::fs::create_dir_all(&folder).map_err(|e| Error::Io { path: folder.clone(), action: "create", source: e })?;
    let mut bar = Bar::new(&dataset.name, show, false);
    let found = Fingerprint::extract(dataset, device, &mut bar)?;
    drop(bar);
    found.write(&folder.join(fingerprint::FILE))?;
    Ok(found)
}
