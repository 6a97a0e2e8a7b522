//! Moments of tiles and of all of them together.

use stunet::backend_testing::cuda::{Storage, moments, padded};

use super::sim::Sim;
use super::{SEEDS, activation, cards, random, room};
use crate::common::bound::{U, gamma};

/// Mean and standard deviation of the channel, whose values are `offset` away from zero.
/// On every card that knows the storage.
fn check(storage: Storage, batch: usize, space: [usize; 3], channels: usize, offset: f32) {
    for card in cards(storage) {
        check_on(*card, storage, batch, space, channels, offset);
    }
}

fn check_on(card: [u32; 2], storage: Storage, batch: usize, space: [usize; 3], channels: usize, offset: f32) {
    let c = padded(channels);
    let n: usize = space.iter().product();
    let mut values = activation(batch, space, channels, storage, 3);
    for v in values.chunks_exact_mut(c) {
        v[..channels].iter_mut().for_each(|v| *v += offset);
    }
    let values = super::rounded(&values, storage);
    let eps = 1e-5f32;
    let (mut weight, mut bias) = (random(channels, 1), random(channels, 2));
    weight.resize(c, 0.0);
    bias.resize(c, 0.0);
    let run = |seed: u64| {
        let sim = Sim::of(seed, card);
        let tiles = moments::count(space);
        let partials = room(&sim, batch * tiles * 3 * c, Storage::F32);
        let data = sim.with(&storage.store(&values));
        moments::tiles(&sim, &moments::Tiles { storage, batch, channels, space, data, partials }).unwrap();
        let norm = room(&sim, batch * 3 * c, Storage::F32);
        let merge = moments::Merge {
            batch,
            channels,
            voxels: n,
            tiles,
            partials,
            weight: sim.with(bytemuck::cast_slice(&weight)),
            bias: sim.with(bytemuck::cast_slice(&bias)),
            eps,
            norm,
            inverses: None,
        };
        moments::merge(&sim, &merge).unwrap();
        sim.bytes(norm)
    };
    let bytes = run(SEEDS[0]);
    for seed in &SEEDS[1..] {
        assert!(run(*seed) == bytes, "bytes depend on the schedule");
    }
    let got = Storage::F32.load(&bytes);
    for b in 0..batch {
        for k in 0..channels {
            let x = || (0..n).map(|v| f64::from(values[(b * n + v) * c + k]));
            let mean = x().sum::<f64>() / n as f64;
            let variance = x().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            let deviation = (variance + f64::from(eps)).sqrt();
            let at = |plane: usize| f64::from(got[(b * 3 + plane) * c + k]);
            // The tile's mean is taken twice, the second time of deviations: what is left is the rounding of the mean
            // itself, and of sums of deviations of 8 voxels and 64 strands.
            let off = 4.0 * U * mean.abs() + gamma(80) * deviation;
            assert!((at(0) - mean).abs() <= off, "mean {} of channel {k}, expected {mean} within {off}", at(0));
            let scale = f64::from(weight[k]) / deviation;
            // Tiles' means are rounded to f32: the squares of their deviations are off by this, and the scale by half.
            let all: Vec<f64> = x().collect();
            let spread =
                all.chunks(512).map(|t| (t.iter().sum::<f64>() / t.len() as f64 - mean).abs()).fold(0.0, f64::max);
            let e = 2.0 * U * mean.abs();
            let relative = gamma(160) + (2.0 * spread * e + e * e) / deviation.powi(2);
            let error = (at(1) - scale).abs();
            assert!(error <= relative * scale.abs(), "scale {} of channel {k}, expected {scale}", at(1));
            assert_eq!(got[(b * 3 + 2) * c + k], bias[k]);
        }
        for k in channels..c {
            assert_eq!([1, 2].map(|plane| got[(b * 3 + plane) * c + k]), [0.0; 2], "padding");
        }
    }
}

#[test]
pub(super) fn ptx_moments_of_a_tensor() {
    check(Storage::F32, 2, [7, 9, 10], 20, 0.0);
    check(Storage::Bf16, 1, [16, 17, 18], 32, 0.25);
    check(Storage::F16, 2, [3, 3, 3], 48, 1.0);
    check(Storage::F32, 1, [1, 1, 1], 16, 0.5);
}

/// A mean far away from zero against the deviation: the difference of squares would have lost everything.
#[test]
pub(super) fn ptx_moments_do_not_cancel() {
    check(Storage::F32, 1, [9, 10, 11], 16, 3000.0);
}

/// More tiles than a block takes at once, of known moments.
#[test]
pub(super) fn ptx_moments_of_many_tiles() {
    let (tiles, c, each) = (1000, 16, 512.0f32);
    let means = random(tiles * c, 9);
    let mut partials = vec![each; tiles * 3 * c];
    for t in 0..tiles {
        for k in 0..c {
            partials[(t * 3 + 1) * c + k] = 5.0 + means[t * c + k];
            partials[(t * 3 + 2) * c + k] = each * 2.0;
        }
    }
    let sim = Sim::new(0);
    let norm = room(&sim, 3 * c, Storage::F32);
    let ones = sim.with(bytemuck::cast_slice(&[1.0f32; 16]));
    let merge = moments::Merge {
        batch: 1,
        channels: c,
        voxels: tiles * each as usize,
        tiles,
        partials: sim.with(bytemuck::cast_slice(&partials)),
        weight: ones,
        bias: ones,
        eps: 0.0,
        norm,
        inverses: None,
    };
    moments::merge(&sim, &merge).unwrap();
    let got = Storage::F32.load(&sim.bytes(norm));
    for k in 0..c {
        let x = || (0..tiles).map(|t| f64::from(partials[(t * 3 + 1) * c + k]));
        let mean = x().sum::<f64>() / tiles as f64;
        let variance = 2.0 + x().map(|v| (v - mean).powi(2)).sum::<f64>() / tiles as f64;
        assert!((f64::from(got[k]) - mean).abs() <= 2.0 * U * mean.abs(), "{} {mean}", got[k]);
        let scale = 1.0 / variance.sqrt();
        assert!((f64::from(got[c + k]) - scale).abs() <= gamma(6) * scale, "{} {scale}", got[c + k]);
    }
}
