//! A predictor around a network without a model folder, for measurements.

use super::{PredictOptions, Predictor};
use crate::error::Result;
use crate::models::Network;
use crate::nnunet::dataset::Reader;
use crate::nnunet::plans::{Channel, Decision, InferencePlan, Intensity, Normalization, Resampling, Rules};
use crate::tensor::Device;

impl Predictor {
    /// Runs `net` in windows of `patch` voxels of `spacing_mm`, by nnU-Net v2's rules for CT, on intensities in [-1, 1].
    /// No promise of stability.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) when patch or spacing cannot be.
    #[doc(hidden)]
    pub fn stand_in(net: impl Into<Network>, patch: [usize; 3], spacing_mm: [f64; 3], device: &Device) -> Result<Self> {
        let net = net.into();
        let classes = net.classes();
        let mut strides = [[1; 3]; 5];
        strides.iter_mut().zip(net.strides()).for_each(|(to, s)| *to = *s);
        let intensity = Intensity { mean: 0.0, std: 0.5, percentile_00_5: -1.0, percentile_99_5: 1.0 };
        let channel = |c: usize| Channel {
            name: format!("channel {c}"),
            normalization: Normalization::Ct,
            use_mask: false,
            intensity: Some(intensity),
        };
        // nnU-Net's own choice: cubic for images, linear for scores.
        let resampling = |order: u8| Resampling { order, order_z: 0, force_separate_z: None };
        let plan = InferencePlan {
            rules: Rules::NnunetV2,
            dataset: "none".into(),
            trainer: "none".into(),
            configuration: "3d_fullres".into(),
            reader: Reader::default(),
            channels: (0..net.in_channels()).map(channel).collect(),
            labels: (1..classes).map(|c| (c as u16, format!("class {c}"))).collect(),
            decision: Decision::Argmax,
            heads: classes,
            patch,
            spacing_mm: spacing_mm.map(Some),
            transpose_forward: [0, 1, 2],
            transpose_backward: [0, 1, 2],
            strides,
            mirror_axes: vec![0, 1, 2],
            resampling_data: resampling(3),
            resampling_probabilities: resampling(1),
            keep_largest: Vec::new(),
            previous: None,
        };
        plan.validate(std::path::Path::new("stand-in"))?;
        Ok(Self { plan, nets: vec![net], device: device.clone(), options: PredictOptions::default() })
    }
}
