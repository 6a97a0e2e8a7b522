//! Every way of aggregating against sums over all windows in f64.

use super::export::Planes;
use super::sweep::{Gather, Sweep, SweepPlan};
use super::window::{gaussian, mirrors};
use crate::autograd::Ctx;
use crate::base::progress::{Event, Flow};
use crate::error::Error;
use crate::models::{Network, NetworkConfig, StuNetConfig, UnetConfig, UnetKind};
use crate::nn::Module;
use crate::ops::head::Activation;
use crate::tensor::{Device, Dims, Tensor};

const SHAPE: [usize; 3] = [13, 7, 21];
const PATCH: [usize; 3] = [8, 8, 12];
const CHANNELS: usize = 2;
const CLASSES: usize = 5;

fn nets(device: &Device, folds: u64) -> Vec<Network> {
    let config = StuNetConfig { dims: [4, 8, 8, 12, 12, 12], ..StuNetConfig::small(CHANNELS, CLASSES) }.with_strides([
        [2, 2, 2],
        [2, 2, 2],
        [1, 1, 1],
        [1, 1, 1],
        [1, 1, 1],
    ]);
    (0..folds).map(|seed| config.build_random(device, seed).unwrap().into()).collect()
}

fn image() -> Vec<f32> {
    let n = CHANNELS * SHAPE.iter().product::<usize>();
    (0..n).map(|i| ((i * 7919) % 1013) as f32 / 500.0 - 1.0).collect()
}

fn activate(how: Activation, v: &mut [f64]) {
    match how {
        Activation::Identity => {}
        Activation::Softmax => {
            let total: f64 = v.iter().map(|s| s.exp()).sum();
            v.iter_mut().for_each(|s| *s = s.exp() / total);
        }
        Activation::Sigmoid => v.iter_mut().for_each(|s| *s = 1.0 / (1.0 + (-*s).exp())),
    }
}

/// (z, y, x, class), by the definition: windows in loops, whole-patch logits, flips undone by index.
fn dense(nets: &[Network], device: &Device, plan: &SweepPlan, how: Activation) -> Vec<f64> {
    let padded = [0, 1, 2].map(|a| SHAPE[a].max(PATCH[a]));
    let pad = [0, 1, 2].map(|a| (padded[a] - SHAPE[a]) / 2);
    let (g, data) = (gaussian(PATCH), image());
    let volume: usize = padded.iter().product();
    let (mut sum, mut weight) = (vec![0f64; volume * CLASSES], vec![0f64; volume]);
    let inside = |p: [usize; 3], s: [usize; 3]| (p[0] * s[1] + p[1]) * s[2] + p[2];
    let patch_len: usize = PATCH.iter().product();
    for net in nets {
        for &z in &plan.starts[0] {
            for &y in &plan.starts[1] {
                for &x in &plan.starts[2] {
                    for flip in &plan.flips {
                        let flipped = |i: usize| {
                            let p = [i / (PATCH[1] * PATCH[2]), i / PATCH[2] % PATCH[1], i % PATCH[2]];
                            [0, 1, 2].map(|a| if flip[a] { PATCH[a] - 1 - p[a] } else { p[a] })
                        };
                        let mut values = vec![0f32; CHANNELS * patch_len];
                        for i in 0..patch_len {
                            let p = flipped(i);
                            let at = [z + p[0], y + p[1], x + p[2]];
                            let source = [0, 1, 2].map(|a| at[a].wrapping_sub(pad[a]));
                            if (0..3).all(|a| source[a] < SHAPE[a]) {
                                for c in 0..CHANNELS {
                                    let from = c * SHAPE.iter().product::<usize>() + inside(source, SHAPE);
                                    values[c * patch_len + i] = data[from];
                                }
                            }
                        }
                        let mut cx = Ctx::infer(device);
                        let dims = Dims::from([1, CHANNELS, PATCH[0], PATCH[1], PATCH[2]]);
                        let input = cx.leaf(Tensor::from_host(&values, dims, device).unwrap());
                        let logits = net.forward(&mut cx, input).unwrap().value().to_host().unwrap();
                        for i in 0..patch_len {
                            let p = flipped(i);
                            let at = inside([z + p[0], y + p[1], x + p[2]], padded);
                            let importance = f64::from(g[inside(p, PATCH)]) / (plan.flips.len() * nets.len()) as f64;
                            let mut v: Vec<f64> = (0..CLASSES).map(|c| f64::from(logits[c * patch_len + i])).collect();
                            activate(how, &mut v);
                            (0..CLASSES).for_each(|c| sum[at * CLASSES + c] += importance * v[c]);
                            weight[at] += importance;
                        }
                    }
                }
            }
        }
    }
    let mut out = Vec::new();
    for i in 0..SHAPE.iter().product::<usize>() {
        let p = [i / (SHAPE[1] * SHAPE[2]), i / SHAPE[2] % SHAPE[1], i % SHAPE[2]];
        let at = inside([0, 1, 2].map(|a| p[a] + pad[a]), padded);
        out.extend((0..CLASSES).map(|c| sum[at * CLASSES + c] / weight[at]));
    }
    out
}

