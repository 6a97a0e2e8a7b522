//! From a fingerprint to plans (nnU-Net `ExperimentPlanner`): target spacings, patches, batches and networks.

mod configuration;
mod topology;
mod vram;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::base::json::Json;
use crate::error::{Error, Result};
use crate::io::atomic::write_atomically;
use crate::nnunet::dataset::{Dataset, DatasetJson, Reader};
use crate::nnunet::fingerprint::{Fingerprint, median, percentile};
use crate::nnunet::{json, split};
pub use configuration::Configuration;
use configuration::Context;

/// Beyond this factor an axis counts as coarser than the others.
const ANISOTROPY: f64 = 3.0;

/// A patch of full resolution that covers less of the images asks for a configuration of low resolution.
const LOWRES_BELOW: f64 = 0.25;

/// One of nnU-Net's planners, by the names of its classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Planner {
    /// `ExperimentPlanner`: plain U-Nets.
    Default,
    /// `ResEncUNetPlanner`: residual encoders, otherwise as the default.
    ResEnc,
    /// `nnUNetPlannerResEncM`.
    ResEncM,
    /// `nnUNetPlannerResEncL`.
    ResEncL,
    /// `nnUNetPlannerResEncXL`.
    ResEncXl,
}

/// What planners differ in.
struct PlannerRules {
    residual: bool,
    reference_3d: f64,
    reference_2d: f64,
    reference_gb: f64,
    default_gb: f64,
    /// Part of the data set that a batch may cover.
    max_covered: f64,
}

impl PlannerRules {
    /// Blocks of the encoder's and convolutions of the decoder's stages.
    fn blocks(&self, stages: usize) -> Result<(Vec<usize>, Vec<usize>)> {
        let most = if self.residual { 13 } else { 14 };
        if stages > most {
            return Err(Error::unsupported(format!("a network of {stages} stages; this planner has up to {most}")));
        }
        if !self.residual {
            return Ok((vec![2; stages], vec![2; stages - 1]));
        }
        let encoder = [1, 3, 4].into_iter().chain(std::iter::repeat(6)).take(stages).collect();
        Ok((encoder, vec![1; stages - 1]))
    }
}

impl Planner {
    /// All of them.
    pub const ALL: [Planner; 5] =
        [Planner::Default, Planner::ResEnc, Planner::ResEncM, Planner::ResEncL, Planner::ResEncXl];

    /// The name of nnU-Net's class.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Planner::Default => "ExperimentPlanner",
            Planner::ResEnc => "ResEncUNetPlanner",
            Planner::ResEncM => "nnUNetPlannerResEncM",
            Planner::ResEncL => "nnUNetPlannerResEncL",
            Planner::ResEncXl => "nnUNetPlannerResEncXL",
        }
    }

    /// The name of its plans, unless another one is asked for.
    #[must_use]
    pub fn plans_name(self) -> &'static str {
        match self {
            Planner::Default => "nnUNetPlans",
            Planner::ResEnc => "nnUNetResEncUNetPlans",
            Planner::ResEncM => "nnUNetResEncUNetMPlans",
            Planner::ResEncL => "nnUNetResEncUNetLPlans",
            Planner::ResEncXl => "nnUNetResEncUNetXLPlans",
        }
    }

    fn rules(self) -> PlannerRules {
        let of = |residual, reference_3d, reference_2d, gb, max_covered| PlannerRules {
            residual,
            reference_3d,
            reference_2d,
            reference_gb: gb,
            default_gb: gb,
            max_covered,
        };
        match self {
            Planner::Default => of(false, 560e6, 85e6, 8.0, 0.05),
            Planner::ResEnc => of(true, 680e6, 135e6, 8.0, 0.05),
            Planner::ResEncM => of(true, 680e6, 135e6, 8.0, 1.0),
            Planner::ResEncL => of(true, 2.1e9, 380e6, 24.0, 1.0),
            Planner::ResEncXl => of(true, 3.6e9, 560e6, 40.0, 1.0),
        }
    }
}

