//! The f64 reference against the reference data, which are float64 rounded to float32.

use std::collections::BTreeMap;

use super::loss::Dice;
use super::net::Pass;
use super::sgd::{Sgd, clip, poly_lr};
use super::tape::{Array, Gradients, Tape, Var, sum};
use crate::common::golden_train::{self, GoldenLoss, GoldenTrain, NETWORKS};

/// Rounding to float32 moves each number by at most 2^-24 of itself; the rest is for float64 on both sides.
const ROUNDED: f64 = 2e-7;
/// Losses are stored as they were computed.
const EXACT: f64 = 1e-12;

pub fn norm(x: impl IntoIterator<Item = f64>) -> f64 {
    sum(x.into_iter().map(|v| v * v)).sqrt()
}

/// Norm of the difference / norm of the truth.
fn distance(got: &[f64], truth: &[f32]) -> f64 {
    assert_eq!(got.len(), truth.len());
    let truth = || truth.iter().map(|t| f64::from(*t));
    let difference = norm(got.iter().zip(truth()).map(|(g, t)| g - t));
    if difference == 0.0 { 0.0 } else { difference / norm(truth()) }
}

fn near(what: &str, got: &[f64], truth: &[f32]) {
    let d = distance(got, truth);
    assert!(d <= ROUNDED, "{what}: {d:e} from the truth");
}

fn equal(what: &str, got: f64, truth: f64) {
    assert!((got - truth).abs() <= EXACT * truth.abs(), "{what}: {got}, expected {truth}");
}

/// Sizes of an array of up to five axes: one number per channel is `[C]` in a file.
pub fn array(a: &golden_train::Array<f32>) -> Array {
    let mut dims = [1; 5];
    dims[..a.shape.len()].copy_from_slice(&a.shape);
    Array::new(dims, a.to_f64())
}

/// Forward pass and loss of a step.
pub struct Forward {
    pub tape: Tape,
    pub pass: Pass,
    pub loss: Var,
}

impl Forward {
    /// Of step `step` with these parameters instead of its own.
    pub fn run(golden: &GoldenTrain, step: usize, parameters: &BTreeMap<String, Array>) -> Self {
        let (s, targets, mut tape) = (&golden.settings, &golden.targets[step], Tape::default());
        let pass = Pass::run(&mut tape, s.kind, &s.strides, parameters, array(&golden.inputs[step]));
        assert_eq!(pass.outputs.len(), targets.len(), "{}: outputs", golden.name);
        let dice = Dice { batch: s.batch_dice, background: s.do_bg, smooth: s.dice_smooth };
        let pairs = pass.outputs.iter().zip(targets);
        let losses: Vec<_> = pairs.map(|(y, t)| tape.dice_ce(*y, &t.values, dice, None)).collect();
        let loss = tape.weighted_sum(&losses, &s.ds_weights);
        Self { tape, pass, loss }
    }

    /// The loss.
    pub fn value(&self) -> f64 {
        self.tape.value(self.loss).values[0]
    }

    /// Those by the parameters that the loss reaches.
    pub fn by_parameter(&self, all: &Gradients) -> BTreeMap<String, Vec<f64>> {
        let of = |(n, v): (&String, &Var)| all.of(*v).map(|g| (n.clone(), g.to_vec()));
        self.pass.parameters.iter().filter_map(of).collect()
    }
}

/// Gradients of the first step; those of biases that a norm takes away again against what rounding leaves of them.
fn check_gradients(golden: &GoldenTrain, tape: &Tape, pass: &Pass, all: &Gradients, ours: &BTreeMap<String, Vec<f64>>) {
    let name = &golden.name;
    assert!(ours.keys().eq(golden.gradients.keys()), "{name}: which parameters have a gradient");
    let mut zero = BTreeMap::new();
    for c in &pass.cancelled {
        // A loss that does not reach the norm does not reach the bias either.
        if let Some(dy) = all.of(c.y) {
            zero.insert(&c.bias, tape.norm_gradient_rounding(c.x, c.gain, dy));
        }
    }
    for (parameter, truth) in &golden.gradients {
        let got = &ours[parameter];
        match zero.get(parameter) {
            None => near(&format!("{name}: gradient of {parameter}"), got, &truth.values),
            Some(limits) => {
                for (g, limit) in got.iter().zip(limits) {
                    assert!(g.abs() <= *limit, "{name}: {g:e} for 0 in {parameter}, at most {limit:e}");
                }
            }
        }
    }
    assert!(zero.keys().all(|bias| ours.contains_key(*bias)));
}

