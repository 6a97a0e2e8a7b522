//! `stunet inspect`.

use std::path::PathBuf;

use stunet::Result;
use stunet::nnunet::model::{self, ModelOptions};

use super::output;

/// Show what is in a model: architecture, classes, memory, pickle globals
///
/// Nothing in the model's files is executed.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Model folder or file
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    output::show_library_warnings();
    let found = model::inspect(&args.model, &ModelOptions::new())?;
    let value = serde_json::to_value(&found)
        .map_err(|e| stunet::Error::Unsupported { what: format!("showing this model as JSON: {e}") })?;
    if args.json { output::line(format!("{value:#}")) } else { output::table(&value) }
}
