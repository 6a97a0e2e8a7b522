//! The last layer with its loss and gradients, without scores in memory.

use stunet::backend_testing::cuda::{Storage, conv3d, head_loss, padded};
use stunet::tensor::cuda::Driver;

use super::sim::Sim;
use super::{SEEDS, activation, cards, half_ulp, random, room, rounded, unpadded};
use crate::common::bound::{self, Bounded, U, gamma};

/// A problem and a loss.
#[derive(Debug, Clone)]
struct Case {
    storage: Storage,
    batch: usize,
    space: [usize; 3],
    channels: usize,
    classes: usize,
    regions: Option<Vec<Vec<u16>>>,
    /// Labels that occur, with the one that is ignored.
    labels: Vec<u16>,
    ignore: Option<u16>,
    bias: bool,
    cross_entropy: f64,
    dice: f64,
    batch_dice: bool,
    background: bool,
    scale: f32,
    multiprocessors: usize,
}

impl Case {
    fn new(storage: Storage, space: [usize; 3], channels: usize, classes: usize) -> Case {
        Case {
            storage,
            batch: 2,
            space,
            channels,
            classes,
            regions: None,
            labels: (0..classes as u16).collect(),
            ignore: None,
            bias: true,
            cross_entropy: 1.0,
            dice: 1.0,
            batch_dice: false,
            background: false,
            scale: 64.0,
            multiprocessors: 4,
        }
    }

    fn voxels(&self) -> usize {
        self.space.iter().product()
    }

    fn groups(&self) -> usize {
        if self.batch_dice { 1 } else { self.batch }
    }

    fn is(&self, label: u16, class: usize) -> bool {
        self.regions.as_ref().map_or(usize::from(label) == class, |r| r[class].contains(&label))
    }
}

/// What both sides are given; without padding but in `weight`, which is zero there.
struct Given {
    features: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    labels: Vec<u16>,
}

impl Given {
    fn new(c: &Case) -> Given {
        let n = c.batch * c.voxels();
        let draw = random(n, 73);
        // The truth of neighbours is often the same, so that a warp has classes of which it has no voxel.
        let labels = draw.iter().enumerate().map(|(i, v)| {
            let at = if *v < 0.0 { i / 40 } else { ((v * 1e4) as usize) % c.labels.len() };
            c.labels[at % c.labels.len()]
        });
        Given {
            features: activation(c.batch, c.space, c.channels, c.storage, 70),
            weight: rounded(&random(c.classes * c.channels, 71), c.storage),
            bias: if c.bias { random(c.classes, 72) } else { vec![0.0; c.classes] },
            labels: labels.collect(),
        }
    }
}

/// What a run gives.
#[derive(PartialEq)]
struct Got {
    value: Vec<u8>,
    slopes: Vec<u8>,
    features: Vec<u8>,
    weight: Vec<u8>,
    bias: Vec<u8>,
}

fn problem(sim: &Sim, c: &Case, given: &Given) -> head_loss::Problem {
    let dims = [c.classes, c.channels, 1, 1, 1];
    // What stands in the padding of the bias is nobody's.
    let mut bias = given.bias.clone();
    bias.resize(padded(c.classes), 7.0);
    let regions = c.regions.as_ref().map(|r| {
        let packed = head_loss::pack_regions(r);
        let rows = packed.len() / r.len().div_ceil(16);
        head_loss::Regions { members: sim.with(bytemuck::cast_slice(&packed)), rows }
    });
    let mut p = head_loss::Problem {
        storage: c.storage,
        batch: c.batch,
        space: c.space,
        features: sim.with(&c.storage.store(&given.features)),
        channels: c.channels,
        weight: sim.with(&conv3d::pack_weight(&given.weight, dims, &[c.channels], c.storage).unwrap()),
        bias: c.bias.then(|| sim.with(bytemuck::cast_slice(&bias))),
        classes: c.classes,
        labels: sim.with(bytemuck::cast_slice(&given.labels)),
        regions,
        ignore: c.ignore,
        batch_dice: c.batch_dice,
        slopes: sim.alloc(head_loss::slopes_bytes(c.batch, c.classes, c.batch_dice)).unwrap(),
        workspace: sim.with(&[]),
    };
    p.workspace = sim.alloc(head_loss::workspace_bytes(sim, &p).unwrap()).unwrap();
    p
}

fn terms(c: &Case) -> head_loss::Terms {
    head_loss::Terms { cross_entropy: c.cross_entropy, top: None, dice: c.dice, background: c.background, smooth: 1e-5 }
}

