//! Normalisation, and the end of a residual block without a convolution.

use stunet::backend_testing::cuda::{Storage, instance_norm, padded};

use super::sim::Sim;
use super::{Input, SEEDS, cards, half_ulp, input, room, unpadded};
use crate::common::bound::{self, Bounded, gamma};

/// Storage that rounds nothing: the values that the kernel adds up are f32.
fn unrounded(
    sim: &Sim,
    storage: Storage,
    batch: usize,
    space: [usize; 3],
    c: usize,
    repeat: [usize; 3],
    norm: bool,
    seed: u64,
) -> Input {
    super::input_in(sim, storage, Storage::F32, batch, space, c, repeat, norm, seed)
}

/// On every card that knows the storage.
fn check(storage: Storage, batch: usize, space: [usize; 3], channels: usize, full: Option<bool>, slope: f32) {
    for card in cards(storage) {
        check_on(*card, storage, batch, space, channels, full, slope);
    }
}

fn check_on(
    card: [u32; 2],
    storage: Storage,
    batch: usize,
    space: [usize; 3],
    channels: usize,
    full: Option<bool>,
    slope: f32,
) {
    let n = batch * space.iter().product::<usize>();
    let run = |seed: u64| {
        let sim = Sim::of(seed, card);
        let x = unrounded(&sim, storage, batch, space, channels, [1; 3], true, 20);
        let shortcut = full.map(|norm| unrounded(&sim, storage, batch, space, channels, [1; 3], norm, 30));
        let p = instance_norm::Problem {
            storage,
            batch,
            x: x.source,
            shortcut: shortcut.as_ref().map(|s| s.source),
            slope,
            out: room(&sim, n * padded(channels), storage),
        };
        instance_norm::run(&sim, &p).unwrap();
        let terms: Vec<Vec<f32>> = [Some(x), shortcut].into_iter().flatten().map(|i| i.values).collect();
        (terms, sim.bytes(p.out))
    };
    let (terms, got) = run(SEEDS[0]);
    let expected: Vec<Bounded> = (0..n * channels)
        .map(|i| {
            let sum: f64 = terms.iter().map(|t| f64::from(t[i])).sum();
            let magnitude: f64 = terms.iter().map(|t| f64::from(t[i]).abs()).sum();
            let value = if sum > 0.0 { sum } else { sum * f64::from(slope) };
            Bounded { value, error: gamma(3) * magnitude + half_ulp(value.abs(), storage) * 1.01 }
        })
        .collect();
    let what = format!("{storage:?} {batch} {space:?} {channels} {full:?}");
    bound::check(&what, &unpadded(&storage.load(&got), channels), &expected);
    for seed in &SEEDS[1..] {
        assert!(run(*seed).1 == got, "{what}: bytes depend on the schedule");
    }
}

#[test]
pub(super) fn ptx_instance_norm_ends_a_block() {
    check(Storage::Bf16, 2, [4, 6, 10], 20, Some(false), 0.01);
    check(Storage::F16, 1, [3, 6, 8], 48, Some(true), 0.01);
    check(Storage::F32, 2, [3, 4, 5], 16, Some(false), 0.2);
    check(Storage::Bf16, 1, [1, 3, 5], 80, None, 1.0);
    check(Storage::F16, 2, [2, 2, 6], 32, None, 0.01);
}

/// Every value is read by the thread that writes it.
#[test]
pub(super) fn ptx_instance_norm_in_place() {
    let sim = Sim::new(1);
    let x = input(&sim, Storage::Bf16, 1, [4, 5, 6], 16, [1; 3], true, 20);
    let problem =
        |out| instance_norm::Problem { storage: Storage::Bf16, batch: 1, x: x.source, shortcut: None, slope: 1.0, out };
    let apart = room(&sim, 4 * 5 * 6 * 16, Storage::Bf16);
    instance_norm::run(&sim, &problem(apart)).unwrap();
    instance_norm::run(&sim, &problem(x.source.data)).unwrap();
    assert!(sim.bytes(apart) == sim.bytes(x.source.data));
}
