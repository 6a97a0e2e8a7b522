//! Brightness, contrast, gamma, mirroring and masks against their definitions in f64.

use proptest::prelude::*;
use stunet::Isa;
use stunet::nnunet::augment::{AugmentConfig, Parameters};

use crate::augment::Case;

fn mean_std(x: &[f64]) -> (f64, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    (mean, (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (x.len() as f64 - 1.0)).sqrt())
}

fn ends(x: &[f64]) -> (f64, f64) {
    x.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)))
}

fn gamma(x: &mut [f64], exponent: f32) {
    let ((mean, std), (min, max)) = (mean_std(x), ends(x));
    let range = (max - min).max(1e-7);
    x.iter_mut().for_each(|v| *v = ((*v - min) / range).max(0.0).powf(f64::from(exponent)) * (max - min) + min);
    let after = mean_std(x);
    x.iter_mut().for_each(|v| *v = (*v - after.0) * std / after.1.max(1e-7) + mean);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn maps_are_their_definitions(
        shape in prop::array::uniform3(2usize..22),
        brightness in prop::option::of(0.75f32..1.25),
        contrast in prop::option::of(0.75f32..1.25),
        inverted in prop::option::of(0.7f32..1.5),
        exponent in prop::option::of(0.7f32..1.5),
        mirror: [bool; 3],
        masked: bool,
        seed: u64,
    ) {
        let mut config = AugmentConfig::new(&shape, &[masked]).unwrap();
        config.initial_patch = shape;
        let case = Case::random(shape, 1, seed);
        let mut p = Parameters::default();
        p.brightness = brightness.into_iter().collect();
        p.contrast = contrast.into_iter().collect();
        p.gamma_inverted = inverted.into_iter().collect();
        p.gamma = exponent.into_iter().collect();
        p.mirror = mirror;
        let mut x: Vec<f64> = case.image.iter().map(|v| f64::from(*v)).collect();
        if let Some(f) = brightness {
            x.iter_mut().for_each(|v| *v *= f64::from(f));
        }
        if let Some(f) = contrast {
            let ((mean, _), (min, max)) = (mean_std(&x), ends(&x));
            x.iter_mut().for_each(|v| *v = ((*v - mean) * f64::from(f) + mean).clamp(min, max));
        }
        if let Some(g) = inverted {
            x.iter_mut().for_each(|v| *v = -*v);
            gamma(&mut x, g);
            x.iter_mut().for_each(|v| *v = -*v);
        }
        if let Some(g) = exponent {
            gamma(&mut x, g);
        }
        for &isa in Isa::available() {
            let (image, target) = case.run(&config, &p, isa);
            for i in 0..x.len() {
                let t = [i / (shape[1] * shape[2]), i / shape[2] % shape[1], i % shape[2]];
                let from: [usize; 3] = std::array::from_fn(|k| if mirror[k] { shape[k] - 1 - t[k] } else { t[k] });
                let from = (from[0] * shape[1] + from[1]) * shape[2] + from[2];
                let label = case.labels[from];
                prop_assert_eq!(i64::from(target[i]), i64::from(label.max(0)));
                if masked && label < 0 {
                    prop_assert_eq!(image[i], 0.0);
                    continue;
                }
                // Near the end of the range, powers below 1 turn a rounding of 2^-22 into (2^-22)^0.7, twice.
                let expected = x[from];
                let (min, max) = ends(&x);
                let far = (expected - min).min(max - expected) > 0.01;
                let bound = if far { 2e-5 } else { 2e-3 };
                prop_assert!((f64::from(image[i]) - expected).abs() < bound, "{isa:?} {i}: {} {expected}", image[i]);
            }
        }
    }
}
