//! A raw data set: `nnUNet_raw/DatasetNNN_Name` with `dataset.json`, `imagesTr/CASE_0000.nii.gz` and
//! `labelsTr/CASE.nii.gz`, or an explicit list of files (nnU-Net `get_filenames_of_train_images_and_targets`).

mod import;
mod reader;
mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::io::{Image, Segmentation};
use crate::nnunet::json::{self, Field};
use crate::nnunet::labels::LabelSet;
pub use import::{convert_msd, convert_v1};
pub(in crate::nnunet) use reader::label_sidecar;
pub use reader::{Reader, sidecar};

/// What a `dataset.json` says.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DatasetJson {
    /// Names of the channels by rising number.
    pub channels: Vec<String>,
    /// The labels.
    pub labels: LabelSet,
    /// Cases for training, as stated.
    pub num_training: usize,
    /// Ending of image and label files, such as ".nii.gz".
    pub file_ending: String,
    /// nnU-Net's class that reads the images, where the file names one.
    pub reader: Option<String>,
    /// Everything that stands in the file.
    pub value: Value,
}

impl DatasetJson {
    /// Reads a `dataset.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Dataset`] naming the key and what is expected.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(path, json::read_dataset(path)?)
    }

    /// The description `value` of `file`.
    ///
    /// # Errors
    /// As [`DatasetJson::read`].
    pub fn of(file: &Path, value: Value) -> Result<Self> {
        let root = Field::of_dataset(file, &value);
        if root.get("file_ending").is_none() && root.get("training").is_some() {
            let what = "missing: this is the form of nnU-Net 1 or the Medical Segmentation Decathlon; 'stunet convert \
                        v1-dataset' or 'stunet convert msd' makes a data set of it";
            return Err(Error::dataset(file, "file_ending", what));
        }
        // "modality" is what nnU-Net 1 wrote.
        let names = match (root.get("channel_names"), root.get("modality")) {
            (Some(names), _) | (None, Some(names)) => names,
            (None, None) => root.need("channel_names")?,
        };
        let mut channels: BTreeMap<usize, String> = BTreeMap::new();
        for (key, name) in names.entries()? {
            let number = key.parse().map_err(|_| name.error("the key is no channel number"))?;
            channels.insert(number, name.str()?.to_owned());
        }
        if channels.is_empty() {
            return Err(names.error("no channel, expected at least \"0\""));
        }
        if let Some(i) = (0..channels.len()).find(|i| !channels.contains_key(i)) {
            return Err(names.error(format!("no channel {i}, expected channels numbered from 0 without gaps")));
        }
        let labels = LabelSet::of(&root)?;
        let num_training = root.need("numTraining")?.usize(usize::MAX)?;
        let ending = root.need("file_ending")?;
        if !ending.str()?.starts_with('.') || ending.str()?.contains(['/', '\\', ':', '\0']) {
            return Err(ending.error(format!("{:?}, expected an ending like \".nii.gz\"", ending.str()?)));
        }
        let file_ending = ending.str()?.to_owned();
        let reader = root.get("overwrite_image_reader_writer").map(|r| r.str()).transpose()?;
        let reader = reader.filter(|r| *r != "None").map(str::to_owned);
        Ok(Self { channels: channels.into_values().collect(), labels, num_training, file_ending, reader, value })
    }
}

/// The files of a case.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RawCase {
    /// The case's identifier.
    pub name: String,
    /// Image files, by rising channel.
    pub images: Vec<PathBuf>,
    /// Label map.
    pub label: PathBuf,
}

/// A raw data set.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Dataset {
    /// Its folder.
    pub folder: PathBuf,
    /// The folder's name, "Dataset004_Hippocampus".
    pub name: String,
    /// Its description.
    pub json: DatasetJson,
    /// How its files are read.
    pub reader: Reader,
    /// The cases for training: by name, or in the order of an explicit list.
    pub cases: Vec<RawCase>,
}

