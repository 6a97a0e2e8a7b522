//! Networks of nnU-Net 1's own against nnU-Net 1.7.1 (tests/fixtures/v1/make.py): a 2D one, a 3D one of two stages, and the
//! second stage of a cascade.

use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::SafeTensors;
use stunet::models::{UnetConfig, UnetKind};
use stunet::nnunet::model::{Architecture, ModelFolder, ModelOptions, convert};
use stunet::{Decision, Device, Image, PredictOptions, Prediction, Predictor, io};

use crate::golden_predict::{f16_tensor, largest_difference, margin};

const MODELS: [&str; 3] = ["2d", "3d_lowres", "3d_cascade_fullres"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1").join(name)
}

fn image() -> Image {
    io::read_nifti(&[fixture("case_0000.nii.gz"), fixture("case_0001.nii.gz")]).unwrap()
}

fn predict(model: impl AsRef<Path>, mirroring: bool) -> Prediction {
    let options = PredictOptions::default().mirroring(mirroring).probabilities(true);
    let mut predictor = Predictor::open(model, &Device::cpu()).unwrap().options(options);
    if predictor.plan().previous.is_none() {
        return predictor.predict_with(&image(), &mut ()).unwrap();
    }
    let previous = io::read_segmentation(fixture("previous.nii.gz")).unwrap();
    predictor.predict_cascade(&image(), &previous, &mut ()).unwrap()
}

/// Label maps of nnU-Net are those of the whole image, its probabilities those of the nonzero region.
#[test]
fn golden_networks_v1() {
    for name in MODELS {
        let path = fixture(name).join("expected.safetensors");
        let (_, p) = f16_tensor(&path, "softmax");
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (tensor, mirroring) in [("labels", true), ("labels_without_mirroring", false)] {
            let found = predict(fixture(name), mirroring);
            let labels = file.tensor(tensor).unwrap().data();
            let differing =
                (0..labels.len()).filter(|&i| found.segmentation.labels.get(i) != u16::from(labels[i])).count();
            eprintln!("{name} {tensor}: {differing} of {} voxels differ", labels.len());
            assert!(differing * 1000 <= labels.len(), "{name} {tensor}: {differing} of {} differ", labels.len());
            if !mirroring {
                continue;
            }
            let probabilities = found.probabilities.unwrap();
            assert_eq!((probabilities.shape, probabilities.channels), ([16, 26, 21], 3));
            let worst = largest_difference(&p, &probabilities.values);
            assert!(worst <= 1e-3, "{name}: probabilities differ by {worst}");
            // Where nnU-Net's are clear, so are ours.
            let n: usize = probabilities.shape.iter().product();
            let best = |p: &[f32], i: usize| (0..3).max_by(|&a, &b| p[a * n + i].total_cmp(&p[b * n + i]));
            let clear = |&i: &usize| margin(&p, n, i, &Decision::Argmax) >= 1e-3;
            assert!((0..n).filter(clear).all(|i| best(&p, i) == best(&probabilities.values, i)), "{name}");
        }
    }
}

