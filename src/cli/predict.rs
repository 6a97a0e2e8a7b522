//! `stunet predict`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::ValueEnum;
use half::f16;
use stunet::nnunet::cases::{self, Case};
use stunet::nnunet::dataset::{Reader, sidecar};
use stunet::nnunet::label_system::LabelSystem;
use stunet::nnunet::lookup::ModelName;
use stunet::nnunet::model::ModelFolder;
use stunet::nnunet::plans::{InferencePlan, Rules};
use stunet::nnunet::predict::{Finished, Sink, Source};
use stunet::nnunet::report::{CaseRecord, FileRecord, ModelRecord, Outcome, RunReport};
use stunet::nnunet::store;
use stunet::preview::{self, PreviewOptions};
use stunet::{Error, Geometry, Image, Mode, PredictOptions, Prediction, Predictor, Progress, Result, Segmentation, io};

use super::args::{DeviceArgs, ModelArgs, PrecisionChoice, bytes, step_size};
use super::folders::ResultsArgs;
use super::label_systems::Numbering;
use super::output::{self, say_error, say_warning};
use super::paths::{check_parent, parent, real};
use super::progress::{self, Bar};
use super::system;

const MODEL: &str = "Model";
const RESULT: &str = "What to compute";
const OUTPUT: &str = "What to write and show";
const COHORT: &str = "Folders of images";

/// Segment an image, or every case of a folder
///
/// Takes models of nnU-Net v1 and v2 as they are, and those that 'stunet convert' writes. A folder of images is in
/// nnU-Net's form: case_0000.nii.gz (.png, .tif), where the digits number the channel. nnU-Net's own spellings of the options
/// (-step_size, --disable_tta, -chk ...) are understood. Not a medical device.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet predict -m models/stunet_base -i ct_0000.nii.gz -o ct_seg.nii.gz
  stunet predict -m model -i t1.nii.gz flair.nii.gz -o seg.nii.gz --no-tta
  stunet predict -m model -i imagesTs -o results --continue --report run.json
  stunet predict -m models/stunet_base -i ct -o amos --label-system amos22
  stunet predict -d 4 -c 3d_fullres -tr STUNetTrainer_base -f 0 -i in -o out
                 (searches the folder that nnUNet_results names)

