//! Which of nnU-Net's readers a data set's files are for (nnU-Net `determine_reader_writer_from_dataset_json`).

use std::path::{Path, PathBuf};

use super::DatasetJson;
use crate::error::{Error, Result};
use crate::io::{Image, Segmentation, read_nifti, read_segmentation};

/// How the files of a data set are read, by the names of nnU-Net's classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reader {
    /// `.nii.gz`.
    SimpleItkIo,
    /// `.nii`.
    NibabelIo,
    /// `.png`, `.tif` of one page.
    NaturalImage2dIo,
    /// `.tif` and `.tiff` of several pages; a file `CASE.json` beside them may say the `spacing`.
    Tiff3dIo,
}

impl Reader {
    const ALL: [Reader; 4] = [Reader::SimpleItkIo, Reader::NibabelIo, Reader::NaturalImage2dIo, Reader::Tiff3dIo];

    /// The name of nnU-Net's class.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Reader::SimpleItkIo => "SimpleITKIO",
            Reader::NibabelIo => "NibabelIO",
            Reader::NaturalImage2dIo => "NaturalImage2DIO",
            Reader::Tiff3dIo => "Tiff3DIO",
        }
    }

    /// The reader of a data set: the one it names, else by the ending of its files; one of them tells whether a `.tif` is a
    /// picture or a volume.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the ending or the class that there is nothing for; errors of the example.
    pub fn of(dataset: &DatasetJson, example: Option<&Path>) -> Result<Self> {
        if let Some(name) = &dataset.reader {
            if let Some(reader) = Self::ALL.into_iter().find(|r| r.name() == name) {
                return Ok(reader);
            }
            if name.ends_with("WithReorient") {
                let what = format!("overwrite_image_reader_writer {name:?}: images are never reoriented here");
                return Err(Error::unsupported(what));
            }
            tracing::warn!("overwrite_image_reader_writer {name:?} is not known; the file ending decides");
        }
        Self::of_ending(&dataset.file_ending, example)
    }

    /// The reader for files of an ending; `example` is one of them.
    ///
    /// # Errors
    /// As [`Reader::of`].
    pub fn of_ending(ending: &str, example: Option<&Path>) -> Result<Self> {
        match (ending.to_ascii_lowercase().as_str(), example) {
            (".nii.gz", _) => Ok(Reader::SimpleItkIo),
            (".nii", _) => Ok(Reader::NibabelIo),
            (".tif", Some(example)) if example.is_file() && pages(example)? > 1 => Ok(Reader::Tiff3dIo),
            (".png" | ".tif", _) => Ok(Reader::NaturalImage2dIo),
            (".tiff", _) => Ok(Reader::Tiff3dIo),
            (other, _) => Err(Error::unsupported(format!("images ending in {other:?}; .nii.gz, .nii, .png, .tif are"))),
        }
    }

    /// Reads a case's images.
    pub(crate) fn image(self, paths: &[PathBuf]) -> Result<Image> {
        match self {
            Reader::SimpleItkIo | Reader::NibabelIo => read_nifti(paths),
            Reader::NaturalImage2dIo => pictures(paths),
            Reader::Tiff3dIo => {
                let first = paths.first().ok_or_else(|| Error::usage("no image file was given"))?;
                let name = first.file_stem().unwrap_or_default().to_string_lossy();
                // Without the number of the channel.
                stacks(paths, &first.with_file_name(name.rsplit_once('_').map_or(&*name, |(case, _)| case)))
            }
        }
    }

    /// Reads a label map.
    pub(crate) fn label(self, path: &Path) -> Result<Segmentation> {
        let image = match self {
            Reader::SimpleItkIo | Reader::NibabelIo => return read_segmentation(path),
            Reader::NaturalImage2dIo => pictures(&[path.to_owned()])?,
            Reader::Tiff3dIo => stacks(&[path.to_owned()], &path.with_extension(""))?,
        };
        let [voxels] = image.channels.as_slice() else {
            let what = format!("{} channels, expected 1 for a label map", image.channels.len());
            return Err(Error::image(path, "channels", what));
        };
        crate::io::nifti::labels_of(path, voxels, image.geometry.clone())
    }
}

#[cfg(feature = "natural")]
fn pages(path: &Path) -> Result<usize> {
    crate::io::picture_pages(path)
}

#[cfg(feature = "natural")]
fn pictures(paths: &[PathBuf]) -> Result<Image> {
    crate::io::read_pictures(paths)
}

/// TIFF stacks whose spacing stands in `case.json`, else 1 mm.
#[cfg(feature = "natural")]
fn stacks(paths: &[PathBuf], case: &Path) -> Result<Image> {
    use crate::nnunet::json::{self, Field};

    let mut name = case.as_os_str().to_owned();
    name.push(".json");
    let sidecar = PathBuf::from(name);
    let spacing_mm = if sidecar.is_file() {
        let value = json::read_dataset(&sidecar)?;
        let spacing = Field::of_dataset(&sidecar, &value).need("spacing")?;
        let spacing_mm = spacing.three(Field::f64)?;
        if spacing_mm.iter().any(|s| *s <= 0.0) {
            return Err(spacing.error("expected three lengths above 0"));
        }
        spacing_mm
    } else {
        tracing::warn!("{}: missing; the spacing is taken to be 1 mm", sidecar.display());
        [1.0; 3]
    };
    crate::io::read_tiff_stacks(paths, spacing_mm)
}

#[cfg(not(feature = "natural"))]
fn without<T>() -> Result<T> {
    Err(Error::unsupported("PNG and TIFF images: this program was built without the feature \"natural\""))
}

#[cfg(not(feature = "natural"))]
fn pages(_: &Path) -> Result<usize> {
    without()
}

#[cfg(not(feature = "natural"))]
fn pictures(_: &[PathBuf]) -> Result<Image> {
    without()
}

#[cfg(not(feature = "natural"))]
fn stacks(_: &[PathBuf], _: &Path) -> Result<Image> {
    without()
}