/// What the weights tell is what the plans say; a converted model is the same one.
#[test]
fn networks_of_v1_are_told_from_their_weights() {
    for (name, strides, kernels) in [
        ("2d", vec![[1, 2, 2], [1, 2, 1]], vec![[1, 3, 3], [1, 3, 1], [1, 3, 3]]),
        ("3d_lowres", vec![[1, 2, 2], [2, 2, 2]], vec![[1, 3, 3], [3, 1, 3], [3, 3, 3]]),
        ("3d_cascade_fullres", vec![[2, 2, 2], [1, 2, 1]], vec![[1, 3, 3], [3, 3, 3], [3, 3, 1]]),
    ] {
        let model = ModelFolder::open(fixture(name), &ModelOptions::new()).unwrap();
        let cascade = name.contains("cascade");
        let Architecture::Unet(found) = &model.architecture else { panic!("{name}") };
        let expected = UnetConfig {
            kind: UnetKind::Generic,
            in_channels: if cascade { 4 } else { 2 },
            classes: 3,
            features: vec![4, 8, 16],
            kernels,
            strides: [vec![[1; 3]], strides].concat(),
            depth: vec![2; 3],
            decoder_depth: vec![2; 2],
            conv_bias: true,
            head_bias: false,
            planar: name == "2d",
        };
        assert_eq!(found, &expected, "{name}");
        let plan = &model.plan;
        assert_eq!((&*plan.configuration, plan.is_planar(), plan.previous.is_some()), (name, name == "2d", cascade));
        assert_eq!(plan.mirror_axes, if name == "2d" { vec![1, 2] } else { vec![0, 1, 2] });

        let dir = tempfile::tempdir().unwrap();
        convert(fixture(name), dir.path().join("own"), &ModelOptions::new()).unwrap();
        let own = ModelFolder::open(dir.path().join("own"), &ModelOptions::new()).unwrap();
        assert_eq!((&own.plan, &own.architecture), (plan, &model.architecture), "{name}");
        let (a, b) = (predict(fixture(name), false), predict(dir.path().join("own"), false));
        assert_eq!(a.segmentation.labels, b.segmentation.labels, "{name}");
    }
}

/// A copy of a model whose text `from`, in its description, is `to`, of the same length.
fn changed(name: &str, from: &str, to: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let fold = dir.path().join("fold_0");
    std::fs::create_dir(&fold).unwrap();
    let file = "model_final_checkpoint.model";
    std::fs::copy(fixture(name).join("fold_0").join(file), fold.join(file)).unwrap();
    let pkl = format!("{file}.pkl");
    let mut bytes = std::fs::read(fixture(name).join("fold_0").join(&pkl)).unwrap();
    let at: Vec<usize> = (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from.as_bytes())).collect();
    assert!(!at.is_empty() && from.len() == to.len());
    at.into_iter().for_each(|i| bytes[i..i + to.len()].copy_from_slice(to.as_bytes()));
    std::fs::write(fold.join(pkl), bytes).unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}

/// What cannot be seen in weights is told from names, and refused.
#[test]
fn other_networks_of_v1_are_refused() {
    let open = |(_dir, path): (tempfile::TempDir, PathBuf)| ModelFolder::open(path, &ModelOptions::new());
    for (from, to, word) in [
        ("nnUNetTrainerV2", "nnUNetTrainer_GN", "another kind of layers"),
        ("nnUNetTrainerV2", "nnUNetTrainerGeLU", "another kind of layers"),
        ("GenericPreprocessor", "GenericPreprocessoX", "GenericPreprocessor is"),
    ] {
        let to = &to[to.len() - from.len()..];
        let error = open(changed("3d_lowres", from, to)).unwrap_err().to_string();
        assert!(error.contains(word) && !error.contains('\n'), "{error}");
    }
    // The first stage is named, and the same files under the name of another trainer fit.
    assert!(open(changed("3d_lowres", "nnUNetTrainerV2", "nnUNetTrainerXX")).is_ok());
}

#[test]
fn both_stages_on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let (images, low, full) = (dir.path().join("images"), dir.path().join("low"), dir.path().join("full"));
    std::fs::create_dir(&images).unwrap();
    for name in ["case_0000.nii.gz", "case_0001.nii.gz"] {
        std::fs::copy(fixture(name), images.join(name)).unwrap();
    }
    let run = |model: &str, out: &Path, more: &[&Path]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stunet"));
        command.args(["predict", "--no-progress", "-m"]).arg(fixture(model)).arg("-i").arg(&images).arg("-o").arg(out);
        let done = command.args(more).output().unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    assert_eq!(run("3d_lowres", &low, &[]).0, Some(0));
    // As nnU-Net 1 spells it.
    let (code, said) = run("3d_cascade_fullres", &full, &[Path::new("-l"), &low]);
    assert_eq!(code, Some(0), "{said}");
    assert!(full.join("case.nii.gz").is_file());
    let (code, said) = run("3d_cascade_fullres", &full, &[]);
    assert!(code == Some(2) && said.contains("3d_lowres"), "{code:?} {said}");
}
