//! nnU-Net's own integration test by our commands, on phantoms: four configurations, five folds each, the best of them and of
//! their means, what cleans it, and the same on new images, by the instructions that are written.

use std::path::Path;

use serde_json::Value;
use stunet::io::{self, LabelData};

use crate::common::binary::{Ran, stunet_with, tree};

const CONFIGURATIONS: [&str; 4] = ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"];

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// As nnU-Net's test does with a data set for which it plans no cascade; and networks that are trained in a moment.
fn add_a_cascade(path: &Path) {
    let mut plans = json(path);
    let configurations = &mut plans["configurations"];
    for name in ["2d", "3d_fullres"] {
        let features = &mut configurations[name]["architecture"]["arch_kwargs"]["features_per_stage"];
        let stages = features.as_array().unwrap().len();
        *features = (0..stages).map(|i| 8 << i).collect::<Vec<_>>().into();
    }
    configurations["3d_lowres"] = serde_json::json!({"inherits_from": "3d_fullres", "spacing": [20.0, 20.0, 20.0],
        "data_identifier": "nnUNetPlans_3d_lowres", "next_stage": "3d_cascade_fullres"});
    configurations["3d_cascade_fullres"] =
        serde_json::json!({"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"});
    std::fs::write(path, plans.to_string()).unwrap();
}

/// Lungs and the other organs: what a network learns in seconds.
fn merge_labels(dataset: &Path) {
    for path in tree(&dataset.join("labelsTr")) {
        let mut truth = io::read_segmentation(&path).unwrap();
        let merged = (0..truth.labels.len()).map(|i| [0, 1, 1, 2][usize::from(truth.labels.get(i)).min(3)]);
        truth.labels = LabelData::U8(merged.collect());
        io::write_nifti(&path, &truth).unwrap();
    }
    let path = dataset.join("dataset.json");
    let mut description = json(&path);
    description["labels"] = serde_json::json!({"background": 0, "lungs": 1, "others": 2});
    std::fs::write(path, description.to_string()).unwrap();
}

#[test]
fn the_whole_way_from_images_to_the_best_ensemble() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let folders = ["raw", "pre", "res"].map(|name| root.join(name));
    let names = ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"];
    let env: Vec<(&str, &Path)> = names.into_iter().zip(folders.iter().map(|f| f.as_path())).collect();
    let run = |line: &str| -> Ran { stunet_with(root, &line.split_whitespace().collect::<Vec<_>>(), &env) };
    let phantoms = "--shape 24 20 28 --spacing 12 12 12 --no-progress";
    run(&format!("phantoms -o raw/Dataset900_Phantom -n 7 {phantoms}")).ok();
    run(&format!("phantoms -o raw/Dataset901_New -n 2 --first 100 {phantoms}")).ok();
    merge_labels(&root.join("raw/Dataset900_Phantom"));
    merge_labels(&root.join("raw/Dataset901_New"));
    run("verify -d 900").ok();
    run("plan-and-preprocess -d 900 -c 2d 3d_fullres").ok();
    add_a_cascade(&root.join("pre/Dataset900_Phantom/nnUNetPlans.json"));
    run("preprocess -d 900 -c 3d_lowres").ok();

    for (configuration, steps) in CONFIGURATIONS.into_iter().zip([25, 4, 4, 4]) {
        for fold in 0..5 {
            let train = format!("train 900 {configuration} {fold} --npz --no-progress");
            run(&format!("{train} --epochs 2 --iterations {steps} --val-iterations 1 --lr 0.1")).ok();
        }
    }
    let models = root.join("res/Dataset900_Phantom");
    let selected = run("select 900 --no-progress");
    for name in CONFIGURATIONS {
        assert!(selected.ok().contains(name), "{name} is not in {}", selected.out);
        let crossval = models.join(format!("nnUNetTrainer__nnUNetPlans__{name}/crossval_results_folds_0_1_2_3_4"));
        assert_eq!(json(&crossval.join("summary.json"))["metric_per_case"].as_array().unwrap().len(), 7, "{name}");
    }
    let information = json(&models.join("inference_information.json"));
    let all = information["all_results"].as_object().unwrap();
    // Four models, and of each two the mean.
    assert_eq!(all.len(), 10, "{all:?}");
    let dice = |v: &Value| v.as_f64().unwrap();
    let best = all.values().map(dice).fold(0.0, f64::max);
    let chosen = &information["best_model_or_ensemble"];
    assert_eq!(dice(&chosen["result_on_crossval_pre_pp"]), best);
    assert!(dice(&chosen["result_on_crossval_post_pp"]) >= best);
    assert!(best > 0.3, "{all:?}");

    // Word by word what the reader is told.
    let text = std::fs::read_to_string(models.join("inference_instructions.txt")).unwrap();
    let ours = text.split("The same with nnU-Net").next().unwrap();
    let commands: Vec<&str> = ours.lines().filter_map(|l| l.strip_prefix("stunet ")).collect();
    assert!(commands.len() >= 2, "{text}");
    for command in commands {
        run(&command.replace("INPUT_FOLDER", "raw/Dataset901_New/imagesTr").replace("OUTPUT_FOLDER", "new")).ok();
    }
    run("evaluate raw/Dataset901_New/labelsTr new_PP --dataset-json raw/Dataset900_Phantom/dataset.json").ok();
    let summary = json(&root.join("new_PP/summary.json"));
    assert_eq!(summary["metric_per_case"].as_array().unwrap().len(), 2);

    // The lot as one file, to another machine.
    run("export -d 900 -o best.zip").ok();
    let imported = run("import best.zip --results there");
    assert_eq!(imported.ok().lines().count(), 4, "{}", imported.out);
    assert!(root.join("there/Dataset900_Phantom/inference_information.json").is_file());
}
