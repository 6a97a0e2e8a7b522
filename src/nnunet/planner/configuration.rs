//! Patch, batch and network of one configuration (nnU-Net `get_plans_for_configuration`).

use serde_json::json;

use super::topology::Topology;
use super::vram::{Blocks, feature_maps};
use super::{PlanOptions, Planner};
use crate::base::json::Json;
use crate::error::{Error, Result};
use crate::nnunet::dataset::DatasetJson;

/// Channels of the first stage.
const BASE_FEATURES: usize = 32;

/// Smallest batch.
const MIN_BATCH: f64 = 2.0;

/// A planned configuration.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Configuration {
    /// "2d", "3d_fullres", "3d_lowres".
    pub name: String,
    /// Samples in a batch.
    pub batch_size: usize,
    /// Patch in voxels along (z, y, x), of 2D (y, x), transposed.
    pub patch: Vec<usize>,
    /// Median shape of the data set's images at this spacing.
    pub median_shape: Vec<f64>,
    /// Target spacing in mm.
    pub spacing_mm: Vec<f64>,
    /// Channels of each stage.
    pub features: Vec<usize>,
    /// Kernel of each stage.
    pub kernels: Vec<Vec<usize>>,
    /// Stride of each stage.
    pub strides: Vec<Vec<usize>>,
    /// Whether Dice is that of the whole batch.
    pub batch_dice: bool,
    /// Elements of all feature maps of one sample, by which the planner measures memory.
    pub feature_maps: u64,
    pub(super) data_identifier: String,
    encoder: Vec<usize>,
    decoder: Vec<usize>,
    residual: bool,
}

/// What all configurations of a data set share.
pub(super) struct Context<'a> {
    pub(super) dataset: &'a DatasetJson,
    pub(super) planner: Planner,
    pub(super) options: &'a PlanOptions,
}

impl Context<'_> {
    /// Plans a configuration for images of `median_shape` at `spacing`, in a data set of `dataset_voxels` voxels.
    pub(super) fn plan(
        &self,
        name: &str,
        spacing: &[f64],
        median_shape: &[f64],
        dataset_voxels: f64,
    ) -> Result<Configuration> {
        let rules = self.planner.rules();
        let flat = spacing.len() == 2;
        let reference = if flat { rules.reference_2d } else { rules.reference_3d }
            * (self.options.gpu_memory_gb.unwrap_or(rules.default_gb) / rules.reference_gb);
        let reference_batch = if flat { 12.0 } else { 2.0 };
        let max_features = if flat { 512 } else { 320 };

        let mut topology = Topology::new(spacing, &initial_patch(spacing, median_shape));
        loop {
            let features: Vec<usize> =
                (0..topology.stages()).map(|i| (BASE_FEATURES << i.min(16)).min(max_features)).collect();
            let (encoder, decoder) = rules.blocks(topology.stages())?;
            let blocks = Blocks {
                features: &features,
                encoder: &encoder,
                decoder: &decoder,
                residual: rules.residual,
                classes: self.dataset.labels.entries(),
            };
            let estimate = feature_maps(&topology, blocks);
            // The default planner measures a batch of two, those of residual networks the reference batch.
            let measured = if rules.residual { estimate as f64 } else { estimate as f64 / reference_batch * MIN_BATCH };
            if measured > reference {
                topology = self.reduced(spacing, &topology, median_shape)?;
                continue;
            }
            let patch_voxels: f64 = topology.patch.iter().map(|&p| p as f64).product();
            let fits = (reference / estimate as f64 * reference_batch).round_ties_even();
            let cap = (dataset_voxels * rules.max_covered / patch_voxels).round_ties_even();
            return Ok(Configuration {
                name: name.into(),
                batch_size: fits.min(cap).max(MIN_BATCH) as usize,
                patch: topology.patch,
                median_shape: median_shape.to_vec(),
                spacing_mm: spacing.to_vec(),
                features,
                kernels: topology.kernels,
                strides: topology.strides,
                batch_dice: false,
                feature_maps: estimate,
                data_identifier: self.data_identifier(name),
                encoder,
                decoder,
                residual: rules.residual,
            });
        }
    }

    /// One step shorter along the axis that is longest compared with the images.
    fn reduced(&self, spacing: &[f64], topology: &Topology, median_shape: &[f64]) -> Result<Topology> {
        let part = |a: usize| topology.patch[a] as f64 / median_shape[a];
        // On ties the last one, as the end of a stable sort.
        let axis = (0..spacing.len()).max_by(|&a, &b| part(a).total_cmp(&part(b))).unwrap_or(0);
        let mut patch: Vec<f64> = topology.patch.iter().map(|&p| p as f64).collect();
        let mut shorter = patch.clone();
        shorter[axis] -= topology.divisor[axis] as f64;
        // With fewer poolings a smaller step may do.
        patch[axis] -= Topology::new(spacing, &shorter).divisor[axis] as f64;
        if patch[axis] < 1.0 {
            let gb = self.options.gpu_memory_gb.unwrap_or(self.planner.rules().default_gb);
            return Err(Error::usage(format!("no patch fits a GPU memory target of {gb} GB; ask for more")));
        }
        Ok(Topology::new(spacing, &patch))
    }

    /// Name of the folder of preprocessed cases.
    fn data_identifier(&self, name: &str) -> String {
        // Residual networks use the data of the default plans where these are the same.
        if self.planner.rules().residual && matches!(name, "2d" | "3d_fullres") {
            return format!("{}_{name}", Planner::Default.plans_name());
        }
        format!("{}_{name}", self.options.plans_name.as_deref().unwrap_or(self.planner.plans_name()))
    }
}

