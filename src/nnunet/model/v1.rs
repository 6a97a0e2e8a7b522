//! Models of nnU-Net v1, as STU-Net's authors published theirs: `NAME.model` with `NAME.model.pkl` beside it.

mod trainers;

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{cut_strides, unet};
use crate::error::{Error, Result};
use crate::io::pth::{self, Pickle};
use crate::io::weights::printable;
use crate::models::{UnetConfig, UnetKind};
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

/// The file that describes a checkpoint, `NAME.model.pkl` beside `NAME.model`.
pub(super) fn info_file(checkpoint: &Path) -> PathBuf {
    let mut path = checkpoint.as_os_str().to_owned();
    path.push(".pkl");
    path.into()
}

/// What `NAME.model.pkl` says.
#[derive(Debug)]
pub(super) struct Info {
    pub plan: InferencePlan,
    pub pickle: Pickle,
    /// Number and plans of the network's stage.
    stage: (usize, Value),
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
        let trainer = info.need("name")?.str()?.to_string();
        let (number, stage, configuration) = stage_of(&info, &plans, &trainer)?;
        let plan = plan_of(trainer, &plans, &stage, configuration, folder.unwrap_or(pkl))?;
        plan.validate(pkl)?;
        let keep_largest = keep_largest(folder, &plan)?;
        Ok(Self { plan: InferencePlan { keep_largest, ..plan }, pickle, stage: (number, stage.value.clone()) })
    }

    /// Checks that `found` is the network that the trainer makes of these plans. Weights do not tell a ReLU from a leaky one, nor
    /// which layer comes first: that the trainer's name has to.
    pub(super) fn check(&self, pkl: &Path, found: &UnetConfig) -> Result<()> {
        let trainer = &self.plan.trainer;
        if found.kind != UnetKind::Generic {
            return Err(Error::unsupported(format!("a {} trained by nnU-Net v1", found.kind.class_name())));
        }
        if !trainers::is_known(trainer) {
            let trainer = printable(trainer);
            let what = format!("trainer {trainer:?}: none of nnU-Net 1.7.1's that train a plain Generic_UNet");
            return Err(Error::unsupported(what));
        }
        let planar = self.plan.is_planar();
        let (number, stage) = &self.stage;
        let stage = Field::at(pkl, format!("plans.plans_per_stage.{number}"), stage);
        let mut kernels = kernels(&stage, planar)?;
        if trainers::has_only_kernels_of_three(trainer) {
            kernels.iter_mut().flat_map(|k| &mut k[usize::from(planar)..]).for_each(|size| *size = 3);
        }
        for (key, planned, found) in [
            ("pool_op_kernel_sizes", pools(&stage, planar)?, &found.strides[1..]),
            ("conv_kernel_sizes", kernels, &found.kernels[..]),
        ] {
            if planned != found {
                return Err(stage.error(format!("{key} {planned:?}, the network has {found:?}")));
            }
        }
        Ok(())
    }
}

/// Strides into all stages but the first; plans from before they stood there have the poolings of each axis, which begin as
/// late as leaves each axis its number (nnU-Net v1 `process_plans`).
fn pools(stage: &Field<'_>, planar: bool) -> Result<Vec<[usize; 3]>> {
    if let Some(pools) = stage.get("pool_op_kernel_sizes") {
        return unet::triples(&pools, planar);
    }
    let axes = axes_of_pools(stage, planar)?;
    let most = axes.into_iter().max().unwrap_or(0);
    Ok((0..most).map(|i| axes.map(|n| if most - n <= i { 2 } else { 1 })).collect())
}

/// Kernels of all stages, of plans from before they stood there three voxels along each axis.
fn kernels(stage: &Field<'_>, planar: bool) -> Result<Vec<[usize; 3]>> {
    if let Some(kernels) = stage.get("conv_kernel_sizes") {
        return unet::triples(&kernels, planar);
    }
    let axes = axes_of_pools(stage, planar)?;
    let kernel = if planar { [1, 3, 3] } else { [3; 3] };
    Ok(vec![kernel; axes.into_iter().max().unwrap_or(0) + 1])
}

