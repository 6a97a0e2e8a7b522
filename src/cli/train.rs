//! `stunet train`.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use stunet::nnunet::cases;
use stunet::nnunet::checkpoint::Logs;
use stunet::nnunet::evaluate::Summary;
use stunet::nnunet::lookup;
use stunet::nnunet::plans::Rules;
use stunet::nnunet::split::Fold;
use stunet::nnunet::train::{NetworkChoice, Recompute, Start, Task, TrainOptions};
use stunet::preview::curves::{self, Course};
use stunet::{Device, Error, Precision, PredictOptions, Prediction, Result};

use super::args::{DeviceArgs, PrecisionChoice};
use super::folders::{PreprocessedArgs, ResultsArgs};
use super::output::{self, say};
use super::predict;
use super::progress::{self, Bar};

const WHAT: &str = "What to train";
const HOW: &str = "How to train";
const RUN: &str = "Runs";

/// Train a network on a preprocessed data set
///
/// Trains by nnU-Net's and STU-Net's rules and writes nnU-Net's results folder: checkpoints that nnU-Net reads, too, a log,
/// progress.png, and at the end validation/summary.json. Ctrl-C and SIGTERM save what is done; --continue goes on from
/// there with the same numbers as if nothing had happened. Not a medical device.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "\
stunet train -d <DATASET> -c <CONFIG> -f <FOLD> [OPTIONS]
       stunet train <DATASET> <CONFIG> <FOLD> [OPTIONS]",
    after_help = "\
Examples:
  stunet train -d 4 -c 3d_fullres -f 0 --network stunet-base
  stunet train -d 4 -c 3d_fullres -f 0 --network stunet-base --pretrained base_ep4k.model
  stunet train -d 4 -c 3d_fullres -f 0 --network stunet-base --continue
  stunet train 4 3d_fullres all -tr nnUNetTrainer_250epochs

Exit codes: see 'stunet --help'."
)]
pub(super) struct Args {
    /// The same as -d, -c and -f, as nnUNetv2_train takes them
    #[arg(value_names = ["DATASET", "CONFIG", "FOLD"], num_args = 3, conflicts_with_all = ["dataset", "configuration", "fold"])]
    positional: Vec<String>,
    /// Data set: a number such as 4, or a name such as Dataset004_Hippocampus
    #[arg(short, long, value_name = "DATASET", help_heading = WHAT, required_unless_present = "positional")]
    dataset: Option<String>,
    /// Configuration, such as 3d_fullres
    #[arg(short, long, value_name = "CONFIG", help_heading = WHAT, required_unless_present = "positional")]
    configuration: Option<String>,
    /// Fold that validates: 0 to 4, or all to train on everything
    #[arg(short, long, value_name = "FOLD", help_heading = WHAT, required_unless_present = "positional")]
    fold: Option<String>,
    /// Network [default: what --trainer is for, else the plans' own]
    #[arg(long, value_enum, help_heading = WHAT)]
    network: Option<NetworkName>,
    /// Trainer, as nnU-Net names them: nnUNetTrainer_250epochs, STUNetTrainer_base_ft ... [-tr]
    #[arg(long, value_name = "TRAINER", help_heading = WHAT)]
    trainer: Option<String>,
    /// Plans [default: nnUNetPlans; for resenc-* their own]
    #[arg(short, long, value_name = "PLANS", help_heading = WHAT)]
    plans: Option<String>,
    /// Checkpoint or model folder to begin with: all its weights but the heads [-pretrained_weights]; with --continue it only
    /// says that this is a fine-tuning
    #[arg(long, value_name = "FILE", help_heading = WHAT)]
    pretrained: Option<PathBuf>,

