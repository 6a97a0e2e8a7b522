//! conv3d with what is fused into it: inputs that are normalised or repeated while they are read, moments of the output,
//! the end of a residual block; and how accurate the implementations with fewer products are.

use std::sync::Arc;

use proptest::prelude::*;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops::{self, Affine, Conv3d, InstanceNorm, Moments, Source, Sources, testing};

use crate::common::bound::gamma;
use crate::common::drive::{activation, bits, devices, result, threaded_devices, values};

/// Moments of values `[N, C, voxels]` and a normalisation made of them, by way of a 1x1x1 identity convolution.
fn affine(device: &Device, x: &[f32], dims: [usize; 5], slope: f32, seed: u64) -> (Affine, Moments) {
    let c = dims[1];
    let identity: Vec<f32> = (0..c * c).map(|i| if i % (c + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let w = testing::filter(&identity, [c, c, 1, 1, 1], device).unwrap();
    let mut cx = Ctx::infer(device);
    let x = activation(&mut cx, x, dims, true);
    let (_, moments) = ops::conv3d_measured(&mut cx, x, &w, None, Conv3d { stride: [1; 3], padding: [0; 3] }).unwrap();
    let [weight, bias] = [1, 2].map(|k| testing::vector(&values(c, seed + k), device).unwrap());
    let how = InstanceNorm { eps: 1e-5, slope: Some(slope) };
    (Affine::new(&moments, &weight, &bias, how).unwrap(), moments)
}

/// Everything that a convolution may read: kernel, stride and sizes of a small problem.
#[derive(Debug, Clone)]
struct Problem {
    batch: usize,
    channels: [usize; 2],
    out: usize,
    /// Voxels of the first source, which is repeated `factor` times.
    low: [usize; 3],
    factor: [usize; 3],
    kernel: [usize; 3],
    stride: [usize; 3],
    seed: u64,
}

prop_compose! {
    fn problem()(
        batch in 1..=2_usize,
        channels in [8..=40_usize, 8..=20_usize],
        out in 1..=40_usize,
        low in [1..=5_usize, 1..=5_usize, 1..=9_usize],
        factor in [1..=2_usize, 1..=3_usize, 1..=2_usize],
        flat in any::<bool>(),
        (sz, sxy) in (1..=2_usize, 1..=2_usize),
        seed in 0..1_000_000_u64,
    ) -> Problem {
        let kernel = if flat { [1, 3, 3] } else { [3; 3] };
        Problem { batch, channels, out, low, factor, kernel, stride: [sz, sxy, sxy], seed }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Reading lazily gives the bits of reading what was made before, by every implementation.
    #[test]
    fn lazy_inputs_are_made_inputs(p in problem()) {
        let [d, h, w] = [0, 1, 2].map(|a| p.low[a] * p.factor[a]);
        let dims = [p.batch, p.channels[1], d, h, w];
        let low_dims = [p.batch, p.channels[0], p.low[0], p.low[1], p.low[2]];
        let (x, y) = (values(low_dims.iter().product(), p.seed), values(dims.iter().product(), p.seed + 1));
        let inputs = p.channels[0] + p.channels[1];
        let filter_dims = [p.out, inputs, p.kernel[0], p.kernel[1], p.kernel[2]];
        let how = Conv3d { stride: p.stride, padding: p.kernel.map(|k| k / 2) };
        for device in devices() {
            let (norm, _) = affine(&device, &y, dims, 0.01, p.seed);
            let norm = Arc::new(norm);
            let filter = testing::filter(&values(filter_dims.iter().product(), p.seed + 9), filter_dims, &device).unwrap();
            let input = [p.batch, inputs, d, h, w];
            for name in testing::conv3d_implementations(&device, input, &filter, how) {
                // Without fused multiply-adds a normalisation rounds once more than the device's own would.
                if name.starts_with("winograd") && !name.ends_with(device.isa().name()) {
                    continue;
                }
                let mut cx = Ctx::infer(&device);
                let mut run = |lazy: bool| {
                    let low = activation(&mut cx, &x, low_dims, true);
                    let same = activation(&mut cx, &y, dims, true);
                    let sources = if lazy {
                        Sources::Two(Source::repeated(low, p.factor), Source::normalised(same, norm.clone()))
                    } else {
                        let low = ops::upsample_nearest(&mut cx, low, p.factor).unwrap();
                        Sources::Two(low.into(), norm.apply(&mut cx, same, None).unwrap().into())
                    };
                    let (y, moments) = testing::conv3d(name, &mut cx, sources, &filter, None, how).unwrap();
                    assert!(testing::padding_is_zero(y.value()));
                    (bits(&result(y)), moments)
                };
                let (lazy, made) = (run(true), run(false));
                prop_assert!(lazy.0 == made.0, "{name} {p:?}");
                prop_assert!(lazy.1 == made.1, "{name} {p:?}");
            }
        }
    }
}

/// Moments taken while the output is written are those of the output, with a mean that is large against the deviation.
#[test]
fn moments_are_those_of_the_output() {
    let (dims, out) = ([2, 16, 6, 13, 21], 20);
    let x: Vec<f32> = values(dims.iter().product(), 3).iter().map(|v| v + 3.0).collect();
    for (kernel, stride) in [([3, 3, 3], 1), ([3, 3, 3], 2), ([1, 3, 3], 1), ([1, 1, 1], 1)] {
        let filter_dims = [out, 16, kernel[0], kernel[1], kernel[2]];
        let how = Conv3d { stride: [stride; 3], padding: kernel.map(|k| k / 2) };
        for device in devices() {
            let w = testing::filter(&values(filter_dims.iter().product(), 4), filter_dims, &device).unwrap();
            let bias = testing::vector(&values(out, 5), &device).unwrap();
            for name in testing::conv3d_implementations(&device, dims, &w, how) {
                let mut cx = Ctx::infer(&device);
                let input = activation(&mut cx, &x, dims, true);
                let (y, moments) = testing::conv3d(name, &mut cx, input, &w, Some(&bias), how).unwrap();
                let voxels = y.value().dims().space().iter().product::<usize>();
                for (nc, v) in y.value().to_host().unwrap().chunks_exact(voxels).enumerate() {
                    let v: Vec<f64> = v.iter().map(|v| f64::from(*v)).collect();
                    let mean = v.iter().sum::<f64>() / voxels as f64;
                    let variance = v.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / voxels as f64;
                    let (m, s) = moments.of(nc / out, nc % out);
                    // Sums in f32 of at most this many deviations, each at most the range.
                    let range = v.iter().fold(0f64, |r, x| r.max((x - v[0]).abs()).max((x - mean).abs()));
                    let unit = gamma(voxels.min(2048) + 4);
                    assert!((m - mean).abs() <= unit * 2.0 * range, "{name} {kernel:?}: {m} {mean}");
                    assert!((s - variance).abs() <= unit * 8.0 * range * range, "{name} {kernel:?}: {s} {variance}");
                }
            }
        }
    }
}

/// An output in the place of its input has the bits of one beside it, and the same moments, for any number of threads.
/// Without another owner of the input, every implementation with few products writes there if it has blocks enough.
#[test]
fn an_output_takes_the_place_of_its_input() {
    for (kernel, channels, [d, h, w], seed) in [([3, 3, 3], 20, [33, 34, 98], 31), ([1, 3, 3], 16, [9, 50, 130], 41)] {
        let dims = [2, channels, d, h, w];
        let x = values(dims.iter().product(), seed);
        let filter_dims = [channels, channels, kernel[0], kernel[1], kernel[2]];
        let weights = values(filter_dims.iter().product(), seed + 1);
        let how = Conv3d { stride: [1; 3], padding: kernel.map(|k| k / 2) };
        for devices in threaded_devices() {
            let filter = testing::filter(&weights, filter_dims, &devices[0]).unwrap();
            for name in testing::conv3d_implementations(&devices[0], dims, &filter, how) {
                let own_set = name.ends_with(devices[0].isa().name());
                if !name.starts_with("winograd") || !own_set {
                    continue;
                }
                let mut first: Option<(Vec<u32>, Moments)> = None;
                for device in &devices {
                    let (norm, _) = affine(device, &x, dims, 0.01, seed);
                    let norm = Arc::new(norm);
                    let filter = testing::filter(&weights, filter_dims, device).unwrap();
                    // What is beside its input is compared once.
                    for shared in if first.is_none() { &[true, false][..] } else { &[false] } {
                        let mut cx = Ctx::infer(device);
                        let input = activation(&mut cx, &x, dims, true);
                        let place = testing::address(input.value());
                        let other = shared.then(|| input.clone());
                        let source = Sources::One(Source::normalised(input, norm.clone()));
                        let (y, moments) = testing::conv3d(name, &mut cx, source, &filter, None, how).unwrap();
                        assert_eq!(testing::address(y.value()) == place, !*shared, "{name} {dims:?}");
                        if let Some(other) = other {
                            assert!(
                                bits(&other.value().to_host().unwrap()) == bits(&x),
                                "{name}: an input with an owner changed"
                            );
                        }
                        let got = (bits(&result(y)), moments);
                        let first = first.get_or_insert_with(|| got.clone());
                        assert!(*first == got, "{name} {dims:?} with {} threads", device.threads());
                    }
                }
            }
        }
    }
}

/// `leaky_relu(normalised(y) + conv(x))` against f64, with a repeated first source, and in place.
#[test]
fn residual_blocks_end_in_one_pass() {
    let slope = 0.01;
    for (channels, factor, stride, out) in
        [([20, 24], [1, 2, 2], 1, 40), ([17, 16], [2, 2, 2], 1, 16), ([32, 0], [1; 3], 2, 33), ([1, 0], [1; 3], 1, 32)]
    {
        let low: [usize; 3] = [2, 3, 5];
        let size = [0, 1, 2].map(|a| low[a] * factor[a]);
        let to: [usize; 3] = size.map(|n: usize| n.div_ceil(stride));
        let [low_dims, dims] = [(channels[0], low), (channels[1], size)].map(|(c, [d, h, w])| [2, c, d, h, w]);
        let y_dims = [2, out, to[0], to[1], to[2]];
        let (x, z) = (values(low_dims.iter().product(), 1), values(dims.iter().product(), 2));
        let y = values(y_dims.iter().product(), 3);
        let inputs = channels[0] + channels[1];
        let (w, b) = (values(out * inputs, 4), values(out, 5));
        let how = Conv3d { stride: [stride; 3], padding: [0; 3] };
        for device in devices() {
            let (norm, moments) = affine(&device, &y, y_dims, slope, 6);
            let filter = testing::filter(&w, [out, inputs, 1, 1, 1], &device).unwrap();
            let bias = testing::vector(&b, &device).unwrap();
            let [scale, shift] = [7, 8].map(|s| values(out, s));
            let mut cx = Ctx::infer(&device);
            let first = activation(&mut cx, &x, low_dims, channels[0] > 1);
            let sources = if channels[1] > 0 {
                let second = activation(&mut cx, &z, dims, true);
                Sources::Two(Source::repeated(first, factor), second.into())
            } else {
                first.into()
            };
            let before = activation(&mut cx, &y, y_dims, true);
            let place = testing::address(before.value());
            let got = ops::conv3d_residual(&mut cx, before, &norm, sources, &filter, Some(&bias), how).unwrap();
            assert_eq!(testing::address(got.value()), place, "in place");
            assert!(testing::padding_is_zero(got.value()));
            let got = got.value().to_host().unwrap();
            let voxels: usize = to.iter().product();
            for (i, got) in got.iter().enumerate() {
                let (n, o, v) = (i / voxels / out, i / voxels % out, i % voxels);
                let at = [v / (to[1] * to[2]), v / to[2] % to[1], v % to[2]].map(|a| a * stride);
                let index = |c: usize, all: usize, at: [usize; 3], size: [usize; 3]| {
                    (((n * all + c) * size[0] + at[0]) * size[1] + at[1]) * size[2] + at[2]
                };
                let (mut sum, mut absolute) = (f64::from(b[o]), f64::from(b[o].abs()));
                for c in 0..inputs {
                    let x = if c < channels[0] {
                        x[index(c, channels[0], [0, 1, 2].map(|a| at[a] / factor[a]), low)]
                    } else {
                        z[index(c - channels[0], channels[1], at, size)]
                    };
                    let product = f64::from(x) * f64::from(w[o * inputs + c]);
                    sum += product;
                    absolute += product.abs();
                }
                let (mean, variance) = moments.of(n, o);
                let normal = (f64::from(y[i]) - mean) / (variance + 1e-5).sqrt();
                let affine = normal * f64::from(scale[o]) + f64::from(shift[o]);
                let size = absolute + (normal * f64::from(scale[o])).abs() + f64::from(shift[o].abs());
                let value = sum + affine;
                let value = if value > 0.0 { value } else { value * f64::from(slope) };
                // The products, and a few roundings of the normalisation; the mean may be large against the deviation.
                let mean = (mean / (variance + 1e-5).sqrt() * f64::from(scale[o])).abs();
                let error = gamma(inputs + 8) * (size + mean);
                assert!((f64::from(*got) - value).abs() <= error, "{channels:?} [{i}]: {got} {value} within {error:e}");
            }
        }
    }
}

/// Relative root mean square errors of every implementation on a layer of a real network's statistics, against f64: those
/// with fewer products lose what a sum in sequence loses at most a few times over, the strict ones hardly more.
#[test]
fn fewer_products_stay_accurate() {
    let (inputs, out, [d, h, w]) = (64, 16, [8, 8, 12]);
    let dims = [1, inputs, d, h, w];
    let relu = |v: f32| if v > 0.0 { v } else { 0.01 * v };
    let x: Vec<f32> = values(dims.iter().product(), 21).into_iter().map(relu).collect();
    for stride in [1, 2] {
        let filter = values(out * inputs * 27, 22);
        let how = Conv3d { stride: [stride; 3], padding: [1; 3] };
        let to = [d, h, w].map(|n: usize| n.div_ceil(stride));
        let voxels: usize = to.iter().product();
        // In f64, and as a sequence of f32 sums.
        let (mut exact, mut plain) = (Vec::new(), Vec::new());
        for i in 0..out * voxels {
            let (o, v) = (i / voxels, i % voxels);
            let at = [v / (to[1] * to[2]), v / to[2] % to[1], v % to[2]];
            let (mut sum, mut narrow) = (0f64, 0f32);
            for t in 0..inputs * 27 {
                let (c, k) = (t / 27, [t / 9 % 3, t / 3 % 3, t % 3]);
                let p = [0, 1, 2].map(|a| (at[a] * stride + k[a]).wrapping_sub(1));
                if p[0] < d && p[1] < h && p[2] < w {
                    let (a, b) = (x[((c * d + p[0]) * h + p[1]) * w + p[2]], filter[(o * inputs + c) * 27 + t % 27]);
                    sum += f64::from(a) * f64::from(b);
                    narrow += a * b;
                }
            }
            exact.push(sum);
            plain.push(narrow);
        }
        let rms = |v: &[f32]| {
            let (mut e, mut n) = (0.0, 0.0);
            for (v, x) in v.iter().zip(&exact) {
                e += (f64::from(*v) - x).powi(2);
                n += x * x;
            }
            (e / n).sqrt()
        };
        let sequence = rms(&plain);
        for device in devices() {
            let w = testing::filter(&filter, [out, inputs, 3, 3, 3], &device).unwrap();
            for name in testing::conv3d_implementations(&device, dims, &w, how) {
                let mut cx = Ctx::infer(&device);
                let input = activation(&mut cx, &x, dims, true);
                let y = testing::conv3d(name, &mut cx, input, &w, None, how).unwrap().0;
                let error = rms(&y.value().to_host().unwrap()) / sequence;
                // A study in NumPy gave 2.2 for F(4,4,4), 0.7 for F(4,2,2) and 0.5 for F(2,2,2); another order of the same sum
                // moves its error by some percent.
                let most =
                    if name.starts_with("winograd_444") || name.starts_with("winograd_244") { 3.0 } else { 1.25 };
                eprintln!("{name} stride {stride}: {error:.2} times {sequence:.1e}");
                assert!(error <= most, "{name} stride {stride}: {error:.2} times {sequence:.1e}");
            }
            let mut cx = Ctx::infer(&device).strict(true).traced();
            let input = activation(&mut cx, &x, dims, true);
            ops::conv3d(&mut cx, input, &w, None, how).unwrap();
            let taken = cx.steps()[0].implementation;
            assert!(!taken.starts_with("winograd_444") && !taken.starts_with("winograd_244"), "{taken}");
        }
    }
}
