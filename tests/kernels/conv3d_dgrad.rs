//! The gradient of a convolution's input.

use stunet::backend_testing::cuda::conv3d::{dgrad, output_space};
use stunet::backend_testing::cuda::{Storage, padded};

use super::sim::Sim;
use super::{SEEDS, activation, cards, random, room, rounded, stored, unpadded, voxels};
use crate::common::bound::{self, Bounded};

/// A convolution.
#[derive(Debug, Clone, Copy)]
struct Case {
    batch: usize,
    space: [usize; 3],
    channels: usize,
    filters: usize,
    kernel: [usize; 3],
    stride: [usize; 3],
}

/// On every card that knows the storage; `first` channels before those whose gradient is asked for belong to another source.
fn check(storage: Storage, case: Case, first: usize) {
    for card in cards(storage) {
        check_on(*card, storage, case, first, 4);
        // So many multiprocessors that sums are cut into parts.
        check_on(*card, storage, case, first, 400);
    }
}

fn check_on(card: [u32; 2], storage: Storage, case: Case, first: usize, multiprocessors: usize) {
    let Case { batch, space, channels, filters, kernel, stride } = case;
    let taps: usize = kernel.iter().product();
    let inputs = first + channels;
    let dims = [filters, inputs, kernel[0], kernel[1], kernel[2]];
    let weight = rounded(&random(filters * inputs * taps, 5), storage);
    let out = output_space(space, kernel, stride);
    let dy = activation(batch, out, filters, storage, 7);
    let n = batch * space.iter().product::<usize>();
    let run = |seed: u64| {
        let sim = Sim::of(seed, card).with_multiprocessors(multiprocessors);
        let mut p = dgrad::Problem {
            storage,
            batch,
            dy: sim.with(&storage.store(&dy)),
            filters,
            weight: sim.with(&dgrad::pack_mirrored(&weight, dims, [first, channels], storage).unwrap()),
            channels,
            kernel,
            stride,
            space,
            dx: room(&sim, n * padded(channels), storage),
            workspace: None,
        };
        let plan = dgrad::plan(&sim, &p).unwrap();
        p.workspace = Some(room(&sim, plan.workspace().div_ceil(4).max(1), Storage::F32));
        dgrad::run(&sim, &p, &plan).unwrap();
        sim.bytes(p.dx)
    };
    let got = run(SEEDS[0]);
    let wide = padded(filters);
    let mut expected: Vec<Bounded> = Vec::new();
    for b in 0..batch {
        for (z, y, x) in voxels(space) {
            // Output voxels that read this one, and by which tap.
            let mut reached = Vec::new();
            for (t, (tz, ty, tx)) in voxels(kernel).enumerate() {
                let at = [(z, tz, 0), (y, ty, 1), (x, tx, 2)].map(|(i, t, a): (usize, usize, usize)| {
                    let twice = (i + kernel[a] / 2).checked_sub(t)?;
                    (twice % stride[a] == 0 && twice / stride[a] < out[a]).then(|| twice / stride[a])
                });
                if let [Some(oz), Some(oy), Some(ox)] = at {
                    reached.push((t, ((b * out[0] + oz) * out[1] + oy) * out[2] + ox));
                }
            }
            for c in first..inputs {
                let (mut sum, mut magnitude) = (0.0, 0.0);
                for (t, at) in &reached {
                    for f in 0..filters {
                        let v = f64::from(dy[at * wide + f]) * f64::from(weight[(f * inputs + c) * taps + t]);
                        sum += v;
                        magnitude += v.abs();
                    }
                }
                expected.push(stored(sum, magnitude, filters * reached.len().max(1), storage));
            }
        }
    }
    let what = format!("{storage:?} {case:?} {first}");
    bound::check(&what, &unpadded(&storage.load(&got), channels), &expected);
    for seed in &SEEDS[1..] {
        assert!(run(*seed) == got, "{what}: bytes depend on the schedule");
    }
}

#[test]
pub(super) fn cuda_train_conv3d_dgrad() {
    let case = Case { batch: 1, space: [3, 9, 10], channels: 20, filters: 24, kernel: [3; 3], stride: [1; 3] };
    check(Storage::Bf16, case, 0);
    check(Storage::F16, Case { batch: 2, kernel: [1, 3, 3], channels: 40, ..case }, 8);
    check(Storage::F32, Case { space: [3, 4, 5], ..case }, 16);
    check(Storage::Bf16, Case { kernel: [1; 3], filters: 70, ..case }, 0);
}

#[test]
pub(super) fn cuda_train_conv3d_dgrad_strides() {
    let case = Case { batch: 2, space: [5, 9, 18], channels: 16, filters: 40, kernel: [3; 3], stride: [2; 3] };
    check(Storage::Bf16, case, 0);
    check(Storage::F16, Case { batch: 1, space: [3, 8, 17], channels: 40, filters: 20, stride: [1, 2, 2], ..case }, 0);
    check(Storage::Bf16, Case { batch: 1, channels: 70, kernel: [1, 3, 3], stride: [1, 2, 2], ..case }, 0);
    check(Storage::Bf16, Case { batch: 1, kernel: [1; 3], ..case }, 0);
    check(Storage::F16, Case { batch: 1, kernel: [3, 1, 3], stride: [2, 2, 1], ..case }, 0);
    check(Storage::F32, Case { space: [4, 5, 6], channels: 20, filters: 17, ..case }, 0);
    check(Storage::F32, Case { space: [3, 5, 6], kernel: [1, 3, 3], stride: [1, 2, 1], filters: 16, ..case }, 0);
}
