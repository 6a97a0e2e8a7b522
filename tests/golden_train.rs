//! Training steps against float64 truth: losses, outputs, gradients and parameters of networks that PyTorch trained, held
//! against how far PyTorch's own float32 run is from it.

mod proof;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use stunet::autograd::{Ctx, Grads, Param, Var};
use stunet::models::{Network, NetworkConfig, StuNetConfig, UnetConfig, UnetKind};
use stunet::nn::{self, Module, Optimizer, ParamSource};
use stunet::ops::{self, LabelMap, Loss, LossValue, Outputs, Target};
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Error, Isa, Result};

use crate::common::golden_train::{Array, GoldenTrain, Kind};
use crate::kernels::Sim;
use crate::reference::golden::norm;

/// The parameters before the first step.
struct Before<'a>(&'a GoldenTrain);

impl ParamSource for Before<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.before.get(name).map(|t| t.shape.clone())
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(&self.0.before[name].values))
    }

    fn error(&self, name: &str, what: String) -> Error {
        panic!("{}: {name}: {what}", self.0.name)
    }
}

/// What a step begins with and gives.
#[derive(PartialEq)]
struct Step {
    parameters: BTreeMap<String, Vec<f32>>,
    /// The full resolution first.
    outputs: Vec<Vec<f32>>,
    loss: f64,
    gradients: BTreeMap<String, Vec<f32>>,
}

/// A course of training.
struct Training {
    what: String,
    steps: Vec<Step>,
    after: BTreeMap<String, Vec<f32>>,
}

/// Of every parameter that has it.
fn by_name(net: &Network, mut of: impl FnMut(&Param) -> Option<Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
    let mut out = BTreeMap::new();
    net.params(&mut |p| out.extend(of(p).map(|v| (p.name().to_string(), v))));
    out
}

/// Outputs and loss, every output against the labels at its size.
fn on_processor<'m>(
    case: &GoldenTrain,
    step: usize,
    loss: &Loss,
    net: &'m Network,
    cx: &mut Ctx<'m>,
    x: Var,
) -> (Vec<Vec<f32>>, Var, LossValue) {
    let outputs = net.forward_all(cx, x).unwrap();
    assert_eq!(outputs.len(), case.settings.ds_weights.len());
    let logits = outputs.iter().map(|y| y.value().to_host().unwrap()).collect();
    let (mut terms, mut values) = (Vec::new(), Vec::new());
    let weighted = outputs.into_iter().zip(&case.settings.ds_weights).enumerate();
    for (i, (y, weight)) in weighted.filter(|(_, (_, w))| **w != 0.0) {
        let target = Target::new(labels(&case.targets[step][i]), &loss.outputs, &Device::cpu()).unwrap();
        let (l, v) = ops::loss(cx, y, target.map().unwrap(), loss).unwrap();
        terms.push((l, *weight));
        values.push((v, *weight));
    }
    let value = values.iter().map(|(v, w)| v * w).sum();
    (logits, ops::weighted_sum(cx, terms).unwrap(), LossValue::known(value))
}

/// The same with the heads' scores looked at beside the pass.
fn on_card<'m>(
    case: &GoldenTrain,
    step: usize,
    loss: &Loss,
    net: &'m Network,
    cx: &mut Ctx<'m>,
    x: Var,
) -> (Vec<Vec<f32>>, Var, LossValue) {
    let heads = net.forward_heads(cx, x).unwrap();
    let logits = heads.iter().map(|h| h.host_scores(cx).unwrap().to_host().unwrap()).collect();
    let (mut terms, mut values) = (Vec::new(), Vec::new());
    let weighted = heads.into_iter().zip(&case.settings.ds_weights).enumerate();
    for (i, (head, weight)) in weighted.filter(|(_, (_, w))| **w != 0.0) {
        let target = Target::new(labels(&case.targets[step][i]), &loss.outputs, cx.device()).unwrap();
        let (l, v) = head.loss(cx, &target, loss).unwrap();
        terms.push((l, *weight));
        values.push((v, *weight));
    }
    (logits, ops::weighted_sum(cx, terms).unwrap(), LossValue::sum(values))
}

fn labels(of: &Array<u8>) -> LabelMap {
    let labels: Vec<u16> = of.values.iter().map(|l| u16::from(*l)).collect();
    LabelMap::new(labels, [of.shape[0], of.shape[2], of.shape[3], of.shape[4]]).unwrap()
}