fn run(card: [u32; 2], seed: u64, c: &Case, given: &Given) -> Got {
    let sim = Sim::of(seed, card).with_multiprocessors(c.multiprocessors);
    let p = problem(&sim, c, given);
    let value = room(&sim, 1, Storage::F32);
    head_loss::forward(&sim, &p, &terms(c), value).unwrap();
    let (channels, classes) = (padded(c.channels), padded(c.classes));
    let to = head_loss::Gradients {
        scale: c.scale,
        features: room(&sim, c.batch * c.voxels() * channels, c.storage),
        weight: room(&sim, channels * classes, Storage::F32),
        bias: c.bias.then(|| room(&sim, classes, Storage::F32)),
    };
    head_loss::backward(&sim, &p, &to).unwrap();
    Got {
        value: sim.bytes(value),
        slopes: sim.bytes(p.slopes),
        features: sim.bytes(to.features),
        weight: sim.bytes(to.weight),
        bias: to.bias.map_or(Vec::new(), |b| sim.bytes(b)),
    }
}

/// A voxel in f64, with bounds of what f32 makes of it.
struct Voxel {
    /// Which sums it belongs to.
    group: usize,
    valid: bool,
    truth: Vec<bool>,
    inside: Vec<f64>,
    outside: Vec<f64>,
    /// Relative error of either.
    relative: Vec<f64>,
    cost: Bounded,
}

/// Relative error of the exponential of a difference: two units in the last place, and the argument rounded as a
/// difference, as a product, and by its factor.
fn exponential(x: f64) -> f64 {
    1.01 * (4.0 * U + 3.0 * U * x.abs())
}

fn voxels(c: &Case, given: &Given) -> Vec<Voxel> {
    let scores = |i: usize| -> Vec<(f64, f64)> {
        let x = &given.features[i * padded(c.channels)..][..c.channels];
        let one = |(w, b): (&[f32], &f32)| {
            let products = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).chain([f64::from(*b)]);
            let (sum, magnitude) = products.fold((0.0, 0.0), |s, v| (s.0 + v, s.1 + v.abs()));
            (sum, gamma(c.channels + 2) * magnitude)
        };
        given.weight.chunks_exact(c.channels).zip(&given.bias).map(one).collect()
    };
    let chunks = c.classes.div_ceil(16) as f64;
    let voxel = |i: usize| {
        let (z, label) = (scores(i), given.labels[i]);
        let truth: Vec<bool> = (0..c.classes).map(|k| c.is(label, k)).collect();
        let group = if c.batch_dice { 0 } else { i / c.voxels() };
        let valid = c.ignore != Some(label);
        if c.regions.is_some() {
            let inside: Vec<f64> = z.iter().map(|z| 1.0 / (1.0 + (-z.0).exp())).collect();
            let outside: Vec<f64> = z.iter().map(|z| 1.0 / (1.0 + z.0.exp())).collect();
            let relative = z.iter().map(|z| 2.0 * (z.1 + exponential(z.0)) + 6.0 * U).collect();
            let mut cost = Bounded { value: 0.0, error: 0.0 };
            for (z, t) in z.iter().zip(&truth) {
                let log = (-z.0.abs()).exp().ln_1p();
                let one = z.0.max(0.0) - if *t { z.0 } else { 0.0 } + log;
                cost.value += one;
                // It grows by one with the score at most. The series has 20 roundings at most.
                cost.error += z.1 + 2.0 * U * z.0.abs() + (exponential(z.0) + gamma(20)) * log + U * one;
            }
            return Voxel { group, valid, truth, inside, outside, relative, cost };
        }
        let top = z.iter().fold(f64::MIN, |m, z| m.max(z.0));
        let spread = top - z.iter().fold(f64::MAX, |m, z| m.min(z.0));
        let off = z.iter().fold(0.0, |m: f64, z| m.max(z.1));
        let total: f64 = z.iter().map(|z| (z.0 - top).exp()).sum();
        // Every 16 classes the sum is multiplied by an exponential, and once when lanes come together.
        let sum = (chunks + 2.0) * (exponential(spread + 2.0 * off) + U) + gamma(c.classes + 4);
        let relative = 2.0 * off + sum + exponential(spread) + 4.0 * U;
        let inside: Vec<f64> = z.iter().map(|z| (z.0 - top).exp() / total).collect();
        let own = if valid { z[usize::from(label)].0 } else { 0.0 };
        let value = total.ln() + top - own;
        // Logarithms are good to 2^-22, against one or against themselves.
        let error = 2.0 * off + sum + 4.0 * U * (1.0 + total.ln()) + 3.0 * U * (top - own).abs() + U * value;
        Voxel {
            group,
            valid,
            truth,
            outside: inside.iter().map(|p| 1.0 - p).collect(),
            inside,
            relative: vec![relative; c.classes],
            cost: Bounded { value, error },
        }
    };
    (0..c.batch * c.voxels()).map(voxel).collect()
}

