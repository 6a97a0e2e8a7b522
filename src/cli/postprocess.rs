//! `stunet postprocess determine` and `stunet postprocess apply`.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use stunet::Result;
use stunet::nnunet::dataset::DatasetJson;
use stunet::nnunet::evaluate::Folders;
use stunet::nnunet::postprocess::{Step, apply_to_folder, determine, steps};

use super::args::DeviceArgs;
use super::output;
use super::progress::{self, Bar};

/// Remove small components from predictions, as nnU-Net decides where
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet postprocess determine -i crossval -r labelsTr
  stunet postprocess apply -i results -o results_pp --steps crossval/postprocessing.pkl")]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Find out of which classes only the largest component is to be kept
    ///
    /// Writes postprocessing.pkl, which nnU-Net reads, and postprocessing.json to the input folder, and the label maps after
    /// all steps to its subfolder postprocessed.
    #[command(
        override_usage = "stunet postprocess determine -i FOLDER -r FOLDER [OPTIONS]",
        after_help = "\
Example:
  stunet postprocess determine -i crossval -r labelsTr --remove-postprocessed"
    )]
    Determine {
        #[command(flatten)]
        common: Common,
        /// Folder of true label maps [-ref]
        #[arg(short, long, value_name = "FOLDER")]
        reference: PathBuf,
        /// Keep the decision only, and no postprocessed label maps
        #[arg(long)]
        remove_postprocessed: bool,
    },
    /// Take the steps that were found on another folder
    #[command(
        override_usage = "stunet postprocess apply -i FOLDER -o FOLDER --steps FILE [OPTIONS]",
        after_help = "\
Example:
  stunet postprocess apply -i results -o results_pp --steps crossval/postprocessing.pkl"
    )]
    Apply {
        #[command(flatten)]
        common: Common,
        /// Folder to write
        #[arg(short, long, value_name = "FOLDER")]
        output: PathBuf,
        /// postprocessing.pkl or postprocessing.json; nothing in it is executed [-pp_pkl_file]
        #[arg(long, value_name = "FILE")]
        steps: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Folder of predicted label maps
    #[arg(short, long, value_name = "FOLDER")]
    input: PathBuf,
    /// Description of the data set [-dataset_json] [default: that in the input folder]
    #[arg(long, value_name = "FILE")]
    dataset_json: Option<PathBuf>,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    progress::catch_interrupts();
    output::show_library_warnings();
    match &args.action {
        Action::Determine { common, reference, remove_postprocessed } => {
            run_determine(common, reference, *remove_postprocessed)
        }
        Action::Apply { common, output, steps } => run_apply(common, output, steps),
    }
}

impl Common {
    fn dataset(&self) -> Result<DatasetJson> {
        DatasetJson::read(&self.dataset_json.clone().unwrap_or_else(|| self.input.join("dataset.json")))
    }

    fn bar(&self) -> Bar {
        Bar::new("postprocess", !self.no_progress, false)
    }
}

fn run_determine(common: &Common, reference: &Path, remove: bool) -> Result<()> {
    let (device, dataset) = (common.device.open()?, common.dataset()?);
    let folders = Folders::of_dataset(reference, &common.input, &dataset)?;
    let postprocessed = common.input.join("postprocessed");
    let mut bar = common.bar();
    let found = determine(&folders, &dataset, (!remove).then_some(&*postprocessed), &device, &mut bar)?;
    drop(bar);
    let dice = [&found.before, &found.after].map(|s| s.foreground_dice());
    output::line(format!("mean Dice {:.5}, {:.5} after {} steps", dice[0], dice[1], found.steps.len()))?;
    for step in &found.steps {
        output::line(described(step))?;
    }
    found.write(&common.input)?.iter().try_for_each(|path| output::path(path))?;
    if !remove {
        output::path(&postprocessed)?;
    }
    Ok(())
}

/// What a step keeps.
pub(super) fn described(step: &Step) -> String {
    match step {
        Step::Label(label) => format!("largest component of label {label}"),
        Step::Region(labels) => format!("largest component of region {labels:?}"),
        step => format!("largest component of all foreground {:?}", step.labels()),
    }
}

fn run_apply(common: &Common, target: &Path, file: &Path) -> Result<()> {
    let (device, dataset) = (common.device.open()?, common.dataset()?);
    let steps = steps::read(file)?;
    let mut bar = common.bar();
    let written = apply_to_folder(&common.input, target, &steps, &dataset.file_ending, &device, &mut bar)?;
    drop(bar);
    written.iter().try_for_each(|path| output::path(path))
}
