//! Floor 8: one file per subcommand; parse, one call of the library, print.
//!
//! Standard output carries results only; progress, warnings and errors go to standard error.

mod args;
mod bench;
mod compat;
mod completions;
mod convert;
mod demo;
mod ensemble;
mod evaluate;
mod fingerprint;
mod folders;
mod info;
mod inspect;
mod label_systems;
mod output;
mod paths;
mod phantoms;
mod plan;
mod postprocess;
mod predict;
mod preprocess;
mod progress;
mod select;
mod share;
mod system;
mod train;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use stunet::{Error, Result};

use output::say_error;

const EXIT_CODES: &str = "\
Exit codes:
  0  success               4  bad or unsupported model
  1  failure while running 5  device not usable, or not enough memory
  2  wrong usage           6  some cases of a folder failed
  3  bad image or data set 130  interrupted

Research software. Not a medical device; not for diagnosis.";

const EXAMPLES: &str = "\
Examples:
  stunet demo
  stunet predict -m models/stunet_base -i ct_0000.nii.gz -o ct_seg.nii.gz
  stunet predict -m models/stunet_base -i imagesTs -o results --report run.json
  stunet convert Task101/STUNetTrainer_base__nnUNetPlansv2.1 models/stunet_base";

/// 3D medical image segmentation with STU-Net and nnU-Net models.
///
/// Reads models of nnU-Net v1, nnU-Net v2 and its own form; needs no Python. Research software: not a medical device,
/// not for diagnosis.
#[derive(Debug, Parser)]
#[command(name = "stunet", version, max_term_width = 80, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Predict(Box<predict::Args>),
    Verify(verify::Args),
    Fingerprint(fingerprint::Args),
    Plan(plan::Args),
    Preprocess(preprocess::Args),
    PlanAndPreprocess(preprocess::PlanArgs),
    Train(Box<train::Args>),
    Evaluate(evaluate::Args),
    Postprocess(postprocess::Args),
    Ensemble(ensemble::Args),
    Select(select::Args),
    Phantoms(phantoms::Args),
    Demo(demo::Args),
    Convert(convert::Args),
    Export(share::ExportArgs),
    Import(share::ImportArgs),
    Inspect(inspect::Args),
    LabelSystems(label_systems::Args),
    Info(info::Args),
    Bench(bench::Args),
    Completions(completions::Args),
}

/// Parses the process's arguments, runs, and says how it ended.
pub(crate) fn main() -> ExitCode {
    let result = compat::rewrite(std::env::args_os()).and_then(|(argv, warnings)| {
        let cli = match parse(argv)? {
            Parsed::Run(cli) => cli,
            Parsed::Text(text) => return output::text(&text).map(|()| ExitCode::SUCCESS),
        };
        warnings.iter().for_each(|w| output::say_warning(w));
        run(*cli)
    });
    result.unwrap_or_else(|e| {
        say_error(&e.to_string());
        ExitCode::from(e.exit_code())
    })
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Predict(a) => return predict::run(&a),
        Command::Verify(a) => return verify::run(&a),
        Command::Fingerprint(a) => fingerprint::run(&a)?,
        Command::Plan(a) => plan::run(&a)?,
        Command::Preprocess(a) => preprocess::run(&a)?,
        Command::PlanAndPreprocess(a) => preprocess::run_plan(&a)?,
        Command::Train(a) => train::run(&a)?,
        Command::Evaluate(a) => evaluate::run(&a)?,
        Command::Postprocess(a) => postprocess::run(&a)?,
        Command::Ensemble(a) => ensemble::run(&a)?,
        Command::Select(a) => select::run(&a)?,
        Command::Phantoms(a) => phantoms::run(&a)?,
        Command::Demo(a) => demo::run(&a)?,
        Command::Convert(a) => convert::run(&a)?,
        Command::Export(a) => share::export(&a)?,
        Command::Import(a) => share::import(&a)?,
        Command::Inspect(a) => inspect::run(&a)?,
        Command::LabelSystems(a) => label_systems::run(&a)?,
        Command::Info(a) => info::run(&a)?,
        Command::Bench(a) => bench::run(&a)?,
        Command::Completions(a) => completions::run(&a)?,
    }
    Ok(ExitCode::SUCCESS)
}

enum Parsed {
    Run(Box<Cli>),
    /// Help or version.
    Text(String),
}

/// Arguments to a command; clap's many-line complaint becomes one line.
fn parse(argv: Vec<OsString>) -> Result<Parsed> {
    let e = match Cli::try_parse_from(argv) {
        Ok(cli) => return Ok(Parsed::Run(Box::new(cli))),
        Err(e) => e,
    };
    let text = e.render().to_string();
    match e.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Ok(Parsed::Text(text)),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            Err(Error::Usage { what: "no command was given; see 'stunet --help'".into() })
        }
        _ => Err(Error::Usage { what: one_line(&text) }),
    }
}

/// The complaint and the tip of clap's message, without the usage that follows.
fn one_line(text: &str) -> String {
    let join = |paragraph: &str| paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut paragraphs = text.split("\n\n");
    let first = join(paragraphs.next().unwrap_or_default());
    let complaint = first.strip_prefix("error: ").unwrap_or(&first);
    let tip = paragraphs.map(join).find(|p| p.starts_with("tip: ")).map(|t| format!(" ({t})")).unwrap_or_default();
    format!("{complaint}{tip}")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn complaints_fit_one_line() {
        for argv in [&["stunet", "predict"][..], &["stunet", "predict", "--dvice", "cpu"], &["stunet", "nonsense"]] {
            let argv = argv.iter().map(Into::into).collect();
            let Err(e) = parse(argv) else { panic!("accepted") };
            assert!(!e.to_string().contains('\n') && e.exit_code() == 2, "{e}");
        }
    }
}