Exit codes: see 'stunet --help'.")]
pub(super) struct Args {
    /// Model folder or file
    #[arg(short, long, value_name = "MODEL", required_unless_present = "dataset", help_heading = MODEL,
          conflicts_with_all = ["dataset", "configuration"])]
    model: Option<PathBuf>,
    /// Data set number or name, to find the model below $nnUNet_results
    #[arg(short, long, value_name = "DATASET", requires = "configuration", help_heading = MODEL)]
    dataset: Option<String>,
    /// With -d: configuration, such as 3d_fullres
    #[arg(short, long, value_name = "CONFIG", requires = "dataset", help_heading = MODEL)]
    configuration: Option<String>,
    /// With -d: trainer [-tr]
    #[arg(long, value_name = "TRAINER", default_value = "nnUNetTrainer", help_heading = MODEL)]
    trainer: String,
    /// With -d: plans
    #[arg(short, long, value_name = "PLANS", default_value = "nnUNetPlans", help_heading = MODEL)]
    plans: String,
    #[command(flatten)]
    opening: ModelArgs,
    #[command(flatten)]
    results: ResultsArgs,

    /// Image files, one per channel, or a folder of them
    #[arg(short, long, value_name = "FILE|FOLDER", required = true, num_args = 1..)]
    input: Vec<PathBuf>,
    /// Segmentation file, or a folder for CASE.nii.gz; of PNG and TIFF images
    /// with their ending
    #[arg(short, long, value_name = "FILE|FOLDER")]
    output: PathBuf,

    /// Second stage of a cascade: what the first predicted, a file, or a folder of CASE.nii.gz [-prev_stage_predictions]
    #[arg(long, value_name = "FILE|FOLDER")]
    previous_stage: Option<PathBuf>,

    /// Distance of neighbouring windows as a fraction of the window
    #[arg(long, value_name = "0..1", default_value = "0.5", value_parser = step_size, help_heading = RESULT)]
    step_size: f64,
    /// No mirroring at test time: up to eight times faster, a little worse
    #[arg(long, help_heading = RESULT)]
    no_tta: bool,
    /// nnU-Net v1 models: fast and fastest decide on the network's grid
    #[arg(long, value_enum, default_value = "normal", help_heading = RESULT)]
    mode: ModeChoice,
    /// Only kernels as accurate as plain summation; slower
    #[arg(long, help_heading = RESULT)]
    strict: bool,
    /// Weights and activations in memory: bf16 halves what they take, arithmetic stays f32 [default: f32, on a GPU bf16 or
    /// f16]
    #[arg(long, value_enum, help_heading = RESULT)]
    precision: Option<PrecisionChoice>,
    /// Refuse what needs more memory, as in 4GiB [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = RESULT)]
    memory_limit: Option<usize>,

    /// Number of processes that share this folder
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = COHORT)]
    num_parts: usize,
    /// Which of them this is, from 0: every N-th case
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = COHORT)]
    part_id: usize,
    /// Skip cases whose segmentation is there and whole
    #[arg(long = "continue", help_heading = COHORT)]
    resume: bool,

    /// Number the labels as another data set: a name that 'stunet label-systems' lists, or a file of that form
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "save_probabilities", help_heading = OUTPUT)]
    label_system: Option<PathBuf>,
    /// Also write CASE.npz with the class probabilities (large)
    #[arg(long, help_heading = OUTPUT)]
    save_probabilities: bool,
    /// Write a report: hashes, options, seconds, volumes in ml
    #[arg(long, value_name = "FILE.json", help_heading = OUTPUT)]
    report: Option<PathBuf>,
    /// Write a picture (for a folder of images: a folder of pictures)
    #[arg(long, value_name = "FILE.png", help_heading = OUTPUT)]
    preview: Option<PathBuf>,
    /// Print the report instead of the names of written files
    #[arg(long, help_heading = OUTPUT)]
    json: bool,
    /// No progress bar
    #[arg(long, help_heading = OUTPUT)]
    no_progress: bool,
    /// No progress bar and no warnings
    #[arg(short, long, help_heading = OUTPUT)]
    quiet: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ModeChoice {
    Normal,
    Fast,
    Fastest,
}

impl From<ModeChoice> for Mode {
    fn from(m: ModeChoice) -> Self {
        match m {
            ModeChoice::Normal => Mode::Normal,
            ModeChoice::Fast => Mode::Fast,
            ModeChoice::Fastest => Mode::Fastest,
        }
    }
}

/// One case and where its files go.
struct Job {
    case: Case,
    output: PathBuf,
    probabilities: Option<PathBuf>,
    preview: Option<PathBuf>,
}

impl Job {
    /// Every file that the case writes, the segmentation first.
    fn outputs(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.output).chain(&self.probabilities).chain(&self.preview)
    }

    /// Files that some kinds of models and of images come with: what preprocessing did, the spacing of a stack.
    fn beside(&self) -> impl Iterator<Item = PathBuf> {
        let stack =
            self.output.extension().is_some_and(|e| e.eq_ignore_ascii_case("tif") || e.eq_ignore_ascii_case("tiff"));
        let properties = self.probabilities.as_ref().map(|p| p.with_extension("pkl"));
        properties.into_iter().chain(stack.then(|| self.output.with_extension("json")))
    }

    /// Whether nothing is left to do.
    fn is_complete(&self, plan: &InferencePlan) -> bool {
        let properties = self.probabilities.as_ref().filter(|_| plan.rules == Rules::NnunetV2);
        self.case.is_complete(&self.output, plan.reader)
            && self.outputs().all(|p| p.is_file())
            && properties.is_none_or(|p| p.with_extension("pkl").is_file())
    }
}

