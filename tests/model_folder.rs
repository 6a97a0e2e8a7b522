//! Model folders of nnU-Net v1, v2 and the project's own.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stunet::Error;
use stunet::nnunet::model::{Architecture, Folds, ModelFolder, ModelKind, ModelOptions, convert, inspect};
use stunet::nnunet::plans::{Decision, Normalization, Rules};

use crate::common::nnunet::*;
use crate::common::pickle::{Py, dict, ints, pickle, s};
use crate::common::shared;
use crate::common::torch::Tensor;

pub fn open(path: &Path) -> ModelFolder {
    ModelFolder::open(path, &ModelOptions::new()).unwrap()
}

fn refusal(path: &Path) -> Error {
    let e = ModelFolder::open(path, &ModelOptions::new()).map(|m| m.kind).expect_err("a refusal");
    assert!(!e.to_string().contains('\n'), "{e}");
    e
}

/// All tensors of all folds, bit for bit.
fn bits(m: &ModelFolder) -> Vec<(String, String, Vec<u32>)> {
    let mut out = Vec::new();
    for fold in &m.folds {
        for name in fold.weights.names() {
            let values = fold.weights.values(name).unwrap().iter().map(|v| v.to_bits()).collect();
            out.push((fold.name.clone(), name.clone(), values));
        }
    }
    out.sort();
    out
}

/// The value at a text key of a dictionary.
fn entry<'a>(v: &'a mut Py, key: &str) -> &'a mut Py {
    let Py::Dict(items) = v else { panic!("no dictionary") };
    &mut items.iter_mut().find(|(k, _)| matches!(k, Py::Str(k) if k == key)).expect(key).1
}

fn named(folds: &[&str]) -> ModelOptions {
    ModelOptions::new().folds(Folds::Named(folds.iter().map(|f| f.to_string()).collect()))
}

#[test]
fn v2_folder_and_its_folds() {
    let dir = tempfile::tempdir().unwrap();
    let folder = v2_folder(dir.path(), &["fold_0", "fold_2", "fold_10", "fold_all"], 2, 4);
    let m = open(&folder);
    assert_eq!((m.kind, m.plan.rules), (ModelKind::NnunetV2, Rules::NnunetV2));
    assert_eq!(m.folds.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["0", "2", "10"]);
    assert_eq!(m.plan.strides, [[2; 3], [2; 3], [2; 3], [2; 3], [1, 1, 2]]);
    assert_eq!((m.plan.heads, &m.plan.decision), (4, &Decision::Argmax));
    assert_eq!(m.plan.labels[2], (3, "organ_3".into()));
    let Architecture::StuNet { dims, depth, decoder_depth, in_channels, classes } = m.architecture else { panic!() };
    assert_eq!((dims, depth, decoder_depth, in_channels, classes), (TINY, [1; 6], [1; 5], 2, 4));

    let some = ModelFolder::open(&folder, &named(&["all", "2"])).unwrap();
    assert_eq!(some.folds.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["all", "2"]);
    for absent in [&["7"][..], &["0", "0"], &[]] {
        let e = ModelFolder::open(&folder, &named(absent)).map(|m| m.kind).unwrap_err();
        assert_eq!(e.exit_code(), 2, "{e}");
    }
    // One checkpoint of the folder.
    let file = open(&folder.join("fold_2/checkpoint_final.pth"));
    assert_eq!((file.plan, file.folds[0].name.as_str()), (m.plan, "2"));
    // Another name of checkpoint.
    std::fs::rename(folder.join("fold_2/checkpoint_final.pth"), folder.join("fold_2/checkpoint_best.pth")).unwrap();
    let best = ModelFolder::open(&folder, &ModelOptions::new().checkpoint("checkpoint_best")).unwrap();
    assert_eq!(best.folds.len(), 1);
    let e = ModelFolder::open(&folder, &ModelOptions::new().checkpoint("../x")).map(|m| m.kind).unwrap_err();
    assert_eq!(e.exit_code(), 2, "{e}");
}

