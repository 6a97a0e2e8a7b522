//! `stunet convert`.

use std::path::PathBuf;

use stunet::Result;
use stunet::nnunet::model::{self, ModelOptions};

use super::output;

/// Turn a model of nnU-Net v1 or v2 into stunet's own folder
///
/// The new folder holds safetensors and JSON only, with a sha256 for every file. Nothing in the old files is executed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  stunet convert Task101/STUNetTrainer_base__nnUNetPlansv2.1 models/stunet_base")]
pub(super) struct Args {
    /// Model folder of nnU-Net
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Folder to create
    #[arg(value_name = "DST")]
    target: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<()> {
    output::show_library_warnings();
    model::convert(&args.source, &args.target, &ModelOptions::new())?;
    output::path(&args.target)
}
