//! The best of several models: nnU-Net's choice, files and numbers; what is amiss is named.

use std::path::{Path, PathBuf};

use half::f16;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use stunet::io::npz::Number;
use stunet::io::{self, Geometry, LabelData, Segmentation};
use stunet::nnunet::postprocess::Step;
use stunet::nnunet::select::{SelectOptions, Selected, select};
use stunet::nnunet::split::Fold;
use stunet::{Device, Error, Event, Flow, Result};

use crate::common::binary::{Ran, stunet, stunet_with};
use crate::common::files;

const NAME: &str = "Dataset007_Select";

/// Folders of results and of preprocessed data, as nnU-Net has them.
struct Root {
    dir: tempfile::TempDir,
    shape: [usize; 3],
    spacing_mm: [f64; 3],
}

impl Root {
    /// A data set with these plans and validation cases by fold.
    fn new(shape: [usize; 3], spacing_mm: [f64; 3], configurations: Value, folds: &[&[&str]]) -> Self {
        let out = Self { dir: tempfile::tempdir().unwrap(), shape, spacing_mm };
        std::fs::create_dir_all(out.preprocessed().join("gt_segmentations")).unwrap();
        std::fs::create_dir_all(out.results()).unwrap();
        let all: Vec<&&str> = folds.iter().copied().flatten().collect();
        let split =
            |val: &&[&str]| json!({"train": all.iter().filter(|c| !val.contains(c)).collect::<Vec<_>>(), "val": val});
        let splits: Vec<Value> = folds.iter().map(split).collect();
        let plans = json!({"dataset_name": NAME, "configurations": configurations});
        std::fs::write(out.preprocessed().join("splits_final.json"), json!(splits).to_string()).unwrap();
        std::fs::write(out.preprocessed().join("nnUNetPlans.json"), plans.to_string()).unwrap();
        out
    }

    fn preprocessed(&self) -> PathBuf {
        self.dir.path().join("preprocessed").join(NAME)
    }

    fn results(&self) -> PathBuf {
        self.dir.path().join("results").join(NAME)
    }

    fn model(&self, configuration: &str) -> PathBuf {
        self.results().join(format!("nnUNetTrainer__nnUNetPlans__{configuration}"))
    }

    fn validation(&self, configuration: &str, fold: &str) -> PathBuf {
        self.model(configuration).join(format!("fold_{fold}")).join("validation")
    }

    fn map(&self, path: &Path, labels: &[u8]) {
        let geometry = Geometry::new(self.shape, self.spacing_mm);
        let seg = Segmentation::new(LabelData::U8(labels.to_vec()), geometry, Vec::new()).unwrap();
        io::write_nifti(path, &seg).unwrap();
    }

    fn truth(&self, case: &str, labels: &[u8]) {
        self.map(&self.preprocessed().join("gt_segmentations").join(format!("{case}.nii.gz")), labels);
    }

    /// A fold's validation of a case, in sixteenths of certainty of background and two labels.
    fn predicted<T: Number>(&self, at: [&str; 3], sixteenths: &[u8], number: impl Fn(f32) -> T) {
        let [configuration, fold, case] = at;
        let folder = self.validation(configuration, fold);
        std::fs::create_dir_all(&folder).unwrap();
        let dataset = json!({"channel_names": {"0": "CT"}, "labels": {"background": 0, "one": 1, "two": 2},
                             "numTraining": 6, "file_ending": ".nii.gz"});
        std::fs::write(self.model(configuration).join("dataset.json"), dataset.to_string()).unwrap();
        std::fs::copy(self.preprocessed().join("nnUNetPlans.json"), self.model(configuration).join("plans.json"))
            .unwrap();
        let voxels: usize = self.shape.iter().product();
        let of = |class: usize, voxel: usize| sixteenths[class * voxels + voxel];
        let largest = |v: usize| (0..3u8).rev().max_by_key(|c| of(usize::from(*c), v)).unwrap();
        self.map(&folder.join(format!("{case}.nii.gz")), &(0..voxels).map(largest).collect::<Vec<_>>());
        let values: Vec<T> = sixteenths.iter().map(|v| number(f32::from(*v) / 16.0)).collect();
        let [z, y, x] = self.shape;
        let path = folder.join(format!("{case}.npz"));
        io::write_npz(path, |npz| npz.array("probabilities", &[3, z, y, x], |a| a.push(&values))).unwrap();
    }

