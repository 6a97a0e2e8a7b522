//! nnU-Net's own forms of a preprocessed case, read, and the oldest of them written: `CASE.npz` with `data` and `seg`, and
//! `CASE.pkl` with what preprocessing did (nnU-Net `nnUNetDatasetNumpy`, `nnUNetDatasetBlosc2`).

use std::io::Write;
use std::path::Path;

use serde_json::Value;

use super::case::{Locations, StoredCase, file};
use super::{Form, StoredProperties};
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::b2nd::B2nd;
use crate::io::boxes::{Boxes, Flat};
use crate::io::npy::{npz_shape, open_npy, read_npz};
use crate::io::pth::write::{Py, dict, pickled};
use crate::io::pth::{View, read_case_pickle};
use crate::io::{Geometry, write_npz};
use crate::nnunet::preprocess::{PreprocessedCase, Properties};
use crate::nnunet::training_case::{ClassKey, ClassLocations};

/// Voxels of a class that are read; nnU-Net keeps 1 % of it.
const MAX_VOXELS: usize = 1 << 26;

/// Opens a case.
pub(super) fn case(
    folder: &Path,
    identifier: &str,
    form: Form,
    previous: Option<Box<dyn Boxes>>,
) -> Result<StoredCase> {
    let path = |ending: &str| file(folder, identifier, ending);
    let (data, truth): (Box<dyn Boxes>, Box<dyn Boxes>) = match form {
        Form::Blosc => (Box::new(B2nd::open(&path(".b2nd"))?), Box::new(B2nd::open(&path("_seg.b2nd"))?)),
        Form::Npy => (Box::new(open_npy(&path(".npy"))?), Box::new(open_npy(&path("_seg.npy"))?)),
        _ => (Box::new(entry(&path(".npz"), "data")?), Box::new(entry(&path(".npz"), "seg")?)),
    };
    let pickle = path(".pkl");
    let locations = locations(&pickle)?;
    StoredCase::new(&pickle, data, std::iter::once(truth).chain(previous).collect(), Locations::Held(locations))
}

/// The label map that the stage before of a cascade predicted.
pub(super) fn labels_alone(path: &Path) -> Result<Box<dyn Boxes>> {
    Ok(match path.extension().and_then(|e| e.to_str()) {
        Some("b2nd") => Box::new(B2nd::open(path)?),
        Some("npy") => Box::new(open_npy(path)?),
        _ => Box::new(entry(path, "seg")?),
    })
}

/// Voxels (z, y, x) of a case, without unpacking it.
pub(super) fn shape(folder: &Path, identifier: &str, form: Form) -> Result<[usize; 3]> {
    let path = |ending: &str| file(folder, identifier, ending);
    let [_, z, y, x] = match form {
        Form::Blosc => B2nd::open(&path(".b2nd"))?.shape(),
        Form::Npy => open_npy(&path(".npy"))?.shape(),
        _ => npz_shape(&path(".npz"), "seg")?,
    };
    Ok([z, y, x])
}

fn entry(path: &Path, name: &str) -> Result<Flat> {
    read_npz(path, name)?.ok_or_else(|| Error::model(path, name, "no array of this name in the archive"))
}

