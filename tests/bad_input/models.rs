//! Models.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::Bench;
use crate::common::binary::stunet_in;
use crate::common::files;
use crate::common::nnunet::Model;
use crate::common::pickle::{Py, dict, hostile, pickle, s};
use crate::common::torch::{Entry, zip};

const PTH: &str = "checkpoint_final.pth";

/// Writes a model changed by `change` and expects it to be refused with a line that has all of `mentions`.
#[track_caller]
fn spoilt(bench: &Bench, what: &str, mentions: &[&str], change: impl FnOnce(&mut Model)) {
    let mut model = Model::ct();
    change(&mut model);
    let _ = std::fs::remove_dir_all(bench.path("bad"));
    model.write(&bench.path("bad"), &["fold_0"]);
    bench.refused(what, "bad", &["good.nii"], 4, mentions);
}

/// As [`spoilt`], with other bytes for one file.
#[track_caller]
fn with_file(bench: &Bench, what: &str, file: &str, bytes: &[u8], mentions: &[&str]) {
    let _ = std::fs::remove_dir_all(bench.path("bad"));
    Model::ct().write(&bench.path("bad"), &["fold_0"]);
    std::fs::write(bench.path("bad").join(file), bytes).unwrap();
    bench.refused(what, "bad", &["good.nii"], 4, mentions);
}

#[test]
fn damaged_checkpoints_are_refused() {
    let bench = Bench::new();
    let (good, object) = (Model::ct().checkpoint(), pickle(&Model::ct().object()));
    let archive =
        |entries: &[(&str, &[u8])]| zip(&entries.iter().map(|(n, b)| Entry::stored(n, b)).collect::<Vec<_>>());
    let version: (&str, &[u8]) = ("archive/version", b"3\n");
    let list: [(&str, Vec<u8>); 9] = [
        ("empty", vec![]),
        ("ten bytes", good[..10].to_vec()),
        ("half", good[..good.len() / 2].to_vec()),
        ("all but a byte", good[..good.len() - 1].to_vec()),
        ("text", b"weights, honestly".repeat(40)),
        ("no pickle", archive(&[version])),
        ("half a pickle", archive(&[("archive/data.pkl", &object[..object.len() / 2]), version])),
        ("two pickles", archive(&[("archive/data.pkl", &object), ("evil/data.pkl", &object)])),
        ("no storages", archive(&[("archive/data.pkl", &object), version])),
    ];
    for (what, bytes) in list {
        with_file(&bench, what, "fold_0/checkpoint_final.pth", &bytes, &[PTH]);
    }
}

/// A pickle of a few kilobytes that unpacks to gigabytes.
#[test]
fn a_zip_bomb_is_refused() {
    let mut out = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    out.start_file("archive/data.pkl", zip::write::SimpleFileOptions::default()).unwrap();
    let zeros = vec![b'N'; 1 << 20];
    (0..300).for_each(|_| out.write_all(&zeros).unwrap());
    let bytes = out.finish().unwrap().into_inner();
    assert!(bytes.len() < 1 << 20);
    with_file(&Bench::new(), "bomb", "fold_0/checkpoint_final.pth", &bytes, &[PTH]);
}

