//! Models as zip files: what goes in, what comes out, and what does not.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use stunet::nnunet::model::{ModelFolder, ModelOptions, archive, convert};
use stunet::{Error, Flow};

use crate::common::binary::{stunet_in, tree};
use crate::common::nnunet::{Model, v1_folder, v2_folder};
use crate::common::pickle::{hostile, pickle};
use crate::common::torch::{Entry, zip};

const MODEL: &str = "Dataset001_Tiny/STUNetTrainer_tiny__nnUNetPlans__3d_fullres";

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Files of a folder with their contents, by name.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let inside = |p: PathBuf| (p.strip_prefix(folder).unwrap().to_path_buf(), fs::read(&p).unwrap());
    tree(folder).into_iter().filter(|p| p.is_file()).map(inside).collect()
}

fn export(models: &[PathBuf], to: &Path) -> Vec<String> {
    archive::export(models, to, &ModelOptions::new(), false, &mut ()).unwrap()
}

/// A results folder with a trained model and all that nnU-Net leaves beside it.
fn results(root: &Path) -> PathBuf {
    let results = root.join("results");
    let dataset = results.join("Dataset001_Tiny");
    let model = v2_folder(&dataset, &["fold_0", "fold_1"], 1, 3);
    for fold in ["fold_0", "fold_1"] {
        write(&model.join(fold).join("progress.png"), "picture");
        write(&model.join(fold).join("checkpoint_best.pth"), "not wanted");
        write(&model.join(fold).join("validation/summary.json"), "{}");
        write(&model.join(fold).join("validation/case.nii.gz"), "labels");
        write(&model.join(fold).join("validation/case.npz"), "never");
    }
    write(&model.join("crossval_results_folds_0_1/postprocessing.pkl"), "steps");
    write(&model.join("crossval_results_folds_0_1/case.nii.gz"), "labels");
    write(&model.join("dataset_fingerprint.json"), "{}");
    let name = model.file_name().unwrap().to_str().unwrap();
    write(&dataset.join(format!("ensembles/ensemble___{name}___{name}___0_1/summary.json")), "{}");
    write(&dataset.join(format!("ensembles/ensemble___{name}___other___0_1/summary.json")), "{}");
    write(&dataset.join("inference_information.json"), "{}");
    results
}

#[test]
fn share_what_nnunet_shares_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let results = results(dir.path());
    let (file, again) = (dir.path().join("model.zip"), dir.path().join("again.zip"));
    let names = export(&[results.join(MODEL)], &file);
    export(&[results.join(MODEL)], &again);
    assert!(fs::read(&file).unwrap() == fs::read(&again).unwrap(), "equal models, other bytes");
    assert!(names.iter().all(|n| n.starts_with("Dataset001_Tiny/")), "{names:?}");
    let has = |end: &str| names.iter().any(|n| n.ends_with(end));
    for wanted in [
        "fold_0/checkpoint_final.pth",
        "fold_1/validation/summary.json",
        "fold_1/progress.png",
        "crossval_results_folds_0_1/postprocessing.pkl",
        "/plans.json",
        "/dataset.json",
        "dataset_fingerprint.json",
        "inference_information.json",
    ] {
        assert!(has(wanted), "{wanted} is not among {names:?}");
    }
    assert!(!has("checkpoint_best.pth") && !has("case.nii.gz") && !has("case.npz"), "{names:?}");
    assert_eq!(names.iter().filter(|n| n.contains("ensembles")).count(), 1, "{names:?}");
    let all = archive::export(&[results.join(MODEL)], &again, &ModelOptions::new(), true, &mut ()).unwrap();
    assert_eq!(all.len(), names.len() + 3, "{all:?}");
    assert!(!all.iter().any(|n| n.ends_with(".npz")));

    let target = dir.path().join("elsewhere");
    let models = archive::import(&file, &target, false, &mut ()).unwrap();
    assert_eq!(models, [target.join(MODEL)]);
    let found = contents(&target);
    assert_eq!(found.len(), names.len());
    for (name, bytes) in &found {
        assert!(fs::read(results.join(name)).unwrap() == *bytes, "{name:?} came out otherwise");
    }
    assert_eq!(ModelFolder::open(&models[0], &ModelOptions::new()).unwrap().folds.len(), 2);
}