/// The `class_locations` of a pickle of properties.
fn locations(path: &Path) -> Result<ClassLocations> {
    let pickle = read_case_pickle(path)?;
    let bad = |what: &str| Error::model(path, "class_locations", what.to_string());
    let entries = pickle.root().get("class_locations").and_then(View::entries);
    let entries = entries.ok_or_else(|| bad("missing, expected a dictionary of voxels by class"))?;
    let mut classes: Vec<(ClassKey, Vec<[u32; 3]>)> = Vec::new();
    // Every row of four takes at least as many bytes, but a pickle may name one array many times.
    let mut left = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?.len() / 4;
    for (key, voxels) in entries {
        let label = |v: &Value| v.as_i64().and_then(|l| i16::try_from(l).ok());
        let class = match key.to_json(1 << 16) {
            Some(Value::Array(labels)) => {
                labels.iter().map(label).collect::<Option<Vec<i16>>>().filter(|l| !l.is_empty()).map(ClassKey::Region)
            }
            Some(key) => label(&key).map(ClassKey::Label),
            None => None,
        };
        let class = class.ok_or_else(|| bad("a key that is neither a label nor a tuple of labels"))?;
        let found = voxels.integers(4 * MAX_VOXELS);
        let Some(([rows, columns], flat)) = found.filter(|([n, m], _)| *n == 0 || *m == 4) else {
            return Err(bad("expected an array of integers with rows of four (0, z, y, x)"));
        };
        left = left.checked_sub(rows as u64).ok_or_else(|| bad("more voxels than the file has room for"))?;
        if classes.iter().any(|(known, _)| *known == class) {
            return Err(bad("a class that is there twice"));
        }
        let rows = flat.chunks_exact(columns.max(1)).take(rows);
        let voxels = rows.map(|r| {
            let at = |i: usize| u32::try_from(r[i]).ok();
            Some([at(1)?, at(2)?, at(3)?])
        });
        let voxels: Option<Vec<[u32; 3]>> = voxels.collect();
        classes.push((class, voxels.ok_or_else(|| bad("a voxel outside of any case"))?));
    }
    Ok(ClassLocations { classes })
}

/// What a pickle of properties says of grids.
pub(super) fn properties(path: &Path, transpose_backward: [usize; 3]) -> Result<StoredProperties> {
    let pickle = read_case_pickle(path)?;
    let root = pickle.root();
    let need = |key: &'static str| {
        let bad = move || Error::model(path, key, "missing, or not the numbers that nnU-Net writes");
        let value = root.get(key).and_then(|v| v.to_json(64)).ok_or_else(bad)?;
        Ok((value, bad))
    };
    let sizes = |v: &Value| -> Option<[usize; 3]> {
        let list: Option<Vec<usize>> = v.as_array()?.iter().map(|n| usize::try_from(n.as_u64()?).ok()).collect();
        list?.try_into().ok()
    };
    let shape = |key: &'static str| -> Result<[usize; 3]> {
        let (value, bad) = need(key)?;
        sizes(&value).ok_or_else(bad)
    };
    let shape_before_cropping = shape("shape_before_cropping")?;
    let shape_after_cropping = shape("shape_after_cropping_and_before_resampling")?;
    let (value, bad) = need("bbox_used_for_cropping")?;
    let pair = |v: &Value| -> Option<[usize; 2]> {
        let list: Option<Vec<usize>> = v.as_array()?.iter().map(|n| usize::try_from(n.as_u64()?).ok()).collect();
        list?.try_into().ok()
    };
    let bbox: Option<Vec<[usize; 2]>> = value.as_array().and_then(|l| l.iter().map(pair).collect());
    let bbox: [[usize; 2]; 3] = bbox.and_then(|b| b.try_into().ok()).ok_or_else(bad)?;
    let inside = (0..3).all(|k| {
        let [lo, hi] = bbox[k];
        lo < hi && hi <= shape_before_cropping[k] && hi - lo == shape_after_cropping[k]
    });
    if !inside {
        let what = format!("{bbox:?} of {shape_before_cropping:?} voxels does not give {shape_after_cropping:?}");
        return Err(Error::model(path, "bbox_used_for_cropping", what));
    }
    let image_shape = transpose_backward.map(|k| shape_before_cropping.get(k).copied().unwrap_or(0));
    let geometry = grid(root, path, image_shape)?;
    let spacing_mm = geometry.spacing_mm;
    let preprocessing = Properties { spacing_mm, shape_before_cropping, bbox, shape_after_cropping };
    Ok(StoredProperties { preprocessing, geometry })
}

/// The grid of an image of `shape` voxels (z, y, x), as such a file tells it.
pub(in crate::nnunet) fn read_grid(path: &Path, shape: [usize; 3]) -> Result<Geometry> {
    let pickle = read_case_pickle(path)?;
    grid(pickle.root(), path, shape)
}