/// The first steps of nnU-Net's training.
fn train(case: &GoldenTrain, net: &mut Network, device: &Device, strict: bool, count: usize, what: String) -> Training {
    let settings = &case.settings;
    let mut optimizer = Optimizer::nnunet();
    let loss = Loss { batch_dice: settings.batch_dice, ..Loss::new(Outputs::Labels) };
    let values = |net: &Network| by_name(net, |p| Some(nn::values(p).unwrap()));
    let mut steps = Vec::new();
    for (step, input) in case.inputs.iter().enumerate().take(count) {
        let parameters = values(net);
        let mut grads = Grads::new();
        let (outputs, value) = {
            let mut cx = Ctx::train(device).strict(strict);
            let dims: [usize; 5] = input.shape[..].try_into().unwrap();
            let x = cx.leaf(Tensor::from_host(&input.values, Dims::from(dims), device).unwrap());
            let (logits, total, value) = if device.is_cpu() {
                on_processor(case, step, &loss, net, &mut cx, x)
            } else {
                on_card(case, step, &loss, net, &mut cx, x)
            };
            cx.backward(total, &mut grads).unwrap();
            (logits, value.read().unwrap())
        };
        let gradients = by_name(net, |p| grads.param(p).map(|g| nn::unpack(p, g).unwrap()));
        steps.push(Step { parameters, outputs, loss: value, gradients });
        let mut params = Vec::new();
        net.params_mut(&mut |p| params.push(p));
        optimizer.step(params, &mut grads, case.steps[step].lr).unwrap();
    }
    Training { what, steps, after: values(net) }
}

fn config(case: &GoldenTrain) -> NetworkConfig {
    let s = &case.settings;
    let kind = match s.kind {
        Kind::StuNet => {
            return NetworkConfig::from(StuNetConfig {
                in_channels: s.input_channels,
                classes: s.classes,
                depth: [s.arch.depth; 6],
                decoder_depth: [s.arch.depth; 5],
                dims: s.arch.features[..].try_into().unwrap(),
                strides: s.strides[..].try_into().unwrap(),
            });
        }
        Kind::Plain => UnetKind::Plain,
        Kind::ResidualEncoder => UnetKind::ResEnc,
    };
    let stages = s.arch.features.len();
    let is = |a: usize, b: usize| if kind == UnetKind::Plain { a } else { b };
    let kernel = |stage: usize| {
        let conv = match kind {
            UnetKind::Plain => format!("encoder.stages.{stage}.0.convs.0.conv.weight"),
            _ => format!("encoder.stages.{stage}.blocks.0.conv1.conv.weight"),
        };
        case.before[&conv].shape[2..].try_into().unwrap()
    };
    NetworkConfig::from(UnetConfig {
        kind,
        in_channels: s.input_channels,
        classes: s.classes,
        kernels: (0..stages).map(kernel).collect(),
        strides: [[1; 3]].into_iter().chain(s.strides.iter().copied()).collect(),
        depth: (0..stages).map(|s| is(2, if s == 0 { 1 } else { 2 })).collect(),
        decoder_depth: vec![is(2, 1); stages - 1],
        conv_bias: true,
        head_bias: true,
        planar: false,
        features: s.arch.features.clone(),
    })
}

/// The whole course by the best instruction set, and the first step, from where everything can go another way, by every
/// other and strictly.
fn run(k: usize) {
    let Some(case) = GoldenTrain::read(k) else { return };
    let mut proved: Vec<Training> = Vec::new();
    for &isa in Isa::available().iter().rev() {
        let device = Device::cpu_with(None, isa).unwrap();
        for strict in [false, true] {
            let best = isa == Isa::detect() && !strict;
            let mut net = config(&case).build(&Before(&case), &device).unwrap();
            let what = format!("{} {}{}", case.name, isa.name(), if strict { ", strict" } else { "" });
            let training = train(&case, &mut net, &device, strict, if best { case.steps.len() } else { 1 }, what);
            if !proved.iter().any(|p| proof::is_beside(&case, p, &training)) {
                proof::prove(&case, &training, best);
                proved.push(training);
            }
        }
    }
}

/// The first step by a card's kernels, on their interpreter.
fn run_on_card(k: usize) {
    let Some(case) = GoldenTrain::read(k) else { return };
    let device = Device::on(Arc::new(Sim::of(0, [8, 6])), "sim".into());
    let mut net = config(&case).build(&Before(&case), &device).unwrap();
    let training = train(&case, &mut net, &device, true, 1, format!("{} on a card", case.name));
    proof::prove(&case, &training, false);
}

#[test]
fn cuda_train_golden_stunet() {
    run_on_card(0);
}

#[test]
fn cuda_train_golden_stunet_of_two_blocks_a_stage() {
    run_on_card(1);
}

#[test]
fn cuda_train_golden_stunet_of_strides_one() {
    run_on_card(2);
}

#[test]
fn cuda_train_golden_plain() {
    run_on_card(3);
}

#[test]
fn cuda_train_golden_residual_encoder() {
    run_on_card(4);
}

#[test]
fn golden_train_stunet() {
    run(0);
}

#[test]
fn golden_train_stunet_of_two_blocks_a_stage() {
    run(1);
}

#[test]
fn golden_train_stunet_of_strides_one() {
    run(2);
}

#[test]
fn golden_train_plain() {
    run(3);
}

#[test]
fn golden_train_residual_encoder() {
    run(4);
}
