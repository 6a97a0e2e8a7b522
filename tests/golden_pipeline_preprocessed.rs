//! Whole cases, image and truth, against what nnU-Net 2.8.1 stored of them.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use stunet::io::{read_nifti, read_segmentation};
use stunet::nnunet::labels::LabelSet;
use stunet::nnunet::model::preprocess_plan;
use stunet::nnunet::preprocess::{PreprocessedCase, preprocess_case};
use stunet::nnunet::store::location_classes;
use stunet::nnunet::training_case::ClassKey;

use crate::common::shared;

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// As Python prints the key.
fn python(key: &ClassKey) -> String {
    match key {
        ClassKey::Label(l) => l.to_string(),
        ClassKey::Region(r) if r.len() == 1 => format!("({},)", r[0]),
        ClassKey::Region(r) => format!("({})", r.iter().map(i16::to_string).collect::<Vec<_>>().join(", ")),
        _ => unreachable!(),
    }
}

fn check(ours: &PreprocessedCase, stored: &Path) {
    let name = stored.display();
    let expected = json_of(&stored.with_extension("json"));
    let p = &ours.image.properties;
    assert_eq!(p.spacing_mm.to_vec(), numbers(&expected["spacing"]), "{name}");
    assert_eq!(json!(p.shape_before_cropping), expected["shape_before_cropping"], "{name}");
    assert_eq!(json!(p.bbox), expected["bbox_used_for_cropping"], "{name}");
    assert_eq!(json!(p.shape_after_cropping), expected["shape_after_cropping_and_before_resampling"], "{name}");

    let bytes = std::fs::read(stored).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    let data = theirs.tensor("data").unwrap();
    let [z, y, x] = ours.image.shape;
    assert_eq!(data.shape(), [ours.image.channels, z, y, x], "{name}");
    let floats = data.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    let apart = ours.image.data.iter().zip(floats).map(|(a, b)| (a - b).abs());
    let max = apart.fold(0.0, |m, d| if d <= m { m } else { d });
    let seg = theirs.tensor("seg").unwrap();
    let seg = seg.data().chunks_exact(2).map(|b| i16::from_le_bytes(b.try_into().unwrap()));
    let odd = ours.labels.iter().zip(seg).filter(|(a, b)| *a != b).count();
    eprintln!("{name}: data {max:.1e} apart, {odd} of {} labels differ", ours.labels.len());
    // A few roundings in f32 of values of some standard deviations: 1.4e-6 at worst when this was written.
    assert!(max <= 1e-5, "{name}: {max}");
    assert!(odd * 10_000 <= ours.labels.len(), "{name}: {odd} labels");

    let counts: Vec<(String, usize)> = ours.locations.classes.iter().map(|(k, v)| (python(k), v.len())).collect();
    let expected_counts = expected["class_locations_count"].as_object().unwrap();
    let expected_counts: Vec<(String, usize)> =
        expected_counts.iter().map(|(k, v)| (k.clone(), v.as_u64().unwrap() as usize)).collect();
    assert_eq!(counts, expected_counts, "{name}");
    for (key, voxels) in &ours.locations.classes {
        let head: Vec<[u32; 4]> = voxels.iter().take(20).map(|&[z, y, x]| [0, z, y, x]).collect();
        let expected = &expected["class_locations_head"][python(key)];
        assert_eq!(json!(head), if expected.is_null() { json!([]) } else { expected.clone() }, "{name} {key:?}");
    }
}

#[test]
fn golden_pipeline_preprocessed() {
    let Some(pipeline) = shared("golden/pipeline") else { return };
    let folders = |path: &Path| {
        let mut all: Vec<_> = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        all.sort();
        all
    };
    for dataset in folders(&pipeline) {
        let classes = location_classes(&LabelSet::read(&dataset.join("raw/dataset.json")).unwrap());
        let mut seen = 0;
        for configuration in folders(&dataset.join("preprocessed")) {
            let name = configuration.file_name().unwrap().to_str().unwrap();
            let (plan, _) =
                preprocess_plan(&dataset.join("nnUNetPlans.json"), &dataset.join("raw/dataset.json"), name).unwrap();
            for stored in folders(&configuration).iter().filter(|p| p.extension().unwrap() == "safetensors") {
                let stem = stored.file_stem().unwrap().to_str().unwrap();
                let images: Vec<_> = (0..plan.channels.len())
                    .map(|c| dataset.join(format!("raw/imagesTr/{stem}_{c:04}.nii.gz")))
                    .collect();
                let truth = read_segmentation(dataset.join(format!("raw/labelsTr/{stem}.nii.gz"))).unwrap();
                let ours = preprocess_case(&read_nifti(&images).unwrap(), &truth, &plan, &classes).unwrap();
                check(&ours, stored);
                seen += 1;
            }
        }
        assert!(seen > 0, "{}", dataset.display());
    }
}