#[test]
fn share_models_of_every_kind() {
    let dir = tempfile::tempdir().unwrap();
    let v1 = v1_folder(dir.path(), "fold_0", "model_final_checkpoint", 3);
    let own = dir.path().join("tiny");
    convert(&v1, &own, &ModelOptions::new()).unwrap();
    for (model, name) in [(&v1, "Task001_Tiny/STUNetTrainer_tiny__nnUNetPlansv2.1"), (&own, "tiny")] {
        let (file, target) = (dir.path().join("m.zip"), dir.path().join("out"));
        export(std::slice::from_ref(model), &file);
        assert_eq!(archive::import(&file, &target, false, &mut ()).unwrap(), [target.join(name)]);
        let opened = |path: &Path| ModelFolder::open(path, &ModelOptions::new()).unwrap();
        assert_eq!(opened(&target.join(name)).plan, opened(model).plan);
        fs::remove_dir_all(&target).unwrap();
    }
    let twice = archive::export(&[own.clone(), own], &dir.path().join("m.zip"), &ModelOptions::new(), false, &mut ());
    assert_eq!(twice.unwrap_err().exit_code(), 2);
}

#[test]
fn share_replaces_nothing_unless_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let results = results(dir.path());
    let file = dir.path().join("model.zip");
    let names = export(&[results.join(MODEL)], &file);
    let before = contents(&results);
    let e = archive::import(&file, &results, false, &mut ()).unwrap_err();
    assert!(e.exit_code() == 2 && e.to_string().contains("--overwrite"), "{e}");
    assert!(contents(&results) == before, "something was changed");
    archive::import(&file, &results, true, &mut ()).unwrap();
    // The model is the archive's; what else was there stays.
    let after = contents(&results);
    assert!(!after.iter().any(|(name, _)| name.ends_with("checkpoint_best.pth")));
    assert_eq!(after.len(), names.len() + 1, "the other ensemble");
    let stop = &mut |_: stunet::Event<'_>| Flow::Cancel;
    let target = dir.path().join("elsewhere");
    assert!(matches!(archive::import(&file, &target, false, stop), Err(Error::Cancelled)));
    assert_eq!(tree(&target).len(), 0, "something was left");
}

/// What else is there is no model and no file, and would be gone.
#[test]
fn share_replaces_models_by_models_and_files_by_files() {
    let dir = tempfile::tempdir().unwrap();
    let results = results(dir.path());
    let before = contents(&results);
    let file = dir.path().join("model.zip");
    // A file where a data set is, and a model where one is.
    let mut e = entries();
    e.push(Entry::stored("Dataset001_Tiny/ensembles", b"x"));
    let own = dir.path().join("Dataset001_Tiny");
    convert(results.join(MODEL), &own, &ModelOptions::new()).unwrap();
    for bytes in [zip(&e), {
        export(&[own], &file);
        fs::read(&file).unwrap()
    }] {
        fs::write(&file, bytes).unwrap();
        let e = archive::import(&file, &results, true, &mut ()).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("is not a"), "{e}");
        assert!(contents(&results) == before, "something was changed");
    }
}

/// Each fold's plans, and the post-processing that is part of the model.
#[test]
fn share_all_of_a_model_of_v1_and_other_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let v1 = v1_folder(dir.path(), "fold_0", "model_final_checkpoint", 3);
    v1_folder(dir.path(), "fold_1", "model_final_checkpoint", 3);
    write(&v1.join("postprocessing.json"), r#"{"for_which_classes": [1]}"#);
    let file = dir.path().join("m.zip");
    let names = export(&[v1], &file);
    assert_eq!(names.iter().filter(|n| n.ends_with(".model.pkl")).count(), 2, "{names:?}");
    assert!(names.iter().any(|n| n.ends_with("/postprocessing.json")), "{names:?}");
    archive::import(&file, &dir.path().join("out"), false, &mut ()).unwrap();

    // Two configurations of one task lie as nnU-Net 1 has them; a fold may have checkpoints that others have not.
    let root = dir.path().join("nnUNet");
    let both = ["2d", "3d_fullres"].map(|c| v1_folder(&root.join(c), "fold_0", "model_final_checkpoint", 3));
    v1_folder(&root.join("2d"), "fold_0", "model_best", 3);
    v1_folder(&root.join("2d"), "fold_1", "model_final_checkpoint", 3);
    let names = export(&both, &file);
    for configuration in ["2d", "3d_fullres"] {
        let first = format!("{configuration}/Task001_Tiny/STUNetTrainer_tiny__nnUNetPlansv2.1/fold_0/");
        assert!(names.iter().any(|n| n.starts_with(&first)), "{names:?}");
    }
    let mut e: Vec<Entry> = tree(&root)
        .iter()
        .map(|p| Entry::stored(p.strip_prefix(&root).unwrap().to_str().unwrap(), &fs::read(p).unwrap()))
        .collect();
    fs::write(&file, zip(&e)).unwrap();
    archive::import(&file, &dir.path().join("v1"), false, &mut ()).unwrap();
    let best = e.iter_mut().find(|e| e.name.ends_with("model_best.model")).unwrap();
    *best = Entry::stored(&best.name, &best.data[..100]);
    fs::write(&file, zip(&e)).unwrap();
    let error = archive::import(&file, &dir.path().join("v1"), true, &mut ()).unwrap_err().to_string();
    assert!(error.contains("model_best.model") && error.contains("m.zip"), "{error}");

    let v2 = v2_folder(&dir.path().join("Dataset001_Tiny"), &["fold_0"], 1, 3);
    fs::rename(v2.join("fold_0/checkpoint_final.pth"), v2.join("fold_0/checkpoint_best.pth")).unwrap();
    let best = ModelOptions::new().checkpoint("checkpoint_best");
    archive::export(&[v2], &file, &best, false, &mut ()).unwrap();
    archive::import(&file, &dir.path().join("out"), false, &mut ()).unwrap();
}

