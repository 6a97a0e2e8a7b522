//! `stunet plan`.

use stunet::Result;
use stunet::nnunet::dataset::Dataset;
use stunet::nnunet::fingerprint::{self, Fingerprint};
use stunet::nnunet::planner::{self, Configuration, PlanOptions, Planner};

use super::fingerprint::extract;
use super::folders::{Preparation, PreparationArgs};
use super::output;
use super::progress;

const CHANGES: &str = "Changes to the plans";

/// Plan configurations for a data set: spacings, patches, batches, networks
///
/// Writes the plans file that nnU-Net would write, and the fingerprint where there is none yet, to the folder of
/// preprocessed data.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet plan -d 4
  stunet plan -d 4 -pl nnUNetPlannerResEncL --gpu-memory-target 16 --overwrite-plans-name ResEnc16")]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) preparation: PreparationArgs,
    /// nnU-Net's planner: ExperimentPlanner, ResEncUNetPlanner, nnUNetPlannerResEncM, -L or -XL [-pl]
    #[arg(long, value_name = "PLANNER", default_value = "ExperimentPlanner", value_parser = planner)]
    planner: Planner,
    /// Memory of the GPU to plan for, in GB [default: the planner's]
    #[arg(long, value_name = "GB", help_heading = CHANGES)]
    gpu_memory_target: Option<f64>,
    /// Spacing of 3d_fullres in mm along z, y and x
    #[arg(long, value_name = "MM", num_args = 3, help_heading = CHANGES)]
    overwrite_target_spacing: Option<Vec<f64>>,
    /// Name of the plans, so that the usual ones stay [default: the planner's]
    #[arg(long, value_name = "NAME", help_heading = CHANGES)]
    overwrite_plans_name: Option<String>,
    /// Keep the order of the axes
    #[arg(long, help_heading = CHANGES)]
    suppress_transpose: bool,
}

fn planner(s: &str) -> Result<Planner, String> {
    s.parse().map_err(|e: stunet::Error| e.to_string())
}

pub(super) fn run(args: &Args) -> Result<()> {
    let work = args.preparation.open()?;
    progress::catch_interrupts();
    output::show_library_warnings();
    work.datasets.iter().try_for_each(|d| args.plan(d, &work).map(drop))
}

impl Args {
    /// Plans a data set, with its fingerprint where there is none; gives the plans' name.
    pub(super) fn plan(&self, dataset: &Dataset, work: &Preparation) -> Result<String> {
        let options = PlanOptions {
            gpu_memory_gb: self.gpu_memory_target,
            target_spacing_mm: self.overwrite_target_spacing.as_deref().and_then(|s| s.try_into().ok()),
            plans_name: self.overwrite_plans_name.clone(),
            suppress_transpose: self.suppress_transpose,
        };
        let folder = work.preprocessed.join(&dataset.name);
        let path = folder.join(fingerprint::FILE);
        let fingerprint = if path.is_file() { Fingerprint::read(&path)? } else { extract(dataset, work)? };
        let plans = planner::plan(&dataset.json, &dataset.name, dataset.reader, &fingerprint, self.planner, &options)?;
        planner::copy_descriptions(dataset, &folder)?;
        let path = plans.write(&folder)?;
        output::text(&table(&plans.configurations))?;
        output::path(&path)?;
        Ok(plans.name)
    }
}

/// A line for each configuration.
fn table(configurations: &[Configuration]) -> String {
    let crosses = |sizes: &[usize]| sizes.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    let spacing = |mm: &[f64]| mm.iter().map(|s| format!("{s:.3}")).collect::<Vec<_>>().join("x");
    let mut rows =
        vec![["configuration", "patch", "batch", "spacing (mm)", "stages", "pooled"].map(String::from).to_vec()];
    rows.extend(configurations.iter().map(|c| {
        let axes = c.patch.len();
        let pooled: Vec<usize> = (0..axes).map(|a| c.strides.iter().map(|s| s[a]).product()).collect();
        let (patch, stages) = (crosses(&c.patch), c.strides.len().to_string());
        vec![c.name.clone(), patch, c.batch_size.to_string(), spacing(&c.spacing_mm), stages, crosses(&pooled)]
    }));
    output::columns(&rows)
}
