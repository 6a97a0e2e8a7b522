//! Folders of preprocessed cases (nnU-Net's `nnUNet_preprocessed/DatasetNNN/<data_identifier>`), in the project's own form
//! or in one of nnU-Net's: `.b2nd` (since 2.6), `.npz` and the `.npy` files that training unpacked from it.

mod case;
mod dataset;
mod foreign;
mod own;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use dataset::{PreprocessOptions, PreprocessedConfiguration, location_classes, preprocess_dataset};
pub use foreign::write_properties;
pub(super) use foreign::{read_grid, write_grid};

use self::case::{StoredCase, file};
use self::own::OwnFile;
use super::preprocess::{Preprocessed, PreprocessedCase, Properties};
use super::training_case::TrainingCase;
use crate::error::{Error, Result};
use crate::io::boxes::Boxes;
use crate::io::{Geometry, LabelData};

/// Forms in which a case may be stored. Where there are several of one case, the first of these is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Form {
    /// `CASE.safetensors`.
    Own,
    /// `CASE.b2nd`, `CASE_seg.b2nd`, `CASE.pkl`.
    Blosc,
    /// `CASE.npy`, `CASE_seg.npy`, `CASE.pkl`.
    Npy,
    /// `CASE.npz`, `CASE.pkl`.
    Npz,
}

/// Endings of the file by which a case is found; the others follow from it.
const ENDINGS: [(&str, Form); 4] =
    [(".safetensors", Form::Own), (".b2nd", Form::Blosc), (".npy", Form::Npy), (".npz", Form::Npz)];

/// What a stored case tells beside its voxels.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct StoredProperties {
    /// How to come back to the image's own grid.
    pub preprocessing: Properties,
    /// The image's own grid: that of results.
    pub geometry: Geometry,
}

/// An open folder of preprocessed cases.
#[derive(Debug, Clone)]
pub struct Stored {
    folder: PathBuf,
    identifiers: Vec<String>,
    forms: Vec<Form>,
    previous: Option<PreviousLabels>,
}

/// What the stage before of a cascade predicted.
#[derive(Debug, Clone)]
struct PreviousLabels {
    folder: PathBuf,
    /// Labels that become channels of the image.
    labels: Vec<u16>,
}

/// Opens a folder of preprocessed cases. Only its names are read.
///
/// # Errors
/// [`Error::Io`]; [`Error::Usage`] when it holds no case.
pub fn open(folder: &Path) -> Result<Stored> {
    let cases = list(folder)?;
    if cases.is_empty() {
        let what = "no preprocessed case (.safetensors, .b2nd, .npz) is in it; preprocess the data set first";
        return Err(Error::usage(format!("{}: {what}", folder.display())));
    }
    let (identifiers, forms) = cases.into_iter().unzip();
    Ok(Stored { folder: folder.into(), identifiers, forms, previous: None })
}

/// Cases of a folder by name.
fn list(folder: &Path) -> Result<BTreeMap<String, Form>> {
    let mut cases: BTreeMap<String, Form> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))? {
        let name = entry.map_err(|e| Error::io("list", folder, e))?.file_name();
        // nnU-Net's names are UTF-8; hidden files are half written.
        let Some(name) = name.to_str().filter(|n| !n.starts_with('.')) else { continue };
        for (ending, form) in ENDINGS {
            let Some(identifier) = name.strip_suffix(ending).filter(|i| !i.is_empty()) else { continue };
            let of_labels = matches!(form, Form::Blosc | Form::Npy) && identifier.ends_with("_seg");
            if !of_labels {
                let known = cases.entry(identifier.into()).or_insert(form);
                *known = form.min(*known);
            }
        }
    }
    Ok(cases)
}

impl Stored {
    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names of the cases, sorted.
    #[must_use]
    pub fn identifiers(&self) -> &[String] {
        &self.identifiers
    }

    /// Reads what the stage before of a cascade predicted beside the truth, from a folder of files named as the cases are
    /// (nnU-Net's `predicted_next_stage/CONFIGURATION`). Each of `labels` is a channel of whole images.
    #[must_use]
    pub fn with_previous_stage(mut self, folder: &Path, labels: &[u16]) -> Self {
        self.previous = Some(PreviousLabels { folder: folder.into(), labels: labels.to_vec() });
        self
    }