    fn select(&self, options: &SelectOptions) -> Result<Selected> {
        select(&self.results(), &self.preprocessed(), options, &Device::cpu(), &mut ())
    }

    /// A text file without the name of this run's folder.
    fn text(&self, path: &Path) -> String {
        std::fs::read_to_string(path).unwrap().replace(self.dir.path().to_str().unwrap(), "ROOT")
    }
}

/// Options for the first `folds` folds.
fn options(folds: u32) -> SelectOptions {
    let mut out = SelectOptions::default();
    out.folds = (0..folds).map(Fold::Number).collect();
    out
}

/// The inputs of `fixtures/select/make.py` in their folders.
fn fixture() -> Root {
    let plain = json!({"architecture": {}});
    let cascade = json!({"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"});
    let configurations = json!({"2d": plain, "3d_lowres": plain, "3d_fullres": plain, "3d_cascade_fullres": cascade});
    let folds: [&[&str]; 5] = [&["a", "b"], &["c"], &["d"], &["e"], &["f"]];
    let root = Root::new([6, 10, 11], [2.5, 1.0, 0.75], configurations, &folds);
    let bytes = include_bytes!("fixtures/select/inputs.safetensors");
    let inputs = SafeTensors::deserialize(bytes).unwrap();
    for (name, tensor) in inputs.tensors() {
        match *name.split('/').collect::<Vec<_>>().as_slice() {
            [_, case] => root.truth(case, tensor.data()),
            ["2d", fold, case] => root.predicted(["2d", fold, case], tensor.data(), |v| v),
            [model, fold, case] => root.predicted([model, fold, case], tensor.data(), f16::from_f32),
            _ => panic!("{name}"),
        }
    }
    root
}