impl FromStr for Planner {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|p| p.name() == s).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|p| p.name()).collect();
            Error::usage(format!("planner {s:?}: expected one of {}", known.join(", ")))
        })
    }
}

/// What can be asked of a planner.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PlanOptions {
    /// Memory of the card to plan for in GB, instead of the planner's own.
    pub gpu_memory_gb: Option<f64>,
    /// Target spacing of full resolution in mm along the images' own (z, y, x), instead of the data set's.
    pub target_spacing_mm: Option<[f64; 3]>,
    /// Name of the plans, instead of the planner's own.
    pub plans_name: Option<String>,
    /// Leave the axes in their order.
    pub suppress_transpose: bool,
}

/// Plans of a data set.
#[derive(Debug, Clone, PartialEq)]
pub struct Plans {
    /// Their name; the file is `NAME.json`.
    pub name: String,
    /// The planned configurations: "2d", then of three-dimensional data sets "3d_lowres" if there is one and "3d_fullres".
    pub configurations: Vec<Configuration>,
    value: Json,
}

/// Plans a data set with the folder's `name`, whose images `reader` reads.
///
/// # Errors
/// [`Error::Usage`] for options out of range and when nothing fits the memory asked for; [`Error::Unsupported`] for networks
/// of too many stages.
pub fn plan(
    dataset: &DatasetJson,
    name: &str,
    reader: Reader,
    fingerprint: &Fingerprint,
    planner: Planner,
    options: &PlanOptions,
) -> Result<Plans> {
    check(options)?;
    let target = options.target_spacing_mm.unwrap_or_else(|| target_spacing(fingerprint));
    let (forward, backward) = if options.suppress_transpose { ([0, 1, 2], [0, 1, 2]) } else { transpose(target) };
    let spacing = forward.map(|a| target[a]);
    let new_shape = |(shape, old): (&[usize; 3], &[f64; 3])| {
        std::array::from_fn::<f64, 3, _>(|a| (old[a] / target[a] * shape[a] as f64).round_ties_even())
    };
    let new_shapes: Vec<[f64; 3]> = fingerprint.shapes.iter().zip(&fingerprint.spacings_mm).map(new_shape).collect();
    let median_shape = forward.map(|a| median_along(&new_shapes, a));
    let context = Context { dataset, planner, options };
    let of_shape = |shape: [f64; 3]| shape.iter().product::<f64>();
    let cases = dataset.num_training as f64;
    let voxels = of_shape(median_shape) * cases;

    let (mut full, mut low) = (None, None);
    if median_shape[0] != 1.0 {
        let mut found = context.plan("3d_fullres", &spacing, &median_shape, voxels)?;
        low = low_resolution(&context, &found, spacing, median_shape, cases)?;
        found.batch_dice = low.is_some();
        full = Some(found);
    }
    let mut flat = context.plan("2d", &spacing[1..], &median_shape[1..], voxels)?;
    flat.batch_dice = true;

    let json = |c: &Configuration, whole| c.to_json(dataset, fingerprint.median_relative_size, whole);
    let mut listed = vec![("2d".to_owned(), json(&flat, false))];
    if let Some(low) = &low {
        let mut value = json(low, true);
        if let Json::Object(entries) = &mut value {
            entries.push(("next_stage".into(), "3d_cascade_fullres".into()));
        }
        listed.push(("3d_lowres".into(), value));
    }
    listed.extend(full.iter().map(|c| ("3d_fullres".into(), json(c, false))));
    if low.is_some() {
        let cascade = [("inherits_from", "3d_fullres".into()), ("previous_stage", "3d_lowres".into())];
        listed.push(("3d_cascade_fullres".into(), Json::object(cascade)));
    }
    let shapes: Vec<[f64; 3]> = fingerprint.shapes.iter().map(|s| s.map(|n| n as f64)).collect();
    let raw_shape = forward.map(|a| median_along(&shapes, a).round_ties_even() as usize);
    let raw_spacing = forward.map(|a| median_along(&fingerprint.spacings_mm, a));
    let plans_name = options.plans_name.clone().unwrap_or_else(|| planner.plans_name().into());
    let value = Json::object([
        ("dataset_name", name.into()),
        ("plans_name", (&plans_name).into()),
        ("original_median_spacing_after_transp", Json::list(raw_spacing)),
        ("original_median_shape_after_transp", Json::list(raw_shape)),
        ("image_reader_writer", reader.name().into()),
        ("transpose_forward", Json::list(forward)),
        ("transpose_backward", Json::list(backward)),
        ("configurations", Json::Object(listed)),
        ("experiment_planner_used", planner.name().into()),
        ("label_manager", "LabelManager".into()),
        ("foreground_intensity_properties_per_channel", fingerprint.intensities.clone()),
    ]);
    let configurations = [Some(flat), low, full].into_iter().flatten().collect();
    Ok(Plans { name: plans_name, configurations, value })
}

