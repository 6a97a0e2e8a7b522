//! `stunet verify`.

use std::process::ExitCode;

use stunet::Result;

use super::folders::DatasetsArgs;
use super::output::{self, say_error};
use super::progress::{self, Bar};

/// Check a raw data set: files, grids, values, labels
///
/// Reads every case and names each fault with its case and what to do. What nnU-Net's --verify_dataset_integrity finds is
/// found here, and missing channels by their number.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet verify -d 4
  stunet verify -d Dataset004_Hippocampus 27 --raw data/nnUNet_raw")]
pub(super) struct Args {
    #[command(flatten)]
    datasets: DatasetsArgs,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let (datasets, device) = args.datasets.open()?;
    progress::catch_interrupts();
    output::show_library_warnings();
    let mut code = ExitCode::SUCCESS;
    for dataset in &datasets {
        let mut bar = Bar::new(&dataset.name, args.datasets.shows_progress(), false);
        let faults = dataset.verify(&device, &mut bar)?;
        drop(bar);
        faults.iter().for_each(|f| say_error(&f.to_string()));
        match faults.as_slice() {
            [] => output::line(format!("{}: {} cases, no fault", dataset.name, dataset.cases.len()))?,
            [first, ..] => {
                output::line(format!("{}: {} faults", dataset.name, faults.len()))?;
                code = ExitCode::from(first.exit_code());
            }
        }
    }
    Ok(code)
}
