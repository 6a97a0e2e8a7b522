//! Whole steps of training through the library: the same pass, losses and optimizer as on the processor, by a card's kernels.

use std::collections::BTreeMap;
use std::sync::Arc;

use stunet::autograd::{Ctx, Grads};
use stunet::models::{Network, NetworkConfig, StuNetConfig, UnetConfig, UnetKind};
use stunet::nn::{self, GradScaler, Module, Optimizer, Rule};
use stunet::nnunet::loss::{deep_supervision_weights, supervised_heads};
use stunet::ops::{LabelMap, Loss, Outputs, Target};
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Precision};

use super::random;
use super::sim::{Lacks, Sim};

/// What a training came to.
#[derive(Debug, PartialEq)]
struct Trained {
    losses: Vec<f64>,
    /// Of the first step, before clipping.
    norm: f64,
    /// Of the first step, by name.
    gradients: BTreeMap<String, Vec<f32>>,
    values: BTreeMap<String, Vec<f32>>,
    momenta: BTreeMap<String, Vec<f32>>,
    scaler: Option<GradScaler>,
    skipped: usize,
}

/// A task: one batch, which comes again and again.
#[derive(Clone, Copy)]
struct Task<'t> {
    config: &'t NetworkConfig,
    patch: [usize; 3],
    batch: usize,
    loss: &'t Loss,
    rule: Rule,
    scaler: Option<GradScaler>,
    recompute: bool,
}

fn sim(seed: u64) -> Device {
    Device::on(Arc::new(Sim::of(seed, [8, 6])), "sim".into())
}

/// So many steps that move something.
fn train(task: &Task<'_>, device: &Device, precision: Precision, steps: usize) -> Trained {
    let Task { config, patch: [d, h, w], batch, loss, rule, scaler, recompute } = *task;
    let net: Network = config.build_random_with(device, 5, Precision::F32).unwrap();
    let mut net = net.recomputing(recompute);
    let image = random(batch * config.in_channels() * d * h * w, 7);
    // Blobs of labels, so that every size of them has some of each.
    let label = |i: usize| (i / w / h % d / 2 + i / w % h / 3 + i % w / 3) % config.classes().min(4);
    let labels: Vec<u16> = (0..batch * d * h * w).map(|i| label(i) as u16).collect();
    let mut optimizer = Optimizer::new(rule, Some(0.5)).unwrap();
    let mut out = Trained {
        losses: Vec::new(),
        norm: 0.0,
        gradients: BTreeMap::new(),
        values: BTreeMap::new(),
        momenta: BTreeMap::new(),
        scaler,
        skipped: 0,
    };
    while out.losses.len() < steps {
        let step = out.losses.len();
        device.planned(&[1], || {
            let mut grads = Grads::new();
            let value = {
                let mut cx = Ctx::train(device).storing(precision);
                let x = Tensor::from_host(&image, Dims::from([batch, config.in_channels(), d, h, w]), device).unwrap();
                let target = LabelMap::new(labels.as_slice(), [batch, d, h, w]).unwrap();
                let target = Target::new(target, &loss.outputs, device).unwrap();
                let x = cx.leaf(x);
                let heads = net.forward_heads(&mut cx, x).unwrap();
                let weights = deep_supervision_weights(heads.len());
                let (scalar, value) = supervised_heads(&mut cx, heads, &weights, &target, loss).unwrap();
                cx.backward_scaled(scalar, out.scaler.map_or(1.0, |s| s.scale()), &mut grads).unwrap();
                value
            };
            if step == 0 {
                net.params(&mut |p| {
                    if let Some(g) = grads.param(p) {
                        let scale = out.scaler.map_or(1.0, |s| s.scale()) as f32;
                        let values = nn::unpack(p, g).unwrap().into_iter().map(|v| v / scale);
                        out.gradients.insert(p.name().into(), values.collect());
                    }
                });
            }
            let mut params = Vec::new();
            net.params_mut(&mut |p| params.push(p));
            let norms = match &mut out.scaler {
                Some(scaler) => optimizer.step_scaled(params, &mut grads, 0.1, &value, scaler).unwrap(),
                None => Some(optimizer.step_guarded(params, &mut grads, 0.1, &value, 1.0).unwrap()),
            };
            out.skipped += usize::from(norms.is_none());
            let Some(norms) = norms else { return };
            if step == 0 {
                out.norm = norms.gradient;
            }
            out.losses.push(value.read().unwrap());
        });
    }
    net.params(&mut |p| {
        out.values.insert(p.name().into(), nn::values(p).unwrap());
        if let Some(momentum) = optimizer.buffer(p, 0) {
            out.momenta.insert(p.name().into(), momentum.unwrap());
        }
    });
    out
}

