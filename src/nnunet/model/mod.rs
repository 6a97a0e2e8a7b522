//! Trained models on disk: folders of nnU-Net v2 and v1, and the project's own, opened as one and the same thing.
//!
//! | kind | a folder with | or a file |
//! |---|---|---|
//! | nnU-Net v2 | `plans.json`, `dataset.json`, `fold_k/checkpoint_final.pth` | a `.pth` in such a folder |
//! | nnU-Net v1 | `fold_k/NAME.model` with `NAME.model.pkl` | a `.model` with its `.model.pkl` |
//! | own | `model.json`, `fold_k.safetensors` | |

mod architecture;
pub mod archive;
mod convert;
mod inspect;
mod own;
mod unet;
mod v1;
mod v2;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::io::weights::Weights;
use crate::nn::ParamSource;
use crate::nnunet::plans::InferencePlan;
use crate::tensor::Precision;

pub use architecture::Architecture;
pub use convert::convert;
pub use inspect::{ClassReport, FileReport, Inspection, inspect};
pub(in crate::nnunet) use v1::stunet_labels;
pub(in crate::nnunet) use v2::resolve as resolve_configuration;
pub(in crate::nnunet) use v2::{next_names, patch_size, pools, previous_name};
pub use v2::{planned_architecture, preprocess_plan};

const V1_CHECKPOINT: &str = "model_final_checkpoint";
const V2_CHECKPOINT: &str = "checkpoint_final.pth";

/// Which folds of a cross-validation to use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Folds {
    /// Every numbered fold there is; where there is none, the fold "all".
    #[default]
    All,
    /// The named folds, in this order: "0", "1" ... or "all".
    Named(Vec<String>),
}

/// What to open of a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ModelOptions {
    /// Which folds.
    pub folds: Folds,
    /// Name of the checkpoint file, with or without its ending. By default `checkpoint_final.pth` (v2), or
    /// `model_final_checkpoint.model` (v1) and, where that is absent, the only `.model` file of the fold. The own folder
    /// has no choice of checkpoints.
    pub checkpoint: Option<String>,
    /// How the networks' filters and activations are stored. No matter to who only looks at the model.
    /// `None`: as the device does best, see [`crate::Device::precision`].
    pub precision: Option<Precision>,
}

impl ModelOptions {
    /// All folds, the default checkpoint, filters as they are.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With these folds.
    #[must_use]
    pub fn folds(mut self, folds: Folds) -> Self {
        self.folds = folds;
        self
    }

    /// With this checkpoint name.
    #[must_use]
    pub fn checkpoint(mut self, name: impl Into<String>) -> Self {
        self.checkpoint = Some(name.into());
        self
    }

    /// With filters and activations stored in this precision.
    #[must_use]
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = Some(precision);
        self
    }
}

/// Whose format a model folder has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ModelKind {
    /// nnU-Net 1.7.
    NnunetV1,
    /// nnU-Net 2.
    NnunetV2,
    /// This project's own: JSON and safetensors.
    Own,
}

/// The weights of one fold.
#[derive(Debug)]
#[non_exhaustive]
pub struct FoldWeights {
    /// "0", "1" ... or "all".
    pub name: String,
    /// Its tensors.
    pub weights: Weights,
}

/// A trained model, opened: plan, architecture and the mapped weights of its folds, all checked against each other.
#[derive(Debug)]
#[non_exhaustive]
pub struct ModelFolder {
    /// What inference needs besides weights.
    pub plan: InferencePlan,
    /// The network, the same for all folds.
    pub architecture: Architecture,
    /// The folds, at least one.
    pub folds: Vec<FoldWeights>,
    /// Whose format it was.
    pub kind: ModelKind,
    /// Every file that was read, the weights last.
    pub sources: Vec<PathBuf>,
    /// Python names that each pickle among the sources mentions.
    pub(crate) globals: Vec<(PathBuf, Vec<String>)>,
}

