//! What a run did, for a machine to read: inputs, model and outputs with their sha256, options, times, volumes.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::label_system::LabelSystem;
use super::plans::InferencePlan;
use super::predict::{PredictOptions, Report};
use crate::error::{Error, Result};
use crate::io::Segmentation;
use crate::io::atomic::write_atomically;
use crate::tensor::{Device, Precision};

/// Stands in every report.
pub const NOTICE: &str = "Research use only. Not a medical device; not for diagnosis.";

/// The form of the report; a change that breaks readers gets a new number.
pub const SCHEMA: &str = "stunet-report/1";

/// A file and the hash of its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FileRecord {
    /// Where it is.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Lower-case hexadecimal sha256.
    pub sha256: String,
}

impl FileRecord {
    /// Reads the whole file once.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read.
    pub fn of(path: &Path) -> Result<Self> {
        let read = |e| Error::io("read", path, e);
        let mut file = File::open(path).map_err(read)?;
        let (mut hash, mut block) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut block).map_err(read)? {
                0 => break,
                n => hash.update(&block[..n]),
            }
        }
        let sha256 = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(Self { path: path.into(), sha256 })
    }
}

/// Size of one label in one segmentation.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LabelRecord {
    /// Value in the file.
    pub value: u16,
    /// What the model, or the label system, calls it.
    pub name: String,
    /// Voxels that carry it.
    pub voxels: usize,
    /// Their volume in millilitres.
    pub volume_ml: f64,
    /// Dice coefficient against a truth, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dice: Option<f64>,
}

/// The volume of every label of `segmentation`, in the order of its names, absent ones included.
#[must_use]
pub fn volumes(segmentation: &Segmentation) -> Vec<LabelRecord> {
    let mut voxels = vec![0; 1 << 16];
    for label in segmentation.labels.iter() {
        voxels[usize::from(label)] += 1;
    }
    let ml = segmentation.geometry.voxel_mm3() / 1000.0;
    let record = |(value, name): &(u16, String)| {
        let voxels = voxels[usize::from(*value)];
        LabelRecord { value: *value, name: name.clone(), voxels, volume_ml: voxels as f64 * ml, dice: None }
    };
    segmentation.names.iter().map(record).collect()
}

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// Segmented and written.
    Done,
    /// A complete result was there already.
    Skipped,
    /// See the error.
    Failed,
}

/// One case of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CaseRecord {
    /// The case's name.
    pub case: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed, in one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Image files, one per channel; hashed when the case was done.
    pub inputs: Vec<FileRecord>,
    /// Segmentation first, then other files.
    pub outputs: Vec<FileRecord>,
    /// Voxels along (z, y, x).
    pub shape: Option<[usize; 3]>,
    /// Voxel distance in mm along (z, y, x).
    pub spacing_mm: Option<[f64; 3]>,
    /// Volumes by label.
    pub labels: Vec<LabelRecord>,
    /// Windows that ran through the network, mirrored passes and folds included.
    pub tiles: usize,
    /// Shape on the network's grid, (z, y, x).
    pub network_shape: Option<[usize; 3]>,
    /// Wall-clock seconds by stage.
    pub seconds: serde_json::Map<String, serde_json::Value>,
    /// Most bytes that tensors held at once.
    pub peak_tensor_bytes: usize,
}

impl CaseRecord {
    /// A case of which nothing but the outcome is known yet.
    #[must_use]
    pub fn new(case: impl Into<String>, outcome: Outcome) -> Self {
        Self {
            case: case.into(),
            outcome,
            error: None,
            inputs: Vec::new(),
            outputs: Vec::new(),
            shape: None,
            spacing_mm: None,
            labels: Vec::new(),
            tiles: 0,
            network_shape: None,
            seconds: serde_json::Map::new(),
            peak_tensor_bytes: 0,
        }
    }

    /// A case that failed with `error`.
    #[must_use]
    pub fn failed(case: impl Into<String>, error: &Error) -> Self {
        Self { error: Some(error.to_string()), ..Self::new(case, Outcome::Failed) }
    }

    /// Adds what a prediction found out.
    #[must_use]
    pub fn with(mut self, segmentation: &Segmentation, report: &Report) -> Self {
        self.shape = Some(segmentation.geometry.shape);
        self.spacing_mm = Some(segmentation.geometry.spacing_mm);
        self.labels = volumes(segmentation);
        self.tiles = report.tiles;
        self.network_shape = Some(report.network_shape);
        self.seconds = report.seconds.iter().map(|(stage, s)| (stage.clone(), (*s).into())).collect();
        self.peak_tensor_bytes = report.peak_tensor_bytes;
        self
    }
}