/// Pickles that call what they must not; were one executed, it would leave a file behind.
#[test]
fn hostile_pickles_are_refused_and_not_executed() {
    let bench = Bench::new();
    for (name, value) in hostile() {
        spoilt(&bench, name, &[PTH, name], |m| m.logging = value);
        assert!(!bench.path("pwned").exists() && !bench.path("out/pwned").exists(), "{name} was executed");
    }
    for (what, instructions) in [
        ("state of an object", b"ctorch.nn.modules.container\nSequential\n)\x81}b".to_vec()),
        ("empty stack", b"00000000".to_vec()),
        ("unknown instruction", vec![0xff]),
        ("memo that is not there", b"h\x63".to_vec()),
        ("endless string", b"X\xff\xff\xff\x7fabc".to_vec()),
        ("extension", b"\x82\x01".to_vec()),
        ("mark without end", b"((((".to_vec()),
    ] {
        spoilt(&bench, what, &[PTH], |m| m.logging = Py::Raw(instructions));
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    let conv = "conv_blocks_context.0.0.conv1.weight";
    let head = "seg_outputs.4.weight";
    let mentions = [PTH, conv];
    spoilt(&bench, "missing tensor", &mentions, |m| m.tensors.retain(|t| t.name != conv));
    spoilt(&bench, "a way out of the archive", &[PTH, "secret"], |m| m.tensor(conv).storage = "../../secret".into());
    spoilt(&bench, "short storage", &mentions, |m| {
        m.tensor(conv).values.pop();
    });
    spoilt(&bench, "offset behind the end", &mentions, |m| m.tensor(conv).offset = 1);
    spoilt(&bench, "negative offset", &mentions, |m| m.tensor(conv).offset = -4);
    spoilt(&bench, "negative size", &mentions, |m| m.tensor(conv).shape[0] = -4);
    spoilt(&bench, "huge sizes", &mentions, |m| m.tensor(conv).shape = vec![i64::from(i32::MAX); 5]);
    spoilt(&bench, "no sizes", &mentions, |m| m.tensor(conv).shape = vec![0; 5]);
    spoilt(&bench, "four axes", &mentions, |m| {
        m.tensor(conv).shape.pop();
    });
    spoilt(&bench, "NaN", &mentions, |m| m.tensor(conv).values[3] = f32::NAN);
    spoilt(&bench, "infinity", &mentions, |m| m.tensor(conv).values[0] = f32::INFINITY);
    spoilt(&bench, "same name twice", &[PTH], |m| m.tensors[1].name = m.tensors[0].name.clone());
    spoilt(&bench, "no tensors", &[], |m| m.tensors.clear());
    spoilt(&bench, "another network", &[], |m| m.tensors.iter_mut().for_each(|t| t.name.insert(0, 'x')));
    spoilt(&bench, "a class less", &[PTH, head], |m| {
        m.dataset["labels"] = json!({"background": 0, "a": 1, "b": 2, "c": 3});
    });
    spoilt(&bench, "a channel too many", &[], |m| {
        m.dataset["channel_names"] = json!({"0": "CT", "1": "PET"});
        m.configuration()["normalization_schemes"] = json!(["CTNormalization", "NoNormalization"]);
        m.configuration()["use_mask_for_norm"] = json!([false, false]);
    });
}

#[test]
fn checkpoints_without_what_is_needed_are_refused() {
    let bench = Bench::new();
    let other = |value: Py| dict([("configuration", value)]);
    spoilt(&bench, "no configuration", &[PTH, "init_args"], |m| m.init_args = dict([]));
    spoilt(&bench, "configuration of a wrong type", &[PTH, "init_args"], |m| m.init_args = other(Py::Int(3)));
    spoilt(&bench, "unknown configuration", &["plans.json", "3d_lowres"], |m| m.init_args = other(s("3d_lowres")));
}

#[test]
fn plans_that_cannot_be_are_refused() {
    let bench = Bench::new();
    let conf = |what: &str, key: &str, value: Value| {
        let mention = if what.starts_with("unsupported") { "unsupported" } else { "plans.json" };
        spoilt(&bench, what, &[mention], |m| m.configuration()[key] = value);
    };
    conf("zero patch", "patch_size", json!([32, 0, 32]));
    conf("negative patch", "patch_size", json!([32, -32, 32]));
    conf("patch of text", "patch_size", json!("large"));
    conf("patch of four", "patch_size", json!([32, 32, 32, 32]));
    conf("patch without end", "patch_size", json!([1_000_000_000_000u64, 32, 32]));
    conf("patch of fractions", "patch_size", json!([32.5, 32, 32]));
    conf("2D patch of a 3D configuration", "patch_size", json!([32, 32]));
    conf("zero spacing", "spacing", json!([0.0, 1.5, 1.5]));
    conf("negative spacing", "spacing", json!([-1.5, 1.5, 1.5]));
    conf("NaN spacing", "spacing", json!([null, 1.5, 1.5]));
    conf("spacing of two", "spacing", json!([1.5, 1.5]));
    conf("no schemes", "normalization_schemes", json!([]));
    conf("unsupported scheme", "normalization_schemes", json!(["os.system"]));
    conf("mask of a wrong type", "use_mask_for_norm", json!(["no"]));
    conf("unsupported resampling", "resampling_fn_data", json!("eval"));
    conf("order of text", "resampling_fn_data_kwargs", json!({"order": "cubic"}));
    conf("strides of text", "architecture", json!({"arch_kwargs": {"strides": "two"}}));
    conf("stride of zero", "architecture", json!({"arch_kwargs": {"strides": [[1, 1, 1], [0, 2, 2]]}}));
    conf("inherits from itself", "inherits_from", json!("3d_fullres"));
    let plan = |what: &str, field: &str, value: Value| {
        spoilt(&bench, what, &["plans.json", field], |m| m.plans[field] = value);
    };
    plan("not a permutation", "transpose_forward", json!([0, 0, 2]));
    plan("not the inverse", "transpose_backward", json!([2, 1, 0]));
    plan("axes out of range", "transpose_forward", json!([0, 1, 7]));
    plan("no configurations", "configurations", json!({}));
    plan("configurations of a wrong type", "configurations", json!(3));
    let intensity = "foreground_intensity_properties_per_channel";
    plan("no statistics", intensity, json!({}));
    plan("statistics of text", intensity, json!({"0": {"mean": "x"}}));
    let negative = json!({"0": {"mean": 0, "std": -1, "percentile_00_5": 0, "percentile_99_5": 1}});
    spoilt(&bench, "negative std", &["plans.json", "intensity"], |m| m.plans[intensity] = negative);
    for field in ["patch_size", "spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data"] {
        spoilt(&bench, field, &["plans.json", field], |m| {
            m.configuration().as_object_mut().unwrap().remove(field);
        });
    }
}

#[test]
fn descriptions_that_cannot_be_are_refused() {
    let bench = Bench::new();
    let data = |what: &str, field: &str, value: Value| {
        spoilt(&bench, what, &["dataset.json", field], |m| m.dataset[field] = value);
    };
    data("no labels", "labels", json!({}));
    data("labels of a wrong type", "labels", json!(["liver"]));
    data("no background", "labels", json!({"liver": 1}));
    data("background of 1", "labels", json!({"background": 1, "liver": 2}));
    data("gap", "labels", json!({"background": 0, "liver": 1, "spleen": 3}));
    data("negative label", "labels", json!({"background": 0, "liver": -1}));
    data("label of text", "labels", json!({"background": 0, "liver": "one"}));
    data("channels without 0", "channel_names", json!({"1": "CT"}));
    data("channel of a wrong name", "channel_names", json!({"first": "CT"}));
    for file in ["plans.json", "dataset.json"] {
        let text = Model::ct().plans.to_string();
        let bytes = text.as_bytes();
        with_file(&bench, "half", file, &bytes[..bytes.len() / 2], &[file]);
        with_file(&bench, "empty", file, b"", &[file]);
        with_file(&bench, "a list", file, b"[]", &[file]);
        with_file(&bench, "nested without end", file, &b"[".repeat(200_000), &[file]);
        with_file(&bench, "no text", file, &[0xff; 100], &[file]);
        let _ = std::fs::remove_dir_all(bench.path("bad"));
        Model::ct().write(&bench.path("bad"), &["fold_0"]);
        std::fs::remove_file(bench.path("bad").join(file)).unwrap();
        bench.refused("missing", "bad", &["good.nii"], 4, &[file]);
    }
}

#[test]
fn what_is_no_model_is_refused() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.path("empty")).unwrap();
    std::fs::create_dir_all(bench.path("no_folds")).unwrap();
    std::fs::copy(bench.path("model/plans.json"), bench.path("no_folds/plans.json")).unwrap();
    std::fs::write(bench.path("letter.txt"), "a letter").unwrap();
    for model in ["absent", "empty", "no_folds", "letter.txt", "good.nii"] {
        bench.refused(model, model, &["good.nii"], 4, &[model]);
    }
    let run = |more: &[&str]| {
        let args = [&["predict", "-m", "model", "-i", "good.nii", "-o", "out/s.nii"], more].concat();
        stunet_in(bench.dir.path(), &args)
    };
    assert!(run(&["-f", "3"]).error(2).contains("fold"));
    assert!(run(&["-chk", "checkpoint_best.pth"]).error(2).contains("checkpoint_best.pth"));
    assert!(run(&["-chk", "../../x.pth"]).error(2).contains("x.pth"));
}

