//! conv_transpose3d: every implementation against the definition in f64, and laws.

use std::borrow::Cow;

use proptest::prelude::*;
use stunet::autograd::{Ctx, Param};
use stunet::nn::{ConvTranspose3d, Module, ParamSource};
use stunet::ops::{self, Conv3d, Sources, testing};
use stunet::tensor::Device;

use crate::common::bound::{Bounded, check, gamma};
use crate::common::drive::{activation, bits, devices, result, soil, threaded_devices, values};

#[derive(Debug, Clone)]
struct Problem {
    batch: usize,
    channels: usize,
    out_channels: usize,
    space: [usize; 3],
    stride: [usize; 3],
    bias: bool,
    /// The input is blocked.
    blocked: bool,
    seed: u64,
}

impl Problem {
    fn input_dims(&self) -> [usize; 5] {
        let [d, h, w] = self.space;
        [self.batch, self.channels, d, h, w]
    }

    fn filter_dims(&self) -> [usize; 5] {
        let [d, h, w] = self.stride;
        [self.channels, self.out_channels, d, h, w]
    }

    fn output_dims(&self) -> [usize; 5] {
        let [d, h, w] = [0, 1, 2].map(|a| self.space[a] * self.stride[a]);
        [self.batch, self.out_channels, d, h, w]
    }

    fn x(&self) -> Vec<f32> {
        values(self.input_dims().iter().product(), self.seed)
    }

    fn w(&self) -> Vec<f32> {
        values(self.filter_dims().iter().product(), self.seed + 1)
    }

    fn b(&self) -> Option<Vec<f32>> {
        self.bias.then(|| values(self.out_channels, self.seed + 2))
    }

    /// The definition in f64; the error bound is gamma times the sum of absolute products.
    fn reference(&self, x: &[f32]) -> Vec<Bounded> {
        let (w, b, [_, _, od, oh, ow]) = (self.w(), self.b(), self.output_dims());
        let ([d, h, width], [sd, sh, sw]) = (self.space, self.stride);
        let mut out = Vec::new();
        for i in 0..self.batch * self.out_channels * od * oh * ow {
            let (v, o) = (i % (od * oh * ow), i / (od * oh * ow) % self.out_channels);
            let n = i / (od * oh * ow * self.out_channels);
            let at = [v / (oh * ow), v / ow % oh, v % ow];
            let from = ((at[0] / sd) * h + at[1] / sh) * width + at[2] / sw;
            let tap = ((at[0] % sd) * sh + at[1] % sh) * sw + at[2] % sw;
            let bias = b.as_ref().map_or(0.0, |b| f64::from(b[o]));
            let (mut value, mut absolute) = (bias, bias.abs());
            for c in 0..self.channels {
                let x = x[(n * self.channels + c) * d * h * width + from];
                let product = f64::from(x) * f64::from(w[(c * self.out_channels + o) * sd * sh * sw + tap]);
                value += product;
                absolute += product.abs();
            }
            // One rounding per product, per addition and for the bias.
            out.push(Bounded { value, error: gamma(self.channels + 2) * absolute });
        }
        out
    }

    fn params(&self, device: &Device) -> (Param, Option<Param>) {
        let w = testing::transposed_filter(&self.w(), self.filter_dims(), device).unwrap();
        (w, self.b().map(|b| testing::vector(&b, device).unwrap()))
    }

    /// Runs the named implementation, or the one the operation picks.
    fn run(&self, device: &Device, x: &[f32], name: Option<&str>) -> Vec<f32> {
        let (w, b) = self.params(device);
        let mut cx = Ctx::infer(device);
        let x = activation(&mut cx, x, self.input_dims(), self.blocked);
        soil(device, self.output_dims());
        let y = match name {
            None => ops::conv_transpose3d(&mut cx, x, &w, b.as_ref()),
            Some(name) => testing::conv_transpose3d(name, &mut cx, x, &w, b.as_ref()),
        }
        .unwrap();
        assert_eq!(y.value().dims().as_slice(), self.output_dims());
        result(y)
    }

    /// Every implementation of every instruction set within the bound.
    fn check(&self) {
        let x = self.x();
        let expected = self.reference(&x);
        for device in devices() {
            let names = testing::conv_transpose3d_implementations(&device);
            assert_eq!(names.last(), Some(&"reference"));
            for name in names {
                check(&format!("{name} {self:?}"), &self.run(&device, &x, Some(name)), &expected);
            }
        }
    }
}

