//! The same inputs give the same bytes: for any number of threads, and every time.

use std::path::Path;

use sha2::{Digest, Sha256};
use stunet::phantom::Phantom;
use stunet::{Device, PredictOptions, Predictor, io};

use crate::common::nnunet::Model;

/// Sums of the files of a prediction: labels, and labels of a run that also makes probabilities.
fn sums(threads: usize, model: &Path, out: &Path) -> Vec<String> {
    let device = Device::cpu_with_threads(threads).unwrap();
    // Resampled to 43 x 32 x 43 voxels: four windows, each flipped in eight ways.
    let (image, _) = Phantom::new(5).with_grid([24, 18, 24], [2.7, 2.7, 2.7]).unwrap().render();
    [false, true]
        .map(|probabilities| {
            let options = PredictOptions::default().step_size(0.7).probabilities(probabilities);
            let opened = Predictor::open(model, &device).unwrap();
            let prediction = opened.options(options).predict_with(&image, &mut ()).unwrap();
            let file = out.join(format!("{threads}_{probabilities}.nii.gz"));
            io::write_nifti(&file, &prediction.segmentation).unwrap();
            let mut sum = Sha256::new();
            sum.update(std::fs::read(&file).unwrap());
            for v in prediction.probabilities.iter().flat_map(|p| &p.values) {
                sum.update(v.to_le_bytes());
            }
            sum.finalize().iter().map(|b| format!("{b:02x}")).collect()
        })
        .to_vec()
}

#[test]
fn predictions_are_the_same_for_any_thread_count() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    Model::ct().write(&model, &["fold_0"]);
    let first = sums(1, &model, folder.path());
    assert_ne!(first[0], first[1]);
    for threads in [1, 2, 7] {
        assert_eq!(sums(threads, &model, folder.path()), first, "{threads} threads");
    }
}