/// The loss and its slopes, `[group][intersection, predicted][class]` and the cross-entropy's.
fn expected_terms(c: &Case, voxels: &[Voxel]) -> (Bounded, Vec<Bounded>) {
    let valid = voxels.iter().filter(|v| v.valid).count();
    let count = if c.regions.is_some() && c.ignore.is_none() { voxels.len() * c.classes } else { valid };
    let rounds = gamma(padded(c.classes) + 12);
    let mut value = Bounded { value: 0.0, error: 0.0 };
    let slope = if count > 0 { c.cross_entropy / count as f64 } else { 0.0 };
    for v in voxels.iter().filter(|v| v.valid) {
        value.value += slope * v.cost.value;
        value.error += slope * (v.cost.error + rounds * v.cost.value);
    }
    let mut slopes = vec![Bounded { value: 0.0, error: 0.0 }; c.groups() * 2 * padded(c.classes)];
    let first = usize::from(!c.background);
    let each = c.dice / (c.groups() * (c.classes - first)) as f64;
    for group in 0..c.groups() {
        for k in first..c.classes {
            let (mut both, mut all, mut truth) = ((0.0, 0.0), (0.0, 0.0), 0.0);
            for v in voxels.iter().filter(|v| v.valid && v.group == group) {
                let (p, off) = (v.inside[k], v.inside[k] * (v.relative[k] + gamma(voxels.len() + 8)));
                all = (all.0 + p, all.1 + off);
                if v.truth[k] {
                    both = (both.0 + p, both.1 + off);
                    truth += 1.0;
                }
            }
            let (numerator, denominator) = (2.0 * both.0 + 1e-5, all.0 + truth + 1e-5);
            let ratio = numerator / denominator;
            // Relative errors of numerator and denominator.
            let (n, d) = (2.0 * both.1 / numerator, all.1 / (denominator - all.1));
            value.value -= each * ratio;
            value.error += each * ratio * (n + d + n * d);
            let at = group * 2 * padded(c.classes) + k;
            let intersection = 2.0 * each / denominator;
            slopes[at] = Bounded { value: -intersection, error: intersection * (d + 2.0 * U) };
            let predicted = each * ratio / denominator;
            slopes[at + padded(c.classes)] = Bounded { value: predicted, error: predicted * (n + 3.0 * d + 2.0 * U) };
        }
    }
    value.error += 2.0 * U * value.value.abs();
    slopes.push(Bounded { value: slope, error: U * slope });
    (value, slopes)
}