prop_compose! {
    fn problem()(
        batch in 1..=2_usize,
        channels in 1..=50_usize,
        out_channels in 1..=50_usize,
        space in prop::array::uniform3(1..=5_usize),
        wide in 0..=12_usize,
        stride in prop::array::uniform3(1..=2_usize),
        (bias, blocked) in any::<(bool, bool)>(),
        seed in 0..1_000_000_u64,
    ) -> Problem {
        let [d, h, w] = space;
        Problem { batch, channels, out_channels, space: [d, h, w + wide], stride, bias, blocked, seed }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_problem(p in problem()) {
        p.check();
    }
}

fn problem_of(channels: usize, out_channels: usize, space: [usize; 3], stride: [usize; 3]) -> Problem {
    Problem { batch: 1, channels, out_channels, space, stride, bias: true, blocked: true, seed: 7 }
}

/// The shapes of real networks: all strides, rows shorter and longer than a tile, several segments and parts.
#[test]
fn shapes_of_networks() {
    problem_of(80, 64, [4, 4, 4], [2; 3]).check();
    problem_of(64, 32, [2, 5, 31], [1, 2, 2]).check();
    problem_of(40, 24, [3, 3, 7], [2, 2, 1]).check();
    problem_of(320, 40, [3, 10, 9], [2, 1, 2]).check();
    problem_of(16, 16, [5, 9, 23], [1; 3]).check();
    // 2D.
    Problem { batch: 2, ..problem_of(48, 33, [1, 6, 20], [1, 2, 2]) }.check();
}

/// Large enough to be written past the caches.
#[test]
fn large_output() {
    let p = problem_of(1, 16, [32, 64, 33], [2; 3]);
    assert!(p.output_dims().iter().product::<usize>() >= 8 << 20);
    let x = p.x();
    let expected = p.reference(&x);
    for device in devices() {
        check(&format!("{device:?}"), &p.run(&device, &x, None), &expected);
    }
}

#[test]
fn bytes_do_not_depend_on_threads() {
    for p in [problem_of(96, 40, [9, 11, 13], [2; 3]), problem_of(320, 48, [4, 4, 5], [1, 2, 2])] {
        let x = p.x();
        for devices in threaded_devices() {
            let all = devices.map(|d| bits(&p.run(&d, &x, None)));
            assert!(all[0] == all[1] && all[0] == all[2], "{p:?}");
        }
    }
}

/// With the identity at every tap it is the nearest upsampling, to the last bit.
#[test]
fn the_identity_upsamples() {
    let (c, space, stride) = (20, [3, 4, 5], [2, 1, 2]);
    let taps: usize = stride.iter().product();
    let w: Vec<f32> = (0..c * c * taps).map(|i| f32::from(u8::from(i / taps / c == i / taps % c))).collect();
    let dims = [1, c, space[0], space[1], space[2]];
    let x = values(dims.iter().product(), 3);
    for device in devices() {
        let w = testing::transposed_filter(&w, [c, c, stride[0], stride[1], stride[2]], &device).unwrap();
        let mut cx = Ctx::infer(&device);
        let (a, b) = (activation(&mut cx, &x, dims, true), activation(&mut cx, &x, dims, true));
        let a = ops::conv_transpose3d(&mut cx, a, &w, None).unwrap();
        let b = ops::upsample_nearest(&mut cx, b, stride).unwrap();
        assert_eq!(bits(&result(a)), bits(&result(b)));
    }
}

/// Small integers, whose products and sums f32 holds exactly.
fn integers(n: usize, seed: u64) -> Vec<f32> {
    values(n, seed).iter().map(|v| (v * 8.0).round()).collect()
}

fn inner(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// <transposed conv(x), y> = <x, conv(y)>, exactly: the same filter, read as `[O, I, ..]`, and the same stride. Where
/// that is 2, the two taps are the last of three with padding 1, the convolution's nearest kernel.
#[test]
fn is_the_adjoint_of_the_convolution() {
    for stride in [[2, 2, 2], [1, 2, 2], [2, 1, 2], [2, 2, 1], [1, 1, 1]] {
        let p = Problem { bias: false, ..problem_of(20, 24, [3, 4, 5], stride) };
        let (from, to) = (p.input_dims(), p.output_dims());
        let w = integers(p.filter_dims().iter().product(), 3);
        let (x, y) = (integers(from.iter().product(), 1), integers(to.iter().product(), 2));
        let [kd, kh, kw] = stride.map(|s| 2 * s - 1);
        let mut wide = vec![0.0; 20 * 24 * kd * kh * kw];
        for (i, v) in w.iter().enumerate() {
            let (t, channels) = (i % stride.iter().product::<usize>(), i / stride.iter().product::<usize>());
            let [z, y, x] = [t / (stride[1] * stride[2]), t / stride[2] % stride[1], t % stride[2]];
            let at = [z + stride[0] - 1, y + stride[1] - 1, x + stride[2] - 1];
            wide[((channels * kd + at[0]) * kh + at[1]) * kw + at[2]] = *v;
        }
        for device in devices() {
            let transposed = testing::transposed_filter(&w, p.filter_dims(), &device).unwrap();
            let filter = testing::filter(&wide, [20, 24, kd, kh, kw], &device).unwrap();
            let mut cx = Ctx::infer(&device);
            let up = activation(&mut cx, &x, from, true);
            let up = result(ops::conv_transpose3d(&mut cx, up, &transposed, None).unwrap());
            let down = Sources::One(activation(&mut cx, &y, to, true).into());
            let how = Conv3d { stride, padding: stride.map(|s| s - 1) };
            let down = result(ops::conv3d(&mut cx, down, &filter, None, how).unwrap());
            assert_eq!(inner(&up, &y), inner(&x, &down), "{stride:?}");
        }
    }
}

struct Layer(Problem);

impl ParamSource for Layer {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match name {
            "up.weight" => Some(self.0.filter_dims().to_vec()),
            "up.bias" => self.0.bias.then(|| vec![self.0.out_channels]),
            _ => None,
        }
    }

    fn values(&self, name: &str) -> stunet::Result<Cow<'_, [f32]>> {
        Ok(if name == "up.bias" { self.0.b().unwrap_or_default() } else { self.0.w() }.into())
    }

    fn error(&self, name: &str, what: String) -> stunet::Error {
        stunet::Error::Model { path: "layer".into(), field: name.into(), what }
    }
}

