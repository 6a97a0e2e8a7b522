//! Data sets that cannot be trained on: one error each, which names the case and what to do.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stunet::io::{write_image, write_nifti};
use stunet::nnunet::dataset::{Dataset, Reader};
use stunet::nnunet::fingerprint::Fingerprint;
use stunet::{Device, Error, Geometry, Image, Segmentation, io};
use tempfile::TempDir;

const SHAPE: [usize; 3] = [4, 6, 5];

/// Two cases of two channels with labels 0, 1 and 2.
struct Raw {
    dir: TempDir,
    json: Value,
}

fn geometry() -> Geometry {
    Geometry::new(SHAPE, [2.0, 1.0, 1.5])
}

fn image(geometry: Geometry, change: impl FnOnce(&mut Vec<f32>)) -> Image {
    let mut values: Vec<f32> = (0..geometry.len()).map(|i| i as f32 - 40.0).collect();
    change(&mut values);
    Image::new(vec![values], geometry).unwrap()
}

fn label(geometry: Geometry, top: u8) -> Segmentation {
    let values = (0..geometry.len()).map(|i| (i / 7) as u8 % (top + 1)).collect();
    Segmentation::new(io::LabelData::U8(values), geometry, Vec::new()).unwrap()
}

impl Raw {
    fn new() -> Self {
        let json = json!({
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "numTraining": 2,
            "file_ending": ".nii.gz",
        });
        let raw = Self { dir: tempfile::tempdir().unwrap(), json };
        for sub in ["imagesTr", "labelsTr"] {
            std::fs::create_dir(raw.path(sub)).unwrap();
        }
        for case in ["one", "two"] {
            for channel in 0..2 {
                write_image(raw.image(case, channel), &image(geometry(), |_| {})).unwrap();
            }
            write_nifti(raw.label(case), &label(geometry(), 2)).unwrap();
        }
        raw.describe();
        raw
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, case: &str, channel: usize) -> PathBuf {
        self.path(&format!("imagesTr/{case}_{channel:04}.nii.gz"))
    }

    fn label(&self, case: &str) -> PathBuf {
        self.path(&format!("labelsTr/{case}.nii.gz"))
    }

    fn describe(&self) {
        std::fs::write(self.path("dataset.json"), self.json.to_string()).unwrap();
    }

    fn open(&self) -> Result<Dataset, Error> {
        Dataset::open(self.dir.path())
    }

    fn faults(&self) -> Vec<String> {
        let faults = self.open().unwrap().verify(&Device::cpu(), &mut ()).unwrap();
        assert!(faults.iter().all(|f| f.exit_code() == 3 && !f.to_string().contains('\n')));
        faults.iter().map(Error::to_string).collect()
    }

    /// The only fault holds all of `parts`, and where the fingerprint would stumble it says so too.
    fn has(&self, parts: &[&str], stops: bool) {
        let faults = self.faults();
        assert!(faults.len() == 1 && parts.iter().all(|p| faults[0].contains(p)), "{parts:?}: {faults:?}");
        if stops {
            let e = Fingerprint::extract(&self.open().unwrap(), &Device::cpu(), &mut ()).unwrap_err();
            assert_eq!(e.exit_code(), 3, "{e}");
        }
    }
}

#[test]
fn a_good_one_has_no_fault() {
    let raw = Raw::new();
    assert!(raw.faults().is_empty(), "{:?}", raw.faults());
    let dataset = raw.open().unwrap();
    assert_eq!((dataset.ids(), dataset.reader), (vec!["one".into(), "two".into()], Reader::SimpleItkIo));
}

