//! head_labels: every implementation against the definition in its own order of arithmetic, so that labels are equal and
//! not only nearly the best.

use proptest::prelude::*;
use stunet::autograd::Ctx;
use stunet::ops::{self, testing};
use stunet::{Device, Error};

use crate::common::drive::{activation, devices, soil, threaded_devices, values};

/// `x` in `[N, C, voxels]` order; `fused`: products are not rounded before they are added.
fn reference(x: &[f32], [n, c, voxels]: [usize; 3], weight: &[f32], bias: &[f32], fused: bool) -> Vec<u16> {
    let mut out = Vec::with_capacity(n * voxels);
    for i in 0..n * voxels {
        let (mut best, mut label) = (f32::NEG_INFINITY, 0);
        for (class, (row, &b)) in weight.chunks_exact(c).zip(bias).enumerate() {
            let at = |k: usize| x[(i / voxels * c + k) * voxels + i % voxels];
            let add = |sum: f32, k: usize| if fused { row[k].mul_add(at(k), sum) } else { row[k] * at(k) + sum };
            let score = (0..c).fold(b, add);
            if score > best {
                (best, label) = (score, class as u16);
            }
        }
        out.push(label);
    }
    out
}

fn check(x: &[f32], dims: [usize; 5], weight: &[f32], bias: &[f32], blocked: bool) {
    let [n, c, d, h, w] = dims;
    for device in devices() {
        for name in testing::implementations(&device) {
            let mut cx = Ctx::infer(&device);
            soil(&device, dims);
            let v = activation(&mut cx, x, dims, blocked);
            let labels = testing::head_labels(name, &mut cx, v, weight, bias).unwrap();
            let expected = reference(x, [n, c, d * h * w], weight, bias, name != "scalar");
            let wrong = labels.iter().zip(&expected).position(|(a, b)| a != b);
            assert_eq!((labels.len(), wrong), (expected.len(), None), "{name}, {dims:?}, {} classes", bias.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Few different values: ties abound, and the first class has to win them.
    #[test]
    fn labels_are_the_definitions(n in 1..=2_usize, c in 1..=35_usize, classes in 1..=40_usize,
                                  space in prop::array::uniform3(1..=9_usize), coarse: bool, seed in 0..1000_u64,
                                  blocked: bool) {
        let [d, h, w] = space;
        let dims = [n, c, d, h, w];
        let few = |v: Vec<f32>| if coarse { v.iter().map(|v| (v * 1.5).round()).collect() } else { v };
        let x = few(values(dims.iter().product(), seed));
        let (weight, bias) = (few(values(classes * c, seed + 1)), few(values(classes, seed + 2)));
        check(&x, dims, &weight, &bias, blocked);
    }
}

/// Around whole tiles, pieces and groups of classes.
#[test]
fn sizes_around_the_kernels_own() {
    for (channels, classes, width) in
        [(16, 105, 4097), (16, 6, 64), (17, 7, 63), (32, 5, 65), (96, 104, 128), (1, 1, 16)]
    {
        let dims = [1, channels, 1, 1, width];
        let x = values(dims.iter().product(), 1);
        check(&x, dims, &values(classes * channels, 2), &values(classes, 3), true);
    }
}

#[test]
fn what_is_not_a_number_never_wins() {
    let dims = [1, 2, 1, 1, 70];
    let mut x = values(140, 1);
    x[3] = f32::NAN;
    x[70] = f32::INFINITY;
    let mut bias = values(9, 2);
    bias[4] = f32::NEG_INFINITY;
    check(&x, dims, &values(18, 3), &bias, true);
    check(&x, dims, &[0.0; 18], &[f32::NEG_INFINITY; 9], true);
    check(&x, dims, &[0.0; 18], &[0.0, -0.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0], true);
}

/// More labels than a byte holds.
#[test]
fn the_last_of_many_classes() {
    let classes = 65_536;
    let bias: Vec<f32> = (0..classes).map(|c| c as f32).collect();
    check(&[1.0; 5], [1, 1, 1, 1, 5], &vec![0.0; classes], &bias, true);
}

#[test]
fn any_number_of_threads_gives_the_same() {
    let dims = [2, 20, 9, 31, 33];
    let (x, weight, bias) = (values(dims.iter().product(), 1), values(20 * 33, 2), values(33, 3));
    for devices in threaded_devices() {
        let labels = devices.each_ref().map(|device| {
            let mut cx = Ctx::infer(device);
            let v = activation(&mut cx, &x, dims, true);
            ops::head_labels(&mut cx, v, &weight, &bias).unwrap()
        });
        assert!(labels[0] == labels[1] && labels[0] == labels[2]);
    }
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let mut cx = Ctx::infer(&Device::cpu());
    let x = activation(&mut cx, &[0.0; 16], [1, 2, 2, 2, 2], true);
    for (weights, classes) in [(4, 1), (5, 2), (0, 0), (2 * 65_537, 65_537)] {
        let error = ops::head_labels(&mut cx, x.clone(), &vec![0.0; weights], &vec![0.0; classes]).unwrap_err();
        assert!(matches!(error, Error::Shape { op: "head_labels", .. }), "{error}");
    }
    let unknown = testing::head_labels("abacus", &mut cx, x, &[0.0; 2], &[0.0]).unwrap_err();
    assert!(unknown.to_string().contains("abacus"));
}
