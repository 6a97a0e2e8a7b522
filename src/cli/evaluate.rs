//! `stunet evaluate`.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use stunet::nnunet::dataset::DatasetJson;
use stunet::nnunet::evaluate::{CompareOptions, Evaluation, Folders, Numbers, surface};
use stunet::nnunet::label_system::{LabelSystem, ModelClasses};
use stunet::{Error, Result};

use super::args::DeviceArgs;
use super::output;
use super::progress::{self, Bar};

/// Compare a folder of predictions with a folder of truths
///
/// Files of the same name belong together. Writes nnU-Net's summary.json, a row for each case and class to a .csv beside it,
/// and a page with pictures of the best, the median and the worst case to a .html.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet evaluate labelsTr results                (results/dataset.json: labels)
  stunet evaluate labelsTr results --dataset-json raw/Dataset004/dataset.json
  stunet evaluate labelsTs results -l 1 2 -il 3 -o scores/summary.json
  stunet evaluate labelsTs results --images imagesTs --tolerance 2
  stunet evaluate amos/labelsVa results --label-system amos22 --numbers stunet")]
pub(super) struct Args {
    /// Folder of true label maps
    #[arg(value_name = "TRUTH")]
    truth: PathBuf,
    /// Folder of predicted label maps
    #[arg(value_name = "PREDICTION")]
    prediction: PathBuf,
    /// Description of the data set, for its labels or regions [-djfile] [default: PREDICTION/dataset.json]
    #[arg(long, value_name = "FILE", conflicts_with = "labels")]
    dataset_json: Option<PathBuf>,
    /// Labels to compare, without a description of the data set
    #[arg(short, long, value_name = "LABEL", num_args = 1..)]
    labels: Vec<u16>,
    /// Leave out voxels of this label of the truth [-il]
    #[arg(long, value_name = "LABEL", requires = "labels")]
    ignore: Option<u16>,
    /// Compare in the labels of another data set, whose numbers truths have: a name that 'stunet label-systems' lists, or a file
    /// of that form
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "labels")]
    label_system: Option<PathBuf>,
    /// With --label-system: whose numbers predictions have [default: the data set's, where 'stunet predict --label-system'
    /// says so in PREDICTION]
    #[arg(long, value_enum, requires = "label_system")]
    numbers: Option<NumbersChoice>,
    /// Summary to write; the other files get its name [default: PREDICTION/summary.json]
    #[arg(short, long, value_name = "FILE.json", value_parser = json_file)]
    output: Option<PathBuf>,
    /// Leave out truths that are not predicted, instead of refusing
    #[arg(long)]
    chill: bool,
    /// Surfaces no further apart than so many mm count as one
    #[arg(long, value_name = "MM", default_value_t = surface::TOLERANCE_MM, value_parser = tolerance)]
    tolerance: f64,
    /// Images named like CASE_0000.nii.gz, to be seen behind the labels
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// Write summary.json only, and compare no surfaces
    #[arg(long, conflicts_with_all = ["tolerance", "images"])]
    summary_only: bool,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NumbersChoice {
    /// The data set's, as 'stunet predict --label-system' writes them
    Dataset,
    /// The model's, as the description of its data set names them
    Model,
    /// Those of STU-Net's published weights
    Stunet,
}

fn tolerance(s: &str) -> Result<f64, String> {
    s.parse().ok().filter(|mm: &f64| mm.is_finite() && *mm >= 0.0).ok_or("expected 0 or more mm".into())
}

fn json_file(s: &str) -> Result<PathBuf, String> {
    if s.ends_with(".json") { Ok(s.into()) } else { Err("expected a name ending in .json".into()) }
}

pub(super) fn run(args: &Args) -> Result<()> {
    let device = args.device.open()?;
    progress::catch_interrupts();
    output::show_library_warnings();
    let folders = args.folders()?;
    let summary = args.output.clone().unwrap_or_else(|| args.prediction.join("summary.json"));
    let mut options = CompareOptions::default();
    options.incomplete = args.chill;
    options.tolerance_mm = (!args.summary_only).then_some(args.tolerance);
    // What is wrong with the folders is told of before the hours it may take to compare them.
    folders.files(args.chill).map_err(|e| match e {
        Error::Dataset { path, field, what } if field == "prediction" => {
            Error::Dataset { path, field, what: format!("{what}; --chill leaves out cases that are not predicted") }
        }
        e => e,
    })?;
    if let Some(images) = &args.images {
        folders.check_images(images, args.chill)?;
    }
    make_folder_of(&summary)?;
    let mut bar = Bar::new("evaluate", !args.no_progress, false);
    let found = folders.evaluate(&options, &device, &mut bar)?;
    drop(bar);
    found.summary.write(&summary)?;
    output::text(&table(&found))?;
    output::path(&summary)?;
    if !args.summary_only {
        let [csv, html] = ["csv", "html"].map(|ending| summary.with_extension(ending));
        found.write_csv(&csv)?;
        output::path(&csv)?;
        let shown = device.install(|| folders.shown(&found, args.images.as_deref()))?;
        found.write_html(&html, &shown)?;
        output::path(&html)?;
    }
    Ok(())
}

