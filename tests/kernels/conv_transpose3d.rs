//! Transposed convolution whose kernel is its stride.

use stunet::backend_testing::cuda::{Storage, conv_transpose3d, padded};

use super::sim::Sim;
use super::{SEEDS, cards, input, random, room, rounded, stored, unpadded, voxels};
use crate::common::bound::{self, Bounded};

/// On every card that knows the storage.
fn check(
    storage: Storage,
    batch: usize,
    space: [usize; 3],
    channels: usize,
    filters: usize,
    kernel: [usize; 3],
    norm: bool,
) {
    for card in cards(storage) {
        check_on(*card, storage, batch, space, channels, filters, kernel, norm);
    }
}

fn check_on(
    card: [u32; 2],
    storage: Storage,
    batch: usize,
    space: [usize; 3],
    channels: usize,
    filters: usize,
    kernel: [usize; 3],
    norm: bool,
) {
    let taps: usize = kernel.iter().product();
    let dims = [channels, filters, kernel[0], kernel[1], kernel[2]];
    let weight = rounded(&random(channels * filters * taps, 5), storage);
    let mut bias = random(filters, 6);
    bias.resize(padded(filters), 0.0);
    let out = [0, 1, 2].map(|a| space[a] * kernel[a]);
    let n = batch * out.iter().product::<usize>();
    let run = |seed: u64| {
        let sim = Sim::of(seed, card);
        let x = input(&sim, storage, batch, space, channels, [1; 3], norm, 11);
        let p = conv_transpose3d::Problem {
            storage,
            batch,
            source: x.source,
            weight: sim.with(&conv_transpose3d::pack_weight(&weight, dims, storage).unwrap()),
            bias: Some(sim.with(bytemuck::cast_slice(&bias))),
            filters,
            kernel,
            out: room(&sim, n * padded(filters), storage),
        };
        conv_transpose3d::run(&sim, &p).unwrap();
        (x.values, sim.bytes(p.out))
    };
    let (x, got) = run(SEEDS[0]);
    let mut expected: Vec<Bounded> = Vec::new();
    for b in 0..batch {
        for (z, y, v) in voxels(out) {
            let at = ((b * space[0] + z / kernel[0]) * space[1] + y / kernel[1]) * space[2] + v / kernel[2];
            let tap = (z % kernel[0] * kernel[1] + y % kernel[1]) * kernel[2] + v % kernel[2];
            for f in 0..filters {
                let products = (0..channels)
                    .map(|c| f64::from(x[at * channels + c]) * f64::from(weight[(c * filters + f) * taps + tap]))
                    .chain([f64::from(bias[f])]);
                let (sum, magnitude) = products.fold((0.0, 0.0), |s, v| (s.0 + v, s.1 + v.abs()));
                expected.push(stored(sum, magnitude, channels, storage));
            }
        }
    }
    let what = format!("{storage:?} {batch} {space:?} {channels}->{filters} {kernel:?}");
    bound::check(&what, &unpadded(&storage.load(&got), filters), &expected);
    for seed in &SEEDS[1..] {
        assert!(run(*seed).1 == got, "{what}: bytes depend on the schedule");
    }
}

#[test]
pub(super) fn ptx_conv_transpose3d() {
    check(Storage::Bf16, 2, [3, 4, 5], 32, 16, [2; 3], false);
    check(Storage::F16, 1, [2, 5, 7], 40, 32, [1, 2, 2], true);
    check(Storage::Bf16, 2, [3, 3, 9], 80, 100, [2, 2, 1], true);
    check(Storage::Bf16, 1, [2, 3, 3], 16, 32, [1, 2, 2], false);
    check(Storage::F16, 1, [2, 3, 5], 48, 16, [2; 3], true);
    check(Storage::F16, 1, [1, 4, 5], 16, 70, [2; 3], false);
    check(Storage::F32, 2, [3, 2, 5], 20, 17, [2, 1, 2], true);
}
