//! Means of probabilities.

use std::io::Read;
use std::path::{Path, PathBuf};

use half::f16;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use stunet::io::npz::Number;
use stunet::io::{self, Geometry, LabelData, Segmentation};
use stunet::nnunet::dataset::DatasetJson;
#[cfg(feature = "natural")]
use stunet::nnunet::dataset::Reader;
use stunet::nnunet::ensemble::ensemble;

use crate::common::pickle::{Py, dict, pickle};

const SHAPE: [usize; 3] = [2, 3, 4];
const VOXELS: usize = 24;

fn dataset(folder: &Path, labels: &Value, order: &Value) -> DatasetJson {
    std::fs::create_dir_all(folder).unwrap();
    let value = json!({"channel_names": {"0": "CT"}, "labels": labels, "regions_class_order": order, "numTraining": 1,
                       "file_ending": ".nii.gz"});
    let path = folder.join("dataset.json");
    std::fs::write(&path, value.to_string()).unwrap();
    DatasetJson::read(&path).unwrap()
}

fn write<T: Number>(folder: &Path, channels: usize, values: &[T]) {
    std::fs::create_dir_all(folder).unwrap();
    let [z, y, x] = SHAPE;
    io::write_npz(folder.join("c.npz"), |npz| {
        // nnU-Net's archives hold one array, others may hold more.
        npz.array("other", &[2], |a| a.push(&[1i64, 2]))?;
        npz.array("probabilities", &[channels, z, y, x], |a| a.push(values))
    })
    .unwrap();
}

fn write_map(folder: &Path, shape: [usize; 3]) {
    let mut geometry = Geometry::new(shape, [3.0, 1.0, 0.5]);
    geometry.affine[0][3] = -7.0;
    let seg = Segmentation::new(LabelData::zeros(shape.iter().product(), 1), geometry, Vec::new()).unwrap();
    io::write_nifti(folder.join("c.nii.gz"), &seg).unwrap();
}

fn folders(dir: &Path) -> [PathBuf; 3] {
    ["a", "b", "out"].map(|n| dir.join(n))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn labels_follow_from_the_mean(
        a in proptest::collection::vec(0u8..9, 3 * VOXELS),
        b in proptest::collection::vec(0u8..9, 3 * VOXELS),
        regions: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let [first, second, out] = folders(dir.path());
        let (labels, order) = if regions {
            (json!({"background": 0, "w": [1, 2, 3], "c": [2, 3], "e": 3}), json!([1, 2, 3]))
        } else {
            (json!({"background": 0, "one": 1, "two": 2}), json!([]))
        };
        let data = dataset(&first, &labels, &order);
        // Eighths are exact in both types, and often equal.
        write(&first, 3, &a.iter().map(|v| f32::from(*v) / 8.0).collect::<Vec<_>>());
        write(&second, 3, &b.iter().map(|v| f16::from_f32(f32::from(*v) / 8.0)).collect::<Vec<_>>());
        write_map(&first, SHAPE);
        let written = ensemble(&[first.clone(), second], &out, &data, true, &mut ()).unwrap();
        prop_assert_eq!(&written, &["c.nii.gz", "c.npz", "c.pkl"].map(|n| out.join(n)));
        let found = io::read_segmentation(&written[0]).unwrap();
        prop_assert_eq!(found.geometry.affine, io::read_nifti_header(first.join("c.nii.gz")).unwrap().affine);
        let sum = |c: usize, i: usize| u32::from(a[c * VOXELS + i]) + u32::from(b[c * VOXELS + i]);
        for i in 0..VOXELS {
            let expected = if regions {
                (0..3).filter(|c| sum(*c, i) > 8).max().map_or(0, |c| c + 1)
            } else {
                (0..3).rev().max_by_key(|c| sum(*c, i)).unwrap()
            };
            prop_assert_eq!(usize::from(found.labels.get(i)), expected);
        }
        // The mean of the mean alone is itself.
        let again = dir.path().join("again");
        ensemble(std::slice::from_ref(&out), &again, &data, true, &mut ()).unwrap();
        prop_assert_eq!(std::fs::read(again.join("c.npz")).unwrap(), std::fs::read(out.join("c.npz")).unwrap());
        prop_assert_eq!(std::fs::read(again.join("c.nii.gz")).unwrap(), std::fs::read(&written[0]).unwrap());
    }
}

