//! The planner against rows of nnU-Net's, and what it refuses.

use std::path::Path;

use serde_json::{Map, Value, json};
use stunet::nnunet::dataset::{DatasetJson, Reader};
use stunet::nnunet::fingerprint::Fingerprint;
use stunet::nnunet::planner::{PlanOptions, Planner, Plans, plan};

const VECTORS: &str = include_str!("planner/vectors.tsv");

fn dataset(cases: usize, labels: usize) -> DatasetJson {
    let name = |i: usize| if i == 0 { "background".to_owned() } else { format!("s{i}") };
    let labels: Map<String, Value> = (0..labels).map(|i| (name(i), i.into())).collect();
    let channels = json!({"0": "CT"});
    let value = json!({"channel_names": channels, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"});
    DatasetJson::of(Path::new("dataset.json"), value).unwrap()
}

fn fingerprint(cases: usize, spacing: &[f64], shape: &[usize]) -> Fingerprint {
    let value = json!({
        "spacings": vec![spacing; cases],
        "shapes_after_crop": vec![shape; cases],
        "foreground_intensity_properties_per_channel": {},
        "median_relative_size_after_cropping": 1.0,
    });
    Fingerprint::of(Path::new("dataset_fingerprint.json"), &value).unwrap()
}

fn planned(dataset: &DatasetJson, fingerprint: &Fingerprint, planner: Planner, options: &PlanOptions) -> Plans {
    plan(dataset, "Dataset001_X", Reader::SimpleItkIo, fingerprint, planner, options).unwrap()
}

fn numbers<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str, separator: char) -> Vec<T> {
    text.split(separator).map(|n| n.parse().unwrap()).collect()
}

fn crosses(list: &[usize]) -> String {
    list.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

#[test]
fn rows_are_those_of_nnunet() {
    let mut rows = 0;
    for line in VECTORS.lines().filter(|l| !l.starts_with('#')) {
        let row: Vec<&str> = line.split('\t').collect();
        let cases: usize = row[3].parse().unwrap();
        let fingerprint = fingerprint(cases, &numbers(row[1], ','), &numbers(row[2], 'x'));
        let dataset = dataset(cases, row[4].parse().unwrap());
        let plans = planned(&dataset, &fingerprint, row[5].parse().unwrap(), &PlanOptions::default());
        let found = plans.configurations.iter().find(|c| c.name == row[6]);
        let found = found.unwrap_or_else(|| panic!("{line}: no such configuration"));
        let strides: Vec<String> = found.strides[1..].iter().map(|s| crosses(s)).collect();
        let kernels: Vec<String> =
            found.kernels.iter().filter(|k| k.iter().any(|n| *n != 3)).map(|k| crosses(k)).collect();
        let kernels = if kernels.is_empty() { "-".to_owned() } else { kernels.join(" ") };
        let texts = [found.batch_size.to_string(), crosses(&found.patch)];
        assert_eq!(texts, [row[7], row[8]], "{line}");
        assert_eq!([strides.join(" "), kernels], [row[10], row[11]], "{line}");
        let dice = if found.batch_dice { "True" } else { "False" };
        assert_eq!([found.feature_maps.to_string().as_str(), dice], [row[12], row[13]], "{line}");
        // Six digits are given.
        for (a, b) in found.spacing_mm.iter().zip(numbers::<f64>(row[9], ',')) {
            assert!((a - b).abs() <= 5e-6 * b, "{line}: {:?}", found.spacing_mm);
        }
        rows += 1;
    }
    assert_eq!(rows, 55);
}

#[test]
fn options_change_plans() {
    let (dataset, fingerprint) = (dataset(20, 3), fingerprint(20, &[1.0, 3.0, 1.0], &[200, 100, 200]));
    let value = |options: &PlanOptions| -> Value {
        serde_json::from_str(&planned(&dataset, &fingerprint, Planner::ResEncL, options).to_text()).unwrap()
    };
    let default = value(&PlanOptions::default());
    assert_eq!(default["transpose_forward"], json!([1, 0, 2]));
    assert_eq!(default["configurations"]["3d_fullres"]["data_identifier"], "nnUNetPlans_3d_fullres");

    let options = PlanOptions {
        gpu_memory_gb: Some(4.0),
        target_spacing_mm: Some([2.0, 2.0, 2.5]),
        plans_name: Some("small".into()),
        suppress_transpose: true,
    };
    let small = value(&options);
    assert_eq!((&small["plans_name"], &small["transpose_forward"]), (&json!("small"), &json!([0, 1, 2])));
    assert_eq!(small["configurations"]["3d_fullres"]["spacing"], json!([2.0, 2.0, 2.5]));
    let voxels = |v: &Value| {
        let patch = v["configurations"]["3d_fullres"]["patch_size"].as_array().unwrap().clone();
        patch.iter().map(|p| p.as_u64().unwrap()).product::<u64>()
    };
    assert!(voxels(&small) < voxels(&default));
}

#[test]
fn a_plans_file_keeps_configurations_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, fingerprint) = (dataset(20, 3), fingerprint(20, &[1.0; 3], &[100; 3]));
    let plans = planned(&dataset, &fingerprint, Planner::Default, &PlanOptions::default());
    let path = plans.write(dir.path()).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), plans.to_text());
    let mut value: Value = serde_json::from_str(&plans.to_text()).unwrap();
    value["configurations"]["mine"] = json!({"inherits_from": "3d_fullres", "batch_size": 7, "lr": 1e-5});
    value["configurations"]["3d_fullres"]["batch_size"] = json!(99);
    std::fs::write(&path, value.to_string()).unwrap();
    plans.write(dir.path()).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let kept: Value = serde_json::from_str(&text).unwrap();
    let names: Vec<&String> = kept["configurations"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["2d", "3d_fullres", "mine"]);
    assert_eq!(kept["configurations"]["mine"]["batch_size"], 7);
    assert_ne!(kept["configurations"]["3d_fullres"]["batch_size"], 99);
    assert!(text.contains("\"lr\": 1e-05"));
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let (dataset, fingerprint) = (dataset(20, 3), fingerprint(20, &[1.0; 3], &[100; 3]));
    let ask = |options: PlanOptions| {
        plan(&dataset, "X", Reader::SimpleItkIo, &fingerprint, Planner::Default, &options).unwrap_err()
    };
    for gb in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-9] {
        let e = ask(PlanOptions { gpu_memory_gb: Some(gb), ..PlanOptions::default() });
        assert!(e.exit_code() == 2 && e.to_string().contains("GPU memory target"), "{e}");
    }
    let e = ask(PlanOptions { target_spacing_mm: Some([1.0, 0.0, 1.0]), ..PlanOptions::default() });
    assert!(e.to_string().contains("target spacing"), "{e}");
    let e = ask(PlanOptions { plans_name: Some("../x".into()), ..PlanOptions::default() });
    assert!(e.to_string().contains("plans name"), "{e}");
    assert!("nnUNetPlannerResEncS".parse::<Planner>().unwrap_err().to_string().contains("nnUNetPlannerResEncM"));
}
