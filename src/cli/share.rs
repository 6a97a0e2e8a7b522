//! `stunet export` and `stunet import`.

use std::path::PathBuf;

use stunet::Result;
use stunet::nnunet::lookup::ModelName;
use stunet::nnunet::model::archive;
use stunet::nnunet::select::CONFIGURATIONS;

use super::args::ModelArgs;
use super::folders::ResultsArgs;
use super::output;
use super::progress::{self, Bar};

const MODELS: &str = "Which models";

/// Pack trained models into one zip file, as nnU-Net shares them
///
/// Takes models of nnU-Net v1 and v2 and of this project, each opened and checked first. With the weights go what nnU-Net
/// exports beside them: summaries of validations, post-processing, ensembles of the models, and which one is best. Both
/// 'stunet import' and nnUNetv2_install_pretrained_model_from_zip take it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet export -d 4 -c 2d 3d_fullres -o hippocampus.zip
  stunet export -m models/stunet_base -o stunet_base.zip")]
pub(super) struct ExportArgs {
    /// Folders of models
    #[arg(short, long, value_name = "FOLDER", num_args = 1.., required_unless_present = "dataset", help_heading = MODELS)]
    model: Vec<PathBuf>,
    /// Models of a data set in nnUNet_results, by number or name
    #[arg(short, long, value_name = "DATASET", conflicts_with = "model", help_heading = MODELS)]
    dataset: Option<String>,
    /// With -d: configurations [default: 2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres, as far as trained]
    #[arg(short, long, value_name = "NAME", num_args = 1.., requires = "dataset", help_heading = MODELS)]
    configuration: Vec<String>,
    /// With -d: the trainer [-tr]
    #[arg(long, value_name = "NAME", default_value = "nnUNetTrainer", help_heading = MODELS)]
    trainer: String,
    /// With -d: the plans
    #[arg(short, long, value_name = "NAME", default_value = "nnUNetPlans", help_heading = MODELS)]
    plans: String,
    #[command(flatten)]
    folds: ModelArgs,
    /// Zip file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// With the label maps that validations predicted [--exp_cv_preds]
    #[arg(long)]
    validations: bool,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
    #[command(flatten)]
    results: ResultsArgs,
}

/// Unpack trained models from a zip file
///
/// Nothing in the file is believed or executed: names stay inside the folder, links are refused, sizes and checksums have
/// to hold, and every model is opened before it has its place. Models are licensed as their makers say.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet import hippocampus.zip
  stunet import stunet_base.zip --results models")]
pub(super) struct ImportArgs {
    /// Zip file of 'stunet export' or nnUNetv2_export_model_to_zip
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Replace models that are there already
    #[arg(long)]
    overwrite: bool,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
    #[command(flatten)]
    results: ResultsArgs,
}

pub(super) fn export(args: &ExportArgs) -> Result<()> {
    progress::catch_interrupts();
    output::show_library_warnings();
    let models = args.models()?;
    let mut bar = Bar::new("export", !args.no_progress, false);
    archive::export(&models, &args.output, &args.folds.options(), args.validations, &mut bar)?;
    drop(bar);
    output::path(&args.output)
}

impl ExportArgs {
    fn models(&self) -> Result<Vec<PathBuf>> {
        let Some(dataset) = &self.dataset else { return Ok(self.model.clone()) };
        let results = self.results.folder()?;
        let find = |configuration: &str| {
            let name = ModelName {
                dataset: dataset.clone(),
                configuration: configuration.into(),
                trainer: self.trainer.clone(),
                plans: self.plans.clone(),
            };
            name.find(&results)
        };
        if !self.configuration.is_empty() {
            return self.configuration.iter().map(|c| find(c)).collect();
        }
        let all = CONFIGURATIONS.map(find);
        if all.iter().any(Result::is_ok) {
            return Ok(all.into_iter().flatten().collect());
        }
        // Why there is none is the same for all of them.
        all.into_iter().collect()
    }
}

pub(super) fn import(args: &ImportArgs) -> Result<()> {
    progress::catch_interrupts();
    output::show_library_warnings();
    let results = args.results.folder()?;
    let mut bar = Bar::new("import", !args.no_progress, false);
    let models = archive::import(&args.file, &results, args.overwrite, &mut bar)?;
    drop(bar);
    models.iter().try_for_each(|path| output::path(path))
}
