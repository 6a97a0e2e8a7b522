//! Models of nnU-Net v1, as STU-Net's authors published theirs: `NAME.model` with `NAME.model.pkl` beside it.

use std::path::Path;

use serde_json::Value;

use super::{cut_strides, unet};
use crate::error::{Error, Result};
use crate::io::pth::{self, Pickle};
use crate::io::weights::printable;
use crate::models::UnetConfig;
use crate::nnunet::dataset::Reader;
use crate::nnunet::json::{self, Field};
use crate::nnunet::plans::{
    Channel, Decision, InferencePlan, Intensity, Normalization, PreviousStage, Resampling, Rules,
};

/// Plans of the largest data sets hold some ten thousand values; shared references cannot make them explode.
const MAX_VALUES: usize = 1 << 20;

/// Class names of the published STU-Net weights, which were trained with labels in alphabetical order.
const STUNET_LABELS: &str = include_str!("../data/stunet_labels.json");
const STUNET_HEADS: usize = 105;
const STUNET_TRAINERS: [&str; 4] =
    ["STUNetTrainer_small", "STUNetTrainer_base", "STUNetTrainer_large", "STUNetTrainer_huge"];

/// Parts of the names of nnU-Net v1's trainers whose networks have weights of the same names and shapes and are others: other
/// nonlinearities, another order of layers, other norms, sigmoids.
const OTHER_LAYERS: [&str; 7] = ["_ReLU", "LReLU_slope", "convlReLUIN", "GeLU", "Mish", "_GN", "Regions"];

/// What `NAME.model.pkl` says.
#[derive(Debug)]
pub(super) struct Info {
    pub plan: InferencePlan,
    pub pickle: Pickle,
    /// The plans of the network's stage.
    stage: Value,
}

impl Info {
    /// Reads the file. `folder` is the trainer's folder, for names and its post-processing.
    pub(super) fn read(pkl: &Path, folder: Option<&Path>) -> Result<Self> {
        let pickle = pth::read_pickle(pkl)?;
        let Some(info) = pickle.root().to_json(MAX_VALUES) else {
            return Err(Error::model(pkl, "top level", "nested too deeply or too large for plans of nnU-Net"));
        };
        let info = Field::root(pkl, &info);
        let plans = info.need("plans")?;
        let (stage, configuration) = stage(&info, &plans)?;
        let plan = plan(&info, &plans, &stage, configuration, folder.unwrap_or(pkl))?;
        plan.validate(pkl)?;
        let (stage, keep_largest) = (stage.value.clone(), keep_largest(folder, &plan)?);
        Ok(Self { plan: InferencePlan { keep_largest, ..plan }, pickle, stage })
    }

    /// Checks that `found`, a `Generic_UNet`, is the network that the trainer makes of these plans, as far as its weights tell:
    /// nothing is seen in them of what has no parameters.
    pub(super) fn check(&self, pkl: &Path, found: &UnetConfig) -> Result<()> {
        let trainer = &self.plan.trainer;
        if let Some(other) = OTHER_LAYERS.iter().find(|o| trainer.contains(**o)) {
            return Err(Error::unsupported(format!(
                "trainer {trainer:?}: another kind of layers or outputs ({other:?})"
            )));
        }
        let stage = Field::at(pkl, "plans_per_stage", &self.stage);
        let same = |key: &str, found: &[[usize; 3]], of: &dyn Fn([usize; 3]) -> [usize; 3]| {
            let field = stage.need(key)?;
            let planned: Vec<_> = unet::triples(&field, self.plan.is_planar())?.into_iter().map(of).collect();
            if planned == found {
                return Ok(());
            }
            Err(field.error(format!("{planned:?}, the network has {found:?}")))
        };
        same("pool_op_kernel_sizes", &found.strides[1..], &|s| s)?;
        let planar = usize::from(self.plan.is_planar());
        let all_three = trainer.contains("allConv3x3");
        same("conv_kernel_sizes", &found.kernels, &|k| {
            std::array::from_fn(|a| if all_three && a >= planar { 3 } else { k[a] })
        })
    }
}

