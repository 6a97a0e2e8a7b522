//! Activations stored as bf16: every operation gives, to the bit, what it gives on the same numbers stored as f32, rounded
//! when it is stored. (Moments of the direct convolution are summed in another order.)

use std::sync::Arc;

use proptest::prelude::*;
use stunet::autograd::{Ctx, Var};
use stunet::ops::{self, Affine, Conv3d, InstanceNorm, Source, Sources, testing};
use stunet::tensor::{Device, Dims, Precision, Tensor};

use crate::common::drive::{bits, devices, threaded_devices, values};

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Values that bf16 holds exactly.
fn rounded(n: usize, seed: u64) -> Vec<f32> {
    values(n, seed).into_iter().map(|v| Precision::Bf16.round(v)).collect()
}

fn var(cx: &mut Ctx<'_>, values: &[f32], dims: [usize; 5], precision: Precision) -> Var {
    let t = Tensor::from_host(values, Dims::from(dims), cx.device()).unwrap();
    cx.leaf(testing::stored(t, precision).unwrap())
}

/// A normalisation of `channels`, not of any tensor's own moments.
fn norm(device: &Device, batch: usize, channels: usize) -> Affine {
    let dims = [batch, channels, 3, 4, 5];
    let identity: Vec<f32> =
        (0..channels * channels).map(|i| if i % (channels + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let w = testing::filter(&identity, [channels, channels, 1, 1, 1], device).unwrap();
    let how = Conv3d { stride: [1; 3], padding: [0; 3] };
    let mut cx = Ctx::infer(device);
    let x = var(&mut cx, &values(dims.iter().product(), 77), dims, Precision::F32);
    let (_, moments) = ops::conv3d_measured(&mut cx, x, &w, None, how).unwrap();
    let [w, b] = [1, 2].map(|s| testing::vector(&values(channels, s), device).unwrap());
    Affine::new(&moments, &w, &b, InstanceNorm { eps: 1e-5, slope: Some(0.01) }).unwrap()
}

/// What is stored, and what would have been stored of `exact`.
fn same(got: &Tensor, exact: &Tensor) -> bool {
    let exact: Vec<f32> = exact.to_host().unwrap().into_iter().map(|v| got.precision().round(v)).collect();
    testing::padding_is_zero(got) && bits(&got.to_host().unwrap()) == bits(&exact)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Convolutions of two sources, the first repeated and the second normalised while they are read, by every
    /// implementation.
    #[test]
    fn convolutions_round_what_they_store(
        batch in 1..=2_usize,
        channels in [8..=40_usize, 8..=20_usize],
        out in 1..=40_usize,
        low in [1..=5_usize, 1..=5_usize, 1..=9_usize],
        factor in [1..=2_usize, 1..=3_usize, 1..=2_usize],
        kernel in prop::sample::select(vec![[1_usize, 1, 1], [1, 3, 3], [3, 3, 3]]),
        (sz, sxy) in (1..=2_usize, 1..=2_usize),
        mixed in any::<bool>(),
        seed in 0..1_000_000_u64,
    ) {
        let [d, h, w] = [0, 1, 2].map(|a| low[a] * factor[a]);
        let dims = [batch, channels[1], d, h, w];
        let low_dims = [batch, channels[0], low[0], low[1], low[2]];
        let (x, y) = (rounded(low_dims.iter().product(), seed), rounded(dims.iter().product(), seed + 1));
        let inputs = channels[0] + channels[1];
        let filter_dims = [out, inputs, kernel[0], kernel[1], kernel[2]];
        let how = Conv3d { stride: [sz, sxy, sxy], padding: kernel.map(|k| k / 2) };
        for device in devices() {
            let norm = Arc::new(norm(&device, batch, channels[1]));
            let filter = testing::filter(&values(filter_dims.iter().product(), seed + 9), filter_dims, &device).unwrap();
            for name in testing::conv3d_implementations(&device, [batch, inputs, d, h, w], &filter, how) {
                let [exact, stored] = PRECISIONS.map(|p| {
                    let mut cx = Ctx::infer(&device).storing(p);
                    let low = var(&mut cx, &x, low_dims, if mixed { Precision::F32 } else { p });
                    let same = var(&mut cx, &y, dims, p);
                    let lazy = name.starts_with("winograd");
                    let same = if lazy { Source::normalised(same, norm.clone()) } else { same.into() };
                    let sources = Sources::Two(Source::repeated(low, factor), same);
                    let (y, moments) = testing::conv3d(name, &mut cx, sources, &filter, None, how).unwrap();
                    (y.into_value(), moments)
                });
                let precision = if name == "reference" { Precision::F32 } else { Precision::Bf16 };
                prop_assert!(stored.0.precision() == precision, "{name}");
                prop_assert!(same(&stored.0, &exact.0), "{name} {filter_dims:?} at {dims:?}");
                // Moments are those of what is computed, not of what is left of it; only the order of their sums may differ.
                for (n, c) in (0..batch).flat_map(|n| (0..out).map(move |c| (n, c))) {
                    let ((m, v), (n, w)) = (exact.1.of(n, c), stored.1.of(n, c));
                    prop_assert!((m - n).abs() <= 1e-5 * (v.sqrt() + m.abs()) && (v - w).abs() <= 1e-5 * v + 1e-12);
                }
            }
        }
    }

    /// The end of a residual block, in place, with and without a repeated source.
    #[test]
    fn residual_blocks_round_what_they_store(
        batch in 1..=2_usize,
        channels in [1..=40_usize, 0..=20_usize],
        out in 1..=40_usize,
        low in [1..=3_usize, 1..=4_usize, 1..=300_usize],
        factor in [1..=2_usize, 1..=3_usize, 1..=2_usize],
        stride in 1..=2_usize,
        mixed in prop::array::uniform2(any::<bool>()),
        seed in 0..1_000_000_u64,
    ) {
        let two = channels[1] > 0;
        let factor = if two { factor } else { [1; 3] };
        let size = [0, 1, 2].map(|a| low[a] * factor[a]);
        let to = size.map(|n: usize| n.div_ceil(stride));
        let [low_dims, dims] = [(channels[0], low), (channels[1].max(1), size)].map(|(c, [d, h, w])| [batch, c, d, h, w]);
        let y_dims = [batch, out, to[0], to[1], to[2]];
        let (x, z) = (rounded(low_dims.iter().product(), seed), rounded(dims.iter().product(), seed + 2));
        let y = rounded(y_dims.iter().product(), seed + 3);
        let inputs = channels[0] + channels[1];
        let how = Conv3d { stride: [stride; 3], padding: [0; 3] };
        for device in devices() {
            let norm = norm(&device, batch, out);
            let filter = testing::filter(&values(out * inputs, seed + 4), [out, inputs, 1, 1, 1], &device).unwrap();
            let bias = testing::vector(&values(out, seed + 5), &device).unwrap();
            // The convolution of the repeated source is stored before it is added: as floats here, so that the result is
            // the same.
            let [exact, stored] = PRECISIONS.map(|p| {
                let mut cx = Ctx::infer(&device);
                let [of_second, of_before] = mixed.map(|m| if m { Precision::F32 } else { p });
                let first = var(&mut cx, &x, low_dims, p);
                let sources = if two {
                    let second = var(&mut cx, &z, dims, of_second);
                    Sources::Two(Source::repeated(first, factor), second.into())
                } else {
                    first.into()
                };
                let before = var(&mut cx, &y, y_dims, of_before);
                let place = testing::address(before.value());
                let y = ops::conv3d_residual(&mut cx, before, &norm, sources, &filter, Some(&bias), how).unwrap();
                assert_eq!(testing::address(y.value()), place, "in place");
                y.into_value()
            });
            let place = PRECISIONS[usize::from(!mixed[1])];
            prop_assert!(stored.precision() == place);
            prop_assert!(same(&stored, &exact), "{channels:?} {low:?} {factor:?} {stride} on {}", device.isa().name());
        }
    }
}

/// An addend stored as bf16 is its rounded values.
#[test]
fn a_rounded_addend_is_added() {
    for device in devices() {
        let (low, factor, size) = ([2, 3, 7], [2, 2, 3], [4, 6, 21]);
        let (norm, x) = (norm(&device, 1, 24), rounded(40 * 42, 1));
        let (z, y) = (rounded(20 * 504, 2), rounded(24 * 504, 3));
        let w = testing::filter(&values(24 * 60, 4), [24, 60, 1, 1, 1], &device).unwrap();
        let part = testing::filter(
            &values(24 * 60, 4).chunks(60).flat_map(|r| r[..40].to_vec()).collect::<Vec<_>>(),
            [24, 40, 1, 1, 1],
            &device,
        )
        .unwrap();
        let rest = testing::filter(
            &values(24 * 60, 4).chunks(60).flat_map(|r| r[40..].to_vec()).collect::<Vec<_>>(),
            [24, 20, 1, 1, 1],
            &device,
        )
        .unwrap();
        let how = Conv3d { stride: [1; 3], padding: [0; 3] };
        // Whatever the others are stored in.
        let mixed = (0..8).map(|i| [1, 2, 4].map(|bit| PRECISIONS[usize::from(i & bit > 0)]));
        let all = mixed.map(|[of_first, of_second, of_before]| {
            let mut cx = Ctx::infer(&device).storing(Precision::Bf16);
            let first = var(&mut cx, &x, [1, 40, 2, 3, 7], of_first);
            let second = var(&mut cx, &z, [1, 20, 4, 6, 21], of_second);
            let before = var(&mut cx, &y, [1, 24, 4, 6, 21], of_before);
            let sources = Sources::Two(Source::repeated(first, factor), second.into());
            ops::conv3d_residual(&mut cx, before, &norm, sources, &w, None, how).unwrap().into_value()
        });
        let all: Vec<Tensor> = all.collect();
        // The same in steps of f32: the addend rounded, then everything else.
        let mut cx = Ctx::infer(&device);
        let first = var(&mut cx, &x, [1, 40, low[0], low[1], low[2]], Precision::F32);
        let addend = ops::conv3d(&mut cx, first, &part, None, how).unwrap().into_value();
        let addend: Vec<f32> = addend.to_host().unwrap().into_iter().map(|v| Precision::Bf16.round(v)).collect();
        let addend = var(&mut cx, &addend, [1, 24, low[0], low[1], low[2]], Precision::F32);
        let addend = ops::upsample_nearest(&mut cx, addend, factor).unwrap();
        let second = var(&mut cx, &z, [1, 20, size[0], size[1], size[2]], Precision::F32);
        let sum = ops::conv3d(&mut cx, second, &rest, None, how).unwrap();
        let sum = ops::add(&mut cx, sum, addend).unwrap();
        let before = var(&mut cx, &y, [1, 24, 4, 6, 21], Precision::F32);
        let exact = norm.apply(&mut cx, before, Some(sum)).unwrap().into_value();
        for got in &all {
            let last = if got.precision() == Precision::F32 { 0.0 } else { 2f32.powi(-8) };
            for (g, e) in got.to_host().unwrap().iter().zip(exact.to_host().unwrap()) {
                // Sums in another order, so that a value may round to the other side.
                assert!((g - e).abs() <= last * e.abs() + 2e-5, "{g} {e}");
            }
        }
    }
}

/// An output in the place of its input, for any number of threads.
#[test]
fn in_place_as_beside() {
    let dims = [1, 16, 130, 34, 98];
    let x = rounded(dims.iter().product(), 5);
    let weights = values(16 * 16 * 27, 6);
    let how = Conv3d { stride: [1; 3], padding: [1; 3] };
    for devices in threaded_devices() {
        let mut first: Option<Vec<u32>> = None;
        for device in &devices {
            let filter = testing::filter(&weights, [16, 16, 3, 3, 3], device).unwrap();
            let norm = Arc::new(norm(device, 1, 16));
            for shared in [true, false] {
                let mut cx = Ctx::infer(device).storing(Precision::Bf16);
                let input = var(&mut cx, &x, dims, Precision::Bf16);
                let place = testing::address(input.value());
                let other = shared.then(|| input.clone());
                let y = ops::conv3d(&mut cx, Source::normalised(input, norm.clone()), &filter, None, how).unwrap();
                assert_eq!(testing::address(y.value()) == place, !shared);
                drop(other);
                let got = bits(&y.value().to_host().unwrap());
                assert!(*first.get_or_insert_with(|| got.clone()) == got, "{} threads", device.threads());
            }
        }
    }
}

/// Operations that normalise, decide, or have no form of their own for bf16.
#[test]
fn other_operations_read_it() {
    let dims = [2, 37, 5, 6, 11];
    let n = dims.iter().product();
    let (x, r) = (rounded(n, 1), rounded(n, 2));
    for device in devices() {
        let [w, b] = [3, 4].map(|s| testing::vector(&values(37, s), &device).unwrap());
        let (weight, bias) = (values(9 * 37, 5), values(9, 6));
        let how = InstanceNorm { eps: 1e-5, slope: Some(0.01) };
        let [exact, stored] = PRECISIONS.map(|p| {
            let mut cx = Ctx::infer(&device).storing(p);
            let [a, c, e, f] = [&x, &r, &x, &x].map(|v| var(&mut cx, v, dims, p));
            let normal = ops::instance_norm(&mut cx, a, &w, &b, Some(c), how).unwrap().into_value();
            let plain = ops::leaky_relu(&mut cx, e, 0.1).unwrap();
            let up = ops::upsample_nearest(&mut cx, plain, [1, 2, 1]).unwrap().into_value();
            (normal, up, ops::head_labels(&mut cx, f, &weight, &bias).unwrap())
        });
        assert!(same(&stored.0, &exact.0) && stored.0.precision() == Precision::Bf16);
        assert!(bits(&stored.1.to_host().unwrap()) == bits(&exact.1.to_host().unwrap()));
        assert!(stored.2 == exact.2);
    }
}