/// As many voxels as the largest patch worth looking at, in the proportions of the spacing, cut to the images.
fn initial_patch(spacing: &[f64], median_shape: &[f64]) -> Vec<f64> {
    let inverse: Vec<f64> = spacing.iter().map(|s| 1.0 / s).collect();
    let voxels = if spacing.len() == 2 { 2048f64.powi(2) } else { 256f64.powi(3) };
    let scale = (voxels / inverse.iter().product::<f64>()).powf(1.0 / spacing.len() as f64);
    inverse.iter().zip(median_shape).map(|(i, m)| (i * scale).round_ties_even().min(*m)).collect()
}

impl Configuration {
    /// As it stands in the plans, without what only one configuration has.
    pub(super) fn to_json(&self, dataset: &DatasetJson, median_relative_size: f64, whole_median: bool) -> Json {
        let schemes: Vec<(&str, bool)> = dataset.channels.iter().map(|name| scheme(name)).collect();
        let masked = median_relative_size < 3.0 / 4.0;
        let median = self.median_shape.iter().map(|&n| if whole_median { Json::Int(n as i64) } else { n.into() });
        let resampling = "resample_data_or_seg_to_shape";
        let kwargs = |is_seg: bool, order: u8| -> Json {
            json!({"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": null}).into()
        };
        Json::object([
            ("data_identifier", (&self.data_identifier).into()),
            ("preprocessor_name", "DefaultPreprocessor".into()),
            ("batch_size", self.batch_size.into()),
            ("patch_size", Json::list(self.patch.clone())),
            ("median_image_size_in_voxels", Json::List(median.collect())),
            ("spacing", Json::list(self.spacing_mm.clone())),
            ("normalization_schemes", Json::list(schemes.iter().map(|(name, _)| *name))),
            ("use_mask_for_norm", Json::list(schemes.iter().map(|(_, mask)| masked && *mask))),
            ("resampling_fn_data", resampling.into()),
            ("resampling_fn_seg", resampling.into()),
            ("resampling_fn_data_kwargs", kwargs(false, 3)),
            ("resampling_fn_seg_kwargs", kwargs(true, 1)),
            ("resampling_fn_probabilities", resampling.into()),
            ("resampling_fn_probabilities_kwargs", kwargs(false, 1)),
            ("architecture", self.architecture()),
            ("batch_dice", self.batch_dice.into()),
        ])
    }

    fn architecture(&self) -> Json {
        let (class, encoder) = if self.residual {
            ("ResidualEncoderUNet", "n_blocks_per_stage")
        } else {
            ("PlainConvUNet", "n_conv_per_stage")
        };
        let axes = self.patch.len();
        let lists = |lists: &[Vec<usize>]| Json::list(lists.iter().map(|l| Json::list(l.clone())));
        let arguments = Json::object([
            ("n_stages", self.strides.len().into()),
            ("features_per_stage", Json::list(self.features.clone())),
            ("conv_op", format!("torch.nn.modules.conv.Conv{axes}d").as_str().into()),
            ("kernel_sizes", lists(&self.kernels)),
            ("strides", lists(&self.strides)),
            (encoder, Json::list(self.encoder.clone())),
            ("n_conv_per_stage_decoder", Json::list(self.decoder.clone())),
            ("conv_bias", true.into()),
            ("norm_op", format!("torch.nn.modules.instancenorm.InstanceNorm{axes}d").as_str().into()),
            ("norm_op_kwargs", json!({"eps": 1e-5, "affine": true}).into()),
            ("dropout_op", Json::Null),
            ("dropout_op_kwargs", Json::Null),
            ("nonlin", "torch.nn.LeakyReLU".into()),
            ("nonlin_kwargs", json!({"inplace": true}).into()),
        ]);
        Json::object([
            ("network_class_name", format!("dynamic_network_architectures.architectures.unet.{class}").as_str().into()),
            ("arch_kwargs", arguments),
            ("_kw_requires_import", json!(["conv_op", "norm_op", "dropout_op", "nonlin"]).into()),
        ])
    }
}

/// nnU-Net's normalisation for a channel of this name, and whether it may keep to the nonzero mask.
fn scheme(channel: &str) -> (&'static str, bool) {
    match channel.to_lowercase().as_str() {
        "ct" => ("CTNormalization", false),
        "nonorm" => ("NoNormalization", false),
        "rescale_to_0_1" => ("RescaleTo01Normalization", false),
        "rgb_to_0_1" => ("RGBTo01Normalization", false),
        _ => ("ZScoreNormalization", true),
    }
}
