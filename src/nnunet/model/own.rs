//! The project's own model folder: `model.json` (plan, architecture, checksums) and one safetensors file per fold.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Architecture, FoldWeights, Folds, ModelFolder, ModelKind, ModelOptions, pick_folds};
use crate::error::{Error, Result};
use crate::io::weights::{Weights, printable};
use crate::nnunet::plans::InferencePlan;

pub(super) const FILE: &str = "model.json";
pub(super) const FORMAT: &str = "stunet-model";
pub(super) const VERSION: u32 = 1;
pub(super) const NOTICE: &str = "Research software. Not a medical device; not for diagnosis.";

/// The contents of `model.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) format: String,
    pub(super) version: u32,
    pub(super) notice: String,
    pub(super) architecture: Architecture,
    pub(super) plan: InferencePlan,
    pub(super) folds: Vec<FoldEntry>,
    pub(super) sources: Vec<SourceEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FoldEntry {
    pub(super) name: String,
    pub(super) file: String,
    pub(super) sha256: String,
}

/// A file that the folder was converted from.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SourceEntry {
    pub(super) file: String,
    pub(super) sha256: String,
}

pub(super) fn open(folder: &Path, options: &ModelOptions) -> Result<ModelFolder> {
    let path = folder.join(FILE);
    let value = crate::nnunet::json::read(&path)?;
    // Told apart before all else, so that a newer version is named and not its first unknown key.
    let root = crate::nnunet::json::Field::root(&path, &value);
    if root.need("format")?.str()? != FORMAT {
        return Err(root.need("format")?.error(format!("expected {FORMAT:?}")));
    }
    let version = root.need("version")?;
    if version.usize(u32::MAX as usize)? != VERSION as usize {
        let what = format!("{} of the model folder {}; version {VERSION} is", version.value, folder.display());
        return Err(Error::unsupported(format!("version {what}")));
    }
    let manifest: Manifest = serde_json::from_value(value.clone())
        .map_err(|e| Error::model(&path, "contents", printable(&e.to_string())))?;
    if options.checkpoint.is_some() {
        let what =
            format!("{}: a model folder of this project has one checkpoint per fold, none to choose", folder.display());
        return Err(Error::usage(what));
    }
    manifest.plan.validate(&path)?;
    let mut found = Vec::new();
    for fold in manifest.folds {
        // Only names that the converter writes: nothing may point out of the folder.
        let stem = fold.file.strip_suffix(".safetensors");
        if !stem.is_some_and(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')) {
            let what = format!("{:?}, expected a name such as \"fold_0.safetensors\"", fold.file);
            return Err(Error::model(&path, "folds.file", what));
        }
        found.push((fold.name.clone(), fold));
    }
    let chosen = match &options.folds {
        Folds::All => found,
        Folds::Named(names) => pick_folds(folder, names, found)?,
    };
    if chosen.is_empty() {
        return Err(Error::model(&path, "folds", "empty, expected at least one"));
    }
    let mut sources = vec![path.clone()];
    let mut folds = Vec::new();
    for (name, entry) in chosen {
        let file = folder.join(&entry.file);
        let weights = Weights::open(&file)?;
        let sha256 = weights.sha256();
        if sha256 != entry.sha256 {
            let what = format!("{sha256}, but model.json says {:.64}: the file was changed or damaged", entry.sha256);
            return Err(Error::model(&file, "sha256", what));
        }
        sources.push(file);
        folds.push(FoldWeights { name, weights });
    }
    let model = super::assemble(manifest.plan, folds, ModelKind::Own, sources, Vec::new())?;
    if model.architecture != manifest.architecture {
        return Err(Error::model(&path, "architecture", format!("expected {:?} by the weights", model.architecture)));
    }
    Ok(model)
}