#[test]
fn a_case_lies_where_its_properties_say() {
    let dir = tempfile::tempdir().unwrap();
    let [first, _, out] = folders(dir.path());
    let data = dataset(&first, &json!({"background": 0, "one": 1}), &json!([]));
    write(&first, 2, &[0.5f32; 2 * VOXELS]);
    let floats = |values: &[f64]| Py::Tuple(values.iter().map(|v| Py::Float(*v)).collect());
    let sitk = dict([
        ("spacing", floats(&[0.5, 1.0, 3.0])),
        ("origin", floats(&[1.0, 2.0, 4.0])),
        ("direction", floats(&[0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])),
    ]);
    std::fs::write(first.join("c.pkl"), pickle(&dict([("sitk_stuff", sitk), ("spacing", floats(&[3.0, 1.0, 0.5]))])))
        .unwrap();
    let written = ensemble(std::slice::from_ref(&first), &out, &data, true, &mut ()).unwrap();
    let g = io::read_nifti_header(&written[0]).unwrap();
    assert_eq!((g.shape, g.spacing_mm), (SHAPE, [3.0, 1.0, 0.5]));
    assert_eq!(g.affine, [[0.0, -1.0, 0.0, -1.0], [-0.5, 0.0, 0.0, -2.0], [0.0, 0.0, 3.0, 4.0]]);
    // The properties travel as they are.
    assert_eq!(std::fs::read(&written[2]).unwrap(), std::fs::read(first.join("c.pkl")).unwrap());
    // Of our own making they say the same.
    let second = dir.path().join("second");
    write(&second, 2, &[0.5f32; 2 * VOXELS]);
    std::fs::copy(&written[0], second.join("c.nii.gz")).unwrap();
    let third = dir.path().join("third");
    ensemble(&[second], &third, &data, true, &mut ()).unwrap();
    std::fs::remove_file(third.join("c.nii.gz")).unwrap();
    let again = ensemble(&[third], &dir.path().join("fourth"), &data, false, &mut ()).unwrap();
    assert_eq!(again.len(), 1);
    assert_eq!(io::read_nifti_header(&again[0]).unwrap().affine, g.affine);
}

#[test]
fn what_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second, out] = folders(dir.path());
    let data = dataset(&first, &json!({"background": 0, "one": 1}), &json!([]));
    let inputs = [first.clone(), second.clone()];
    let fails = |parts: &[&str]| {
        let e = ensemble(&inputs, &out, &data, false, &mut ()).unwrap_err().to_string();
        parts.iter().for_each(|p| assert!(e.contains(p), "{e}: {p}"));
        assert!(!out.join("c.nii.gz").exists());
    };
    fails(&["b: folder: no such folder"]);
    std::fs::create_dir(&second).unwrap();
    fails(&["a: folder: no .npz"]);
    write(&first, 2, &[0.5f32; 2 * VOXELS]);
    fails(&["b/c.npz: file: missing"]);
    write(&second, 3, &[0.5f32; 3 * VOXELS]);
    fails(&["b/c.npz: probabilities: [3, 2, 3, 4]", "expected [2, 2, 3, 4]"]);
    write(&second, 2, &[1i16; 2 * VOXELS]);
    fails(&["b/c.npz", "floating"]);
    write(&second, 2, &[0.25f32; 2 * VOXELS]);
    fails(&["a/c.nii.gz: file: missing", "c.pkl"]);
    write_map(&first, [2, 3, 5]);
    fails(&["a/c.npz", "[2, 3, 5]"]);
    write_map(&first, SHAPE);
    // Any byte of an archive may be missing or wrong.
    let whole = std::fs::read(second.join("c.npz")).unwrap();
    for n in (0..whole.len()).step_by(11) {
        std::fs::write(second.join("c.npz"), &whole[..n]).unwrap();
        fails(&["b/c.npz"]);
    }
    ensemble(&inputs[..1], &out, &data, false, &mut ()).unwrap();
    assert!(ensemble(&[], &out, &data, false, &mut ()).unwrap_err().exit_code() == 2);
}

