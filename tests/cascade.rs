//! Both stages of a cascade against nnU-Net 2.8.1 (tests/fixtures/cascade/make.py).

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use stunet::nnunet::model::preprocess_plan;
use stunet::nnunet::preprocess::{preprocess, preprocess_case};
use stunet::nnunet::store;
use stunet::{Decision, Device, Error, PredictOptions, Prediction, Predictor, io};

use crate::golden_predict::{f16_tensor, largest_difference, margin};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cascade").join(name)
}

fn expected(stage: &str, name: &str) -> Vec<u8> {
    let bytes = std::fs::read(fixture(stage).join("expected.safetensors")).unwrap();
    SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().to_vec()
}

fn predictor(stage: &str) -> Predictor {
    let options = PredictOptions::default().mirroring(false).probabilities(true);
    Predictor::open(fixture(stage), &Device::cpu()).unwrap().options(options)
}

fn check(stage: &str, found: &Prediction) {
    let labels = expected(stage, "labels");
    let (_, p) = f16_tensor(&fixture(stage).join("expected.safetensors"), "probabilities");
    let n = labels.len();
    let worst = largest_difference(&p, &found.probabilities.as_ref().unwrap().values);
    let differing: Vec<usize> = (0..n).filter(|&i| found.segmentation.labels.get(i) != u16::from(labels[i])).collect();
    assert!(worst <= 1e-3, "{stage}: probabilities differ by {worst}");
    assert!(differing.len() * 1000 <= n, "{stage}: {} of {n} differ", differing.len());
    let paint = Decision::Regions { paint: vec![1, 2] };
    assert!(differing.iter().all(|&i| margin(&p, n, i, &paint) < 1e-3), "{stage}: a clear voxel differs");
}

#[test]
fn golden_networks_cascade() {
    let image = io::read_nifti(&[fixture("case_0000.nii.gz")]).unwrap();
    let previous = io::read_segmentation(fixture("previous.nii.gz")).unwrap();
    let mut low = predictor("3d_lowres");
    check("3d_lowres", &low.predict_with(&image, &mut ()).unwrap());
    let mut full = predictor("3d_cascade_fullres");
    let stage = full.plan().previous.clone().unwrap();
    assert_eq!((&*stage.configuration, &*stage.labels, full.plan().inputs()), ("3d_lowres", &[1, 2][..], 3));
    check("3d_cascade_fullres", &full.predict_cascade(&image, &previous, &mut ()).unwrap());

    // What the first stage leaves for the second, on its grid.
    let case = preprocess(&image, low.plan()).unwrap();
    let next =
        preprocess_plan(&fixture("3d_lowres/plans.json"), &fixture("3d_lowres/dataset.json"), "3d_cascade_fullres");
    let fine = preprocess_case(&image, &previous, &next.unwrap().0, &[]).unwrap();
    let shapes = [fine.image.shape, case.shape];
    let (own, stages) = low.predict_stages(case, image.geometry.clone(), &shapes, &mut ()).unwrap();
    check("3d_lowres", &own);
    let wanted = expected("3d_lowres", "next_stage");
    let differing = (0..wanted.len()).filter(|&i| stages[0].get(i) != u16::from(wanted[i])).count();
    assert_eq!(stages[0].len(), wanted.len());
    assert!(differing * 1000 <= wanted.len(), "{differing} of {} voxels", wanted.len());
    assert_eq!(stages[1].len(), shapes[1].iter().product::<usize>());

    // nnU-Net's files of them are read.
    let dir = tempfile::tempdir().unwrap();
    store::write_case(dir.path(), "case", &fine, &image.geometry, "x").unwrap();
    let stored = store::open(dir.path()).unwrap();
    let read = |folder: &Path| {
        let case = stored.clone().with_previous_stage(folder, &[1, 2]).case("case").unwrap();
        let n = wanted.len();
        let (mut data, mut labels) = (vec![0.0; n], vec![0; 2 * n]);
        case.crop([0; 3], fine.image.shape, &mut data, &mut labels).unwrap();
        labels[n..].iter().map(|&l| u8::try_from(l).unwrap()).collect::<Vec<u8>>()
    };
    for ending in ["npz", "b2nd"] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(&format!("next_stage.{ending}")), folder.path().join(format!("case.{ending}"))).unwrap();
        assert!(read(folder.path()) == wanted, "{ending}");
    }
}

#[test]
fn a_second_stage_needs_the_first_and_only_a_second_stage_takes_it() {
    let image = io::read_nifti(&[fixture("case_0000.nii.gz")]).unwrap();
    let mut previous = io::read_segmentation(fixture("previous.nii.gz")).unwrap();
    let (mut low, mut full) = (predictor("3d_lowres"), predictor("3d_cascade_fullres"));
    let usage = |r: Result<Prediction, Error>| match r.unwrap_err() {
        Error::Usage { what } => what,
        e => panic!("{e}"),
    };
    assert!(usage(full.predict_with(&image, &mut ())).contains("3d_lowres"));
    assert!(usage(low.predict_cascade(&image, &previous, &mut ())).contains("no cascade"));
    // A converted model is the same cascade.
    let dir = tempfile::tempdir().unwrap();
    let options = stunet::nnunet::model::ModelOptions::new();
    stunet::nnunet::model::convert(fixture("3d_cascade_fullres"), dir.path().join("own"), &options).unwrap();
    let own = Predictor::open(dir.path().join("own"), &Device::cpu()).unwrap();
    assert_eq!(own.plan().previous, full.plan().previous);
    previous.geometry.shape[0] -= 1;
    let wrong = full.predict_cascade(&image, &previous, &mut ()).unwrap_err();
    assert!(matches!(&wrong, Error::Input { what } if what.contains("one grid")), "{wrong}");
}