#[test]
fn only_fold_all() {
    let dir = tempfile::tempdir().unwrap();
    let m = open(&v2_folder(dir.path(), &["fold_all"], 1, 2));
    assert_eq!(m.folds[0].name, "all");
    let m = open(&v1_folder(dir.path(), "all", "model_final_checkpoint", 2));
    assert_eq!(m.folds[0].name, "all");
}

#[test]
fn v1_folder_and_its_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let folder = v1_folder(dir.path(), "fold_0", "small_ep4k", 3);
    let m = open(&folder);
    assert_eq!((m.kind, m.plan.rules, m.plan.heads), (ModelKind::NnunetV1, Rules::NnunetV1, 3));
    assert_eq!((m.plan.dataset.as_str(), m.plan.labels[1].1.as_str()), ("Task001_Tiny", "label_2"));
    assert_eq!((m.plan.strides[4], &m.plan.mirror_axes[..]), ([1, 1, 2], &[0, 1, 2][..]));
    assert_eq!(m.plan.channels[0].normalization, Normalization::ZScore);
    let file = open(&folder.join("fold_0/small_ep4k.model"));
    assert_eq!((file.plan, bits(&m).len()), (m.plan, 130));
    // Two checkpoints: the choice is the user's.
    v1_folder(dir.path(), "fold_0", "base_ep4k", 3);
    let e = refusal(&folder);
    assert!(e.to_string().contains("base_ep4k") && e.to_string().contains("small_ep4k"), "{e}");
    ModelFolder::open(&folder, &ModelOptions::new().checkpoint("base_ep4k")).unwrap();
    // The usual name wins.
    v1_folder(dir.path(), "fold_0", "model_final_checkpoint", 3);
    open(&folder);
}