fn expected(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/select").join(name);
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn nnunet_chooses_the_same_by_the_same_numbers() {
    let root = fixture();
    let found = root.select(&SelectOptions::default()).unwrap();
    assert_eq!((found.candidates.len(), found.best), (10, 8));
    let written = found.write().unwrap();
    let names: Vec<_> = written.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
    let files = ["postprocessing.pkl", "postprocessing.json", "summary.json", "inference_information.json"];
    assert_eq!(names, [&files[..], &["inference_instructions.txt"]].concat());
    assert_eq!(root.text(&written[3]), expected("expected/inference_information.json"));
    assert_eq!(root.text(&written[1]), expected("expected/postprocessing.json"));
    let single = root.model("3d_fullres").join("crossval_results_folds_0_1_2_3_4");
    assert_eq!(root.text(&single.join("summary.json")), expected("expected/summary.json"));
    for kept in ["dataset.json", "plans.json", "a.nii.gz", "f.nii.gz"] {
        assert!(single.join(kept).is_file() && found.best().folder.join(kept).is_file(), "{kept}");
    }
    // The first stage of the cascade runs in between, which nnU-Net leaves out.
    let text = root.text(&written[4]);
    let line = |start: &str| text.lines().find(|l| l.starts_with(start)).unwrap_or_else(|| panic!("{start}: {text}"));
    let same = "-d Dataset007_Select -i INPUT_FOLDER -o OUTPUT_FOLDER_PREV_STAGE -f 0 1 2 3 4 -c 3d_lowres";
    assert_eq!(
        line(&format!("stunet predict {same}")),
        format!("stunet predict {same} --trainer nnUNetTrainer -p nnUNetPlans")
    );
    assert!(text.contains(&format!("\nnnUNetv2_predict {same} -tr nnUNetTrainer -p nnUNetPlans\n")), "{text}");
    let second = "-c 3d_cascade_fullres --trainer nnUNetTrainer -p nnUNetPlans --previous-stage OUTPUT_FOLDER_PREV_STAGE \
                  --save-probabilities";
    assert!(text.contains(second), "{text}");
    assert_eq!(text, found.instructions().replace(root.dir.path().to_str().unwrap(), "ROOT"));

    let mut alone = SelectOptions::default();
    alone.ensembling = false;
    alone.configurations = Some(["3d_lowres", "3d_fullres", "2d"].map(str::to_owned).to_vec());
    let written = root.select(&alone).unwrap().write().unwrap();
    assert_eq!(root.text(&written[3]), expected("alone/inference_information.json"));
    assert_eq!(root.text(&written[1]), expected("alone/postprocessing.json"));
    assert!(!root.text(&written[4]).contains("ensemble"));
}

const SHAPE: [usize; 3] = [3, 6, 7];
const VOXELS: usize = 126;

/// Two boxes of labels, and a speck of label 1 far from them.
fn labels(speck: bool) -> Vec<u8> {
    let mut out = vec![0; VOXELS];
    for (voxel, label) in out.iter_mut().enumerate() {
        let (y, x) = (voxel / 7 % 6, voxel % 7);
        *label = match (y, x) {
            (0..=2, 0..=1) => 1,
            (0..=2, 2..=3) => 2,
            (5, 6) if speck => 1,
            _ => 0,
        };
    }
    out
}

/// As `sure` of the labels as told, in sixteenths; the rest is shared by the other classes.
fn certain(labels: &[u8], sure: u8) -> Vec<u8> {
    let other = (16 - sure) / 2;
    (0..3u8).flat_map(|c| labels.iter().map(move |l| if *l == c { sure } else { other })).collect()
}

/// Four cases in two folds; each model has specks or not, and is so sure.
fn small(models: &[(&str, bool, u8)]) -> Root {
    let configurations = json!({"2d": {}, "3d_lowres": {}, "3d_fullres": {}});
    let root = Root::new(SHAPE, [1.0; 3], configurations, &[&["a", "b"], &["c", "d"]]);
    for (fold, case) in [("0", "a"), ("0", "b"), ("1", "c"), ("1", "d")] {
        root.truth(case, &labels(false));
        for (model, speck, sure) in models {
            root.predicted([model, fold, case], &certain(&labels(*speck), *sure), |v| v);
        }
    }
    root
}

#[test]
fn of_equal_candidates_the_first_and_simplest_is_taken() {
    let root = small(&[("3d_fullres", false, 14), ("3d_lowres", false, 12)]);
    let found = root.select(&options(2)).unwrap();
    let dice: Vec<f64> = found.candidates.iter().map(|c| c.dice()).collect();
    assert_eq!((dice.as_slice(), found.best), (&[1.0; 3][..], 0));
    assert_eq!(found.best().name, "nnUNetTrainer__nnUNetPlans__3d_fullres");
    assert!(found.postprocessing.steps.is_empty());
    assert!(found.instructions().contains("No post-processing improves it"));
    // The order is that of the question.
    let mut asked = options(2);
    asked.configurations = Some(["3d_lowres", "3d_fullres", "3d_lowres"].map(str::to_owned).to_vec());
    let found = root.select(&asked).unwrap();
    assert_eq!((found.candidates.len(), found.best().models[0].configuration.as_str()), (3, "3d_lowres"));
}

#[test]
fn a_mean_and_its_post_processing_may_be_the_best() {
    // The surer model has the speck; of both together it is unsure enough to go.
    let root = small(&[("2d", true, 8), ("3d_fullres", false, 16)]);
    let found = root.select(&options(2)).unwrap();
    let dice: Vec<f64> = found.candidates.iter().map(|c| c.dice()).collect();
    assert!(dice[0] < 1.0 && dice[1..] == [1.0, 1.0] && found.best == 1, "{dice:?}");
    let name = "ensemble___nnUNetTrainer__nnUNetPlans__2d___nnUNetTrainer__nnUNetPlans__3d_fullres___0_1";
    let mean = &found.candidates[2];
    assert_eq!((mean.name.as_str(), &mean.folder), (name, &root.results().join("ensembles").join(name)));
    // Alone, the one with the speck is cleaned.
    let mut alone = options(2);
    alone.configurations = Some(vec!["2d".into()]);
    let found = root.select(&alone).unwrap();
    assert_eq!(found.postprocessing.steps, [Step::Foreground(vec![1, 2])]);
    let written = found.write().unwrap();
    let information: Value = serde_json::from_str(&root.text(&written[3])).unwrap();
    let keys: Vec<&String> = information.as_object().unwrap().keys().collect();
    let best = ["all_results", "best_model_or_ensemble", "considered_models", "dataset_name_or_id"];
    assert_eq!(keys, [&best[..], &["ensembling_allowed", "folds"]].concat());
    assert_eq!(information["folds"], json!([0, 1]));
    let best = &information["best_model_or_ensemble"];
    assert_eq!(best["result_on_crossval_post_pp"], json!(1.0));
    assert_eq!(best["result_on_crossval_pre_pp"], information["all_results"]["nnUNetTrainer__nnUNetPlans__2d"]);
    let folder = "ROOT/results/Dataset007_Select/nnUNetTrainer__nnUNetPlans__2d/crossval_results_folds_0_1";
    assert_eq!(best["postprocessing_file"], format!("{folder}/postprocessing.pkl"));
}

#[track_caller]
fn fails(found: Result<Selected>, code: u8, parts: &[&str]) {
    let e = found.expect_err("an error");
    let text = e.to_string();
    parts.iter().for_each(|p| assert!(text.contains(p), "{text}: {p}"));
    assert_eq!(e.exit_code(), code, "{text}");
    assert!(!text.contains('\n'));
}

#[test]
fn what_is_missing_or_there_twice_is_named_before_anything_is_written() {
    let root = small(&[("2d", false, 14), ("3d_fullres", true, 14)]);
    let in_full = |fold: &str, file: &str| root.validation("3d_fullres", fold).join(file);
    let both = options(2);

    std::fs::rename(in_full("1", "c.npz"), root.dir.path().join("c.npz")).unwrap();
    let run = "stunet train -d Dataset007_Select -c 3d_fullres -f 1 --trainer nnUNetTrainer -p nnUNetPlans";
    fails(
        root.select(&both),
        3,
        &["fold_1/validation/c.npz: file: missing", &format!("{run} --val --npz"), "--no-ens"],
    );
    let mut alone = both.clone();
    alone.ensembling = false;
    assert!(!root.model("2d").join("crossval_results_folds_0_1").exists());
    assert_eq!(root.select(&alone).unwrap().candidates.len(), 2);

    std::fs::rename(in_full("1", "c.nii.gz"), root.dir.path().join("c.nii.gz")).unwrap();
    let full = "nnUNetTrainer__nnUNetPlans__3d_fullres: case c: not predicted by folds 0, 1, expected of fold 1";
    fails(root.select(&alone), 3, &[full, &format!("{run} --val --npz"), "--chill"]);
    let mut chill = alone.clone();
    chill.incomplete = true;
    assert_eq!(root.select(&chill).unwrap().candidates.len(), 2);
    chill.ensembling = true;
    fails(root.select(&chill), 3, &["3d_fullres: case c: not predicted, expected as another model"]);

    std::fs::copy(in_full("1", "d.nii.gz"), in_full("0", "d.nii.gz")).unwrap();
    fails(root.select(&alone), 3, &["3d_fullres: case d: predicted by folds 0 and 1, expected by one"]);
    std::fs::remove_file(in_full("0", "d.nii.gz")).unwrap();

    std::fs::remove_dir_all(root.model("3d_fullres").join("fold_1")).unwrap();
    fails(root.select(&alone), 3, &["3d_fullres/fold_1/validation: folder: no such folder", run, "-c or -f"]);
    // One fold is a cross-validation, too: of its cases.
    assert_eq!(root.select(&options(1)).unwrap().candidates.len(), 3);
    assert!(root.model("2d").join("crossval_results_folds_0/b.nii.gz").is_file());
    assert!(!root.model("2d").join("crossval_results_folds_0/c.nii.gz").exists());
}

#[test]
fn models_that_are_not_there_are_left_out_or_refused() {
    let root = small(&[("2d", false, 14)]);
    let both = options(2);
    assert_eq!(root.select(&both).unwrap().candidates.len(), 1);
    let mut strict = both.clone();
    strict.strict = true;
    fails(root.select(&strict), 3, &["__3d_fullres: folder: not trained", "--npz'"]);
    let mut named = both.clone();
    named.configurations = Some(["2d", "3d_lowres"].map(str::to_owned).to_vec());
    fails(root.select(&named), 3, &["__3d_lowres: folder: not trained"]);
    // The plans have no such configuration: nothing that could have been trained.
    named.configurations = Some(["2d", "3d_cascade_fullres"].map(str::to_owned).to_vec());
    assert_eq!(root.select(&named).unwrap().candidates.len(), 1);
    named.configurations = Some(vec!["3d_cascade_fullres".into()]);
    fails(root.select(&named), 2, &["no model of nnUNetTrainer with nnUNetPlans among 3d_cascade_fullres"]);
    let mut other = both.clone();
    other.plans = vec!["Others".into()];
    fails(root.select(&other), 1, &["preprocessed/Dataset007_Select/Others.json"]);
    for (folds, what) in [(vec![], "no folds"), (vec![1, 1], "fold 1 was named twice")] {
        let mut wrong = both.clone();
        wrong.folds = folds.into_iter().map(Fold::Number).collect();
        fails(root.select(&wrong), 2, &[what]);
    }
    let mut mixed = both.clone();
    mixed.folds.push(Fold::All);
    fails(root.select(&mixed), 2, &["fold all"]);
    // A network that was trained on all cases validates all.
    files::copy(&root.validation("2d", "0"), &root.validation("2d", "all"));
    mixed.folds = vec![Fold::All];
    fails(root.select(&mixed), 3, &["__2d: case c: not predicted by folds all"]);
    files::copy(&root.validation("2d", "1"), &root.validation("2d", "all"));
    let written = root.select(&mixed).unwrap().write().unwrap();
    assert!(root.model("2d").join("crossval_results_folds_all/d.nii.gz").is_file());
    assert!(root.text(&written[3]).contains("\"all\"") && root.text(&written[4]).contains(" -f all "));
}

#[test]
fn what_is_there_is_made_anew_or_kept() {
    let root = small(&[("2d", true, 14), ("3d_fullres", true, 14)]);
    let ensemble = "ensemble___nnUNetTrainer__nnUNetPlans__2d___nnUNetTrainer__nnUNetPlans__3d_fullres___0_1";
    let merged = [root.model("2d").join("crossval_results_folds_0_1"), root.results().join("ensembles").join(ensemble)];
    let mut keep = options(2);
    keep.overwrite = false;
    let first = root.select(&keep).unwrap();
    for folder in &merged {
        root.map(&folder.join("a.nii.gz"), &labels(false));
        std::fs::remove_file(folder.join("b.nii.gz")).unwrap();
    }
    let second = root.select(&keep).unwrap();
    let dice = |found: &Selected| found.candidates.iter().map(|c| c.dice()).collect::<Vec<_>>();
    assert!(dice(&second)[0] > dice(&first)[0] && dice(&second)[2] > dice(&first)[2]);
    assert_eq!(dice(&second)[1], dice(&first)[1]);
    merged.iter().for_each(|folder| std::fs::write(folder.join("stale.nii.gz"), b"no image").unwrap());
    assert_eq!(dice(&root.select(&options(2)).unwrap()), dice(&first));
    assert!(merged.iter().all(|folder| !folder.join("stale.nii.gz").exists()));
}

#[test]
fn it_stops_when_it_is_told_to() {
    let root = small(&[("2d", true, 14), ("3d_fullres", true, 14)]);
    let mut stages = Vec::new();
    for stop in 0.. {
        let mut left = stop;
        let mut progress = |event: Event<'_>| {
            if let Event::Stage(name) = event {
                stages.push(name.to_owned());
            }
            left -= 1;
            if left < 0 { Flow::Cancel } else { Flow::Continue }
        };
        let found = select(&root.results(), &root.preprocessed(), &options(2), &Device::cpu(), &mut progress);
        match found {
            Err(e) => assert!(matches!(e, Error::Cancelled), "{e}"),
            Ok(_) => break,
        }
    }
    for stage in ["collect 2d", "compare 2d", "average 2d and 3d_fullres", "compare 2d and 3d_fullres"] {
        assert!(stages.iter().any(|s| s == stage), "{stage}: {stages:?}");
    }
}

