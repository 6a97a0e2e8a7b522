//! Model folders of nnU-Net v2: `plans.json`, `dataset.json`, `fold_k/checkpoint_final.pth`.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Architecture, cut_strides, unet};
use crate::error::{Error, Result};
use crate::io::pth::Pickle;
use crate::io::weights::printable;
use crate::models::UnetConfig;
use crate::nnunet::dataset::Reader;
use crate::nnunet::json::{self, Field};
use crate::nnunet::labels::LabelSet;
use crate::nnunet::plans::{Channel, InferencePlan, Intensity, Normalization, PreviousStage, Resampling, Rules};
use crate::nnunet::preprocess::PreprocessPlan;

/// What a checkpoint says beside its weights.
#[derive(Debug, PartialEq)]
pub(super) struct CheckpointInfo {
    configuration: String,
    trainer: String,
    mirror_axes: Vec<usize>,
}

impl CheckpointInfo {
    /// True when two folds can vote together.
    pub(super) fn same_model(&self, other: &Self) -> bool {
        self.configuration == other.configuration && self.mirror_axes == other.mirror_axes
    }

    /// Reads `init_args.configuration`, `trainer_name` and `inference_allowed_mirroring_axes`.
    pub(super) fn read(path: &Path, checkpoint: Option<&Pickle>) -> Result<Self> {
        let Some(root) = checkpoint.map(Pickle::root) else {
            return Err(Error::model(path, "container", "expected a checkpoint of nnU-Net v2 (.pth)"));
        };
        let configuration = root.get("init_args").and_then(|a| a.get("configuration")).and_then(|c| c.str());
        let Some(configuration) = configuration else {
            return Err(Error::model(path, "init_args.configuration", "missing, expected the configuration's name"));
        };
        const AXES: &str = "inference_allowed_mirroring_axes";
        let axes = match root.get(AXES) {
            // Four values for a list of three, more are not read.
            Some(axes) => axes.to_json(4).ok_or_else(|| Error::model(path, AXES, "expected at most three axes"))?,
            None => Value::Null,
        };
        let mirror_axes = match axes {
            Value::Null => Vec::new(),
            _ => Field::at(path, AXES, &axes).items()?.iter().map(|a| a.usize(2)).collect::<Result<_>>()?,
        };
        let trainer = root.get("trainer_name").and_then(|t| t.str()).unwrap_or_default().to_string();
        Ok(Self { configuration: configuration.to_string(), trainer, mirror_axes })
    }
}

/// The plan of a model folder for the configuration that its checkpoint was trained with.
pub(super) fn plan(folder: &Path, info: &CheckpointInfo) -> Result<InferencePlan> {
    let plans_path = folder.join("plans.json");
    let dataset_path = folder.join("dataset.json");
    let (plans, dataset) = (json::read(&plans_path)?, json::read(&dataset_path)?);
    let (plans, dataset) = (Field::root(&plans_path, &plans), Field::root(&dataset_path, &dataset));

    let name = &info.configuration;
    let resolved = Value::Object(resolve(&plans.need("configurations")?, name)?);
    let at = format!("configurations.{name}");
    let conf = Field::at(&plans_path, &at, &resolved);
    let (patch, planar) = patch_size(&conf, usize::from(u16::MAX))?;
    check_classes(&plans, &conf)?;
    let labels = LabelSet::of(&dataset)?;
    let axis = |f: &Field<'_>| f.usize(2);
    let plan = InferencePlan {
        rules: Rules::NnunetV2,
        dataset: plans.get("dataset_name").map(|d| d.str()).transpose()?.unwrap_or_default().to_string(),
        trainer: info.trainer.clone(),
        configuration: name.clone(),
        reader: reader(&plans)?,
        channels: channels(&plans, &conf, &dataset)?,
        heads: labels.heads(),
        labels: labels.names(),
        decision: labels.decision(),
        patch,
        spacing_mm: spacing(&conf, planar)?,
        transpose_forward: plans.need("transpose_forward")?.three(axis)?,
        transpose_backward: plans.need("transpose_backward")?.three(axis)?,
        strides: cut_strides(pools(&conf, planar)?.into_iter().map(Ok))?,
        // A 2D network's axes are the last two.
        mirror_axes: info.mirror_axes.iter().map(|a| a + usize::from(planar)).collect(),
        resampling_data: resampling(&conf, "resampling_fn_data", false)?,
        resampling_probabilities: resampling(&conf, "resampling_fn_probabilities", false)?,
        keep_largest: Vec::new(),
        previous: previous_stage(&conf, &labels)?,
    };
    plan.validate(&plans_path)?;
    Ok(plan)
}