fn train(k: usize) {
    let Some(golden) = GoldenTrain::read(k) else { return };
    let (s, name) = (&golden.settings, &golden.name);
    let mut parameters: BTreeMap<String, Array> = golden.before.iter().map(|(n, a)| (n.clone(), array(a))).collect();
    let mut sgd = Sgd::new(s.weight_decay, s.momentum, s.nesterov);
    for (i, step) in golden.steps.iter().enumerate() {
        let forward = Forward::run(&golden, i, &parameters);
        equal(&format!("{name}: loss {i}"), forward.value(), step.loss);

        let all = forward.tape.backward(forward.loss);
        let mut gradients = forward.by_parameter(&all);
        let Forward { tape, pass, .. } = &forward;
        if i == 0 {
            for (k, (y, truth)) in pass.outputs.iter().zip(&golden.outputs).enumerate() {
                assert_eq!(tape.value(*y).dims, truth.shape[..], "{name}: output {k}");
                near(&format!("{name}: output {k}"), &tape.value(*y).values, &truth.values);
            }
            check_gradients(&golden, tape, pass, &all, &gradients);
        }
        equal(&format!("{name}: gradient norm {i}"), clip(&mut gradients, s.clip), step.grad_norm);
        let lr = poly_lr(golden.steps[0].lr, step.epoch, 1000);
        equal(&format!("{name}: learning rate {i}"), lr, step.lr);
        sgd.step(&mut parameters, &gradients, lr);
    }
    assert!(parameters.keys().eq(golden.after.keys()), "{name}: parameters");
    for (parameter, truth) in &golden.after {
        near(&format!("{name}: {parameter} after the last step"), &parameters[parameter].values, &truth.values);
    }
}

// One test each, so that they run side by side.
#[test]
fn golden_train_reference_net_0() {
    train(0);
}

#[test]
fn golden_train_reference_net_1() {
    train(1);
}

#[test]
fn golden_train_reference_net_2() {
    train(2);
}

#[test]
fn golden_train_reference_net_3() {
    train(3);
}

#[test]
fn golden_train_reference_net_4() {
    train(4);
}

#[test]
fn golden_train_reference_losses() {
    let Some(losses) = GoldenLoss::read_all() else { return };
    for (k, golden) in losses.iter().enumerate() {
        let mut tape = Tape::default();
        let x = tape.parameter(array(&golden.logits));
        let dice = Dice { batch: golden.batch_dice, background: golden.regions, smooth: 1e-5 };
        let loss = if golden.regions {
            tape.dice_bce(x, &golden.target.values, dice, golden.ignore_channel)
        } else {
            tape.dice_ce(x, &golden.target.values, dice, golden.ignore_label)
        };
        equal(&format!("loss {k}"), tape.value(loss).values[0], golden.loss);
        near(&format!("gradient of loss {k}"), tape.backward(loss).of(x).unwrap(), &golden.gradient.values);
    }
}

/// The reader gives every network whole: each array has the sizes that the settings say, and PyTorch's own errors,
/// which others are judged by, are there for each and no larger than float32 and a kink now and then explain.
#[test]
fn golden_train_reference_data_are_whole() {
    for golden in (0..NETWORKS).map_while(GoldenTrain::read) {
        let (s, t, name) = (&golden.settings, &golden.torch, &golden.name);
        let patch = [s.batch, s.input_channels, s.shape[0], s.shape[1], s.shape[2]];
        assert!(golden.inputs.iter().all(|x| x.shape == patch), "{name}: inputs");
        assert_eq!(golden.targets.len(), golden.steps.len(), "{name}");
        assert_eq!([s.ds_weights.len(), golden.outputs.len()], [s.strides.len(); 2], "{name}");
        for (i, y) in golden.outputs.iter().enumerate() {
            assert_eq!(y.shape[..2], [s.batch, s.classes], "{name}: output {i}");
            for target in &golden.targets {
                assert_eq!((target[i].shape[1], &target[i].shape[2..]), (1, &y.shape[2..]), "{name}: target {i}");
                assert!(target[i].values.iter().all(|l| usize::from(*l) < s.classes), "{name}: target {i}");
            }
        }
        assert_eq!(s.arch.features.len(), s.strides.len() + 1, "{name}");
        let blocks =
            golden.before.keys().filter(|n| n.starts_with("conv_blocks_context.0.") && n.ends_with(".conv1.weight"));
        assert!(s.kind != golden_train::Kind::StuNet || blocks.count() == s.arch.depth, "{name}: blocks");

        assert_eq!(t.outputs.len(), golden.outputs.len(), "{name}");
        assert!(t.gradients.keys().eq(golden.gradients.keys()), "{name}: errors of gradients");
        assert!(t.updates.keys().eq(golden.before.keys()), "{name}: errors of updates");
        assert_eq!(t.steps.len(), golden.steps.len(), "{name}");
        let losses = t.steps.iter().zip(&golden.steps).map(|(torch, truth)| (torch.loss / truth.loss - 1.0).abs());
        let mut errors = t.outputs.iter().copied().chain(losses).chain([t.gradient_to_largest]);
        assert!(errors.all(|e| e < 1e-2), "{name}: {t:?}");
    }
}