fn axes_of_pools(stage: &Field<'_>, planar: bool) -> Result<[usize; 3]> {
    let field = stage.need("num_pool_per_axis")?;
    let number = |f: &Field<'_>| f.usize(16);
    match field.items()?.as_slice() {
        [y, x] if planar => Ok([0, number(y)?, number(x)?]),
        _ => field.three(number),
    }
}

fn plan_of(
    trainer: String,
    plans: &Field<'_>,
    stage: &Field<'_>,
    configuration: &str,
    folder: &Path,
) -> Result<InferencePlan> {
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
    // Plans that lack one have none.
    let transposes = ["transpose_forward", "transpose_backward"].map(|key| plans.get(key));
    let [transpose_forward, transpose_backward] = match &transposes {
        [Some(forward), Some(backward)] => [forward.three(axis)?, backward.three(axis)?],
        _ => [[0, 1, 2]; 2],
    };
    let first_mirrored = if trainers::mirrors(&trainer) { usize::from(planar) } else { 3 };
    let previous = trainers::is_second_stage(&trainer).then(|| PreviousStage {
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
        transpose_forward,
        transpose_backward,
        strides: cut_strides(pools(stage, planar)?.into_iter().map(Ok))?,
        // nnU-Net v1 keeps no list; its trainers mirror all axes of an image or slice, but for the variants named so.
        mirror_axes: (first_mirrored..3).collect(),
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

/// Number and plans of the stage that the network was trained for, and the name of its configuration.
fn stage_of<'a>(info: &Field<'a>, plans: &Field<'a>, trainer: &str) -> Result<(usize, Field<'a>, &'static str)> {
    let stages = plans.need("plans_per_stage")?;
    let mut all: Vec<(usize, Field<'a>)> = Vec::new();
    for (key, value) in stages.entries()? {
        let number = key.parse().map_err(|_| value.error("the key is no stage number"))?;
        all.push((number, value));
    }
    all.sort_by_key(|(n, _)| *n);
    let known: Vec<usize> = all.iter().map(|(n, _)| *n).collect();
    let Some(&last) = known.last() else { return Err(stages.error("empty, expected at least one stage")) };
    // An argument of the trainer is the stage; the shortest known list has six.
    let argument = trainers::stage_argument(trainer);
    let init = info.get("init").map(|i| i.items()).transpose()?.unwrap_or_default();
    let wanted = match init.get(argument).filter(|s| !s.value.is_null()) {
        Some(stage) => stage.usize(16)?,
        None if known.len() == 1 => last,
        None => return Err(stages.error(format!("stages {known:?}, but init[{argument}] names none of them"))),
    };
    let configuration = if wanted == last { "3d_fullres" } else { "3d_lowres" };
    let found = all.into_iter().find(|(n, _)| *n == wanted);
    found
        .map(|(number, stage)| (number, stage, configuration))
        .ok_or_else(|| stages.error(format!("no stage {wanted} of init[{argument}], there are {known:?}")))
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
    /// As nnU-Net's `process_plans` makes them of the poolings of each axis.
    #[test]
    fn old_plans_are_repaired() {
        let file = std::path::Path::new("x.model.pkl");
        let old = serde_json::json!({"num_pool_per_axis": [1, 3, 2]});
        let stage = super::Field::root(file, &old);
        assert_eq!(super::pools(&stage, false).unwrap(), [[1, 2, 1], [1, 2, 2], [2, 2, 2]]);
        assert_eq!(super::kernels(&stage, false).unwrap(), [[3; 3]; 4]);
        let flat = serde_json::json!({"num_pool_per_axis": [1, 2]});
        let stage = super::Field::root(file, &flat);
        assert_eq!(super::pools(&stage, true).unwrap(), [[1, 1, 2], [1, 2, 2]]);
        assert_eq!(super::kernels(&stage, true).unwrap(), [[1, 3, 3]; 3]);
        let none = serde_json::json!({});
        assert!(super::pools(&super::Field::root(file, &none), false).is_err());
    }

    #[test]
    fn published_labels_are_complete() {
        let labels = super::stunet_labels().unwrap();
        assert_eq!(labels.len(), 104);
        assert!(labels.iter().enumerate().all(|(i, (v, _))| usize::from(*v) == i + 1));
        assert_eq!(labels[39], (40, "liver".to_string()));
        assert_eq!(labels[103].1, "vertebrae_T9");
    }
}