fn plan(nets: &[Network], how: Activation) -> SweepPlan {
    SweepPlan::new(SHAPE, PATCH, 0.5, mirrors(&[0, 2]), nets, how).unwrap()
}

/// All planes of a sweep, heads applied where planes hold features; and the peak of tensors beside the weights.
fn swept(nets: &[Network], device: &Device, plan: SweepPlan) -> (Vec<f32>, usize) {
    let (data, mut nothing) = (image(), ());
    let weights = device.memory().in_use;
    device.reset_peak();
    let mut sweep = Sweep::new(plan.clone(), nets, device, &data, &mut nothing).unwrap();
    let mut plane = vec![0.0; SHAPE[1] * SHAPE[2] * sweep.channels()];
    let mut out = Vec::new();
    for z in 0..SHAPE[0] {
        sweep.plane(z, &mut plane).unwrap();
        if plan.gather != Gather::Features {
            out.extend_from_slice(&plane);
            continue;
        }
        let lanes = sweep.channels() / nets.len();
        for v in plane.chunks_exact(sweep.channels()) {
            for c in 0..CLASSES {
                let fold = |(f, net): (usize, &Network)| {
                    let h = net.head().unwrap();
                    let w = &h.weight[c * h.features..][..h.features];
                    h.bias[c] + w.iter().zip(&v[f * lanes..]).map(|(w, v)| w * v).sum::<f32>()
                };
                out.push(nets.iter().enumerate().map(fold).sum::<f32>() / nets.len() as f32);
            }
        }
    }
    (out, device.memory().peak - weights)
}

#[test]
fn every_aggregation_gives_the_weighted_mean() {
    for folds in [1, 2] {
        let device = Device::cpu_with_threads(2).unwrap();
        let nets = nets(&device, folds);
        for how in [Activation::Identity, Activation::Softmax, Activation::Sigmoid] {
            let mut plan = plan(&nets, how);
            assert_eq!(plan.windows(), 3 * 3);
            let expected = dense(&nets, &device, &plan, how);
            let size = expected.iter().map(|v| v.abs()).fold(0.0, f64::max);
            let choices = match how {
                Activation::Identity => vec![Gather::Features, Gather::Scores(how), Gather::Held(how)],
                _ => vec![Gather::Scores(how), Gather::Held(how)],
            };
            for gather in choices {
                plan.gather = gather;
                let (got, peak) = swept(&nets, &device, plan.clone());
                assert_eq!(got.len(), expected.len());
                // Sums of some hundred f32 terms; held features carry 2^-16 each.
                let tolerance = if matches!(gather, Gather::Held(_)) { 1e-4 } else { 1e-5 } * size.max(1.0);
                for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
                    let error = (f64::from(*g) - e).abs();
                    assert!(error <= tolerance, "{folds} folds, {gather:?}, value {i}: {g} against {e}");
                }
                let planned = plan.bytes() + nets[0].activation_bytes(PATCH, &device, false);
                // A recycled piece of memory may be a quarter larger than what was asked for (`Pool::take`).
                assert!(peak <= planned + planned / 4, "{gather:?}: peak {peak} above the plan {planned}");
                for threads in [1, 4] {
                    let other = Device::cpu_with_threads(threads).unwrap();
                    let again = other.install(|| swept(&nets, &other, plan.clone()).0);
                    assert!(again.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()), "{threads} threads");
                }
            }
        }
    }
}