#[test]
fn commands_of_the_instructions_run() {
    let root = small(&[("2d", true, 8), ("3d_fullres", true, 9)]);
    // Each has a speck of its own, which the mean has not.
    for (fold, case) in [("0", "a"), ("0", "b"), ("1", "c"), ("1", "d")] {
        let mut other = labels(false);
        other[VOXELS - 6] = 2;
        root.predicted(["3d_fullres", fold, case], &certain(&other, 8), |v| v);
        let mut first = certain(&labels(true), 14);
        // Half as sure of the speck.
        for (voxel, label) in labels(true).iter().enumerate() {
            if *label == 1 && labels(false)[voxel] == 0 {
                (first[voxel], first[VOXELS + voxel], first[2 * VOXELS + voxel]) = (7, 9, 0);
            }
        }
        root.predicted(["2d", fold, case], &first, |v| v);
    }
    let env = ["preprocessed", "results"].map(|n| root.dir.path().join(n));
    let run = |args: &[&str]| -> Ran {
        let env = [("nnUNet_preprocessed", &*env[0]), ("nnUNet_results", &*env[1])];
        stunet_with(root.dir.path(), args, &env)
    };
    let ran = run(&["select", "7", "-c", "2d", "3d_fullres", "-tr", "nnUNetTrainer", "-f", "0", "1", "-np", "2"]);
    let out = ran.ok();
    let best = out.lines().find(|l| l.contains(" best ")).unwrap();
    assert!(best.starts_with("1.00000") && best.contains("ensemble___"), "{out}");
    assert!(ran.err.contains("-np is ignored"), "{}", ran.err);
    let end: Vec<&str> = out.lines().rev().take(2).collect();
    assert!(end[0].ends_with("inference_instructions.txt") && end[1].ends_with("inference_information.json"), "{out}");
    // The same by name, kept as it is.
    let again = run(&["select", "-d", NAME, "-f", "0", "1", "--no_overwrite", "--no-progress"]);
    assert!(again.ok().contains(best), "{}", again.out);

    std::fs::create_dir(root.dir.path().join("INPUT_FOLDER")).unwrap();
    root.map(&root.dir.path().join("INPUT_FOLDER/x_0000.nii.gz"), &labels(false));
    for (folder, model) in [("OUTPUT_FOLDER_MODEL_1", "2d"), ("OUTPUT_FOLDER_MODEL_2", "3d_fullres")] {
        files::copy(&root.validation(model, "0"), &root.dir.path().join(folder));
    }
    let commands: Vec<Vec<&str>> =
        out.lines().filter(|l| l.starts_with("stunet ")).map(|l| l.split(' ').skip(1).collect()).collect();
    let names: Vec<&str> = commands.iter().map(|c| c[0]).collect();
    assert_eq!(names, ["predict", "predict", "ensemble", "postprocess"]);
    for predict in &commands[..2] {
        // Spelled well: what is amiss is that there is no network.
        let ran = run(predict);
        assert!(ran.code != 0 && ran.err.contains("fold_"), "{}", ran.err);
    }
    for command in &commands[2..] {
        run(command).ok();
    }
    let made = io::read_segmentation(root.dir.path().join("OUTPUT_FOLDER_PP/b.nii.gz")).unwrap();
    assert_eq!(made.labels, LabelData::U8(labels(false)));

    let fails = |args: &[&str], code: i32, part: &str| {
        let ran = run(args);
        let line = ran.error(code);
        assert!(line.contains(part), "{line}: {part}");
    };
    fails(&["select"], 2, "DATASET");
    fails(&["select", "8"], 2, "no data set 8");
    fails(&["select", "7", "-f", "0", "x"], 2, "fold \"x\"");
    fails(&["select", "7", "-f", "0", "1", "2"], 3, "fold_2/validation");
    fails(&["select", "7", "-c", "3d_lowres"], 3, "not trained");
    assert!(stunet(&["select", "7"]).error(2).contains("nnUNet_preprocessed"));
    assert!(stunet(&["completions", "bash"]).ok().contains("--no-ensembling"));
}