/// The stage of a cascade before the configuration `conf`.
fn previous_stage(conf: &Field<'_>, labels: &LabelSet) -> Result<Option<PreviousStage>> {
    let Some(name) = previous_name(conf)? else { return Ok(None) };
    let resampling = resampling(conf, "resampling_fn_seg", true)?;
    Ok(Some(PreviousStage { configuration: name, labels: labels.foreground_labels().to_vec(), resampling }))
}

/// Name of the configuration that predicts what `conf` takes as input, if there is one.
pub(in crate::nnunet) fn previous_name(conf: &Field<'_>) -> Result<Option<String>> {
    conf.get("previous_stage").map(|p| p.str().map(str::to_string)).transpose()
}

/// Names of the configurations that take as input what `conf` predicts.
pub(in crate::nnunet) fn next_names(conf: &Field<'_>) -> Result<Vec<String>> {
    let Some(next) = conf.get("next_stage") else { return Ok(Vec::new()) };
    match next.value {
        Value::String(one) => Ok(vec![one.clone()]),
        _ => next.items()?.iter().map(|n| n.str().map(str::to_string)).collect(),
    }
}

/// Reader of the data set's files, SimpleITK's if the plans name none. Another one may turn images round: what it is not
/// known to do is not done.
fn reader(plans: &Field<'_>) -> Result<Reader> {
    let Some(field) = plans.get("image_reader_writer") else { return Ok(Reader::default()) };
    let name = field.str()?;
    Reader::of_class(name)
        .ok_or_else(|| Error::unsupported(format!("image_reader_writer {name:?} in {}", plans.file().display())))
}

/// Other classes of these names do other things, which their names do not tell.
fn check_classes(plans: &Field<'_>, conf: &Field<'_>) -> Result<()> {
    for (field, known) in
        [(conf.get("preprocessor_name"), "DefaultPreprocessor"), (plans.get("label_manager"), "LabelManager")]
    {
        let Some(class) = field.map(|f| f.str()).transpose()? else { continue };
        if class != known {
            return Err(Error::unsupported(format!("{class:?} in {}; {known} is", plans.file().display())));
        }
    }
    Ok(())
}

/// What preprocessing needs for the configuration `name` of a `plans.json`, 2D ones and cascades included, and the name of
/// the folder below `nnUNet_preprocessed/DatasetNNN` that it fills (`data_identifier`).
///
/// # Errors
/// [`Error::Io`]; [`Error::Model`] naming the key that is missing or of the wrong kind; [`Error::Unsupported`] naming the
/// class, function or argument that there is nothing for.
pub fn preprocess_plan(plans: &Path, dataset: &Path, name: &str) -> Result<(PreprocessPlan, String)> {
    let (plans_path, dataset_path) = (plans, dataset);
    let (plans, dataset) = (json::read(plans_path)?, json::read(dataset_path)?);
    let (plans, dataset) = (Field::root(plans_path, &plans), Field::root(dataset_path, &dataset));
    let resolved = Value::Object(resolve(&plans.need("configurations")?, name)?);
    let conf = Field::at(plans_path, format!("configurations.{name}"), &resolved);
    check_classes(&plans, &conf)?;
    let folder = conf.need("data_identifier")?;
    let identifier = folder.str()?;
    if identifier.is_empty() || identifier.starts_with('.') || identifier.contains(['/', '\\', '\0']) {
        return Err(folder.error(format!("{identifier:?}, expected the name of a folder")));
    }
    let planar = conf.need("spacing")?.items()?.len() == 2;
    let axis = |f: &Field<'_>| f.usize(2);
    let plan = PreprocessPlan {
        rules: Rules::NnunetV2,
        channels: channels(&plans, &conf, &dataset)?,
        transpose_forward: plans.need("transpose_forward")?.three(axis)?,
        transpose_backward: plans.need("transpose_backward")?.three(axis)?,
        spacing_mm: spacing(&conf, planar)?,
        resampling_data: resampling(&conf, "resampling_fn_data", false)?,
        resampling_labels: resampling(&conf, "resampling_fn_seg", true)?,
    };
    plan.validate(plans_path)?;
    Ok((plan, identifier.to_string()))
}

