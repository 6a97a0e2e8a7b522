//! The way back of instance normalisation.

use stunet::backend_testing::cuda::instance_norm_grad::{self as kernel, Mask};
use stunet::backend_testing::cuda::{Norm, Storage, moments, padded};

use super::sim::Sim;
use super::{SEEDS, activation, cards, half_ulp, random, room, unpadded};
use crate::common::bound::{self, Bounded, gamma};

const SLOPE: f32 = 0.01;

/// On every card that knows the storage.
fn check(storage: Storage, batch: usize, space: [usize; 3], channels: usize, added: bool) {
    for card in cards(storage) {
        check_on(*card, storage, batch, space, channels, added);
    }
}

fn check_on(card: [u32; 2], storage: Storage, batch: usize, space: [usize; 3], channels: usize, added: bool) {
    let (c, v) = (padded(channels), space.iter().product::<usize>());
    let x = activation(batch, space, channels, storage, 3);
    let dy = activation(batch, space, channels, storage, 4);
    let result = activation(batch, space, channels, storage, 5);
    let pad = |mut v: Vec<f32>| {
        v.resize(c, 0.0);
        v
    };
    let weight = pad(random(channels, 6).into_iter().map(|w| w + 1.5).collect());
    let bias = pad(random(channels, 7));
    let run = |seed: u64| {
        let sim = Sim::of(seed, card);
        let floats = |n: usize| room(&sim, n, Storage::F32);
        let [data, gradient, out] = [&x, &dy, &result].map(|t| sim.with(&storage.store(t)));
        let [w, b] = [&weight, &bias].map(|t| sim.with(bytemuck::cast_slice(t)));
        let (planes, inverses) = (floats(batch * 3 * c), floats(batch * c));
        let tiles = moments::count(space);
        let partials = floats(batch * tiles * 3 * c);
        moments::tiles(&sim, &moments::Tiles { storage, batch, channels, space, data, partials }).unwrap();
        let merge = moments::Merge {
            batch,
            channels,
            voxels: v,
            tiles,
            partials,
            weight: w,
            bias: b,
            eps: 1e-5,
            norm: planes,
            inverses: Some(inverses),
        };
        moments::merge(&sim, &merge).unwrap();
        let dx = if added { room(&sim, batch * v * c, storage) } else { gradient };
        let p = kernel::Problem {
            storage,
            batch,
            channels,
            space,
            x: data,
            norm: Norm { planes, slope: SLOPE },
            inverses,
            dy: gradient,
            mask: if added { Mask::Added { result: out, masked: gradient } } else { Mask::Normalised },
            partials: floats(kernel::partials(batch, channels, space)),
            sums: floats(batch * 2 * c),
            dweight: floats(c),
            dbias: floats(c),
            dx,
        };
        kernel::run(&sim, &p).unwrap();
        [p.dx, p.dweight, p.dbias, gradient].map(|m| sim.bytes(m))
    };
    let got = run(SEEDS[0]);
    let u = gamma(1);
    let (mut dx, mut masked) = (Vec::new(), Vec::new());
    let none = Bounded { value: 0.0, error: 0.0 };
    let (mut dweight, mut dbias) = (vec![none; channels], vec![none; channels]);
    let mut columns = vec![Vec::new(); batch * channels];
    for n in 0..batch {
        for k in 0..channels {
            let at = |t: &[f32], i: usize| f64::from(t[(n * v + i) * c + k]);
            let mean = (0..v).map(|i| at(&x, i)).sum::<f64>() / v as f64;
            let variance = (0..v).map(|i| (at(&x, i) - mean).powi(2)).sum::<f64>() / v as f64;
            let inverse = 1.0 / (variance + 1e-5).sqrt();
            let (w, b) = (f64::from(weight[k]), f64::from(bias[k]));
            let h: Vec<f64> = (0..v).map(|i| (at(&x, i) - mean) * inverse).collect();
            // The side of leaky ReLU has to be beyond doubt.
            let side = |i: usize| if added { at(&result, i) } else { h[i] * w + b };
            let g: Vec<f64> = (0..v)
                .map(|i| {
                    assert!(added || side(i).abs() > 1e-6, "a value at the kink");
                    let g = at(&dy, i) * if side(i) > 0.0 { 1.0 } else { f64::from(SLOPE) };
                    if added { f64::from(super::rounded(&[g as f32], storage)[0]) } else { g }
                })
                .collect();
            // h is off by the roundings of mean, deviation and itself, relative to the largest it is made of.
            let off = 8.0 * u;
            let size = |i: usize| h[i].abs() + mean.abs() * inverse + 1.0;
            let (mut sg, mut sgh, mut mg, mut mgh) = (0.0, 0.0, 0.0, 0.0);
            for i in 0..v {
                sg += g[i];
                sgh += g[i] * h[i];
                mg += g[i].abs();
                mgh += g[i].abs() * size(i);
            }
            // Eight terms a strand and 64 strands one after the other; tiles are merged with care.
            let sums = gamma(80);
            let (eg, egh) = (sums * mg, (sums + off) * mgh);
            dbias[k].value += sg;
            dbias[k].error += eg + u * sg.abs();
            dweight[k].value += sgh;
            dweight[k].error += egh + u * sgh.abs();
            let scale = w * inverse;
            for i in 0..v {
                let value = scale * (g[i] - sg / v as f64 - h[i] * sgh / v as f64);
                let magnitude = g[i].abs() + mg / v as f64 + size(i) * mgh / v as f64;
                let error = scale.abs() * ((off + 8.0 * u) * magnitude + (eg + egh * size(i)) / v as f64);
                columns[n * channels + k].push((
                    Bounded { value, error: error + half_ulp(value.abs() + error, storage) },
                    Bounded {
                        value: g[i],
                        error: half_ulp(g[i], storage) * if storage == Storage::F32 { 2.0 } else { 0.0 },
                    },
                ));
            }
        }
        for i in 0..v {
            for k in 0..channels {
                dx.push(columns[n * channels + k][i].0);
                masked.push(columns[n * channels + k][i].1);
            }
        }
    }
    let what = format!("{storage:?} {batch} {space:?} {channels} added {added}");
    bound::check(&format!("{what}: dx"), &unpadded(&storage.load(&got[0]), channels), &dx);
    if added {
        bound::check(&format!("{what}: masked"), &unpadded(&storage.load(&got[3]), channels), &masked);
    }
    for (name, bytes, expected) in [("weight", &got[1], &dweight), ("bias", &got[2], &dbias)] {
        bound::check(&format!("{what}: {name}"), &unpadded(&Storage::F32.load(bytes), channels), expected);
    }
    for seed in &SEEDS[1..] {
        assert!(run(*seed) == got, "{what}: bytes depend on the schedule");
    }
}

#[test]
pub(super) fn cuda_train_instance_norm_grad() {
    check(Storage::F32, 2, [3, 4, 5], 20, false);
    check(Storage::Bf16, 2, [4, 9, 16], 16, false);
    check(Storage::F16, 1, [9, 8, 9], 40, true);
    check(Storage::Bf16, 1, [3, 5, 7], 24, true);
    check(Storage::F32, 1, [2, 3, 9], 16, true);
}