fn plan(
    info: &Field<'_>,
    plans: &Field<'_>,
    stage: &Field<'_>,
    configuration: &str,
    folder: &Path,
) -> Result<InferencePlan> {
    let trainer = info.need("name")?.str()?.to_string();
    let heads = plans.need("num_classes")?.usize(usize::from(u16::MAX) - 1)? + 1;
    let dataset = folder.components().rev().find_map(|c| {
        let c = c.as_os_str().to_str()?;
        (c.starts_with("Task") && c[4..].starts_with(|d: char| d.is_ascii_digit())).then(|| c.to_string())
    });
    let dataset = dataset.unwrap_or_default();
    // Other names and folders belong to networks that were trained further on other labels.
    let published = heads == STUNET_HEADS
        && STUNET_TRAINERS.contains(&trainer.as_str())
        && matches!(dataset.as_str(), "" | "Task101_TotalSegmentator");
    let labels = if published { stunet_labels()? } else { numbered_labels(heads) };

    let size = |f: &Field<'_>| f.usize(usize::from(u16::MAX));
    let patch = stage.need("patch_size")?;
    let (patch, planar) = match patch.items()?.as_slice() {
        [y, x] => ([1, size(y)?, size(x)?], true),
        _ => (patch.three(size)?, false),
    };
    check_preprocessor(plans, planar)?;
    let mut spacing_mm = stage.need("current_spacing")?.three(Field::f64)?.map(Some);
    if planar {
        // Slices are not resampled into others (nnU-Net v1 `PreprocessorFor2D`).
        spacing_mm[0] = None;
    }
    let axis = |f: &Field<'_>| f.usize(2);
    let transpose = |key: &str| plans.get(key).map_or(Ok([0, 1, 2]), |t| t.three(axis));
    let mirrored = if trainer.to_lowercase().contains("nomirror") { 3 } else { usize::from(planar) };
    let previous = trainer.contains("Cascade").then(|| PreviousStage {
        configuration: "3d_lowres".into(),
        labels: labels.iter().map(|(value, _)| *value).collect(),
        resampling: Resampling { order: 1, order_z: 0, force_separate_z: Some(false) },
    });
    let configuration = match (planar, &previous) {
        (true, _) => "2d",
        (false, Some(_)) => "3d_cascade_fullres",
        (false, None) => configuration,
    };
    Ok(InferencePlan {
        rules: Rules::NnunetV1,
        dataset,
        trainer,
        configuration: configuration.into(),
        reader: Reader::default(),
        channels: channels(plans)?,
        labels,
        decision: Decision::Argmax,
        heads,
        patch,
        spacing_mm,
        transpose_forward: transpose("transpose_forward")?,
        transpose_backward: transpose("transpose_backward")?,
        strides: cut_strides(unet::triples(&stage.need("pool_op_kernel_sizes")?, planar)?.into_iter().map(Ok))?,
        // nnU-Net v1 keeps no list; its trainers mirror all axes of an image or slice, but for the variants named so.
        mirror_axes: (mirrored..3).collect(),
        resampling_data: Resampling { order: 3, order_z: 0, force_separate_z: None },
        resampling_probabilities: export(plans)?,
        keep_largest: Vec::new(),
        previous,
    })
}

/// Other classes of these names resample or normalise otherwise.
fn check_preprocessor(plans: &Field<'_>, planar: bool) -> Result<()> {
    let Some(field) = plans.get("preprocessor_name") else { return Ok(()) };
    let (name, known) = (field.str()?, if planar { "PreprocessorFor2D" } else { "GenericPreprocessor" });
    if name != known {
        let (name, file) = (printable(name), plans.file().display());
        return Err(Error::unsupported(format!("preprocessor_name {name:?} in {file}; {known} is")));
    }
    Ok(())
}

/// How the network's output comes back to the image's grid (nnU-Net v1 `predict_cases`).
fn export(plans: &Field<'_>) -> Result<Resampling> {
    let Some(params) = plans.get("segmentation_export_params") else {
        return Ok(Resampling { order: 1, order_z: 0, force_separate_z: None });
    };
    // The key must be there; None is the rule of 3:1.
    params.need("force_separate_z")?;
    Ok(Resampling {
        order: params.need("interpolation_order")?.usize(5)? as u8,
        order_z: params.need("interpolation_order_z")?.usize(5)? as u8,
        force_separate_z: params.get("force_separate_z").map(|f| f.bool()).transpose()?,
    })
}