impl Dataset {
    /// Opens a raw data set. Of images only a first TIFF file is looked at: 2D or a stack.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Dataset`] naming the file and what is expected; [`Error::Unsupported`] for images of a kind
    /// that cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_with(folder, &|_| None)
    }

    /// As [`Dataset::open`]; `$NAME` and `${NAME}` in the paths of an explicit list of files stand for what `variable`
    /// says, where it says anything.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_with(folder: &Path, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let file = folder.join("dataset.json");
        if !file.is_file() {
            return Err(Error::dataset(folder, "dataset.json", "missing; every raw data set has one"));
        }
        let json = DatasetJson::read(&file)?;
        // An ending that cannot be read is told of before files are looked for.
        Reader::of(&json, None)?;
        let name = folder_name(folder)?;
        let root = Field::of_dataset(&file, &json.value);
        let cases = match root.get("dataset") {
            Some(list) => listed(folder, &list, variable)?,
            None => found(folder, &json.file_ending)?,
        };
        if cases.is_empty() {
            let what = format!("no training case, expected files like imagesTr/case_0000{}", json.file_ending);
            return Err(Error::dataset(folder, "imagesTr", what));
        }
        let reader = Reader::of(&json, cases[0].images.first().map(PathBuf::as_path))?;
        Ok(Self { folder: folder.into(), name, json, reader, cases })
    }

    /// Identifiers of the cases.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        self.cases.iter().map(|c| c.name.clone()).collect()
    }

    /// Reads the channels of a case.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Image`] naming the file and what is wrong with it; [`Error::Dataset`] when the number of channels is not that of the data set.
    pub fn image(&self, case: &RawCase) -> Result<Image> {
        let image = self.reader.image(&case.images)?;
        let (found, expected) = (image.channels.len(), self.json.channels.len());
        if found == expected {
            return Ok(image);
        }
        if found == 1 {
            return Err(self.missing_channel(case, 1));
        }
        Err(self.fault(case, format!("{found} channels in its files, dataset.json names {expected}")))
    }

    /// Reads the label map of a case.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Image`] naming the file and the first voxel that is no label.
    pub fn label(&self, case: &RawCase) -> Result<Segmentation> {
        self.reader.label(&case.label)
    }

    fn missing_channel(&self, case: &RawCase, number: usize) -> Error {
        let (channel, ending) = (&self.json.channels[number], &self.json.file_ending);
        let file = format!("imagesTr/{}_{number:04}{ending}", case.name);
        self.fault(case, format!("channel {number} ({channel}) is missing, expected {file}"))
    }

    pub(crate) fn fault(&self, case: &RawCase, what: impl Into<String>) -> Error {
        Error::dataset(&self.folder, format!("case {}", case.name), what)
    }
}

/// The name of a folder as it is given: where that is a link, the link's.
fn folder_name(folder: &Path) -> Result<String> {
    let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned());
    if let Some(name) = name(folder) {
        return Ok(name);
    }
    let real = folder.canonicalize().map_err(|e| Error::io("read", folder, e))?;
    Ok(name(&real).unwrap_or_default())
}

/// Cases of `imagesTr`, by name.
fn found(folder: &Path, ending: &str) -> Result<Vec<RawCase>> {
    let [images, labels] = ["imagesTr", "labelsTr"].map(|n| folder.join(n));
    for sub in [&images, &labels] {
        if !sub.is_dir() {
            let what = "no such folder; images belong in imagesTr, label maps in labelsTr, or name the files in the \
                        \"dataset\" of dataset.json";
            return Err(Error::dataset(sub, "folder", what));
        }
    }
    let mut cases: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for entry in std::fs::read_dir(&images).map_err(|e| Error::io("list", &images, e))? {
        let path = entry.map_err(|e| Error::io("list", &images, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(stem) = name.strip_suffix(ending).filter(|_| !name.starts_with('.')) else { continue };
        let digits = |d: &str| d.len() == 4 && d.bytes().all(|b| b.is_ascii_digit());
        match stem.rsplit_once('_').filter(|(case, d)| !case.is_empty() && digits(d)) {
            Some((case, _)) => cases.entry(case.into()).or_default().push(path),
            None => {
                let what = format!("expected a name like case_0000{ending}, whose four digits number the channel");
                return Err(Error::dataset(&path, "name", what));
            }
        }
    }
    let case = |(name, mut images): (String, Vec<PathBuf>)| {
        images.sort();
        let label = labels.join(format!("{name}{ending}"));
        RawCase { name, images, label }
    };
    Ok(cases.into_iter().map(case).collect())
}

/// Cases of an explicit list `{case: {images: [...], label: "..."}}`; relative paths begin at the data set's folder.
fn listed(folder: &Path, list: &Field<'_>, variable: &dyn Fn(&str) -> Option<String>) -> Result<Vec<RawCase>> {
    let path = |f: &Field<'_>| f.str().map(|s| folder.join(expand(s, variable)));
    list.entries()?
        .into_iter()
        .map(|(name, files)| {
            // The name becomes that of files.
            if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
                return Err(files.error("a case's name may not be empty, begin with a dot or hold slashes"));
            }
            let images = files.need("images")?.items()?.iter().map(path).collect::<Result<_>>()?;
            Ok(RawCase { name: name.to_owned(), images, label: path(&files.need("label")?)? })
        })
        .collect()
}

/// Python's `os.path.expandvars`: variables that are not known stay as they stand.
fn expand(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let (name, len) = match after.strip_prefix('{').and_then(|a| a.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => {
                let len = after.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(after.len());
                (&after[..len], len)
            }
        };
        match variable(name).filter(|_| !name.is_empty()) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[at..=at + len]),
        }
        rest = &after[len..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_in_paths() {
        let variable = |name: &str| (name == "DATA").then(|| "disk".to_owned());
        for (text, expanded) in [
            ("$DATA/a.nii", "disk/a.nii"),
            ("x/${DATA}1$DATA", "x/disk1disk"),
            ("$OTHER/${OTHER}/$", "$OTHER/${OTHER}/$"),
            ("${DATA", "${DATA"),
            ("plain", "plain"),
        ] {
            assert_eq!(expand(text, &variable), expanded);
        }
    }
}
