//! Training as a whole: the same bytes for any number of threads, every time, and wherever it was interrupted.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Map;
use stunet::autograd::{Ctx, Grads};
use stunet::models::{StuNet, StuNetConfig};
use stunet::nn::{self, Module, Optimizer};
use stunet::nnunet::checkpoint::{self, Checkpoint, Origin, TrainingState};
use stunet::nnunet::loss::{Criterion, deep_supervised};
use stunet::ops::{LabelMap, Outputs};
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Precision};

use crate::common::drive::{bits, values};

const CLASSES: usize = 3;
const DIMS: [usize; 5] = [2, 1, 8, 12, 8];

fn net(device: &Device) -> StuNet {
    let strides = [[2, 2, 2], [2, 2, 2], [1, 1, 1], [1, 1, 1], [1, 1, 1]];
    let config = StuNetConfig { dims: [4, 8, 8, 20, 20, 20], ..StuNetConfig::small(1, CLASSES) };
    config.with_strides(strides).build_random(device, 11).unwrap()
}

fn state(step: u64) -> TrainingState {
    let origin = Origin {
        trainer: "STUNetTrainer".into(),
        configuration: "3d_fullres".into(),
        fold: "0".into(),
        plans: Map::new(),
        dataset: Map::new(),
        mirror_axes: None,
    };
    TrainingState { step, ..TrainingState::new(0, origin) }
}

/// Step `number` of a training that is the same each time; returns the loss.
fn step(net: &mut StuNet, optimizer: &mut Optimizer, number: u64, device: &Device) -> f64 {
    step_storing(Precision::F32, net, optimizer, number, device).0
}

/// The same with activations stored in `precision`; returns the bytes kept for the way back, too.
fn step_storing(
    precision: Precision,
    net: &mut StuNet,
    optimizer: &mut Optimizer,
    number: u64,
    device: &Device,
) -> (f64, usize) {
    let [n, _, d, h, w] = DIMS;
    let mut x = values(DIMS.iter().product(), number);
    // Something to learn: where the image is bright.
    let labels: Vec<u16> = x.iter().map(|v| u16::from(*v > 0.0) + u16::from(*v > 0.6)).collect();
    x.iter_mut().for_each(|v| *v *= 2.0);
    let target = LabelMap::new(labels, [n, d, h, w]).unwrap();
    let how = Criterion::DiceCe.loss(Outputs::Labels, None, number % 2 == 1).unwrap();
    let mut grads = Grads::new();
    let outcome = {
        let mut cx = Ctx::train(device).storing(precision);
        let x = cx.leaf(Tensor::from_host(&x, Dims::from(DIMS), device).unwrap());
        let outputs = net.forward_all(&mut cx, x).unwrap();
        let (loss, value) = deep_supervised(&mut cx, outputs, &target, &how).unwrap();
        let kept = cx.saved().iter().filter(|s| s.operation.starts_with("conv3d")).map(|s| s.bytes).sum();
        cx.backward(loss, &mut grads).unwrap();
        (value, kept)
    };
    let mut params = Vec::new();
    net.params_mut(&mut |p| params.push(p));
    optimizer.step(params, &mut grads, 0.01).unwrap();
    outcome
}

fn weights(net: &StuNet) -> Vec<u32> {
    let mut out = Vec::new();
    net.params(&mut |p| out.extend(bits(&nn::values(p).unwrap())));
    out
}

/// Weights after `steps` steps, and the losses.
fn uninterrupted(device: &Device, steps: u64) -> (Vec<u32>, Vec<f64>) {
    let (mut net, mut optimizer) = (net(device), Optimizer::nnunet());
    let losses = (0..steps).map(|i| step(&mut net, &mut optimizer, i, device)).collect();
    (weights(&net), losses)
}

#[test]
fn thirty_steps_are_the_same_for_any_thread_count_and_learn_something() {
    let [a, b, c] = [1, 2, 4].map(|t| uninterrupted(&Device::cpu_with_threads(t).unwrap(), 30));
    let again = uninterrupted(&Device::cpu_with_threads(2).unwrap(), 30);
    assert!(a == b && a == c && a == again);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&a.1[24..]) < mean(&a.1[..6]) - 0.1, "{:?}", a.1);
}

