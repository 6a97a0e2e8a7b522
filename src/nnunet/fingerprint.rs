//! What the planner knows of a data set: spacings, shapes and foreground intensities (nnU-Net
//! `DatasetFingerprintExtractor`).

mod statistics;

use std::path::Path;

use crate::base::json::Json;
use crate::base::mt19937::RandomState;
use crate::base::progress::Progress;
use crate::error::{Error, Result};
use crate::io::{Image, Segmentation};
use crate::nnunet::dataset::{Dataset, RawCase};
use crate::nnunet::json::{self, Field};
use crate::nnunet::preprocess::crop;
use crate::nnunet::preprocess::resample::View;
use crate::nnunet::workers;
use crate::tensor::Device;
use statistics::Statistics;
pub(crate) use statistics::pairwise;

/// The file's name in a data set's folder below `nnUNet_preprocessed`.
pub const FILE: &str = "dataset_fingerprint.json";

/// Foreground voxels drawn from all cases together, for each channel.
const SAMPLES: usize = 100_000_000;

/// nnU-Net's seed of these draws.
const SEED: u32 = 1234;

/// A data set's fingerprint.
#[derive(Debug, Clone, PartialEq)]
pub struct Fingerprint {
    /// Spacing of each case in mm along its own (z, y, x).
    pub spacings_mm: Vec<[f64; 3]>,
    /// Voxels of each case along (z, y, x) after the crop to its nonzero region.
    pub shapes: Vec<[usize; 3]>,
    /// Median over the cases of the part of its voxels that the crop leaves.
    pub median_relative_size: f64,
    /// `foreground_intensity_properties_per_channel` as it stands in the file.
    pub(crate) intensities: Json,
}

/// Longer than any image; keeps products of sizes far from overflow.
const MAX_EDGE: usize = 1 << 20;

/// What one case gives.
struct Case {
    spacing_mm: [f64; 3],
    shape: [usize; 3],
    relative_size: f64,
    /// For each channel the values drawn, none without foreground.
    samples: Vec<Vec<f32>>,
}

impl Fingerprint {
    /// Reads every case of a data set.
    ///
    /// As many cases as the device has threads are in memory at once, and 400 MB of values drawn for each channel, however
    /// large the data set is.
    ///
    /// # Errors
    /// [`Error::Dataset`] naming the case whose files are missing, do not fit each other or hold values that are no numbers,
    /// and what else [`Dataset::image`] and [`Dataset::label`] say; [`Error::Cancelled`].
    pub fn extract(dataset: &Dataset, device: &Device, progress: &mut dyn Progress) -> Result<Self> {
        Self::of_samples(dataset, device, progress, SAMPLES)
    }

    fn of_samples(dataset: &Dataset, device: &Device, progress: &mut dyn Progress, samples: usize) -> Result<Self> {
        dataset.check_files()?;
        let cases = &dataset.cases;
        let per_case = (samples / cases.len().max(1)).max(1);
        let mut cases = workers::map(device, cases.len(), progress, |i| {
            let case = &cases[i];
            let (image, label) = (dataset.image(case)?, dataset.label(case)?);
            analyze(dataset, case, &image, &label, per_case)
        })?;
        if cases.iter().all(|c| c.samples.iter().all(Vec::is_empty)) {
            let what = "no label map has a foreground voxel, expected labels above 0";
            return Err(Error::dataset(&dataset.folder, "labelsTr", what));
        }
        let channel = |number: usize| {
            let parts = cases.iter_mut().map(|c| std::mem::take(&mut c.samples[number])).collect();
            let statistics = device.install(|| Statistics::of(parts));
            (number.to_string(), statistics.to_json())
        };
        let intensities = Json::Object((0..dataset.json.channels.len()).map(channel).collect());
        let mut sizes: Vec<f64> = cases.iter().map(|c| c.relative_size).collect();
        Ok(Self {
            spacings_mm: cases.iter().map(|c| c.spacing_mm).collect(),
            shapes: cases.iter().map(|c| c.shape).collect(),
            median_relative_size: median(&mut sizes),
            intensities,
        })
    }

