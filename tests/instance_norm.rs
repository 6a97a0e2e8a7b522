//! instance_norm: every implementation against the definition in f64, and laws.

use proptest::prelude::*;
use stunet::autograd::Ctx;
use stunet::ops::{self, InstanceNorm, testing};
use stunet::tensor::Device;

use crate::common::bound::{Bounded, U, check, gamma};
use crate::common::drive::{activation, bits, devices, result, soil, threaded_devices, values};

#[derive(Debug, Clone)]
struct Problem {
    dims: [usize; 5],
    /// Mean of the input in units of its spread.
    offset: f32,
    residual: bool,
    /// Other owners of the input and of the residual.
    keep: (bool, bool),
    blocked: bool,
    how: InstanceNorm,
    seed: u64,
}

impl Problem {
    fn x(&self) -> Vec<f32> {
        let x = values(self.dims.iter().product(), self.seed);
        x.into_iter().enumerate().map(|(i, v)| v * (1.0 + (i % 5) as f32) + self.offset).collect()
    }

    fn residual(&self) -> Option<Vec<f32>> {
        self.residual.then(|| values(self.dims.iter().product(), self.seed + 1))
    }

    fn affine(&self) -> [Vec<f32>; 2] {
        [2, 3].map(|k| values(self.dims[1], self.seed + k))
    }

    /// The definition in f64, and a first-order bound: mean and variance come from sums in f32 over 256 voxels in
    /// four strands (68 roundings at most, twice), merged in f64.
    fn reference(&self) -> Vec<Bounded> {
        let [n, c, d, h, w] = self.dims;
        let (space, sum) = (d * h * w, gamma(68));
        let (x, residual, [gain, shift]) = (self.x(), self.residual(), self.affine());
        let mut out = Vec::with_capacity(x.len());
        for (nc, x) in x.chunks_exact(space).enumerate().take(n * c) {
            let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            let average = |f: &dyn Fn(f64) -> f64| x.iter().map(|v| f(*v)).sum::<f64>() / space as f64;
            let mean = average(&|v| v);
            let variance = average(&|v| (v - mean).powi(2));
            let size = average(&f64::abs);
            let spread = average(&|v| (v - mean).abs());
            // The first mean is off by this much; the deviations from it are what the final sums see.
            let first = sum * size;
            let mean_error = (sum + U) * (spread + first) + U * size;
            let variance_error = 2.0 * (sum + 2.0 * U) * (variance + 2.0 * first * spread + first * first);
            let denominator = variance + f64::from(self.how.eps);
            let (scale, bias) = (f64::from(gain[nc % c]) / denominator.sqrt(), f64::from(shift[nc % c]));
            let scale_error = 0.5 * variance_error / denominator + 2.0 * U;
            for (i, x) in x.iter().enumerate() {
                let centred = x - mean;
                let r = residual.as_ref().map_or(0.0, |r| f64::from(r[nc * space + i]));
                let sum = centred * scale + bias + r;
                let value = if sum > 0.0 { sum } else { sum * self.how.slope.map_or(1.0, f64::from) };
                let rounding = 5.0 * U * ((centred * scale).abs() + bias.abs() + r.abs());
                let error = (mean_error + U * centred.abs()) * scale.abs() + (centred * scale).abs() * scale_error;
                // A slope below one shrinks errors; the last percent stands for the second order.
                out.push(Bounded { value, error: 1.01 * (error + rounding) });
            }
        }
        out
    }

    fn run(&self, device: &Device, name: Option<&str>) -> Vec<f32> {
        let [gain, shift] = self.affine().map(|v| testing::vector(&v, device).unwrap());
        let mut cx = Ctx::infer(device);
        let x = activation(&mut cx, &self.x(), self.dims, self.blocked);
        let residual = self.residual().map(|r| activation(&mut cx, &r, self.dims, true));
        let kept = (self.keep.0.then(|| x.clone()), residual.clone().filter(|_| self.keep.1));
        soil(device, self.dims);
        let y = match name {
            None => ops::instance_norm(&mut cx, x, &gain, &shift, residual, self.how),
            Some(name) => testing::instance_norm(name, &mut cx, x, [&gain, &shift], residual, self.how),
        }
        .unwrap();
        let y = result(y);
        for (kept, values) in [(kept.0, Some(self.x())), (kept.1, self.residual())] {
            if let (Some(k), Some(v)) = (kept, values) {
                assert_eq!(bits(&k.value().to_host().unwrap()), bits(&v), "a clone was changed");
            }
        }
        y
    }

