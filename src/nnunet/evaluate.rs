//! How well segmentations agree with the truth: nnU-Net's `compute_metrics_on_folder` and its `summary.json`, and how far
//! surfaces lie apart.

pub(crate) mod folder;
#[cfg(feature = "picture")]
mod html;
pub mod surface;
mod table;

use std::collections::BTreeMap;
use std::path::Path;

use super::json;
use super::labels::{GivenRegion, LabelSet};
use crate::base::json::Json;
use crate::error::{Error, Result};
use crate::io::{LabelData, Segmentation};
use crate::nnunet::fingerprint::pairwise;
pub use folder::{CompareOptions, Evaluation, Folders, Numbers};
#[cfg(feature = "picture")]
pub use html::Shown;
pub use table::ClassMeans;

/// A label, or the labels of a region, that metrics are computed of.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Class {
    /// As `summary.json` calls it: "1", or "(1, 2)" of a region.
    pub key: String,
    /// Its label values.
    pub labels: Vec<u16>,
}

impl Class {
    /// What nnU-Net evaluates of a data set: all labels but background, or all regions.
    #[must_use]
    pub fn of(labels: &LabelSet) -> Vec<Class> {
        let class = |region| match region {
            GivenRegion::Number(label) => Class::label(label),
            GivenRegion::List(labels) => Class::region(labels.to_vec()),
        };
        match labels.given_regions() {
            None => labels.foreground_labels().iter().copied().map(Class::label).collect(),
            Some(regions) => regions.into_iter().map(class).collect(),
        }
    }

    /// Which of `classes` are not there before: nnU-Net keeps numbers by key, so that what is asked for twice counts once.
    pub(super) fn first_of_each(classes: &[Class]) -> Vec<usize> {
        (0..classes.len()).filter(|&i| classes[..i].iter().all(|c| c.key != classes[i].key)).collect()
    }

    /// One label.
    #[must_use]
    pub fn label(value: u16) -> Class {
        Class { key: value.to_string(), labels: vec![value] }
    }

    /// The labels of a region, named as Python shows a tuple.
    #[must_use]
    pub fn region(labels: Vec<u16>) -> Class {
        let values: Vec<String> = labels.iter().map(u16::to_string).collect();
        let key = match values.as_slice() {
            [one] => format!("({one},)"),
            all => format!("({})", all.join(", ")),
        };
        Class { key, labels }
    }
}

/// Voxels of one class by what became of them, and what follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Metrics {
    /// In both.
    pub tp: u64,
    /// Predicted, not true.
    pub fp: u64,
    /// True, not predicted.
    pub fn_: u64,
    /// In neither.
    pub tn: u64,
}

impl Metrics {
    /// `2 TP / (2 TP + FP + FN)`; NaN for a class that is in neither.
    #[must_use]
    pub fn dice(&self) -> f64 {
        2.0 * self.tp as f64 / (2 * self.tp + self.fp + self.fn_) as f64
    }

    /// `TP / (TP + FP + FN)`; NaN for a class that is in neither.
    #[must_use]
    pub fn iou(&self) -> f64 {
        self.tp as f64 / (self.tp + self.fp + self.fn_) as f64
    }

