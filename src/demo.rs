//! What the demonstration needs besides the pipeline itself: an embedded model for [`crate::phantom`], and the
//! comparison with the truth.
//!
//! The model is an ordinary model folder of this project, so that the demonstration runs exactly what a user's model
//! runs. It is a STU-Net of 1.07 million parameters for phantoms at 3 mm, trained by `stunet train` (README.md gives the
//! commands), and of no use for patients.

use std::io::Write as _;
use std::path::Path;

use crate::base::par;
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::io::image::Segmentation;

/// The seeds of the phantoms that the embedded model was trained on, both ends included; all others are new to it.
pub const TRAINED_ON: [(u64, u64); 1] = [(1000, 1239)];

/// The embedded model folder: the contents of `model.json` and of `fold_all.safetensors`.
#[must_use]
pub fn model_files() -> (&'static [u8], &'static [u8]) {
    (include_bytes!("demo/model/model.json"), include_bytes!("demo/model/fold_all.safetensors"))
}

/// Writes the embedded model as the folder `folder`, creating it and its parents if need be; files of the same names
/// are replaced.
///
/// # Errors
/// [`Error::Io`] when the folder or a file cannot be written, [`Error::Usage`] when something else than a regular file
/// has one of the names.
pub fn write_model(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let (manifest, weights) = model_files();
    // The manifest last: without it the folder is no model.
    for (name, bytes) in [("fold_all.safetensors", weights), ("model.json", manifest)] {
        let path = folder.join(name);
        write_atomically(&path, |file| file.write_all(bytes).map_err(|e| Error::io("write", &path, e)))?;
    }
    Ok(())
}

/// How well one label of a segmentation agrees with the truth.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LabelDice {
    /// The label's value.
    pub label: u16,
    /// Its name in the truth.
    pub name: String,
    /// The Dice coefficient 2 |A and B| / (|A| + |B|), 0 to 1; `None` when neither has a voxel of the label.
    pub dice: Option<f64>,
}

/// The Dice coefficient (Dice, "Measures of the amount of ecologic association between species", Ecology 26, 1945) of
/// every label named in `truth`, in that order. A label that both leave out has none, as in nnU-Net's evaluation
/// (`compute_metrics`).
///
/// # Errors
/// [`Error::Shape`] when the grids differ in size.
pub fn dice_per_label(truth: &Segmentation, prediction: &Segmentation) -> Result<Vec<LabelDice>> {
    let (a, b) = (truth.geometry.shape, prediction.geometry.shape);
    if a != b || truth.labels.len() != prediction.labels.len() {
        return Err(Error::shape("dice", format!("truth of {a:?} voxels, prediction of {b:?}")));
    }
    let dice = par::map(truth.names.len(), |i| {
        let label = truth.names[i].0;
        let (mut both, mut sum) = (0usize, 0usize);
        for (t, p) in truth.labels.iter().zip(prediction.labels.iter()) {
            both += usize::from(t == label && p == label);
            sum += usize::from(t == label) + usize::from(p == label);
        }
        (sum > 0).then(|| 2.0 * both as f64 / sum as f64)
    });
    let labels = truth.names.iter().zip(dice);
    Ok(labels.map(|((label, name), dice)| LabelDice { label: *label, name: name.clone(), dice }).collect())
}

/// The mean over the labels that have a Dice coefficient; `None` when no label has one.
#[must_use]
pub fn mean_dice(labels: &[LabelDice]) -> Option<f64> {
    let known: Vec<f64> = labels.iter().filter_map(|l| l.dice).collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::image::{Geometry, LabelData};
    use crate::nnunet::model::{ModelFolder, ModelOptions};

    fn segmentation(labels: &[u8]) -> Segmentation {
        let names = vec![(1, "one".to_owned()), (2, "two".to_owned()), (3, "three".to_owned())];
        let geometry = Geometry::new([1, 1, labels.len()], [1.0; 3]);
        Segmentation::new(LabelData::U8(labels.to_vec()), geometry, names).unwrap()
    }

    #[test]
    fn dice_counts_the_overlap_twice() {
        let (truth, found) = (segmentation(&[0, 1, 1, 1, 2, 0]), segmentation(&[1, 1, 1, 0, 0, 0]));
        let dice = dice_per_label(&truth, &found).unwrap();
        let values: Vec<_> = dice.iter().map(|d| d.dice).collect();
        assert_eq!(values, [Some(2.0 * 2.0 / 6.0), Some(0.0), None]);
        assert_eq!(dice[1].name, "two");
        assert_eq!(mean_dice(&dice), Some(1.0 / 3.0));
        assert_eq!(mean_dice(&dice[2..]), None);
        assert!(dice_per_label(&truth, &segmentation(&[0])).is_err());
    }

    #[test]
    fn the_embedded_model_is_whole_and_names_the_phantom_s_labels() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("a/model");
        write_model(&folder).unwrap();
        // Opening checks the checksum, the plan and every tensor.
        let model = ModelFolder::open(&folder, &ModelOptions::new()).unwrap();
        let names: Vec<(u16, &str)> = model.plan.labels.iter().map(|(l, n)| (*l, n.as_str())).collect();
        assert_eq!(names, crate::phantom::NAMES);
        assert_eq!(model.architecture.config(model.plan.strides).parameter_count(), 1_067_413);
        // Left and right would change places.
        assert!(model.plan.mirror_axes.is_empty());
        assert!(model_files().1.len() <= 2_500_000, "{} bytes", model_files().1.len());
    }
}
