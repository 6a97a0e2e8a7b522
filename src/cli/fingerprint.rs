//! `stunet fingerprint`.

use stunet::nnunet::dataset::Dataset;
use stunet::nnunet::fingerprint::{self, Fingerprint};
use stunet::{Error, Result};

use super::folders::{Preparation, PreparationArgs};
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
    preparation: PreparationArgs,
    /// Look for faults first, as 'stunet verify' does
    #[arg(long)]
    verify: bool,
    /// Make it anew where it is already there
    #[arg(long)]
    clean: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let work = args.preparation.open()?;
    progress::catch_interrupts();
    output::show_library_warnings();
    for dataset in &work.datasets {
        let path = work.preprocessed.join(&dataset.name).join(fingerprint::FILE);
        if !checked(dataset, &work, args.verify, args.clean)? {
            say_warning(&format!("{}: kept as it is, --clean makes it anew", path.display()));
        }
        output::path(&path)?;
    }
    Ok(())
}

/// Looks for faults if asked to, and makes the fingerprint unless it is there or wanted anew; whether it was made.
pub(super) fn checked(dataset: &Dataset, work: &Preparation, verify: bool, clean: bool) -> Result<bool> {
    if verify {
        let mut bar = Bar::new(&dataset.name, work.show, false);
        if let Some(fault) = dataset.verify(&work.device, &mut bar)?.into_iter().next() {
            return Err(fault);
        }
    }
    let there = work.preprocessed.join(&dataset.name).join(fingerprint::FILE).is_file();
    if there && !clean {
        return Ok(false);
    }
    extract(dataset, work).map(|_| true)
}

/// Writes a data set's fingerprint to its folder of preprocessed data.
pub(super) fn extract(dataset: &Dataset, work: &Preparation) -> Result<Fingerprint> {
    let folder = work.preprocessed.join(&dataset.name);
    // Before hours of reading: a folder that cannot be made is told of at once.
    std::fs::create_dir_all(&folder).map_err(|e| Error::Io { path: folder.clone(), action: "create", source: e })?;
    let mut bar = Bar::new(&dataset.name, work.show, false);
    let found = Fingerprint::extract(dataset, &work.device, &mut bar)?;
    drop(bar);
    found.write(&folder.join(fingerprint::FILE))?;
    Ok(found)
}