#[test]
fn share_on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    results(dir.path());
    let run = |line: &str| stunet_in(dir.path(), &line.split(' ').collect::<Vec<_>>());
    let export = "export --results results -d 1 -o model.zip -c 3d_fullres -tr STUNetTrainer_tiny --exp_cv_preds";
    assert_eq!(run(export).ok().trim(), "model.zip");
    assert!(run("import model.zip --results new").ok().contains("3d_fullres"));
    assert!(run("import model.zip --results new").error(2).contains("--overwrite"));
    run("import model.zip --results new --overwrite").ok();
    assert!(run("export --results results -d 1 -o m.zip").error(2).contains("nnUNetTrainer__nnUNetPlans__2d"));
    assert!(run("import results/nothing.zip --results new").error(4).contains("nothing.zip"));
}

/// A good archive as entries, of which each test spoils something.
fn entries() -> Vec<Entry> {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join(MODEL);
    Model::new(1, 3).write(&folder, &["fold_0"]);
    let entry = |(name, bytes): (PathBuf, Vec<u8>)| Entry::stored(name.to_str().unwrap(), &bytes);
    contents(dir.path()).into_iter().map(entry).collect()
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn hostile_archives() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    let mut spoil = |what: String, f: &dyn Fn(&mut Vec<Entry>)| {
        let mut entries = entries();
        f(&mut entries);
        all.push((what, zip(&entries)));
    };
    let (deep, long) = ("d/".repeat(40) + "x", "n".repeat(3000));
    let names = [
        "../x",
        "/x",
        "a/../../x",
        "a/../x",
        "C:/x",
        "C:x",
        "a\\..\\x",
        "\\x",
        "\\\\host\\x",
        "//x",
        "a//x",
        "./x",
        "a/./x",
        "a/..",
        "..",
        ".",
        "a/.",
        "a\0b",
        "a\nb",
        "a\u{7f}b",
        "a./x",
        "a /x",
        "x.",
        "x ",
        "a?b",
        "a*b",
        "a<b",
        "a>b",
        "a|b",
        "a\"b",
        "x:stream",
        "NUL",
        "com1.txt",
        &deep,
        &long,
    ];
    for name in names {
        for name in [name.to_string(), format!("{name}/"), format!("{MODEL}/{name}")] {
            spoil(format!("{name:?}"), &|e| e.push(Entry::stored(&name, b"")));
        }
    }
    for mode in [0o12_0777, 0o2_0666, 0o6_0666, 0o1_0666, 0o14_0666] {
        for i in 0..3 {
            spoil(format!("mode {mode:o} of {i}"), &|e| e[i].mode = mode);
        }
        spoil(format!("mode {mode:o}"), &|e| e.push(Entry { mode, ..Entry::stored("link", b"/etc/passwd") }));
    }
    for i in 0..3 {
        spoil(format!("checksum of {i}"), &|e| e[i].crc ^= 1);
        spoil(format!("encrypted {i}"), &|e| e[i].flags = 1);
        spoil(format!("shorter than {i} says"), &|e| e[i].size += 1);
        spoil(format!("longer than {i} says"), &|e| {
            e[i].data = deflated(&e[i].data);
            (e[i].method, e[i].size) = (8, e[i].size / 2);
        });
        spoil(format!("data of {i} are no deflate"), &|e| e[i].method = 8);
        spoil(format!("{i} twice"), &|e| {
            let (name, data) = (e[i].name.clone(), e[i].data.clone());
            e.push(Entry::stored(&name, &data));
        });
        spoil(format!("{i} twice but for capitals"), &|e| {
            let (name, data) = (e[i].name.to_uppercase(), e[i].data.clone());
            e.push(Entry::stored(&name, &data));
        });
        spoil(format!("{i} a file and a folder"), &|e| {
            let name = format!("{}/x", e[i].name);
            e.push(Entry::stored(&name, b"x"));
        });
        spoil(format!("without {i}"), &|e| drop(e.remove(i)));
    }
    for method in (1..=20).filter(|m| *m != 8).chain([93, 97, 99, 0xffff]) {
        spoil(format!("method {method}"), &|e| e[0].method = method);
    }
    spoil("a bomb".into(), &|e| {
        let zeros = vec![0; 80 << 20];
        let crc = crate::common::torch::crc32(&[]);
        e.push(Entry { method: 8, size: 80 << 20, crc, ..Entry::stored("bomb", &deflated(&zeros)) });
    });
    spoil("a bomb that says little".into(), &|e| {
        let zeros = vec![0; 80 << 20];
        e.push(Entry { method: 8, size: 1000, ..Entry::stored("bomb", &deflated(&zeros)) });
    });
    spoil("many gigabytes".into(), &|e| {
        e.extend((0..9).map(|i| Entry { method: 8, size: u32::MAX - 1, ..Entry::stored(&format!("f{i}"), b"") }));
    });
    spoil("nothing".into(), &Vec::clear);
    let good = zip(&entries());
    // Two entries with the same bytes: the second begins where the first does.
    let mut overlapping = good.clone();
    let directory = overlapping.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    overlapping[directory + 42..directory + 46].fill(0);
    all.push(("entries at one place".into(), overlapping));
    for i in 0..30 {
        all.push((format!("cut after {i} of 30"), good[..good.len() * i / 30].to_vec()));
    }
    for (name, value) in hostile() {
        let mut model = Model::new(1, 3);
        model.logging = value;
        let mut e = entries();
        let i = e.iter().position(|e| e.name.ends_with(".pth")).unwrap();
        e[i] = Entry::stored(&e[i].name, &model.checkpoint());
        all.push((format!("{name} in a checkpoint"), zip(&e)));
    }
    for (name, value) in hostile() {
        let dir = tempfile::tempdir().unwrap();
        let folder = v1_folder(dir.path(), "fold_0", "model_final_checkpoint", 3);
        fs::write(folder.join("fold_0/model_final_checkpoint.model.pkl"), pickle(&value)).unwrap();
        let entry = |(name, bytes): (PathBuf, Vec<u8>)| Entry::stored(name.to_str().unwrap(), &bytes);
        let e: Vec<Entry> = contents(dir.path()).into_iter().map(entry).collect();
        all.push((format!("{name} in the plans of v1"), zip(&e)));
    }
    all
}

/// Whatever is wrong: one line, and nothing anywhere.
#[test]
fn hostile_archives_are_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("a/b/results");
    let file = dir.path().join("hostile.zip");
    // The good one is good.
    fs::write(&file, zip(&entries())).unwrap();
    archive::import(&file, &inner, false, &mut ()).unwrap();
    fs::remove_dir_all(&inner).unwrap();
    let all = hostile_archives();
    assert!(all.len() >= 200, "{}", all.len());
    for (what, bytes) in all {
        fs::write(&file, bytes).unwrap();
        let e = archive::import(&file, &inner, false, &mut ()).map(|m| format!("{m:?}")).expect_err(&what);
        let said = e.to_string();
        assert!(matches!(e, Error::Model { .. }) && said.contains("hostile.zip"), "{what}: {said}");
        assert!(said.len() < 1000 && !said.contains('\n'), "{what}: {said}");
        assert!(tree(dir.path()) == [file.clone()], "{what}: left {:?}", tree(dir.path()));
        assert!(!Path::new("pwned").exists(), "{what}");
    }
}