/// Means of three models by `fixtures/results/make.py`: label maps and probabilities as the real nnU-Net's.
#[test]
fn golden_networks_ensembles_of_nnunet() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/results/ensemble.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let shape = [8, 16, 18];
    let regions = json!({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": [3]});
    let plain = json!({"background": 0, "one": 1, "two": 2});
    for (name, labels, order) in [("labels", plain, json!([])), ("regions", regions, json!([1, 2, 3]))] {
        let dir = tempfile::tempdir().unwrap();
        let inputs = ["0", "1", "2"].map(|m| dir.path().join(m));
        let data = dataset(&inputs[0], &labels, &order);
        for (m, folder) in inputs.iter().enumerate() {
            std::fs::create_dir_all(folder).unwrap();
            for i in 0..2 {
                let parts = file.tensor(&format!("{name}/{m}/case_{i}")).unwrap().data();
                let parts = parts.iter().map(|v| f32::from(*v) / 64.0);
                // nnU-Net's own are of either type, by version.
                let path = folder.join(format!("case_{i}.npz"));
                // nnU-Net's own are of either type, by version.
                match m {
                    1 => write_sized(&path, 3, shape, &parts.collect::<Vec<f32>>()),
                    _ => write_sized(&path, 3, shape, &parts.map(f16::from_f32).collect::<Vec<f16>>()),
                }
                let geometry = Geometry::new(shape, [2.5, 1.0, 0.75]);
                let map = Segmentation::new(LabelData::zeros(shape.iter().product(), 1), geometry, Vec::new()).unwrap();
                io::write_nifti(folder.join(format!("case_{i}.nii.gz")), &map).unwrap();
            }
        }
        let out = dir.path().join("out");
        ensemble(&inputs, &out, &data, true, &mut ()).unwrap();
        for i in 0..2 {
            let ours = io::read_segmentation(out.join(format!("case_{i}.nii.gz"))).unwrap().labels;
            let theirs = file.tensor(&format!("{name}/map/case_{i}")).unwrap().data().to_vec();
            assert_eq!(ours, LabelData::U8(theirs), "{name} {i}");
            let mean = file.tensor(&format!("{name}/mean/case_{i}")).unwrap().data();
            assert_eq!(uncompressed(&out.join(format!("case_{i}.npz")), mean.len()), mean, "{name} {i}");
        }
    }
}

/// Pictures and stacks are averaged as volumes are; a stack's spacing goes along.
#[cfg(feature = "natural")]
#[test]
fn means_of_pictures_and_stacks() {
    for (ending, shape) in [(".png", [1, 5, 6]), (".tif", [1, 5, 6]), (".tif", [3, 5, 6])] {
        let dir = tempfile::tempdir().unwrap();
        let [first, second, out] = folders(dir.path());
        std::fs::create_dir_all(&first).unwrap();
        std::fs::create_dir_all(&second).unwrap();
        let value = json!({"channel_names": {"0": "a"}, "labels": {"background": 0, "one": 1}, "numTraining": 1,
                           "file_ending": ending});
        let path = first.join("dataset.json");
        std::fs::write(&path, value.to_string()).unwrap();
        let data = DatasetJson::read(&path).unwrap();
        let n: usize = shape.iter().product();
        let expected: Vec<u8> = (0..n).map(|i| u8::from(i % 3 == 0)).collect();
        let shares: Vec<f32> =
            (0..2).flat_map(|c| expected.iter().map(move |l| if *l == c { 0.75 } else { 0.25 })).collect();
        let half = vec![0.5f32; 2 * n];
        write_sized(&first.join("c_0001.npz"), 2, shape, &shares);
        write_sized(&second.join("c_0001.npz"), 2, shape, &half);
        let reader = if shape[0] > 1 { Reader::Tiff3dIo } else { Reader::NaturalImage2dIo };
        let map = |labels: Vec<u8>| {
            Segmentation::new(LabelData::U8(labels), Geometry::new(shape, [4.0, 2.0, 0.5]), Vec::new()).unwrap()
        };
        // What looks like a channel is the case's own.
        let name = format!("c_0001{ending}");
        reader.write(&first.join(&name), &map(vec![0; n])).unwrap();
        let written = ensemble(&[first, second], &out, &data, false, &mut ()).unwrap();
        reader.write(&dir.path().join(&name), &map(expected)).unwrap();
        let read = |path: &Path| std::fs::read(path).unwrap();
        assert_eq!(read(&out.join(&name)), read(&dir.path().join(&name)), "{name} {shape:?}");
        if shape[0] > 1 {
            assert_eq!(read(&out.join("c_0001.json")), read(&dir.path().join("c_0001.json")));
            assert_eq!(written, [name, "c_0001.json".into()].map(|n| out.join(n)));
        }
    }
}

fn write_sized<T: Number>(path: &Path, channels: usize, [z, y, x]: [usize; 3], values: &[T]) {
    io::write_npz(path, |npz| npz.array("probabilities", &[channels, z, y, x], |a| a.push(values))).unwrap();
}

/// The last `len` bytes of the first array of an archive: its numbers.
fn uncompressed(path: &Path, len: usize) -> Vec<u8> {
    let mut archive = zip::ZipArchive::new(std::fs::File::open(path).unwrap()).unwrap();
    let mut bytes = Vec::new();
    archive.by_index(0).unwrap().read_to_end(&mut bytes).unwrap();
    bytes.split_off(bytes.len() - len)
}
