//! The gradients of instance_norm: against the definition in f64 and its finite differences, and laws.

use proptest::prelude::*;
use stunet::autograd::{Ctx, Grads};
use stunet::ops::{self, InstanceNorm, testing};
use stunet::tensor::{Device, Dims, Tensor};

use crate::common::bound::{Bounded, U, check, gamma};
use crate::common::drive::{bits, devices, result, soil, threaded_devices, values};
use crate::instance_norm::Stats;

#[derive(Debug, Clone)]
struct Problem {
    dims: [usize; 5],
    /// Mean of the input in units of its spread.
    offset: f32,
    residual: bool,
    slope: Option<f32>,
    seed: u64,
}

/// Of the input, of what was added, of weight and of bias.
struct Gradients<T> {
    x: Vec<T>,
    residual: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
}

const EPS: f32 = 1e-5;

impl Problem {
    fn len(&self) -> usize {
        self.dims.iter().product()
    }

    fn x(&self) -> Vec<f32> {
        values(self.len(), self.seed).into_iter().map(|v| v + self.offset).collect()
    }

    fn residual(&self) -> Option<Vec<f32>> {
        self.residual.then(|| values(self.len(), self.seed + 1))
    }

    fn dy(&self) -> Vec<f32> {
        values(self.len(), self.seed + 4)
    }

    fn affine(&self) -> [Vec<f32>; 2] {
        [2, 3].map(|k| values(self.dims[1], self.seed + k))
    }

    /// The derivative in closed form, with first-order bounds. Where the result's sign is within its error, either side of
    /// leaky ReLU's kink may be taken.
    fn reference(&self) -> Gradients<Bounded> {
        let [_, c, d, h, w] = self.dims;
        let space = d * h * w;
        let n = space as f64;
        let slope = self.slope.map_or(1.0, f64::from);
        let (x, residual, dy, [gain, shift]) = (self.x(), self.residual(), self.dy(), self.affine());
        let zero = || vec![Bounded { value: 0.0, error: 0.0 }; c];
        let mut all = Gradients { x: Vec::new(), residual: Vec::new(), weight: zero(), bias: zero() };
        for (nc, x) in x.chunks_exact(space).enumerate() {
            let stats = Stats::of(x, EPS);
            let (gain, shift) = (f64::from(gain[nc % c]), f64::from(shift[nc % c]));
            // Values and errors of g and of h at every voxel.
            let (mut g, mut hat) = (Vec::with_capacity(space), Vec::with_capacity(space));
            for (i, x) in x.iter().enumerate() {
                let centred = f64::from(*x) - stats.mean;
                let value = centred * stats.inverse;
                let relative = stats.inverse_error + 2.0 * U;
                let error = (stats.mean_error + U * centred.abs()) * stats.inverse + value.abs() * relative;
                let added = residual.as_ref().map_or(0.0, |r| f64::from(r[nc * space + i]));
                let sum = value * gain + shift + added;
                let unsure = error * gain.abs() + 5.0 * U * ((value * gain).abs() + shift.abs() + added.abs());
                let dy = f64::from(dy[nc * space + i]);
                let masked = if sum > 0.0 { dy } else { dy * slope };
                let kink = if sum.abs() <= unsure { (dy * (1.0 - slope)).abs() } else { 0.0 };
                g.push(Bounded { value: masked, error: U * masked.abs() + kink });
                hat.push(Bounded { value, error });
            }
            let total = |terms: &mut dyn Iterator<Item = (f64, f64)>| {
                let (mut value, mut error, mut size) = (0.0, 0.0, 0.0);
                for (v, e) in terms {
                    value += v;
                    error += e;
                    size += f64::abs(v);
                }
                // Strands of 64 and three more sums in f32, the rest in f64, and back.
                Bounded { value, error: error + gamma(70) * (size + error) + U * f64::abs(value) }
            };
            let sum_g = total(&mut g.iter().map(|g| (g.value, g.error)));
            let product = |(g, h): (&Bounded, &Bounded)| {
                (g.value * h.value, g.error * (h.value.abs() + h.error) + g.value.abs() * h.error)
            };
            let sum_gh = total(&mut g.iter().zip(&hat).map(product));
            for (to, sum) in [(&mut all.weight[nc % c], sum_gh), (&mut all.bias[nc % c], sum_g)] {
                to.value += sum.value;
                to.error += sum.error + U * sum.value.abs();
            }
            for (g, h) in g.iter().zip(&hat) {
                let (mg, mgh) = (sum_g.value / n, sum_gh.value / n);
                let inner = g.value - mg - h.value * mgh;
                let inner_error = g.error
                    + sum_g.error / n
                    + h.error * mgh.abs()
                    + (h.value.abs() + h.error) * sum_gh.error / n
                    + 4.0 * U * (g.value.abs() + mg.abs() + (h.value * mgh).abs());
                let scale = (gain * stats.inverse).abs();
                let error = scale * (inner_error + inner.abs() * (stats.inverse_error + 3.0 * U));
                all.x.push(Bounded { value: gain * stats.inverse * inner, error: 1.01 * error });
                all.residual.push(*g);
            }
        }
        all
    }

