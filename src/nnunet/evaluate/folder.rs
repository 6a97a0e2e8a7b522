//! A folder of predictions against a folder of truths (nnU-Net `compute_metrics_on_folder2` and `_simple`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::surface::{Surfaces, TOLERANCE_MM, compare_surfaces};
use super::{Class, Metrics, Summary, compare};
use crate::base::progress::Progress;
use crate::error::{Error, Result};
use crate::io::Segmentation;
use crate::nnunet::dataset::{DatasetJson, Reader};
use crate::nnunet::label_system::{LabelSystem, ModelClasses, Relabelling};
use crate::nnunet::workers;
use crate::tensor::Device;

/// What is measured beside what nnU-Net counts.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct CompareOptions {
    /// Distances of surfaces up to so many mm count as none in surface Dice. `None`: surfaces are not compared.
    pub tolerance_mm: Option<f64>,
    /// Truths without a prediction are left out (nnU-Net's `chill`); else they are an error.
    pub incomplete: bool,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self { tolerance_mm: Some(TOLERANCE_MM), incomplete: false }
    }
}

/// Two folders whose files of the same name belong together, and what is compared in them.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Folders {
    /// Where the truths are.
    pub truth: PathBuf,
    /// Where the predictions are.
    pub prediction: PathBuf,
    /// Labels or regions.
    pub classes: Vec<Class>,
    /// What people call each class.
    pub class_names: Vec<String>,
    /// What people call the values of label maps, background left out.
    pub label_names: Vec<(u16, String)>,
    /// Voxels of this label of the truth are left out.
    pub ignore: Option<u16>,
    pub(crate) reader: Reader,
    pub(super) ending: String,
    /// Label maps are compared in another numbering than they are stored.
    common: Option<Box<Common>>,
}

/// Whose numbers predictions have, where they are compared in a label system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Numbers {
    /// The data set's, as truths.
    Dataset,
    /// The model's.
    Model(ModelClasses),
}

/// How a truth and a prediction get the numbers that both are compared in.
#[derive(Debug, Clone)]
struct Common {
    truth: Relabelling,
    prediction: Relabelling,
    numbers: Numbers,
}

/// What was found in two folders.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Evaluation {
    /// nnU-Net's numbers.
    pub summary: Summary,
    /// By case and class; `None` where surfaces were not compared.
    pub surfaces: Option<Vec<Vec<Surfaces>>>,
    /// Tolerance of the surface Dice in mm.
    pub tolerance_mm: Option<f64>,
    pub(super) class_names: Vec<String>,
    /// Files that were compared, by name.
    pub(super) files: Vec<OsString>,
}

impl Folders {
    /// All labels, or all regions, that `dataset` describes.
    ///
    /// # Errors
    /// [`Error::Dataset`] when a folder is not there or has no file of the data set's ending, [`Error::Unsupported`] when
    /// such files cannot be read.
    pub fn of_dataset(truth: &Path, prediction: &Path, dataset: &DatasetJson) -> Result<Self> {
        let ending = dataset.file_ending.clone();
        let example = first(truth, &ending)?;
        let reader = Reader::of(dataset, Some(&truth.join(&example)))?;
        let labels = &dataset.labels;
        let (classes, label_names) = (Class::of(labels), labels.names());
        let called = |value: u16| label_names.iter().find(|(v, _)| *v == value).map(|(_, n)| n.clone());
        let class_names: Vec<String> = match labels.regions() {
            // Both in the order of the regions.
            Some(_) => label_names.iter().map(|(_, name)| name.clone()).collect(),
            None => classes.iter().map(|c| called(c.labels[0]).unwrap_or_else(|| c.key.clone())).collect(),
        };
        let once = Class::first_of_each(&classes);
        Ok(Self {
            truth: truth.into(),
            prediction: prediction.into(),
            classes: once.iter().map(|&i| classes[i].clone()).collect(),
            class_names: once.iter().map(|&i| class_names[i].clone()).collect(),
            label_names,
            ignore: labels.ignore(),
            reader,
            ending,
            common: None,
        })
    }

