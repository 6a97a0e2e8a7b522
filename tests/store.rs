//! Preprocessed cases in every form in which they are read.

use std::path::{Path, PathBuf};

use stunet::io::{Geometry, Image, LabelData, Segmentation};
use stunet::nnunet::model::preprocess_plan;
use stunet::nnunet::preprocess::{PreprocessPlan, PreprocessedCase, preprocess_case};
use stunet::nnunet::store;
use stunet::nnunet::training_case::{ClassKey, ClassLocations, TrainingCase};

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/store")
}

/// Fixtures under other names in a folder of their own.
fn folder(names: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (from, to) in names {
        std::fs::copy(fixtures().join(from), dir.path().join(to)).unwrap();
    }
    dir
}

const SHAPE: [usize; 3] = [11, 14, 13];

/// The case of `make.py`.
fn value(channel: usize, [z, y, x]: [usize; 3]) -> f32 {
    let n = (((channel * 11 + z) * 14 + y) * 13 + x) as f32 / 8.0;
    if channel == 1 { -n } else { n }
}

fn label([z, y, _]: [usize; 3]) -> i16 {
    ((z + 2 * y) / 7) as i16 - 1
}

/// Reads boxes within, across and outside of the case and compares every voxel.
fn check(case: &dyn TrainingCase, value: impl Fn(usize, [usize; 3]) -> f32, label: impl Fn([usize; 3]) -> i16) {
    let shape = case.shape();
    let boxes = [
        ([0, 0, 0], shape),
        ([3, 2, 5], [4, 7, 3]),
        ([-2, -3, 6], [5, 30, 4]),
        ([4, 4, -1], [1, 1, 40]),
        ([9, 12, 12], [7, 7, 7]),
        ([50, 0, 0], [2, 2, 2]),
        ([-9, -9, -9], [4, 4, 4]),
    ];
    for (lower, size) in boxes {
        let voxels: usize = size.iter().product();
        let mut data = vec![f32::NAN; case.channels() * voxels];
        let mut labels = vec![99; case.label_channels() * voxels];
        case.crop(lower, size, &mut data, &mut labels).unwrap();
        for i in 0..voxels {
            let at = [i / (size[1] * size[2]), i / size[2] % size[1], i % size[2]];
            let voxel: [i64; 3] = std::array::from_fn(|k| at[k] as i64 + lower[k]);
            let inside = (0..3).all(|k| (0..shape[k] as i64).contains(&voxel[k]));
            let voxel = voxel.map(|v| v as usize);
            for c in 0..case.channels() {
                assert_eq!(data[c * voxels + i], if inside { value(c, voxel) } else { 0.0 }, "{lower:?} {voxel:?}");
            }
            for c in 0..case.label_channels() {
                assert_eq!(labels[c * voxels + i], if inside { label(voxel) } else { -1 }, "{lower:?} {voxel:?}");
            }
        }
    }
}

/// All locations of a case.
fn locations(case: &dyn TrainingCase) -> ClassLocations {
    let of = |(class, (key, n)): (usize, (&ClassKey, usize))| {
        (key.clone(), (0..n).map(|at| case.location(class, at).unwrap()).collect())
    };
    ClassLocations { classes: case.classes().into_iter().enumerate().map(of).collect() }
}

const NPZ: [(&str, &str); 2] = [("numpy.npz", "a.npz"), ("numpy.pkl", "a.pkl")];
const NPY: [(&str, &str); 3] = [("unpacked.npy", "a.npy"), ("unpacked_seg.npy", "a_seg.npy"), ("numpy.pkl", "a.pkl")];
const BLOSC: [(&str, &str); 3] = [("blosc.b2nd", "a.b2nd"), ("blosc_seg.b2nd", "a_seg.b2nd"), ("numpy.pkl", "a.pkl")];