#[test]
fn missing_and_surplus_files() {
    let raw = Raw::new();
    std::fs::remove_file(raw.image("two", 1)).unwrap();
    raw.has(&["case two", "channel 1 (T2) is missing", "imagesTr/two_0001.nii.gz"], true);
    let raw = Raw::new();
    std::fs::rename(raw.image("two", 1), raw.image("two", 2)).unwrap();
    raw.has(&["case two", "channel 1 (T2) is missing"], true);
    let raw = Raw::new();
    std::fs::copy(raw.image("two", 1), raw.image("two", 2)).unwrap();
    raw.has(&["case two", "3 image files", "2 channels"], true);
    let raw = Raw::new();
    std::fs::remove_file(raw.label("one")).unwrap();
    raw.has(&["case one", "label map", "labelsTr/one.nii.gz is missing"], true);
    let mut raw = Raw::new();
    raw.json["numTraining"] = json!(3);
    raw.describe();
    raw.has(&["dataset.json: numTraining: 3", "there are 2"], false);
    let raw = Raw::new();
    std::fs::rename(raw.image("two", 1), raw.path("imagesTr/two.nii.gz")).unwrap();
    let e = raw.open().unwrap_err().to_string();
    assert!(e.contains("two.nii.gz: name: expected a name like case_0000.nii.gz"), "{e}");
    let raw = Raw::new();
    std::fs::remove_dir_all(raw.path("labelsTr")).unwrap();
    assert!(raw.open().unwrap_err().to_string().contains("labelsTr: folder"));
}

#[test]
fn grids_that_differ() {
    let other = Geometry::new([4, 6, 6], [2.0, 1.0, 1.5]);
    let raw = Raw::new();
    write_nifti(raw.label("two"), &label(other.clone(), 2)).unwrap();
    raw.has(&["case two", "label map has [4, 6, 6] voxels", "[4, 6, 5]"], true);
    let raw = Raw::new();
    write_image(raw.image("two", 1), &image(other, |_| {})).unwrap();
    raw.has(&["case two", "two_0001.nii.gz: dim"], true);
    let raw = Raw::new();
    write_nifti(raw.label("one"), &label(Geometry::new(SHAPE, [2.0, 1.0, 1.6]), 2)).unwrap();
    raw.has(&["case one", "label map's spacing is [2.0, 1.0, 1.6"], false);
    let raw = Raw::new();
    zero_spacing(&raw.image("one", 0));
    raw.has(&["case one", "one_0000.nii.gz: pixdim[1]: 0, expected a spacing above 0"], true);
    // A label map that lies elsewhere is only warned of.
    let raw = Raw::new();
    let mut moved = geometry();
    moved.affine[0][3] = 10.0;
    write_nifti(raw.label("one"), &label(moved, 2)).unwrap();
    assert!(raw.faults().is_empty());
}

fn zero_spacing(path: &Path) {
    let packed = std::fs::read(path).unwrap();
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&packed[..]), &mut bytes).unwrap();
    bytes[80..84].fill(0);
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut out, &bytes).unwrap();
    std::fs::write(path, out.finish().unwrap()).unwrap();
}

#[test]
fn values_that_cannot_be() {
    let raw = Raw::new();
    write_image(raw.image("two", 1), &image(geometry(), |v| v[3] = f32::NAN)).unwrap();
    raw.has(&["case two", "channel 1 (T2): 1 voxels are NaN", "put a number"], true);
    let raw = Raw::new();
    write_nifti(raw.label("two"), &label(geometry(), 4)).unwrap();
    raw.has(&["case two", "two.nii.gz holds labels 3, 4", "dataset.json names 0, 1, 2"], false);
    let raw = Raw::new();
    write_image(raw.label("one"), &image(geometry(), |v| v.iter_mut().for_each(|v| *v = 0.5))).unwrap();
    raw.has(&["case one", "0.5 at (0, 0, 0), expected labels"], true);
    let raw = Raw::new();
    for case in ["one", "two"] {
        write_nifti(raw.label(case), &label(geometry(), 0)).unwrap();
    }
    let e = Fingerprint::extract(&raw.open().unwrap(), &Device::cpu(), &mut ()).unwrap_err().to_string();
    assert!(e.contains("no label map has a foreground voxel"), "{e}");
    let raw = Raw::new();
    std::fs::write(raw.image("one", 0), b"not an image").unwrap();
    raw.has(&["case one", "one_0000.nii.gz: header"], true);
}