/// What there is to do.
struct Work {
    jobs: Vec<Job>,
    /// Files of the input folder that belong to no case.
    ignored: Vec<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let Work { jobs, ignored } = args.work()?;
    let mut numbering = Numbering::open(args.label_system.as_deref())?;
    if let Some(first) = jobs.first() {
        let image = first.case.files.first().filter(|_| args.is_cohort()).map(|(_, path)| path.as_path());
        numbering.check_folder(parent(&first.output), image)?;
    }
    args.previous_stage.as_deref().map_or(Ok(()), Numbering::check_previous)?;
    let device = args.device.open()?;
    let model = args.model_path()?;
    let options = args.predict_options();
    progress::catch_interrupts();
    if !args.quiet {
        output::show_library_warnings();
    }
    let precision = args.precision.map_or_else(|| device.precision(), Into::into);
    let opening = args.opening.options().precision(precision);
    let mut predictor = Predictor::open_with(&model, &device, &opening)?.options(options.clone());
    predictor.validate()?;
    args.check_previous_stage(predictor.plan(), &jobs)?;
    numbering.fit(predictor.plan())?;

    let report = if args.report.is_some() || args.json {
        let files = ModelFolder::open(&model, &opening)?.sources;
        let record = ModelRecord::of(&model, &files, predictor.plan())?.precision(precision);
        let mut report = RunReport::new(record, &device, &options);
        report.ignored = ignored.iter().map(|p| p.display().to_string()).collect();
        report.label_system = numbering.system.clone();
        Some(report)
    } else {
        None
    };
    args.create_folders(&jobs)?;
    if args.is_cohort() {
        numbering.describe(&model, &args.output)?;
    }
    let plan = predictor.plan().clone();
    let source = Images { args, jobs: &jobs, plan: &plan };
    let mut results = Results { args, jobs: &jobs, plan: &plan, numbering, report, failed: Vec::new() };
    let mut bar = |i: usize| -> Box<dyn Progress> {
        let title = format!("{}/{} {}", i + 1, jobs.len(), jobs[i].case.name);
        Box::new(Bar::new(&title, !args.no_progress, args.quiet))
    };
    // What ends the run early; the report is written all the same.
    let end = predictor.predict_all(&source, &mut results, &mut bar).err();
    let Results { mut report, failed, .. } = results;
    if let Some(r) = &mut report {
        r.interrupted = matches!(end, Some(Error::Cancelled));
        r.seconds = start.elapsed().as_secs_f64();
        r.peak_process_bytes = system::peak_process_bytes();
        match (args.publish(r), &end) {
            (Err(e), None) => return Err(e),
            (Err(e), Some(_)) => say_error(&e.to_string()),
            (Ok(()), _) => {}
        }
    }
    if let Some(e) = end {
        return Err(e);
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    say_error(&format!("{} of {} cases failed: {}", failed.len(), jobs.len(), failed.join(", ")));
    Ok(ExitCode::from(6))
}

impl Args {
    /// Writes the report to its file and prints it, as asked.
    fn publish(&self, report: &RunReport) -> Result<()> {
        if let Some(path) = &self.report {
            report.write(path)?;
        }
        match &self.report {
            _ if self.json => output::text(&report.to_json()?),
            Some(path) => output::path(path),
            None => Ok(()),
        }
    }

    /// What the stage before predicted of a case, if it was given.
    fn previous_of(&self, case: &Case) -> Option<PathBuf> {
        self.previous_stage.as_ref().map(|p| case.previous(p))
    }

    /// A cascade's second stage has to be told where the predictions of the first are.
    fn check_previous_stage(&self, plan: &InferencePlan, jobs: &[Job]) -> Result<()> {
        let what = match (&plan.previous, &self.previous_stage) {
            (Some(first), None) => format!(
                "the model is the second stage of a cascade: predict with {} first and give what it wrote with \
                 --previous-stage",
                first.configuration
            ),
            (None, Some(path)) => format!("{}: --previous-stage is for cascades, this model is none", path.display()),
            (Some(_), Some(path)) if path.is_dir() != self.is_cohort() => {
                let expected = if self.is_cohort() { "a folder, as the input is one" } else { "a file" };
                format!("{}: --previous-stage has to be {expected}", path.display())
            }
            _ => {
                let missing = jobs.iter().filter_map(|j| self.previous_of(&j.case)).filter(|p| !p.is_file());
                let missing: Vec<PathBuf> = missing.collect();
                let Some(first) = missing.first() else { return Ok(()) };
                let (n, of) = (missing.len(), jobs.len());
                format!("{}: missing, as are {n} of {of} segmentations of the stage before", first.display())
            }
        };
        Err(Error::Usage { what })
    }

