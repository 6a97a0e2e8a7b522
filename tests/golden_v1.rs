//! A STU-Net in the published (nnU-Net v1) form: voxels and softmax against nnU-Net 1.7.1.

use std::path::Path;

use safetensors::SafeTensors;
use stunet::{Device, PredictOptions, Predictor, io};

use crate::common::shared;
use crate::golden_predict::{cases, f16_tensor, largest_difference};

const MODEL: &str = "Task101_TotalSegmentator/STUNetTrainer_small__nnUNetPlansv2.1";

fn compare(folder: &str, mirroring: bool) {
    let (Some(root), Some(data)) = (shared("golden/stunet_v1"), shared("data")) else { return };
    let options = PredictOptions::default().mirroring(mirroring);
    let mut predictor = Predictor::open(root.join(MODEL), &Device::cpu()).unwrap().options(options);
    let mut smallest: Option<(usize, io::Image, io::Segmentation)> = None;
    for case in cases(&root.join(folder)) {
        let file = ["ct", "mr"].map(|d| data.join(d).join(format!("{case}.nii.gz"))).into_iter().find(|p| p.exists());
        let image = io::read_nifti(&[file.unwrap()]).unwrap();
        let (ours, grid) = predictor.predict_with_scores(&image).unwrap();
        let reference = io::read_segmentation(root.join(folder).join(format!("{case}.nii.gz"))).unwrap();
        let n = ours.labels.len();
        assert_eq!(n, reference.labels.len());
        if smallest.as_ref().is_none_or(|(least, ..)| n < *least) {
            smallest = Some((n, image, ours.clone()));
        }
        let equal = (0..n).filter(|&i| ours.labels.get(i) == reference.labels.get(i)).count() as f64 / n as f64;

        let side = root.join(folder).join(format!("{case}.safetensors"));
        let (shape, softmax) = f16_tensor(&side, "softmax");
        let first = first_slice(&side);
        let [nz, ny, nx] = grid.shape;
        assert_eq!([shape[0], shape[2], shape[3]], [grid.channels, ny, nx]);
        assert_eq!(softmax.len(), shape.iter().product::<usize>());
        let mut differences = Vec::new();
        for c in 0..shape[0] {
            for z in 0..shape[1] {
                let a = &softmax[(c * shape[1] + z) * ny * nx..][..ny * nx];
                let b = &grid.values[(c * nz + first + z) * ny * nx..][..ny * nx];
                differences.push(largest_difference(a, b));
            }
        }
        let worst = largest_difference(&differences, &vec![0.0; differences.len()]);
        eprintln!("{folder} {case}: {:.4} % of voxels equal, softmax {worst:.1e}", 100.0 * equal);
        assert!(equal >= 0.999, "{folder} {case}: {equal}");
        assert!(worst <= 2e-3, "{folder} {case}: softmax differs by {worst}");
    }
    // Streamed, plane by plane, as every ordinary prediction is.
    let (_, image, whole) = smallest.unwrap();
    assert_eq!(predictor.predict(&image).unwrap().labels, whole.labels);
}

fn first_slice(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    i64::from_le_bytes(file.tensor("first_slice").unwrap().data().try_into().unwrap()) as usize
}

#[test]
fn golden_v1_voxels() {
    compare("predictions", false);
}

#[test]
fn golden_v1_mirrored() {
    compare("predictions_tta", true);
}