/// Changes the bytes of a folder's weights.
fn weights(change: impl Fn(&mut Vec<u8>)) -> impl Fn(&Path) {
    move |folder| {
        let path = folder.join("fold_0.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    }
}

/// Changes the JSON of a folder's `model.json`.
fn manifest(change: impl Fn(&mut Value)) -> impl Fn(&Path) {
    move |folder| {
        let path = folder.join("model.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(path, json.to_string()).unwrap();
    }
}

/// The project's own folder: sums are checked and no name leads out of it.
#[test]
fn spoilt_own_folders_are_refused() {
    let bench = Bench::new();
    stunet_in(bench.dir.path(), &["convert", "model", "own"]).ok();
    let spoil = |what: &str, mentions: &[&str], change: &dyn Fn(&Path)| {
        let _ = std::fs::remove_dir_all(bench.path("bad"));
        files::copy(&bench.path("own"), &bench.path("bad"));
        change(&bench.path("bad"));
        bench.refused(what, "bad", &["good.nii"], 4, mentions);
    };
    let file = "fold_0.safetensors";
    spoil("a flipped bit", &[file, "sha256"], &weights(|b| *b.last_mut().unwrap() ^= 1));
    spoil("cut short", &[file], &weights(|b| b.truncate(b.len() / 2)));
    spoil("empty", &[file], &weights(|b| b.clear()));
    spoil("header without end", &[file], &weights(|b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes())));
    spoil("header of zero bytes", &[file], &weights(|b| b[..8].fill(0)));
    spoil("header that is no JSON", &[file], &weights(|b| b[8..40].fill(b'x')));
    spoil("no weights", &[file], &|f| std::fs::remove_file(f.join(file)).unwrap());
    let name = "model.json";
    spoil("another format", &[name, "format"], &manifest(|m| m["format"] = json!("onnx")));
    spoil("a later version", &["version"], &manifest(|m| m["version"] = json!(999)));
    spoil("no plan", &[name, "plan"], &manifest(|m| drop(m.as_object_mut().unwrap().remove("plan"))));
    spoil("a way out", &[name, "folds"], &manifest(|m| m["folds"][0]["file"] = json!("../own/fold_0.safetensors")));
    spoil("no folds", &[name, "folds"], &manifest(|m| m["folds"] = json!([])));
    spoil("a wrong sum", &["sha256"], &manifest(|m| m["folds"][0]["sha256"] = json!("0".repeat(64))));
    spoil("a zero patch", &[name, "patch"], &manifest(|m| m["plan"]["patch"] = json!([0, 32, 32])));
    spoil("an unknown key", &[name], &manifest(|m| m["run"] = json!("rm -rf")));
    spoil("half of it", &[name], &|f| std::fs::write(f.join(name), b"{\"format\": \"stunet-mo").unwrap());
}

/// nnU-Net v1's plans are a pickle of their own.
#[test]
fn spoilt_v1_folders_are_refused() {
    let bench = Bench::new();
    let fold = bench.path("v1/fold_0");
    std::fs::create_dir_all(&fold).unwrap();
    std::fs::write(fold.join("model_final_checkpoint.model"), Model::ct().checkpoint()).unwrap();
    let pkl = "model_final_checkpoint.model.pkl";
    bench.refused("no plans", "v1", &["good.nii"], 4, &[pkl]);
    let (name, value) = hostile().remove(0);
    let hostile = pickle(&value);
    let empty = pickle(&dict([("name", s("STUNetTrainer_small"))]));
    // A list in a list in a list ... and one that holds the one before it twice, forty times over.
    let deep = [b"\x80\x02".to_vec(), b"]".repeat(100_000), b"a".repeat(99_999), b".".to_vec()].concat();
    let laughs = [b"\x80\x02]".to_vec(), b"q\x00]h\x00ah\x00a".repeat(40), b".".to_vec()].concat();
    let list: [(&str, &[u8], &str); 6] = [
        ("nothing", b"", ""),
        ("text", b"plans", ""),
        ("hostile", &hostile, name),
        ("no plans in it", &empty, "plans"),
        ("deep", &deep, ""),
        ("a billion laughs", &laughs, ""),
    ];
    for (what, bytes, mention) in list {
        std::fs::write(fold.join(pkl), bytes).unwrap();
        bench.refused(what, "v1", &["good.nii"], 4, &[pkl, mention]);
        assert!(!bench.path("pwned").exists());
    }
}
