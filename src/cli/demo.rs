//! `stunet demo`.

use std::path::PathBuf;
use std::time::Instant;

use stunet::nnunet::report::{CaseRecord, FileRecord, ModelRecord, Outcome, RunReport};
use stunet::phantom::Phantom;
use stunet::preview::{self, PreviewOptions};
use stunet::{Error, PredictOptions, Predictor, Result, demo, io};

use super::args::DeviceArgs;
use super::progress::{self, Bar};
use super::{output, system};

/// Segment a synthetic CT and compare with the truth; needs no file
///
/// Writes ct.nii.gz, truth.nii.gz, segmentation.nii.gz, preview.png, report.json and the model that was used, a tiny
/// STU-Net for these phantoms. It is of no use for patients.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stunet demo
  stunet demo --seed 7 -o seven --device cpu --threads 4")]
pub(super) struct Args {
    /// Folder to write to
    #[arg(short, long, value_name = "FOLDER", default_value = "stunet-demo")]
    output: PathBuf,
    /// Which patient to make up
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// No progress bar
    #[arg(long)]
    no_progress: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let device = args.device.open()?;
    if demo::TRAINED_ON.iter().any(|&(first, last)| (first..=last).contains(&args.seed)) {
        output::say_warning(&format!(
            "the model was trained on seed {}; it shows nothing about new patients",
            args.seed
        ));
    }
    progress::catch_interrupts();
    let folder = &args.output;
    let model = folder.join("model");
    demo::write_model(&model)?;
    let options = PredictOptions::default();
    let mut predictor = Predictor::open(&model, &device)?.options(options.clone());
    let (image, truth) = Phantom::new(args.seed).render();
    let paths = ["ct.nii.gz", "truth.nii.gz", "segmentation.nii.gz", "preview.png"].map(|n| folder.join(n));
    let [ct, reference, segmentation, picture] = &paths;
    io::write_image(ct, &image)?;
    io::write_nifti(reference, &truth)?;

    let mut bar = Bar::new("demo", !args.no_progress, false);
    let prediction = predictor.predict_with(&image, &mut bar)?;
    drop(bar);
    if progress::interrupted() {
        return Err(Error::Cancelled);
    }
    io::write_nifti(segmentation, &prediction.segmentation)?;
    let title = PreviewOptions::default().with_title(format!("synthetic CT, seed {}", args.seed));
    preview::render(&image, &prediction.segmentation, &title)?.write_png(picture)?;

    let model_files = ["model.json", "fold_all.safetensors"].map(|n| model.join(n));
    let mut report = RunReport::new(ModelRecord::of(&model, &model_files, predictor.plan())?, &device, &options);
    let dice = demo::dice_per_label(&truth, &prediction.segmentation)?;
    let mut case = CaseRecord::new("ct", Outcome::Done).with(&prediction.segmentation, &prediction.report);
    case.inputs = vec![FileRecord::of(ct)?];
    case.outputs = paths[2..].iter().map(|p| FileRecord::of(p)).collect::<Result<_>>()?;
    for (label, known) in case.labels.iter_mut().zip(&dice) {
        label.dice = known.dice;
    }
    report.cases.push(case);
    report.seconds = start.elapsed().as_secs_f64();
    report.peak_process_bytes = system::peak_process_bytes();
    let report_path = folder.join("report.json");
    report.write(&report_path)?;

    output::line(format!("{:<14} {:>6} {:>10}", "organ", "Dice", "ml"))?;
    for d in &dice {
        let value = d.dice.map_or("-".into(), |v| format!("{v:.3}"));
        output::line(format!("{:<14} {value:>6} {:>10.1}", d.name, prediction.segmentation.volume_ml(d.label)))?;
    }
    output::line(format!("{:<14} {:>6.3}", "mean", demo::mean_dice(&dice).unwrap_or(0.0)))?;
    let peak = report.peak_process_bytes.map(|b| format!(", peak memory {}", system::human(b))).unwrap_or_default();
    output::line(format!("{:.1} s, {} windows{peak}", report.seconds, prediction.report.tiles))?;
    paths.iter().chain([&report_path]).try_for_each(|p| output::path(p))
}
