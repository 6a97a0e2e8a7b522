//! The project's own form: one `CASE.safetensors` with the image (`data`, f32), the truth (`seg`, in the narrowest type),
//! the locations of its classes, and what preprocessing did. It is mapped, so a patch costs the pages that it lies in.

use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::StoredProperties;
use super::case::{Locations, StoredCase};
use crate::error::{Error, Result};
use crate::io::Geometry;
use crate::io::boxes::{Boxes, Flat};
use crate::io::sealed::{self, Held};
use crate::io::weights::{Weights, printable};
use crate::nnunet::preprocess::{PreprocessedCase, Properties};
use crate::nnunet::training_case::ClassKey;
use crate::tensor::DType;

/// The key of the description in the header.
const TEXT: &str = "case";
const VERSION: u32 = 1;

/// What the header says beside the tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    version: u32,
    /// What made the file: [`super::dataset`] compares it.
    fingerprint: String,
    properties: Preprocessing,
    image: ImageGrid,
    /// Every class with its number of locations, which lie one after the other in `locations`.
    classes: Vec<(Vec<i16>, bool, usize)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Preprocessing {
    spacing_mm: [f64; 3],
    shape_before_cropping: [usize; 3],
    bbox: [[usize; 2]; 3],
    shape_after_cropping: [usize; 3],
}

#[derive(Debug, Serialize, Deserialize)]
struct ImageGrid {
    shape: [usize; 3],
    spacing_mm: [f64; 3],
    affine: [[f64; 4]; 3],
    header: Option<Vec<u8>>,
}

/// Writes a case; the file appears under its name only when it is whole.
///
/// `fingerprint` says what made it.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn write(path: &Path, case: &PreprocessedCase, image: &Geometry, fingerprint: &str) -> Result<()> {
    let [z, y, x] = case.image.shape;
    let p = &case.image.properties;
    let classes = case.locations.classes.iter().map(|(class, voxels)| match class {
        ClassKey::Label(label) => (vec![*label], false, voxels.len()),
        ClassKey::Region(labels) => (labels.clone(), true, voxels.len()),
    });
    let description = Description {
        version: VERSION,
        fingerprint: fingerprint.into(),
        properties: Preprocessing {
            spacing_mm: p.spacing_mm,
            shape_before_cropping: p.shape_before_cropping,
            bbox: p.bbox,
            shape_after_cropping: p.shape_after_cropping,
        },
        image: ImageGrid {
            shape: image.shape,
            spacing_mm: image.spacing_mm,
            affine: image.affine,
            header: image.header.clone(),
        },
        classes: classes.collect(),
    };
    let text = serde_json::to_string(&description).map_err(|e| Error::model(path, "case", e.to_string()))?;
    let locations: Vec<i32> =
        case.locations.classes.iter().flat_map(|(_, v)| v.as_flattened()).map(|&v| v as i32).collect();
    let narrow = narrowed(&case.labels);
    let tensor = |name, dtype, shape, bytes| Held { name, dtype, shape, bytes };
    let tensors = [
        tensor("data", Dtype::F32, vec![case.image.channels, z, y, x], bytemuck::cast_slice(&case.image.data)),
        tensor("locations", Dtype::I32, vec![locations.len() / 3, 3], bytemuck::cast_slice(&locations)),
        labels_held(&case.labels, narrow.as_deref(), case.image.shape),
    ];
    sealed::write_held(path, &[(TEXT, text)], &tensors)
}

/// An open file.
pub(super) struct OwnFile {
    weights: Arc<Weights>,
    description: Description,
}

