//! Which trained model, or which mean of two, is the best in cross-validation (nnU-Net `find_best_configuration`).

mod crossval;
mod instructions;
mod models;

use std::path::{Path, PathBuf};

use crate::base::json::Json;
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::nnunet::dataset::DatasetJson;
use crate::nnunet::evaluate::{CompareOptions, Folders, Summary};
use crate::nnunet::json;
use crate::nnunet::postprocess::{Determined, determine};
use crate::nnunet::split::Fold;
use crate::tensor::Device;
pub use models::{CONFIGURATIONS, Model};

/// True label maps of the training cases, in a data set's folder below `nnUNet_preprocessed`.
const TRUTHS: &str = "gt_segmentations";

/// What is compared, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SelectOptions {
    /// Configurations in the order in which they are compared; one that the plans do not have is left out. `None`: those of
    /// [`CONFIGURATIONS`] that the plans have and that were trained.
    pub configurations: Option<Vec<String>>,
    /// Names of plans.
    pub plans: Vec<String>,
    /// Names of trainers.
    pub trainers: Vec<String>,
    /// Folds whose validations make up the cross-validation.
    pub folds: Vec<Fold>,
    /// Whether means of two models are candidates, too.
    pub ensembling: bool,
    /// Whether what an earlier call left is made anew; else label maps that are there are kept.
    pub overwrite: bool,
    /// Refuse also where one of [`CONFIGURATIONS`] that was not named was not trained.
    pub strict: bool,
    /// Go on where cases that the splits name were not validated.
    pub incomplete: bool,
}

impl Default for SelectOptions {
    /// nnU-Net's: five folds of `nnUNetTrainer` with `nnUNetPlans`.
    fn default() -> Self {
        Self {
            configurations: None,
            plans: vec!["nnUNetPlans".into()],
            trainers: vec!["nnUNetTrainer".into()],
            folds: (0..5).map(Fold::Number).collect(),
            ensembling: true,
            overwrite: true,
            strict: false,
            incomplete: false,
        }
    }
}

/// A model, or the mean of two.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Candidate {
    /// As nnU-Net calls it: `TRAINER__PLANS__CONFIGURATION`, or `ensemble___A___B___FOLDS`.
    pub name: String,
    /// Its models.
    pub models: Vec<Model>,
    /// Where its label maps of all cases are.
    pub folder: PathBuf,
    /// How they compare with the truth.
    pub summary: Summary,
}

/// What [`select`] found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Selected {
    /// Name of the data set, `DatasetNNN_Name`.
    pub dataset: String,
    /// The data set's folder below `nnUNet_results`.
    pub results: PathBuf,
    /// Folds of the cross-validation.
    pub folds: Vec<Fold>,
    /// Whether means were candidates.
    pub ensembling: bool,
    /// All that was compared, models first.
    pub candidates: Vec<Candidate>,
    /// Which of them is the best: the first of those with the largest mean Dice.
    pub best: usize,
    /// Its post-processing.
    pub postprocessing: Determined,
}