    fn check(&self) {
        let expected = self.reference();
        for device in devices() {
            for name in testing::implementations(&device) {
                check(&format!("{name} {self:?}"), &self.run(&device, Some(name)), &expected);
            }
        }
    }
}

prop_compose! {
    fn problem()(
        (n, c) in (1..=2_usize, 1..=35_usize),
        space in prop::array::uniform3(1..=9_usize),
        offset in prop_oneof![Just(0.0_f32), -3.0..3.0_f32, Just(1000.0)],
        slope in proptest::option::of(Just(0.01_f32)),
        (residual, blocked, keep) in any::<(bool, bool, (bool, bool))>(),
        seed in 0..1000_u64,
    ) -> Problem {
        let dims = [n, c, space[0], space[1], space[2]];
        Problem { dims, offset, residual, keep, blocked, how: InstanceNorm { eps: 1e-5, slope }, seed }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_problem(p in problem()) {
        p.check();
    }
}

fn large() -> Problem {
    Problem {
        dims: [2, 20, 9, 25, 31],
        offset: 0.7,
        residual: true,
        keep: (false, false),
        blocked: true,
        how: InstanceNorm { eps: 1e-5, slope: Some(0.01) },
        seed: 5,
    }
}

/// Blocks that are cut into pieces for several threads.
#[test]
fn large_blocks() {
    large().check();
    Problem { keep: (true, false), ..large() }.check();
    Problem { residual: false, keep: (true, true), offset: 500.0, ..large() }.check();
}

#[test]
fn bytes_do_not_depend_on_threads() {
    for p in [large(), Problem { dims: [1, 40, 5, 6, 7], ..large() }] {
        for devices in threaded_devices() {
            let all = devices.map(|d| bits(&p.run(&d, None)));
            assert!(all[0] == all[1] && all[0] == all[2]);
        }
    }
}

/// A constant channel has variance zero: the result is the bias, exactly.
#[test]
fn constant_input_gives_the_bias() {
    for device in devices() {
        let [gain, shift] = [1, 2].map(|s| values(3, s));
        let (w, b) = (testing::vector(&gain, &device).unwrap(), testing::vector(&shift, &device).unwrap());
        let mut cx = Ctx::infer(&device);
        let x = activation(&mut cx, &[1.7; 3 * 60], [1, 3, 3, 4, 5], true);
        let y = ops::instance_norm(&mut cx, x, &w, &b, None, InstanceNorm { eps: 1e-5, slope: None }).unwrap();
        for (i, v) in result(y).into_iter().enumerate() {
            let error = f64::from(v - shift[i / 60]).abs();
            // The mean of equal numbers is off by one rounding at most, and 1 / sqrt(eps) enlarges that.
            assert!(error <= 2.0 * U * 1.7 / 1e-5_f64.sqrt(), "{error}");
        }
    }
}

#[test]
fn in_place_in_the_input_or_the_residual() {
    for device in devices() {
        let w = testing::vector(&[1.0; 16], &device).unwrap();
        let mut cx = Ctx::infer(&device);
        let how = InstanceNorm { eps: 1e-5, slope: None };
        let [x, r] = [1, 2].map(|s| activation(&mut cx, &values(64, s), [1, 16, 1, 2, 2], true));
        let (kept, at) = (x.clone(), testing::address(r.value()));
        let y = ops::instance_norm(&mut cx, x, &w, &w, Some(r), how).unwrap();
        assert_eq!(testing::address(y.value()), at);
        let at = testing::address(kept.value());
        let y = ops::instance_norm(&mut cx, kept, &w, &w, Some(y.clone()), how).unwrap();
        assert_eq!(testing::address(y.value()), at);
    }
}

#[test]
fn misfits_are_errors() {
    let device = Device::cpu();
    let w = testing::vector(&[1.0; 3], &device).unwrap();
    let mut cx = Ctx::infer(&device);
    let how = InstanceNorm { eps: 1e-5, slope: None };
    let x = activation(&mut cx, &[0.0; 16], [1, 2, 2, 2, 2], true);
    let e = ops::instance_norm(&mut cx, x, &w, &w, None, how).unwrap_err().to_string();
    assert!(e.starts_with("instance_norm: "), "{e}");
    let [x, r] = [[1, 3, 2, 2, 2], [1, 3, 2, 1, 4]].map(|d| activation(&mut cx, &[0.0; 24], d, true));
    assert!(ops::instance_norm(&mut cx, x, &w, &w, Some(r), how).is_err());
}
