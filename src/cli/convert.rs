//! `stunet convert`.

use std::path::PathBuf;

use clap::Subcommand;
use stunet::nnunet::{dataset, model};
use stunet::{Error, Result};

use super::args::{ModelArgs, PrecisionChoice};
use super::folders::RawWorkArgs;
use super::progress::Bar;
use super::{output, progress};

/// Turn a model of nnU-Net v1 or v2 into stunet's own folder
///
/// The new folder holds safetensors and JSON only, with a sha256 for every file. Nothing in the old files is executed.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    subcommand_value_name = "KIND",
    subcommand_help_heading = "Data sets instead of models",
    after_help = "\
Examples:
  stunet convert Task101/STUNetTrainer_base__nnUNetPlansv2.1 models/stunet_base
  stunet convert Dataset004/T__nnUNetPlans__3d_fullres models/liver -f 0 1
  stunet convert msd Task05_Prostate
  stunet convert v1-dataset nnUNet_raw_data/Task004_Hippocampus Dataset004_Hippocampus"
)]
pub(super) struct Args {
    /// Model folder of nnU-Net
    #[arg(value_name = "SRC", required = true)]
    source: Option<PathBuf>,
    /// Folder to create
    #[arg(value_name = "DST", required = true)]
    target: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// Store weights in this precision [default: as they are]
    #[arg(long, value_enum)]
    precision: Option<PrecisionChoice>,
    #[command(subcommand)]
    dataset: Option<DatasetKind>,
}

#[derive(Debug, Subcommand)]
enum DatasetKind {
    /// A task of the Medical Segmentation Decathlon to a raw data set
    Msd {
        /// The task's folder, such as Task05_Prostate
        #[arg(value_name = "TASK")]
        source: PathBuf,
        /// Number of the data set [default: the task's]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=999))]
        id: Option<u32>,
        #[command(flatten)]
        common: RawWorkArgs,
    },
    /// A raw task of nnU-Net 1 to a raw data set
    V1Dataset {
        /// The task's folder, with imagesTr and labelsTr
        #[arg(value_name = "TASK")]
        source: PathBuf,
        /// Name of the data set, such as Dataset004_Hippocampus
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        common: RawWorkArgs,
    },
}

pub(super) fn run(args: &Args) -> Result<()> {
    output::show_library_warnings();
    // What is made appears whole under its name, or not at all: an interrupt waits for that, and takes it away again.
    progress::catch_interrupts();
    match (&args.dataset, &args.source, &args.target) {
        (Some(kind), _, _) => output::path(&kind.convert()?),
        (None, Some(source), Some(target)) => {
            let mut options = args.model.options();
            options.precision = args.precision.map(Into::into);
            model::convert(source, target, &options)?;
            if progress::interrupted() {
                let failed = |source| Error::Io { path: target.clone(), action: "remove", source };
                std::fs::remove_dir_all(target).map_err(failed)?;
                return Err(Error::Cancelled);
            }
            output::path(target)
        }
        _ => Err(Error::Usage { what: "convert takes a model folder and the folder to create".into() }),
    }
}

impl DatasetKind {
    fn convert(&self) -> Result<PathBuf> {
        let (Self::Msd { source, common, .. } | Self::V1Dataset { source, common, .. }) = self;
        let (device, raw) = (common.device.open()?, common.raw.folder()?);
        let mut bar = Bar::new(&source.display().to_string(), common.shows_progress(), false);
        match self {
            Self::Msd { id, .. } => dataset::convert_msd(source, &raw, *id, &device, &mut bar),
            Self::V1Dataset { name, .. } => dataset::convert_v1(source, &raw, name, &device, &mut bar),
        }
    }
}