    /// Epochs [default: 1000]
    #[arg(long, value_name = "N", help_heading = HOW)]
    epochs: Option<u32>,
    /// Steps of an epoch
    #[arg(long, value_name = "N", default_value_t = 250, help_heading = HOW)]
    iterations: u32,
    /// Batches that an epoch is validated on
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = HOW)]
    val_iterations: u32,
    /// Learning rate of the first epoch [default: 0.01, with --pretrained 0.001]
    #[arg(long, value_name = "RATE", help_heading = HOW)]
    lr: Option<f64>,
    /// Patches of a step [default: as planned]
    #[arg(long, value_name = "N", help_heading = HOW)]
    batch: Option<usize>,
    /// Voxels z y x of a patch [default: as planned]
    #[arg(long, value_name = "N", num_args = 2..=3, help_heading = HOW)]
    patch: Option<Vec<usize>>,
    /// All random numbers follow from it
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = HOW)]
    seed: u64,
    /// Activations in memory, on a GPU also filters as they are computed with and gradients of activations; weights and sums
    /// are f32; f16 on a GPU scales the loss [default: f32, on a GPU bf16, before Ampere f16]
    #[arg(long, value_enum, help_heading = HOW)]
    precision: Option<PrecisionChoice>,
    /// Left is not right: neither mirror patches nor, later, images
    #[arg(long, help_heading = HOW)]
    no_mirroring: bool,
    /// Keep less for the way back and compute it twice: when a step does not fit otherwise (auto; with --continue as before),
    /// always, or never [without a value: always]
    #[arg(
        long,
        value_enum,
        value_name = "WHEN",
        num_args = 0..=1,
        require_equals = true,
        default_value = "auto",
        default_missing_value = "always",
        help_heading = HOW
    )]
    recompute: RecomputeChoice,
    /// Augment patches on the GPU instead of the processor: for few cores beside a fast card
    #[arg(long, help_heading = HOW)]
    augment_on_device: bool,
    /// Only kernels as accurate as plain summation; slower
    #[arg(long, help_heading = HOW)]
    strict: bool,
    /// Threads that prepare batches
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = HOW)]
    workers: usize,

    /// Go on with the last checkpoint [--c]
    #[arg(long = "continue", help_heading = RUN, conflicts_with = "overwrite")]
    resume: bool,
    /// Begin again where a training is already
    #[arg(long, help_heading = RUN)]
    overwrite: bool,
    /// Only the final validation, with the final checkpoint
    #[arg(long, help_heading = RUN, conflicts_with_all = ["resume", "overwrite", "no_val"])]
    val: bool,
    /// The final validation with the best checkpoint instead
    #[arg(long, help_heading = RUN, conflicts_with = "no_val")]
    val_best: bool,
    /// No final validation
    #[arg(long, help_heading = RUN)]
    no_val: bool,
    /// Write class probabilities of the final validation, too (large)
    #[arg(long, help_heading = RUN)]
    npz: bool,
    /// Epochs between checkpoints
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = RUN)]
    save_every: u32,
    /// No progress bar
    #[arg(long, help_heading = RUN)]
    no_progress: bool,
    /// No progress bar, no log lines and no warnings
    #[arg(short, long, help_heading = RUN)]
    quiet: bool,

    #[command(flatten)]
    preprocessed: PreprocessedArgs,
    #[command(flatten)]
    results: ResultsArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// When stages run again on the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RecomputeChoice {
    Auto,
    Always,
    Never,
}

impl From<RecomputeChoice> for Recompute {
    fn from(c: RecomputeChoice) -> Self {
        match c {
            RecomputeChoice::Auto => Recompute::Auto,
            RecomputeChoice::Always => Recompute::Always,
            RecomputeChoice::Never => Recompute::Never,
        }
    }
}

/// Networks by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NetworkName {
    /// 1.1 million parameters
    StunetTiny,
    /// 14.6 million
    StunetSmall,
    /// 58 million
    StunetBase,
    /// 440 million
    StunetLarge,
    /// 1457 million
    StunetHuge,
    /// The plans' network, with nnUNetPlans
    Plain,
    /// With nnUNetResEncUNetMPlans
    ResencM,
    /// With nnUNetResEncUNetLPlans
    ResencL,
    /// With nnUNetResEncUNetXLPlans
    ResencXl,
}

impl NetworkName {
    fn choice(self) -> NetworkChoice {
        match self {
            NetworkName::StunetTiny => NetworkChoice::StuNetTiny,
            NetworkName::StunetSmall => NetworkChoice::StuNetSmall,
            NetworkName::StunetBase => NetworkChoice::StuNetBase,
            NetworkName::StunetLarge => NetworkChoice::StuNetLarge,
            NetworkName::StunetHuge => NetworkChoice::StuNetHuge,
            NetworkName::Plain | NetworkName::ResencM | NetworkName::ResencL | NetworkName::ResencXl => {
                NetworkChoice::Planned
            }
        }
    }

    fn plans(self) -> &'static str {
        match self {
            NetworkName::ResencM => "nnUNetResEncUNetMPlans",
            NetworkName::ResencL => "nnUNetResEncUNetLPlans",
            NetworkName::ResencXl => "nnUNetResEncUNetXLPlans",
            _ => "nnUNetPlans",
        }
    }
}

/// Name of the final checkpoint, and of the best.
const FINAL: &str = "checkpoint_final.pth";
const BEST: &str = "checkpoint_best.pth";

pub(super) fn run(args: &Args) -> Result<()> {
    let (task, mut options) = (args.task()?, args.options()?);
    let device = args.device.open()?;
    options.precision = match (args.precision, device.precision()) {
        (Some(wanted), _) => wanted.into(),
        // Strict passes round nothing.
        (None, own) if !args.strict => own,
        (None, _) => Precision::F32,
    };
    progress::catch_interrupts();
    if !args.quiet {
        output::show_library_warnings();
    }
    if !args.val {
        args.train(&task, &options, &device)?;
        let checkpoint = task.folder(&options)?.join(FINAL);
        output::path(&checkpoint)?;
    }
    if args.no_val {
        return Ok(());
    }
    if let Some(why) = task.no_validation(&options)? {
        output::say_warning(&format!("no final validation: {why}"));
        return Ok(());
    }
    let summary = args.validate(&task, &options, &device)?;
    output::path(&task.folder(&options)?.join("validation").join("summary.json"))?;
    for (class, dice) in summary.dice() {
        output::line(format!("{class:<12} Dice {dice:.4}"))?;
    }
    output::line(format!("{:<12} Dice {:.4}", "mean", summary.foreground_dice()))
}