impl ModelFolder {
    /// Opens a model folder, or a checkpoint file inside one.
    ///
    /// # Errors
    /// [`Error::Usage`] when a wanted fold or checkpoint is absent, [`Error::Model`] naming file and field when the path
    /// is no model, or something is missing, damaged or does not fit, [`Error::Unsupported`] for other networks and
    /// configurations.
    pub fn open(path: impl AsRef<Path>, options: &ModelOptions) -> Result<Self> {
        Self::open_any(path.as_ref(), options).map_err(|e| match e {
            // A model with a hole in it is a bad model, whatever layer met the hole.
            Error::Io { path, source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Error::model(&path, "file", "missing")
            }
            e => e,
        })
    }

    fn open_any(path: &Path, options: &ModelOptions) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
        if meta.is_file() {
            return open_file(path, options);
        }
        if path.join(own::FILE).is_file() {
            return own::open(path, options);
        }
        if path.join("plans.json").is_file() {
            let folds = v2_checkpoints(path, options)?;
            return open_v2(path, folds);
        }
        let folds = v1_checkpoints(path, options)?;
        if folds.is_empty() {
            let what = "no model.json (own folder), no plans.json (nnU-Net v2), no fold_*/*.model (nnU-Net v1)";
            return Err(Error::model(path, "folder", format!("not a model: {what}")));
        }
        open_v1(Some(path), folds)
    }
}

/// Weights are a source of parameters for the layers of a network.
impl ParamSource for Weights {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shape(name).map(<[usize]>::to_vec)
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        self.values(name)
    }

    fn error(&self, name: &str, what: String) -> Error {
        Error::model(self.path(), name, what)
    }
}

/// A fold's name and its checkpoint file.
type Checkpoint = (String, PathBuf);

fn open_file(path: &Path, options: &ModelOptions) -> Result<ModelFolder> {
    let fold_folder = path.parent().unwrap_or(Path::new(""));
    // The name of a relative folder such as "." is only known once resolved.
    let resolved = fold_folder.canonicalize().unwrap_or_else(|_| fold_folder.into());
    let fold = resolved.file_name().and_then(|n| fold_name(n.to_str()?)).unwrap_or_else(|| "0".into());
    // A file is one fold and one checkpoint: another choice contradicts it.
    if let Folds::Named(names) = &options.folds {
        pick_folds(path, names, vec![(fold.clone(), ())])?;
    }
    if let Some(wanted) = &options.checkpoint
        && ![path.file_name(), path.file_stem()].contains(&Some(wanted.as_ref()))
    {
        return Err(Error::usage(format!("{}: not the checkpoint {wanted:?} that is asked for", path.display())));
    }
    let folds = vec![(fold, path.to_path_buf())];
    match path.extension().and_then(|e| e.to_str()) {
        Some("model") => open_v1(resolved.parent(), folds),
        Some("pth") => match resolved.parent().filter(|p| p.join("plans.json").is_file()) {
            Some(folder) => open_v2(folder, folds),
            None => {
                let what = "a checkpoint of nnU-Net v2 needs plans.json and dataset.json in the folder above its fold";
                Err(Error::model(path, "file", what))
            }
        },
        _ => Err(Error::model(path, "file", "not a model: expected a model folder, a .pth or a .model file")),
    }
}

fn open_v2(folder: &Path, checkpoints: Vec<Checkpoint>) -> Result<ModelFolder> {
    let mut sources = vec![folder.join("plans.json"), folder.join("dataset.json")];
    let mut info: Option<v2::CheckpointInfo> = None;
    let mut folds = Vec::new();
    let mut globals = Vec::new();
    for (name, path) in checkpoints {
        let (weights, pickle) = Weights::open_checkpoint(&path)?;
        let found = v2::CheckpointInfo::read(&path, pickle.as_ref())?;
        if let Some(first) = info.as_ref().filter(|i| !i.same_model(&found)) {
            let what = format!("{found:?} differs from {first:?} of the first fold");
            return Err(Error::model(&path, "init_args", what));
        }
        info.get_or_insert(found);
        globals.push((path.clone(), weights.globals().to_vec()));
        sources.push(path);
        folds.push(FoldWeights { name, weights });
    }
    let Some(info) = info else { return Err(no_folds(folder)) };
    let plan = v2::plan(folder, &info)?;
    let model = assemble(plan, folds, ModelKind::NnunetV2, sources, globals)?;
    // Trainers of STU-Net build it whatever the plans say.
    if let Architecture::Unet(found) = &model.architecture {
        v2::check_architecture(folder, &info, found)?;
    }
    Ok(model)
}