    /// Opens a case for training.
    ///
    /// The arrays of the own form, of `.npy` and of `.b2nd` stay in their files; those of `.npz` are read into memory.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such case; [`Error::Io`]; [`Error::Model`] naming the file and the part of it
    /// that is damaged.
    pub fn case(&self, identifier: &str) -> Result<Box<dyn TrainingCase>> {
        Ok(Box::new(self.stored(identifier)?))
    }

    /// A whole case as preprocessing made it, without its truth: what the final validation predicts. In a cascade the labels of
    /// the stage before are further channels of zeros and ones.
    ///
    /// # Errors
    /// Those of [`Stored::case`], [`Error::OutOfMemory`].
    pub fn image(&self, identifier: &str, transpose_backward: [usize; 3]) -> Result<Preprocessed> {
        let case = self.stored(identifier)?;
        let (data, labels) = case.whole(&self.folder.join(identifier))?;
        let properties = self.properties(identifier, transpose_backward)?.preprocessing;
        let mut image = Preprocessed { data, channels: case.channels(), shape: case.shape(), properties };
        if let Some(previous) = &self.previous {
            // Behind the truth.
            image.append_one_hot(&labels[case.shape().iter().product()..], &previous.labels)?;
        }
        Ok(image)
    }

    /// How to bring a case back to its image's grid, and that grid.
    ///
    /// nnU-Net's files tell the transposed shape only, so the plans' `transpose_backward` is asked for.
    ///
    /// # Errors
    /// Those of [`Stored::case`].
    pub fn properties(&self, identifier: &str, transpose_backward: [usize; 3]) -> Result<StoredProperties> {
        match self.form(identifier)? {
            Form::Own => Ok(OwnFile::open(&file(&self.folder, identifier, ".safetensors"), false)?.properties()),
            _ => foreign::properties(&file(&self.folder, identifier, ".pkl"), transpose_backward),
        }
    }

    /// Reads all bytes of a case of the own form and compares them with their SHA-256; cases of other forms have none, and
    /// are only opened.
    ///
    /// # Errors
    /// Those of [`Stored::case`].
    pub fn check(&self, identifier: &str) -> Result<()> {
        match self.form(identifier)? {
            Form::Own => OwnFile::open(&file(&self.folder, identifier, ".safetensors"), true).map(drop),
            _ => self.stored(identifier).map(drop),
        }
    }

    /// Writes what the stage before of a cascade predicted of a case, on the case's grid, to `folder`:
    /// [`Stored::with_previous_stage`] reads it. Beside a case in one of nnU-Net's archives it is one, too.
    ///
    /// # Errors
    /// Those of [`Stored::case`]; [`Error::Shape`] when there are not as many labels as voxels or one is above 32767;
    /// [`Error::Io`].
    pub fn write_previous_stage(&self, folder: &Path, identifier: &str, labels: &LabelData) -> Result<()> {
        let shape = self.shape(identifier)?;
        let narrow = |l: u16| i16::try_from(l).ok();
        let labels: Option<Vec<i16>> = match labels {
            LabelData::U8(l) => Some(l.iter().map(|&l| i16::from(l)).collect()),
            LabelData::U16(l) => l.iter().map(|&l| narrow(l)).collect(),
        };
        let labels = labels.filter(|l| l.len() == shape.iter().product::<usize>());
        let labels = labels.ok_or_else(|| {
            Error::shape("predicted_next_stage", format!("expected labels up to 32767 for {shape:?} voxels"))
        })?;
        let (kept, path) = match self.form(identifier)? {
            Form::Npz | Form::Npy => (Form::Npz, file(folder, identifier, ".npz")),
            _ => (Form::Own, file(folder, identifier, ".safetensors")),
        };
        match kept {
            Form::Npz => foreign::write_labels(&path, &labels, shape)?,
            _ => own::write_labels(&path, &labels, shape)?,
        }
        // An older prediction of another form must not be taken for this one.
        for (ending, _) in ENDINGS.into_iter().filter(|(_, form)| *form != kept) {
            let path = file(folder, identifier, ending);
            if path.is_file() {
                std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            }
        }
        Ok(())
    }

