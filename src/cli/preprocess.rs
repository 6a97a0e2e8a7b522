//! `stunet preprocess` and `stunet plan-and-preprocess`.

use stunet::Result;
use stunet::nnunet::dataset::Dataset;
use stunet::nnunet::store::{PreprocessOptions, preprocess_dataset};

use super::args::bytes;
use super::fingerprint::checked;
use super::folders::{Preparation, PreparationArgs};
use super::output;
use super::plan;
use super::progress::{self, Bar};
use super::system;

/// Bring all cases of a data set onto the grids that its plans ask for
///
/// Fills nnUNet_preprocessed/DatasetNNN_Name/CONFIGURATION with what training reads. Cases that are there, made of the same
/// files by the same plan, are kept, so that an interrupted run goes on where it stopped.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet preprocess -d 4
  stunet preprocess -d 4 -c 3d_fullres --memory-limit 16GiB
  stunet preprocess -d 4 -c 3d_fullres --npz    (for nnU-Net to train on)")]
pub(super) struct Args {
    #[command(flatten)]
    preparation: PreparationArgs,
    /// Plans
    #[arg(short, long, value_name = "PLANS", default_value = "nnUNetPlans")]
    plans: String,
    #[command(flatten)]
    cases: CasesArgs,
}

/// Which cases are made, and how.
#[derive(Debug, Clone, Default, clap::Args)]
struct CasesArgs {
    /// Configurations [default: those of 2d, 3d_fullres and 3d_lowres that the plans have]
    #[arg(short, long, value_name = "CONFIG", num_args = 1..)]
    configurations: Vec<String>,
    /// Write CASE.npz and CASE.pkl, which nnU-Net trains on, instead of CASE.safetensors
    #[arg(long)]
    npz: bool,
    /// Remove what is there and begin anew
    #[arg(long)]
    fresh: bool,
    /// No more cases at a time than these bytes hold, as in 16GiB [default: nine tenths of what is free]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    memory_limit: Option<usize>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let work = args.preparation.open()?;
    progress::catch_interrupts();
    output::show_library_warnings();
    work.datasets.iter().try_for_each(|d| args.cases.preprocess(d, &work, &args.plans))
}

impl CasesArgs {
    fn preprocess(&self, dataset: &Dataset, work: &Preparation, plans: &str) -> Result<()> {
        let mut options = PreprocessOptions::default();
        (options.npz, options.fresh) = (self.npz, self.fresh);
        options.memory_limit = self.memory_limit.or_else(most_of_what_is_free);
        let folder = work.preprocessed.join(&dataset.name);
        let mut bar = Bar::new(&dataset.name, work.show, false);
        let done = preprocess_dataset(dataset, &folder, plans, &self.configurations, &options, &work.device, &mut bar)?;
        drop(bar);
        done.iter().try_for_each(|d| {
            let (folder, written, kept) = (d.folder.display(), d.written, d.kept);
            output::line(format!("{folder}: {written} cases written, {kept} kept"))
        })
    }
}

fn most_of_what_is_free() -> Option<usize> {
    system::memory_bytes().and_then(|(_, available)| usize::try_from(available / 10 * 9).ok())
}

/// Fingerprint, plans and preprocessed cases of a data set in one go
///
/// As 'stunet fingerprint', 'stunet plan' and 'stunet preprocess' one after the other; what is there already is kept.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet plan-and-preprocess -d 4
  stunet plan-and-preprocess -d 4 -pl nnUNetPlannerResEncL -c 3d_fullres --verify")]
pub(super) struct PlanArgs {
    #[command(flatten)]
    plan: plan::Args,
    #[command(flatten)]
    cases: CasesArgs,
    /// Look for faults first, as 'stunet verify' does
    #[arg(long)]
    verify: bool,
    /// Make the fingerprint anew where it is already there
    #[arg(long)]
    clean: bool,
    /// Stop after planning
    #[arg(long)]
    no_preprocessing: bool,
}

pub(super) fn run_plan(args: &PlanArgs) -> Result<()> {
    let work = args.plan.preparation.open()?;
    progress::catch_interrupts();
    output::show_library_warnings();
    for dataset in &work.datasets {
        checked(dataset, &work, args.verify, args.clean)?;
        let plans = args.plan.plan(dataset, &work)?;
        if !args.no_preprocessing {
            args.cases.preprocess(dataset, &work, &plans)?;
        }
    }
    Ok(())
}