#[test]
fn every_form_of_nnunets_is_read() {
    for names in [&NPZ[..], &NPY, &BLOSC] {
        let dir = folder(names);
        let stored = store::open(dir.path()).unwrap();
        assert_eq!(stored.identifiers(), ["a"]);
        let case = stored.case("a").unwrap();
        assert_eq!((case.channels(), case.shape(), case.label_channels()), (2, SHAPE, 1));
        check(&*case, value, label);
        let locations = &locations(&*case).classes;
        let keys: Vec<&ClassKey> = locations.iter().map(|(k, _)| k).collect();
        assert_eq!(keys, [&ClassKey::Label(1), &ClassKey::Region(vec![2, 3]), &ClassKey::Label(7)]);
        assert!(locations[0].1.len() == 30 && locations[1].1.len() == 30 && locations[2].1.is_empty());
        for (k, wanted) in [(0, 1..2), (1, 2..4)] {
            assert!(locations[k].1.iter().all(|v| wanted.contains(&label(v.map(|n| n as usize)))));
        }

        let whole = stored.image("a", [2, 0, 1]).unwrap();
        assert_eq!((whole.channels, whole.shape), (2, SHAPE));
        assert_eq!(whole.data[13], value(0, [0, 1, 0]));
        let p = stored.properties("a", [2, 0, 1]).unwrap();
        assert_eq!(p.preprocessing, whole.properties);
        assert_eq!(p.preprocessing.bbox, [[1, 12], [0, 12], [2, 18]]);
        assert_eq!(p.preprocessing.spacing_mm, [2.0, 0.75, 0.5]);
        assert_eq!(p.geometry.shape, [20, 14, 12]);
        let affine = [[-0.5, 0.0, 0.0, -10.0], [0.0, 0.0, 2.0, 20.0], [0.0, 0.75, 0.0, 30.0]];
        assert_eq!(p.geometry.affine, affine);
    }
}

/// Arrays of one channel and of two, packed in other ways than nnU-Net's.
#[test]
fn chunks_packed_in_any_way_are_read() {
    let seg = ("blosc_seg.b2nd", "a_seg.b2nd");
    for name in ["lz4_plain", "lz4_bits", "zlib_bytes", "lz_bytes", "zstd_bytes", "split"] {
        let dir = folder(&[(&format!("{name}.b2nd"), "a.b2nd"), seg, ("numpy.pkl", "a.pkl")]);
        check(&*store::open(dir.path()).unwrap().case("a").unwrap(), value, label);
    }
    let flat = |[z, y, x]: [usize; 3]| if (z, y) == (8, 9) && x >= 4 { -1 } else { i16::from(z >= 5) * 3 };
    for (name, value) in [("zeros", 0.0), ("full", 2.5)] {
        let dir = folder(&[(&format!("{name}.b2nd"), "a.b2nd"), ("flat.b2nd", "a_seg.b2nd"), ("numpy.pkl", "a.pkl")]);
        check(&*store::open(dir.path()).unwrap().case("a").unwrap(), |_, _| value, flat);
    }
    let dir = folder(&[("nan.b2nd", "a.b2nd"), ("stored.b2nd", "a_seg.b2nd"), ("numpy.pkl", "a.pkl")]);
    let stored = store::open(dir.path()).unwrap();
    assert!(stored.image("a", [0, 1, 2]).unwrap().data.iter().all(|v| v.is_nan()));
    let (mut data, mut labels) = (vec![0.0; 2002], vec![0; 2002]);
    stored.case("a").unwrap().crop([0; 3], SHAPE, &mut data, &mut labels).unwrap();
    assert!(labels.iter().enumerate().all(|(i, l)| *l == label([i / 182, i / 13 % 14, i % 13])));
}

fn message(dir: &Path) -> String {
    let stored = store::open(dir).unwrap();
    let read = |id: &str| -> stunet::Result<()> {
        let case = stored.case(id)?;
        let n: usize = case.shape().iter().product();
        case.crop([0; 3], case.shape(), &mut vec![0.0; case.channels() * n], &mut vec![0; n])?;
        stored.properties(id, [0, 1, 2]).map(drop)
    };
    match read("a") {
        Ok(()) => String::new(),
        Err(e) => e.to_string(),
    }
}