fn grid(root: View<'_>, path: &Path, shape: [usize; 3]) -> Result<Geometry> {
    let spacing = root.get("spacing").and_then(|s| s.to_json(64)).and_then(|s| floats(&s));
    let bad = || Error::model(path, "spacing", "missing, or not the numbers that nnU-Net writes");
    let mut geometry = Geometry::new(shape, spacing.ok_or_else(bad)?);
    if let Some(affine) = affine(root, path)? {
        geometry.affine = affine;
    }
    Ok(geometry)
}

fn floats<const N: usize>(v: &Value) -> Option<[f64; N]> {
    let list: Option<Vec<f64>> = v.as_array()?.iter().map(Value::as_f64).collect();
    list?.try_into().ok()
}

/// Where the voxels lie, as the reader of the image noted it; `None` for readers of pictures, which have no place.
fn affine(root: View<'_>, path: &Path) -> Result<Option<[[f64; 4]; 3]>> {
    if let Some(itk) = root.get("sitk_stuff") {
        let bad = || Error::model(path, "sitk_stuff", "expected spacing, origin and direction of three axes");
        let get = |key: &str| itk.get(key).and_then(|v| v.to_json(16));
        // Flat pictures have two axes here.
        let (Some(spacing), Some(origin), Some(direction)) = (get("spacing"), get("origin"), get("direction")) else {
            return Err(bad());
        };
        if spacing.as_array().is_some_and(|s| s.len() == 2) {
            return Ok(None);
        }
        let parts = (floats::<3>(&spacing), floats::<3>(&origin), floats::<9>(&direction));
        let (Some(spacing), Some(origin), Some(direction)) = parts else { return Err(bad()) };
        // ITK's patient axes are left, posterior, superior.
        let sign = [-1.0, -1.0, 1.0];
        let entry = |i: usize, j: usize| match j {
            3 => sign[i] * origin[i],
            _ => sign[i] * direction[3 * i + j] * spacing[j],
        };
        return Ok(Some(std::array::from_fn(|i| std::array::from_fn(|j| entry(i, j)))));
    }
    let Some(nibabel) = root.get("nibabel_stuff") else { return Ok(None) };
    let rows = nibabel.get("original_affine").and_then(|a| a.to_json(256));
    let rows: Option<Vec<[f64; 4]>> =
        rows.as_ref().and_then(Value::as_array).and_then(|r| r.iter().map(floats).collect());
    match rows.as_deref() {
        Some(&[x, y, z, _]) => Ok(Some([x, y, z])),
        _ => Err(Error::model(path, "nibabel_stuff.original_affine", "expected a matrix of 4 x 4 numbers")),
    }
}

/// Key of the pickle by which a case is known again; nnU-Net looks at the keys that it knows.
const MADE_BY: &str = "stunet_fingerprint";

/// What made a case; `None` when its archive is missing.
pub(super) fn made_by(folder: &Path, identifier: &str) -> Option<String> {
    let pickle = read_case_pickle(&file(folder, identifier, ".pkl")).ok()?;
    let made = pickle.root().get(MADE_BY)?.str()?;
    file(folder, identifier, ".npz").is_file().then(|| made.to_string())
}

/// Writes what a stage of a cascade predicted for the next as nnU-Net's `save_seg` does.
pub(super) fn write_labels(path: &Path, labels: &[i16], shape: [usize; 3]) -> Result<()> {
    write_npz(path, |npz| npz.array("seg", &shape, |a| a.push(labels)))
}

/// Writes the archive, by which cases are found, last; an old one must not be taken for what the new pickle tells of.
pub(super) fn write(
    folder: &Path,
    identifier: &str,
    case: &PreprocessedCase,
    image: &Geometry,
    fingerprint: &str,
) -> Result<()> {
    let archive = file(folder, identifier, ".npz");
    if archive.exists() {
        std::fs::remove_file(&archive).map_err(|e| Error::io("remove", &archive, e))?;
    }
    let mut properties = python_properties(&case.image.properties, image);
    properties.push(("class_locations", python_locations(case)));
    properties.push((MADE_BY, Py::Str(fingerprint.into())));
    write_pickle(&file(folder, identifier, ".pkl"), properties)?;
    let [z, y, x] = case.image.shape;
    write_npz(&archive, |npz| {
        npz.array("data", &[case.image.channels, z, y, x], |a| a.push(&case.image.data))?;
        npz.array("seg", &[1, z, y, x], |a| a.push(&case.labels))
    })
}