/// The plans of the stage that the network was trained for, and the name of its configuration.
fn stage<'a>(info: &Field<'a>, plans: &Field<'a>) -> Result<(Field<'a>, &'static str)> {
    let stages = plans.need("plans_per_stage")?;
    let mut all: Vec<(usize, Field<'a>)> = Vec::new();
    for (key, value) in stages.entries()? {
        let number = key.parse().map_err(|_| value.error("the key is no stage number"))?;
        all.push((number, value));
    }
    all.sort_by_key(|(n, _)| *n);
    let known: Vec<usize> = all.iter().map(|(n, _)| *n).collect();
    let Some(&last) = known.last() else { return Err(stages.error("empty, expected at least one stage")) };
    // The sixth argument of the trainer is the stage; the shortest known list has six.
    let init = info.get("init").map(|i| i.items()).transpose()?.unwrap_or_default();
    let wanted = match init.get(5).filter(|s| !s.value.is_null()) {
        Some(stage) => stage.usize(16)?,
        None if known.len() == 1 => last,
        None => return Err(stages.error(format!("stages {known:?}, but init[5] names none of them"))),
    };
    let configuration = if wanted == last { "3d_fullres" } else { "3d_lowres" };
    let found = all.into_iter().find(|(n, _)| *n == wanted);
    found
        .map(|(_, stage)| (stage, configuration))
        .ok_or_else(|| stages.error(format!("no stage {wanted} of init[5], there are {known:?}")))
}

fn channels(plans: &Field<'_>) -> Result<Vec<Channel>> {
    let n = plans.need("num_modalities")?.usize(1024)?;
    let schemes = plans.need("normalization_schemes")?;
    let masks = plans.need("use_mask_for_norm")?;
    (0..n)
        .map(|c| {
            let key = c.to_string();
            let scheme = schemes.need(&key)?;
            let normalization = match scheme.str()? {
                "CT" => Normalization::Ct,
                "nonCT" => Normalization::ZScore,
                "noNorm" => Normalization::None,
                other => return Err(Error::unsupported(format!("normalisation scheme {other:?} of nnU-Net v1"))),
            };
            let intensity = if normalization == Normalization::Ct {
                let s = plans.need("dataset_properties")?.need("intensityproperties")?.need(&key)?;
                Some(Intensity {
                    mean: s.need("mean")?.f64()?,
                    std: s.need("sd")?.f64()?,
                    percentile_00_5: s.need("percentile_00_5")?.f64()?,
                    percentile_99_5: s.need("percentile_99_5")?.f64()?,
                })
            } else {
                None
            };
            let name = plans.get("modalities").and_then(|m| m.get(&key));
            let name = name.map(|m| m.str()).transpose()?.map_or_else(|| format!("channel_{c}"), str::to_string);
            Ok(Channel { name, normalization, use_mask: masks.need(&key)?.bool()?, intensity })
        })
        .collect()
}

fn numbered_labels(heads: usize) -> Vec<(u16, String)> {
    (1..heads).map(|i| (i as u16, format!("label_{i}"))).collect()
}

pub(in crate::nnunet) fn stunet_labels() -> Result<Vec<(u16, String)>> {
    let file = Path::new("stunet_labels.json");
    let value: Value = serde_json::from_str(STUNET_LABELS).map_err(|e| Error::model(file, "JSON", e.to_string()))?;
    let mut out = Vec::new();
    for (key, name) in Field::root(file, &value).entries()? {
        let label: u16 = key.parse().map_err(|_| name.error("the key is no label"))?;
        if label != 0 {
            out.push((label, name.str()?.to_string()));
        }
    }
    out.sort();
    Ok(out)
}

/// Labels of which only the largest component is kept, as `postprocessing.json` of the trainer's folder says.
fn keep_largest(folder: Option<&Path>, plan: &InferencePlan) -> Result<Vec<u16>> {
    let heads = plan.heads;
    let Some(path) = folder.map(|f| f.join("postprocessing.json")).filter(|p| p.is_file()) else {
        return Ok(Vec::new());
    };
    let value = json::read(&path)?;
    let root = Field::root(&path, &value);
    // A Python dictionary, written as text.
    let sizes = root.get("min_valid_object_sizes").map(|s| s.str()).transpose()?;
    if !matches!(sizes, None | Some("None" | "{}")) {
        return Err(Error::unsupported(format!("{}: min_valid_object_sizes", path.display())));
    }
    let classes = root.need("for_which_classes")?;
    if classes.value.is_null() {
        return Ok((1..heads).map(|l| l as u16).collect());
    }
    let mut out = Vec::new();
    for class in classes.items()? {
        if class.value.is_array() {
            let what = format!("{}: for_which_classes with groups of labels; single labels are", path.display());
            return Err(Error::unsupported(what));
        }
        out.push(class.usize(heads - 1)? as u16);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #[test]
    fn published_labels_are_complete() {
        let labels = super::stunet_labels().unwrap();
        assert_eq!(labels.len(), 104);
        assert!(labels.iter().enumerate().all(|(i, (v, _))| usize::from(*v) == i + 1));
        assert_eq!(labels[39], (40, "liver".to_string()));
        assert_eq!(labels[103].1, "vertebrae_T9");
    }
}