fn open_v1(folder: Option<&Path>, checkpoints: Vec<Checkpoint>) -> Result<ModelFolder> {
    let mut sources = Vec::new();
    let mut globals = Vec::new();
    let mut info: Option<(PathBuf, v1::Info)> = None;
    let mut folds = Vec::new();
    for (name, path) in checkpoints {
        let pkl = v1::info_file(&path);
        if info.is_none() {
            // nnU-Net v1 takes the plans of the first fold for all.
            let found = v1::Info::read(&pkl, folder)?;
            globals.push((pkl.clone(), found.pickle.globals.clone()));
            sources.push(pkl.clone());
            info = Some((pkl, found));
        }
        let weights = Weights::open(&path)?;
        globals.push((path.clone(), weights.globals().to_vec()));
        sources.push(path);
        folds.push(FoldWeights { name, weights });
    }
    let Some((pkl, info)) = info else { return Err(no_folds(folder.unwrap_or(Path::new("")))) };
    let model = assemble(info.plan.clone(), folds, ModelKind::NnunetV1, sources, globals)?;
    // Trainers of STU-Net build it whatever the plans say.
    if let Architecture::Unet(found) = &model.architecture {
        info.check(&pkl, found)?;
    }
    Ok(model)
}

/// Checks every fold against the plan and the first fold's architecture.
fn assemble(
    plan: InferencePlan,
    folds: Vec<FoldWeights>,
    kind: ModelKind,
    sources: Vec<PathBuf>,
    globals: Vec<(PathBuf, Vec<String>)>,
) -> Result<ModelFolder> {
    let Some((first, others)) = folds.split_first() else { return Err(no_folds(Path::new(""))) };
    let architecture = Architecture::infer(&first.weights)?;
    architecture.check_plan(&plan, &first.weights)?;
    for fold in others {
        architecture.check(&fold.weights)?;
    }
    Ok(ModelFolder { plan, architecture, folds, kind, sources, globals })
}

fn no_folds(folder: &Path) -> Error {
    Error::usage(format!("{}: no fold to open", folder.display()))
}

/// "0" of "fold_0", "all" of "fold_all" and of "all".
fn fold_name(folder: &str) -> Option<String> {
    let name = folder.strip_prefix("fold_").unwrap_or(folder);
    (name == "all" || (name.len() < folder.len() && is_number(name))).then(|| name.to_string())
}

fn is_number(s: &str) -> bool {
    !s.is_empty() && s.len() < 6 && s.bytes().all(|b| b.is_ascii_digit())
}

/// The fold folders to open: those asked for, or all numbered ones, or "all".
fn fold_folders(model: &Path, options: &ModelOptions) -> Result<Vec<Checkpoint>> {
    let io = |e| Error::io("read", model, e);
    let mut found: Vec<Checkpoint> = Vec::new();
    for entry in std::fs::read_dir(model).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_str().and_then(fold_name);
        if let Some(name) = name.filter(|_| entry.path().is_dir()) {
            found.push((name, entry.path()));
        }
    }
    // By number, "all" last; "all" before "fold_all", should both exist.
    found.sort_by_key(|(name, path)| (name.parse().unwrap_or(u32::MAX), path.clone()));
    found.dedup_by(|a, b| a.0 == b.0);
    match &options.folds {
        Folds::All => {
            let numbered: Vec<Checkpoint> = found.iter().filter(|(n, _)| n != "all").cloned().collect();
            Ok(if numbered.is_empty() { found } else { numbered })
        }
        Folds::Named(names) => pick_folds(model, names, found),
    }
}

/// The named ones of `found`, in the order asked for.
fn pick_folds<T>(model: &Path, names: &[String], found: Vec<(String, T)>) -> Result<Vec<(String, T)>> {
    let known: Vec<String> = found.iter().map(|(n, _)| n.clone()).collect();
    let mut found: Vec<Option<(String, T)>> = found.into_iter().map(Some).collect();
    if names.is_empty() {
        return Err(Error::usage("no fold named, expected at least one"));
    }
    names
        .iter()
        .map(|name| {
            let wanted = name.strip_prefix("fold_").unwrap_or(name);
            let slot = known.iter().position(|k| k == wanted);
            slot.and_then(|i| found[i].take()).ok_or_else(|| {
                let model = model.display();
                Error::usage(format!("fold {name:?} of {model}: absent or named twice, there are {known:?}"))
            })
        })
        .collect()
}

