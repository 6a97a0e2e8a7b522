//! From no data at all to a trained and validated network, by the command line alone.

use std::path::Path;

use serde_json::Value;

use crate::common::binary::stunet_in;

#[test]
fn phantoms_become_a_trained_network() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &str| stunet_in(dir.path(), &args.split_whitespace().collect::<Vec<_>>());
    run("phantoms -o raw/Dataset900_Phantom -n 5 --shape 24 20 28 --spacing 12 12 12 --no-progress").ok();
    run("plan-and-preprocess -d 900 -c 3d_fullres --raw raw --preprocessed pre").ok();
    let train = "train 900 3d_fullres 0 --network stunet-tiny --epochs 2 --iterations 2 --val-iterations 1 --no-progress \
                 --preprocessed pre --results res";
    let first = run(train);
    assert!(first.ok().contains("checkpoint_final.pth") && first.out.contains("mean"), "{}", first.out);
    let fold = dir.path().join("res/Dataset900_Phantom/STUNetTrainer_tiny__nnUNetPlans__3d_fullres/fold_0");
    let png = std::fs::read(fold.join("progress.png")).unwrap();
    assert!(png.starts_with(b"\x89PNG"));
    let summary: Value = serde_json::from_slice(&std::fs::read(fold.join("validation/summary.json")).unwrap()).unwrap();
    let cases = summary["metric_per_case"].as_array().unwrap();
    assert_eq!(cases.len(), 1);
    let case = &cases[0]["metrics"]["3"];
    let number = |key: &str| case[key].as_u64().unwrap();
    assert_eq!(number("TP") + number("FN"), number("n_ref"));
    assert_eq!(number("TP") + number("FP") + number("FN") + number("TN"), 24 * 20 * 28);
    // Not twice unasked; nnU-Net's way to validate once more.
    let again = run(train);
    assert!(again.code == 2 && again.err.contains("--continue"), "{}", again.err);
    assert!(run(&format!("{train} --val")).ok().contains("summary.json"));

    let predict = "predict -i raw/Dataset900_Phantom/imagesTr -o out -d 900 -c 3d_fullres -f 0 -tr STUNetTrainer_tiny \
                   --results res --no-progress";
    run(predict).ok();
    assert!(dir.path().join("out/phantom_00001.nii.gz").is_file());
    let wrong = run("train 900 3d_fullres five --preprocessed pre --results res");
    assert!(wrong.code == 2 && wrong.err.contains("fold \"five\""), "{}", wrong.err);
    let wrong = run("train 901 3d_fullres 0 --preprocessed pre --results res");
    assert!(wrong.code == 2 && wrong.err.contains("Dataset900_Phantom"), "{}", wrong.err);
}

