//! Windows added to the sums of an image.

use stunet::backend_testing::cuda::aggregate::{Activation, lanes};
use stunet::backend_testing::cuda::{Storage, aggregate, head_labels, padded, resample};

use super::sim::Sim;
use super::{SEEDS, cards, random, voxels};
use crate::common::bound::{self, Bounded, U, gamma};

/// Two overlapping windows, the second mirrored, into a ring of planes: to the bit what f32 gives in that order.
#[test]
pub(super) fn ptx_aggregate_adds_windows_in_order() {
    let cases = [(Storage::Bf16, true), (Storage::F16, false), (Storage::F32, true)].into_iter();
    for (storage, norm, card) in cases.flat_map(|(s, norm)| cards(s).iter().map(move |c| (s, norm, *c))) {
        let (space, ring, all, first, channels) = ([3, 4, 5], [4, 6, 7], 48, 16, 20);
        let sim = Sim::of(3, card);
        let importance: Vec<f32> = random(60, 1).iter().map(|v| v.abs()).collect();
        let planes: usize = ring.iter().product();
        let mut sums = vec![0.5f32; planes * all];
        let mut weights = vec![0.25f32; planes];
        let (sum, weight) = (sim.with(bytemuck::cast_slice(&sums)), sim.with(bytemuck::cast_slice(&weights)));
        let windows = [([2usize, 0, 1], [false; 3]), ([3, 2, 2], [true, false, true])];
        for (i, (start, flip)) in windows.into_iter().enumerate() {
            let x = super::input_in(&sim, storage, Storage::F32, 1, space, channels, [1; 3], norm, 70 + i as u64);
            let p = aggregate::Problem {
                storage,
                features: x.source,
                importance: Some(sim.with(bytemuck::cast_slice(&importance))),
                sum,
                weight: (i == 1).then_some(weight),
                ring,
                channels: [all, first],
                start,
                flip,
                scale: 0.125,
            };
            aggregate::run(&sim, &p).unwrap();
            for (v, (z, y, k)) in voxels(space).enumerate() {
                let to = ((start[0] + z) % ring[0] * ring[1] + start[1] + y) * ring[2] + start[2] + k;
                let mirrored = |a: usize, i: usize| if flip[a] { space[a] - 1 - i } else { i };
                let from = (mirrored(0, z) * space[1] + mirrored(1, y)) * space[2] + mirrored(2, k);
                let g = importance[v] * 0.125;
                for c in 0..channels {
                    sums[to * all + first + c] += g * x.values[from * channels + c];
                }
                if i == 1 {
                    weights[to] += importance[v];
                }
            }
        }
        assert!(Storage::F32.load(&sim.bytes(sum)) == sums, "{storage:?}");
        assert!(Storage::F32.load(&sim.bytes(weight)) == weights, "{storage:?}");
    }
}

/// A voxel's scores after `how`, each with its error: of sums of products in f32, of an exponential function that is off by
/// 2^-22 and by the rounding of its argument, and of the sum that softmax divides by.
fn activated(scores: &[Bounded], how: Activation) -> Vec<Bounded> {
    let exponential = |x: f64, error: f64| error + 3.0 * U * x.abs() + 2f64.powi(-22);
    let most = scores.iter().map(|s| s.value).fold(f64::MIN, f64::max);
    let off = scores.iter().map(|s| s.error).fold(0.0, f64::max);
    let total: f64 = scores.iter().map(|s| (s.value - most).exp()).sum();
    let groups = scores.len().div_ceil(16) as f64;
    let one = |s: &Bounded| match how {
        Activation::Identity => Bounded { value: s.value, error: s.error },
        Activation::Softmax => {
            let value = (s.value - most).exp() / total;
            // The largest that was found so far may be any of them.
            let range = scores.iter().map(|s| most - s.value).fold(0.0, f64::max);
            let relative = (groups + 2.0) * exponential(range + 2.0 * off, 2.0 * off) + gamma(scores.len() + 20);
            Bounded { value, error: 1.01 * relative * value }
        }
        Activation::Sigmoid => {
            let value = 1.0 / (1.0 + (-s.value).exp());
            Bounded { value, error: 1.01 * value * (exponential(s.value, s.error) + 3.0 * U) }
        }
    };
    scores.iter().map(one).collect()
}

fn check_scores(storage: Storage, [channels, classes]: [usize; 2], activation: Activation, norm: bool) {
    for card in cards(storage) {
        check_scores_on(*card, storage, [channels, classes], activation, norm);
    }
}

