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

/// What is said of a copy of the first stage by another trainer, or the axes that it mirrors.
fn by_trainer(trainer: &str) -> Result<Vec<usize>, String> {
    let dir = tempfile::tempdir().unwrap();
    let file = "model_final_checkpoint.model";
    std::fs::copy(fixture("3d_lowres").join("fold_0").join(file), dir.path().join(file)).unwrap();
    let path = dir.path().join(format!("{file}.pkl"));
    let bytes = std::fs::read(fixture("3d_lowres").join("fold_0").join(format!("{file}.pkl"))).unwrap();
    std::fs::write(&path, renamed(&bytes, "nnUNetTrainerV2", trainer)).unwrap();
    let model = ModelFolder::open(dir.path().join(file), &ModelOptions::new());
    model.map(|m| m.plan.mirror_axes).map_err(|e| e.to_string())
}

/// A pickle with another text in the place of the first that is `from`: opcode, length and text of protocol 4, frames left out.
fn renamed(pickle: &[u8], from: &str, to: &str) -> Vec<u8> {
    let text = |s: &str| [&[0x8c, u8::try_from(s.len()).unwrap()], s.as_bytes()].concat();
    let (from, to) = (text(from), text(to));
    let at = pickle.windows(from.len()).position(|w| w == from).unwrap();
    let mut out = [&pickle[..at], &to, &pickle[at + from.len()..]].concat();
    // PROTO 4, then FRAME and the bytes in it, of which there is one.
    assert_eq!(out[..3], [0x80, 4, 0x95]);
    let framed = (out.len() - 11) as u64;
    out[3..11].copy_from_slice(&framed.to_le_bytes());
    out
}

/// What cannot be seen in weights is told from names: those of nnU-Net 1.7.1's trainers.
#[test]
fn trainers_of_v1_are_known_or_refused() {
    let all = Ok(vec![0, 1, 2]);
    for trainer in [
        "nnUNetTrainer",
        "nnUNetTrainerV2",
        "nnUNetTrainerV2_DA5",
        "nnUNetTrainerV2_Loss_DiceTopK10",
        "nnUNetTrainerV2_lReLU_biasInSegOutput",
        "nnUNetTrainerV2_insaneDA",
        "nnUNetTrainerV2_fp32",
    ] {
        assert_eq!(by_trainer(trainer), all, "{trainer}");
    }
    for trainer in ["nnUNetTrainerNoDA", "nnUNetTrainerV2_noMirroring", "nnUNetTrainerV2_noDataAugmentation"] {
        assert_eq!(by_trainer(trainer), Ok(Vec::new()), "{trainer}");
    }
    // Other nonlinearities, another order, group norms, sigmoids, and somebody's own.
    for trainer in [
        "nnUNetTrainerV2_ReLU",
        "nnUNetTrainerV2_ReLU_convReLUIN",
        "nnUNetTrainerV2_lReLU_convReLUIN",
        "nnUNetTrainerV2_LReLU_slope_2en1",
        "nnUNetTrainerV2_GeLU",
        "nnUNetTrainerV2_Mish",
        "nnUNetTrainerV2_GN",
        "nnUNetTrainerV2BraTSRegions",
        "nnUNetTrainerV2_ofMine",
        "STUNetTrainer_base",
    ] {
        let error = by_trainer(trainer).unwrap_err();
        assert!(error.contains(trainer) && error.contains("1.7.1") && !error.contains('\n'), "{error}");
    }
    // Its kernels are others than the plans'; another has labels as inputs; of this one the stage is another argument.
    assert!(by_trainer("nnUNetTrainerV2_allConv3x3").unwrap_err().contains("conv_kernel_sizes"));
    assert!(
        by_trainer("nnUNetTrainerV2CascadeFullRes_shorter").unwrap_err().contains("2 input channels, the plan has 4")
    );
    assert!(by_trainer("nnUNetTrainerV2_DDP").unwrap_err().contains("init"));
}

/// Plans from before they had kernels and strides.
#[test]
fn old_plans_of_v1() {
    let dir = tempfile::tempdir().unwrap();
    let file = "model_final_checkpoint.model";
    std::fs::copy(fixture("2d").join("fold_0").join(file), dir.path().join(file)).unwrap();
    let bytes = std::fs::read(fixture("2d").join("fold_0").join(format!("{file}.pkl"))).unwrap();
    let open = |bytes: &[u8]| {
        std::fs::write(dir.path().join(format!("{file}.pkl")), bytes).unwrap();
        ModelFolder::open(dir.path().join(file), &ModelOptions::new()).map(drop).map_err(|e| e.to_string())
    };
    assert_eq!(open(&bytes), Ok(()));
    // One pooling of each axis and three voxels along each: not the network that is there.
    let without = |key: &str| renamed(&bytes, key, "unknown");
    let error = open(&without("pool_op_kernel_sizes")).unwrap_err();
    assert!(error.contains("pool_op_kernel_sizes [[1, 2, 2]], the network has [[1, 2, 2], [1, 2, 1]]"), "{error}");
    let error = open(&without("conv_kernel_sizes")).unwrap_err();
    assert!(error.contains("conv_kernel_sizes [[1, 3, 3], [1, 3, 3]], the network has"), "{error}");
    let error = open(&renamed(&bytes, "PreprocessorFor2D", "PreprocessorFor3D_NoResampling")).unwrap_err();
    assert!(error.contains("PreprocessorFor3D_NoResampling") && error.contains("PreprocessorFor2D is"), "{error}");
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