#[test]
fn a_cascade_is_trained_and_predicts() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &str| stunet_in(dir.path(), &args.split_whitespace().collect::<Vec<_>>());
    run("phantoms -o raw/Dataset900_Phantom -n 3 --shape 20 16 20 --spacing 14 14 14 --no-progress").ok();
    run("plan-and-preprocess -d 900 -c 3d_fullres --raw raw --preprocessed pre").ok();
    // Too small for nnU-Net to plan one.
    let path = dir.path().join("pre/Dataset900_Phantom/nnUNetPlans.json");
    let mut plans: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let configurations = &mut plans["configurations"];
    configurations["3d_lowres"] = serde_json::json!({"inherits_from": "3d_fullres", "spacing": [20.0, 20.0, 20.0],
        "data_identifier": "nnUNetPlans_3d_lowres", "next_stage": "3d_cascade_fullres"});
    configurations["3d_cascade_fullres"] =
        serde_json::json!({"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"});
    std::fs::write(&path, plans.to_string()).unwrap();
    run("preprocess -d 900 -c 3d_lowres --raw raw --preprocessed pre").ok();

    let rest = "--network stunet-tiny --patch 32 16 32 --batch 2 --epochs 1 --iterations 1 --val-iterations 1 \
                --no-progress --preprocessed pre --results res";
    let second = format!("train 900 3d_cascade_fullres all {rest}");
    let early = run(&second);
    assert!(early.code == 2 && early.err.contains("3d_lowres") && early.err.contains("phantom_00001"), "{}", early.err);
    run(&format!("train 900 3d_lowres all {rest} --npz")).ok();
    let models = dir.path().join("res/Dataset900_Phantom");
    let first = models.join("STUNetTrainer_tiny__nnUNetPlans__3d_lowres");
    assert!(first.join("predicted_next_stage/3d_cascade_fullres/phantom_00002.safetensors").is_file());
    for ending in ["nii.gz", "npz", "pkl"] {
        assert!(first.join(format!("fold_all/validation/phantom_00003.{ending}")).is_file(), "{ending}");
    }
    run(&second).ok();

    let predict = "predict -i raw/Dataset900_Phantom/imagesTr -d 900 -f all -tr STUNetTrainer_tiny --results res \
                   --no-progress";
    run(&format!("{predict} -c 3d_lowres -o low")).ok();
    let alone = run(&format!("{predict} -c 3d_cascade_fullres -o full"));
    assert!(alone.code == 2 && alone.err.contains("--previous-stage"), "{}", alone.err);
    let none = run(&format!("{predict} -c 3d_lowres -o low2 -prev_stage_predictions low"));
    assert!(none.code == 2 && none.err.contains("--previous-stage"), "{}", none.err);
    let onto_itself = run(&format!("{predict} -c 3d_cascade_fullres -o low -prev_stage_predictions low"));
    assert!(onto_itself.code == 2 && onto_itself.err.contains("also an input"), "{}", onto_itself.err);
    run(&format!("{predict} -c 3d_cascade_fullres -o full -prev_stage_predictions low --report r.json")).ok();
    // The grid of the second stage is the images' own here: it gets the same labels by both ways.
    let validation = models.join("STUNetTrainer_tiny__nnUNetPlans__3d_cascade_fullres/fold_all/validation");
    for case in ["phantom_00001", "phantom_00002", "phantom_00003"] {
        let read = |folder: &Path| stunet::io::read_segmentation(folder.join(format!("{case}.nii.gz"))).unwrap().labels;
        assert!(read(&dir.path().join("full")) == read(&validation), "{case}");
    }
    let report = std::fs::read_to_string(dir.path().join("r.json")).unwrap();
    assert!(report.contains("low/phantom_00001.nii.gz"), "{report}");
    std::fs::remove_file(dir.path().join("low/phantom_00002.nii.gz")).unwrap();
    let some = run(&format!("{predict} -c 3d_cascade_fullres -o again -prev_stage_predictions low"));
    assert!(some.code == 2 && some.err.contains("low/phantom_00002.nii.gz"), "{}", some.err);
}

#[test]
fn what_a_training_keeps_and_where_it_augments_is_said_before_anything_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &str| stunet_in(dir.path(), &args.split_whitespace().collect::<Vec<_>>());
    run("phantoms -o raw/Dataset900_Phantom -n 2 --shape 20 16 20 --spacing 14 14 14 --no-progress").ok();
    run("plan-and-preprocess -d 900 -c 3d_fullres --raw raw --preprocessed pre").ok();
    let train = |more: &str| {
        run(&format!(
            "train 900 3d_fullres all --network stunet-tiny --patch 32 16 32 --batch 2 --epochs 1 --iterations 1 \
             --val-iterations 1 --no-val --device cpu --no-progress --preprocessed pre --results res {more}"
        ))
    };
    let (twice, once) = ("stages run again on the way back", "no stage runs twice");
    // Without a value: always.
    for (more, expected) in [("--recompute", twice), ("--continue --recompute=never", once), ("--overwrite", once)] {
        let ran = train(more);
        ran.ok();
        assert!(ran.err.contains(expected), "{more}: {}", ran.err);
    }

    let fold = dir.path().join("res/Dataset900_Phantom/STUNetTrainer_tiny__nnUNetPlans__3d_fullres/fold_all");
    let before = std::fs::read(fold.join("checkpoint_final.pth")).unwrap();
    for (more, expected) in [
        ("--overwrite --augment-on-device", "expected --device cuda"),
        ("--overwrite --recompute=sometimes", "possible values: auto, always, never"),
        // A value needs its equals sign: this one is taken for a data set without a configuration.
        ("--overwrite --recompute always", "3 values required"),
    ] {
        let refused = train(more);
        assert!(refused.code == 2 && refused.err.contains(expected), "{more}: {}", refused.err);
        assert!(std::fs::read(fold.join("checkpoint_final.pth")).unwrap() == before, "{more}");
    }
}
