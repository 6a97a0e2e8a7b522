//! Whole cases, image and truth, against what nnU-Net 2.8.1 stored of them.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use stunet::io::{read_nifti, read_segmentation};
use stunet::nnunet::model::preprocess_plan;
use stunet::nnunet::preprocess::{PreprocessedCase, preprocess_case};
use stunet::nnunet::training_case::ClassKey;

use crate::common::shared;

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// nnU-Net's classes of interest: labels or regions as dataset.json has them, then the annotated region.
fn classes(dataset: &Value) -> Vec<ClassKey> {
    let labels = dataset["labels"].as_object().unwrap();
    let list = |v: &Value| -> Vec<i16> {
        v.as_array().map_or_else(
            || vec![v.as_i64().unwrap() as i16],
            |l| numbers(&json!(l)).iter().map(|&n| n as i16).collect(),
        )
    };
    let regions = labels.values().any(Value::is_array);
    let foreground = labels.iter().filter(|(n, _)| *n != "background" && *n != "ignore");
    let mut out: Vec<ClassKey> = foreground
        .map(|(_, v)| if regions { ClassKey::Region(list(v)) } else { ClassKey::Label(list(v)[0]) })
        .collect();
    if labels.contains_key("ignore") {
        let mut all: Vec<i16> = labels.iter().filter(|(n, _)| *n != "ignore").flat_map(|(_, v)| list(v)).collect();
        all.sort_unstable();
        all.dedup();
        all.insert(0, -1);
        out.push(ClassKey::Region(all));
    }
    out
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
    assert!(max <= 1e-3, "{name}: {max}");
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
        let json = json_of(&dataset.join("raw/dataset.json"));
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
                let ours = preprocess_case(&read_nifti(&images).unwrap(), &truth, &plan, &classes(&json)).unwrap();
                check(&ours, stored);
                seen += 1;
            }
        }
        assert!(seen > 0, "{}", dataset.display());
    }
}