impl Args {
    fn task(&self) -> Result<Task> {
        let one = |option: &Option<String>, place: usize| {
            option.clone().or_else(|| self.positional.get(place).cloned()).unwrap_or_default()
        };
        let preprocessed = lookup::dataset_folder(&self.preprocessed.folder()?, &one(&self.dataset, 0))?;
        let name = preprocessed.file_name().unwrap_or_default();
        let fold: Fold = one(&self.fold, 2).parse()?;
        let plans = self.network.map_or("nnUNetPlans", NetworkName::plans);
        Ok(Task {
            results: self.results.folder()?.join(name),
            plans: self.plans.clone().unwrap_or_else(|| plans.into()),
            configuration: one(&self.configuration, 1),
            fold,
            preprocessed,
        })
    }

    fn options(&self) -> Result<TrainOptions> {
        let mut options = match &self.trainer {
            Some(name) => TrainOptions::of_trainer(name)?,
            None => TrainOptions::new(),
        };
        if let Some(network) = self.network {
            if self.trainer.is_some() && network.choice() != options.network {
                let what = "--trainer stands for another network than --network: give one of them";
                return Err(Error::Usage { what: what.into() });
            }
            options.network = network.choice();
        }
        options.pretrained.clone_from(&self.pretrained);
        options.epochs = self.epochs.or(options.epochs);
        options.iterations = self.iterations;
        options.val_iterations = self.val_iterations;
        options.learning_rate = self.lr.or(options.learning_rate);
        options.batch = self.batch;
        options.patch = self.patch.as_deref().map(|p| match *p {
            [y, x] => [1, y, x],
            _ => [p[0], p[1], p[2]],
        });
        options.seed = self.seed;
        if self.no_mirroring {
            options.mirror_axes = Some(Vec::new());
        }
        options.recompute = self.recompute.into();
        options.augment_on_device = self.augment_on_device;
        options.strict = self.strict;
        options.workers = self.workers;
        options.save_every = self.save_every;
        Ok(options)
    }

    fn train(&self, task: &Task, options: &TrainOptions, device: &Device) -> Result<()> {
        let start = match (self.resume, self.overwrite) {
            (true, _) => Start::Continue,
            (_, true) => Start::Afresh,
            _ => Start::New,
        };
        let mut trainer = task.trainer(options, start, device)?;
        if !self.quiet {
            trainer.summary().iter().for_each(|line| say(line));
        }
        let mut bar = Bar::new("training", !self.no_progress, self.quiet);
        trainer.run(&mut bar, &mut |trainer, report| {
            if !self.quiet {
                say(&format!("epoch {}: {}", report.epoch, report.lines().join(", ")));
            }
            picture(&trainer.state().logs, &trainer.folder().join("progress.png"))
        })
    }

    fn validate(&self, task: &Task, options: &TrainOptions, device: &Device) -> Result<Summary> {
        let checkpoint = if self.val_best { BEST } else { FINAL };
        let mut bar = Bar::new("validation", !self.no_progress, self.quiet);
        let predict = PredictOptions::default().probabilities(self.npz);
        let mut keep = |path: &Path, prediction: &Prediction| {
            predict::write_probabilities(&path.with_file_name(npz_name(path)), prediction, Rules::NnunetV2).map(drop)
        };
        task.validate(options, checkpoint, predict, device, &mut bar, &mut keep)
    }
}

/// `CASE.npz` beside the segmentation `CASE.nii.gz`.
fn npz_name(path: &Path) -> String {
    format!("{}.npz", cases::stem(path).unwrap_or_default())
}

/// Draws `progress.png`.
fn picture(logs: &Logs, path: &Path) -> Result<()> {
    let list = |v: &[stunet::nnunet::checkpoint::Logged]| v.iter().map(|v| v.0).collect::<Vec<f64>>();
    let ends = list(&logs.epoch_end_timestamps);
    let seconds: Vec<f64> = ends.iter().zip(list(&logs.epoch_start_timestamps)).map(|(e, s)| e - s).collect();
    let [train, val, mean, ema, rates] =
        [&logs.train_losses, &logs.val_losses, &logs.mean_fg_dice, &logs.ema_fg_dice, &logs.lrs].map(|v| list(v));
    let course = Course {
        train_losses: &train,
        val_losses: &val,
        mean_dice: &mean,
        ema_dice: &ema,
        seconds: &seconds,
        learning_rates: &rates,
    };
    curves::training(&course).write_png(path)
}
