//! What a step takes, as a rehearsal tells it and as steps take it, and what follows for recomputation.

use std::path::Path;

use serde_json::{Value, json};
use stunet::nnunet::train::{NetworkChoice, Recompute, Start, TrainOptions, Trainer, TrainingPlan, step_bytes};
use stunet::{Device, Error, Precision, Result};

use crate::train::{Noise, PATCH, labels, options, parameters, plans, write_json};

/// A folder with plans for one of nnU-Net's networks.
fn folder(residual: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = plans(folder.path(), &labels(), 1);
    if residual {
        let mut plans: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let network = &mut plans["configurations"]["3d_fullres"]["architecture"];
        network["network_class_name"] = json!("dynamic_network_architectures.architectures.unet.ResidualEncoderUNet");
        network["arch_kwargs"]["n_blocks_per_stage"] = json!([1, 2, 1]);
        network["arch_kwargs"].as_object_mut().unwrap().remove("n_conv_per_stage");
        write_json(&path, &plans);
    }
    folder
}

fn plan(folder: &Path, patch: [usize; 3]) -> TrainingPlan {
    let plan = TrainingPlan::read(&folder.join("nnUNetPlans.json"), "3d_fullres").unwrap();
    plan.with_sizes(Some(patch), None).unwrap()
}

fn begin(folder: &Path, patch: [usize; 3], how: &TrainOptions, start: Start, device: &Device) -> Result<Trainer> {
    let fold = folder.join(how.trainer_name()).join("fold_0");
    Trainer::new(plan(folder, patch), how.clone(), start, &fold, "0", Noise::of(1, patch, None), device)
}

/// Holds a rehearsal against two steps, of which the second finds what the first has left; returns the bytes of each way and
/// the parameters after the first step.
fn held(
    how: &TrainOptions,
    residual: bool,
    patch: [usize; 3],
    device: &dyn Fn() -> Device,
) -> [(usize, Vec<Vec<f32>>); 2] {
    [Recompute::Never, Recompute::Always].map(|recompute| {
        let (folder, device) = (folder(residual), device());
        let mut how = how.clone();
        how.recompute = recompute;
        let on = recompute == Recompute::Always;
        let needs = step_bytes(&plan(folder.path(), patch), &how, on, &device).unwrap();
        assert_eq!(device.memory().peak, 0, "a rehearsal has memory of its own");
        let mut t = begin(folder.path(), patch, &how, Start::New, &device).unwrap();
        t.step().unwrap();
        let moved = parameters(&t);
        t.step().unwrap();
        let peak = device.memory().peak;
        println!("{} {:?} {recompute:?}: {needs} rehearsed, {peak} taken", t.network().name(), how.precision);
        // A little more where a step asks for pieces that are there already, which may be a quarter too large.
        assert!(needs >= peak && needs as f64 <= 1.25 * peak as f64, "{recompute:?}: {needs} rehearsed, {peak} taken");
        (needs, moved)
    })
}

#[test]
fn a_rehearsal_knows_what_a_step_takes() {
    let cpu = || Device::cpu_with_threads(2).unwrap();
    let of = |network, residual, precision| {
        let mut how = options(network);
        how.precision = precision;
        let [(plain, a), (again, b)] = held(&how, residual, PATCH, &cpu);
        assert!(again < plain, "{again} with recomputation, {plain} without");
        // Up to the order in which the gradients of a skip's readers are added.
        let distance = |f: &dyn Fn(f64, f64) -> f64| {
            let both = a.iter().flatten().zip(b.iter().flatten());
            both.map(|(a, b)| f(f64::from(*a), f64::from(*b)).powi(2)).sum::<f64>().sqrt()
        };
        assert!(distance(&|a, b| a - b) <= 1e-5 * distance(&|a, _| a));
    };
    of(NetworkChoice::Planned, false, Precision::F32);
    of(NetworkChoice::Planned, true, Precision::Bf16);
    of(NetworkChoice::StuNetTiny, false, Precision::F32);
}

#[cfg(feature = "cuda")]
#[test]
fn cuda_train_rehearsal_knows_what_a_step_takes() {
    let sim = || Device::on(std::sync::Arc::new(crate::kernels::Sim::of(0, [8, 6])), "sim".into());
    let mut how = options(NetworkChoice::Planned);
    how.precision = Precision::F16;
    held(&how, true, [4, 4, 8], &sim);
}

#[test]
fn recomputation_is_chosen_where_nothing_else_fits_and_kept() {
    let (folder, how) = (folder(false), options(NetworkChoice::Planned));
    let cpu = |limit: Option<usize>| {
        let device = Device::cpu_with_threads(1).unwrap();
        device.set_memory_limit(limit);
        device
    };
    let bytes = |on| step_bytes(&plan(folder.path(), PATCH), &how, on, &cpu(None)).unwrap();
    let (plain, again) = (bytes(false), bytes(true));
    let fold = folder.path().join(how.trainer_name());
    let begin = |how: &TrainOptions, start, limit| begin(folder.path(), PATCH, how, start, &cpu(limit));
    let says = |t: &Trainer, what: &str| {
        let lines = t.summary();
        assert!(lines.iter().any(|l| l.starts_with("memory: ") && l.contains(what)), "{lines:?}");
    };

    // Too little for either: nothing is written.
    let e = begin(&how, Start::New, Some(again - 1)).err().unwrap();
    assert!(matches!(e, Error::OutOfMemory { .. }) && e.to_string().contains("also with recomputation"), "{e}");
    assert!(!fold.exists());
    // Without a limit, and with enough.
    says(&begin(&how, Start::New, None).unwrap(), "no stage runs twice");
    says(&begin(&how, Start::New, Some(plain)).unwrap(), "no stage runs twice: a step takes ");
    // What was promised is kept.
    let mut t = begin(&how, Start::New, Some(plain - 1)).unwrap();
    says(&t, "stages run again on the way back: a step takes ");
    t.step().unwrap();
    t.step().unwrap();
    t.save().unwrap();
    t.step().unwrap();
    // Gone on with on a machine that has room for more: as before, to the byte.
    let mut resumed = begin(&how, Start::Continue, None).unwrap();
    says(&resumed, "stages run again");
    resumed.step().unwrap();
    assert!(parameters(&resumed) == parameters(&t), "other bytes after a stop");

    // The other way round it is not possible, but with other bits.
    begin(&how, Start::Afresh, None).unwrap().save().unwrap();
    let e = begin(&how, Start::Continue, Some(plain - 1)).err().unwrap();
    assert!(e.to_string().contains("go on with --recompute=always"), "{e}");
    let mut always = how.clone();
    always.recompute = Recompute::Always;
    begin(&always, Start::Continue, Some(plain - 1)).unwrap().step().unwrap();
}