/// The network that the configuration `name` of `plans.json` asks for, with so many input channels and classes.
///
/// # Errors
/// [`Error::Io`]; [`Error::Model`] naming the key that is missing or of the wrong kind; [`Error::Unsupported`] naming the
/// class, operation or size that there is nothing for.
pub fn planned_architecture(plans: &Path, name: &str, in_channels: usize, classes: usize) -> Result<Architecture> {
    let value = json::read(plans)?;
    let resolved = Value::Object(resolve(&Field::root(plans, &value).need("configurations")?, name)?);
    let conf = Field::at(plans, format!("configurations.{name}"), &resolved);
    unet::from_plans(&conf, in_channels, classes).map(Architecture::Unet)
}

/// Checks that a checkpoint's U-Net is the one that the plans ask for: its tensors do not tell what is between them.
pub(super) fn check_architecture(folder: &Path, info: &CheckpointInfo, found: &UnetConfig) -> Result<()> {
    let path = folder.join("plans.json");
    let planned = planned_architecture(&path, &info.configuration, found.in_channels, found.classes)?;
    if planned != Architecture::Unet(found.clone()) {
        let field = format!("configurations.{}.architecture", info.configuration);
        return Err(Error::model(&path, field, format!("{planned:?}, but the checkpoint holds {found:?}")));
    }
    Ok(())
}

/// A configuration with everything it inherits; its own keys win.
pub(in crate::nnunet) fn resolve(configurations: &Field<'_>, name: &str) -> Result<Map<String, Value>> {
    let mut chain: Vec<(String, Map<String, Value>)> = Vec::new();
    let mut next = Some(name.to_string());
    while let Some(name) = next {
        if chain.iter().any(|(n, _)| *n == name) {
            return Err(configurations.error(format!("{name:?} inherits from itself")));
        }
        let Some(conf) = configurations.get(&name) else {
            let known: Vec<&str> = configurations.entries()?.iter().map(|(k, _)| *k).collect();
            return Err(configurations.error(format!("no configuration {name:?}, there are {known:?}")));
        };
        conf.entries()?;
        next = conf.get("inherits_from").map(|p| p.str().map(str::to_string)).transpose()?;
        chain.push((name, conf.value.as_object().cloned().unwrap_or_default()));
    }
    let mut out = Map::new();
    for (_, conf) in chain.into_iter().rev() {
        out.extend(conf);
    }
    Ok(out)
}

/// Voxels (z, y, x) of a configuration's patch, up to `most` along an axis, and whether it is a 2D one, of a single slice.
pub(in crate::nnunet) fn patch_size(conf: &Field<'_>, most: usize) -> Result<([usize; 3], bool)> {
    let sizes = conf.need("patch_size")?;
    let list = sizes.items()?.iter().map(|p| p.usize(most)).collect::<Result<Vec<_>>>()?;
    match *list.as_slice() {
        [z, y, x] => Ok(([z, y, x], false)),
        [y, x] => Ok(([1, y, x], true)),
        _ => Err(sizes.error(format!("{} sizes, expected 2 or 3", list.len()))),
    }
}

/// Target spacing in mm. The first axis of a 2D configuration (`planar`) keeps the image's own.
fn spacing(conf: &Field<'_>, planar: bool) -> Result<[Option<f64>; 3]> {
    let spacing = conf.need("spacing")?;
    match spacing.items()?.as_slice() {
        [y, x] if planar => Ok([None, Some(y.f64()?), Some(x.f64()?)]),
        _ if planar => Err(spacing.error("expected two lengths, as patch_size has two")),
        _ => Ok(spacing.three(Field::f64)?.map(Some)),
    }
}

/// Strides of the poolings: the plan's list without the first stage, which never pools. Those of a 2D configuration
/// (`planar`) get a first axis of 1.
pub(in crate::nnunet) fn pools(conf: &Field<'_>, planar: bool) -> Result<Vec<[usize; 3]>> {
    let list = match conf.get("architecture") {
        Some(a) => a.need("arch_kwargs")?.need("strides")?,
        // nnU-Net 2.2 and before
        None => conf.need("pool_op_kernel_sizes")?,
    };
    let all = list.items()?;
    let pools = all.get(1..).filter(|p| !p.is_empty());
    let pools = pools.ok_or_else(|| list.error("expected the strides of at least two stages"))?;
    let stride = |s: &Field<'_>| {
        if !planar {
            return s.three(|v| v.usize(64));
        }
        match s.items()?.as_slice() {
            [y, x] => Ok([1, y.usize(64)?, x.usize(64)?]),
            _ => Err(s.error("expected two strides")),
        }
    };
    pools.iter().map(stride).collect()
}

