//! The last layer and the decision.

use stunet::backend_testing::cuda::{Source, Storage, head_labels, padded};

use super::sim::Sim;
use super::{SEEDS, activation, cards, input, random, rounded};
use crate::common::bound::gamma;
use stunet::tensor::cuda::Driver;

/// Scores of a voxel in f64, and how far those of f32 may be off.
fn scores(x: &[f32], weight: &[f32], bias: &[f32], scale: f64) -> Vec<(f64, f64)> {
    weight
        .chunks_exact(x.len())
        .zip(bias)
        .map(|(row, b)| {
            let products = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x) * scale).chain([f64::from(*b)]);
            let (sum, magnitude) = products.fold((0.0, 0.0), |s, v| (s.0 + v, s.1 + v.abs()));
            (sum, gamma(x.len() + 4) * magnitude)
        })
        .collect()
}

/// The label's score is the largest, up to what rounding may hide.
fn check_labels(what: &str, labels: &[u8], expected: impl Iterator<Item = Vec<(f64, f64)>>) {
    let mut seen = std::collections::BTreeSet::new();
    for (i, (label, scores)) in labels.as_chunks::<2>().0.iter().zip(expected).enumerate() {
        let label = usize::from(u16::from_le_bytes(*label));
        seen.insert(label);
        let (best, off) = scores.iter().fold((f64::MIN, 0.0), |m: (f64, f64), s| if s.0 > m.0 { *s } else { m });
        assert!(label < scores.len(), "{what}: voxel {i} has label {label}");
        assert!(scores[label].0 >= best - off - scores[label].1, "{what}: voxel {i} has label {label}");
    }
    assert!(seen.len() > 3, "{what}: labels {seen:?}");
}

/// On every card that knows the storage.
fn check(storage: Storage, batch: usize, space: [usize; 3], channels: usize, classes: usize, norm: bool) {
    for card in cards(storage) {
        check_on(*card, storage, batch, space, channels, classes, norm);
    }
}

fn check_on(
    card: [u32; 2],
    storage: Storage,
    batch: usize,
    space: [usize; 3],
    channels: usize,
    classes: usize,
    norm: bool,
) {
    let weight = rounded(&random(classes * channels, 50), storage);
    let bias = random(classes, 51);
    let n = batch * space.iter().product::<usize>();
    let run = |seed: u64| {
        let sim = Sim::of(seed, card);
        let x = input(&sim, storage, batch, space, channels, [1; 3], norm, 52);
        let p = head_labels::Problem {
            storage,
            batch,
            features: x.source,
            weight: sim.with(&head_labels::pack_weight(&weight, [classes, channels], storage).unwrap()),
            bias: sim.with(bytemuck::cast_slice(&head_labels::pack_bias(&bias))),
            classes,
            divisor: None,
            labels: sim.alloc(n * 2).unwrap(),
        };
        head_labels::run(&sim, &p).unwrap();
        (x.values, sim.bytes(p.labels))
    };
    let (x, got) = run(SEEDS[0]);
    let what = format!("{storage:?} {batch} {space:?} {channels}->{classes}");
    check_labels(&what, &got, x.chunks_exact(channels).map(|x| scores(x, &weight, &bias, 1.0)));
    for seed in &SEEDS[1..] {
        assert!(run(*seed).1 == got, "{what}: bytes depend on the schedule");
    }
}

#[test]
pub(super) fn ptx_head_labels() {
    check(Storage::Bf16, 2, [5, 6, 9], 16, 105, false);
    check(Storage::F16, 1, [7, 7, 7], 32, 17, true);
    check(Storage::Bf16, 2, [3, 5, 11], 90, 33, true);
    check(Storage::F32, 2, [3, 5, 11], 20, 37, false);
}

/// Of equal scores the first wins, and where no score is above minus infinity, label 0.
#[test]
pub(super) fn ptx_head_labels_of_equal_scores() {
    for storage in [Storage::Bf16, Storage::F32] {
        for (bias, expected) in [
            (vec![0.5f32; 40], 0u16),
            ((0..40).map(|k| [0.0f32, 1.0][usize::from(k > 12)]).collect(), 13),
            (vec![f32::NAN; 40], 0),
            (vec![f32::NEG_INFINITY; 40], 0),
        ] {
            let sim = Sim::new(1);
            let zeros = vec![0.0f32; 300 * 16];
            let features = Source::plain(sim.with(&storage.store(&zeros)), 16, [3, 10, 10]);
            let p = head_labels::Problem {
                storage,
                batch: 1,
                features,
                weight: sim.with(&head_labels::pack_weight(&random(40 * 16, 1), [40, 16], storage).unwrap()),
                bias: sim.with(bytemuck::cast_slice(&head_labels::pack_bias(&bias))),
                classes: 40,
                divisor: None,
                labels: sim.alloc(600).unwrap(),
            };
            head_labels::run(&sim, &p).unwrap();
            let got = sim.bytes(p.labels);
            assert!(
                got.as_chunks::<2>().0.iter().all(|l| u16::from_le_bytes(*l) == expected),
                "{storage:?} {expected}"
            );
        }
    }
}

#[test]
pub(super) fn ptx_head_labels_of_sums_over_windows() {
    let (space, channels, classes) = ([4, 5, 6], 32, 21);
    let sim = Sim::new(2);
    let sums = activation(1, space, channels, Storage::F32, 60);
    let divisor: Vec<f32> = random(120, 61).iter().map(|v| v.abs() + 0.1).collect();
    let (weight, bias) = (random(classes * channels, 62), random(classes, 63));
    let p = head_labels::Problem {
        storage: Storage::F32,
        batch: 1,
        features: Source::plain(sim.with(bytemuck::cast_slice(&sums)), channels, space),
        weight: sim.with(&head_labels::pack_weight(&weight, [classes, channels], Storage::F32).unwrap()),
        bias: sim.with(bytemuck::cast_slice(&head_labels::pack_bias(&bias))),
        classes,
        divisor: Some(sim.with(bytemuck::cast_slice(&divisor))),
        labels: sim.alloc(240).unwrap(),
    };
    assert_eq!(padded(channels), channels);
    head_labels::run(&sim, &p).unwrap();
    let expected = sums.chunks_exact(channels).zip(&divisor);
    let expected = expected.map(|(x, d)| scores(x, &weight, &bias, 1.0 / f64::from(*d)));
    check_labels("sums", &sim.bytes(p.labels), expected);
}