fn v2_checkpoints(model: &Path, options: &ModelOptions) -> Result<Vec<Checkpoint>> {
    let mut file = plain_name(options.checkpoint.as_deref().unwrap_or(V2_CHECKPOINT))?.to_string();
    if Path::new(&file).extension().is_none() {
        file.push_str(".pth");
    }
    let mut folds = Vec::new();
    let folders = fold_folders(model, options)?;
    for (name, folder) in &folders {
        let path = folder.join(&file);
        if path.is_file() {
            folds.push((name.clone(), path));
        } else if options.folds != Folds::All {
            return Err(Error::usage(format!("{}: missing; see --checkpoint", path.display())));
        }
    }
    if folds.is_empty() && options.checkpoint.is_none() {
        let what = format!("no fold_*/{file} in {} fold folders; see --checkpoint", folders.len());
        return Err(Error::model(model, "folder", what));
    }
    if folds.is_empty() {
        let (model, n) = (model.display(), folders.len());
        return Err(Error::usage(format!("{model}: no fold_*/{file} in {n} fold folders; see --checkpoint")));
    }
    Ok(folds)
}

fn v1_checkpoints(model: &Path, options: &ModelOptions) -> Result<Vec<Checkpoint>> {
    let mut folds = Vec::new();
    for (name, folder) in fold_folders(model, options)? {
        let path = match &options.checkpoint {
            Some(wanted) => {
                let stem = plain_name(wanted)?;
                Some(folder.join(format!("{}.model", stem.strip_suffix(".model").unwrap_or(stem))))
                    .filter(|p| p.is_file())
            }
            None => default_v1(&folder)?,
        };
        match path {
            Some(path) => folds.push((name, path)),
            None if options.folds == Folds::All => {}
            None => {
                let file = options.checkpoint.as_deref().unwrap_or(V1_CHECKPOINT);
                let what = format!("{}: no checkpoint {file}.model; see --checkpoint", folder.display());
                return Err(Error::usage(what));
            }
        }
    }
    if let (true, Some(file)) = (folds.is_empty(), &options.checkpoint) {
        return Err(Error::usage(format!("{}: no fold_*/{file}; see --checkpoint", model.display())));
    }
    Ok(folds)
}

/// `model_final_checkpoint.model`, or the only one there is: the published STU-Nets have names of their own.
fn default_v1(folder: &Path) -> Result<Option<PathBuf>> {
    let usual = folder.join(format!("{V1_CHECKPOINT}.model"));
    if usual.is_file() {
        return Ok(Some(usual));
    }
    let io = |e| Error::io("read", folder, e);
    let mut models = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == "model") && path.is_file() {
            models.push(path);
        }
    }
    models.sort();
    if models.len() > 1 {
        let names: Vec<_> = models.iter().filter_map(|m| m.file_stem()?.to_str()).collect();
        let folder = folder.display();
        return Err(Error::usage(format!("{folder}: several checkpoints, choose one with --checkpoint: {names:?}")));
    }
    Ok(models.pop())
}

/// A file name that stays in its folder.
fn plain_name(name: &str) -> Result<&str> {
    if name.is_empty() || name.contains(['/', '\\']) || name == ".." {
        return Err(Error::usage(format!("checkpoint {name:?}: expected a file name without a folder")));
    }
    Ok(name)
}

/// STU-Net's rule for plans with more or fewer than five poolings: the first five, padded with strides of one.
pub(in crate::nnunet) fn cut_strides(pools: impl Iterator<Item = Result<[usize; 3]>>) -> Result<[[usize; 3]; 5]> {
    let mut strides = [[1; 3]; 5];
    for (stride, pool) in strides.iter_mut().zip(pools) {
        *stride = pool?;
    }
    Ok(strides)
}
