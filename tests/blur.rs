//! Gaussian blur against the definition in f64.

use proptest::prelude::*;
use stunet::Isa;
use stunet::nnunet::augment::{AugmentConfig, Parameters};

use crate::augment::Case;

/// As PyTorch's "reflect", and on if the axis is shorter than the kernel.
fn mirrored(i: i64, n: i64) -> i64 {
    if n == 1 {
        return 0;
    }
    let i = i.rem_euclid(2 * (n - 1));
    if i < n { i } else { 2 * (n - 1) - i }
}

fn along(x: &[f64], shape: [usize; 3], axis: usize, sigma: f64) -> Vec<f64> {
    // batchgeneratorsv2's lengths: 3.5 / 6 and 5.5 / 6 are the ends.
    let half = if sigma < 3.5 / 6.0 {
        1
    } else if sigma < 5.5 / 6.0 {
        2
    } else {
        3
    };
    let weight = |k: i64| (-0.5 * (k as f64 / sigma).powi(2)).exp();
    let sum: f64 = (-half..=half).map(weight).sum();
    let stride: usize = shape[axis + 1..].iter().product();
    let one = |i: usize| {
        let at = (i / stride % shape[axis]) as i64;
        let line = i - at as usize * stride;
        let value = |k: i64| x[line + mirrored(at + k, shape[axis] as i64) as usize * stride] * weight(k) / sum;
        (-half..=half).map(value).sum()
    };
    (0..x.len()).map(one).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn blurs_are_the_definition(
        shape in prop::array::uniform3(1usize..36),
        sigmas in prop::array::uniform3(0.5f64..1.0),
        flat: bool,
        seed: u64,
    ) {
        let list = if flat { vec![shape[1], shape[2]] } else { shape.to_vec() };
        let mut config = AugmentConfig::new(&list, &[]).unwrap();
        config.initial_patch = config.patch;
        let case = Case::random(config.patch, 1, seed);
        let mut p = Parameters::default();
        p.blur = vec![Some(sigmas)];
        let mut expected: Vec<f64> = case.image.iter().map(|v| f64::from(*v)).collect();
        for axis in usize::from(flat)..3 {
            expected = along(&expected, config.patch, axis, sigmas[axis]);
        }
        for &isa in Isa::available() {
            let (image, _) = case.run(&config, &p, isa);
            for (a, b) in image.iter().zip(&expected) {
                // Three sums of at most seven products, weights of sum 1, values of at most 1, each rounded once.
                prop_assert!((f64::from(*a) - b).abs() < 3.0 * 9.0 * f64::from(f32::EPSILON), "{isa:?}: {a} {b}");
            }
        }
    }
}