/// Gradients by features, filter and bias, with the slopes as they were computed.
fn expected_gradients(
    c: &Case,
    given: &Given,
    voxels: &[Voxel],
    slopes: &[f32],
) -> (Vec<Bounded>, Vec<Bounded>, Vec<Bounded>) {
    let scale = f64::from(c.scale);
    let entropy = f64::from(slopes[c.groups() * 2 * padded(c.classes)]) * scale;
    let zero = Bounded { value: 0.0, error: 0.0 };
    let mut features = Vec::new();
    let (mut weight, mut bias) = (vec![zero; c.classes * c.channels], vec![zero; c.classes]);
    for (i, v) in voxels.iter().enumerate() {
        let x = &given.features[i * padded(c.channels)..][..c.channels];
        let slope = |k: usize| {
            let at = |plane: usize| f64::from(slopes[(v.group * 2 + plane) * padded(c.classes) + k]) * scale;
            at(1) + if v.truth[k] { at(0) } else { 0.0 }
        };
        let weighted = |f: fn(f64) -> f64| (0..c.classes).map(|k| v.inside[k] * f(slope(k))).sum::<f64>();
        let (mean, magnitude) = (weighted(|s| s), weighted(f64::abs));
        let one = |k: usize| {
            let (p, q, s, off) = (v.inside[k], v.outside[k], slope(k), v.relative[k]);
            let part = if v.truth[k] { q } else { p };
            let (value, error) = if !v.valid {
                (0.0, 0.0)
            } else if c.regions.is_some() {
                let entropy = if v.truth[k] { -entropy * part } else { entropy * part };
                let dice = p * q * s;
                let magnitude = dice.abs() + entropy.abs();
                (dice + entropy, magnitude * 2.0 * off + gamma(8) * magnitude)
            } else {
                let shift = s - mean + entropy;
                let off_mean = magnitude * (2.0 * off + gamma(c.classes + 8));
                let all = s.abs() + mean.abs() + entropy;
                let target = if v.truth[k] { entropy } else { 0.0 };
                let error = p * (off * shift.abs() + off_mean + gamma(8) * all) + gamma(2) * (p * shift.abs() + target);
                (p * shift - target, error)
            };
            // Products take it as it is stored.
            let rounding = if c.storage == Storage::F32 { 0.0 } else { half_ulp(value.abs() + error, c.storage) };
            Bounded { value, error: if v.valid { error + rounding } else { 0.0 } }
        };
        let dz: Vec<Bounded> = (0..c.classes).map(one).collect();
        let terms = voxels.len() + 8;
        for (k, d) in dz.iter().enumerate() {
            let grown = d.error + gamma(terms) * (d.value.abs() + d.error);
            bias[k].value += d.value;
            bias[k].error += grown;
            for (to, x) in weight[k * c.channels..].iter_mut().zip(x) {
                to.value += d.value * f64::from(*x);
                to.error += grown * f64::from(x.abs());
            }
        }
        for channel in 0..c.channels {
            let (mut value, mut error) = (0.0, 0.0);
            for (k, d) in dz.iter().enumerate() {
                let w = f64::from(given.weight[k * c.channels + channel]);
                value += d.value * w;
                error += (d.error + gamma(padded(c.classes) + 1) * (d.value.abs() + d.error)) * w.abs();
            }
            features.push(Bounded { value, error: error + half_ulp(value.abs() + error, c.storage) });
        }
    }
    (features, weight, bias)
}

/// On every card that knows the storage.
fn check(c: &Case) {
    let given = Given::new(c);
    let voxels = voxels(c, &given);
    let (value, slopes) = expected_terms(c, &voxels);
    for card in cards(c.storage) {
        let what = format!("{c:?} on {card:?}");
        let got = run(*card, SEEDS[0], c, &given);
        let floats = |bytes: &[u8]| Storage::F32.load(bytes);
        bound::check(&format!("{what}: loss"), &floats(&got.value), &[value]);
        let own = floats(&got.slopes);
        bound::check(&format!("{what}: slopes"), &own, &slopes);
        let (features, weight, bias) = expected_gradients(c, &given, &voxels, &own);
        let dx = unpadded(&c.storage.load(&got.features), c.channels);
        bound::check(&format!("{what}: features"), &dx, &features);
        let classes = padded(c.classes);
        let mut dw = vec![0.0; c.classes * c.channels];
        for (i, v) in floats(&got.weight).into_iter().enumerate() {
            let (channel, class) = (i / (classes * 16) * 16 + i % 16, i / 16 % classes);
            if channel < c.channels && class < c.classes {
                dw[class * c.channels + channel] = v;
            } else {
                assert_eq!(v, 0.0, "{what}: padding of the filter");
            }
        }
        bound::check(&format!("{what}: filter"), &dw, &weight);
        if c.bias {
            let db = floats(&got.bias);
            bound::check(&format!("{what}: bias"), &db[..c.classes], &bias);
            assert!(db[c.classes..].iter().all(|v| *v == 0.0), "{what}: padding of the bias");
        }
        for seed in &SEEDS[1..] {
            assert!(run(*card, *seed, c, &given) == got, "{what}: bytes depend on the schedule");
        }
    }
}

const ALL: [Storage; 3] = [Storage::F32, Storage::Bf16, Storage::F16];
const RAGGED: [usize; 3] = [3, 5, 7];

#[test]
pub(super) fn cuda_train_head_loss_of_labels() {
    for storage in ALL {
        check(&Case { batch_dice: true, ..Case::new(storage, RAGGED, 16, 5) });
        check(&Case { bias: false, ..Case::new(storage, [2, 5, 7], 8, 2) });
        let labels = (0..20).chain([255, 255, 255]).collect();
        check(&Case { ignore: Some(255), labels, background: true, ..Case::new(storage, RAGGED, 40, 20) });
    }
}

