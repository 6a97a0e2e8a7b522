//! From raw images to plans and splits against the files that nnU-Net wrote.

use std::path::{Path, PathBuf};

use serde_json::Value;
use stunet::Device;
use stunet::nnunet::dataset::Dataset;
use stunet::nnunet::fingerprint::{self, Fingerprint};
use stunet::nnunet::planner::{PlanOptions, Planner, plan};
use stunet::nnunet::split;

use crate::common::shared;

/// Folders of data sets with their raw images and nnU-Net's files.
fn datasets(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| p.join("raw/dataset.json").is_file());
    all.sort();
    assert!(!all.is_empty());
    all
}

fn text(path: PathBuf) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn golden_pipeline_data_sets_are_sound() {
    let Some(folder) = shared("golden/pipeline") else { return };
    for folder in datasets(&folder) {
        let faults = Dataset::open(&folder.join("raw")).unwrap().verify(&Device::cpu(), &mut ()).unwrap();
        assert!(faults.is_empty(), "{}: {faults:?}", folder.display());
    }
}

#[test]
fn golden_pipeline_fingerprints_are_those_of_nnunet() {
    let Some(folder) = shared("golden/pipeline") else { return };
    compare_fingerprints(&folder);
}

#[test]
fn golden_pipeline_plans_and_splits_are_those_of_nnunet() {
    let Some(folder) = shared("golden/pipeline") else { return };
    compare_plans(&folder);
}

/// Files byte for byte.
pub fn compare_fingerprints(folder: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(fingerprint::FILE);
    for folder in datasets(folder) {
        let dataset = Dataset::open(&folder.join("raw")).unwrap();
        Fingerprint::extract(&dataset, &Device::cpu(), &mut ()).unwrap().write(&path).unwrap();
        assert_eq!(text(path.clone()), text(folder.join("fingerprint.json")), "{}", folder.display());
    }
}

/// Plans byte for byte, splits by their contents.
pub fn compare_plans(folder: &Path) {
    for folder in datasets(folder) {
        let dataset = Dataset::open(&folder.join("raw")).unwrap();
        let fingerprint = Fingerprint::read(&folder.join("fingerprint.json")).unwrap();
        for planner in [Planner::Default, Planner::ResEncM] {
            let expected = text(folder.join(format!("{}.json", planner.plans_name())));
            let name = serde_json::from_str::<Value>(&expected).unwrap()["dataset_name"].as_str().unwrap().to_owned();
            let options = PlanOptions::default();
            let plans = plan(&dataset.json, &name, dataset.reader, &fingerprint, planner, &options).unwrap();
            assert_eq!(plans.to_text(), expected, "{} {}", folder.display(), planner.name());
        }
        let expected = split::read(&folder.join("splits.json")).unwrap();
        let ours = split::folds(&dataset.ids(), expected.len()).unwrap();
        assert_eq!(ours, expected, "{}", folder.display());
    }
}
