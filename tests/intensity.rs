//! Brightness, contrast, gamma, mirroring and masks against their definitions in f64.

use proptest::prelude::*;
use stunet::Isa;
use stunet::nnunet::augment::{AugmentConfig, Parameters};

use crate::augment::Case;

/// Half the distance of neighbouring floats, relative.
const U: f64 = 1.0 / (1 << 24) as f64;

/// Additions in a row where statistics are summed up: 64 of a part, then the lanes, then the parts.
const SUMS: f64 = 80.0;

/// Values, and how far f32 may be from them.
struct Image {
    v: Vec<f64>,
    e: Vec<f64>,
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, v| v.abs().max(m))
}

impl Image {
    /// Mean, standard deviation, and how far theirs may be: a mean moves by the mean of all errors, a deviation by their
    /// root mean square.
    fn stats(&self) -> [(f64, f64); 2] {
        let n = self.v.len() as f64;
        let m = mean(&self.v);
        let deviation = |x: &mut dyn Iterator<Item = f64>| (x.map(|d| d * d).sum::<f64>() / (n - 1.0)).sqrt();
        let std = deviation(&mut self.v.iter().map(|v| v - m));
        let spread = mean(&self.v.iter().map(|v| (v - m).abs()).collect::<Vec<_>>());
        let rounding = SUMS * U;
        [
            (m, mean(&self.e) + rounding * spread + U * m.abs()),
            (std, deviation(&mut self.e.iter().copied()) + rounding * std),
        ]
    }

    fn ends(&self) -> (f64, f64) {
        self.v.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)))
    }

    /// Factor and addend are rounded, so are product and sum.
    fn affine(&mut self, scale: f64, shift: f64, moved: f64) {
        let rounding = 4.0 * U * (scale.abs() * largest(&self.v) + shift.abs());
        self.v.iter_mut().for_each(|v| *v = *v * scale + shift);
        self.e.iter_mut().for_each(|e| *e = *e * scale.abs() + moved + rounding);
    }

    fn contrast(&mut self, factor: f64) {
        let ([(mean, error), _], (min, max)) = (self.stats(), self.ends());
        let of_ends = largest(&self.e);
        self.affine(factor, mean * (1.0 - factor), error * (1.0 - factor).abs());
        self.v.iter_mut().for_each(|v| *v = v.clamp(min, max));
        self.e.iter_mut().for_each(|e| *e = e.max(of_ends));
    }

    fn gamma(&mut self, exponent: f64) {
        let (before, (min, max)) = (self.stats(), self.ends());
        let (range, of_ends) = ((max - min).max(1e-7), largest(&self.e) + U * min.abs().max(max.abs()));
        for (v, e) in self.v.iter_mut().zip(&mut self.e) {
            let t = ((*v - min) / range).max(0.0);
            let moved = (*e + of_ends + 2.0 * of_ends * t) / range + 3.0 * U * t;
            let [y, up, down] = [t, t + moved, (t - moved).max(0.0)].map(|t| t.powf(exponent));
            // exp(exponent ln t), whose argument is rounded.
            let relative = U * (8.0 + 4.0 * exponent * (t + moved).ln().abs());
            let error = (up - y).max(y - down) + relative * up;
            *v = y * (max - min) + min;
            *e = error * range + (2.0 * y + 1.0) * of_ends + 2.0 * U * (y * range + min.abs());
        }
        let [(mean, e_mean), (std, e_std)] = before;
        let [(other, e_other), (now, e_now)] = self.stats();
        let scale = std / now.max(1e-7);
        // A quotient of two that are off; nothing is known where the divisor may be nothing.
        let relative = (e_std / std + e_now / now) / (1.0 - e_now / now).max(0.0);
        let away = largest(&self.v.iter().map(|v| v - other).collect::<Vec<_>>());
        self.affine(scale, mean - other * scale, e_mean + scale * (e_other + relative * away));
    }
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
        let v: Vec<f64> = case.image.iter().map(|v| f64::from(*v)).collect();
        let mut x = Image { e: vec![0.0; v.len()], v };
        if let Some(f) = brightness {
            x.affine(f64::from(f), 0.0, 0.0);
        }
        if let Some(f) = contrast {
            x.contrast(f64::from(f));
        }
        if let Some(g) = inverted {
            x.affine(-1.0, 0.0, 0.0);
            x.gamma(f64::from(g));
            x.affine(-1.0, 0.0, 0.0);
        }
        if let Some(g) = exponent {
            x.gamma(f64::from(g));
        }
        for &isa in Isa::available() {
            let (image, target) = case.run(&config, &p, isa);
            for i in 0..x.v.len() {
                let t = [i / (shape[1] * shape[2]), i / shape[2] % shape[1], i % shape[2]];
                let from: [usize; 3] = std::array::from_fn(|k| if mirror[k] { shape[k] - 1 - t[k] } else { t[k] });
                let from = (from[0] * shape[1] + from[1]) * shape[2] + from[2];
                let label = case.labels[from];
                prop_assert_eq!(i64::from(target[i]), i64::from(label.max(0)));
                if masked && label < 0 {
                    prop_assert_eq!(image[i], 0.0);
                    continue;
                }
                let (expected, bound) = (x.v[from], x.e[from]);
                let error = (f64::from(image[i]) - expected).abs();
                prop_assert!(error <= bound, "{isa:?} {i}: {} {expected}, off by {error}, bound {bound}", image[i]);
            }
        }
    }
}
