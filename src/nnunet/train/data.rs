//! The cases of a fold: what a training reads, and what it is validated on in the end.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::Start;
use super::options::TrainOptions;
use super::plan::TrainingPlan;
use super::{Data, Trainer, fold_folder, stage_folder};
use crate::base::progress::{Event, Progress, tell};
use crate::error::{Error, Result};
use crate::io::weights::{map_file, sha256};
use crate::nnunet::cases::endings;
use crate::nnunet::evaluate::{Class, Summary, compare};
use crate::nnunet::loader::{Loader, LoaderConfig, Oversampling};
use crate::nnunet::model::{Folds, ModelOptions};
use crate::nnunet::predict::{PredictOptions, Prediction, Predictor};
use crate::nnunet::split::{self, Fold, Split};
use crate::nnunet::store::{self, Stored};
use crate::nnunet::training_case::TrainingCase;
use crate::tensor::Device;

/// One fold of one configuration of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The data set's folder below `nnUNet_preprocessed`.
    pub preprocessed: PathBuf,
    /// The data set's folder below `nnUNet_results`.
    pub results: PathBuf,
    /// Name of the plans, "nnUNetPlans".
    pub plans: String,
    /// "3d_fullres" ...
    pub configuration: String,
    /// Which cases validate.
    pub fold: Fold,
}

/// Turns the seed of training into another one for validation.
const VALIDATION: u64 = 0x9E37_79B9_7F4A_7C15;

impl Task {
    /// What the plans say, with the options' sizes.
    ///
    /// # Errors
    /// Those of [`TrainingPlan::read`] and [`TrainingPlan::with_sizes`].
    pub fn plan(&self, options: &TrainOptions) -> Result<TrainingPlan> {
        let path = self.preprocessed.join(format!("{}.json", self.plans));
        TrainingPlan::read(&path, &self.configuration)?.with_sizes(options.patch, options.batch)
    }

    /// Where the training writes.
    ///
    /// # Errors
    /// Those of [`Task::plan`].
    pub fn folder(&self, options: &TrainOptions) -> Result<PathBuf> {
        Ok(fold_folder(&self.results, &self.plan(options)?, options, &self.fold.to_string()))
    }

    /// The cases, of which those that `needed` picks have to be there of a stage before, too.
    fn open(
        &self,
        plan: &TrainingPlan,
        options: &TrainOptions,
        needed: fn(&Split) -> BTreeSet<&String>,
    ) -> Result<(Stored, Split)> {
        let mut stored = store::open(&self.preprocessed.join(&plan.data_identifier))?;
        let split = split::fold(&self.preprocessed, stored.identifiers(), self.fold)?;
        if let Some(first) = &plan.previous {
            let folder = stage_folder(&self.results, plan, options, first, &plan.configuration);
            let needed = needed(&split);
            let missing: Vec<&&String> =
                needed.iter().filter(|id| store::previous_files(&folder, id).is_empty()).collect();
            if let Some(case) = missing.first() {
                return Err(Error::usage(format!(
                    "{}: {case} is missing ({} of {} cases are), which the final validation of {first} predicts: train all \
                     its folds with the same trainer and plans first",
                    folder.display(),
                    missing.len(),
                    needed.len(),
                )));
            }
            stored = stored.with_previous_stage(&folder, plan.previous_labels());
        }
        Ok((stored, split))
    }