impl Args {
    fn folders(&self) -> Result<Folders> {
        if !self.labels.is_empty() {
            return Folders::of_labels(&self.truth, &self.prediction, &self.labels, self.ignore);
        }
        if let Some(system) = &self.label_system {
            let system = LabelSystem::open(system)?;
            let numbers = self.numbers(&system)?;
            return Folders::of_system(&self.truth, &self.prediction, &system, numbers);
        }
        Folders::of_dataset(&self.truth, &self.prediction, &DatasetJson::read(&self.description()?)?)
    }

    /// The file that describes the labels.
    fn description(&self) -> Result<PathBuf> {
        let beside = self.prediction.join("dataset.json");
        match &self.dataset_json {
            Some(file) => Ok(file.clone()),
            None if beside.is_file() => Ok(beside),
            None => {
                let own = self.prediction.join(LabelSystem::FILE);
                let way = match own.is_file() {
                    true => format!("give --label-system {}, by which they were predicted", own.display()),
                    false => "name one with --dataset-json, or labels with -l".into(),
                };
                Err(Error::Usage { what: format!("{}: missing; {way}", beside.display()) })
            }
        }
    }

    /// Whose numbers the predictions have. Nothing is guessed: numbers taken for others would be compared without a sign.
    fn numbers(&self, system: &LabelSystem) -> Result<Numbers> {
        use NumbersChoice::{Dataset, Model, Stunet};
        let usage = |what: String| Err(Error::Usage { what });
        if let (Some(file), None | Some(Dataset | Stunet)) = (&self.dataset_json, self.numbers) {
            return usage(format!("{}: with --label-system --dataset-json needs --numbers model", file.display()));
        }
        let own = self.prediction.join(LabelSystem::FILE);
        match (self.numbers, own.is_file()) {
            (None | Some(Dataset), true) => {
                let written = LabelSystem::read(&own)?;
                if written.has_numbers_of(system) {
                    return Ok(Numbers::Dataset);
                }
                let (found, expected) = (written.name(), system.name());
                usage(format!(
                    "{}: the predictions have the numbers of {found:?}, expected {expected:?}, whose labels are others",
                    own.display()
                ))
            }
            (Some(Model | Stunet), true) => usage(format!(
                "{}: the predictions have a data set's numbers, expected --numbers dataset",
                own.display()
            )),
            (None, false) => {
                let what =
                    "whose numbers the predictions have is not known; expected --numbers model, stunet or dataset";
                usage(format!("{}: {what}", self.prediction.display()))
            }
            (Some(Dataset), false) => Ok(Numbers::Dataset),
            (Some(Stunet), false) => ModelClasses::stunet().map(Numbers::Model),
            (Some(Model), false) => {
                let file = self.description()?;
                let labels = DatasetJson::read(&file)?.labels;
                ModelClasses::of_dataset(&file, &labels).map(Numbers::Model)
            }
        }
    }
}

/// Makes the folder that a file is to be in.
pub(super) fn make_folder_of(file: &Path) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new(""));
    if folder.as_os_str().is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::Io { path: folder.into(), action: "create", source: e })
}

/// A line for each class.
fn table(found: &Evaluation) -> String {
    let number = |v: f64, digits: usize| if v.is_nan() { "-".into() } else { format!("{v:.digits$}") };
    let mut rows = vec![vec!["class".to_owned(), "name".into(), "cases".into(), "Dice".into()]];
    if let Some(mm) = found.tolerance_mm {
        rows[0].extend([format!("surface Dice {mm} mm"), "95 % Hausdorff mm".into()]);
    }
    for ((class, name), m) in found.summary.classes().iter().zip(found.class_names()).zip(found.class_means()) {
        let mut row = vec![class.key.clone(), name.clone(), m.cases.to_string(), number(m.dice, 4)];
        if found.tolerance_mm.is_some() {
            row.extend([number(m.surface_dice, 4), number(m.hausdorff_95_mm, 2)]);
        }
        rows.push(row);
    }
    let mut text = output::columns(&rows);
    text.push_str(&format!("mean Dice {}\n", number(found.summary.foreground_dice(), 4)));
    text
}
