//! nnU-Net v2 model folders with STU-Nets: voxels and probabilities against nnU-Net 2.8.1.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use stunet::{Decision, Device, PredictOptions, Predictor, io};

use crate::common::shared;

pub const DATASETS: [&str; 5] = ["ct_aniso", "mr_two", "mr_thick", "regions", "ignore"];

/// Files of one case, one per channel.
pub fn channels_of(folder: &Path, case: &str) -> Vec<PathBuf> {
    (0..).map(|c| folder.join(format!("{case}_{c:04}.nii.gz"))).take_while(|p| p.exists()).collect()
}

pub fn f16_tensor(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let t = file.tensor(name).unwrap();
    let values = t.data().chunks_exact(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect();
    (t.shape().to_vec(), values)
}

/// The largest difference of two arrays of equal length; NaN where there is one.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let d = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    d.fold(0.0, |worst: f32, d: f32| if d <= worst || worst.is_nan() { worst } else { d })
}

/// Cases of a predictions folder.
pub fn cases(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut out: Vec<String> = names.filter_map(|n| n.strip_suffix(".nii.gz").map(String::from)).collect();
    out.sort();
    assert!(!out.is_empty());
    out
}

/// How far the reference itself is from another decision at voxel `i`.
pub fn margin(p: &[f32], n: usize, i: usize, decision: &Decision) -> f32 {
    let scores = (0..p.len() / n).map(|c| p[c * n + i]);
    match decision {
        Decision::Regions { .. } => scores.map(|s| (s - 0.5).abs()).fold(f32::INFINITY, f32::min),
        _ => {
            let mut s: Vec<f32> = scores.collect();
            s.sort_by(|a, b| b.total_cmp(a));
            s[0] - s[1]
        }
    }
}

#[test]
fn golden_predict_stunet() {
    predicts("stunet", false);
}

#[test]
fn golden_networks_predict_plain() {
    predicts("plain", false);
}

#[test]
fn golden_networks_predict_resenc() {
    predicts("resenc", false);
}

#[test]
fn golden_networks_predict_mirrored() {
    predicts("plain_tta", true);
}

/// Every case of every data set by the network of `which`, with or without mirroring.
fn predicts(which: &str, mirroring: bool) {
    let network = which.trim_end_matches("_tta");
    let Some(root) = shared("golden/pipeline") else { return };
    let device = Device::cpu();
    for name in DATASETS {
        let dir = root.join(name);
        let open = || Predictor::open(dir.join("model").join(network), &device).unwrap();
        let mut plain = open().options(PredictOptions::default().mirroring(mirroring));
        let mut full = open().options(PredictOptions::default().mirroring(mirroring).probabilities(true));
        for case in cases(&dir.join(format!("predictions_f32/{which}"))) {
            let image = io::read_nifti(&channels_of(&dir.join("raw/imagesTs"), &case)).unwrap();
            let ours = plain.predict(&image).unwrap();
            let with = full.predict_with(&image, &mut ()).unwrap();
            let probabilities = with.probabilities.unwrap();

            let truth = dir.join(format!("predictions_f32/{which}"));
            let reference = io::read_segmentation(truth.join(format!("{case}.nii.gz"))).unwrap();
            let (shape, p) = f16_tensor(&truth.join(format!("{case}.safetensors")), "probabilities");
            assert_eq!(shape[1..], probabilities.shape);
            let n = reference.labels.len();
            assert_eq!([ours.labels.len(), with.segmentation.labels.len()], [n; 2]);
            let worst = largest_difference(&p, &probabilities.values);
            let differing: Vec<usize> = (0..n).filter(|&i| ours.labels.get(i) != reference.labels.get(i)).collect();
            let clear = differing.iter().filter(|&&i| margin(&p, n, i, &plain.plan().decision) >= 0.001).count();
            let direct = (0..n).filter(|&i| ours.labels.get(i) != with.segmentation.labels.get(i)).count();

            let f16 = io::read_segmentation(dir.join(format!("predictions/{which}/{case}.nii.gz"))).unwrap();
            let same16 = (0..n).filter(|&i| ours.labels.get(i) == f16.labels.get(i)).count() as f64 / n as f64;
            let equal = 1.0 - differing.len() as f64 / n as f64;
            eprintln!(
                "{name} {case}: {:.4} % equal, {clear} clear ones differ, probabilities {worst:.1e}, \
                 float16 nnU-Net {:.4} %, streamed and whole differ in {direct}",
                100.0 * equal,
                100.0 * same16
            );
            assert_eq!(ours.geometry.shape, reference.geometry.shape);
            assert_eq!(clear, 0, "{name} {case}: voxels with a clear reference differ");
            assert!(equal >= 0.999, "{name} {case}: {equal}");
            assert!(worst <= 1e-3, "{name} {case}: probabilities differ by {worst}");
            assert!(same16 >= 0.997, "{name} {case}: float16 nnU-Net {same16}");
            assert!(direct as f64 <= 1e-4 * n as f64);
        }
    }
}