/// Compares the models of a data set, whose folders below `nnUNet_results` and `nnUNet_preprocessed` are given, and the means
/// of every two of them, by the predictions that the final validations of their folds left; then determines the
/// post-processing of the best.
///
/// Written are, for a model, `crossval_results_folds_0_1_2_3_4` in its folder with the label maps of all folds, and for two
/// models `ensembles/ensemble___A___B___0_1_2_3_4`, each with `summary.json`; unless `overwrite` is off, what is in these
/// folders is removed first. Nothing is written before all predictions were found. [`Selected::write`] writes the rest.
///
/// Other than nnU-Net, which takes `labelsTr` below `nnUNet_raw` as the truth of models where it is there, and
/// `gt_segmentations` of ensembles, all are compared with `gt_segmentations`.
///
/// # Errors
/// [`Error::Usage`] for options that cannot be; [`Error::Dataset`] naming the model that was not trained, the fold that was
/// not validated, the case that is missing, there twice or without probabilities, and what to do; [`Error::Unsupported`] for
/// label maps of an ending that there is no reader for; those of reading, writing and comparing; [`Error::Cancelled`].
pub fn select(
    results: &Path,
    preprocessed: &Path,
    options: &SelectOptions,
    device: &Device,
    progress: &mut dyn Progress,
) -> Result<Selected> {
    check(options)?;
    let models = models::available(results, preprocessed, options)?;
    let truth = preprocessed.join(TRUTHS);
    let mut work = Work { truth: &truth, options, device, progress };
    let described = models.iter().map(Model::description).collect::<Result<Vec<_>>>()?;
    let cases = crossval::validations(&models, &described, &truth, preprocessed, options)?;
    let pairs = if options.ensembling { pairs(models.len()) } else { Vec::new() };
    let readers = described.iter().zip(&cases).map(|(d, c)| crossval::reader(d, c)).collect::<Result<Vec<_>>>()?;
    for &[i, j] in &pairs {
        crossval::check_pair([&models[i], &models[j]], [&cases[i], &cases[j]], &described[i])?;
    }
    let mut candidates = Vec::new();
    for (((model, dataset), &reader), cases) in models.iter().zip(&described).zip(&readers).zip(&cases) {
        let folder = model.folder.join(format!("crossval_results_folds_{}", joined(&options.folds, "_")));
        work.stage(&format!("collect {}", model.configuration))?;
        crossval::accumulate(model, cases, reader, &folder, options.overwrite, work.progress)?;
        candidates.push(work.candidate(model.name(), vec![model.clone()], folder, dataset)?);
    }
    for [i, j] in pairs {
        let [a, b] = [&models[i], &models[j]];
        let name = format!("ensemble___{}___{}___{}", a.name(), b.name(), joined(&options.folds, "_"));
        let folder = results.join("ensembles").join(&name);
        work.stage(&format!("average {} and {}", a.configuration, b.configuration))?;
        let of_both = [(a, &cases[i]), (b, &cases[j])];
        crossval::average(of_both, (&described[i], readers[i]), &folder, options.overwrite, device, work.progress)?;
        candidates.push(work.candidate(name, vec![a.clone(), b.clone()], folder, &described[i])?);
    }
    let best = first_best(&candidates).ok_or_else(|| {
        let what = "no candidate has a mean Dice: a class is neither in the truth nor in the predictions of any case";
        Error::dataset(&truth, "foreground_mean", what)
    })?;
    let postprocessing = work.postprocessing(&candidates[best])?;
    Ok(Selected {
        dataset: name_of(preprocessed),
        results: results.into(),
        folds: options.folds.clone(),
        ensembling: options.ensembling,
        candidates,
        best,
        postprocessing,
    })
}

fn check(options: &SelectOptions) -> Result<()> {
    for (what, none) in [("trainers", options.trainers.is_empty()), ("plans", options.plans.is_empty())] {
        if none {
            return Err(Error::usage(format!("no {what} were named")));
        }
    }
    let folds = &options.folds;
    if folds.is_empty() {
        return Err(Error::usage("no folds were named"));
    }
    if let Some(fold) = folds.iter().enumerate().find(|(i, f)| folds[..*i].contains(f)).map(|(_, f)| f) {
        return Err(Error::usage(format!("fold {fold} was named twice")));
    }
    if folds.len() > 1 && folds.contains(&Fold::All) {
        return Err(Error::usage("fold all has every case of the others: name it alone, or leave it out"));
    }
    Ok(())
}

/// Every two of `n`, in nnU-Net's order.
fn pairs(n: usize) -> Vec<[usize; 2]> {
    (0..n).flat_map(|i| (i + 1..n).map(move |j| [i, j])).collect()
}

fn joined(folds: &[Fold], between: &str) -> String {
    folds.iter().map(Fold::to_string).collect::<Vec<_>>().join(between)
}

fn name_of(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The first of the largest; those without a mean are none. nnU-Net fails where the first candidate has none.
fn first_best(candidates: &[Candidate]) -> Option<usize> {
    let dice: Vec<f64> = candidates.iter().map(Candidate::dice).collect();
    let largest = dice.iter().copied().filter(|d| !d.is_nan()).reduce(f64::max)?;
    dice.iter().position(|d| *d == largest)
}

struct Work<'a> {
    truth: &'a Path,
    options: &'a SelectOptions,
    device: &'a Device,
    progress: &'a mut dyn Progress,
}

