//! `stunet inspect`.

use std::path::PathBuf;

use stunet::Result;
use stunet::nnunet::model;

use super::args::ModelArgs;
use super::output;

/// Show what is in a model: architecture, classes, memory, pickle globals
///
/// Nothing in the model's files is executed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet inspect models/stunet_base
  stunet inspect models/stunet_base --json -f 0")]
pub(super) struct Args {
    /// Model folder or file
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: ModelArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    output::show_library_warnings();
    let found = model::inspect(&args.model, &args.options.options())?;
    let value = serde_json::to_value(&found)
        .map_err(|e| stunet::Error::Unsupported { what: format!("showing this model as JSON: {e}") })?;
    if args.json { output::line(format!("{value:#}")) } else { output::table(&value) }
}
