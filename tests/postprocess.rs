//! Post-processing: decisions as nnU-Net's rules have them, files as its names and keys are.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use stunet::Device;
use stunet::io::{self, Geometry, LabelData, Segmentation};
use stunet::nnunet::dataset::DatasetJson;
use stunet::nnunet::evaluate::Folders;
use stunet::nnunet::postprocess::{Determined, Step, apply, apply_to_folder, determine, steps};

const SHAPE: [usize; 3] = [2, 8, 12];

/// Boxes of labels, later ones over earlier ones: label, z, y and x ranges.
type Boxes<'a> = &'a [(u8, [[usize; 2]; 3])];

fn map(boxes: Boxes<'_>) -> Segmentation {
    let mut labels = vec![0; SHAPE.iter().product()];
    for (label, [zs, ys, xs]) in boxes {
        for z in zs[0]..zs[1] {
            for y in ys[0]..ys[1] {
                labels[(z * SHAPE[1] + y) * SHAPE[2]..][xs[0]..xs[1]].fill(*label);
            }
        }
    }
    Segmentation::new(LabelData::U8(labels), Geometry::new(SHAPE, [3.0, 1.0, 1.0]), Vec::new()).unwrap()
}

struct Cases {
    _dir: tempfile::TempDir,
    truth: PathBuf,
    found: PathBuf,
    dataset: DatasetJson,
}

/// Writes truths and predictions by case.
fn cases(labels: Value, order: Value, maps: &[(Boxes<'_>, Boxes<'_>)]) -> Cases {
    let dir = tempfile::tempdir().unwrap();
    let [truth, found] = ["truth", "found"].map(|n| dir.path().join(n));
    for (folder, second) in [(&truth, false), (&found, true)] {
        std::fs::create_dir(folder).unwrap();
        for (i, pair) in maps.iter().enumerate() {
            let path = folder.join(format!("case_{i}.nii.gz"));
            io::write_nifti(path, &map(if second { pair.1 } else { pair.0 })).unwrap();
        }
    }
    let value = json!({"channel_names": {"0": "CT"}, "labels": labels, "regions_class_order": order,
                       "numTraining": maps.len(), "file_ending": ".nii.gz"});
    let path = found.join("dataset.json");
    std::fs::write(&path, value.to_string()).unwrap();
    let dataset = DatasetJson::read(&path).unwrap();
    Cases { _dir: dir, truth, found, dataset }
}

impl Cases {
    fn determine(&self, output: Option<&Path>) -> Determined {
        let folders = Folders::of_dataset(&self.truth, &self.found, &self.dataset).unwrap();
        determine(&folders, &self.dataset, output, &Device::cpu(), &mut ()).unwrap()
    }
}

const ONE: [[usize; 2]; 3] = [[0, 2], [1, 5], [1, 5]];
const TWO: [[usize; 2]; 3] = [[0, 2], [1, 5], [5, 8]];
/// Touches nothing.
const FAR: [[usize; 2]; 3] = [[0, 1], [6, 8], [10, 12]];

fn two_labels() -> Value {
    json!({"background": 0, "one": 1, "two": 2})
}

#[test]
fn foreground_is_cleaned_when_no_class_suffers() {
    let cases = cases(two_labels(), json!([]), &[(&[(1, ONE), (2, TWO)], &[(1, ONE), (2, TWO), (1, FAR), (2, FAR)])]);
    let output = cases.found.join("postprocessed");
    let found = cases.determine(Some(&output));
    // What is left has nothing for the classes to improve.
    assert_eq!(found.steps, [Step::Foreground(vec![1, 2])]);
    assert_eq!(found.after.foreground_dice(), 1.0);
    assert!(found.before.foreground_dice() < 1.0);
    let written = io::read_segmentation(output.join("case_0.nii.gz")).unwrap();
    assert_eq!(written.labels, map(&[(1, ONE), (2, TWO)]).labels);
    let summary = std::fs::read_to_string(output.join("summary.json")).unwrap();
    assert!(summary.contains("postprocessed/case_0.nii.gz"), "{summary}");
}

#[test]
fn a_class_that_has_two_parts_is_left_alone() {
    // Label 2 truly has two parts: all foreground cannot be cleaned, label 1 can.
    let truth: Boxes<'_> = &[(1, ONE), (2, TWO), (2, FAR)];
    let cases =
        cases(two_labels(), json!([]), &[(truth, &[(1, ONE), (2, TWO), (2, FAR), (1, [[0, 2], [7, 8], [0, 3]])])]);
    let found = cases.determine(None);
    assert_eq!(found.steps, [Step::Label(1)]);
    assert_eq!(found.after.foreground_dice(), 1.0);
    assert!(!cases.found.join("postprocessed").exists());
}

#[test]
fn one_label_is_tried_once() {
    let cases = cases(json!({"background": 0, "one": 1}), json!([]), &[(&[(1, ONE)], &[(1, ONE), (1, FAR)])]);
    assert_eq!(cases.determine(None).steps, [Step::Foreground(vec![1])]);
    let files = cases.determine(None).write(&cases.found).unwrap();
    let json: Value = serde_json::from_str(&std::fs::read_to_string(&files[1]).unwrap()).unwrap();
    let name = "remove_all_but_largest_component_from_segmentation";
    assert_eq!(json["postprocessing_fns"], json!([name]));
    assert_eq!(json["postprocessing_kwargs"], json!([{"labels_or_regions": [1]}]));
    assert_eq!(json["postprocessed"]["mean"]["1"]["Dice"], json!(1.0));
    assert!(json["input_folder"]["foreground_mean"]["Dice"].as_f64().unwrap() < 1.0);
    assert!(json["input_folder"].get("metric_per_case").is_none());
    // Both files say the same.
    assert_eq!(steps::read(&files[0]).unwrap(), steps::read(&files[1]).unwrap());
}