/// Cut short anywhere: an error that names the file. Changed anywhere: an error, or other numbers; never a panic, nor
/// memory that the file does not need.
#[test]
fn damaged_files_are_errors() {
    let zstd = [("zstd_bytes.b2nd", "a.b2nd"), BLOSC[1], BLOSC[2]];
    for names in [&NPZ[..], &NPY, &BLOSC, &zstd] {
        for (_, name) in names {
            let dir = folder(names);
            let path = dir.path().join(name);
            let whole = std::fs::read(&path).unwrap();
            for n in (0..whole.len()).step_by(whole.len() / 40 + 1) {
                std::fs::write(&path, &whole[..n]).unwrap();
                let message = message(dir.path());
                assert!(message.contains("a.") || message.contains("a_seg."), "{name} at {n}: {message:?}");
                assert!(!message.contains('\n'), "{message}");
            }
            let step = if name.ends_with(".npz") { 23 } else { 7 };
            for at in (0..whole.len().min(700)).step_by(step).chain((700..whole.len()).step_by(501)) {
                for to in [0, 0x7f, 0xff, !whole[at]] {
                    let mut changed = whole.clone();
                    changed[at] = to;
                    std::fs::write(&path, &changed).unwrap();
                    message(dir.path());
                }
            }
        }
    }
}

#[test]
fn pickles_that_call_or_contradict_are_refused() {
    let dir = folder(&NPZ);
    let pickle = dir.path().join("a.pkl");
    for (bytes, expected) in [
        (&b"cos\nsystem\n(S'id'\ntR."[..], "os.system"),
        (b"\x80\x04}.", "class_locations"),
        (b"(dS'class_locations'\n(dI1\nI5\nss.", "rows of four"),
        (b"(dS'class_locations'\n(dS'x'\n(lss.", "neither a label"),
    ] {
        std::fs::write(&pickle, bytes).unwrap();
        let message = message(dir.path());
        assert!(message.contains(expected) && message.contains("a.pkl"), "{message}");
    }
    // A case smaller than its pickle says.
    let dir = folder(&NPZ);
    stunet::io::write_npz(dir.path().join("a.npz"), |npz| {
        npz.array("data", &[1, 2, 2, 2], |a| a.push(&[0f32; 8]))?;
        npz.array("seg", &[1, 2, 2, 2], |a| a.push(&[0i16; 8]))
    })
    .unwrap();
    assert!(message(dir.path()).contains("outside of the case"));
    stunet::io::write_npz(dir.path().join("a.npz"), |npz| {
        npz.array("data", &[1, 2, 2, 2], |a| a.push(&[0f32; 8]))?;
        npz.array("seg", &[1, 2, 2, 3], |a| a.push(&[0i16; 12]))
    })
    .unwrap();
    assert!(message(dir.path()).contains("seg"));
}

#[test]
fn a_folder_without_cases_or_without_the_case_is_said() {
    let dir = tempfile::tempdir().unwrap();
    assert!(store::open(dir.path()).unwrap_err().to_string().contains("preprocess the data set first"));
    assert!(store::open(&dir.path().join("none")).is_err());
    let dir = folder(&NPZ);
    assert!(store::open(dir.path()).unwrap().case("b").err().unwrap().to_string().contains("\"b\""));
}

fn plan() -> PreprocessPlan {
    serde_json::from_value(serde_json::json!({
        "rules": "nnunet_v2",
        "channels": [{"name": "MR", "normalization": "z_score", "use_mask": true, "intensity": null}],
        "transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2], "spacing_mm": [1.0, 1.5, 2.0],
        "resampling_data": {"order": 3, "order_z": 0, "force_separate_z": null},
        "resampling_labels": {"order": 1, "order_z": 0, "force_separate_z": null},
    }))
    .unwrap()
}

