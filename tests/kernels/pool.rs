//! Sums over blocks, copies of voxels, and sums of tensors.

use stunet::backend_testing::cuda::{Storage, padded, pool};

use super::sim::Sim;
use super::{SEEDS, activation, cards, half_ulp, room, stored, unpadded, voxels};
use crate::common::bound::{self, Bounded};

/// On every card that knows the storage.
fn check(storage: Storage, batch: usize, space: [usize; 3], channels: usize, kernel: [usize; 3], scale: f32) {
    for card in cards(storage) {
        check_on(*card, storage, batch, space, channels, kernel, scale);
    }
}

fn check_on(
    card: [u32; 2],
    storage: Storage,
    batch: usize,
    space: [usize; 3],
    channels: usize,
    kernel: [usize; 3],
    scale: f32,
) {
    let c = padded(channels);
    let few = [0, 1, 2].map(|a| space[a] / kernel[a]);
    let values = |s: [usize; 3]| batch * s.iter().product::<usize>() * c;
    let (fine, coarse) = (activation(batch, space, channels, storage, 1), activation(batch, few, channels, storage, 2));
    let run = |seed: u64| {
        let sim = Sim::of(seed, card);
        let problem = |fine, coarse| pool::Problem { storage, batch, channels, space, kernel, fine, coarse, scale };
        let (a, b) = (sim.with(&storage.store(&fine)), room(&sim, values(few), storage));
        pool::sum(&sim, &problem(a, b)).unwrap();
        let (d, e) = (sim.with(&storage.store(&coarse)), room(&sim, values(space), storage));
        pool::spread(&sim, &problem(e, d)).unwrap();
        // In place of the first.
        pool::add(&sim, storage, values(space), a, e, a).unwrap();
        [b, e, a].map(|m| sim.bytes(m))
    };
    let got = run(SEEDS[0]);
    let (mut sums, mut copies, mut added) = (Vec::new(), Vec::new(), Vec::new());
    let at = |t: &[f32], [d, h, w]: [usize; 3], b: usize, [z, y, x]: [usize; 3], k: usize| {
        f64::from(t[(((b * d + z) * h + y) * w + x) * c + k])
    };
    for b in 0..batch {
        for (z, y, x) in voxels(few) {
            for k in 0..channels {
                let terms = voxels(kernel).map(|(i, j, l)| {
                    at(&fine, space, b, [z * kernel[0] + i, y * kernel[1] + j, x * kernel[2] + l], k) * f64::from(scale)
                });
                let (sum, magnitude) = terms.fold((0.0, 0.0), |s, v| (s.0 + v, s.1 + v.abs()));
                sums.push(stored(sum, magnitude, kernel.iter().product(), storage));
            }
        }
        for (z, y, x) in voxels(space) {
            let from = [z / kernel[0], y / kernel[1], x / kernel[2]];
            let inside = (0..3).all(|a| from[a] < few[a]);
            for k in 0..channels {
                let exact = if inside { at(&coarse, few, b, from, k) * f64::from(scale) } else { 0.0 };
                copies.push(stored(exact, exact.abs(), 1, storage));
                // Of what was stored.
                let i = added.len();
                let copy = f64::from(unpadded(&storage.load(&got[1]), channels)[i]);
                let sum = copy + at(&fine, space, b, [z, y, x], k);
                added.push(Bounded { value: sum, error: half_ulp(sum.abs(), storage) * 1.01 });
            }
        }
    }
    let what = format!("{storage:?} {batch} {space:?} {channels} {kernel:?}");
    for (bytes, expected) in got.iter().zip([sums, copies, added]) {
        bound::check(&what, &unpadded(&storage.load(bytes), channels), &expected);
    }
    for seed in &SEEDS[1..] {
        assert!(run(*seed) == got, "{what}: bytes depend on the schedule");
    }
}

#[test]
pub(super) fn cuda_train_pool() {
    check(Storage::Bf16, 2, [4, 6, 8], 20, [2; 3], 1.0);
    check(Storage::F16, 1, [3, 5, 7], 16, [1, 2, 2], 0.25);
    check(Storage::F32, 2, [5, 4, 3], 24, [2, 1, 3], 1.0 / 6.0);
}