    /// The numbers of `summary.json`, by name.
    fn all(&self) -> [(&'static str, f64); 8] {
        [
            ("Dice", self.dice()),
            ("FN", self.fn_ as f64),
            ("FP", self.fp as f64),
            ("IoU", self.iou()),
            ("TN", self.tn as f64),
            ("TP", self.tp as f64),
            ("n_pred", (self.tp + self.fp) as f64),
            ("n_ref", (self.tp + self.fn_) as f64),
        ]
    }
}

/// The metrics of `classes` in one case. Voxels that the truth marks with the label `ignore` do not count.
///
/// # Errors
/// [`Error::Shape`] when the grids have other sizes.
pub fn compare(
    truth: &Segmentation,
    prediction: &Segmentation,
    classes: &[Class],
    ignore: Option<u16>,
) -> Result<Vec<Metrics>> {
    check_shapes(truth, prediction)?;
    let pairs = pairs(&truth.labels, &prediction.labels);
    let counted = || pairs.iter().filter(|((t, _), _)| Some(*t) != ignore);
    let total: u64 = counted().map(|(_, n)| n).sum();
    let of = |class: &Class| {
        let mut m = Metrics::default();
        for ((t, p), n) in counted() {
            match (class.labels.contains(t), class.labels.contains(p)) {
                (true, true) => m.tp += n,
                (false, true) => m.fp += n,
                (true, false) => m.fn_ += n,
                (false, false) => {}
            }
        }
        m.tn = total - m.tp - m.fp - m.fn_;
        m
    };
    Ok(classes.iter().map(of).collect())
}

fn check_shapes(truth: &Segmentation, prediction: &Segmentation) -> Result<()> {
    let (a, b) = (truth.geometry.shape, prediction.geometry.shape);
    if a == b {
        return Ok(());
    }
    Err(Error::shape("evaluation", format!("a prediction of {b:?} voxels for a truth of {a:?}")))
}

/// How many voxels have which two labels. Neighbours are mostly alike, so runs of them are counted.
fn pairs(a: &LabelData, b: &LabelData) -> BTreeMap<(u16, u16), u64> {
    let mut out = BTreeMap::new();
    let mut run = ((0, 0), 0);
    for pair in a.iter().zip(b.iter()) {
        if pair == run.0 {
            run.1 += 1;
        } else {
            *out.entry(run.0).or_insert(0) += run.1;
            run = (pair, 1);
        }
    }
    *out.entry(run.0).or_insert(0) += run.1;
    out
}

/// `numpy.mean`, to the last digit; NaN of nothing.
fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { f64::NAN } else { pairwise(&|i| values[i], 0, values.len()) / values.len() as f64 }
}

/// `numpy.nanmean`, to the last digit: what is no number counts as 0 in the sum.
fn nan_mean(values: &[f64]) -> f64 {
    let numbers = values.iter().filter(|v| !v.is_nan()).count();
    if numbers == 0 {
        return f64::NAN;
    }
    let or_zero = |i: usize| if values[i].is_nan() { 0.0 } else { values[i] };
    pairwise(&or_zero, 0, values.len()) / numbers as f64
}

/// The metrics of several cases.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Summary {
    classes: Vec<Class>,
    cases: Vec<Case>,
}

#[derive(Debug, Clone)]
struct Case {
    truth: String,
    prediction: String,
    metrics: Vec<Metrics>,
}

impl Summary {
    /// Of no case yet.
    #[must_use]
    pub fn new(classes: Vec<Class>) -> Self {
        Self { classes, cases: Vec::new() }
    }

    /// What metrics are of.
    #[must_use]
    pub fn classes(&self) -> &[Class] {
        &self.classes
    }

    /// Adds what [`compare`] found, and the files that were compared.
    pub fn add(&mut self, truth: &Path, prediction: &Path, metrics: Vec<Metrics>) {
        let name = |p: &Path| p.display().to_string();
        self.cases.push(Case { truth: name(truth), prediction: name(prediction), metrics });
    }

    /// Mean of a number over the cases in which it is one, by class.
    fn means(&self, number: usize) -> Vec<f64> {
        let of = |class: usize| {
            let values = self.cases.iter().filter_map(|c| c.metrics.get(class)).map(|m| m.all()[number].1);
            nan_mean(&values.collect::<Vec<f64>>())
        };
        (0..self.classes.len()).map(of).collect()
    }

    /// The mean of a number over cases, then over classes, background left out.
    fn foreground_mean(&self, means: &[f64]) -> f64 {
        let foreground = self.classes.iter().zip(means).filter(|(c, _)| c.key != "0");
        mean(&foreground.map(|(_, m)| *m).collect::<Vec<f64>>())
    }

    /// Mean Dice over cases, then over classes; NaN when a class is in no case at all, as in nnU-Net.
    #[must_use]
    pub fn foreground_dice(&self) -> f64 {
        self.foreground_mean(&self.means(0))
    }

