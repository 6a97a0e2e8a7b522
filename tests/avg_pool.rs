//! avg_pool: every implementation against the definition in f64, and its gradient.

use proptest::prelude::*;
use stunet::autograd::{Ctx, Grads};
use stunet::ops::{self, testing};
use stunet::tensor::{Dims, Tensor};

use crate::common::bound::{Bounded, U, check, gamma};
use crate::common::drive::{activation, bits, devices, result, soil, threaded_devices, values};

fn output(dims: [usize; 5], kernel: [usize; 3]) -> [usize; 5] {
    let [n, c, space @ ..] = dims;
    let [d, h, w] = [0, 1, 2].map(|a| space[a] / kernel[a]);
    [n, c, d, h, w]
}

/// For every input voxel the output voxel whose mean it is part of, if any.
fn owners(dims: [usize; 5], kernel: [usize; 3]) -> Vec<Option<usize>> {
    let ([_, _, d, h, w], [.., od, oh, ow]) = (dims, output(dims, kernel));
    let owner = |i: usize| {
        let at = [i / (h * w) % d / kernel[0], i / w % h / kernel[1], i % w / kernel[2]];
        let inside = at[0] < od && at[1] < oh && at[2] < ow;
        inside.then(|| ((i / (d * h * w) * od + at[0]) * oh + at[1]) * ow + at[2])
    };
    (0..dims.iter().product()).map(owner).collect()
}

/// Means, each with the bound of one rounding per addition and one for the division.
fn reference(x: &[f32], dims: [usize; 5], kernel: [usize; 3]) -> Vec<Bounded> {
    let count: usize = kernel.iter().product();
    let mut sums = vec![(0.0, 0.0); output(dims, kernel).iter().product()];
    for (v, owner) in x.iter().zip(owners(dims, kernel)) {
        if let Some(o) = owner {
            sums[o].0 += f64::from(*v) / count as f64;
            sums[o].1 += f64::from(v.abs()) / count as f64;
        }
    }
    sums.into_iter().map(|(value, absolute)| Bounded { value, error: gamma(count) * absolute }).collect()
}

/// The gradient by the input, each value with the bound of its one rounding.
fn reference_gradient(dy: &[f32], dims: [usize; 5], kernel: [usize; 3]) -> Vec<Bounded> {
    let count = kernel.iter().product::<usize>() as f64;
    let share = |o: Option<usize>| o.map_or(0.0, |o| f64::from(dy[o]) / count);
    owners(dims, kernel).into_iter().map(share).map(|value| Bounded { value, error: U * value.abs() }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn any_size(n in 1..=2_usize, c in 1..=35_usize, kernel in prop::array::uniform3(1..=3_usize),
                blocks in prop::array::uniform3(1..=4_usize), rest in prop::array::uniform3(0..=2_usize),
                seed in 0..1000_u64, plain: bool) {
        let [d, h, w] = [0, 1, 2].map(|a| blocks[a] * kernel[a] + rest[a].min(kernel[a] - 1));
        let dims = [n, c, d, h, w];
        let to = output(dims, kernel);
        let (x, dy) = (values(dims.iter().product(), seed), values(to.iter().product(), seed + 1));
        for device in devices() {
            for name in testing::implementations(&device) {
                let mut cx = Ctx::infer(&device);
                let v = activation(&mut cx, &x, dims, !plain);
                soil(&device, to);
                let y = testing::avg_pool(name, &mut cx, v, kernel).unwrap();
                prop_assert_eq!(y.value().dims().as_slice(), to);
                check(name, &result(y), &reference(&x, dims, kernel));
                let g = activation(&mut cx, &dy, to, true);
                soil(&device, dims);
                let dx = testing::avg_pool_gradient(name, &mut cx, g.value(), dims, kernel).unwrap();
                check(name, &result(cx.leaf(dx)), &reference_gradient(&dy, dims, kernel));
            }
        }
    }
}

/// The reference's gradient is that of the reference: both are linear, so a difference of any length gives it exactly.
#[test]
fn the_reference_gradient_is_the_difference_quotient() {
    let (dims, kernel) = ([1, 3, 3, 5, 4], [1, 2, 2]);
    let x = values(dims.iter().product(), 5);
    let dy = values(output(dims, kernel).iter().product(), 6);
    let loss =
        |x: &[f32]| -> f64 { reference(x, dims, kernel).iter().zip(&dy).map(|(y, g)| y.value * f64::from(*g)).sum() };
    for (i, expected) in reference_gradient(&dy, dims, kernel).iter().enumerate() {
        let at = |h: f32| {
            let mut x = x.clone();
            x[i] = h;
            loss(&x)
        };
        let slope = (at(1.0) - at(-1.0)) / 2.0;
        assert!((slope - expected.value).abs() < 1e-12, "[{i}]: {slope} and {}", expected.value);
    }
}

/// A recorded pass gives what the gradient's own function gives, and keeps nothing.
#[test]
fn a_recorded_pass_goes_back() {
    let (dims, kernel) = ([2, 20, 4, 6, 5], [2, 2, 2]);
    let x = values(dims.iter().product(), 1);
    let dy = values(output(dims, kernel).iter().product(), 2);
    for device in devices() {
        let mut cx = Ctx::train(&device);
        let x = cx.variable(Tensor::from_host(&x, Dims::from(dims), &device).unwrap());
        let y = ops::avg_pool(&mut cx, x.clone(), kernel).unwrap();
        assert_eq!(cx.saved().iter().map(|s| s.bytes).sum::<usize>(), 0);
        let g = Tensor::from_host(&dy, *y.value().dims(), &device).unwrap();
        let mut grads = Grads::new();
        cx.backward_from(vec![(y, testing::blocked(g).unwrap())], &mut grads).unwrap();
        let dx = grads.variable(&x).unwrap();
        assert!(testing::padding_is_zero(dx));
        check("recorded", &dx.to_host().unwrap(), &reference_gradient(&dy, dims, kernel));
    }
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let (dims, kernel) = ([2, 40, 9, 14, 11], [2, 2, 2]);
    let (x, dy) = (values(dims.iter().product(), 1), values(output(dims, kernel).iter().product(), 2));
    for devices in threaded_devices() {
        let all = devices.map(|device| {
            let mut cx = Ctx::infer(&device);
            let v = activation(&mut cx, &x, dims, true);
            let y = bits(&result(ops::avg_pool(&mut cx, v, kernel).unwrap()));
            let g = activation(&mut cx, &dy, output(dims, kernel), true);
            let name = testing::implementations(&device)[0];
            let dx = testing::avg_pool_gradient(name, &mut cx, g.value(), dims, kernel).unwrap();
            (y, bits(&dx.to_host().unwrap()))
        });
        assert!(all[0] == all[1] && all[0] == all[2]);
    }
}

#[test]
fn misfits_are_errors() {
    let device = stunet::Device::cpu();
    let mut cx = Ctx::infer(&device);
    let x = activation(&mut cx, &[0.0; 16], [1, 2, 2, 2, 2], true);
    for kernel in [[0, 1, 1], [1, 3, 1]] {
        assert!(ops::avg_pool(&mut cx, x.clone(), kernel).unwrap_err().to_string().starts_with("avg_pool: "));
    }
    let dy = activation(&mut cx, &[0.0; 4], [1, 2, 2, 1, 1], true);
    assert!(testing::avg_pool_gradient("scalar", &mut cx, dy.value(), [1, 2, 2, 2, 2], [2; 3]).is_err());
}