    fn run(&self, device: &Device) -> Gradients<f32> {
        let [w, b] = self.affine().map(|v| testing::vector(&v, device).unwrap());
        let mut cx = Ctx::train(device);
        let tensor =
            |v: &[f32]| testing::blocked(Tensor::from_host(v, Dims::from(self.dims), device).unwrap()).unwrap();
        let x = cx.variable(tensor(&self.x()));
        let r = self.residual().map(|r| cx.variable(tensor(&r)));
        soil(device, self.dims);
        let how = InstanceNorm { eps: EPS, slope: self.slope };
        let y = ops::instance_norm(&mut cx, x.clone(), &w, &b, r.clone(), how).unwrap();
        assert_eq!(cx.saved().iter().filter(|s| s.operation == "instance_norm").count(), 1);
        let mut grads = Grads::new();
        cx.backward_from(vec![(y, tensor(&self.dy()))], &mut grads).unwrap();
        let of = |v: &stunet::autograd::Var| {
            let g = grads.variable(v).unwrap().clone();
            result(cx.leaf(g))
        };
        let mut of = of;
        let param = |p| grads.param(p).unwrap().to_host().unwrap()[..self.dims[1]].to_vec();
        Gradients {
            x: of(&x),
            residual: r.as_ref().map(&mut of).unwrap_or_default(),
            weight: param(&w),
            bias: param(&b),
        }
    }

    fn check(&self) {
        let expected = self.reference();
        for device in devices() {
            let got = self.run(&device);
            let what = |part: &str| format!("{part} {:?} {self:?}", device.isa());
            check(&what("x"), &got.x, &expected.x);
            check(&what("weight"), &got.weight, &expected.weight);
            check(&what("bias"), &got.bias, &expected.bias);
            if self.residual {
                check(&what("residual"), &got.residual, &expected.residual);
            }
        }
    }
}

prop_compose! {
    fn problem()(
        (n, c) in (1..=2_usize, 1..=35_usize),
        space in prop::array::uniform3(1..=9_usize),
        offset in prop_oneof![Just(0.0_f32), -3.0..3.0_f32, Just(100.0)],
        slope in proptest::option::of(Just(0.01_f32)),
        residual in any::<bool>(),
        seed in 0..1000_u64,
    ) -> Problem {
        Problem { dims: [n, c, space[0], space[1], space[2]], offset, residual, slope, seed }
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
    Problem { dims: [2, 20, 9, 25, 31], offset: 0.7, residual: true, slope: Some(0.01), seed: 5 }
}

/// Blocks that are cut into pieces for several threads.
#[test]
fn large_blocks() {
    large().check();
    Problem { residual: false, ..large() }.check();
    Problem { residual: false, slope: None, offset: 30.0, ..large() }.check();
}

#[test]
fn bytes_do_not_depend_on_threads() {
    for p in [large(), Problem { residual: false, ..large() }] {
        for devices in threaded_devices() {
            let all = devices.map(|d| {
                let g = p.run(&d);
                [g.x, g.residual, g.weight, g.bias].map(|v| bits(&v))
            });
            assert!(all[0] == all[1] && all[0] == all[2]);
        }
    }
}

/// The closed form is the derivative of the definition: central differences in f64.
#[test]
fn reference_is_the_derivative() {
    let p = Problem { dims: [1, 2, 2, 3, 2], offset: 0.3, residual: true, slope: Some(0.2), seed: 9 };
    let (space, slope) = (12, 0.2_f32);
    let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect::<Vec<f64>>();
    let [gain, shift] = p.affine().map(wide);
    let (x, r, dy) = (wide(p.x()), wide(p.residual().unwrap()), wide(p.dy()));
    let loss = |x: &[f64], r: &[f64], gain: &[f64], shift: &[f64]| -> f64 {
        let channel = |c: usize| {
            let x = &x[c * space..][..space];
            let mean = x.iter().sum::<f64>() / space as f64;
            let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / space as f64;
            let value = |i: usize| {
                let z = (x[i] - mean) / (variance + f64::from(EPS)).sqrt() * gain[c] + shift[c] + r[c * space + i];
                dy[c * space + i] * if z > 0.0 { z } else { z * f64::from(slope) }
            };
            (0..space).map(value).sum::<f64>()
        };
        (0..2).map(channel).sum()
    };
    let expected = p.reference();
    let mut all = [x, r, gain, shift];
    for (k, of) in [&expected.x, &expected.residual, &expected.weight, &expected.bias].into_iter().enumerate() {
        for i in 0..of.len() {
            let step = 1e-6;
            let mut at = |by: f64| {
                all[k][i] += by;
                let l = loss(&all[0], &all[1], &all[2], &all[3]);
                all[k][i] -= by;
                l
            };
            let slope = (at(step) - at(-step)) / (2.0 * step);
            // Rounding of the loss over the step, and the third derivative times its square.
            assert!((slope - of[i].value).abs() <= 1e-8, "{k} {i}: {slope} and {}", of[i].value);
        }
    }
}