    /// The given labels, in files of the ending that the first file of `truth` has.
    ///
    /// # Errors
    /// As [`Folders::of_dataset`].
    pub fn of_labels(truth: &Path, prediction: &Path, labels: &[u16], ignore: Option<u16>) -> Result<Self> {
        let (ending, reader) = ending_of(truth)?;
        let all: Vec<Class> = labels.iter().copied().map(Class::label).collect();
        let labels: Vec<u16> = Class::first_of_each(&all).into_iter().map(|i| labels[i]).collect();
        let names: Vec<String> = labels.iter().map(|l| format!("label {l}")).collect();
        Ok(Self {
            truth: truth.into(),
            prediction: prediction.into(),
            classes: labels.iter().copied().map(Class::label).collect(),
            class_names: names.clone(),
            label_names: labels.iter().copied().zip(names).filter(|(l, _)| *l != 0).collect(),
            ignore,
            reader,
            ending: ending.into(),
            common: None,
        })
    }

    /// The labels of `system`, numbered from 1 in their order, as STU-Net's `direct_inference` compares them: truths have the
    /// data set's numbers, predictions those of `numbers`. What belongs to no label is background. Files are of the ending that
    /// the first of `truth` has.
    ///
    /// # Errors
    /// As [`Folders::of_dataset`]; [`Error::Dataset`] naming a class of the system that the model does not have.
    pub fn of_system(truth: &Path, prediction: &Path, system: &LabelSystem, numbers: Numbers) -> Result<Self> {
        let of_truth = system.in_order_from_dataset();
        let of_prediction = match &numbers {
            Numbers::Dataset => of_truth.clone(),
            Numbers::Model(classes) => system.in_order_from_model(classes)?,
        };
        let names = of_truth.names().to_vec();
        let (ending, reader) = ending_of(truth)?;
        Ok(Self {
            truth: truth.into(),
            prediction: prediction.into(),
            classes: names.iter().map(|(number, _)| Class::label(*number)).collect(),
            class_names: names.iter().map(|(_, name)| name.clone()).collect(),
            label_names: names,
            ignore: None,
            reader,
            ending: ending.into(),
            common: Some(Box::new(Common { truth: of_truth, prediction: of_prediction, numbers })),
        })
    }

    /// Names of the files to compare, sorted: those of the folder of predictions.
    ///
    /// # Errors
    /// [`Error::Dataset`] naming the file whose counterpart is missing: every prediction needs a truth and, unless the folder
    /// may be `incomplete`, every truth a prediction.
    pub fn files(&self, incomplete: bool) -> Result<Vec<OsString>> {
        let [truths, predictions] = [&self.truth, &self.prediction].map(|f| files(f, &self.ending));
        let (truths, predictions) = (truths?, predictions?);
        if predictions.is_empty() {
            return Err(nothing(&self.prediction, &self.ending));
        }
        let missing = |of: &[OsString], among: &[OsString]| -> Vec<OsString> {
            of.iter().filter(|f| among.binary_search(f).is_err()).cloned().collect()
        };
        let fault = |missing: &[OsString], there: &Path, kind: &str, expected: &Path| match missing {
            [] => Ok(()),
            [first, rest @ ..] => {
                let others = if rest.is_empty() { String::new() } else { format!(" ({} others as well)", rest.len()) };
                let what = format!("missing, expected {}{others}", expected.join(first).display());
                Err(Error::dataset(&there.join(first), kind, what))
            }
        };
        fault(&missing(&predictions, &truths), &self.prediction, "truth", &self.truth)?;
        if !incomplete {
            fault(&missing(&truths, &predictions), &self.truth, "prediction", &self.prediction)?;
        }
        Ok(predictions)
    }

