//! plans.json of four planners for random data sets against nnU-Net's: every value, to the last digit, in its order.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;
use stunet::nnunet::dataset::{DatasetJson, Reader};
use stunet::nnunet::fingerprint::Fingerprint;
use stunet::nnunet::planner::{PlanOptions, Planner, plan};

use crate::common::shared;

#[test]
fn golden_plans_are_those_of_nnunet() {
    let Some(folder) = shared("golden/plans") else { return };
    assert!(compare(&folder) >= 42);
}

/// Compares every data set of `folder` and returns how many there are.
pub fn compare(folder: &Path) -> usize {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let (mut plans, mut seconds) = (0, 0.0);
    for file in &files {
        let reference: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let dataset = DatasetJson::of(file, reference["dataset_json"].clone()).unwrap();
        let fingerprint = Fingerprint::of(file, &reference["dataset_fingerprint"]).unwrap();
        let name = reference["name"].as_str().unwrap();
        for planner in Planner::ALL {
            let Some(expected) = reference["plans"].get(planner.name()) else { continue };
            let begin = Instant::now();
            let ours = plan(&dataset, name, Reader::SimpleItkIo, &fingerprint, planner, &PlanOptions::default());
            seconds += begin.elapsed().as_secs_f64();
            if expected.get("error").is_some() {
                assert!(ours.is_err(), "{name} {}: nnU-Net says {}", planner.name(), expected["error"]);
                continue;
            }
            let ours: Value = serde_json::from_str(&ours.unwrap().to_text()).unwrap();
            // As text: 1 and 1.0 are two things, and so are two orders of keys.
            let texts = [&ours, expected].map(|v| format!("{v:#}"));
            let differs = texts[0].lines().zip(texts[1].lines()).find(|(a, b)| a != b);
            assert_eq!((differs, texts[0].len()), (None, texts[1].len()), "{name} {}", planner.name());
            plans += 1;
        }
    }
    eprintln!("{plans} plans are equal, {:.2} ms each", seconds * 1e3 / f64::from(plans.max(1)));
    files.len()
}
