//! `stunet verify`, `fingerprint`, `plan` and `convert msd | v1-dataset`: files where nnU-Net has them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stunet::io::{LabelData, read_nifti, write_image, write_nifti};
use stunet::{Geometry, Image, Segmentation};

use crate::common::binary::{Ran, stunet_with, tree};

fn geometry() -> Geometry {
    Geometry::new([6, 7, 8], [2.0, 1.0, 1.5])
}

fn image(channels: usize) -> Image {
    let values = |c: usize| (0..geometry().len()).map(|i| (i * (c + 3) % 500) as f32 - 100.0).collect();
    Image::new((0..channels).map(values).collect(), geometry()).unwrap()
}

/// A folder with image files named by `name`, label maps and dataset.json.
fn task(folder: &Path, channels: usize, name: impl Fn(&str) -> String, description: &Value) {
    for sub in ["imagesTr", "imagesTs", "labelsTr"] {
        std::fs::create_dir_all(folder.join(sub)).unwrap();
    }
    for case in ["a", "b"] {
        write_image(folder.join("imagesTr").join(name(case)), &image(channels)).unwrap();
        write_image(folder.join("imagesTs").join(name(case)), &image(channels)).unwrap();
        let labels = (0..geometry().len()).map(|i| (i % 3) as u8).collect();
        let label = Segmentation::new(LabelData::U8(labels), geometry(), Vec::new()).unwrap();
        write_nifti(folder.join(format!("labelsTr/{case}.nii.gz")), &label).unwrap();
    }
    std::fs::write(folder.join("dataset.json"), description.to_string()).unwrap();
}

fn old_description(channels: &Value) -> Value {
    json!({
        "name": "T", "tensorImageSize": "3D", "modality": channels, "numTraining": 2, "numTest": 2,
        "labels": {"0": "background", "1": "x", "2": "y"}, "training": [], "test": [],
    })
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(bench.path("raw")).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Ran {
        let (raw, preprocessed) = (self.path("raw"), self.path("preprocessed"));
        let env = [("nnUNet_raw", raw.as_path()), ("nnUNet_preprocessed", &preprocessed)];
        stunet_with(self.dir.path(), args, &env)
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }
}

#[test]
fn from_a_raw_data_set_to_plans() {
    let bench = Bench::new();
    let raw = bench.path("raw/Dataset004_T");
    let description = json!({"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1, "y": 2},
                             "numTraining": 2, "file_ending": ".nii.gz"});
    task(&raw, 1, |case| format!("{case}_0000.nii.gz"), &description);
    assert_eq!(bench.run(&["verify", "-d", "4"]).ok(), "Dataset004_T: 2 cases, no fault\n");

    let plan = ["plan", "-d", "004", "-pl", "nnUNetPlannerResEncM", "-overwrite_plans_name", "Mine", "-np", "3"];
    let ran = bench.run(&plan);
    assert!(
        ran.ok().contains("3d_fullres") && ran.out.ends_with("preprocessed/Dataset004_T/Mine.json\n"),
        "{}",
        ran.out
    );
    let plans = bench.json("preprocessed/Dataset004_T/Mine.json");
    let found = (&plans["plans_name"], &plans["dataset_name"], &plans["image_reader_writer"]);
    assert_eq!(found, (&json!("Mine"), &json!("Dataset004_T"), &json!("SimpleITKIO")));
    let fingerprint = "preprocessed/Dataset004_T/dataset_fingerprint.json";
    assert_eq!(bench.json(fingerprint)["shapes_after_crop"], json!([[6, 7, 8], [6, 7, 8]]));
    assert_eq!(bench.json("preprocessed/Dataset004_T/dataset.json"), description);

    // What is there is kept.
    std::fs::write(bench.path(fingerprint), "{}").unwrap();
    let ran = bench.run(&["fingerprint", "-d", "Dataset004_T"]);
    assert!(ran.err.starts_with("warning: ") && ran.ok().ends_with("dataset_fingerprint.json\n"), "{}", ran.err);
    let e = bench.run(&plan);
    assert!(e.error(3).contains("dataset_fingerprint.json: spacings: missing"), "{}", e.err);

    // Faults come all at once, each in a line.
    std::fs::remove_file(raw.join("imagesTr/a_0000.nii.gz")).unwrap();
    std::fs::remove_file(raw.join("labelsTr/b.nii.gz")).unwrap();
    let ran = bench.run(&["verify", "-d", "4"]);
    assert_eq!(
        (ran.code, ran.err.lines().count(), ran.out.as_str()),
        (3, 2, "Dataset004_T: 2 faults\n"),
        "{}",
        ran.err
    );
    let ran = bench.run(&["fingerprint", "-d", "4", "--verify", "--clean"]);
    assert!(ran.error(3).contains("numTraining"), "{}", ran.err);
}

