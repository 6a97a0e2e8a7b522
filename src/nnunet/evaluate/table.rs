//! A row for each case and class, as comma-separated values.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use super::folder::Evaluation;
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;

/// Mean values of a class over cases.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct ClassMeans {
    /// Cases that have the class, in truth or prediction.
    pub cases: usize,
    /// Mean Dice of these.
    pub dice: f64,
    /// Mean surface Dice of these; NaN where surfaces were not compared.
    pub surface_dice: f64,
    /// Mean of the 95 % Hausdorff distances in mm that are finite.
    pub hausdorff_95_mm: f64,
    /// Cases in which the class is in truth or prediction only, so that the distance is infinite.
    pub in_one_only: usize,
}

impl Evaluation {
    /// Of each class, in order; numbers are NaN where no case has any.
    #[must_use]
    pub fn class_means(&self) -> Vec<ClassMeans> {
        let of = |class: usize| {
            let dice: Vec<f64> = self.summary.cases.iter().map(|c| c.metrics[class].dice()).collect();
            let surfaces = self.surfaces.iter().flatten().map(|s| s[class]);
            let surface_dice: Vec<f64> = surfaces.clone().map(|s| s.surface_dice).collect();
            let distances: Vec<f64> = surfaces.map(|s| s.hausdorff_95_mm).collect();
            let finite: Vec<f64> = distances.iter().copied().filter(|d| d.is_finite()).collect();
            ClassMeans {
                cases: dice.iter().filter(|d| !d.is_nan()).count(),
                dice: super::nan_mean(&dice),
                surface_dice: super::nan_mean(&surface_dice),
                hausdorff_95_mm: super::nan_mean(&finite),
                in_one_only: distances.iter().filter(|d| d.is_infinite()).count(),
            }
        };
        (0..self.summary.classes.len()).map(of).collect()
    }

    /// What people call the classes, in order.
    #[must_use]
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// The name of a case.
    pub(super) fn case_name(&self, case: usize) -> String {
        case_name(&self.files[case])
    }

    /// A head and a row for each case and class: nnU-Net's numbers, and those of surfaces where they were compared. What is
    /// no number is `NaN`, what is infinite `inf`.
    #[must_use]
    pub fn to_csv(&self) -> String {
        let mut out = String::from("case,class,name,dice,iou,tp,fp,fn,tn,n_pred,n_ref");
        if let Some(mm) = self.tolerance_mm {
            let _ = write!(out, ",surface_dice_{mm}mm,hausdorff_95_mm");
        }
        out.push('\n');
        for (i, case) in self.summary.cases.iter().enumerate() {
            let name = quoted(&self.case_name(i));
            for (k, m) in case.metrics.iter().enumerate() {
                let (key, class) = (quoted(&self.summary.classes[k].key), quoted(&self.class_names[k]));
                let (dice, iou, tp, fp, fn_, tn) = (m.dice(), m.iou(), m.tp, m.fp, m.fn_, m.tn);
                let _ = write!(out, "{name},{key},{class},{dice},{iou},{tp},{fp},{fn_},{tn},{},{}", tp + fp, tp + fn_);
                if let Some(s) = self.surfaces.as_ref().map(|s| s[i][k]) {
                    let _ = write!(out, ",{},{}", s.surface_dice, s.hausdorff_95_mm);
                }
                out.push('\n');
            }
        }
        out
    }

    /// Writes [`Evaluation::to_csv`], whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_csv(&self, path: &Path) -> Result<()> {
        write_text(path, &self.to_csv())
    }
}

/// The name of a label map's file without its ending.
pub(super) fn case_name(file: &OsStr) -> String {
    let name = file.to_string_lossy();
    name.rsplit_once(".nii").or_else(|| name.rsplit_once('.')).map_or(&*name, |(n, _)| n).to_owned()
}

pub(super) fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomically(path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io("write", path, e)))
}

/// A field of a table, in quotation marks where it has to be (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.into() }
}