/// Two windows that overlap, the second mirrored, into a ring of planes.
fn check_scores_on(
    card: [u32; 2],
    storage: Storage,
    [channels, classes]: [usize; 2],
    activation: Activation,
    norm: bool,
) {
    let (space, ring, scale) = ([3, 5, 7], [4, 7, 9], 0.25f32);
    let importance: Vec<f32> = random(105, 1).iter().map(|v| v.abs()).collect();
    let (weight, bias) = (random(classes * channels, 2), random(classes, 3));
    let mut rows = vec![0.0; classes * padded(channels)];
    for (row, to) in weight.chunks_exact(channels).zip(rows.chunks_exact_mut(padded(channels))) {
        to[..channels].copy_from_slice(row);
    }
    let filter = resample::pack_filter(&rows, [classes, padded(channels)]).unwrap();
    let windows = [([2usize, 0, 1], [false; 3]), ([3, 2, 2], [true, false, true])];
    let planes: usize = ring.iter().product();
    let run = |seed: u64| {
        let sim = Sim::of(seed, card);
        let sum = sim.with(bytemuck::cast_slice(&vec![0.0f32; planes * lanes(classes)]));
        let counted = sim.with(bytemuck::cast_slice(&vec![0.0f32; planes]));
        let mut inputs = Vec::new();
        for (i, (start, flip)) in windows.into_iter().enumerate() {
            let x = super::input_in(&sim, storage, Storage::F32, 1, space, channels, [1; 3], norm, 70 + i as u64);
            let window = aggregate::Problem {
                storage,
                features: x.source,
                importance: Some(sim.with(bytemuck::cast_slice(&importance))),
                sum,
                weight: Some(counted),
                ring,
                channels: [lanes(classes), 0],
                start,
                flip,
                scale,
            };
            let (filter, bias) = (sim.with(bytemuck::cast_slice(&filter)), head_labels::pack_bias(&bias));
            let bias = sim.with(bytemuck::cast_slice(&bias));
            let p = aggregate::Scores { window, filter, bias, classes, activation };
            aggregate::run_scores(&sim, &p).unwrap();
            inputs.push(x.values);
        }
        (inputs, sim.bytes(sum), sim.bytes(counted))
    };
    let (inputs, sums, counted) = run(SEEDS[0]);
    let mut expected = vec![Bounded { value: 0.0, error: 0.0 }; planes * lanes(classes)];
    let mut weights = vec![0.0f32; planes];
    for ((start, flip), values) in windows.into_iter().zip(&inputs) {
        for (v, (z, y, k)) in voxels(space).enumerate() {
            let to = ((start[0] + z) % ring[0] * ring[1] + start[1] + y) * ring[2] + start[2] + k;
            let mirrored = |a: usize, i: usize| if flip[a] { space[a] - 1 - i } else { i };
            let from = (mirrored(0, z) * space[1] + mirrored(1, y)) * space[2] + mirrored(2, k);
            let x = &values[from * channels..][..channels];
            let score = |(row, b): (&[f32], &f32)| {
                let products = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).chain([f64::from(*b)]);
                let (value, magnitude) = products.fold((0.0, 0.0), |s, p| (s.0 + p, s.1 + p.abs()));
                Bounded { value, error: gamma(channels + 1) * magnitude }
            };
            let scores: Vec<Bounded> = weight.chunks_exact(channels).zip(&bias).map(score).collect();
            let g = f64::from(importance[v] * scale);
            for (e, s) in expected[to * lanes(classes)..].iter_mut().zip(activated(&scores, activation)) {
                e.value += g * s.value;
                // The product and the sum are rounded.
                e.error += g * (s.error * (1.0 + 2.0 * U) + U * s.value.abs()) + U * (e.value.abs() + e.error);
            }
            weights[to] += importance[v];
        }
    }
    let what = format!("{storage:?} {channels}->{classes} {activation:?}");
    bound::check(&what, &Storage::F32.load(&sums), &expected);
    assert!(Storage::F32.load(&counted) == weights, "{what}");
    for seed in &SEEDS[1..] {
        assert!(run(*seed).1 == sums, "{what}: bytes depend on the schedule");
    }
}

#[test]
pub(super) fn ptx_aggregate_scores() {
    check_scores(Storage::Bf16, [32, 3], Activation::Identity, false);
    check_scores(Storage::F16, [20, 17], Activation::Identity, true);
    check_scores(Storage::F32, [320, 105], Activation::Identity, false);
    check_scores(Storage::Bf16, [90, 21], Activation::Softmax, true);
    check_scores(Storage::F16, [16, 2], Activation::Softmax, false);
    check_scores(Storage::F32, [20, 37], Activation::Sigmoid, false);
    check_scores(Storage::Bf16, [16, 1], Activation::Sigmoid, false);
}