    /// Voxels (z, y, x) of a case, told by its files' headers.
    ///
    /// # Errors
    /// Those of [`Stored::case`].
    pub fn shape(&self, identifier: &str) -> Result<[usize; 3]> {
        match self.form(identifier)? {
            Form::Own => Ok(OwnFile::open(&file(&self.folder, identifier, ".safetensors"), false)?.case(None)?.shape()),
            form => foreign::shape(&self.folder, identifier, form),
        }
    }

    fn form(&self, identifier: &str) -> Result<Form> {
        match self.identifiers.binary_search_by(|i| i.as_str().cmp(identifier)) {
            Ok(i) => Ok(self.forms[i]),
            Err(_) => Err(Error::usage(format!("{}: no preprocessed case {identifier:?}", self.folder.display()))),
        }
    }

    fn stored(&self, identifier: &str) -> Result<StoredCase> {
        let previous = match &self.previous {
            Some(previous) => Some(previous_stage(&previous.folder, identifier, self.shape(identifier)?)?),
            None => None,
        };
        match self.form(identifier)? {
            Form::Own => OwnFile::open(&file(&self.folder, identifier, ".safetensors"), false)?.case(previous),
            form => foreign::case(&self.folder, identifier, form, previous),
        }
    }
}

/// Files of what the stage before predicted of a case, one unless it was written in several forms.
pub(super) fn previous_files(folder: &Path, identifier: &str) -> Vec<PathBuf> {
    ENDINGS.map(|(ending, _)| file(folder, identifier, ending)).into_iter().filter(|p| p.is_file()).collect()
}

/// The labels that the stage before predicted of a case of `shape` voxels.
fn previous_stage(folder: &Path, identifier: &str, shape: [usize; 3]) -> Result<Box<dyn Boxes>> {
    let files = previous_files(folder, identifier);
    let path = match files.as_slice() {
        [one] => one,
        [] => return Err(Error::usage(format!("{}: nothing was predicted of case {identifier}", folder.display()))),
        [one, other, ..] => {
            let what = format!("{} is there, too: remove the older of the two predictions", other.display());
            return Err(Error::model(one, "file", what));
        }
    };
    let own = path.extension().is_some_and(|e| e == "safetensors");
    let labels = if own { own::open_labels(path)? } else { foreign::labels_alone(path)? };
    let [channels, z, y, x] = labels.shape();
    if (channels, [z, y, x]) != (1, shape) {
        let what = format!(
            "{channels} x {:?} voxels, the case has {shape:?}: predict it again (train the stage before with --val)",
            [z, y, x]
        );
        return Err(Error::model(path, "seg", what));
    }
    Ok(labels)
}

/// Writes a case in the own form into `folder`, whole or not at all. `image` is the grid of the case's image;
/// `fingerprint` says what made it.
///
/// # Errors
/// [`Error::Io`].
pub fn write_case(
    folder: &Path,
    identifier: &str,
    case: &PreprocessedCase,
    image: &Geometry,
    fingerprint: &str,
) -> Result<()> {
    own::write(&file(folder, identifier, ".safetensors"), case, image, fingerprint)
}

/// Writes a case as nnU-Net up to 2.5 does and every later one reads it: `CASE.npz` and `CASE.pkl`. `image` is the grid of
/// the case's image; `fingerprint` says what made it.
///
/// # Errors
/// [`Error::Io`].
pub fn write_npz_case(
    folder: &Path,
    identifier: &str,
    case: &PreprocessedCase,
    image: &Geometry,
    fingerprint: &str,
) -> Result<()> {
    foreign::write(folder, identifier, case, image, fingerprint)
}

/// The fingerprint with which a case was written in one of the two forms that are written; `None` where there is none that
/// can be read.
fn made_by(folder: &Path, identifier: &str, form: Form) -> Option<String> {
    match form {
        Form::Npz => foreign::made_by(folder, identifier),
        _ => {
            let own = OwnFile::open(&file(folder, identifier, ".safetensors"), false).ok()?;
            // A file whose arrays do not fit its header is not whole.
            own.case(None).is_ok().then(|| own.fingerprint().to_string())
        }
    }
}