/// A small case with a border of zeros, and the grid of its image.
fn case() -> (PreprocessedCase, Geometry) {
    let shape = [9, 10, 12];
    let mut geometry = Geometry::new(shape, [1.5, 1.0, 1.0]);
    geometry.affine[1][3] = -7.5;
    // A box without one of its edges, which is outside of the nonzero region.
    let inside = |i: usize| {
        let (z, y) = (i / 120, i / 12 % 10);
        (2..8).contains(&z) && (1..9).contains(&y) && !(z < 5 && y < 4)
    };
    let values = (0..1080).map(|i| if inside(i) { 10.0 + (i % 17) as f32 } else { 0.0 }).collect();
    let labels = (0..1080)
        .map(|i| if inside(i) { (i / 120 + i / 36 % 2) as u8 % 4 } else { u8::from(i % 97 == 0) * 2 })
        .collect();
    let image = Image::new(vec![values], geometry.clone()).unwrap();
    let truth = Segmentation::new(LabelData::U8(labels), geometry.clone(), Vec::new()).unwrap();
    let classes = [ClassKey::Label(1), ClassKey::Region(vec![-1, 0, 1]), ClassKey::Label(9)];
    (preprocess_case(&image, &truth, &plan(), &classes).unwrap(), geometry)
}

#[test]
fn what_is_written_comes_back() {
    let (case, geometry) = case();
    assert!(case.labels.contains(&-1) && case.labels.contains(&3));
    let dir = tempfile::tempdir().unwrap();
    store::write_case(dir.path(), "own.1", &case, &geometry, "made so").unwrap();
    store::write_npz_case(dir.path(), "numpy", &case, &geometry, "made so").unwrap();
    let stored = store::open(dir.path()).unwrap();
    assert_eq!(stored.identifiers(), ["numpy", "own.1"]);
    for id in ["numpy", "own.1"] {
        let back = stored.case(id).unwrap();
        let [_, ny, nx] = case.image.shape;
        let at = |[z, y, x]: [usize; 3]| (z * ny + y) * nx + x;
        check(&*back, |_, v| case.image.data[at(v)], |v| case.labels[at(v)]);
        assert_eq!(locations(&*back), case.locations);
        assert_eq!(stored.image(id, [1, 0, 2]).unwrap(), case.image);
        let p = stored.properties(id, [1, 0, 2]).unwrap();
        assert_eq!((p.preprocessing, p.geometry), (case.image.properties.clone(), geometry.clone()), "{id}");
        stored.check(id).unwrap();
    }
    let previous = tempfile::tempdir().unwrap();
    let n = case.labels.len();
    let predicted: Vec<u16> = (0..n).map(|i| if i % 2 == 0 { 300 } else { 2 }).collect();
    for (id, file) in [("own.1", "own.1.safetensors"), ("numpy", "numpy.npz")] {
        assert!(stored.write_previous_stage(previous.path(), id, &LabelData::U8(vec![0; n - 1])).is_err());
        assert!(stored.write_previous_stage(previous.path(), id, &LabelData::U16(vec![40_000; n])).is_err());
        stored.write_previous_stage(previous.path(), id, &LabelData::U16(predicted.clone())).unwrap();
        assert!(previous.path().join(file).is_file());
        let cascade = stored.clone().with_previous_stage(previous.path(), &[2, 300]);
        let two = cascade.case(id).unwrap();
        assert_eq!(two.label_channels(), 2);
        let (mut data, mut labels) = (vec![0.0; 2], vec![0; 4]);
        two.crop([0, 0, 0], [1, 1, 2], &mut data, &mut labels).unwrap();
        assert_eq!(labels[2..], [300, 2]);
        // A channel of zeros and ones for each label that is asked for.
        let image = cascade.image(id, [1, 0, 2]).unwrap();
        assert_eq!((image.channels, image.shape), (case.image.channels + 2, case.image.shape));
        assert_eq!(image.data[..case.image.data.len()], case.image.data);
        let tail = &image.data[case.image.data.len()..];
        assert!((0..n).all(|i| tail[i] == (i % 2) as f32 && tail[n + i] == 1.0 - (i % 2) as f32));
        // Two predictions of one case: which is the newer cannot be told. Writing it once more leaves one.
        std::fs::write(previous.path().join(format!("{id}.npy")), b"old").unwrap();
        let two = cascade.case(id).map(drop).unwrap_err().to_string();
        assert!(two.contains(file) && two.contains(".npy"), "{two}");
        stored.write_previous_stage(previous.path(), id, &LabelData::U16(predicted.clone())).unwrap();
        cascade.case(id).unwrap();
    }
    // Of a case that was preprocessed again onto another grid.
    std::fs::remove_file(previous.path().join("own.1.safetensors")).unwrap();
    std::fs::copy(fixtures().join("flat.b2nd"), previous.path().join("own.1.b2nd")).unwrap();
    let other = stored.with_previous_stage(previous.path(), &[2]).case("own.1").map(drop).unwrap_err().to_string();
    assert!(other.contains("own.1.b2nd") && other.contains("--val"), "{other}");
}

