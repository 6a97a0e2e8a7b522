//! Which of nnU-Net's readers a data set's files are for (nnU-Net `determine_reader_writer_from_dataset_json`).

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::DatasetJson;
use crate::base::json::Json;
use crate::error::{Error, Result};
use crate::io::{Geometry, Image, Segmentation, read_nifti, read_nifti_header, read_segmentation, write_nifti};
use crate::nnunet::cases::split_channel;
use crate::nnunet::json::{self, Field};

/// How the files of a data set are read and written, by the names of nnU-Net's classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Reader {
    /// `.nii.gz`.
    #[default]
    #[serde(rename = "SimpleITKIO")]
    SimpleItkIo,
    /// `.nii`.
    #[serde(rename = "NibabelIO")]
    NibabelIo,
    /// `.png`, `.tif` of one page.
    #[serde(rename = "NaturalImage2DIO")]
    NaturalImage2dIo,
    /// `.tif` and `.tiff` of several pages; a file `CASE.json` beside them may say the `spacing`.
    #[serde(rename = "Tiff3DIO")]
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

    /// The one of a class's name.
    #[must_use]
    pub fn of_class(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.name() == name)
    }

    /// The reader of a data set: the one it names, else by the ending of its files; one of them tells whether a `.tif` is a
    /// picture or a volume.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the ending or the class that there is nothing for; errors of the example.
    pub fn of(dataset: &DatasetJson, example: Option<&Path>) -> Result<Self> {
        if let Some(name) = &dataset.reader {
            if let Some(reader) = Self::of_class(name) {
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
            (".tif", Some(example)) if example.is_file() && natural::picture_size(example)?[0] > 1 => {
                Ok(Reader::Tiff3dIo)
            }
            (".png" | ".tif", _) => Ok(Reader::NaturalImage2dIo),
            (".tiff", _) => Ok(Reader::Tiff3dIo),
            (other, _) => Err(Error::unsupported(format!("images ending in {other:?}; .nii.gz, .nii, .png, .tif are"))),
        }
    }

    /// Reads a case's images.
    pub(in crate::nnunet) fn image(self, paths: &[PathBuf]) -> Result<Image> {
        match self {
            Reader::SimpleItkIo | Reader::NibabelIo => read_nifti(paths),
            Reader::NaturalImage2dIo => natural::read_pictures(paths),
            Reader::Tiff3dIo => natural::read_tiff_stacks(paths, spacing_of(first(paths)?)?),
        }
    }

    /// The grid of a case's images, of which no voxel is read.
    pub(in crate::nnunet) fn grid(self, paths: &[PathBuf]) -> Result<Geometry> {
        let first = first(paths)?;
        match self {
            Reader::SimpleItkIo | Reader::NibabelIo => read_nifti_header(first),
            Reader::NaturalImage2dIo => natural::picture_grid(first),
            Reader::Tiff3dIo => Ok(Geometry::new(natural::picture_size(first)?, spacing_of(first)?)),
        }
    }

    /// The grid of a label map, of which no voxel is read; `None` where nothing tells the spacing of a stack.
    pub(in crate::nnunet) fn label_grid(self, path: &Path) -> Result<Option<Geometry>> {
        match self {
            Reader::SimpleItkIo | Reader::NibabelIo => read_nifti_header(path).map(Some),
            Reader::NaturalImage2dIo => natural::picture_grid(path).map(Some),
            Reader::Tiff3dIo => {
                let Some(spacing_mm) = spacing_in(&label_sidecar(path))? else { return Ok(None) };
                Ok(Some(Geometry::new(natural::picture_size(path)?, spacing_mm)))
            }
        }
    }

    /// Writes a label map, as nnU-Net's class of the name does: NIfTI; a grey picture, PNG or TIFF by the ending; a TIFF stack
    /// and its spacing in `CASE.json`. Whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Usage`] for a volume that is to be a picture.
    pub fn write(self, path: &Path, segmentation: &Segmentation) -> Result<()> {
        match self {
            Reader::SimpleItkIo | Reader::NibabelIo => write_nifti(path, segmentation),
            Reader::NaturalImage2dIo => natural::write_picture(path, segmentation),
            Reader::Tiff3dIo => {
                // The stack last: where it is, its spacing is, too.
                let (sidecar, spacing) = (label_sidecar(path), segmentation.geometry.spacing_mm);
                json::write(&sidecar, &Json::object([("spacing", Json::list(spacing))]), true)?;
                natural::write_tiff_stack(path, segmentation)
            }
        }
    }

    /// Reads a label map.
    pub(in crate::nnunet) fn label(self, path: &Path) -> Result<Segmentation> {
        let image = match self {
            Reader::SimpleItkIo | Reader::NibabelIo => return read_segmentation(path),
            Reader::NaturalImage2dIo => natural::read_pictures(&[path])?,
            // Truths have no spacing of their own: it stands beside the images.
            Reader::Tiff3dIo => {
                natural::read_tiff_stacks(&[path], spacing_in(&label_sidecar(path))?.unwrap_or([1.0; 3]))?
            }
        };
        let [voxels] = image.channels.as_slice() else {
            let what = format!("{} channels, expected 1 for a label map", image.channels.len());
            return Err(Error::image(path, "channels", what));
        };
        crate::io::nifti::labels_of(path, voxels, image.geometry.clone())
    }
}