#[test]
fn folders_that_are_not_known_or_cannot_be_written() {
    let bench = Bench::new();
    let ran = stunet_with(bench.dir.path(), &["verify", "-d", "4"], &[]);
    assert!(ran.error(2).contains("nnUNet_raw") && ran.err.contains("--raw"), "{}", ran.err);
    assert!(bench.run(&["plan", "-d", "4"]).error(2).contains("no data set 4"));
    assert!(bench.run(&["plan", "-d", "4", "-pl", "Mine"]).error(2).contains("nnUNetPlannerResEncL"));
    task(
        &bench.path("raw/Dataset004_T"),
        1,
        |case| format!("{case}_0000.nii.gz"),
        &old_description(&json!({"0": "CT"})),
    );
    assert!(bench.run(&["plan", "-d", "4"]).error(3).contains("stunet convert msd"));
    let good = json!({"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1, "y": 2},
                      "numTraining": 2, "file_ending": ".nii.gz"});
    std::fs::write(bench.path("raw/Dataset004_T/dataset.json"), good.to_string()).unwrap();
    // A file in the place of the folder: nothing can be made there, whoever runs the test.
    std::fs::write(bench.path("preprocessed"), "").unwrap();
    assert!(bench.run(&["plan", "-d", "4"]).error(1).contains("cannot create"));
}

#[test]
fn decathlon_tasks_become_raw_data_sets() {
    let bench = Bench::new();
    let old = old_description(&json!({"0": "T2", "1": "ADC"}));
    task(&bench.path("Task05_T"), 2, |case| format!("{case}.nii.gz"), &old);
    std::fs::write(bench.path("Task05_T/imagesTr/._a.nii.gz"), "of macOS").unwrap();
    let ran = bench.run(&["convert", "msd", "Task05_T"]);
    assert!(ran.ok().ends_with("raw/Dataset005_T\n"), "{}", ran.out);
    let expected = json!({"name": "T", "tensorImageSize": "3D", "numTraining": 2, "numTest": 2,
        "labels": {"background": 0, "x": 1, "y": 2}, "file_ending": ".nii.gz", "channel_names": {"0": "T2", "1": "ADC"}});
    assert_eq!(bench.json("raw/Dataset005_T/dataset.json"), expected);
    let channel = read_nifti(&[bench.path("raw/Dataset005_T/imagesTs/b_0001.nii.gz")]).unwrap();
    assert_eq!(channel.channels, image(2).channels[1..]);
    assert_eq!(bench.run(&["verify", "-d", "5"]).ok(), "Dataset005_T: 2 cases, no fault\n");
    assert!(bench.run(&["convert", "msd", "Task05_T"]).error(2).contains("number 5 is taken"));

    // Damage leaves nothing half-written.
    std::fs::write(bench.path("Task05_T/imagesTr/a.nii.gz"), "damaged").unwrap();
    assert!(bench.run(&["convert", "msd", "Task05_T", "--id", "6"]).error(3).contains("a.nii.gz"));
    assert!(tree(&bench.path("raw")).iter().all(|p| p.starts_with(bench.path("raw/Dataset005_T"))));
}

#[test]
fn tasks_of_nnunet_1_become_raw_data_sets() {
    let bench = Bench::new();
    task(&bench.path("Task001_T"), 1, |case| format!("{case}_0000.nii.gz"), &old_description(&json!({"0": "CT"})));
    assert!(bench.run(&["convert", "v1-dataset", "Task001_T", "T"]).error(2).contains("Dataset004_Hippocampus"));
    bench.run(&["convert", "v1-dataset", "Task001_T", "Dataset011_T"]).ok();
    let made = bench.json("raw/Dataset011_T/dataset.json");
    let keys: Vec<&String> = made.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["name", "numTraining", "labels", "file_ending", "channel_names"]);
    assert_eq!(bench.run(&["verify", "-d", "11"]).ok(), "Dataset011_T: 2 cases, no fault\n");
    let ran = bench.run(&["convert", "v1-dataset", "Task001_T", "Dataset011_T"]);
    assert!(ran.error(2).contains("is there already"), "{}", ran.err);
}