#[test]
fn descriptions() {
    let mut raw = Raw::new();
    for (key, value, at) in [
        ("labels", json!({"background": 0, "a": 1, "b": 3}), "labels: no label of value 2"),
        ("labels", json!({"background": 0, "a": 2}), "labels: no label of value 1"),
        ("labels", json!({"a": 1}), "labels: no \"background\""),
        ("channel_names", json!({"0": "T1", "2": "T2"}), "channel_names: no channel 1"),
        ("channel_names", json!({}), "channel_names: no channel"),
        ("file_ending", json!("nii.gz"), "file_ending: \"nii.gz\", expected an ending"),
        ("numTraining", json!("2"), "numTraining: \"2\", expected an integer"),
    ] {
        let good = std::mem::replace(&mut raw.json[key], value);
        raw.describe();
        let e = raw.open().unwrap_err();
        assert!(e.exit_code() == 3 && e.to_string().contains(&format!("dataset.json: {at}")), "{e}");
        raw.json[key] = good;
    }
    for (text, at) in [
        (raw.json.to_string().replace("\"b\":2", "\"b\":2,"), "JSON: trailing comma at line 1 column"),
        (raw.json.to_string().replace("\"b\":2", "\"a\":2"), "JSON: \"a\" stands there twice, expected once at line 1"),
        (raw.json.to_string().replace("numTraining", "numtraining"), "numTraining: missing"),
        (r#"{"modality": {"0": "MRI"}, "training": [], "labels": {"0": "background"}}"#.into(), "file_ending: missing"),
    ] {
        std::fs::write(raw.path("dataset.json"), text).unwrap();
        let e = raw.open().unwrap_err();
        assert!(e.exit_code() == 3 && e.to_string().contains(&format!("dataset.json: {at}")), "{e}");
    }
    // Labels of regions may have a gap for a network, not for a data set.
    raw.json["labels"] = json!({"background": 0, "whole": [1, 3], "core": 3});
    raw.json["regions_class_order"] = json!([1, 3]);
    raw.describe();
    let faults = raw.faults();
    assert!(faults[0].contains("dataset.json: labels: no label of value 2"), "{faults:?}");
    raw.json["file_ending"] = json!(".dcm");
    raw.describe();
    assert_eq!(raw.open().unwrap_err().exit_code(), 4);
}

#[test]
fn explicit_lists_of_files() {
    let mut raw = Raw::new();
    std::fs::create_dir(raw.path("elsewhere")).unwrap();
    std::fs::rename(raw.image("two", 0), raw.path("elsewhere/x.nii.gz")).unwrap();
    let case = |first: &str, label: &str| json!({"images": [first, "imagesTr/two_0001.nii.gz"], "label": label});
    raw.json["dataset"] = json!({"z": case("$PLACE/x.nii.gz", "labelsTr/two.nii.gz"),
                                 "y": case("elsewhere/x.nii.gz", "labelsTr/one.nii.gz")});
    raw.describe();
    let variable = |name: &str| (name == "PLACE").then(|| "elsewhere".to_owned());
    let dataset = Dataset::open_with(raw.dir.path(), &variable).unwrap();
    assert_eq!(dataset.ids(), ["z", "y"]);
    assert!(dataset.verify(&Device::cpu(), &mut ()).unwrap().is_empty());
    raw.has(&["case z", "its image", "$PLACE/x.nii.gz is missing"], true);
    let twice = raw.json.to_string().replace("\"y\":", "\"z\":");
    std::fs::write(raw.path("dataset.json"), twice).unwrap();
    assert!(raw.open().unwrap_err().to_string().contains("\"z\" stands there twice"));
}
