//! Preprocessing's resampling: a CT of 200 x 512 x 512 voxels of 1.5 x 0.8 x 0.8 mm.

use criterion::Criterion;
use serde_json::json;
use stunet::Device;
use stunet::io::{Geometry, Image};
use stunet::nnunet::plans::InferencePlan;
use stunet::nnunet::preprocess::preprocess;

use crate::common::{CT, Work, measure};

const SPACING: [f64; 3] = [1.5, 0.8, 0.8];

fn plan(order: u8, separate: bool, spacing: [f64; 3]) -> InferencePlan {
    let rule = json!({"order": order, "order_z": 0, "force_separate_z": separate});
    serde_json::from_value(json!({
        "rules": "nnunet_v2", "dataset": "", "trainer": "", "configuration": "",
        "channels": [{"name": "CT", "normalization": "none", "use_mask": false, "intensity": null}],
        "labels": [], "decision": "argmax", "heads": 2, "patch": [32, 32, 32], "spacing_mm": spacing,
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], "mirror_axes": [],
        "resampling_data": rule, "resampling_probabilities": rule,
    }))
    .expect("a plan")
}

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let n: usize = CT.iter().product();
    let values = (0..n).map(|i| (i.wrapping_mul(2_654_435_761) >> 8 & 0x7ff) as f32 - 1000.5).collect();
    let image = Image::new(vec![values], Geometry::new(CT, SPACING)).expect("an image");
    for (name, order, separate, spacing) in [
        ("order 3, to 1.5 mm", 3, false, [1.5; 3]),
        ("order 3, z apart, to 3 x 1.5 x 1.5 mm", 3, true, [3.0, 1.5, 1.5]),
        ("order 3, to 2 x 1.5 x 1.5 mm", 3, false, [2.0, 1.5, 1.5]),
        ("order 1, to 2 x 1.5 x 1.5 mm", 1, false, [2.0, 1.5, 1.5]),
    ] {
        let plan = plan(order, separate, spacing);
        // What no implementation can avoid: every voxel read once, every result written once.
        let result: f64 = (0..3).map(|k| SPACING[k] / spacing[k]).product::<f64>() * n as f64;
        let bytes = Work::Bytes(4.0 * (n as f64 + result));
        measure(c, &device, "resample", name, bytes, || device.install(|| preprocess(&image, &plan)));
    }
}
