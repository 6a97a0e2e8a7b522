//! 2D configurations: predictions against nnU-Net 2.8.1's, of volumes, pictures and stacks of pages
//! (`tests/fixtures/planar/make.py`).

use std::path::{Path, PathBuf};

use stunet::io::{self, Image};
use stunet::nnunet::cases::Case;
use stunet::nnunet::dataset::Reader;
use stunet::nnunet::model::{ModelOptions, convert, inspect};
use stunet::{Device, PredictOptions, Predictor};

use crate::golden_predict::{f16_tensor, largest_difference, margin};

/// A case's folder, name and ending of its files, channels that have a file, spacing of the image, windows.
type Sample = (&'static str, &'static str, &'static str, usize, [f64; 3], usize);

const CASES: [Sample; 4] = [
    ("volume", "case", ".nii.gz", 2, [1.7, 6.0, 1.1], 6 * 2),
    ("picture", "small", ".png", 1, [999.0, 1.0, 1.0], 4),
    ("picture", "large", ".png", 1, [999.0, 1.0, 1.0], 2 * 2),
    ("stack", "case", ".tif", 1, [2.5, 0.8, 0.6], 5 * 2 * 2),
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/planar").join(name)
}

/// A case's image files.
fn files(name: &str, case: &str, ending: &str, channels: usize) -> Vec<PathBuf> {
    (0..channels).map(|c| fixture(name).join(format!("images/{case}_{c:04}{ending}"))).collect()
}

fn read(name: &str, case: &str, ending: &str, channels: usize, predictor: &Predictor) -> Image {
    Case::from_files(&files(name, case, ending, channels)).unwrap().read(predictor.plan()).unwrap()
}

/// The labels of a file that nnU-Net's writers or ours made.
fn labels(path: &Path) -> Vec<f32> {
    let of = |image: Image| image.channels.concat();
    match path.extension().and_then(|e| e.to_str()) {
        Some("png") => of(io::read_pictures(&[path]).unwrap()),
        Some("tif") => of(io::read_tiff_stacks(&[path], [1.0; 3]).unwrap()),
        _ => io::read_segmentation(path).unwrap().labels.iter().map(f32::from).collect(),
    }
}

#[test]
fn golden_networks_predict_slices() {
    let device = Device::cpu();
    for (name, case, ending, channels, spacing, windows) in CASES {
        let open = || Predictor::open(fixture(name).join("model"), &device).unwrap();
        let (mut plain, mut full) = (open(), open().options(PredictOptions::default().probabilities(true)));
        let image = read(name, case, ending, channels, &plain);
        assert!(image.geometry.spacing_mm.iter().zip(spacing).all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
        let with = full.predict_with(&image, &mut ()).unwrap();
        assert_eq!(with.report.tiles, windows, "{name} {case}");
        let needed = full.memory_needed(&image.geometry, image.channels.len()).unwrap();
        assert!(with.report.peak_tensor_bytes <= needed, "{name}: {} above {needed}", with.report.peak_tensor_bytes);
        let ours = plain.predict(&image).unwrap();
        assert_eq!(ours.labels, with.segmentation.labels, "{name} {case}");

        let expected = fixture(name).join("expected");
        let reference = labels(&expected.join(format!("{case}{ending}")));
        let (shape, p) = f16_tensor(&expected.join(format!("{case}.safetensors")), "probabilities");
        let probabilities = with.probabilities.unwrap();
        assert_eq!((&shape[1..], shape[0]), (&probabilities.shape[..], probabilities.channels));
        let worst = largest_difference(&p, &probabilities.values);
        let n = reference.len();
        assert_eq!(ours.labels.len(), n);
        let differing: Vec<usize> = (0..n).filter(|&i| f32::from(ours.labels.get(i)) != reference[i]).collect();
        let clear = differing.iter().filter(|&&i| margin(&p, n, i, &plain.plan().decision) >= 0.001).count();
        eprintln!(
            "{name} {case}: {} of {n} voxels differ, {clear} clear ones, probabilities {worst:.1e}",
            differing.len()
        );
        assert_eq!(clear, 0, "{name} {case}: voxels with a clear reference differ");
        assert!(differing.len() * 1000 <= n, "{name} {case}: {} of {n} differ", differing.len());
        assert!(worst <= 1e-3, "{name} {case}: probabilities differ by {worst}");

        // The same bytes for any number of threads.
        for threads in [1, 3] {
            let device = Device::cpu_with_threads(threads).unwrap();
            let other = Predictor::open(fixture(name).join("model"), &device).unwrap();
            let mut other = other.options(PredictOptions::default().probabilities(true));
            let again = other.predict_with(&image, &mut ()).unwrap().probabilities.unwrap();
            assert!(again == probabilities, "{name} {case}: {threads} threads");
        }

        // A folder of our own says the same.
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("own");
        convert(fixture(name).join("model"), &own, &ModelOptions::new()).unwrap();
        let mut own = Predictor::open(own, &device).unwrap();
        assert_eq!(own.plan(), plain.plan());
        assert_eq!(own.predict(&image).unwrap().labels, ours.labels);

        // Files of our writers are read as they were written.
        let path = dir.path().join(format!("{case}{ending}"));
        plain.plan().reader.write(&path, &ours).unwrap();
        assert_eq!(labels(&path), ours.labels.iter().map(f32::from).collect::<Vec<_>>());
        if name == "stack" {
            let json = |folder: &Path| -> serde_json::Value {
                serde_json::from_slice(&std::fs::read(folder.join("case.json")).unwrap()).unwrap()
            };
            assert_eq!(json(dir.path()), json(&expected));
        }
    }
}

#[test]
fn planar_models_are_checked_and_told_of() {
    let found = inspect(fixture("volume/model"), &ModelOptions::new()).unwrap();
    assert_eq!((found.patch, found.spacing_mm), ([1, 24, 28], [None, Some(1.5), Some(1.25)]));
    assert_eq!(found.mirror_axes, [1, 2]);
    let dir = tempfile::tempdir().unwrap();
    let changed = |from: &str, to: &str| {
        let model = dir.path().join("model");
        std::fs::create_dir_all(model.join("fold_0")).unwrap();
        for file in ["plans.json", "dataset.json", "fold_0/checkpoint_final.pth"] {
            std::fs::copy(fixture("volume/model").join(file), model.join(file)).unwrap();
        }
        let text = std::fs::read_to_string(model.join("plans.json")).unwrap();
        let text: String = text.split_whitespace().collect();
        assert!(text.contains(from), "{text}");
        std::fs::write(model.join("plans.json"), text.replace(from, to)).unwrap();
        Predictor::open(model, &Device::cpu()).unwrap_err().to_string()
    };
    assert!(changed("\"spacing\":[1.5,1.25]", "\"spacing\":[3,1.5,1.25]").contains("expected two lengths"));
    assert!(changed("\"patch_size\":[24,28]", "\"patch_size\":[28]").contains("1 sizes, expected 2 or 3"));
    let volume = changed("\"patch_size\":[24,28]", "\"patch_size\":[8,24,28]");
    assert!(volume.contains("spacing"), "{volume}");
    assert!(changed("\"patch_size\":[24,28]", "\"patch_size\":[22,28]").contains("patch_size"));

    // An image of another kind than the model's.
    let pictures = Predictor::open(fixture("picture/model"), &Device::cpu()).unwrap();
    assert_eq!(pictures.plan().reader, Reader::NaturalImage2dIo);
    let volume = Case::from_files(&files("volume", "case", ".nii.gz", 1)).unwrap();
    let error = volume.grid(pictures.plan().reader).unwrap_err().to_string();
    assert!(error.contains("case_0000.nii.gz") && error.contains(".png"), "{error}");
}