    /// Reads a `dataset_fingerprint.json`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Dataset`] naming the key that is missing or of the wrong kind.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(path, &json::read_dataset(path)?)
    }

    /// The fingerprint `value` of `file`.
    ///
    /// # Errors
    /// As [`Fingerprint::read`].
    pub fn of(file: &Path, value: &serde_json::Value) -> Result<Self> {
        let root = Field::of_dataset(file, value);
        let length = |f: &Field<'_>| match f.f64()? {
            v if v > 0.0 => Ok(v),
            v => Err(f.error(format!("{v}, expected a spacing above 0"))),
        };
        let voxels = |f: &Field<'_>| match f.usize(MAX_EDGE)? {
            0 => Err(f.error("0, expected at least one voxel")),
            n => Ok(n),
        };
        let spacings = root.need("spacings")?;
        let shapes = root.need("shapes_after_crop")?;
        let spacings_mm: Vec<_> = spacings.items()?.iter().map(|s| s.three(length)).collect::<Result<_>>()?;
        let found: Vec<_> = shapes.items()?.iter().map(|s| s.three(voxels)).collect::<Result<_>>()?;
        if found.is_empty() || found.len() != spacings_mm.len() {
            let (n, of) = (found.len(), spacings_mm.len());
            return Err(shapes.error(format!("{n} shapes for {of} spacings, expected as many, at least one")));
        }
        let intensities = root.need("foreground_intensity_properties_per_channel")?;
        intensities.entries()?;
        Ok(Self {
            spacings_mm,
            shapes: found,
            median_relative_size: root.need("median_relative_size_after_cropping")?.f64()?,
            intensities: intensities.value.into(),
        })
    }

    /// Writes the `dataset_fingerprint.json` that nnU-Net would write.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let value = Json::object([
            ("foreground_intensity_properties_per_channel", self.intensities.clone()),
            ("median_relative_size_after_cropping", self.median_relative_size.into()),
            ("shapes_after_crop", Json::list(self.shapes.iter().map(|s| Json::list(*s)))),
            ("spacings", Json::list(self.spacings_mm.iter().map(|s| Json::list(*s)))),
        ]);
        // Keys in order by hand: Python sorts those of channels as the numbers that they are.
        json::write(path, &value, false)
    }
}

fn analyze(dataset: &Dataset, case: &RawCase, image: &Image, label: &Segmentation, per_case: usize) -> Result<Case> {
    let (shape, of_label) = (image.geometry.shape, label.geometry.shape);
    if shape != of_label {
        let what = format!("the label map has {of_label:?} voxels (z, y, x), the image {shape:?}");
        return Err(dataset.fault(case, what));
    }
    let whole = View::whole(shape);
    let found = crop::scan(&image.channels, &whole);
    for (number, (nan, infinite)) in found.nan.iter().zip(&found.infinite).enumerate() {
        if nan + infinite > 0 {
            let (name, n) = (&dataset.json.channels[number], nan + infinite);
            let what =
                format!("channel {number} ({name}): {n} voxels are NaN or infinite; put a number in their place");
            return Err(dataset.fault(case, what));
        }
    }
    let bbox = found.bbox.unwrap_or(shape.map(|n| [0, n]));
    let view = whole.cropped(bbox);
    let mut rng = RandomState::new(SEED);
    let sample = |channel: &Vec<f32>| {
        let values = foreground(channel, label, bbox);
        let draws = if values.is_empty() { 0 } else { per_case };
        (0..draws).map(|_| values[rng.below(values.len())]).collect()
    };
    Ok(Case {
        spacing_mm: image.geometry.spacing_mm,
        shape: view.shape,
        relative_size: view.shape.iter().product::<usize>() as f64 / shape.iter().product::<usize>() as f64,
        samples: image.channels.iter().map(sample).collect(),
    })
}

/// Values inside `bbox` whose label is not background, in the order of the array.
fn foreground(channel: &[f32], label: &Segmentation, bbox: [[usize; 2]; 3]) -> Vec<f32> {
    let [_, ny, nx] = label.geometry.shape;
    let [zs, ys, [x0, x1]] = bbox;
    let mut out = Vec::new();
    for z in zs[0]..zs[1] {
        for y in ys[0]..ys[1] {
            let row = (z * ny + y) * nx;
            let inside = (row + x0..row + x1).filter(|&i| label.labels.get(i) > 0);
            out.extend(inside.map(|i| channel[i]));
        }
    }
    out
}

/// `numpy.median`.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n % 2 == 1 { values[n / 2] } else { (values[n / 2 - 1] + values[n / 2]) / 2.0 }
}

/// `numpy.percentile` of float64.
pub(crate) fn percentile(values: &mut [f64], percent: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = (values.len() - 1) as f64 * (percent / 100.0);
    let (low, high) = (values[place as usize], values[(place as usize + 1).min(values.len() - 1)]);
    statistics::interpolate(low, high, high - low, place.fract())
}