fn check(options: &PlanOptions) -> Result<()> {
    if let Some(gb) = options.gpu_memory_gb.filter(|gb| !(gb.is_finite() && *gb > 0.0)) {
        return Err(Error::usage(format!("GPU memory target {gb}: expected gigabytes above 0")));
    }
    if let Some(s) = options.target_spacing_mm.filter(|s| !s.iter().all(|v| (1e-2..=1e3).contains(v))) {
        return Err(Error::usage(format!("target spacing {s:?}: expected three lengths from 0.01 to 1000 mm")));
    }
    // It becomes the name of files and folders.
    if let Some(name) = options.plans_name.as_ref().filter(|n| n.is_empty() || n.contains(['/', '\\', '.'])) {
        return Err(Error::usage(format!("plans name {name:?}: expected a name without dots and slashes")));
    }
    Ok(())
}

fn median_along(values: &[[f64; 3]], axis: usize) -> f64 {
    median(&mut values.iter().map(|v| v[axis]).collect::<Vec<_>>())
}

/// The median spacing, but a finer one along an axis that is much coarser than the others and has few voxels
/// (`determine_fullres_target_spacing`).
fn target_spacing(fingerprint: &Fingerprint) -> [f64; 3] {
    let spacings = |axis: usize| fingerprint.spacings_mm.iter().map(|s| s[axis]).collect::<Vec<_>>();
    let mut target: [f64; 3] = std::array::from_fn(|a| percentile(&mut spacings(a), 50.0));
    let size: [f64; 3] = std::array::from_fn(|a| {
        percentile(&mut fingerprint.shapes.iter().map(|s| s[a] as f64).collect::<Vec<_>>(), 50.0)
    });
    let worst = coarsest(target);
    let others = [0, 1, 2].into_iter().filter(|a| *a != worst);
    let coarse = others.clone().map(|a| target[a]).fold(0.0, f64::max);
    let short = others.map(|a| size[a]).fold(f64::INFINITY, f64::min);
    if target[worst] > ANISOTROPY * coarse && size[worst] * ANISOTROPY < short {
        let finer = percentile(&mut spacings(worst), 10.0);
        target[worst] = if finer < coarse { coarse + 1e-5 } else { finer };
    }
    target
}

/// The first of the axes with the largest spacing.
fn coarsest(spacing: [f64; 3]) -> usize {
    (1..3).fold(0, |worst, a| if spacing[a] > spacing[worst] { a } else { worst })
}

/// The coarsest axis first, and the way back.
fn transpose(spacing: [f64; 3]) -> ([usize; 3], [usize; 3]) {
    match coarsest(spacing) {
        0 => ([0, 1, 2], [0, 1, 2]),
        1 => ([1, 0, 2], [1, 0, 2]),
        _ => ([2, 0, 1], [1, 2, 0]),
    }
}