/// Writes to `path` what nnU-Net asks for beside a prediction's probabilities: the grid of the image and what preprocessing
/// did to it, as a pickle of plain Python (nnU-Net `export_prediction_from_logits`).
///
/// # Errors
/// [`Error::Io`].
pub fn write_properties(path: &Path, properties: &Properties, image: &Geometry) -> Result<()> {
    write_pickle(path, python_properties(properties, image))
}

/// As [`write_properties`] where no preprocessing is known of.
pub(in crate::nnunet) fn write_grid(path: &Path, image: &Geometry) -> Result<()> {
    write_pickle(path, python_grid(image))
}

fn write_pickle(path: &Path, entries: Vec<(&str, Py)>) -> Result<()> {
    let entries = entries.into_iter().map(|(key, value)| (Py::Str(key.into()), value)).collect();
    let bytes = pickled(&Py::Dict(entries))?;
    write_atomically(path, |file| file.write_all(&bytes).map_err(|e| Error::io("write", path, e)))
}

/// Voxels by class.
fn python_locations(case: &PreprocessedCase) -> Py {
    let classes = case.locations.classes.iter().map(|(class, voxels)| {
        let key = match class {
            ClassKey::Label(label) => Py::Int(i64::from(*label)),
            ClassKey::Region(labels) => Py::Tuple(labels.iter().map(|l| Py::Int(i64::from(*l))).collect()),
        };
        let rows = voxels.iter().map(|&[z, y, x]| [0, i64::from(z), i64::from(y), i64::from(x)]);
        // nnU-Net's own form of a class that is not there.
        (key, if voxels.is_empty() { Py::List(Vec::new()) } else { Py::Rows(rows.collect()) })
    });
    Py::Dict(classes.collect())
}

fn floats_of(f: &[f64]) -> Vec<Py> {
    f.iter().map(|f| Py::Float(*f)).collect()
}

/// The grid of an image, and what preprocessing did to it.
fn python_properties(p: &Properties, image: &Geometry) -> Vec<(&'static str, Py)> {
    let int = |n: &usize| Py::Int(*n as i64);
    let ints = |n: &[usize]| n.iter().map(int).collect::<Vec<_>>();
    let mut out = python_grid(image);
    out.extend([
        ("shape_before_cropping", Py::Tuple(ints(&p.shape_before_cropping))),
        ("bbox_used_for_cropping", Py::List(p.bbox.iter().map(|b| Py::List(ints(b))).collect())),
        ("shape_after_cropping_and_before_resampling", Py::Tuple(ints(&p.shape_after_cropping))),
    ]);
    out
}

/// What nnU-Net's readers of images note of a grid: `SimpleITKIO` and `NibabelIO`.
fn python_grid(image: &Geometry) -> Vec<(&'static str, Py)> {
    let [sz, sy, sx] = image.spacing_mm;
    let sign = [-1.0, -1.0, 1.0];
    let column = |j: usize| [0, 1, 2].map(|i| image.affine[i][j]);
    // Of the affine, which may differ a little from what the header states as spacing.
    let length = |j: usize| column(j).iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    let direction: Vec<f64> = (0..9).map(|n| sign[n / 3] * column(n % 3)[n / 3] / length(n % 3)).collect();
    let origin: Vec<f64> = (0..3).map(|i| sign[i] * column(3)[i]).collect();
    let itk = dict([
        ("spacing", Py::Tuple(floats_of(&[sx, sy, sz]))),
        ("origin", Py::Tuple(floats_of(&origin))),
        ("direction", Py::Tuple(floats_of(&direction))),
    ]);
    // NIfTI's own axes, for models whose images nnU-Net reads by nibabel.
    let rows = image.affine.iter().chain([&[0.0, 0.0, 0.0, 1.0]]).map(|row| Py::List(floats_of(row))).collect();
    vec![
        ("sitk_stuff", itk),
        ("nibabel_stuff", dict([("original_affine", Py::List(rows))])),
        ("spacing", Py::List(floats_of(&image.spacing_mm))),
    ]
}