fn channels(plans: &Field<'_>, conf: &Field<'_>, dataset: &Field<'_>) -> Result<Vec<Channel>> {
    // "modality" is what nnU-Net 1 wrote, still accepted by 2 and preferred when both are there.
    let names = match dataset.get("modality") {
        Some(m) => m,
        None => dataset.need("channel_names")?,
    };
    let mut named: Vec<(usize, String)> = Vec::new();
    for (key, value) in names.entries()? {
        let index = key.parse().map_err(|_| value.error("the key is no channel number"))?;
        named.push((index, value.str()?.to_string()));
    }
    named.sort();
    if let Some(i) = named.iter().enumerate().position(|(i, (k, _))| *k != i) {
        return Err(names.error(format!("no channel {i}, expected channels numbered from 0 without gaps")));
    }
    let schemes = conf.need("normalization_schemes")?;
    let masks = conf.need("use_mask_for_norm")?;
    let (schemes_, masks_) = (schemes.items()?, masks.items()?);
    if schemes_.len() != named.len() {
        return Err(schemes.error(format!("{} entries, dataset.json has {} channels", schemes_.len(), named.len())));
    }
    if masks_.len() != named.len() {
        return Err(masks.error(format!("{} entries, dataset.json has {} channels", masks_.len(), named.len())));
    }
    let statistics = ["foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality"]
        .iter()
        .find_map(|key| plans.get(key));
    named
        .into_iter()
        .zip(schemes_.iter().zip(&masks_))
        .map(|((index, name), (scheme, mask))| {
            let normalization = normalization(scheme)?;
            let found = statistics.as_ref().and_then(|s| s.get(&index.to_string()));
            let intensity = match (normalization, found) {
                (Normalization::Ct, Some(s)) => Some(Intensity {
                    mean: s.need("mean")?.f64()?,
                    std: s.need("std")?.f64()?,
                    percentile_00_5: s.need("percentile_00_5")?.f64()?,
                    percentile_99_5: s.need("percentile_99_5")?.f64()?,
                }),
                (Normalization::Ct, None) => {
                    let key = format!("foreground_intensity_properties_per_channel.{index}");
                    return Err(plans.error(format!("{key} is missing, needed by CTNormalization")));
                }
                _ => None,
            };
            Ok(Channel { name, normalization, use_mask: mask.bool()?, intensity })
        })
        .collect()
}

fn normalization(scheme: &Field<'_>) -> Result<Normalization> {
    Ok(match scheme.str()? {
        "CTNormalization" => Normalization::Ct,
        "ZScoreNormalization" => Normalization::ZScore,
        "NoNormalization" => Normalization::None,
        "RescaleTo01Normalization" => Normalization::RescaleTo01,
        "RGBTo01Normalization" => Normalization::RgbTo01,
        other => return Err(Error::unsupported(format!("normalisation scheme {other:?}"))),
    })
}

/// `of_labels`: whether the function has to be told that it is given a label map.
fn resampling(conf: &Field<'_>, key: &str, of_labels: bool) -> Result<Resampling> {
    let function = conf.need(key)?.str()?;
    if function != "resample_data_or_seg_to_shape" {
        let what = format!("{key} {function:?}; resample_data_or_seg_to_shape is");
        return Err(Error::unsupported(what));
    }
    let kwargs = conf.need(&format!("{key}_kwargs"))?;
    let other = |name: &str| {
        let name = printable(name);
        let what = format!("{key}_kwargs.{name}; order, order_z, force_separate_z and is_seg {of_labels} are");
        Err(Error::unsupported(what))
    };
    for (name, value) in kwargs.entries()? {
        match name {
            "order" | "order_z" | "force_separate_z" => {}
            "is_seg" if value.bool()? == of_labels => {}
            _ => return other(name),
        }
    }
    if of_labels && kwargs.value.get("is_seg").is_none() {
        return other("is_seg (missing)");
    }
    // Defaults of nnU-Net's function. A null is not an absent key: it asks for the rule of 3:1.
    let force_separate_z = match kwargs.value.get("force_separate_z") {
        None => Some(false),
        Some(_) => kwargs.get("force_separate_z").map(|f| f.bool()).transpose()?,
    };
    Ok(Resampling {
        order: kwargs.get("order").map_or(Ok(3), |o| o.usize(5))? as u8,
        order_z: kwargs.get("order_z").map_or(Ok(0), |o| o.usize(5))? as u8,
        force_separate_z,
    })
}