#[test]
fn regions_are_tried_in_turn() {
    let labels = json!({"background": 0, "whole": [1, 2], "core": [2]});
    // A far piece of the core: without the whole's steps it is the core's smaller part.
    let truth: Boxes<'_> = &[(1, ONE), (2, TWO), (1, [[0, 2], [7, 8], [0, 4]])];
    let found: Boxes<'_> = &[(1, ONE), (2, TWO), (1, [[0, 2], [7, 8], [0, 4]]), (2, FAR)];
    let cases = cases(labels, json!([1, 2]), &[(truth, found)]);
    let decided = cases.determine(None);
    assert_eq!(decided.steps, [Step::Region(vec![2])]);
    assert_eq!(decided.after.foreground_dice(), 1.0);
}

#[test]
fn steps_are_taken_on_another_folder() {
    let cases = cases(two_labels(), json!([]), &[(&[], &[(1, ONE), (1, FAR)]), (&[], &[(2, TWO), (1, FAR)])]);
    let output = cases.found.join("out");
    let chosen = [Step::Label(1)];
    let device = Device::cpu();
    let files = apply_to_folder(&cases.found, &output, &chosen, ".nii.gz", &device, &mut ()).unwrap();
    assert_eq!(files, [output.join("case_0.nii.gz"), output.join("case_1.nii.gz")]);
    let read = |i: usize| io::read_segmentation(&files[i]).unwrap().labels;
    assert_eq!(read(0), map(&[(1, ONE)]).labels);
    assert_eq!(read(1), map(&[(2, TWO), (1, FAR)]).labels);
    let e = apply_to_folder(&cases.found, &output, &chosen, ".png", &device, &mut ()).unwrap_err();
    assert!(e.to_string().contains(".png"), "{e}");
    let e = apply_to_folder(&cases.truth.join("none"), &output, &chosen, ".nii.gz", &device, &mut ()).unwrap_err();
    assert_eq!(e.exit_code(), 3);
}

#[test]
fn equally_large_components_all_stay_and_corners_touch() {
    let mut seg = map(&[(1, [[0, 1], [0, 1], [0, 2]]), (1, [[0, 1], [1, 2], [2, 4]]), (1, [[1, 2], [5, 7], [5, 7]])]);
    let before = seg.labels.clone();
    // Two pairs that touch by a corner are as large as the square.
    apply(&[Step::Foreground(vec![1])], &mut seg);
    assert_eq!(seg.labels, before);
    apply(&[Step::Label(0), Step::Region(vec![3, 4])], &mut seg);
    assert_eq!(seg.labels, before);
}

/// Four data sets of `fixtures/results/make.py`: what the real nnU-Net decides and writes, and what applying it to further
/// predictions leaves of them.
#[test]
fn golden_networks_postprocessing_of_nnunet() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/results");
    let bytes = std::fs::read(folder.join("postprocess.safetensors")).unwrap();
    let maps = SafeTensors::deserialize(&bytes).unwrap();
    let labels = |tensor: String| maps.tensor(&tensor).unwrap().data().to_vec();
    let (regions, none) =
        (json!({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": [3], "ignore": 4}), json!([]));
    for (name, all, order) in [
        ("foreground", two_labels(), none.clone()),
        ("one_class", two_labels(), none.clone()),
        ("nothing", two_labels(), none),
        ("regions", regions, json!([1, 2, 3])),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for part in ["truth", "found", "others"] {
            std::fs::create_dir(dir.path().join(part)).unwrap();
            for i in 0..3 {
                let map = labels(format!("{name}/{part}/case_{i}"));
                let geometry = Geometry::new([8, 16, 18], [2.5, 1.0, 0.75]);
                let map = Segmentation::new(LabelData::U8(map), geometry, Vec::new()).unwrap();
                io::write_nifti(dir.path().join(part).join(format!("case_{i}.nii.gz")), &map).unwrap();
            }
        }
        let description = json!({"channel_names": {"0": "CT"}, "labels": all, "regions_class_order": order,
                                 "numTraining": 3, "file_ending": ".nii.gz"});
        let found = dir.path().join("found");
        std::fs::write(found.join("dataset.json"), description.to_string()).unwrap();
        let dataset = DatasetJson::read(&found.join("dataset.json")).unwrap();
        let folders = Folders::of_dataset(&dir.path().join("truth"), &found, &dataset).unwrap();
        let left = found.join("postprocessed");
        let device = Device::cpu();
        let decided = determine(&folders, &dataset, Some(&left), &device, &mut ()).unwrap();
        let written = decided.write(&found).unwrap();
        let json = |path: &Path| std::fs::read_to_string(path).unwrap();
        assert_eq!(json(&written[1]), json(&folder.join(format!("{name}.json"))), "{name}");
        // As the real nnU-Net's `nnUNetv2_apply_postprocessing` does, from the pickle.
        let (applied, steps) = (dir.path().join("applied"), steps::read(&written[0]).unwrap());
        apply_to_folder(&dir.path().join("others"), &applied, &steps, ".nii.gz", &device, &mut ()).unwrap();
        for (part, folder) in [("left", &left), ("applied", &applied)] {
            for i in 0..3 {
                let ours = io::read_segmentation(folder.join(format!("case_{i}.nii.gz"))).unwrap().labels;
                assert_eq!(ours, LabelData::U8(labels(format!("{name}/{part}/case_{i}"))), "{name} {part} {i}");
            }
        }
    }
}
