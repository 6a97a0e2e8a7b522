//! The demonstration, from its first line to its last.

use serde_json::Value;

use crate::common::binary::stunet_in;

#[test]
fn the_demo_finds_the_organs() {
    for seed in ["1", "2"] {
        let dir = tempfile::tempdir().unwrap();
        let ran = stunet_in(dir.path(), &["demo", "--seed", seed, "-o", "new/demo", "--device", "cpu"]);
        assert!(ran.ok().contains("mean"), "{}", ran.out);
        let folder = dir.path().join("new/demo");
        for file in ["ct.nii.gz", "truth.nii.gz", "segmentation.nii.gz", "preview.png", "report.json"] {
            assert!(folder.join(file).is_file(), "{file}");
            assert!(ran.out.contains(file), "{file} is not named: {}", ran.out);
        }
        let report: Value = serde_json::from_slice(&std::fs::read(folder.join("report.json")).unwrap()).unwrap();
        let labels = report["cases"][0]["labels"].as_array().unwrap();
        let dice: Vec<f64> = labels.iter().filter_map(|l| l["dice"].as_f64()).collect();
        assert!(!dice.is_empty());
        let mean = dice.iter().sum::<f64>() / dice.len() as f64;
        assert!(mean >= 0.90, "seed {seed}: mean Dice {mean}");
    }
}