/// The spacing in mm (z, y, x) of an image that is a TIFF stack; 1 where nothing tells.
fn spacing_of(stack: &Path) -> Result<[f64; 3]> {
    let sidecar = sidecar(stack);
    let spacing_mm = spacing_in(&sidecar)?;
    if spacing_mm.is_none() {
        tracing::warn!("{}: missing; the spacing is taken to be 1 mm", sidecar.display());
    }
    Ok(spacing_mm.unwrap_or([1.0; 3]))
}

/// The spacing that stands in the file `sidecar`, if it is there.
fn spacing_in(sidecar: &Path) -> Result<Option<[f64; 3]>> {
    if !sidecar.is_file() {
        return Ok(None);
    }
    let value = json::read_dataset(sidecar)?;
    let spacing = Field::of_dataset(sidecar, &value).need("spacing")?;
    let spacing_mm = spacing.three(Field::f64)?;
    if spacing_mm.iter().any(|s| *s <= 0.0) {
        return Err(spacing.error("expected three lengths above 0"));
    }
    Ok(Some(spacing_mm))
}

/// Where the spacing of the TIFF stack at `stack` stands: `CASE.json` beside the image `CASE_0000.tif`, or `CASE.tif` that
/// says no channel.
#[must_use]
pub fn sidecar(stack: &Path) -> PathBuf {
    let name = stack.file_stem().unwrap_or_default().to_string_lossy();
    let case = split_channel(&name).map_or(&*name, |(case, _)| case);
    stack.with_file_name(format!("{case}.json"))
}

/// The same of a label map, whose name has no channel: what looks like one is the case's.
pub(in crate::nnunet) fn label_sidecar(map: &Path) -> PathBuf {
    map.with_extension("json")
}

fn first(paths: &[PathBuf]) -> Result<&Path> {
    paths.first().map(PathBuf::as_path).ok_or_else(|| Error::usage("no image file was given"))
}

#[cfg(feature = "natural")]
use crate::io::picture as natural;

/// What there is of pictures without the feature: errors.
#[cfg(not(feature = "natural"))]
mod natural {
    use std::path::Path;

    use super::{Error, Geometry, Image, Result, Segmentation};

    fn none<T>() -> Result<T> {
        Err(Error::unsupported("PNG and TIFF images: this program was built without the feature \"natural\""))
    }

    pub(super) fn read_pictures<P: AsRef<Path>>(_: &[P]) -> Result<Image> {
        none()
    }

    pub(super) fn read_tiff_stacks<P: AsRef<Path>>(_: &[P], _: [f64; 3]) -> Result<Image> {
        none()
    }

    pub(super) fn picture_grid(_: &Path) -> Result<Geometry> {
        none()
    }

    pub(super) fn picture_size(_: &Path) -> Result<[usize; 3]> {
        none()
    }

    pub(super) fn write_picture(_: &Path, _: &Segmentation) -> Result<()> {
        none()
    }

    pub(super) fn write_tiff_stack(_: &Path, _: &Segmentation) -> Result<()> {
        none()
    }
}
