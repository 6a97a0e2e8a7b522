//! Facts about a model, found without running anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Architecture, ModelFolder, ModelKind, ModelOptions};
use crate::error::Result;
use crate::io::weights;
use crate::nnunet::dataset::Reader;
use crate::nnunet::plans::{Channel, PreviousStage, Rules};
use crate::tensor::{DType, Device, Precision};

/// A class of the segmentation.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ClassReport {
    /// Value in the label map.
    pub label: u16,
    /// Its name.
    pub name: String,
}

/// A file of the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct FileReport {
    /// Where it is.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
    /// Python names that its pickle mentions; none was imported or called.
    pub pickle_globals: Vec<String>,
}

/// What `inspect` reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Inspection {
    /// Whose format.
    pub kind: ModelKind,
    /// Whose rules of preprocessing and export.
    pub rules: Rules,
    /// Data set name.
    pub dataset: String,
    /// Trainer name.
    pub trainer: String,
    /// Configuration name.
    pub configuration: String,
    /// The network.
    pub architecture: Architecture,
    /// Parameters of one fold.
    pub parameters: u64,
    /// Tensors of one fold.
    pub tensors: usize,
    /// Number of tensors per element type in the first fold.
    pub dtypes: BTreeMap<String, usize>,
    /// Multiply-accumulates of the convolutions for one patch.
    pub macs_per_patch: u64,
    /// Floating-point operations for one patch: two per multiply-accumulate.
    pub flops_per_patch: u64,
    /// Input channels with their normalisation.
    pub channels: Vec<Channel>,
    /// How its images are read.
    pub reader: Reader,
    /// Of a cascade's second stage: the first, and which of its labels are input channels, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<PreviousStage>,
    /// Classes, background left out.
    pub classes: Vec<ClassReport>,
    /// Output channels.
    pub heads: usize,
    /// Window in voxels, transposed axes.
    pub patch: [usize; 3],
    /// Spacing in mm, transposed axes; none where the image keeps its own.
    pub spacing_mm: [Option<f64>; 3],
    /// Strides into all stages but the first.
    pub strides: Vec<[usize; 3]>,
    /// Axes that mirroring may flip.
    pub mirror_axes: Vec<usize>,
    /// Fold names.
    pub folds: Vec<String>,
    /// Bytes of one fold's weights as f32.
    pub weight_bytes: u64,
    /// Tensors alive at once at the peak of one patch, as f32, with the working memory of this machine's threads.
    pub activation_bytes: u64,
    /// The files.
    pub files: Vec<FileReport>,
}

/// Opens a model with all its checks and reports what it is.
///
/// # Errors
/// As [`ModelFolder::open`].
pub fn inspect(path: impl AsRef<Path>, options: &ModelOptions) -> Result<Inspection> {
    ModelFolder::open(path, options)?.inspect()
}

impl ModelFolder {
    /// Reports what the model is; reads all its files once for their checksums.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when a file has gone.
    pub fn inspect(&self) -> Result<Inspection> {
        let plan = &self.plan;
        let mut dtypes = BTreeMap::new();
        let mut tensors = 0;
        if let Some(fold) = self.folds.first() {
            tensors = fold.weights.names().len();
            for name in fold.weights.names() {
                let dtype = fold.weights.dtype(name).unwrap_or(DType::F32);
                *dtypes.entry(format!("{dtype:?}").to_lowercase()).or_insert(0) += 1;
            }
        }
        let files = self.sources.iter().map(|path| self.file(path)).collect::<Result<_>>()?;
        let config = self.architecture.config(plan.strides);
        let macs = config.macs(plan.patch);
        let parameters = config.parameter_count();
        Ok(Inspection {
            kind: self.kind,
            rules: plan.rules,
            dataset: plan.dataset.clone(),
            trainer: plan.trainer.clone(),
            configuration: plan.configuration.clone(),
            architecture: self.architecture.clone(),
            parameters,
            tensors,
            dtypes,
            macs_per_patch: macs,
            flops_per_patch: 2 * macs,
            channels: plan.channels.clone(),
            reader: plan.reader,
            previous: plan.previous.clone(),
            classes: plan
                .labels
                .iter()
                .map(|(label, name)| ClassReport { label: *label, name: name.clone() })
                .collect(),
            heads: plan.heads,
            patch: plan.patch,
            spacing_mm: plan.spacing_mm,
            strides: config.strides().to_vec(),
            mirror_axes: plan.mirror_axes.clone(),
            folds: self.folds.iter().map(|f| f.name.clone()).collect(),
            weight_bytes: 4 * parameters,
            activation_bytes: config.activation_bytes(plan.patch, &Device::cpu(), false, Precision::F32) as u64,
            files,
        })
    }

    fn file(&self, path: &Path) -> Result<FileReport> {
        let map = weights::map_file(path)?;
        let globals = self.globals.iter().find(|(p, _)| p == path).map(|(_, g)| g.clone());
        Ok(FileReport {
            path: path.into(),
            bytes: map.len() as u64,
            sha256: weights::sha256(&map),
            pickle_globals: globals.unwrap_or_default(),
        })
    }
}