/// Coarsens step by step until a patch covers enough of the images; `None` where that is not worth it.
fn low_resolution(
    context: &Context<'_>,
    full: &Configuration,
    spacing: [f64; 3],
    median_shape: [f64; 3],
    cases: f64,
) -> Result<Option<Configuration>> {
    const STEP: f64 = 1.03;
    let product = |values: [f64; 3]| values.iter().product::<f64>();
    let patch_voxels = |c: &Configuration| c.patch.iter().map(|&p| p as f64).product::<f64>();
    let whole = product(median_shape);
    let (mut coarse, mut voxels, mut covered, mut found) = (spacing, whole, patch_voxels(full), None);
    while covered / voxels < LOWRES_BELOW {
        let max = coarse.iter().copied().fold(0.0, f64::max);
        // The finest axes first, until all are within a factor of two.
        let finer = coarse.map(|s| max / s > 2.0);
        let some = finer.contains(&true);
        coarse = std::array::from_fn(|a| if finer[a] || !some { coarse[a] * STEP } else { coarse[a] });
        let shape: [f64; 3] = std::array::from_fn(|a| spacing[a] / coarse[a] * median_shape[a]);
        voxels = product(shape);
        let rounded = shape.map(f64::round_ties_even);
        let low = context.plan("3d_lowres", &coarse, &rounded, voxels * cases)?;
        covered = patch_voxels(&low);
        found = Some(low);
    }
    Ok(found.filter(|_| whole / voxels >= 2.0))
}

impl Plans {
    /// The text of the file that nnU-Net would write.
    #[must_use]
    pub fn to_text(&self) -> String {
        self.value.to_text(false)
    }

    /// Writes `NAME.json` to a data set's folder below `nnUNet_preprocessed`. Configurations of a file that is there and
    /// that no planner makes are kept.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Model`] when the file that is there is no plans file.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join(format!("{}.json", self.name));
        let mut value = self.value.clone();
        if path.is_file() {
            let old = json::read(&path)?;
            let old = json::Field::root(&path, &old).need("configurations")?;
            let planned = match &mut value {
                Json::Object(entries) => entries.iter_mut().find(|(key, _)| key == "configurations"),
                _ => None,
            };
            if let Some((_, Json::Object(planned))) = planned {
                for (name, configuration) in old.entries()? {
                    if !planned.iter().any(|(key, _)| key == name) {
                        planned.push((name.to_owned(), configuration.value.into()));
                    }
                }
            }
        }
        json::write(&path, &value, false)?;
        Ok(path)
    }
}

/// Copies what later steps need from a raw data set to its folder below `nnUNet_preprocessed`, which is made:
/// `dataset.json`, and a `splits_final.json` if there is one.
///
/// # Errors
/// [`Error::Io`]; [`Error::Dataset`] when splits that are there already differ from those of the raw data set.
pub fn copy_descriptions(dataset: &Dataset, preprocessed_folder: &Path) -> Result<()> {
    std::fs::create_dir_all(preprocessed_folder).map_err(|e| Error::io("create", preprocessed_folder, e))?;
    let raw_splits = dataset.folder.join(split::FILE);
    let splits = preprocessed_folder.join(split::FILE);
    if raw_splits.is_file() && splits.is_file() {
        let (raw, there) = (split::read(&raw_splits)?, split::read(&splits)?);
        let set = |ids: &[String]| ids.iter().cloned().collect::<std::collections::BTreeSet<_>>();
        let same = |i: usize| {
            there.get(i).is_some_and(|t| set(&t.train) == set(&raw[i].train) && set(&t.val) == set(&raw[i].val))
        };
        if let Some(i) = (0..raw.len()).find(|&i| !same(i)) {
            let what = format!("not that of {}; remove one of the files", raw_splits.display());
            return Err(Error::dataset(&splits, format!("split {i}"), what));
        }
    } else if raw_splits.is_file() {
        copy(&raw_splits, &splits)?;
    }
    copy(&dataset.folder.join("dataset.json"), &preprocessed_folder.join("dataset.json"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = std::fs::read(from).map_err(|e| Error::io("read", from, e))?;
    write_atomically(to, |file| file.write_all(&bytes).map_err(|e| Error::io("write", to, e)))
}