#[test]
fn v1_postprocessing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = v1_folder(dir.path(), "fold_0", "x", 4);
    let with = |text: &str| std::fs::write(folder.join("postprocessing.json"), text).unwrap();
    with(r#"{"for_which_classes": [1, 3], "min_valid_object_sizes": "None", "dc_per_class_raw": {"1": NaN}}"#);
    assert_eq!(open(&folder).plan.keep_largest, [1, 3]);
    with(r#"{"for_which_classes": null}"#);
    assert_eq!(open(&folder).plan.keep_largest, [1, 2, 3]);
    with(r#"{"for_which_classes": [[1, 2], 3]}"#);
    assert!(matches!(refusal(&folder), Error::Unsupported { .. }));
    with(r#"{"for_which_classes": [4]}"#);
    assert!(matches!(refusal(&folder), Error::Model { .. }));
}

#[test]
fn v1_stages() {
    let dir = tempfile::tempdir().unwrap();
    let folder = v1_folder(dir.path(), "fold_0", "x", 3);
    let pkl = folder.join("fold_0/x.model.pkl");
    std::fs::write(&pkl, pickle(&v1_info(3, Py::None))).unwrap();
    open(&folder);
    std::fs::write(&pkl, pickle(&v1_info(3, Py::Int(1)))).unwrap();
    assert!(refusal(&folder).to_string().contains("no stage 1"));
    // Two stages: the one that the trainer names, whichever it is, and never a guess.
    let two = |stage: Py| {
        let mut info = v1_info(3, stage);
        let stages = entry(entry(&mut info, "plans"), "plans_per_stage");
        let Py::Dict(list) = stages else { panic!("stages are a dictionary") };
        let (_, Py::Dict(first)) = &list[0] else { panic!("a stage is a dictionary") };
        let mut second = first.clone();
        second.retain(|(k, _)| !matches!(k, Py::Str(k) if k == "current_spacing"));
        second.push((s("current_spacing"), Py::Tuple(vec![Py::Float(0.75); 3])));
        list.push((Py::Int(1), Py::Dict(second)));
        std::fs::write(&pkl, pickle(&info)).unwrap();
    };
    for (stage, spacing, name) in [(0, 1.5, "3d_lowres"), (1, 0.75, "3d_fullres")] {
        two(Py::Int(stage));
        let plan = open(&folder).plan;
        assert_eq!((plan.spacing_mm, plan.configuration.as_str()), ([Some(spacing); 3], name));
    }
    two(Py::None);
    assert!(refusal(&folder).to_string().contains("init[5]"));
    std::fs::remove_file(&pkl).unwrap();
    assert!(refusal(&folder).to_string().contains("x.model.pkl"));
}

#[test]
fn v1_trainers_and_their_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let folder = v1_folder(dir.path(), "fold_0", "x", 3);
    let with = |change: &dyn Fn(&mut Py)| {
        let mut info = v1_info(3, Py::Int(0));
        change(&mut info);
        std::fs::write(folder.join("fold_0/x.model.pkl"), pickle(&info)).unwrap();
    };
    with(&|info| *entry(info, "name") = s("nnUNetTrainerV2_noMirroring"));
    assert_eq!(open(&folder).plan.mirror_axes, [0; 0]);
    with(&|info| *entry(info, "name") = s("nnUNetTrainerV2CascadeFullRes"));
    // A second stage also reads the labels of the first, for which this network has no channels.
    assert!(refusal(&folder).to_string().contains("1 input channels, the plan has 3"));
    with(&|info| {
        let Py::Dict(plans) = entry(info, "plans") else { panic!("plans are a dictionary") };
        let params = [
            ("force_separate_z", Py::Bool(true)),
            ("interpolation_order", Py::Int(3)),
            ("interpolation_order_z", Py::Int(1)),
        ];
        plans.push((s("segmentation_export_params"), dict(params)));
    });
    let rule = open(&folder).plan.resampling_probabilities;
    assert_eq!((rule.order, rule.order_z, rule.force_separate_z), (3, 1, Some(true)));
    with(&|info| {
        let Py::Dict(stages) = entry(entry(info, "plans"), "plans_per_stage") else { panic!("a dictionary") };
        *entry(&mut stages[0].1, "patch_size") = ints(&[32, 32]);
        *entry(&mut stages[0].1, "pool_op_kernel_sizes") = Py::List(vec![ints(&[2, 2])]);
    });
    assert!(refusal(&folder).to_string().contains("2D"));
}

#[test]
fn published_names_need_the_published_signature() {
    let names = |trainer: &str, task: &str| {
        let dir = tempfile::tempdir().unwrap();
        let folder = v1_folder(dir.path(), "fold_0", "x", 105);
        let mut info = v1_info(105, Py::Int(0));
        *entry(&mut info, "name") = s(trainer);
        std::fs::write(folder.join("fold_0/x.model.pkl"), pickle(&info)).unwrap();
        let task = dir.path().join(task);
        std::fs::rename(dir.path().join("Task001_Tiny"), &task).unwrap();
        open(&task.join(folder.file_name().unwrap())).plan.labels[39].1.clone()
    };
    assert_eq!(names("STUNetTrainer_small", "Task101_TotalSegmentator"), "liver");
    assert_eq!(names("STUNetTrainer_huge", "bare"), "liver");
    assert_eq!(names("STUNetTrainer_small", "Task001_Tiny"), "label_40");
    assert_eq!(names("STUNetTrainer_small_ft", "Task101_TotalSegmentator"), "label_40");
    assert_eq!(names("nnUNetTrainerV2", "Task101_TotalSegmentator"), "label_40");
}

#[test]
fn a_checkpoint_file_is_one_fold() {
    let dir = tempfile::tempdir().unwrap();
    let file = v2_folder(dir.path(), &["fold_2"], 1, 3).join("fold_2/checkpoint_final.pth");
    for good in [named(&["2"]), ModelOptions::new().checkpoint("checkpoint_final")] {
        ModelFolder::open(&file, &good).unwrap();
    }
    for bad in [named(&["0"]), named(&["2", "0"]), ModelOptions::new().checkpoint("checkpoint_best")] {
        let e = ModelFolder::open(&file, &bad).map(|m| m.kind).unwrap_err();
        assert!(matches!(e, Error::Usage { .. }), "{e}");
    }
}

#[test]
fn conversion_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let v2 = v2_folder(dir.path(), &["fold_0", "fold_1"], 1, 3);
    let v1 = v1_folder(dir.path(), "fold_all", "model_final_checkpoint", 3);
    for (name, src) in [("from_v2", v2), ("from_v1", v1)] {
        let dst = dir.path().join(name);
        convert(&src, &dst, &ModelOptions::new()).unwrap();
        let (a, b) = (open(&src), open(&dst));
        assert_eq!(b.kind, ModelKind::Own);
        assert_eq!((&a.plan, &a.architecture, bits(&a)), (&b.plan, &b.architecture, bits(&b)));
        // Again from the result: the same bytes.
        let again = dir.path().join(format!("{name}_again"));
        convert(&dst, &again, &ModelOptions::new()).unwrap();
        for fold in &b.folds {
            let file = fold.weights.path().file_name().unwrap();
            assert_eq!(std::fs::read(fold.weights.path()).unwrap(), std::fs::read(again.join(file)).unwrap());
        }
        // Never over something.
        assert_eq!(convert(&src, &dst, &ModelOptions::new()).unwrap_err().exit_code(), 2);
        let parts: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(parts.iter().all(|p| !p.to_string_lossy().contains(".part")), "{parts:?}");
    }
    let two = ModelFolder::open(dir.path().join("from_v2"), &named(&["1"])).unwrap();
    assert_eq!(two.folds[0].name, "1");
}

#[test]
fn failed_conversion_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("src");
    let mut model = Model::new(1, 3);
    model.tensors[7].values[0] = f32::NAN;
    model.write(&src, &["fold_0"]);
    let dst = dir.path().join("out");
    let e = convert(&src, &dst, &ModelOptions::new()).unwrap_err();
    assert!(e.to_string().contains(&model.tensors[7].name), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn own_folder_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let src = v2_folder(dir.path(), &["fold_0"], 1, 3);
    let own = dir.path().join("own");
    convert(&src, &own, &ModelOptions::new()).unwrap();
    let path = own.join("model.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!((good["format"].as_str(), good["version"].as_u64()), (Some("stunet-model"), Some(1)));
    assert_eq!(good["sources"][2]["file"], "fold_0/checkpoint_final.pth");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut v = good.clone();
        change(&mut v);
        std::fs::write(&path, v.to_string()).unwrap();
        refusal(&own).to_string()
    };
    assert!(with(&|v| v["format"] = json!("other")).contains("format"));
    assert!(with(&|v| v["version"] = json!(2)).contains("version 2"));
    assert!(with(&|v| v["folds"] = json!([])).contains("folds"));
    assert!(with(&|v| v["folds"][0]["file"] = json!("../x.safetensors")).contains("folds.file"));
    assert!(with(&|v| v["folds"][0]["sha256"] = json!("00")).contains("sha256"));
    assert!(with(&|v| v["plan"]["heads"] = json!(4)).contains("heads"));
    assert!(with(&|v| v["plan"]["patch"] = json!([30, 32, 32])).contains("patch"));
    assert!(with(&|v| v["plan"]["spacing_mm"] = json!([0.0, 1.0, 1.0])).contains("spacing"));
    assert!(with(&|v| v["architecture"]["stunet"]["classes"] = json!(9)).contains("architecture"));
    assert!(with(&|v| v["plan"]["mirror_axes"] = json!([3])).contains("mirror_axes"));
    std::fs::write(&path, good.to_string()).unwrap();
    open(&own);
    // One flipped bit of one weight.
    let file = own.join("fold_0.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert!(refusal(&own).to_string().contains("sha256"));
}

#[test]
fn v2_plans_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let folder = v2_folder(dir.path(), &["fold_0"], 2, 3);
    // (expected in the message, change of plans.json, change of dataset.json)
    type Change = fn(&mut Value, &mut Value);
    let cases: [(&str, Change); 33] = [
        ("configurations", |p, _| *p = json!({})),
        ("plans.json: JSON", |p, _| *p = Value::Null),
        ("no configuration \"3d_fullres\"", |p, _| p["configurations"] = json!({"2d": {}})),
        ("inherits from itself", |p, _| p["configurations"]["3d_fullres"]["inherits_from"] = json!("3d_fullres")),
        ("patch_size", |p, _| p["configurations"]["3d_fullres"]["patch_size"] = json!([32, 32, -1])),
        ("patch_size", |p, _| p["configurations"]["3d_fullres"]["patch_size"] = json!([32, 32, 4_000_000_000_000u64])),
        ("expected two lengths", |p, _| p["configurations"]["3d_fullres"]["patch_size"] = json!([32, 32])),
        ("spacing", |p, _| p["configurations"]["3d_fullres"]["spacing"] = json!([1.0, 1.0])),
        ("spacing[1]", |p, _| p["configurations"]["3d_fullres"]["spacing"] = json!([1.0, null, 1.0])),
        ("resampling_fn_seg", |p, _| p["configurations"]["3d_fullres"]["previous_stage"] = json!("3d_lowres")),
        ("normalization_schemes", |p, _| {
            p["configurations"]["3d_fullres"]["normalization_schemes"] = json!(["ZScoreNormalization"])
        }),
        ("MyNorm", |p, _| p["configurations"]["3d_fullres"]["normalization_schemes"][0] = json!("MyNorm")),
        ("foreground_intensity_properties_per_channel.0", |p, _| {
            p["configurations"]["3d_fullres"]["normalization_schemes"][0] = json!("CTNormalization");
        }),
        ("NibabelIOWithReorient", |p, _| p["image_reader_writer"] = json!("NibabelIOWithReorient")),
        ("resample_torch", |p, _| p["configurations"]["3d_fullres"]["resampling_fn_data"] = json!("resample_torch")),
        ("order", |p, _| p["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"]["order"] = json!(2)),
        ("separate_z_anisotropy_threshold", |p, _| {
            let kwargs = &mut p["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"];
            kwargs["separate_z_anisotropy_threshold"] = json!(5);
        }),
        ("is_seg", |p, _| p["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"]["is_seg"] = json!(true)),
        ("patch_size", |p, _| p["configurations"]["3d_fullres"]["patch_size"] = json!([4096, 4096, 4096])),
        ("spacing", |p, _| p["configurations"]["3d_fullres"]["spacing"] = json!([1.0, 0.001, 1.0])),
        ("intensity", |p, _| {
            p["configurations"]["3d_fullres"]["normalization_schemes"][0] = json!("CTNormalization");
            p["foreground_intensity_properties_per_channel"] =
                json!({"0": {"mean": 1e300, "std": 2, "percentile_00_5": 0, "percentile_99_5": 1}});
        }),
        ("intensity", |p, _| {
            p["configurations"]["3d_fullres"]["normalization_schemes"][0] = json!("CTNormalization");
            p["foreground_intensity_properties_per_channel"] =
                json!({"0": {"mean": 0, "std": 0, "percentile_00_5": 0, "percentile_99_5": 1e35}});
        }),
        ("strides", |p, _| p["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = json!({})),
        ("strides", |p, _| {
            p["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"][1] = json!([3, 1, 1])
        }),
        ("transpose_forward", |p, _| p["transpose_forward"] = json!([0, 1, 1])),
        ("transpose_backward", |p, _| p["transpose_backward"] = json!([0, 2, 1])),
        ("channel_names", |_, d| d["channel_names"] = json!({"0": "CT", "2": "MR"})),
        ("the plan has 1", |p, d| {
            *p = v2_plans(1);
            d["channel_names"] = json!({"0": "CT"});
        }),
        ("background", |_, d| d["labels"] = json!({"organ": 1})),
        ("labels", |_, d| d["labels"] = json!({"background": 0, "a": 1, "b": 3})),
        ("ignore", |_, d| d["labels"] = json!({"background": 0, "a": 1, "b": 2, "ignore": 5})),
        ("regions_class_order", |_, d| d["labels"] = json!({"background": 0, "a": [1, 2], "b": 2})),
        ("output channels", |_, d| d["labels"] = json!({"background": 0, "a": 1})),
    ];
    for (expected, change) in cases {
        let (mut plans, mut dataset) = (v2_plans(2), v2_dataset(2, 3));
        change(&mut plans, &mut dataset);
        let text = if plans.is_null() { "{\"a\": ".to_string() } else { plans.to_string() };
        std::fs::write(folder.join("plans.json"), text).unwrap();
        std::fs::write(folder.join("dataset.json"), dataset.to_string()).unwrap();
        let e = refusal(&folder);
        assert!(e.to_string().contains(expected) && e.exit_code() == 4, "{expected}: {e}");
    }
}

#[test]
fn v2_plans_of_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let folder = v2_folder(dir.path(), &["fold_0"], 1, 3);
    let with = |plans: &Value, dataset: &Value| {
        std::fs::write(folder.join("plans.json"), plans.to_string().replace("\"@NaN\"", "NaN")).unwrap();
        std::fs::write(folder.join("dataset.json"), dataset.to_string()).unwrap();
        open(&folder).plan
    };
    let (plans, dataset) = (v2_plans(1), v2_dataset(1, 3));
    let plain = with(&plans, &dataset);

    // Keys of nnU-Net 2.2, an inherited configuration, Python's NaN where it does not matter.
    let mut old = plans.clone();
    let mut conf = old["configurations"]["3d_fullres"].as_object().unwrap().clone();
    let strides = conf.remove("architecture").unwrap()["arch_kwargs"]["strides"].clone();
    conf.insert("pool_op_kernel_sizes".into(), strides);
    conf.insert("spacing".into(), json!([9, 9, 9]));
    conf.insert("median_image_size_in_voxels".into(), json!(["@NaN"]));
    old["configurations"] = json!({"base": conf, "3d_fullres": {"inherits_from": "base", "spacing": [1.5, 1.5, 1.5]}});
    assert_eq!(with(&old, &dataset), plain);

    // A key that is absent has the default of nnU-Net's function, which is not null.
    assert_eq!(plain.resampling_data.force_separate_z, None);
    let mut absent = plans.clone();
    absent["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"] = json!({"is_seg": false, "order": 3});
    assert_eq!(with(&absent, &dataset).resampling_data.force_separate_z, Some(false));

    // Four poolings are padded, six are cut.
    let mut four = plans.clone();
    four["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"] =
        json!([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]);
    assert_eq!(with(&four, &dataset).strides, [[1, 2, 2], [2; 3], [2; 3], [2; 3], [1; 3]]);
    let mut six = plans.clone();
    six["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"] =
        json!([[1, 1, 1], [1, 1, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [9, 9, 9]]);
    assert_eq!(with(&six, &dataset).strides, [[1, 1, 2], [2; 3], [2; 3], [2; 3], [2; 3]]);

    // Every normalisation, statistics for CT.
    let mut ct = plans.clone();
    ct["configurations"]["3d_fullres"]["normalization_schemes"] = json!(["CTNormalization"]);
    ct["foreground_intensity_properties_per_channel"] =
        json!({"0": {"mean": 1.5, "std": 2, "percentile_00_5": -900.5, "percentile_99_5": 300, "median": "@NaN"}});
    let channel = with(&ct, &dataset).channels.remove(0);
    assert_eq!(channel.normalization, Normalization::Ct);
    assert_eq!(channel.intensity.map(|i| (i.mean, i.std, i.percentile_00_5)), Some((1.5, 2.0, -900.5)));
    for (name, normalization) in [
        ("NoNormalization", Normalization::None),
        ("RescaleTo01Normalization", Normalization::RescaleTo01),
        ("RGBTo01Normalization", Normalization::RgbTo01),
    ] {
        ct["configurations"]["3d_fullres"]["normalization_schemes"] = json!([name]);
        assert_eq!(with(&ct, &dataset).channels[0].normalization, normalization);
    }

    // Labels: the old key for channels, an ignore label, regions.
    let mut d = dataset.clone();
    d["modality"] = json!({"0": "CT"});
    d["labels"] = json!({"background": 0, "b": 2, "a": [1], "ignore": 3});
    let p = with(&plans, &d);
    assert_eq!((p.channels[0].name.as_str(), p.heads), ("CT", 3));
    assert_eq!(p.labels, [(1, "a".to_string()), (2, "b".to_string())]);
    d["labels"] = json!({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3});
    d["regions_class_order"] = json!([1, 2, 3]);
    let p = with(&plans, &d);
    assert_eq!((p.heads, p.decision), (3, Decision::Regions { paint: vec![1, 2, 3] }));
    assert_eq!(p.labels[0], (1, "whole".to_string()));
}

#[test]
fn weights_that_are_no_stunet() {
    let dir = tempfile::tempdir().unwrap();
    let with = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut model = Model::new(1, 3);
        change(&mut model.tensors);
        model.write(dir.path(), &["fold_0"]);
        refusal(dir.path()).to_string()
    };
    let zeros = |name: &str, shape: &[usize]| Tensor::new(name, shape, 999, vec![0.0; shape.iter().product()]);
    let (filter, bias) = ("conv_blocks_context.0.0.conv1.weight", "conv_blocks_context.0.0.conv1.bias");
    let missing = with(&|t| t.retain(|t| t.name != bias));
    assert!(missing.contains(bias) && missing.contains("missing"), "{missing}");
    assert!(with(&|t| t[1] = zeros(bias, &[7])).contains("shape [7], expected [2]"));
    assert!(with(&|t| t.push(zeros("extra.weight", &[1]))).contains("extra.weight"));
    assert!(with(&|t| t[0] = zeros(filter, &[2, 1, 3, 3])).contains("3D convolution"));
    let only = |name: &str| with(&|t| *t = vec![zeros(name, &[1])]);
    assert!(only("encoder.stages.0.0.convs.0.conv.weight").contains("PlainConvUNet"));
    assert!(only("encoder.stem.convs.0.conv.weight").contains("ResidualEncoderUNet"));
    assert!(only("x").contains("\"x\""));
}

#[test]
fn not_a_model() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(refusal(dir.path()).exit_code(), 4);
    assert_eq!(refusal(&dir.path().join("absent")).exit_code(), 4);
    let file = dir.path().join("image.nii");
    std::fs::write(&file, "x").unwrap();
    assert_eq!(refusal(&file).exit_code(), 4);
    // nnU-Net's folder with a note of another tool beside it is what it is.
    let folder = v2_folder(dir.path(), &["fold_0"], 1, 2);
    std::fs::write(folder.join("stunet.json"), "{}").unwrap();
    assert_eq!(open(&folder).kind, ModelKind::NnunetV2);
}

#[test]
fn inspection() {
    let dir = tempfile::tempdir().unwrap();
    let report = inspect(v2_folder(dir.path(), &["fold_0"], 1, 3), &ModelOptions::new()).unwrap();
    assert_eq!((report.tensors, report.dtypes["f32"], report.classes.len()), (130, 130, 2));
    assert_eq!(report.flops_per_patch, 2 * report.macs_per_patch);
    assert_eq!(report.weight_bytes, 4 * report.parameters);
    assert_eq!(report.files.len(), 3);
    assert!(report.files[2].pickle_globals.contains(&"torch.device".to_string()));
    assert_eq!(serde_json::to_value(&report).unwrap()["kind"], "nnunet_v2");
    let v1 = inspect(v1_folder(dir.path(), "fold_0", "x", 3), &ModelOptions::new()).unwrap();
    assert_eq!(v1.files[0].sha256.len(), 64);
    assert!(v1.files[1].pickle_globals.contains(&"torch.FloatStorage".to_string()));
}

fn golden_v1() -> Option<PathBuf> {
    Some(shared("golden/stunet_v1")?.join("Task101_TotalSegmentator/STUNetTrainer_small__nnUNetPlansv2.1"))
}

#[test]
fn golden_model_folder_v1() {
    let Some(folder) = golden_v1() else { return };
    let m = open(&folder);
    assert_eq!((m.kind, m.plan.heads, m.plan.patch), (ModelKind::NnunetV1, 9, [64; 3]));
    assert_eq!((m.plan.spacing_mm, m.plan.dataset.as_str()), ([Some(1.5); 3], "Task101_TotalSegmentator"));
    assert_eq!(m.plan.strides, [[2; 3], [2; 3], [2; 3], [2; 3], [1, 1, 2]]);
    assert_eq!((m.plan.trainer.as_str(), bits(&m).len()), ("STUNetTrainer_small", 130));
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own");
    convert(&folder, &own, &ModelOptions::new()).unwrap();
    let o = open(&own);
    assert_eq!((&m.plan, bits(&m)), (&o.plan, bits(&o)));
}

/// The published plans, with a tiny network of 105 classes beside them.
#[test]
fn golden_published_v1_plans() {
    let Some(root) = shared("data/stunet_v1_plans") else { return };
    for size in ["small", "base", "large", "huge"] {
        let dir = tempfile::tempdir().unwrap();
        let folder = v1_folder(dir.path(), "fold_0", &format!("{size}_ep4k"), 105);
        let task = dir.path().join("Task101_TotalSegmentator");
        std::fs::rename(dir.path().join("Task001_Tiny"), &task).unwrap();
        let folder = task.join(folder.file_name().unwrap());
        let pkl = format!("{size}_ep4k.model.pkl");
        std::fs::copy(root.join(&pkl), folder.join("fold_0").join(&pkl)).unwrap();
        let m = open(&folder);
        let p = &m.plan;
        assert_eq!(
            (p.trainer.as_str(), p.patch, p.spacing_mm),
            (&*format!("STUNetTrainer_{size}"), [128; 3], [Some(1.5); 3])
        );
        assert_eq!((p.heads, p.labels.len(), p.labels[39].1.as_str()), (105, 104, "liver"));
        assert_eq!((p.channels[0].normalization, p.channels[0].use_mask), (Normalization::ZScore, false));
        assert_eq!(p.strides, [[2; 3], [2; 3], [2; 3], [2; 3], [1, 1, 2]]);
    }
}

#[test]
fn golden_model_folder_v2() {
    let Some(root) = shared("golden/pipeline") else { return };
    // (name, channels, heads, normalisation, regions)
    let expected = [
        ("ct_aniso", 1, 4, Normalization::Ct),
        ("mr_two", 2, 3, Normalization::ZScore),
        ("mr_thick", 1, 3, Normalization::ZScore),
        ("regions", 1, 3, Normalization::ZScore),
        ("ignore", 1, 3, Normalization::Ct),
    ];
    for (name, channels, heads, normalization) in expected {
        let folder = root.join(name).join("model/stunet");
        let m = open(&folder);
        assert_eq!((m.kind, m.plan.rules), (ModelKind::NnunetV2, Rules::NnunetV2), "{name}");
        assert_eq!((m.plan.channels.len(), m.plan.heads), (channels, heads), "{name}");
        assert!(m.plan.channels.iter().all(|c| c.normalization == normalization), "{name}");
        assert_eq!(matches!(m.plan.decision, Decision::Regions { .. }), name == "regions");
        assert_eq!((&m.plan.mirror_axes[..], m.folds.len()), (&[0, 1, 2][..], 1), "{name}");
        let json = |p: PathBuf| serde_json::from_slice::<Value>(&std::fs::read(p).unwrap()).unwrap();
        // The generator's own note of widths and strides, and the plan as nnU-Net wrote it.
        let note = json(folder.join("stunet.json"));
        assert_eq!(json!(m.plan.strides), note["strides"], "{name}");
        let Architecture::StuNet { dims, depth, .. } = m.architecture.clone() else { panic!("{name}") };
        assert_eq!((json!(dims), depth), (note["dims"].clone(), [1; 6]), "{name}");
        let plans = json(folder.join("plans.json"));
        let conf = &plans["configurations"]["3d_fullres"];
        assert_eq!(
            (json!(m.plan.patch), json!(m.plan.spacing_mm)),
            (conf["patch_size"].clone(), conf["spacing"].clone())
        );
        assert_eq!(json!(m.plan.channels.iter().map(|c| c.use_mask).collect::<Vec<_>>()), conf["use_mask_for_norm"]);
        if let Some(i) = m.plan.channels[0].intensity {
            let s = &plans["foreground_intensity_properties_per_channel"]["0"];
            assert_eq!((json!(i.mean), json!(i.percentile_99_5)), (s["mean"].clone(), s["percentile_99_5"].clone()));
        }
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("own");
        convert(&folder, &own, &ModelOptions::new()).unwrap();
        let o = open(&own);
        assert_eq!((&m.plan, bits(&m)), (&o.plan, bits(&o)), "{name}");
    }
}
