//! 2D configurations by the command line alone: volumes, pictures and stacks of pages.

use std::path::Path;

use serde_json::{Value, json};
use stunet::io::{self, Geometry, LabelData, Segmentation};

use crate::common::binary::{stunet_in, tree};

/// Every file of `b` has the same labels in `a`; how many there are.
fn same_labels(a: &Path, b: &Path, ending: &str) -> usize {
    let names = tree(b).into_iter().filter(|p| p.to_string_lossy().ends_with(ending));
    let names: Vec<_> = names.map(|p| p.file_name().unwrap().to_owned()).collect();
    for name in &names {
        let read = |folder: &Path| match ending {
            ".png" => io::read_pictures(&[folder.join(name)]).unwrap().channels,
            _ => vec![io::read_segmentation(folder.join(name)).unwrap().labels.iter().map(f32::from).collect()],
        };
        assert_eq!(read(a), read(b), "{}", name.display());
    }
    names.len()
}

#[test]
fn slices_of_phantoms_train_validate_and_predict() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &str| stunet_in(dir.path(), &args.split_whitespace().collect::<Vec<_>>());
    run("phantoms -o raw/Dataset900_Phantom -n 5 --shape 10 20 28 --spacing 24 12 12 --no-progress").ok();
    run("plan-and-preprocess -d 900 -c 2d --raw raw --preprocessed pre").ok();
    let train = "train 900 2d 0 --epochs 1 --iterations 2 --val-iterations 1 --batch 2 --no-progress --npz \
                 --preprocessed pre --results res";
    let ran = run(train);
    assert!(ran.ok().contains("summary.json") && !ran.err.contains("no final validation"), "{}", ran.err);
    let model = dir.path().join("res/Dataset900_Phantom/nnUNetTrainer__nnUNetPlans__2d");
    let validation = model.join("fold_0/validation");
    let summary: Value = serde_json::from_slice(&std::fs::read(validation.join("summary.json")).unwrap()).unwrap();
    let case = &summary["metric_per_case"][0];
    let number = |key: &str| case["metrics"]["3"][key].as_u64().unwrap();
    assert_eq!(number("TP") + number("FP") + number("FN") + number("TN"), 10 * 20 * 28);
    run("predict -i raw/Dataset900_Phantom/imagesTr -o out -d 900 -c 2d -f 0 --results res --no-progress").ok();
    assert_eq!(same_labels(&dir.path().join("out"), &validation, ".nii.gz"), 1);
    assert_eq!(tree(&validation).iter().filter(|p| p.extension().is_some_and(|e| e == "npz")).count(), 1);
    assert!(run(&format!("inspect {}", model.display())).ok().contains("2d"));
}

/// A grey picture of a bright disc and its label map.
fn picture(folder: &Path, name: &str, shape: [usize; 2], seed: usize) {
    let [ny, nx] = shape;
    let (cy, cx, r) = (ny / 2 + seed % 3, nx / 2 + seed % 5, 6 + seed % 4);
    let inside = |i: usize| (i / nx).abs_diff(cy).pow(2) + (i % nx).abs_diff(cx).pow(2) < r * r;
    let write = |path: &str, labels: Vec<u8>| {
        let geometry = Geometry::new([1, ny, nx], [999.0, 1.0, 1.0]);
        let segmentation = Segmentation::new(LabelData::U8(labels), geometry, Vec::new()).unwrap();
        io::write_picture(&folder.join(path), &segmentation).unwrap();
    };
    let grey = |i: usize| (i * 7919 + seed * 31) % 40 + if inside(i) { 180 } else { 60 };
    write(&format!("imagesTr/{name}_0000.png"), (0..ny * nx).map(|i| grey(i) as u8).collect());
    write(&format!("labelsTr/{name}.png"), (0..ny * nx).map(|i| u8::from(inside(i))).collect());
}