/// Norm of the difference against the norm.
fn apart(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let size = norm(&mut expected.iter().map(|v| f64::from(*v)));
    norm(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b))) / size.max(1e-12)
}

/// The largest difference of all tensors, and whose.
fn worst(got: &BTreeMap<String, Vec<f32>>, expected: &BTreeMap<String, Vec<f32>>) -> (f64, String) {
    assert!(got.keys().eq(expected.keys()), "{:?} {:?}", got.keys(), expected.keys());
    let all = got.iter().map(|(name, v)| (apart(v, &expected[name]), name.clone()));
    all.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

fn losses() -> Vec<Loss> {
    let plain = Loss { batch_dice: true, ..Loss::new(Outputs::Labels) };
    let regions = Outputs::Regions(vec![vec![1, 2], vec![2], vec![3]]);
    vec![plain, Loss { ignore: Some(3), ..Loss::new(regions) }]
}

const SGD: Rule = Rule::NNUNET;

/// Against the processor's f32, by which both differ from the exact one: roundings of some 30 layers, which instance norms of
/// few voxels enlarge.
const NEAR: f64 = 2e-4;

/// One of the networks in f32, value by value the processor's.
fn check(config: &NetworkConfig, patch: [usize; 3], batch: usize, loss: &Loss, rule: Rule) {
    let task = Task { config, patch, batch, loss, rule, scaler: None, recompute: false };
    let exact = train(&task, &Device::cpu(), Precision::F32, 2);
    let got = train(&task, &sim(0), Precision::F32, 2);
    for (a, b) in got.losses.iter().zip(&exact.losses) {
        assert!((a - b).abs() <= 1e-5 * b.abs(), "losses {:?}, expected {:?}", got.losses, exact.losses);
    }
    assert!((got.norm - exact.norm).abs() <= 1e-4 * exact.norm, "norm {}, expected {}", got.norm, exact.norm);
    for (what, a, b) in [
        ("gradient", &got.gradients, &exact.gradients),
        ("value", &got.values, &exact.values),
        ("momentum", &got.momenta, &exact.momenta),
    ] {
        let (error, name) = worst(a, b);
        assert!(error < NEAR, "{what} of {name}: {error}");
    }
}

fn stunet() -> NetworkConfig {
    // Halves of 24 channels in one decoder stage; strides of all kinds.
    let config = StuNetConfig { dims: [8, 16, 16, 24, 16, 16], ..StuNetConfig::small(1, 4) };
    config.with_strides([[1, 2, 2], [2, 1, 1], [1, 1, 2], [1; 3], [1; 3]]).into()
}

pub(super) fn unet(kind: UnetKind) -> NetworkConfig {
    UnetConfig {
        kind,
        planar: false,
        in_channels: 2,
        classes: 3,
        features: vec![8, 16, 20],
        strides: vec![[1; 3], [1, 2, 2], [2; 3]],
        kernels: vec![[1, 3, 3], [3; 3], [3; 3]],
        depth: vec![1, 2, 1],
        decoder_depth: vec![1, 2],
        conv_bias: true,
        head_bias: true,
    }
    .into()
}

#[test]
pub(super) fn cuda_train_step_is_the_cpus() {
    for loss in losses() {
        let mut config = stunet();
        if let (NetworkConfig::StuNet(c), Outputs::Regions(_)) = (&mut config, &loss.outputs) {
            c.classes = 3;
        }
        // Of the second only what is its own: the loss.
        let batch = if loss.outputs == Outputs::Labels { 2 } else { 1 };
        check(&config, [4, 4 * batch, 8], batch, &loss, SGD);
    }
}

#[test]
pub(super) fn cuda_train_step_of_unets_is_the_cpus() {
    let loss = losses().remove(0);
    check(&unet(UnetKind::Plain), [4, 8, 8], 1, &loss, SGD);
    let adam = Rule::Adam { betas: [0.9, 0.999], eps: 1e-3, weight_decay: 1e-2, decoupled: true };
    check(&unet(UnetKind::ResEnc), [4, 8, 8], 1, &loss, adam);
}

/// Stages that run again on the way back: the same loss, and the same gradients up to the order in which those of a skip's readers
/// are added.
#[test]
pub(super) fn cuda_train_step_of_unets_that_recompute() {
    let loss = losses().remove(0);
    for kind in [UnetKind::Plain, UnetKind::ResEnc] {
        let config = unet(kind);
        let task = Task {
            config: &config,
            patch: [2, 4, 8],
            batch: 1,
            loss: &loss,
            rule: SGD,
            scaler: None,
            recompute: false,
        };
        let run = |recompute| {
            let card = Arc::new(Sim::of(0, [8, 6]));
            (
                train(&Task { recompute, ..task }, &Device::on(card.clone(), "sim".into()), Precision::F32, 1),
                card.count(),
            )
        };
        let (kept, again) = (run(false), run(true));
        assert!(again.1.launches > kept.1.launches, "{kind:?}: nothing ran again");
        assert_eq!(again.0.losses[0].to_bits(), kept.0.losses[0].to_bits(), "{kind:?}");
        let (error, name) = worst(&again.0.gradients, &kept.0.gradients);
        assert!(error <= 1e-5, "{kind:?}: {name}: {error}");
    }
}

#[test]
pub(super) fn cuda_train_step_in_16_bit_is_near_the_cpus() {
    let (config, loss) = (stunet(), losses().remove(0));
    let task =
        Task { config: &config, patch: [4, 8, 8], batch: 2, loss: &loss, rule: SGD, scaler: None, recompute: false };
    let exact = train(&task, &Device::cpu(), Precision::F32, 2);
    let all = |v: &BTreeMap<String, Vec<f32>>| v.values().flatten().copied().collect::<Vec<f32>>();
    // How far gradients go when the processor stores activations, though not filters and gradients, in as few digits.
    let own = train(&task, &Device::cpu(), Precision::Bf16, 2);
    let yardstick = apart(&all(&own.gradients), &all(&exact.gradients));
    for (precision, share) in [(Precision::Bf16, 3.0), (Precision::F16, 3.0 / 8.0)] {
        let got = train(&task, &sim(0), precision, 2);
        let error = apart(&all(&got.gradients), &all(&exact.gradients));
        println!("{}: {error}, the processor's in bf16 {yardstick}", precision.name());
        assert!(error < share * yardstick, "{}: gradients {error}, {yardstick}", precision.name());
        // Every step writes the forms that the next one reads.
        let change = |t: &Trained| t.losses[1] - t.losses[0];
        let (a, b) = (change(&got), change(&exact));
        assert!((a - b).abs() < 0.2 * b.abs(), "{:?}, expected {:?}", got.losses, exact.losses);
    }
}

/// Also when the work of a step is one graph, and on a card that makes none.
#[test]
pub(super) fn cuda_train_steps_have_the_same_bytes_in_any_order() {
    let (config, loss) = (stunet(), losses().remove(0));
    let task =
        Task { config: &config, patch: [2, 4, 8], batch: 1, loss: &loss, rule: SGD, scaler: None, recompute: false };
    let card = Arc::new(Sim::of(0, [8, 6]));
    let first = train(&task, &Device::on(card.clone(), "sim".into()), Precision::Bf16, 7);
    assert!(first.losses[6] < first.losses[0], "{:?}", first.losses);
    let count = card.count();
    assert!(count.replays > 0, "no step was a graph: {count:?}");
    let plain = Device::on(Arc::new(Sim::of(1, [8, 6]).lacking(Lacks::Graphs)), "sim".into());
    assert!(train(&task, &plain, Precision::Bf16, 7) == first, "bytes depend on the schedule, or on graphs");
}

/// A loss scale that changes, as a learning rate does, is launched and learnt anew: afterwards a step is a graph again, and all
/// of it.
#[test]
pub(super) fn cuda_train_graph_is_whole_after_a_change() {
    const STEPS: usize = 10;
    let NetworkConfig::Unet(config) = unet(UnetKind::Plain) else { unreachable!("a U-Net") };
    let (features, strides, depth) = (vec![8, 8], vec![[1; 3], [1, 2, 2]], vec![1; 2]);
    let (kernels, decoder_depth) = (vec![[1, 3, 3]; 2], vec![1]);
    let config = UnetConfig { features, strides, kernels, depth, decoder_depth, ..config }.into();
    let (loss, scaler) = (losses().remove(0), Some(GradScaler::new(1024.0, 6).unwrap()));
    let task = Task { config: &config, patch: [1, 4, 8], batch: 1, loss: &loss, rule: SGD, scaler, recompute: false };
    let run = |lacks| {
        let card = Arc::new(Sim::of(0, [8, 6]).lacking(lacks));
        (train(&task, &Device::on(card.clone(), "sim".into()), Precision::F16, STEPS), card.count())
    };
    let (with, without) = (run(Lacks::Nothing), run(Lacks::Graphs));
    assert!(with.0 == without.0, "bytes depend on graphs");
    assert_eq!(with.0.scaler.map(|s| (s.scale(), s.growth_tracker())), Some((2048.0, 4)));
    let (count, step) = (with.1, without.1.launches / STEPS);
    assert!(count.graphs == 2 && count.replays > 2, "{count:?}");
    // A step that is a graph launches next to nothing by itself.
    let launched = step * (STEPS - count.replays) + step / 4 * count.replays;
    assert!(count.launches < launched, "{count:?}, {step} launches of a step");
}

/// Float16 from a loss scale at which gradients overflow: what is skipped leaves nothing, to the byte, and what is not has lost
/// no more than activations in 11 bits lose.
#[test]
pub(super) fn cuda_train_in_float16_scales_the_loss() {
    let (config, loss) = (unet(UnetKind::Plain), losses().remove(0));
    let task =
        Task { config: &config, patch: [2, 8, 8], batch: 1, loss: &loss, rule: SGD, scaler: None, recompute: false };
    let of = |scale: f64| {
        let scaler = Some(GradScaler::new(scale, 2).unwrap());
        train(&Task { scaler, ..task }, &sim(0), Precision::F16, 2)
    };
    let start = 2f64.powi(22);
    let got = of(start);
    let lower = start / 2f64.powi(i32::try_from(got.skipped).unwrap());
    assert!(got.skipped > 0 && lower > 65536.0, "{:?} after {} skipped", got.scaler, got.skipped);
    // Two steps that were not skipped double it.
    assert_eq!(got.scaler.map(|s| (s.scale(), s.growth_tracker())), Some((2.0 * lower, 0)));
    let direct = of(lower);
    assert!(direct.skipped == 0 && direct == Trained { skipped: 0, ..got }, "a skipped step left something");

    // The processor in f32, and as far as it goes from there with activations in bf16, which have 3 bits less: by 1/8, and three
    // times that since here filters and gradients are rounded, too.
    let all = |v: &BTreeMap<String, Vec<f32>>| v.values().flatten().copied().collect::<Vec<f32>>();
    let exact = train(&task, &Device::cpu(), Precision::F32, 2);
    let own = train(&task, &Device::cpu(), Precision::Bf16, 2);
    let [error, yardstick] = [&direct, &own].map(|t| apart(&all(&t.gradients), &all(&exact.gradients)));
    assert!(error < 3.0 / 8.0 * yardstick, "gradients {error}, the processor's in bf16 {yardstick}");
    // And the step that follows from them.
    let change = |t: &Trained| t.losses[1] - t.losses[0];
    let (a, b) = (change(&direct), change(&exact));
    assert!((a - b).abs() < 0.2 * b.abs(), "{:?}, expected {:?}", direct.losses, exact.losses);
}
