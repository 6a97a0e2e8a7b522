//! Whole data sets, from images to stored cases.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stunet::io::{Geometry, Image, LabelData, Segmentation, write_image, write_nifti};
use stunet::nnunet::dataset::Dataset;
use stunet::nnunet::store::{self, PreprocessOptions, PreprocessedConfiguration, preprocess_dataset};
use stunet::nnunet::training_case::ClassKey;
use stunet::{Device, Error, Result};

/// A raw data set of small images and a folder of preprocessed data with plans for it.
struct Set {
    dir: tempfile::TempDir,
}

impl Set {
    fn new(cases: usize) -> Self {
        let set = Self { dir: tempfile::tempdir().unwrap() };
        for folder in ["raw/imagesTr", "raw/labelsTr", "pre"] {
            std::fs::create_dir_all(set.path(folder)).unwrap();
        }
        let dataset = json!({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2, "ignore": 3},
            "numTraining": cases, "file_ending": ".nii"});
        set.write("raw/dataset.json", &dataset);
        set.write("pre/nnUNetPlans.json", &plans(1.0));
        (0..cases).for_each(|i| set.image(i, 1.0));
        set
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, value: &Value) {
        std::fs::write(self.path(name), value.to_string()).unwrap();
    }

    fn image(&self, i: usize, scale: f32) {
        let shape = [6, 9 + i, 8];
        let n: usize = shape.iter().product();
        let geometry = Geometry::new(shape, [2.0, 1.5, 1.0]);
        let values = (0..n).map(|v| scale * (1 + v % 23 + i) as f32).collect();
        let image = Image::new(vec![values], geometry.clone()).unwrap();
        write_image(self.path(&format!("raw/imagesTr/c{i}_0000.nii")), &image).unwrap();
        let labels = LabelData::U8((0..n).map(|v| (v / 31 % 4) as u8).collect());
        let truth = Segmentation::new(labels, geometry, Vec::new()).unwrap();
        write_nifti(self.path(&format!("raw/labelsTr/c{i}.nii")), &truth).unwrap();
    }

    fn run(
        &self,
        names: &[&str],
        options: &PreprocessOptions,
        threads: usize,
    ) -> Result<Vec<PreprocessedConfiguration>> {
        let names: Vec<String> = names.iter().map(|n| (*n).into()).collect();
        let device = Device::cpu_with_threads(threads).unwrap();
        let dataset = Dataset::open(&self.path("raw"))?;
        preprocess_dataset(&dataset, &self.path("pre"), "nnUNetPlans", &names, options, &device, &mut ())
    }

    /// How many were written and kept.
    fn counts(&self, options: &PreprocessOptions) -> [usize; 2] {
        let done = self.run(&["3d_fullres"], options, 2).unwrap();
        [done[0].written, done[0].kept]
    }

    fn message(&self, options: &PreprocessOptions) -> String {
        let message = self.run(&["3d_fullres"], options, 2).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    /// Names and contents of a folder of preprocessed cases.
    fn files(&self, folder: &str) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(self.path(folder)).unwrap().map(|e| e.unwrap());
        entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
    }
}

fn plans(spacing: f64) -> Value {
    let function =
        |seg: bool, order: u8| json!({"is_seg": seg, "order": order, "order_z": 0, "force_separate_z": null});
    let configuration = |name: &str, spacing: &[f64]| {
        json!({"data_identifier": format!("nnUNetPlans_{name}"), "preprocessor_name": "DefaultPreprocessor",
            "spacing": spacing, "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [false],
            "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": function(false, 3),
            "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_seg_kwargs": function(true, 1)})
    };
    json!({"label_manager": "LabelManager", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {},
        "configurations": {"2d": configuration("2d", &[1.0, 1.0]),
            "3d_fullres": configuration("3d_fullres", &[spacing, 1.0, 1.0]),
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}}})
}

fn options() -> PreprocessOptions {
    PreprocessOptions::default()
}

fn with(change: impl FnOnce(&mut PreprocessOptions)) -> PreprocessOptions {
    let mut options = options();
    change(&mut options);
    options
}

const FULLRES: &str = "pre/nnUNetPlans_3d_fullres";

#[test]
fn the_usual_configurations_are_made_and_what_is_beside_them() {
    let set = Set::new(3);
    let done = set.run(&[], &options(), 3).unwrap();
    let names: Vec<&str> = done.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names, ["2d", "3d_fullres"]);
    assert!(done.iter().all(|d| d.written == 3 && d.kept == 0));
    assert_eq!(set.files("pre/gt_segmentations").keys().collect::<Vec<_>>(), ["c0.nii", "c1.nii", "c2.nii"]);
    assert_eq!(set.files("pre/gt_segmentations")["c1.nii"], set.files("raw/labelsTr")["c1.nii"]);
    assert!(set.path("pre/dataset.json").is_file());

    let stored = store::open(&done[1].folder).unwrap();
    assert_eq!(stored.identifiers(), ["c0", "c1", "c2"]);
    let case = stored.case("c1").unwrap();
    assert_eq!(case.shape(), [12, 15, 8]);
    let keys: Vec<ClassKey> = case.classes().into_iter().map(|(k, _)| k.clone()).collect();
    assert_eq!(keys, [ClassKey::Label(1), ClassKey::Label(2), ClassKey::Region(vec![-1, 0, 1, 2])]);
    // 2D keeps the spacing between slices.
    assert_eq!(store::open(&done[0].folder).unwrap().case("c1").unwrap().shape(), [6, 15, 8]);
    // What the second stage of a cascade reads is there.
    let again = set.run(&["3d_cascade_fullres"], &options(), 1).unwrap();
    assert_eq!((again[0].written, again[0].kept), (0, 3));
}