#[test]
fn pictures_from_raw_data_to_predictions() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &str| stunet_in(dir.path(), &args.split_whitespace().collect::<Vec<_>>());
    let raw = dir.path().join("raw/Dataset910_Discs");
    ["imagesTr", "labelsTr"].iter().for_each(|n| std::fs::create_dir_all(raw.join(n)).unwrap());
    let description = json!({"channel_names": {"0": "light"}, "labels": {"background": 0, "disc": 1}, "numTraining": 5,
        "file_ending": ".png"});
    std::fs::write(raw.join("dataset.json"), description.to_string()).unwrap();
    (0..5).for_each(|i| picture(&raw, &format!("p{i}"), [36 + i, 44 - i], i));
    run("plan-and-preprocess -d 910 --raw raw --preprocessed pre").ok();
    let train = "train 910 2d 0 --epochs 1 --iterations 3 --val-iterations 1 --batch 2 --no-progress --preprocessed pre \
                 --results res";
    assert!(run(train).ok().contains("summary.json"));
    let model = dir.path().join("res/Dataset910_Discs/nnUNetTrainer__nnUNetPlans__2d");
    let validation = model.join("fold_0/validation");
    let summary: Value = serde_json::from_slice(&std::fs::read(validation.join("summary.json")).unwrap()).unwrap();
    let case = &summary["metric_per_case"][0];
    assert!(case["prediction_file"].as_str().unwrap().ends_with(".png"), "{case}");

    let predict = "predict -i raw/Dataset910_Discs/imagesTr -o out -d 910 -c 2d -f 0 --results res --no-progress --continue \
                   --save-probabilities --report run.json";
    let ran = run(predict);
    assert_eq!(ran.ok().lines().filter(|l| l.ends_with(".png")).count(), 5, "{}", ran.out);
    assert_eq!(ran.out.lines().filter(|l| l.ends_with(".npz")).count(), 5, "{}", ran.out);
    assert_eq!(same_labels(&dir.path().join("out"), &validation, ".png"), 1);
    let report: Value = serde_json::from_slice(&std::fs::read(dir.path().join("run.json")).unwrap()).unwrap();
    assert!(report["cases"].as_array().unwrap().iter().all(|c| c["outcome"] == "done"), "{report}");
    // Only what is missing, or damaged.
    assert_eq!(run(predict).ok(), "run.json\n");
    std::fs::write(dir.path().join("out/p1.png"), b"\x89PNG\r\n\x1a\n").unwrap();
    std::fs::remove_file(dir.path().join("out/p3.png")).unwrap();
    assert_eq!(run(predict).ok(), "out/p1.png\nout/p1.npz\nout/p1.pkl\nout/p3.png\nout/p3.npz\nout/p3.pkl\nrun.json\n");

    // One picture alone, and what is no picture.
    let model = model.display();
    let one = format!("predict -m {model} -i raw/Dataset910_Discs/imagesTr/p2_0000.png --no-progress -o");
    run(&format!("{one} p2.png")).ok();
    let bytes = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert_eq!(bytes("p2.png"), bytes("out/p2.png"));
    assert!(run(&format!("{one} p2.nii.gz")).error(2).contains("end in .png"));
    let geometry = Geometry::new([4, 40, 40], [1.0; 3]);
    let volume = stunet::Image::new(vec![vec![0.5; 4 * 40 * 40]], geometry).unwrap();
    io::write_image(dir.path().join("v_0000.nii.gz"), &volume).unwrap();
    let wrong = run(&format!("predict -m {model} -i v_0000.nii.gz -o v.nii.gz"));
    assert!(wrong.error(3).contains("NaturalImage2DIO"), "{}", wrong.err);
}

#[test]
fn stacks_of_pages_keep_their_spacing() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/planar/stack");
    let fixture = fixture.display();
    let args = format!("predict -m {fixture}/model -i {fixture}/images -o out --no-progress --continue");
    let run = |args: &str| stunet_in(dir.path(), &args.split_whitespace().collect::<Vec<_>>());
    let first = run(&args);
    assert_eq!((first.ok(), first.err.as_str()), ("out/case.tif\nout/case.json\n", ""));
    assert_eq!(run(&args).ok(), "");
    let json = std::fs::read_to_string(dir.path().join("out/case.json")).unwrap();
    assert_eq!(json, "{\n    \"spacing\": [\n        2.5,\n        0.8,\n        0.6\n    ]\n}");
    // A result of another spacing is not this image's.
    std::fs::write(dir.path().join("out/case.json"), "{\"spacing\": [1, 1, 1]}").unwrap();
    assert_eq!(run(&args).ok(), "out/case.tif\nout/case.json\n");
}