#[test]
fn damage_of_the_own_form_is_found() {
    let (case, geometry) = case();
    let dir = tempfile::tempdir().unwrap();
    store::write_case(dir.path(), "a", &case, &geometry, "x").unwrap();
    let path = dir.path().join("a.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for n in (0..whole.len()).step_by(whole.len() / 50) {
        std::fs::write(&path, &whole[..n]).unwrap();
        assert!(message(dir.path()).contains("a.safetensors"), "{n}");
    }
    for at in (0..whole.len()).step_by(13) {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        std::fs::write(&path, &changed).unwrap();
        message(dir.path());
        assert!(store::open(dir.path()).unwrap().check("a").is_err(), "{at}");
    }
}

#[test]
fn plans_of_every_configuration_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: serde_json::Value| {
        let path = dir.path().join(name);
        std::fs::write(&path, value.to_string()).unwrap();
        path
    };
    let dataset = write(
        "dataset.json",
        serde_json::json!({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz",
            "numTraining": 1}),
    );
    let function = |seg: bool| serde_json::json!({"is_seg": seg, "order": 1, "order_z": 0, "force_separate_z": null});
    let plans = |conf: serde_json::Value| {
        let mut base = serde_json::json!({"data_identifier": "nnUNetPlans_x", "preprocessor_name": "DefaultPreprocessor",
            "spacing": [3.0, 1.0, 0.5], "normalization_schemes": ["NoNormalization"], "use_mask_for_norm": [false],
            "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": function(false),
            "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_seg_kwargs": function(true)});
        for (k, v) in conf.as_object().unwrap() {
            base[k] = v.clone();
        }
        write(
            "plans.json",
            serde_json::json!({"label_manager": "LabelManager", "transpose_forward": [2, 0, 1],
                "transpose_backward": [1, 2, 0], "foreground_intensity_properties_per_channel": {},
                "configurations": {"x": base, "y": {"inherits_from": "x", "previous_stage": "x"}}}),
        )
    };
    let read = |conf: serde_json::Value, name: &str| preprocess_plan(&plans(conf), &dataset, name);
    let (plan, folder) = read(serde_json::json!({}), "y").unwrap();
    assert_eq!((plan.spacing_mm, &*folder), ([Some(3.0), Some(1.0), Some(0.5)], "nnUNetPlans_x"));
    let (plan, _) = read(serde_json::json!({"spacing": [1.0, 0.5]}), "x").unwrap();
    assert_eq!(plan.spacing_mm, [None, Some(1.0), Some(0.5)]);
    for (conf, expected) in [
        (serde_json::json!({"spacing": [1.0]}), "spacing"),
        (serde_json::json!({"spacing": [1.0, -1.0]}), "spacing"),
        (serde_json::json!({"data_identifier": "../x"}), "data_identifier"),
        (serde_json::json!({"preprocessor_name": "Other"}), "Other"),
        (serde_json::json!({"resampling_fn_seg": "resample_torch_fornnunet"}), "resample_torch_fornnunet"),
        (serde_json::json!({"resampling_fn_seg_kwargs": {}}), "is_seg"),
        (serde_json::json!({"resampling_fn_seg_kwargs": function(false)}), "is_seg"),
    ] {
        let message = read(conf, "x").unwrap_err().to_string();
        assert!(
            message.contains(expected) && message.contains("plans.json") || message.contains("unsupported"),
            "{message}"
        );
    }
}