#[test]
fn the_number_of_threads_does_not_show() {
    let (one, many) = (Set::new(2), Set::new(2));
    one.run(&["3d_fullres"], &options(), 1).unwrap();
    many.run(&["3d_fullres"], &with(|o| o.memory_limit = Some(1 << 30)), 5).unwrap();
    let case = |set: &Set| store::open(&set.path(FULLRES)).unwrap().image("c1", [0, 1, 2]).unwrap();
    assert_eq!(case(&one), case(&many));
    let (a, b) = (one.files(FULLRES), many.files(FULLRES));
    // The same but for the time at which the raw files were written, which the header's fingerprint knows.
    assert!(
        a.iter()
            .zip(&b)
            .all(|((n, a), (m, b))| n == m && a.len() == b.len() && a[a.len() - 400..] == b[b.len() - 400..])
    );
}

#[test]
fn only_what_changed_is_made_again() {
    let set = Set::new(3);
    assert_eq!(set.counts(&options()), [3, 0]);
    let before = set.files(FULLRES);
    assert_eq!(set.counts(&options()), [0, 3]);
    assert_eq!(set.files(FULLRES), before);
    // An image that changed, a case cut short, a case that is gone.
    set.image(1, 2.5);
    std::fs::write(set.path(FULLRES).join("c2.safetensors"), &before["c2.safetensors"][..900]).unwrap();
    assert_eq!(set.counts(&options()), [2, 1]);
    assert_eq!(set.files(FULLRES)["c2.safetensors"], before["c2.safetensors"]);
    // The copy of a truth that changed is made again, too.
    let path = set.path("raw/labelsTr/c0.nii");
    let mut truth = std::fs::read(&path).unwrap();
    truth[400] ^= 1;
    std::fs::write(&path, &truth).unwrap();
    assert_eq!(set.counts(&options()), [1, 2]);
    assert!(set.files("pre/gt_segmentations")["c0.nii"] == truth);
    set.write("pre/nnUNetPlans.json", &plans(2.0));
    assert_eq!(set.counts(&options()), [3, 0]);
    assert_eq!(set.counts(&with(|o| o.fresh = true)), [3, 0]);
    for file in ["raw/imagesTr/c0_0000.nii", "raw/labelsTr/c0.nii"] {
        std::fs::remove_file(set.path(file)).unwrap();
    }
    assert_eq!(set.counts(&options()), [0, 2]);
    assert_eq!(set.files(FULLRES).keys().collect::<Vec<_>>(), ["c1.safetensors", "c2.safetensors"]);
}

#[test]
fn files_for_nnunet_take_the_place_of_our_own() {
    let set = Set::new(2);
    let npz = with(|o| o.npz = true);
    assert_eq!(set.counts(&npz), [2, 0]);
    assert_eq!(set.counts(&npz), [0, 2]);
    assert_eq!(set.files(FULLRES).keys().collect::<Vec<_>>(), ["c0.npz", "c0.pkl", "c1.npz", "c1.pkl"]);
    let theirs = store::open(&set.path(FULLRES)).unwrap().image("c0", [0, 1, 2]).unwrap();
    let message = set.message(&options());
    assert!(message.contains("c0.npz") || message.contains("c1.npz"), "{message}");
    assert!(message.contains("--fresh"), "{message}");
    assert_eq!(set.counts(&with(|o| o.fresh = true)), [2, 0]);
    assert_eq!(set.files(FULLRES).keys().collect::<Vec<_>>(), ["c0.safetensors", "c1.safetensors"]);
    assert_eq!(store::open(&set.path(FULLRES)).unwrap().image("c0", [0, 1, 2]).unwrap(), theirs);
}

#[test]
fn what_cannot_be_done_is_said_and_leaves_no_half_of_it() {
    let set = Set::new(2);
    let limit = with(|o| o.memory_limit = Some(1000));
    assert!(matches!(set.run(&["3d_fullres"], &limit, 2), Err(Error::OutOfMemory { .. })));
    let message = set.run(&["3d_lowres"], &options(), 1).unwrap_err().to_string();
    assert!(message.contains("3d_lowres") && message.contains("3d_fullres"), "{message}");

    let cut = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    cut(&set.path("raw/imagesTr/c1_0000.nii"));
    assert!(set.message(&options()).contains("c1_0000.nii"));
    assert!(set.files(FULLRES).keys().all(|name| name == "c0.safetensors"));
    set.image(1, f32::NAN);
    assert!(set.message(&options()).contains("case c1"));
    set.image(1, 1.0);
    std::fs::copy(set.path("raw/labelsTr/c0.nii"), set.path("raw/labelsTr/c1.nii")).unwrap();
    let message = set.message(&options());
    assert!(message.contains("case c1") && message.contains("[6, 9, 8]"), "{message}");

    std::fs::remove_file(set.path("pre/nnUNetPlans.json")).unwrap();
    assert!(set.message(&options()).contains("stunet plan"));
}
