//! Preprocessing against what nnU-Net 2.8.1 and 1.7.1 made of the same images.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use stunet::ModelOptions;
use stunet::io::read_nifti;
use stunet::nnunet::model::ModelFolder;
use stunet::nnunet::plans::InferencePlan;
use stunet::nnunet::preprocess::preprocess;

use crate::common::shared;

fn plan(model: &Path) -> InferencePlan {
    ModelFolder::open(model, &ModelOptions::new()).unwrap().plan
}

/// Largest difference and the share of values that differ by more than 1e-4.
fn difference(ours: &[f32], theirs: &[f32]) -> (f32, f64) {
    assert_eq!(ours.len(), theirs.len());
    let apart = |(a, b): (&f32, &f32)| (a - b).abs();
    let max = ours.iter().zip(theirs).map(apart).fold(0.0, |m, d| if d <= m { m } else { d });
    let far = ours.iter().zip(theirs).map(apart).filter(|d| d.is_nan() || *d > 1e-4).count();
    (max, far as f64 / ours.len() as f64)
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    tensors.tensor(name).unwrap().data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn check_v2(dataset: &Path, case: &Path) -> (f32, f64) {
    let plan = plan(&dataset.join("model/stunet"));
    let stem = case.file_stem().unwrap().to_str().unwrap();
    let files: Vec<_> =
        (0..plan.channels.len()).map(|c| dataset.join("raw/imagesTr").join(format!("{stem}_{c:04}.nii.gz"))).collect();
    let ours = preprocess(&read_nifti(&files).unwrap(), &plan).unwrap();

    let expected: Value = serde_json::from_slice(&std::fs::read(case.with_extension("json")).unwrap()).unwrap();
    let p = &ours.properties;
    assert_eq!(p.spacing_mm.to_vec(), numbers(&expected["spacing"]), "{stem}");
    let shape = |name: &str| numbers(&expected[name]).iter().map(|&n| n as usize).collect::<Vec<_>>();
    assert_eq!(p.shape_before_cropping.to_vec(), shape("shape_before_cropping"), "{stem}");
    assert_eq!(p.shape_after_cropping.to_vec(), shape("shape_after_cropping_and_before_resampling"), "{stem}");
    assert_eq!(json!(p.bbox), expected["bbox_used_for_cropping"], "{stem}");

    let bytes = std::fs::read(case).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    let [z, y, x] = ours.shape;
    assert_eq!(theirs.tensor("data").unwrap().shape(), [ours.channels, z, y, x], "{stem}");
    difference(&ours.data, &floats(&theirs, "data"))
}

#[test]
fn golden_preprocess_v2() {
    let Some(pipeline) = shared("golden/pipeline") else { return };
    for name in ["ct_aniso", "ignore", "mr_thick", "mr_two", "regions"] {
        let dataset = pipeline.join(name);
        let mut cases: Vec<_> = std::fs::read_dir(dataset.join("preprocessed/3d_fullres"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        cases.sort();
        assert!(!cases.is_empty(), "{name}");
        for case in cases {
            let (max, far) = check_v2(&dataset, &case);
            eprintln!("{name} {}: max difference {max:.1e}, beyond 1e-4: {far:.1e}", case.display());
            assert!(max <= 1e-3 && far <= 1e-4, "{name} {}: {max} {far}", case.display());
        }
    }
}

#[test]
fn golden_preprocess_v1() {
    let Some(v1) = shared("golden/stunet_v1") else { return };
    let plan = plan(&v1.join("Task101_TotalSegmentator/STUNetTrainer_small__nnUNetPlansv2.1"));
    for (name, folder) in [("example_ct_sm", "ct"), ("pulmonary_1p5mm", "ct"), ("example_mr_sm", "mr")] {
        let Some(image) = shared(&format!("data/{folder}/{name}.nii.gz")) else { return };
        let ours = preprocess(&read_nifti(&[image]).unwrap(), &plan).unwrap();

        let bytes = std::fs::read(v1.join("predictions").join(name).with_extension("safetensors")).unwrap();
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        let integers = |name: &str| -> Vec<usize> {
            let data = theirs.tensor(name).unwrap();
            data.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as usize).collect()
        };
        let [z, y, x] = ours.shape;
        assert_eq!(integers("shape"), [1, z, y, x], "{name}");
        let slices = floats(&theirs, "data");
        let first = integers("first_slice")[0] * y * x;
        let (max, far) = difference(&ours.data[first..first + slices.len()], &slices);
        eprintln!("{name}: max difference {max:.1e}, beyond 1e-4: {far:.1e}");
        assert!(max <= 1e-3 && far <= 1e-4, "{name}: {max} {far}");
    }
}