/// The model of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ModelRecord {
    /// Folder or file that was opened.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Every file of it with its hash.
    pub files: Vec<FileRecord>,
    /// "f32" or "bf16": how its filters and activations were held in memory.
    pub precision: &'static str,
    /// Preprocessing, labels, windows.
    pub plan: InferencePlan,
}

/// The device of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DeviceRecord {
    /// "cpu" ...
    pub name: String,
    /// Instruction set of the CPU kernels.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
}

impl From<&Device> for DeviceRecord {
    fn from(device: &Device) -> Self {
        Self { name: device.name(), isa: device.isa().name(), threads: device.threads() }
    }
}

/// The options of a run that change its result.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct OptionsRecord {
    /// Distance of windows as a fraction of the patch.
    pub step_size: f64,
    /// Test-time mirroring.
    pub mirroring: bool,
    /// "normal", "fast" or "fastest".
    pub mode: String,
    /// Probabilities were kept.
    pub probabilities: bool,
    /// Only the most accurate kernels.
    pub strict: bool,
    /// Limit of tensor memory in bytes.
    pub memory_limit: Option<usize>,
}

impl From<&PredictOptions> for OptionsRecord {
    fn from(o: &PredictOptions) -> Self {
        Self {
            step_size: o.step_size,
            mirroring: o.mirroring,
            mode: format!("{:?}", o.mode).to_lowercase(),
            probabilities: o.probabilities,
            strict: o.strict,
            memory_limit: o.memory_limit,
        }
    }
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RunReport {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// [`NOTICE`].
    pub notice: &'static str,
    /// Version of this crate.
    pub version: &'static str,
    /// The model.
    pub model: ModelRecord,
    /// Where it ran.
    pub device: DeviceRecord,
    /// How it ran.
    pub options: OptionsRecord,
    /// Whose numbers the segmentations have, if not the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_system: Option<LabelSystem>,
    /// Every case, in the order of the work.
    pub cases: Vec<CaseRecord>,
    /// Files of the input folder that belong to no case; bytes that are not UTF-8 are shown as the replacement
    /// character.
    pub ignored: Vec<String>,
    /// The run was stopped: cases that are not listed were not begun or not finished.
    pub interrupted: bool,
    /// Wall-clock seconds of the run.
    pub seconds: f64,
    /// Most memory the process held at once, if the system tells.
    pub peak_process_bytes: Option<u64>,
}

impl RunReport {
    /// A report without cases.
    #[must_use]
    pub fn new(model: ModelRecord, device: &Device, options: &PredictOptions) -> Self {
        Self {
            schema: SCHEMA,
            notice: NOTICE,
            version: env!("CARGO_PKG_VERSION"),
            model,
            device: device.into(),
            options: options.into(),
            label_system: None,
            cases: Vec::new(),
            ignored: Vec::new(),
            interrupted: false,
            seconds: 0.0,
            peak_process_bytes: None,
        }
    }

    /// Names of the cases that failed.
    #[must_use]
    pub fn failed(&self) -> Vec<&str> {
        self.cases.iter().filter(|c| c.outcome == Outcome::Failed).map(|c| c.case.as_str()).collect()
    }

    /// Writes [`RunReport::to_json`] to a file.
    ///
    /// # Errors
    /// Those of [`RunReport::to_json`], and [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let json = self.to_json()?;
        write_atomically(path, |file| file.write_all(json.as_bytes()).map_err(|e| Error::io("write", path, e)))
    }

    /// The report as indented JSON with a newline at its end.
    ///
    /// # Errors
    /// [`Error::Shape`] when a number is not finite, which JSON cannot hold.
    pub fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self).map_err(|e| Error::shape("report", e.to_string()))?;
        text.push('\n');
        Ok(text)
    }
}

/// A path as JSON can hold it: names of files need not be UTF-8, and no run is to lose its report for that.
fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

impl ModelRecord {
    /// Hashes `files` of the model at `path`, whose filters are held as they are.
    ///
    /// # Errors
    /// [`Error::Io`] when one cannot be read.
    pub fn of(path: &Path, files: &[PathBuf], plan: &InferencePlan) -> Result<Self> {
        let files = files.iter().map(|f| FileRecord::of(f)).collect::<Result<_>>()?;
        Ok(Self { path: path.into(), files, precision: Precision::default().name(), plan: plan.clone() })
    }

    /// With filters and activations held in another precision.
    #[must_use]
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision.name();
        self
    }
}
