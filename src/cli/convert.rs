//! `stunet convert`.

use std::path::PathBuf;

use stunet::nnunet::model;
use stunet::{Error, Result};

use super::args::ModelArgs;
use super::{output, progress};

/// Turn a model of nnU-Net v1 or v2 into stunet's own folder
///
/// The new folder holds safetensors and JSON only, with a sha256 for every file. Nothing in the old files is executed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet convert Task101/STUNetTrainer_base__nnUNetPlansv2.1 models/stunet_base
  stunet convert Dataset004/T__nnUNetPlans__3d_fullres models/liver -f 0 1")]
pub(super) struct Args {
    /// Model folder of nnU-Net
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Folder to create
    #[arg(value_name = "DST")]
    target: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    output::show_library_warnings();
    // The folder appears whole under its name, or not at all: an interrupt waits for that, and takes it away again.
    progress::catch_interrupts();
    model::convert(&args.source, &args.target, &args.model.options())?;
    if progress::interrupted() {
        let failed = |source| Error::Io { path: args.target.clone(), action: "remove", source };
        std::fs::remove_dir_all(&args.target).map_err(failed)?;
        return Err(Error::Cancelled);
    }
    output::path(&args.target)
}
