//! Preprocessing against what nnU-Net 2.8.1 and 1.7.1 made of the same images.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use stunet::io::{Geometry, Image};
use stunet::nnunet::plans::InferencePlan;
use stunet::nnunet::preprocess::preprocess;

use crate::common::shared;

/// The inference part of a v2 `plans.json`, configuration 3d_fullres.
fn v2_plan(plans: &Value) -> InferencePlan {
    let config = &plans["configurations"]["3d_fullres"];
    let channels: Vec<Value> = config["normalization_schemes"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(i, scheme)| {
            let normalization = match scheme.as_str().unwrap() {
                "CTNormalization" => "ct",
                "ZScoreNormalization" => "z_score",
                other => panic!("{other}"),
            };
            json!({
                "name": format!("channel {i}"), "normalization": normalization,
                "use_mask": config["use_mask_for_norm"][i],
                "intensity": plans["foreground_intensity_properties_per_channel"][i.to_string()],
            })
        })
        .collect();
    plan("nnunet_v2", json!(channels), &config["spacing"], &plans["transpose_forward"], &plans["transpose_backward"])
}

fn plan(rules: &str, channels: Value, spacing: &Value, forward: &Value, backward: &Value) -> InferencePlan {
    serde_json::from_value(json!({
        "rules": rules, "dataset": "", "trainer": "", "configuration": "3d_fullres", "channels": channels,
        "labels": [], "decision": "argmax", "heads": 2, "patch": [64, 64, 64], "spacing_mm": spacing,
        "transpose_forward": forward, "transpose_backward": backward,
        "strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], "mirror_axes": [],
        "resampling_data": {"order": 3, "order_z": 0, "force_separate_z": null},
        "resampling_probabilities": {"order": 1, "order_z": 0, "force_separate_z": null},
    }))
    .unwrap()
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
    let plans: Value = serde_json::from_slice(&std::fs::read(dataset.join("nnUNetPlans.json")).unwrap()).unwrap();
    let plan = v2_plan(&plans);
    let stem = case.file_stem().unwrap().to_str().unwrap();
    let files: Vec<_> =
        (0..plan.channels.len()).map(|c| dataset.join("raw/imagesTr").join(format!("{stem}_{c:04}.nii.gz"))).collect();
    let ours = preprocess(&read(&files), &plan).unwrap();

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
    let Some(predictions) = shared("golden/stunet_v1/predictions") else { return };
    for (name, folder) in [("example_ct_sm", "ct"), ("pulmonary_1p5mm", "ct"), ("example_mr_sm", "mr")] {
        let Some(image) = shared(&format!("data/{folder}/{name}.nii.gz")) else { return };
        let channel = json!([{"name": "CT", "normalization": "z_score", "use_mask": false, "intensity": null}]);
        let same = json!([0, 1, 2]);
        let plan = plan("nnunet_v1", channel, &json!([1.5, 1.5, 1.5]), &same, &same);
        let ours = preprocess(&read(&[image]), &plan).unwrap();

        let bytes = std::fs::read(predictions.join(name).with_extension("safetensors")).unwrap();
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

/// A minimal NIfTI reader for the reference images alone (little-endian, linear scaling), until the crate's own takes
/// its place.
fn read(files: &[std::path::PathBuf]) -> Image {
    let mut geometry = None;
    let mut channels = Vec::new();
    for file in files {
        let mut bytes = Vec::new();
        let packed = std::fs::File::open(file).unwrap();
        std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(packed), &mut bytes).unwrap();
        let short = |at: usize| i16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        let float = |at: usize| f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let shape = [46, 44, 42].map(|at| short(at) as usize);
        let spacing = [88, 84, 80].map(|at| f64::from(float(at)));
        let voxels = &bytes[float(108) as usize..];
        let raw: Vec<f32> = match short(70) {
            2 => voxels.iter().map(|&v| f32::from(v)).collect(),
            4 => voxels.chunks_exact(2).map(|b| f32::from(i16::from_le_bytes([b[0], b[1]]))).collect(),
            8 => voxels.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f32).collect(),
            16 => voxels.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            64 => voxels.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()) as f32).collect(),
            other => panic!("{}: data type {other}", file.display()),
        };
        let (slope, offset) = (float(112), float(116));
        let scaled = if slope == 0.0 { raw } else { raw.iter().map(|v| v * slope + offset).collect() };
        channels.push(scaled[..shape.iter().product()].to_vec());
        geometry.get_or_insert_with(|| Geometry::new(shape, spacing));
    }
    Image::new(channels, geometry.unwrap()).unwrap()
}
