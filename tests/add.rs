//! add: every implementation against the definition.

use proptest::prelude::*;
use stunet::autograd::Ctx;
use stunet::ops::{self, testing};

use crate::common::drive::{activation, bits, devices, result, values};

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// One rounding: every implementation gives the same bits, wherever the result goes.
    #[test]
    fn is_exact(n in 1..=2_usize, c in 1..=35_usize, d in 1..=3_usize, h in 1..=5_usize, w in 1..=9_usize,
                seed in 0..1000_u64, keep_a: bool, keep_b: bool, plain: bool) {
        let dims = [n, c, d, h, w];
        let len = dims.iter().product();
        let (a, b) = (values(len, seed), values(len, seed + 1));
        let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        for device in devices() {
            for name in testing::implementations(&device) {
                let mut cx = Ctx::infer(&device);
                let (x, y) = (activation(&mut cx, &a, dims, !plain), activation(&mut cx, &b, dims, true));
                let (kept_a, kept_b) = (keep_a.then(|| x.clone()), keep_b.then(|| y.clone()));
                let sum = testing::add(name, &mut cx, x, y).unwrap();
                prop_assert_eq!(bits(&result(sum)), bits(&expected), "{}", name);
                for (kept, values) in [(kept_a, &a), (kept_b, &b)] {
                    if let Some(k) = kept {
                        prop_assert_eq!(bits(&k.value().to_host().unwrap()), bits(values), "a clone was changed by {}", name);
                    }
                }
            }
        }
    }
}

#[test]
fn in_place_in_the_one_without_other_owner() {
    for device in devices() {
        let mut cx = Ctx::infer(&device);
        let [a, b] = [1, 2].map(|s| activation(&mut cx, &values(64, s), [1, 16, 1, 2, 2], true));
        let (kept, at) = (a.clone(), testing::address(b.value()));
        let sum = ops::add(&mut cx, a, b).unwrap();
        assert_eq!(testing::address(sum.value()), at);
        // Both operands the same tensor: neither may be overwritten while the other is read.
        let twice = ops::add(&mut cx, kept.clone(), kept.clone()).unwrap();
        let expected: Vec<f32> = kept.value().to_host().unwrap().iter().map(|v| v + v).collect();
        assert_eq!(bits(&result(twice)), bits(&expected));
    }
}

#[test]
fn different_sizes_are_an_error() {
    let device = stunet::Device::cpu();
    let mut cx = Ctx::infer(&device);
    let a = activation(&mut cx, &[0.0; 8], [1, 2, 1, 2, 2], true);
    let b = activation(&mut cx, &[0.0; 8], [1, 2, 2, 1, 2], true);
    assert!(ops::add(&mut cx, a, b).unwrap_err().to_string().starts_with("add: "));
}