    fn is_cohort(&self) -> bool {
        matches!(self.input.as_slice(), [one] if one.is_dir())
    }

    fn model_path(&self) -> Result<PathBuf> {
        if let Some(model) = &self.model {
            return match std::fs::metadata(model) {
                Ok(_) => Ok(model.clone()),
                Err(e) => Err(Error::Model { path: model.clone(), field: "model".into(), what: e.to_string() }),
            };
        }
        let results = self.results.folder()?;
        let name = ModelName {
            dataset: self.dataset.clone().unwrap_or_default(),
            configuration: self.configuration.clone().unwrap_or_default(),
            trainer: self.trainer.clone(),
            plans: self.plans.clone(),
        };
        name.find(&results)
    }

    fn predict_options(&self) -> PredictOptions {
        PredictOptions::default()
            .step_size(self.step_size)
            .mirroring(!self.no_tta)
            .mode(self.mode.into())
            .probabilities(self.save_probabilities)
            .strict(self.strict)
            .memory_limit(self.memory_limit.or_else(available_memory))
    }

    /// What there is to do, checked before anything is loaded.
    fn work(&self) -> Result<Work> {
        for path in &self.input {
            if let Err(e) = std::fs::metadata(path) {
                return Err(Error::Image { path: path.clone(), field: "file".into(), what: e.to_string() });
            }
        }
        let work = if self.is_cohort() {
            self.cohort(&self.input[0])?
        } else {
            Work { jobs: vec![self.single()?], ignored: Vec::new() }
        };
        self.check_outputs(&work.jobs)?;
        if let Some(path) = self.preview.as_ref().filter(|_| !self.is_cohort()) {
            check_parent(path)?;
        }
        if let Some(path) = &self.report {
            let created = [Some(&self.output), self.preview.as_ref()].into_iter().flatten();
            let folder = real(parent(path));
            if !(self.is_cohort() && created.map(|p| real(p)).any(|p| p == folder)) {
                check_parent(path)?;
            }
        }
        Ok(work)
    }

    /// No output may overwrite an input or another output.
    fn check_outputs(&self, jobs: &[Job]) -> Result<()> {
        let of_job = |j: &Job| {
            let images = j.case.paths();
            let sidecars: Vec<PathBuf> = images.iter().map(|p| sidecar(p)).filter(|p| p.is_file()).collect();
            images.into_iter().chain(sidecars).chain(self.previous_of(&j.case))
        };
        let inputs: HashSet<PathBuf> = jobs.iter().flat_map(of_job).map(|p| real(&p)).collect();
        let described = ["plans.json", "dataset.json", LabelSystem::FILE].map(|n| self.output.join(n));
        let described = described.iter().filter(|_| self.is_cohort());
        let mut outputs = HashSet::new();
        let beside: Vec<PathBuf> = jobs.iter().flat_map(Job::beside).collect();
        for path in jobs.iter().flat_map(Job::outputs).chain(&beside).chain(described).chain(&self.report) {
            let real = real(path);
            let complaint = if inputs.contains(&real) {
                "this output is also an input, which it would overwrite"
            } else if !outputs.insert(real) {
                "two outputs have this name, expected one each"
            } else {
                continue;
            };
            return Err(Error::Usage { what: format!("{}: {complaint}", path.display()) });
        }
        Ok(())
    }