    /// Begins the training, or goes on with it.
    ///
    /// # Errors
    /// Those of [`Task::plan`], [`split::fold`], [`store::open`], of its cases and of [`Trainer::new`].
    pub fn trainer(&self, options: &TrainOptions, start: Start, device: &Device) -> Result<Trainer> {
        let mut plan = self.plan(options)?;
        options.validate()?;
        // Before cases are opened: a network that cannot be is told from the plans alone.
        plan.network(options.network)?;
        options.augmentation_on(&plan, device)?;
        let (stored, split) = self.open(&plan, options, |split| split.train.iter().chain(&split.val).collect())?;
        plan.previous_digest = self.previous_digest(&plan, options, &split)?;
        let open = |names: &[String]| -> Result<Vec<Arc<dyn TrainingCase>>> {
            names.iter().map(|id| stored.case(id).map(Arc::from)).collect()
        };
        let oversampling = match options.probabilistic {
            true => Oversampling::Probability(options.oversample),
            false => Oversampling::LastOfBatch(options.oversample),
        };
        let base = LoaderConfig {
            previous: plan.previous_labels().to_vec(),
            ..LoaderConfig::validation(plan.patch, plan.batch)
        };
        let train = LoaderConfig {
            iterations: options.iterations,
            oversampling,
            seed: options.seed,
            raw: options.augment_on_device,
            augment: options.augmentation(&plan)?,
            workers: options.workers,
            ahead: options.workers + 2,
            ..base.clone()
        };
        let val = LoaderConfig {
            iterations: options.val_iterations.max(1),
            oversampling,
            seed: options.seed ^ VALIDATION,
            ..base
        };
        let data = Data {
            train: Box::new(Loader::new(open(&split.train)?, train)?),
            val: Box::new(Loader::new(open(&split.val)?, val)?),
            cases: split.train,
        };
        let folder = fold_folder(&self.results, &plan, options, &self.fold.to_string());
        Trainer::new(plan, options.clone(), start, &folder, &self.fold.to_string(), data, device)
    }

    /// Why the fold's cases cannot be predicted in the end, if they cannot: known before the first step.
    ///
    /// # Errors
    /// Those of [`Task::plan`].
    pub fn no_validation(&self, options: &TrainOptions) -> Result<Option<String>> {
        let ending = self.plan(options)?.file_ending().to_string();
        let known = endings().collect::<Vec<_>>();
        let what = || format!("predictions of {ending} images are not there, those of {} are", known.join(", "));
        Ok((!known.contains(&ending.as_str())).then(what))
    }

    /// Predicts the fold's validation cases with the checkpoint `checkpoint` ("checkpoint_final.pth"), writes them to
    /// `validation/` in the fold's folder and what [`compare`] finds to `summary.json` there, and what the next stages of a
    /// cascade take as input to `predicted_next_stage/` (nnU-Net's `perform_actual_validation`). Every prediction is shown to
    /// `done`, which may write more of it.
    ///
    /// # Errors
    /// Those of [`Task::plan`] and of the predictor; [`Error::Usage`] when a case's true segmentation is missing;
    /// [`Error::Cancelled`]; [`Error::Io`].
    pub fn validate(
        &self,
        options: &TrainOptions,
        checkpoint: &str,
        predict: PredictOptions,
        device: &Device,
        progress: &mut dyn Progress,
        done: &mut dyn FnMut(&Path, &Prediction) -> Result<()>,
    ) -> Result<Summary> {
        let plan = self.plan(options)?;
        let folder = fold_folder(&self.results, &plan, options, &self.fold.to_string());
        let model = folder.parent().unwrap_or(&folder);
        let (stored, split) = self.open(&plan, options, |split| split.val.iter().collect())?;
        let stages = self.stages(&plan, options)?;
        let opening = ModelOptions::new()
            .folds(Folds::Named(vec![self.fold.to_string()]))
            .checkpoint(checkpoint)
            .precision(options.precision);
        let mut predictor = Predictor::open_with(model, device, &opening)?.options(predict);
        let (backward, reader) = (predictor.plan().transpose_backward, predictor.plan().reader);
        let out = folder.join("validation");
        std::fs::create_dir_all(&out).map_err(|e| Error::io("create", &out, e))?;
        let mut summary = Summary::new(Class::of(&plan.labels));
        for (i, id) in split.val.iter().enumerate() {
            tell(progress, Event::Cases { done: i, total: split.val.len() })?;
            let case = stored.image(id, backward)?;
            let geometry = stored.properties(id, backward)?.geometry;
            let named = |e: Error| match e {
                Error::Input { what } => Error::usage(format!("case {id}: {what}")),
                Error::Shape { op, what } => Error::shape(op, format!("case {id}: {what}")),
                e => e,
            };
            let mut next = Vec::new();
            for stage in &stages {
                match stage.cases.shape(id) {
                    Ok(shape) => next.push((stage, shape)),
                    Err(e) => tracing::warn!("case {id} is not predicted for {}: {e}", stage.name),
                }
            }
            let shapes: Vec<[usize; 3]> = next.iter().map(|(_, shape)| *shape).collect();
            let (prediction, labels) = predictor.predict_stages(case, geometry, &shapes, progress).map_err(named)?;
            for ((stage, _), labels) in next.into_iter().zip(&labels) {
                stage.cases.write_previous_stage(&stage.folder, id, labels)?;
            }
            let path = out.join(format!("{id}{}", plan.file_ending()));
            reader.write(&path, &prediction.segmentation)?;
            done(&path, &prediction)?;
            let truth_path = self.truth(id, plan.file_ending())?;
            let truth = reader.label(&truth_path)?;
            let found =
                compare(&truth, &prediction.segmentation, summary.classes(), plan.labels.ignore()).map_err(named)?;
            summary.add(&truth_path, &path, found);
        }
        summary.write(&out.join("summary.json"))?;
        Ok(summary)
    }

