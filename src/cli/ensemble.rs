//! `stunet ensemble`.

use std::path::PathBuf;

use stunet::Result;
use stunet::nnunet::dataset::DatasetJson;
use stunet::nnunet::ensemble::ensemble;

use super::output;
use super::progress::{self, Bar};

/// Average the probabilities of several models' predictions
///
/// Every folder holds the same CASE.npz, as 'stunet predict --save-probabilities' and nnU-Net write them.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet ensemble -i results_3d results_lowres -o results_both
  stunet ensemble -i fold_0 fold_1 fold_2 -o mean --save-probabilities")]
pub(super) struct Args {
    /// Folders of predictions; where a case lies is taken from the first
    #[arg(short, long, value_name = "FOLDER", required = true, num_args = 1..)]
    input: Vec<PathBuf>,
    /// Folder to write
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Description of the data set [default: that in the first folder]
    #[arg(long, value_name = "FILE")]
    dataset_json: Option<PathBuf>,
    /// Write the averages, too [--save_npz]
    #[arg(long)]
    save_probabilities: bool,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    progress::catch_interrupts();
    output::show_library_warnings();
    let description = args.dataset_json.clone().unwrap_or_else(|| args.input[0].join("dataset.json"));
    let dataset = DatasetJson::read(&description)?;
    let mut bar = Bar::new("ensemble", !args.no_progress, false);
    let written = ensemble(&args.input, &args.output, &dataset, args.save_probabilities, &mut bar)?;
    drop(bar);
    written.iter().try_for_each(|path| output::path(path))
}