#[test]
pub(super) fn cuda_train_head_loss_of_one_term() {
    for storage in ALL {
        check(&Case { cross_entropy: 0.0, ..Case::new(storage, RAGGED, 16, 37) });
        // One of the classes is ignored.
        check(&Case { dice: 0.0, ignore: Some(3), ..Case::new(storage, [2, 3, 7], 24, 20) });
        // No voxel takes part.
        check(&Case { labels: vec![9], ignore: Some(9), ..Case::new(storage, [1, 2, 3], 8, 2) });
    }
}

#[test]
pub(super) fn cuda_train_head_loss_of_regions() {
    let overlapping = vec![vec![1, 2, 3], vec![2, 3], vec![3], vec![5], vec![]];
    let many = (0..20).map(|i| vec![i, i + 1, 2 * i]).collect::<Vec<Vec<u16>>>();
    for storage in ALL {
        let (regions, labels) = (Some(overlapping.clone()), vec![0, 1, 2, 3, 4, 9]);
        let c = Case { regions, labels, background: true, ..Case::new(storage, RAGGED, 16, 5) };
        check(&c);
        check(&Case { ignore: Some(9), batch_dice: true, ..c });
        let labels = (0..45).collect();
        check(&Case { regions: Some(many.clone()), labels, ..Case::new(storage, [2, 3, 7], 40, 20) });
    }
}

/// Features that registers do not hold, and gradients of filters that several blocks have a part of each.
#[test]
pub(super) fn cuda_train_head_loss_of_many_channels_and_classes() {
    for storage in ALL {
        check(&Case { batch: 1, ..Case::new(storage, [2, 3, 7], 56, 37) });
        check(&Case { batch: 1, ..Case::new(storage, [1, 4, 5], 80, 150) });
    }
}

/// Blocks have several tiles, the last of which are not full.
#[test]
pub(super) fn cuda_train_head_loss_over_many_tiles() {
    for storage in ALL {
        check(&Case { multiprocessors: 1, ..Case::new(storage, [6, 7, 9], 8, 5) });
    }
}

/// It is told by the loss, and nothing is read or written out of bounds.
#[test]
pub(super) fn cuda_train_head_loss_of_a_strange_label() {
    for storage in ALL {
        for cross_entropy in [0.0, 1.0] {
            let c = Case { cross_entropy, ..Case::new(storage, [2, 3, 5], 16, 5) };
            let mut given = Given::new(&c);
            given.labels[17] = u16::MAX;
            for card in cards(storage) {
                let value = Storage::F32.load(&run(*card, SEEDS[0], &c, &given).value);
                assert!(value[0].is_nan(), "{storage:?}: {value:?}");
            }
        }
    }
    let sim = Sim::new(0);
    let c = Case::new(Storage::F32, [1, 2, 3], 8, 2);
    let p = problem(&sim, &c, &Given::new(&c));
    let top = head_loss::Terms { top: Some(10.0), ..terms(&c) };
    let value = room(&sim, 1, Storage::F32);
    assert!(matches!(head_loss::forward(&sim, &p, &top, value), Err(stunet::Error::Unsupported { .. })));
}

#[test]
pub(super) fn cuda_train_head_loss_at_another_size() {
    for (from, to) in [([5, 6, 9], [2, 3, 4]), ([4, 4, 4], [2, 4, 7]), ([3, 1, 2], [3, 1, 2])] {
        let all = |s: [usize; 3]| 2 * s.iter().product::<usize>();
        let labels: Vec<u16> = (0..all(from) as u16).collect();
        let sim = Sim::new(0);
        let out = sim.alloc(all(to) * 2).unwrap();
        let p = head_loss::Labels {
            batch: 2,
            from_space: from,
            labels: sim.with(bytemuck::cast_slice(&labels)),
            space: to,
            out,
        };
        head_loss::labels(&sim, &p).unwrap();
        let nearest = |i: usize, a: usize| (2 * i + 1) * from[a] / (2 * to[a]);
        let expected = (0..2).flat_map(|n| {
            super::voxels(to).map(move |(z, y, x)| {
                let at = ((n * from[0] + nearest(z, 0)) * from[1] + nearest(y, 1)) * from[2] + nearest(x, 2);
                at as u16
            })
        });
        let got: Vec<u16> = sim.bytes(out).as_chunks::<2>().0.iter().map(|l| u16::from_le_bytes(*l)).collect();
        assert_eq!(got, expected.collect::<Vec<_>>(), "{from:?} to {to:?}");
    }
}
