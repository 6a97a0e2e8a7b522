//! Training steps against float64 truth: losses, outputs, gradients and parameters of networks that PyTorch trained, held
//! against how far PyTorch's own float32 run is from it.

use std::borrow::Cow;

use stunet::autograd::{Ctx, Grads};
use stunet::models::{Network, NetworkConfig, StuNetConfig, UnetConfig, UnetKind};
use stunet::nn::{self, Module, Optimizer, ParamSource};
use stunet::ops::{self, LabelMap, Loss, Outputs};
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Error, Isa, Result};

use crate::common::golden_train::{Array, GoldenTrain, Kind};

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

fn norm(v: &[f32]) -> f64 {
    v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// Norm of the difference over that of the truth, or of what it moved by.
fn distance(got: &[f32], truth: &[f32], from: Option<&[f32]>) -> f64 {
    assert_eq!(got.len(), truth.len());
    let (mut error, mut size) = (0.0, 0.0);
    for (i, (a, b)) in got.iter().zip(truth).enumerate() {
        error += (f64::from(*a) - f64::from(*b)).powi(2);
        size += (f64::from(*b) - from.map_or(0.0, |f| f64::from(f[i]))).powi(2);
    }
    (error / size.max(1e-300)).sqrt()
}

/// Errors of one kind beside PyTorch's own.
struct Errors {
    what: String,
    /// Ours, PyTorch's, of what.
    all: Vec<(f64, f64, String)>,
}

impl Errors {
    fn new(what: String) -> Self {
        Self { what, all: Vec::new() }
    }

    fn push(&mut self, ours: f64, torch: f64, name: &str) {
        self.all.push((ours, torch, name.into()));
    }

    /// The median of ours as a multiple of PyTorch's is at most 2, and each at most 3 times PyTorch's largest. Not its own: a
    /// voxel that is within rounding of leaky ReLU's kink is on one side in one run and on the other in the next, and moves
    /// some tensors' gradients by a thousandth.
    fn judge(self) {
        let (ratio, _) = self.summary();
        assert!(ratio <= 2.0, "{}: median {ratio}", self.what);
        self.judge_course();
    }

    /// The same after several steps, whose course changes with every kink that is crossed: largest errors only.
    fn judge_course(self) {
        let (_, largest) = self.summary();
        for (ours, _, name) in &self.all {
            assert!(*ours <= 3.0 * largest, "{}: {name}: {ours:e}, PyTorch at most {largest:e}", self.what);
        }
    }

    /// Median of ours as a multiple of PyTorch's, and the largest of PyTorch's.
    fn summary(&self) -> (f64, f64) {
        let sorted = |f: fn(&(f64, f64, String)) -> f64| {
            let mut v: Vec<f64> = self.all.iter().map(f).collect();
            v.sort_by(f64::total_cmp);
            v
        };
        let (n, ratios, torch) = (self.all.len(), sorted(|e| e.0 / e.1), sorted(|e| e.1));
        assert!(n > 0, "{}: nothing compared", self.what);
        let (median, worst) = (ratios[n / 2], ratios[n - 1]);
        eprintln!("{}: {n} tensors, median {median:.2} and worst {worst:.2} times PyTorch's error", self.what);
        for (ours, own, name) in self.all.iter().filter(|e| e.0 > 3.0 * e.1) {
            eprintln!("  {name}: {ours:.1e}, PyTorch {own:.1e}");
        }
        (median, torch[n - 1])
    }
}

/// Four steps of nnU-Net's training.
fn train(case: &GoldenTrain, net: &mut Network, device: &Device, strict: bool, what: &str) {
    let (settings, torch) = (&case.settings, &case.torch);
    let mut optimizer = Optimizer::nnunet();
    let loss = Loss { batch_dice: settings.batch_dice, ..Loss::new(Outputs::Labels) };
    for (step, input) in case.inputs.iter().enumerate() {
        let mut grads = Grads::new();
        let value = {
            let mut cx = Ctx::train(device).strict(strict);
            let dims: [usize; 5] = input.shape[..].try_into().unwrap();
            let x = cx.leaf(Tensor::from_host(&input.values, Dims::from(dims), device).unwrap());
            let outputs = net.forward_all(&mut cx, x).unwrap();
            assert_eq!(outputs.len(), settings.ds_weights.len());
            if step == 0 {
                let mut errors = Errors::new(format!("{what}: outputs"));
                for (i, y) in outputs.iter().enumerate() {
                    let ours = distance(&y.value().to_host().unwrap(), &case.outputs[i].values, None);
                    errors.push(ours, torch.outputs[i], &i.to_string());
                }
                errors.judge();
            }
            let (mut terms, mut value) = (Vec::new(), 0.0);
            let weighted = outputs.into_iter().zip(&settings.ds_weights).enumerate();
            for (i, (y, weight)) in weighted.filter(|(_, (_, w))| **w != 0.0) {
                let Array { shape, values } = &case.targets[step][i];
                let labels: Vec<u16> = values.iter().map(|l| u16::from(*l)).collect();
                let target = LabelMap::new(labels, [shape[0], shape[2], shape[3], shape[4]]).unwrap();
                let (l, v) = ops::loss(&mut cx, y, &target, &loss).unwrap();
                terms.push((l, *weight));
                value += weight * v;
            }
            let total = ops::weighted_sum(&mut cx, terms).unwrap();
            cx.backward(total, &mut grads).unwrap();
            value
        };
        let (truth, own) = (case.steps[step], torch.steps[step]);
        let most = case.steps.iter().zip(&torch.steps).map(|(t, o)| (o.loss - t.loss).abs()).fold(0.0, f64::max);
        // From the second step on the course matters, as for updates.
        let limit =
            (1e-5 * truth.loss.abs()).max(if step == 0 { 2.0 * (own.loss - truth.loss).abs() } else { 3.0 * most });
        eprintln!("{what} step {step}: loss off by {:.1e}, PyTorch {:.1e}", value - truth.loss, own.loss - truth.loss);
        assert!((value - truth.loss).abs() <= limit, "{what} step {step}: loss {value}, expected {}", truth.loss);
        if step == 0 {
            gradients(case, net, &grads, what);
        }
        let mut params = Vec::new();
        net.params_mut(&mut |p| params.push(p));
        optimizer.step(params, &mut grads, truth.lr).unwrap();
    }
    let mut errors = Errors::new(format!("{what}: updates"));
    net.params(&mut |p| {
        let (got, before) = (nn::values(p).unwrap(), &case.before[p.name()].values);
        let truth = &case.after[p.name()].values;
        // A head that no loss looks at stays as it is.
        if case.gradients.contains_key(p.name()) {
            errors.push(distance(&got, truth, Some(before)), torch.updates[p.name()], p.name());
        } else {
            assert!(&got == before && before == truth, "{} moved", p.name());
        }
    });
    errors.judge_course();
}

fn gradients(case: &GoldenTrain, net: &Network, grads: &Grads, what: &str) {
    let largest = case.gradients.values().map(|g| norm(&g.values)).fold(0.0, f64::max);
    let mut errors = Errors::new(format!("{what}: gradients"));
    net.params(&mut |p| {
        let name = p.name();
        let got = grads.param(p).map(|g| nn::unpack(p, g).unwrap());
        let Some(truth) = case.gradients.get(name) else {
            assert!(got.is_none(), "{name}: a gradient where PyTorch has none");
            return;
        };
        let got = got.unwrap_or_else(|| panic!("{name}: no gradient"));
        // Before an instance norm the true gradient is zero; what PyTorch has is rounding.
        if norm(&truth.values) <= 1e-9 * largest {
            assert!(norm(&got) <= case.torch.gradient_to_largest * largest, "{name}: {}", norm(&got));
        } else {
            errors.push(distance(&got, &truth.values, None), case.torch.gradients[name], name);
        }
    });
    errors.judge();
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
        planar: false,
        features: s.arch.features.clone(),
    })
}

fn run(k: usize) {
    let Some(case) = GoldenTrain::read(k) else { return };
    for &isa in Isa::available() {
        let device = Device::cpu_with(None, isa).unwrap();
        for strict in [false, true] {
            let mut net = config(&case).build(&Before(&case), &device).unwrap();
            let mode = if strict { ", strict" } else { "" };
            train(&case, &mut net, &device, strict, &format!("{} {}{mode}", case.name, isa.name()));
        }
    }
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