    fn cohort(&self, folder: &Path) -> Result<Work> {
        if self.output.is_file() || cases::stem(&self.output).is_some() {
            let what = format!("{}: the input is a folder, so the output has to be one", self.output.display());
            return Err(Error::Usage { what });
        }
        if real(folder) == real(&self.output) {
            let what = format!("{}: the output folder is the input folder", self.output.display());
            return Err(Error::Usage { what });
        }
        if let Some(p) = self.preview.as_ref().filter(|p| p.is_file() || p.extension().is_some_and(|e| e == "png")) {
            let what = format!("{}: for a folder of images --preview names a folder", p.display());
            return Err(Error::Usage { what });
        }
        let found = cases::find(folder)?;
        if !self.quiet {
            for path in &found.ignored {
                say_warning(&format!("{}: not used, expected a name like case_0000.nii.gz", path.display()));
            }
        }
        let jobs = cases::part(found.cases, self.num_parts, self.part_id)?.into_iter().map(|case| {
            let preview = self.preview.as_ref().map(|p| p.join(format!("{}.png", case.name)));
            self.job(case.output(&self.output), preview, case)
        });
        Ok(Work { jobs: jobs.collect(), ignored: found.ignored })
    }

    fn job(&self, output: PathBuf, preview: Option<PathBuf>, case: Case) -> Job {
        let stem = cases::stem(&output).unwrap_or_default();
        let probabilities = self.save_probabilities.then(|| output.with_file_name(format!("{stem}.npz")));
        Job { case, output, probabilities, preview }
    }

    fn single(&self) -> Result<Job> {
        if let Some(folder) = self.input.iter().find(|p| p.is_dir()) {
            let what = format!("{}: a folder among several inputs; give one folder or files", folder.display());
            return Err(Error::Usage { what });
        }
        if (self.num_parts, self.part_id) != (1, 0) {
            return Err(Error::Usage { what: "--num-parts and --part-id need a folder as input".into() });
        }
        let case = Case::from_files(&self.input)?;
        let output = if self.output.is_dir() { case.output(&self.output) } else { self.output.clone() };
        let endings = cases::endings_like(&self.input[0]);
        let writable = output.to_str().is_some_and(|name| endings.iter().any(|e| name.ends_with(e)));
        if !writable || cases::stem(&output).is_none() {
            let endings = endings.join(" or ");
            let what = format!("{}: the output has to end in {endings}, or be a folder", output.display());
            return Err(Error::Usage { what });
        }
        check_parent(&output)?;
        Ok(self.job(output, self.preview.clone(), case))
    }

    fn create_folders(&self, jobs: &[Job]) -> Result<()> {
        let of_previews = self.preview.as_ref().filter(|_| !jobs.is_empty());
        for folder in [Some(&self.output), of_previews].into_iter().flatten().filter(|_| self.is_cohort()) {
            std::fs::create_dir_all(folder).map_err(|e| Error::Io {
                path: folder.clone(),
                action: "create",
                source: e,
            })?;
        }
        Ok(())
    }

    /// Writes a case's files, the segmentation last: where it is, the others are too.
    fn write(&self, job: &Job, image: &Image, prediction: &Prediction, plan: &InferencePlan) -> Result<Vec<PathBuf>> {
        let mut written: Vec<PathBuf> = job.outputs().cloned().collect();
        if let Some(path) = &job.probabilities {
            written.extend(write_probabilities(path, prediction, plan.rules)?);
        }
        if let Some(path) = &job.preview {
            let how = PreviewOptions::default().with_title(&job.case.name);
            preview::render(image, &prediction.segmentation, &how)?.write_png(path)?;
        }
        plan.reader.write(&job.output, &prediction.segmentation)?;
        if plan.reader == Reader::Tiff3dIo {
            written.push(job.output.with_extension("json"));
        }
        Ok(written)
    }
}

/// Where the images are.
struct Images<'a> {
    args: &'a Args,
    jobs: &'a [Job],
    plan: &'a InferencePlan,
}

impl Source for Images<'_> {
    fn cases(&self) -> usize {
        self.jobs.len()
    }

    fn grid(&self, case: usize) -> Result<Option<Geometry>> {
        let job = &self.jobs[case];
        if self.args.resume && job.is_complete(self.plan) {
            return Ok(None);
        }
        job.case.grid(self.plan.reader).map(Some)
    }

    fn read(&self, case: usize) -> Result<Image> {
        self.jobs[case].case.read(self.plan)
    }

    fn previous(&self, case: usize) -> Result<Segmentation> {
        let case = &self.jobs[case].case;
        let path =
            self.args.previous_of(case).ok_or_else(|| Error::Usage { what: "--previous-stage is missing".into() })?;
        case.read_segmentation(&path, self.plan.reader)
    }
}