#[test]
fn a_callback_cancels_and_nan_is_refused() {
    let device = Device::cpu();
    let nets = nets(&device, 1);
    let mut data = image();
    let mut seen = 0;
    let mut stop = |e: Event<'_>| {
        seen += usize::from(matches!(e, Event::Tiles { .. }));
        if seen == 3 { Flow::Cancel } else { Flow::Continue }
    };
    let mut plane = vec![0.0; SHAPE[1] * SHAPE[2] * 16];
    let mut sweep = Sweep::new(plan(&nets, Activation::Identity), &nets, &device, &data, &mut stop).unwrap();
    plane.resize(SHAPE[1] * SHAPE[2] * sweep.channels(), 0.0);
    assert!(matches!(sweep.plane(0, &mut plane), Err(Error::Cancelled)));

    data[5] = f32::NAN;
    let mut nothing = ();
    let mut sweep = Sweep::new(plan(&nets, Activation::Identity), &nets, &device, &data, &mut nothing).unwrap();
    let error = sweep.plane(0, &mut plane).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
}

/// 2D networks of two folds and their plan for an image of so many slices.
fn planar_nets(device: &Device) -> Vec<Network> {
    let config: NetworkConfig = UnetConfig {
        kind: UnetKind::Plain,
        in_channels: CHANNELS,
        classes: CLASSES,
        features: vec![12, 20, 24],
        kernels: vec![[1, 3, 3]; 3],
        strides: vec![[1; 3], [1, 2, 2], [1, 2, 1]],
        depth: vec![2, 1, 2],
        decoder_depth: vec![1, 1],
        conv_bias: true,
        head_bias: true,
        planar: true,
    }
    .into();
    (0..2).map(|seed| config.build_random(device, seed).unwrap()).collect()
}

/// A slice is predicted as it would be alone, whatever runs in the same pass: nothing of it gets into another, and the last
/// pass, which the image does not fill, is no other.
#[test]
fn slices_of_a_pass_do_not_meet() {
    let device = Device::cpu_with_threads(2).unwrap();
    let (nets, data, area) = (planar_nets(&device), image(), SHAPE[1] * SHAPE[2]);
    let plan = |depth: usize| {
        let shape = [depth, SHAPE[1], SHAPE[2]];
        SweepPlan::new(shape, [1, 8, 12], 0.5, mirrors(&[1, 2]), &nets, Activation::Identity).unwrap()
    };
    let swept = |plan: SweepPlan, data: &[f32], device: &Device| {
        let (mut nothing, depth) = ((), plan.shape[0]);
        let mut sweep = Sweep::new(plan, &nets, device, data, &mut nothing).unwrap();
        let mut out = vec![vec![0.0; area * sweep.channels()]; depth];
        out.iter_mut().enumerate().for_each(|(z, plane)| sweep.plane(z, plane).unwrap());
        out
    };
    assert_eq!((plan(SHAPE[0]).planes, plan(SHAPE[0]).windows(), plan(33).planes), (13, 13 * 3, 11));
    for gather in [Gather::Features, Gather::Scores(Activation::Identity)] {
        let alone = |z: usize| {
            let slice: Vec<f32> = data.chunks_exact(area).skip(z).step_by(SHAPE[0]).flatten().copied().collect();
            let mut plan = plan(1);
            plan.gather = gather;
            swept(plan, &slice, &device).remove(0)
        };
        let expected: Vec<Vec<f32>> = (0..SHAPE[0]).map(alone).collect();
        let size = expected.iter().flatten().map(|v| v.abs()).fold(0.0, f32::max);
        for slices in [13, 5, 1] {
            let mut plan = plan(SHAPE[0]);
            plan.run_slices(slices);
            plan.gather = gather;
            let weights = device.memory().in_use;
            device.reset_peak();
            let got = swept(plan.clone(), &data, &device);
            let peak = device.memory().peak - weights;
            let planned = plan.bytes() + nets[0].activation_bytes(plan.pass_size(), &device, false);
            let planned = planned + nets[1].planned_kept_bytes(plan.pass_size(), &device, false);
            assert!(peak <= planned + planned / 4, "{slices} slices: peak {peak} above the plan {planned}");
            for (g, e) in got.iter().flatten().zip(expected.iter().flatten()) {
                assert!((g - e).abs() <= 1e-5 * size, "{slices} slices: {g} against {e}");
            }
            let other = Device::cpu_with_threads(3).unwrap();
            let again = other.install(|| swept(plan, &data, &other));
            assert!(again == got, "{slices} slices by other threads");
        }
    }
}
