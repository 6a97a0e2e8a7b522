//! `stunet select`.

use stunet::Result;
use stunet::nnunet::lookup;
use stunet::nnunet::select::{SelectOptions, Selected, select};
use stunet::nnunet::split::Fold;

use super::args::DeviceArgs;
use super::folders::{PreprocessedArgs, ResultsArgs};
use super::output;
use super::postprocess;
use super::progress::{self, Bar};

/// Find the best of a data set's trained models, or of the means of two
///
/// Compares by the final validations of all folds, which 'stunet train --npz' and nnU-Net leave, determines the
/// post-processing of the best, and writes how to segment new images with it. Configurations that the plans do not have are
/// left out; of those named with -c every one has to be trained.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "stunet select <DATASET> [OPTIONS]\n       stunet select -d <DATASET> [OPTIONS]",
    after_help = "\
Examples:
  stunet select 4
  stunet select 4 -c 3d_lowres 3d_fullres -tr STUNetTrainer_base
  stunet select 4 -c 3d_fullres -f 0 1 --no-ensembling

Writes, as nnUNetv2_find_best_configuration does, crossval_results_folds_*
in every model's folder, ensembles/, inference_information.json and
inference_instructions.txt.

Exit codes: see 'stunet --help'."
)]
pub(super) struct Args {
    /// Data set: a number such as 4, or a name such as Dataset004_Hippocampus
    #[arg(value_name = "DATASET", conflicts_with = "dataset")]
    positional: Option<String>,
    /// The same
    #[arg(short, long, value_name = "DATASET", required_unless_present = "positional")]
    dataset: Option<String>,
    /// Configurations [default: 2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres, as far as trained]
    #[arg(short, long, value_name = "CONFIG", num_args = 1..)]
    configurations: Option<Vec<String>>,
    /// Plans
    #[arg(short, long, value_name = "PLANS", num_args = 1.., default_value = "nnUNetPlans")]
    plans: Vec<String>,
    /// Trainers, as nnU-Net names them [-tr]
    #[arg(long, value_name = "TRAINER", num_args = 1.., default_value = "nnUNetTrainer")]
    trainers: Vec<String>,
    /// Folds of the cross-validation, or all alone
    #[arg(short, long, value_name = "FOLD", num_args = 1.., default_values = ["0", "1", "2", "3", "4"])]
    folds: Vec<Fold>,
    /// Do not average models: no probabilities are needed [--disable_ensembling]
    #[arg(long)]
    no_ensembling: bool,
    /// Keep collected and averaged label maps that are there, even if outdated
    #[arg(long)]
    no_overwrite: bool,
    /// Without -c: refuse, as nnU-Net does, where the plans have a configuration that was not trained
    #[arg(long, conflicts_with = "configurations")]
    strict: bool,
    /// Leave out cases that were not validated, instead of refusing
    #[arg(long)]
    chill: bool,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
    #[command(flatten)]
    preprocessed: PreprocessedArgs,
    #[command(flatten)]
    results: ResultsArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let device = args.device.open()?;
    progress::catch_interrupts();
    output::show_library_warnings();
    let dataset = args.positional.as_ref().or(args.dataset.as_ref()).map_or("", String::as_str);
    let preprocessed = lookup::dataset_folder(&args.preprocessed.folder()?, dataset)?;
    let name = preprocessed.file_name().unwrap_or_default();
    let results = args.results.folder()?.join(name);
    let mut bar = Bar::new("select", !args.no_progress, false);
    let found = select(&results, &preprocessed, &args.options(), &device, &mut bar)?;
    drop(bar);
    output::text(&table(&found))?;
    let written = found.write()?;
    output::text(&format!("\n{}\n", found.instructions()))?;
    written.iter().try_for_each(|path| output::path(path))
}

impl Args {
    fn options(&self) -> SelectOptions {
        let mut options = SelectOptions::default();
        options.configurations.clone_from(&self.configurations);
        options.plans.clone_from(&self.plans);
        options.trainers.clone_from(&self.trainers);
        options.folds.clone_from(&self.folds);
        options.ensembling = !self.no_ensembling;
        options.overwrite = !self.no_overwrite;
        options.strict = self.strict;
        options.incomplete = self.chill;
        options
    }
}

/// A line for each candidate, and what post-processing does to the best.
fn table(found: &Selected) -> String {
    let mut rows = vec![["Dice", "", "candidate"].map(str::to_owned).to_vec()];
    for (i, candidate) in found.candidates.iter().enumerate() {
        let best = if i == found.best { "best" } else { "" };
        rows.push(vec![format!("{:.5}", candidate.dice()), best.into(), candidate.name.clone()]);
    }
    let mut text = output::columns(&rows);
    let after = &found.postprocessing;
    text += &format!("\nafter {} steps of post-processing {:.5}\n", after.steps.len(), after.after.foreground_dice());
    after.steps.iter().for_each(|step| text += &format!("{}\n", postprocess::described(step)));
    text
}
