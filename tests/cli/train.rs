//! From no data at all to a trained and validated network, by the command line alone.

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