/// Masters and arithmetic stay f32, what is kept is half: the same thing is learnt.
#[test]
fn activations_in_16_bits_are_half_and_learn_the_same() {
    let device = Device::cpu();
    let run = |precision| {
        let (mut net, mut optimizer) = (net(&device), Optimizer::nnunet());
        let step = |i| step_storing(precision, &mut net, &mut optimizer, i, &device);
        let steps: Vec<_> = (0..30).map(step).collect();
        (steps[0].1, steps.iter().map(|s| s.0).collect::<Vec<_>>())
    };
    let (wide, narrow) = (run(Precision::F32), run(Precision::Bf16));
    // The image itself arrives as floats.
    let image = 4 * DIMS.iter().product::<usize>();
    assert_eq!(narrow.0 - image, (wide.0 - image) / 2);
    assert!(wide.1[0] != narrow.1[0], "nothing was rounded");
    let last = |losses: &[f64]| losses[24..].iter().sum::<f64>() / 6.0;
    let learnt = wide.1[..6].iter().sum::<f64>() / 6.0 - last(&wide.1);
    assert!((last(&wide.1) - last(&narrow.1)).abs() < 0.1 * learnt, "{:?} {:?}", wide.1, narrow.1);
}

/// Up to the order in which the gradients of a skip's four readers are added.
#[test]
fn recomputing_changes_no_loss_and_no_step() {
    let device = Device::cpu();
    let before = weights(&net(&device));
    let [plain, again] = [false, true].map(|on| {
        let mut net = net(&device).recomputing(on);
        let loss = step(&mut net, &mut Optimizer::nnunet(), 0, &device);
        (weights(&net), loss)
    });
    assert_eq!(plain.1.to_bits(), again.1.to_bits());
    let square = |a: u32, b: u32| f64::from(f32::from_bits(a) - f32::from_bits(b)).powi(2);
    let distance = |b: &[u32]| plain.0.iter().zip(b).map(|(a, b)| square(*a, *b)).sum::<f64>().sqrt();
    let (error, moved) = (distance(&again.0), distance(&before));
    assert!(error <= 1e-5 * moved, "{error} of {moved}");
}

#[test]
fn resuming_anywhere_changes_no_byte() {
    let device = Device::cpu();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let whole = uninterrupted(&device, 30).0;
    for stop in [1, 7, 16, 29] {
        let (mut first, mut optimizer) = (net(&device), Optimizer::nnunet());
        for i in 0..stop {
            step(&mut first, &mut optimizer, i, &device);
        }
        checkpoint::write(&path, &first, &optimizer, &state(stop)).unwrap();
        let (mut second, mut optimizer, at) = resumed(&path, &device);
        assert_eq!(at, stop);
        for i in at..30 {
            step(&mut second, &mut optimizer, i, &device);
        }
        assert!(weights(&second) == whole, "stopped after {stop}");
    }
}

/// Network, optimizer and step of a checkpoint.
fn resumed(path: &Path, device: &Device) -> (StuNet, Optimizer, u64) {
    let found = Checkpoint::open(path).unwrap();
    assert_eq!(found.warning(), None);
    let mut net = net(device);
    let optimizer = found.restore(&mut net).unwrap();
    (net, optimizer, found.state().step)
}

const CHILD: &str = "STUNET_TEST_TRAINING";

/// A training that writes a checkpoint every step is killed at twenty moments that it does not choose, each time goes
/// on from what it finds, and ends where one that nobody disturbed is after as many steps.
#[cfg(unix)]
#[test]
fn a_killed_training_goes_on_where_it_was() {
    let device = Device::cpu_with_threads(1).unwrap();
    if let Some(path) = std::env::var_os(CHILD) {
        let path = Path::new(&path);
        let (mut net, mut optimizer, first) =
            if path.exists() { resumed(path, &device) } else { (net(&device), Optimizer::nnunet(), 0) };
        for i in first.. {
            step(&mut net, &mut optimizer, i, &device);
            checkpoint::write(path, &net, &optimizer, &state(i + 1)).unwrap();
            println!("step {}", i + 1);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("latest");
    let mut last = 0;
    for wait in values(20, 5) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "training::a_killed_training_goes_on_where_it_was", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        lines.by_ref().find(|l| l.starts_with("step ")).expect("the child trains");
        #[expect(clippy::disallowed_methods, reason = "a moment that the child does not choose is what is tested")]
        std::thread::sleep(std::time::Duration::from_secs_f64(0.03 * (1.0 + f64::from(wait))));
        child.kill().unwrap();
        child.wait().unwrap();
        let at = Checkpoint::open(&path).unwrap().state().step;
        assert!(at > last, "step {at} after {last}");
        last = at;
    }
    let (net, _, at) = resumed(&path, &device);
    assert!(weights(&net) == uninterrupted(&device, at).0, "after {at} steps");
}