#[test]
fn the_layer_is_the_operation() {
    for bias in [false, true] {
        let p = Problem { bias, ..problem_of(20, 17, [2, 3, 4], [1, 2, 2]) };
        let (device, x) = (Device::cpu(), p.x());
        let source = Layer(p.clone());
        let layer = ConvTranspose3d::load(&source, "up", 17, 20, p.stride, &device).unwrap();
        let mut cx = Ctx::infer(&device);
        let v = activation(&mut cx, &x, p.input_dims(), true);
        let y = result(layer.forward(&mut cx, v).unwrap());
        assert_eq!(bits(&y), bits(&p.run(&device, &x, None)));
        let e = ConvTranspose3d::load(&source, "up", 20, 17, p.stride, &device).unwrap_err().to_string();
        assert!(e.contains("expected [17, 20, 1, 2, 2]"), "{e}");
        assert!(ConvTranspose3d::load(&source, "down", 17, 20, p.stride, &device).is_err());
    }
}

#[test]
fn misfits_are_errors() {
    let device = Device::cpu();
    let filter = |dims: [usize; 5]| testing::transposed_filter(&vec![0.5; dims.iter().product()], dims, &device);
    let run = |dims: [usize; 5], w: &Param, b: Option<&Param>| {
        let mut cx = Ctx::infer(&device);
        let x = activation(&mut cx, &vec![0.0; dims.iter().product()], dims, false);
        let e = ops::conv_transpose3d(&mut cx, x, w, b).map(|_| ()).unwrap_err().to_string();
        assert!(e.starts_with("conv_transpose3d: ") && !e.contains('\n'), "{e}");
        e
    };
    let w = filter([4, 8, 2, 2, 2]).unwrap();
    assert!(run([1, 8, 4, 4, 4], &w, None).contains("expected [8, O"));
    assert!(run([1, 4, 4, 0, 4], &w, None).contains("input"));
    assert!(run([1, 4, 4, 4, 4], &filter([4, 8, 3, 2, 2]).unwrap(), None).contains("stride"));
    let vector = testing::vector(&values(7, 1), &device).unwrap();
    assert!(run([1, 4, 4, 4, 4], &w, Some(&vector)).contains("bias"));
    assert!(run([1, 4, 4, 4, 4], &vector, None).contains("filter"));
    assert!(ops::pack_transposed_filter(&[0.0; 5], [1, 1, 2, 2, 2], &device).is_err());
}
