//! Preprocessing of a whole training case: a CT of 112 x 256 x 256 voxels of 3 x 0.8 x 0.8 mm with 20 labels, and patches of
//! it read back from its file.

use criterion::Criterion;
use serde_json::json;
use stunet::Device;
use stunet::io::{Geometry, Image, LabelData, Segmentation};
use stunet::nnunet::preprocess::{PreprocessPlan, preprocess_case};
use stunet::nnunet::store;
use stunet::nnunet::training_case::ClassKey;

use crate::common::{Work, measure};

const SHAPE: [usize; 3] = [112, 256, 256];
const SPACING: [f64; 3] = [3.0, 0.8, 0.8];
const LABELS: u8 = 20;
const PATCH: usize = 96;

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let n: usize = SHAPE.iter().product();
    let geometry = Geometry::new(SHAPE, SPACING);
    let values = (0..n).map(|i| (i.wrapping_mul(2_654_435_761) >> 8 & 0x7ff) as f32 - 1000.5).collect();
    let image = Image::new(vec![values], geometry.clone()).expect("an image");
    // Cubes of 16 voxels.
    let cube = |i: usize| i / 65_536 / 16 * 7 + i / 256 % 256 / 16 * 3 + i % 256 / 16;
    let labels = (0..n).map(|i| (cube(i) % (usize::from(LABELS) + 1)) as u8).collect();
    let truth = Segmentation::new(LabelData::U8(labels), geometry.clone(), Vec::new()).expect("a segmentation");
    let classes: Vec<ClassKey> = (1..=i16::from(LABELS)).map(ClassKey::Label).collect();
    let plan: PreprocessPlan = serde_json::from_value(json!({
        "rules": "nnunet_v2",
        "channels": [{"name": "CT", "normalization": "z_score", "use_mask": false, "intensity": null}],
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "spacing_mm": [1.5, 1.0, 1.0],
        "resampling_data": {"order": 3, "order_z": 0, "force_separate_z": false},
        "resampling_labels": {"order": 1, "order_z": 0, "force_separate_z": false},
    }))
    .expect("a plan");
    let run = || device.install(|| preprocess_case(&image, &truth, &plan, &classes)).expect("a case");
    let case = run();
    // What no implementation can avoid: image and labels read once, both results written once.
    let voxels = |shape: [usize; 3]| shape.iter().product::<usize>() as f64;
    let bytes = Work::Bytes(5.0 * n as f64 + 6.0 * voxels(case.image.shape));
    measure(c, &device, "preprocess", "case, order 3", bytes, run);

    let dir = tempfile::tempdir().expect("a folder");
    store::write_case(dir.path(), "own", &case, &geometry, "").expect("written");
    let stored = store::open(dir.path()).and_then(|s| s.case("own")).expect("opened");
    let (mut data, mut labels) = (vec![0.0; PATCH.pow(3)], vec![0; PATCH.pow(3)]);
    let bytes = Work::Bytes(11.0 * voxels([PATCH; 3]));
    measure(c, &device, "preprocess", "patch of 96 x 96 x 96 from a file", bytes, || {
        stored.crop([20, 31, 43], [PATCH; 3], &mut data, &mut labels)
    });
}