    /// Mean Dice of every class over the cases that have it.
    #[must_use]
    pub fn dice(&self) -> Vec<(&str, f64)> {
        self.classes.iter().map(|c| c.key.as_str()).zip(self.means(0)).collect()
    }

    /// The text of nnU-Net's `summary.json`.
    #[must_use]
    pub fn to_json(&self) -> String {
        self.json().to_text(true)
    }

    /// Means over cases, by class and over classes, as nnU-Net's `postprocessing.json` has them.
    pub(crate) fn means_json(&self) -> Json {
        match self.json() {
            Json::Object(entries) => {
                Json::Object(entries.into_iter().filter(|(k, _)| k != "metric_per_case").collect())
            }
            other => other,
        }
    }

    fn json(&self) -> Json {
        let names = Metrics::default().all().map(|(name, _)| name);
        let means: Vec<Vec<f64>> = (0..names.len()).map(|n| self.means(n)).collect();
        let table = |of: &dyn Fn(usize) -> Json| {
            Json::Object(names.iter().enumerate().map(|(n, name)| ((*name).to_string(), of(n))).collect())
        };
        let classes = |of: &dyn Fn(usize) -> Json| {
            Json::Object(self.classes.iter().enumerate().map(|(i, c)| (c.key.clone(), of(i))).collect())
        };
        let count = |m: &Metrics, n: usize| match (names[n], m.all()[n].1) {
            ("Dice" | "IoU", v) => Json::Float(v),
            (_, v) => Json::Int(v as i64),
        };
        let case = |c: &Case| {
            let metrics = classes(&|i| c.metrics.get(i).map_or(Json::Null, |m| table(&|n| count(m, n))));
            Json::object([
                ("metrics", metrics),
                ("prediction_file", (&c.prediction).into()),
                ("reference_file", (&c.truth).into()),
            ])
        };
        let mean_of = |n: usize| Json::Float(self.foreground_mean(&means[n]));
        Json::object([
            ("foreground_mean", table(&mean_of)),
            ("mean", classes(&|i| table(&|n| Json::Float(means[n][i])))),
            ("metric_per_case", Json::List(self.cases.iter().map(case).collect())),
        ])
    }

    /// Writes `summary.json`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        json::write(path, &self.json(), true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Geometry;

    fn map(labels: &[u8]) -> Segmentation {
        let geometry = Geometry::new([1, 1, labels.len()], [1.0; 3]);
        Segmentation::new(LabelData::U8(labels.to_vec()), geometry, Vec::new()).unwrap()
    }

    #[test]
    fn voxels_are_counted_by_label_and_region_and_ignored_ones_are_not() {
        let (truth, found) = (map(&[0, 1, 1, 2, 9, 0]), map(&[0, 1, 2, 2, 1, 1]));
        let classes = [Class::label(1), Class::label(3), Class::region(vec![1, 2])];
        let m = compare(&truth, &found, &classes, Some(9)).unwrap();
        assert_eq!(m[0], Metrics { tp: 1, fp: 1, fn_: 1, tn: 2 });
        assert!(m[1].dice().is_nan() && m[1].iou().is_nan() && m[1].tn == 5);
        assert_eq!(m[2], Metrics { tp: 3, fp: 1, fn_: 0, tn: 1 });
        assert_eq!((classes[2].key.as_str(), Class::region(vec![3]).key.as_str()), ("(1, 2)", "(3,)"));
        assert!(compare(&truth, &map(&[0]), &classes, None).is_err());
    }

    #[test]
    fn a_class_that_no_case_has_makes_the_foreground_nan() {
        let mut summary = Summary::new(vec![Class::label(1), Class::label(2)]);
        let (a, b) = (map(&[1, 1, 0]), map(&[1, 0, 0]));
        for _ in 0..2 {
            summary.add(Path::new("t"), Path::new("p"), compare(&a, &b, &summary.classes, None).unwrap());
        }
        assert_eq!(summary.dice()[0], ("1", 2.0 / 3.0));
        assert!(summary.foreground_dice().is_nan());
        assert!(summary.to_json().contains("\"Dice\": NaN"), "{}", summary.to_json());
    }
}