impl Work<'_> {
    fn stage(&mut self, name: &str) -> Result<()> {
        tell(self.progress, Event::Stage(name))
    }

    fn candidate(
        &mut self,
        name: String,
        models: Vec<Model>,
        folder: PathBuf,
        dataset: &DatasetJson,
    ) -> Result<Candidate> {
        let folders = Folders::of_dataset(self.truth, &folder, dataset)?;
        let options = CompareOptions { tolerance_mm: None, incomplete: true };
        let called: Vec<&str> = models.iter().map(|m| m.configuration.as_str()).collect();
        self.stage(&format!("compare {}", called.join(" and ")))?;
        let summary = folders.evaluate(&options, self.device, self.progress)?.summary;
        summary.write(&folder.join("summary.json"))?;
        Ok(Candidate { name, models, folder, summary })
    }

    fn postprocessing(&mut self, best: &Candidate) -> Result<Determined> {
        let dataset = DatasetJson::read(&best.folder.join("dataset.json"))?;
        let folders = Folders::of_dataset(self.truth, &best.folder, &dataset)?;
        let output = best.folder.join("postprocessed");
        if self.options.overwrite {
            crossval::remove(&output)?;
        }
        determine(&folders, &dataset, Some(&output), self.device, self.progress)
    }
}

impl Candidate {
    /// Mean Dice over cases, then over classes.
    #[must_use]
    pub fn dice(&self) -> f64 {
        self.summary.foreground_dice()
    }
}

impl Selected {
    /// The best candidate.
    ///
    /// # Panics
    /// When `best` was set to no candidate.
    #[must_use]
    pub fn best(&self) -> &Candidate {
        &self.candidates[self.best]
    }

    /// Writes `postprocessing.pkl` and `.json` beside the best candidate's label maps, and `inference_information.json` and
    /// `inference_instructions.txt` to the data set's folder below `nnUNet_results`; the files.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self) -> Result<Vec<PathBuf>> {
        let mut written = self.postprocessing.write(&self.best().folder)?;
        let [information, text] =
            ["inference_information.json", "inference_instructions.txt"].map(|name| self.results.join(name));
        json::write(&information, &self.information(), true)?;
        instructions::write(self, &text)?;
        written.extend([information, text]);
        Ok(written)
    }

    /// What to run on new images, for people and shells: the commands of stunet, then those of nnU-Net.
    #[must_use]
    pub fn instructions(&self) -> String {
        instructions::text(self)
    }

    /// nnU-Net's `inference_information.json`.
    fn information(&self) -> Json {
        let best = self.best();
        let text = |path: PathBuf| Json::Text(path.to_string_lossy().into_owned());
        let fold = |fold: &Fold| match fold {
            Fold::All => Json::from("all"),
            Fold::Number(n) => Json::Int(i64::from(*n)),
        };
        let model = |m: &Model, plans: &str| {
            Json::object([
                ("configuration", (&m.configuration).into()),
                ("trainer", (&m.trainer).into()),
                (plans, (&m.plans).into()),
            ])
        };
        let considered = self.candidates.iter().filter_map(|c| match c.models.as_slice() {
            [one] => Some(model(one, "plans")),
            _ => None,
        });
        let chosen = best.models.iter().map(|m| model(m, "plans_identifier"));
        let results = self.candidates.iter().map(|c| (c.name.clone(), Json::Float(c.dice())));
        Json::object([
            ("folds", Json::List(self.folds.iter().map(fold).collect())),
            ("dataset_name_or_id", (&self.dataset).into()),
            ("considered_models", Json::List(considered.collect())),
            ("ensembling_allowed", self.ensembling.into()),
            ("all_results", Json::Object(results.collect())),
            (
                "best_model_or_ensemble",
                Json::object([
                    ("result_on_crossval_pre_pp", best.dice().into()),
                    ("result_on_crossval_post_pp", self.postprocessing.after.foreground_dice().into()),
                    ("postprocessing_file", text(best.folder.join("postprocessing.pkl"))),
                    ("some_plans_file", text(best.folder.join("plans.json"))),
                    ("selected_model_or_models", Json::List(chosen.collect())),
                ]),
            ),
        ])
    }
}