/// Where the results go, and what is said of them.
struct Results<'a> {
    args: &'a Args,
    jobs: &'a [Job],
    plan: &'a InferencePlan,
    numbering: Numbering,
    report: Option<RunReport>,
    failed: Vec<&'a str>,
}

impl Results<'_> {
    /// Writes a case's files and names them.
    fn write(&self, job: &Job, done: Finished) -> Result<CaseRecord> {
        let Finished { image, mut prediction, .. } = done;
        let begin = Instant::now();
        self.numbering.apply(&mut prediction.segmentation)?;
        let written = self.args.write(job, &image, &prediction, self.plan)?;
        let write = begin.elapsed().as_secs_f64();
        if !self.args.json {
            written.iter().try_for_each(|f| output::path(f))?;
        }
        let mut record = CaseRecord::new(&job.case.name, Outcome::Done);
        if self.report.is_some() {
            prediction.report.seconds.push(("write".into(), write));
            record = record.with(&prediction.segmentation, &prediction.report);
            let inputs = job.case.paths().into_iter().chain(self.args.previous_of(&job.case));
            record.inputs = inputs.map(|f| FileRecord::of(&f)).collect::<Result<_>>()?;
            record.outputs = written.iter().map(|f| FileRecord::of(f)).collect::<Result<_>>()?;
        }
        Ok(record)
    }
}

impl Sink for Results<'_> {
    fn put(&mut self, case: usize, outcome: Result<Option<Finished>>) -> Result<()> {
        let job = &self.jobs[case];
        let name = &job.case.name;
        let record = match outcome {
            Ok(Some(done)) => self.write(job, done),
            Ok(None) => Ok(CaseRecord::new(name, Outcome::Skipped)),
            Err(e) => Err(job.case.name_file(e)),
        };
        let (record, end) = match record {
            Ok(record) => (record, Ok(())),
            Err(e) => {
                let record = CaseRecord::failed(name, &e);
                if self.args.is_cohort() {
                    say_error(&format!("case {name}: {e}"));
                    self.failed.push(name);
                    (record, Ok(()))
                } else {
                    (record, Err(e))
                }
            }
        };
        if let Some(r) = &mut self.report {
            r.cases.push(record);
        }
        end
    }
}

/// nnU-Net's names and types: `softmax` in float16 (v1 `save_segmentation_nifti_from_softmax`), `probabilities` in
/// float32 (v2 `export_prediction_from_logits`). Of a v2 model its ensembles also look for what preprocessing did: the path
/// of that file comes back.
pub(super) fn write_probabilities(path: &Path, prediction: &Prediction, rules: Rules) -> Result<Option<PathBuf>> {
    let Some(p) = &prediction.probabilities else { return Ok(None) };
    let [z, y, x] = p.shape;
    let shape = [p.channels, z, y, x];
    io::write_npz(path, |npz| match rules {
        Rules::NnunetV1 => npz.array("softmax", &shape, |array| {
            let mut half = Vec::new();
            p.values.chunks(1 << 16).try_for_each(|values| {
                half.clear();
                half.extend(values.iter().map(|&v| f16::from_f32(v)));
                array.push(&half)
            })
        }),
        _ => npz.array("probabilities", &shape, |array| array.push(&p.values)),
    })?;
    if rules == Rules::NnunetV1 {
        return Ok(None);
    }
    let properties = path.with_extension("pkl");
    store::write_properties(&properties, &prediction.properties, &prediction.segmentation.geometry)?;
    Ok(Some(properties))
}

/// What the machine has left: more than that is refused too, rather than left to the system's killer of processes.
fn available_memory() -> Option<usize> {
    system::memory_bytes().and_then(|(_, available)| usize::try_from(available).ok())
}