    /// The configurations that take what this one predicts as input, as far as their cases are preprocessed.
    fn stages(&self, plan: &TrainingPlan, options: &TrainOptions) -> Result<Vec<NextStage>> {
        let mut out = Vec::new();
        for name in &plan.next {
            let next = TrainingPlan::read(&plan.path, name)?;
            let cases = self.preprocessed.join(&next.data_identifier);
            let cases = match store::open(&cases) {
                Ok(cases) => cases,
                // As nnU-Net: the segmentations are worth having without it.
                Err(e) => {
                    tracing::warn!("nothing is predicted for {name}: {e}");
                    continue;
                }
            };
            let folder = stage_folder(&self.results, plan, options, &plan.configuration, name);
            std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
            out.push(NextStage { name: name.clone(), cases, folder });
        }
        Ok(out)
    }

    /// SHA-256 of what the stage before predicted of the cases that are trained on and validated with.
    fn previous_digest(&self, plan: &TrainingPlan, options: &TrainOptions, split: &Split) -> Result<Option<String>> {
        let Some(first) = &plan.previous else { return Ok(None) };
        let folder = stage_folder(&self.results, plan, options, first, &plan.configuration);
        let cases: BTreeSet<&String> = split.train.iter().chain(&split.val).collect();
        let mut all = String::new();
        for path in cases.iter().flat_map(|id| store::previous_files(&folder, id)) {
            all += &format!("{} {}\n", path.file_name().unwrap_or_default().display(), sha256(&map_file(&path)?));
        }
        Ok(Some(sha256(all.as_bytes())))
    }

    /// The true segmentation of a case.
    fn truth(&self, id: &str, ending: &str) -> Result<PathBuf> {
        let folder = self.preprocessed.join("gt_segmentations");
        let names = [ending, ".nii.gz", ".nii"].map(|ending| folder.join(format!("{id}{ending}")));
        let found = names.iter().find(|p| p.is_file()).cloned();
        found.ok_or_else(|| {
            let path = names[0].display();
            Error::usage(format!(
                "{path}: missing, expected the case's true segmentation; preprocess the data set again"
            ))
        })
    }
}

/// A configuration that takes what another predicts as input.
struct NextStage {
    name: String,
    /// Its preprocessed cases, on whose grids it takes labels.
    cases: Stored,
    /// Where it looks for them.
    folder: PathBuf,
}