    /// A case's truth and prediction, in the numbers that they are compared in.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Image`] naming the file that is damaged, whose grid is not that of its counterpart, or that
    /// has values which its model does not know.
    pub(crate) fn read(&self, file: &OsString) -> Result<[Segmentation; 2]> {
        let [truth_path, path] = [&self.truth, &self.prediction].map(|f| f.join(file));
        let (mut truth, mut prediction) = (self.reader.label(&truth_path)?, self.reader.label(&path)?);
        let (a, b) = (&truth.geometry, &prediction.geometry);
        if a.shape != b.shape {
            let (found, expected) = (b.shape, a.shape);
            let what = format!("{found:?} voxels (z, y, x), expected {expected:?} as in {}", truth_path.display());
            return Err(Error::image(&path, "dim", what));
        }
        if a.spacing_mm.iter().zip(b.spacing_mm).any(|(a, b)| (a - b).abs() > 1e-4 * a.abs()) {
            let (found, expected) = (b.spacing_mm, a.spacing_mm);
            tracing::warn!("{}: spacing {found:?} mm, its truth has {expected:?}; the truth's counts", path.display());
        }
        if let Some(common) = &self.common {
            if let Numbers::Model(classes) = &common.numbers {
                classes.check(&path, &prediction.labels)?;
            }
            common.truth.apply(&mut truth)?;
            common.prediction.apply(&mut prediction)?;
        }
        Ok([truth, prediction])
    }

    /// Compares all cases, with the threads of `device`; results do not depend on their number.
    ///
    /// # Errors
    /// Those of [`Folders::files`] and of reading, of the first case that has one; [`Error::Usage`] for a tolerance that is
    /// negative or no number; [`Error::Cancelled`].
    pub fn evaluate(
        &self,
        options: &CompareOptions,
        device: &Device,
        progress: &mut dyn Progress,
    ) -> Result<Evaluation> {
        let files = self.files(options.incomplete)?;
        let found = workers::map(device, files.len(), progress, |i| {
            let [truth, prediction] = self.read(&files[i])?;
            let metrics = compare(&truth, &prediction, &self.classes, self.ignore)?;
            let surfaces = options
                .tolerance_mm
                .map(|mm| compare_surfaces(&truth, &prediction, &self.classes, self.ignore, mm))
                .transpose()?;
            Ok((metrics, surfaces))
        })?;
        let (metrics, surfaces): (Vec<Vec<Metrics>>, Vec<Option<Vec<Surfaces>>>) = found.into_iter().unzip();
        Ok(Evaluation {
            summary: self.summary(&files, metrics),
            surfaces: surfaces.into_iter().collect(),
            tolerance_mm: options.tolerance_mm,
            class_names: self.class_names.clone(),
            files,
        })
    }

    /// The summary of what was found in `files`.
    pub(crate) fn summary(&self, files: &[OsString], metrics: Vec<Vec<Metrics>>) -> Summary {
        let mut summary = Summary::new(self.classes.clone());
        for (file, metrics) in files.iter().zip(metrics) {
            summary.add(&self.truth.join(file), &self.prediction.join(file), metrics);
        }
        summary
    }
}

/// The ending of the label maps in `folder`, and how they are read.
fn ending_of(folder: &Path) -> Result<(&'static str, Reader)> {
    const ENDINGS: [&str; 5] = [".nii.gz", ".nii", ".png", ".tif", ".tiff"];
    let found = ENDINGS.iter().find_map(|e| Some((*e, first(folder, e).ok()?)));
    let Some((ending, example)) = found else {
        // Says what is wrong with the folder, if it is that.
        first(folder, "")?;
        let what = format!("no label map in it, expected files ending in {}", ENDINGS.join(", "));
        return Err(Error::dataset(folder, "folder", what));
    };
    Ok((ending, Reader::of_ending(ending, Some(&folder.join(example)))?))
}

/// Names of the files of a folder with an ending, sorted; hidden ones are left out.
pub(crate) fn files(folder: &Path, ending: &str) -> Result<Vec<OsString>> {
    if !folder.is_dir() {
        return Err(Error::dataset(
            folder,
            "folder",
            format!("no such folder, expected label maps ending in {ending}"),
        ));
    }
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))? {
        let entry = entry.map_err(|e| Error::io("list", folder, e))?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if text.ends_with(ending) && !text.starts_with('.') && entry.path().is_file() {
            out.push(name);
        }
    }
    out.sort();
    Ok(out)
}

pub(crate) fn nothing(folder: &Path, ending: &str) -> Error {
    Error::dataset(folder, "folder", format!("no label map in it, expected files ending in {ending}"))
}

fn first(folder: &Path, ending: &str) -> Result<OsString> {
    files(folder, ending)?.into_iter().next().ok_or_else(|| nothing(folder, ending))
}
