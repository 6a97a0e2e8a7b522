//! leaky_relu: every implementation against the definition.

use proptest::prelude::*;
use stunet::autograd::Ctx;
use stunet::ops::{self, testing};

use crate::common::drive::{activation, bits, devices, result, values};

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// One product, one rounding: every implementation gives the same bits, in place or not.
    #[test]
    fn is_exact(n in 1..=2_usize, c in 1..=35_usize, d in 1..=3_usize, h in 1..=5_usize, w in 1..=9_usize,
                seed in 0..1000_u64, blocked: bool) {
        let dims = [n, c, d, h, w];
        let x = values(dims.iter().product(), seed);
        let expected: Vec<f32> = x.iter().map(|v| if *v > 0.0 { *v } else { 0.01 * v }).collect();
        for device in devices() {
            for name in testing::implementations(&device) {
                let mut cx = Ctx::infer(&device);
                let v = activation(&mut cx, &x, dims, blocked);
                let kept = v.clone();
                let y = testing::leaky_relu(name, &mut cx, v, 0.01).unwrap();
                prop_assert_eq!(bits(&result(y)), bits(&expected), "{}", name);
                prop_assert_eq!(bits(&kept.value().to_host().unwrap()), bits(&x), "a clone was changed by {}", name);
                let y = testing::leaky_relu(name, &mut cx, kept, 0.01).unwrap();
                prop_assert_eq!(bits(&result(y)), bits(&expected), "{} in place", name);
            }
        }
    }
}

/// NaN must not be turned into a number: a broken input has to show.
#[test]
fn special_values() {
    let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, -1.0];
    for device in devices() {
        let mut cx = Ctx::infer(&device);
        let v = activation(&mut cx, &x, [1, 6, 1, 1, 1], true);
        let y = result(ops::leaky_relu(&mut cx, v, 0.5).unwrap());
        assert!(y[0].is_nan());
        assert_eq!(bits(&y[1..]), bits(&[f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, -0.5]));
    }
}

/// The last owner's memory is used again.
#[test]
fn in_place_for_the_last_owner_only() {
    for device in devices() {
        let mut cx = Ctx::infer(&device);
        let x = activation(&mut cx, &values(64, 1), [1, 16, 1, 2, 2], true);
        let at = testing::address(x.value());
        let kept = x.clone();
        let y = ops::leaky_relu(&mut cx, x, 0.1).unwrap();
        assert_ne!(testing::address(y.value()), at);
        let z = ops::leaky_relu(&mut cx, kept, 0.1).unwrap();
        assert_eq!(testing::address(z.value()), at);
    }
}