impl OwnFile {
    /// Opens a file; `checked` also reads all of it and compares its SHA-256.
    pub(super) fn open(path: &Path, checked: bool) -> Result<Self> {
        let (weights, texts) = if checked { sealed::open(path)? } else { sealed::open_unread(path)? };
        let bad = |what: String| Error::model(path, "case", what);
        let text = texts.get(TEXT).ok_or_else(|| bad("no description: not a preprocessed case".into()))?;
        let description: Description = serde_json::from_str(text).map_err(|e| bad(printable(&e.to_string())))?;
        if description.version != VERSION {
            return Err(bad(format!("version {}, expected {VERSION}: preprocess it again", description.version)));
        }
        let (p, image) = (&description.properties, &description.image);
        let boxed = (0..3).all(|k| {
            let [lo, hi] = p.bbox[k];
            lo < hi && hi <= p.shape_before_cropping[k] && p.shape_after_cropping[k] == hi - lo
        });
        let spacing = p.spacing_mm.iter().chain(&image.spacing_mm).all(|s| s.is_finite() && *s > 0.0);
        let voxels = image.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d).filter(|n| *n > 0));
        if !boxed || !spacing || voxels.is_none() {
            return Err(bad("sizes, box and spacings do not fit each other: preprocess it again".into()));
        }
        Ok(Self { weights: Arc::new(weights), description })
    }

    /// What made it.
    pub(super) fn fingerprint(&self) -> &str {
        &self.description.fingerprint
    }

    /// What preprocessing did, and the grid of the image.
    pub(super) fn properties(&self) -> StoredProperties {
        let (p, image) = (&self.description.properties, &self.description.image);
        let mut geometry = Geometry::new(image.shape, image.spacing_mm);
        geometry.affine = image.affine;
        geometry.header.clone_from(&image.header);
        let preprocessing = Properties {
            spacing_mm: p.spacing_mm,
            shape_before_cropping: p.shape_before_cropping,
            bbox: p.bbox,
            shape_after_cropping: p.shape_after_cropping,
        };
        StoredProperties { preprocessing, geometry }
    }

    /// The case, with what the stage before predicted.
    pub(super) fn case(&self, previous: Option<Box<dyn Boxes>>) -> Result<StoredCase> {
        let labels = std::iter::once(array(&self.weights, "seg")?).chain(previous).collect();
        StoredCase::new(self.weights.path(), array(&self.weights, "data")?, labels, self.locations()?)
    }

    /// The locations stay in the file.
    fn locations(&self) -> Result<Locations> {
        let bad = |what: &str| Error::model(self.weights.path(), "locations", what);
        let rows = match self.weights.shape("locations") {
            Some([rows, 3]) if self.weights.dtype("locations") == Some(DType::I32) => *rows,
            _ => return Err(bad("expected rows of three 32-bit integers")),
        };
        let (mut classes, mut first) = (Vec::new(), 0usize);
        for (labels, region, n) in &self.description.classes {
            let one = labels.first().ok_or_else(|| bad("a class without labels"))?;
            let key = if *region { ClassKey::Region(labels.clone()) } else { ClassKey::Label(*one) };
            classes.push((key, first, *n));
            first = first
                .checked_add(*n)
                .filter(|end| *end <= rows)
                .ok_or_else(|| bad("fewer voxels than the classes have by the description"))?;
        }
        Ok(Locations::Mapped(Arc::clone(&self.weights), classes))
    }
}

/// Writes a label map without an image: what a stage of a cascade predicts for the next.
///
/// # Errors
/// [`Error::Shape`] when there are not as many labels as voxels, [`Error::Io`].
pub(super) fn write_labels(path: &Path, labels: &[i16], shape: [usize; 3]) -> Result<()> {
    sealed::write_held(path, &[], &[labels_held(labels, narrowed(labels).as_deref(), shape)])
}

/// The label map of a file, whatever else it holds.
pub(super) fn open_labels(path: &Path) -> Result<Box<dyn Boxes>> {
    array(&Arc::new(sealed::open_unread(path)?.0), "seg")
}

fn narrowed(labels: &[i16]) -> Option<Vec<i8>> {
    labels.iter().map(|&l| i8::try_from(l).ok()).collect()
}

fn labels_held<'a>(labels: &'a [i16], narrow: Option<&'a [i8]>, [z, y, x]: [usize; 3]) -> Held<'a> {
    let (dtype, bytes) = match narrow {
        Some(labels) => (Dtype::I8, bytemuck::cast_slice(labels)),
        None => (Dtype::I16, bytemuck::cast_slice(labels)),
    };
    Held { name: "seg", dtype, shape: vec![1, z, y, x], bytes }
}

/// The tensor `name` of four axes.
fn array(weights: &Arc<Weights>, name: &str) -> Result<Box<dyn Boxes>> {
    let shape = weights.shape(name).and_then(|s| <[usize; 4]>::try_from(s).ok());
    let flat = match (weights.start(name), weights.dtype(name), shape) {
        (Some(start), Some(dtype), Some(shape)) => Flat::new(weights.clone(), start, dtype, shape),
        _ => None,
    };
    let what = "missing, or not of four axes (channel, z, y, x)";
    Ok(Box::new(flat.ok_or_else(|| Error::model(weights.path(), name, what))?))
}
