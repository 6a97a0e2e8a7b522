//! Sums of a tensor for each channel.

use stunet::backend_testing::cuda::{Storage, channel_sums, padded};
use stunet::tensor::cuda::{Driver, Memory};

use super::sim::Sim;
use super::{SEEDS, activation, cards, room, rounded, unpadded};
use crate::common::bound::{self, Bounded, gamma};

/// On every card that knows the storage.
fn check(storage: Storage, batch: usize, space: [usize; 3], channels: usize, change: impl Fn(usize, &mut f32)) {
    let (c, n) = (padded(channels), batch * space.iter().product::<usize>());
    let mut values = activation(batch, space, channels, storage, 3);
    for (i, v) in values.chunks_exact_mut(c).enumerate() {
        v[..channels].iter_mut().for_each(|v| change(i, v));
    }
    let values = rounded(&values, storage);
    for card in cards(storage) {
        let run = |seed: u64| {
            let sim = Sim::of(seed, *card);
            let mut p = channel_sums::Problem {
                storage,
                batch,
                channels,
                space,
                data: sim.with(&storage.store(&values)),
                workspace: Memory { address: 0, bytes: 0 },
                out: room(&sim, c, Storage::F32),
            };
            p.workspace = sim.alloc(channel_sums::workspace(&sim, &p).unwrap()).unwrap();
            channel_sums::run(&sim, &p).unwrap();
            sim.bytes(p.out)
        };
        let got = run(SEEDS[0]);
        let expected: Vec<Bounded> = (0..channels)
            .map(|k| {
                let x = || (0..n).map(|v| f64::from(values[v * c + k]));
                // Carried along within a thread, a block's warps and the parts; rounded four times where lanes are added.
                Bounded { value: x().sum(), error: gamma(16) * x().map(f64::abs).sum::<f64>() }
            })
            .collect();
        let what = format!("{storage:?} {batch} {space:?} {channels} on {card:?}");
        bound::check(&what, &unpadded(&Storage::F32.load(&got), channels), &expected);
        for seed in &SEEDS[1..] {
            assert!(run(*seed) == got, "{what}: bytes depend on the schedule");
        }
    }
}

#[test]
pub(super) fn cuda_train_channel_sums() {
    check(Storage::F32, 2, [7, 9, 10], 20, |_, _| ());
    check(Storage::Bf16, 1, [16, 17, 18], 40, |_, _| ());
    check(Storage::F16, 2, [3, 3, 3], 48, |_, _| ());
    check(Storage::F32, 1, [1, 1, 1], 16, |_, _| ());
}

/// As in front of a normalisation: what is left is small against what is added.
#[test]
pub(super) fn cuda_train_channel_sums_that_cancel() {
    check(Storage::F32, 1, [16, 16, 32], 16, |i, v| *v = (*v + 1000.0) * if i % 2 == 0 { 1.0 } else { -1.0 });
}
