//! conv_transpose3d: every implementation against the definition in f64, and laws.

use std::borrow::Cow;

use proptest::prelude::*;
use stunet::autograd::{Ctx, Grads, Param};
use stunet::nn::{self, Module, ParamSource};
use stunet::ops::{self, Conv3d, ConvTranspose3d, Sources, testing};
use stunet::tensor::{Device, Dims, Tensor};

use crate::common::bound::{Bounded, check, gamma};
use crate::common::drive::{activation, bits, devices, result, soil, threaded_devices, values};

/// A sum of products in f64.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    value: f64,
    absolute: f64,
    terms: usize,
}

impl Sum {
    fn of(value: f64) -> Self {
        Self { value, absolute: value.abs(), terms: 1 }
    }

    fn add(&mut self, product: f64) {
        self.value += product;
        self.absolute += product.abs();
        self.terms += 1;
    }

    /// With the bound of f32 arithmetic: one rounding per product and per addition, in whatever order, zeros put in for
    /// what is outside and slices added up beside.
    fn bounded(&self, terms: usize) -> Bounded {
        Bounded { value: self.value, error: gamma(terms + 1) * self.absolute }
    }
}

/// A packed filter's values in `[I, O, kD, kH, kW]` order, found by packing their numbers.
fn unpacked(packed: Tensor, dims: [usize; 5]) -> Vec<f32> {
    let n: usize = dims.iter().product();
    assert!(n < 1 << 24, "numbers that f32 does not hold");
    let numbers: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let order = ops::pack_transposed_filter(&numbers, dims, packed.device()).unwrap().to_host().unwrap();
    let ones = ops::pack_transposed_filter(&vec![1.0; n], dims, packed.device()).unwrap().to_host().unwrap();
    let mut out = vec![f32::NAN; n];
    for ((v, at), real) in packed.to_host().unwrap().iter().zip(order).zip(ones) {
        match real == 1.0 {
            true => out[at as usize] = *v,
            false => assert_eq!(*v, 0.0, "a pad lane"),
        }
    }
    out
}

/// A packed vector's values.
fn vector(packed: Tensor, len: usize) -> Vec<f32> {
    let values = packed.to_host().unwrap();
    assert!(values[len..].iter().all(|v| *v == 0.0), "a pad lane");
    values[..len].to_vec()
}

#[derive(Debug, Clone)]
struct Problem {
    batch: usize,
    channels: usize,
    out_channels: usize,
    space: [usize; 3],
    kernel: [usize; 3],
    how: ConvTranspose3d,
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
        let [d, h, w] = self.kernel;
        [self.channels, self.out_channels, d, h, w]
    }

    fn output_dims(&self) -> [usize; 5] {
        let ConvTranspose3d { stride, padding, output_padding } = self.how;
        let size = |a: usize| (self.space[a] - 1) * stride[a] + self.kernel[a] + output_padding[a] - 2 * padding[a];
        [self.batch, self.out_channels, size(0), size(1), size(2)]
    }

    /// No two input voxels reach the same output voxel, and every output voxel is reached.
    fn is_apart(&self) -> bool {
        self.how == ConvTranspose3d::upsampling(self.kernel)
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

    /// Calls `f(input, filter, output)` with the indices of every product of the definition.
    fn products(&self, mut f: impl FnMut(usize, usize, usize)) {
        let ([_, _, od, oh, ow], [d, h, w], [kd, kh, kw]) = (self.output_dims(), self.space, self.kernel);
        let ConvTranspose3d { stride, padding, .. } = self.how;
        for i in 0..self.batch * d * h * w {
            let (n, at) = (i / (d * h * w), [i / (h * w) % d, i / w % h, i % w]);
            for tap in 0..kd * kh * kw {
                let k = [tap / (kh * kw), tap / kw % kh, tap % kw];
                let to = [0, 1, 2].map(|a| (at[a] * stride[a] + k[a]).wrapping_sub(padding[a]));
                if to[0] >= od || to[1] >= oh || to[2] >= ow {
                    continue;
                }
                for c in 0..self.channels {
                    let x = (n * self.channels + c) * d * h * w + i % (d * h * w);
                    for o in 0..self.out_channels {
                        let y = (((n * self.out_channels + o) * od + to[0]) * oh + to[1]) * ow + to[2];
                        f(x, (c * self.out_channels + o) * kd * kh * kw + tap, y);
                    }
                }
            }
        }
    }

    /// The definition in f64; the error bound is gamma times the sum of absolute products.
    fn reference(&self, x: &[f32]) -> Vec<Bounded> {
        let (w, b, dims) = (self.w(), self.b(), self.output_dims());
        let bias = |i: usize| b.as_ref().map_or(0.0, |b| f64::from(b[i / (dims[2] * dims[3] * dims[4]) % dims[1]]));
        let mut sums: Vec<Sum> = (0..dims.iter().product()).map(|i| Sum::of(bias(i))).collect();
        self.products(|i, j, o| sums[o].add(f64::from(x[i]) * f64::from(w[j])));
        sums.iter().map(|s| s.bounded(s.terms)).collect()
    }

    /// Gradients by input, filter and bias of the inner product of the result with `dy`.
    fn reference_gradients(&self, x: &[f32], dy: &[f32]) -> [Vec<Bounded>; 3] {
        let w = self.w();
        let mut dx = vec![Sum::default(); x.len()];
        let mut dw = vec![Sum::default(); w.len()];
        self.products(|i, j, o| {
            dx[i].add(f64::from(dy[o]) * f64::from(w[j]));
            dw[j].add(f64::from(dy[o]) * f64::from(x[i]));
        });
        let [_, o, d, h, w] = self.output_dims();
        let mut db = vec![Sum::default(); o];
        dy.iter().enumerate().for_each(|(i, g)| db[i / (d * h * w) % o].add(f64::from(*g)));
        [dx, dw, db].map(|sums| sums.iter().map(|s| s.bounded(s.terms)).collect())
    }

    fn dy(&self) -> Vec<f32> {
        values(self.output_dims().iter().product(), self.seed + 3)
    }

    /// Gradients by the named implementation, in the order of the values.
    fn run_back(&self, device: &Device, x: &[f32], dy: &[f32], name: &str) -> [Vec<f32>; 3] {
        let (w, b) = self.params(device);
        let mut cx = Ctx::infer(device);
        let x = activation(&mut cx, x, self.input_dims(), self.blocked);
        let dy = activation(&mut cx, dy, self.output_dims(), true);
        soil(device, self.input_dims());
        let found = testing::conv_transpose3d_gradients(name, &cx, &x, &w, b.as_ref(), self.how, &dy).unwrap();
        let [dx, dw, db] = found;
        assert_eq!(db.is_some(), self.bias);
        let dw = unpacked(dw.unwrap(), self.filter_dims());
        [result(cx.leaf(dx.unwrap())), dw, db.map_or(Vec::new(), |g| vector(g, self.out_channels))]
    }

    /// Every implementation's gradients within the bound.
    fn check_gradients(&self) {
        let (x, dy) = (self.x(), self.dy());
        let expected = self.reference_gradients(&x, &dy);
        for device in devices() {
            let (w, _) = self.params(&device);
            let names = testing::conv_transpose3d_gradient_implementations(&device, self.input_dims(), &w, self.how);
            assert_eq!(names.last(), Some(&"reference"));
            for name in names {
                let found = self.run_back(&device, &x, &dy, name);
                for ((what, found), expected) in ["input", "filter", "bias"].iter().zip(&found).zip(&expected) {
                    if *what != "bias" || self.bias {
                        check(&format!("{name}, gradient by the {what}, {self:?}"), found, expected);
                    }
                }
            }
        }
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
            None => ops::conv_transpose3d(&mut cx, x, &w, b.as_ref(), self.how),
            Some(name) => testing::conv_transpose3d(name, &mut cx, x, &w, b.as_ref(), self.how),
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
            let (w, _) = self.params(&device);
            let names = testing::conv_transpose3d_implementations(&device, self.input_dims(), &w, self.how);
            assert_eq!(names.iter().any(|n| n.starts_with("direct")), self.is_apart());
            assert_eq!(names.last(), Some(&"reference"));
            for name in names {
                check(&format!("{name} {self:?}"), &self.run(&device, &x, Some(name)), &expected);
            }
        }
    }
}

prop_compose! {
    /// nnU-Net's: the kernel is the stride.
    fn problem()(
        batch in 1..=2_usize,
        channels in 1..=50_usize,
        out_channels in 1..=50_usize,
        space in prop::array::uniform3(1..=5_usize),
        wide in 0..=12_usize,
        stride in prop::array::uniform3(1..=3_usize),
        (bias, blocked) in any::<(bool, bool)>(),
        seed in 0..1_000_000_u64,
    ) -> Problem {
        let [d, h, w] = space;
        let how = ConvTranspose3d::upsampling(stride);
        Problem { batch, channels, out_channels, space: [d, h, w + wide], kernel: stride, how, bias, blocked, seed }
    }
}

prop_compose! {
    /// Any kernel, stride, padding and output padding that leave something.
    fn general()(
        p in problem(),
        channels in 1..=20_usize,
        kernel in prop::array::uniform3(1..=4_usize),
        less in prop::array::uniform3(0..=3_usize),
        more in prop::array::uniform3(0..=2_usize),
    ) -> Problem {
        let (mut how, space) = (p.how, p.space);
        for a in 0..3 {
            how.output_padding[a] = more[a].min(how.stride[a] - 1);
            let reach = (space[a] - 1) * how.stride[a] + kernel[a] + how.output_padding[a];
            how.padding[a] = less[a].min((reach - 1) / 2);
        }
        Problem { kernel, channels, how, ..p }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn any_problem(p in problem()) {
        p.check();
        p.check_gradients();
    }

    #[test]
    fn any_kernel_stride_and_padding(p in general()) {
        p.check();
        p.check_gradients();
    }
}

fn problem_of(channels: usize, out_channels: usize, space: [usize; 3], stride: [usize; 3]) -> Problem {
    let how = ConvTranspose3d::upsampling(stride);
    Problem { batch: 1, channels, out_channels, space, kernel: stride, how, bias: true, blocked: true, seed: 7 }
}

/// PyTorch's usual doubling with a larger kernel.
fn overlapping(channels: usize, out_channels: usize, space: [usize; 3]) -> Problem {
    let how = ConvTranspose3d { stride: [2; 3], padding: [1; 3], output_padding: [1; 3] };
    Problem { kernel: [3; 3], how, ..problem_of(channels, out_channels, space, [2; 3]) }
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

/// The shapes of real networks: several chunks and slices of voxels, several segments and parts.
#[test]
fn gradients_at_shapes_of_networks() {
    problem_of(80, 64, [4, 4, 4], [2; 3]).check_gradients();
    problem_of(48, 20, [2, 12, 31], [1, 2, 2]).check_gradients();
    Problem { batch: 2, ..problem_of(24, 16, [5, 9, 23], [2, 2, 1]) }.check_gradients();
    Problem { batch: 3, ..problem_of(33, 40, [1, 6, 20], [1, 2, 2]) }.check_gradients();
    overlapping(20, 17, [4, 7, 9]).check();
    overlapping(20, 17, [4, 7, 9]).check_gradients();
}

/// The reference's gradients are those of the reference, which is linear in each of its inputs: a difference of any length
/// gives them exactly.
#[test]
fn the_reference_gradients_are_difference_quotients() {
    let p = Problem { out_channels: 2, channels: 3, ..overlapping(3, 2, [1, 2, 3]) };
    let (x, w, dy) = (p.x(), p.w(), p.dy());
    let loss = |x: &[f32], w: &[f32]| {
        let mut sum = 0.0;
        p.products(|i, j, o| sum += f64::from(x[i]) * f64::from(w[j]) * f64::from(dy[o]));
        sum
    };
    let [dx, dw, _] = p.reference_gradients(&x, &dy);
    let changed = |v: &[f32], i: usize, by: f32| {
        let mut v = v.to_vec();
        v[i] = by;
        v
    };
    for (i, expected) in dx.iter().enumerate() {
        let slope = (loss(&changed(&x, i, 1.0), &w) - loss(&changed(&x, i, -1.0), &w)) / 2.0;
        assert!((slope - expected.value).abs() < 1e-12, "input [{i}]: {slope} and {}", expected.value);
    }
    for (i, expected) in dw.iter().enumerate() {
        let slope = (loss(&x, &changed(&w, i, 1.0)) - loss(&x, &changed(&w, i, -1.0))) / 2.0;
        assert!((slope - expected.value).abs() < 1e-12, "filter [{i}]: {slope} and {}", expected.value);
    }
}

/// A recorded pass gives the bytes of the gradients' own function, and keeps its input only.
#[test]
fn a_recorded_pass_goes_back() {
    for p in [problem_of(20, 17, [2, 3, 4], [1, 2, 2]), overlapping(20, 17, [2, 3, 4])] {
        for device in devices() {
            let (w, b) = p.params(&device);
            let (x, dy) = (p.x(), p.dy());
            let mut cx = Ctx::train(&device);
            let t = Tensor::from_host(&x, Dims::from(p.input_dims()), &device).unwrap();
            let v = cx.variable(testing::blocked(t).unwrap());
            let y = ops::conv_transpose3d(&mut cx, v.clone(), &w, b.as_ref(), p.how).unwrap();
            let kept = 4 * 32 * p.space.iter().product::<usize>();
            assert_eq!(cx.saved().iter().map(|s| s.bytes).sum::<usize>(), kept);
            let g = Tensor::from_host(&dy, Dims::from(p.output_dims()), &device).unwrap();
            let mut grads = Grads::new();
            cx.backward_from(vec![(y, testing::blocked(g).unwrap())], &mut grads).unwrap();
            let name = testing::conv_transpose3d_gradient_implementations(&device, p.input_dims(), &w, p.how)[0];
            let [dx, dw, db] = p.run_back(&device, &x, &dy, name);
            assert_eq!(bits(&grads.variable(&v).unwrap().to_host().unwrap()), bits(&dx));
            let of = |param: &Param| grads.param(param).unwrap().clone();
            assert_eq!(bits(&unpacked(of(&w), p.filter_dims())), bits(&dw));
            assert_eq!(bits(&vector(of(b.as_ref().unwrap()), p.out_channels)), bits(&db));
        }
    }
}

/// Exactly, on small integers: <transposed conv(x), dy> = <x, gradient by x> = <w, gradient by w>.
#[test]
fn gradients_are_adjoint() {
    for mut p in [problem_of(20, 24, [3, 4, 5], [2; 3]), overlapping(18, 5, [3, 4, 5])] {
        p.bias = false;
        let x = integers(p.input_dims().iter().product(), 1);
        let (w, dy) = (integers(p.w().len(), 2), integers(p.output_dims().iter().product(), 3));
        for device in devices() {
            let filter = testing::transposed_filter(&w, p.filter_dims(), &device).unwrap();
            for name in testing::conv_transpose3d_gradient_implementations(&device, p.input_dims(), &filter, p.how) {
                let mut cx = Ctx::infer(&device);
                let v = activation(&mut cx, &x, p.input_dims(), true);
                let y = result(ops::conv_transpose3d(&mut cx, v.clone(), &filter, None, p.how).unwrap());
                let g = activation(&mut cx, &dy, p.output_dims(), true);
                let [dx, dw, _] = testing::conv_transpose3d_gradients(name, &cx, &v, &filter, None, p.how, &g).unwrap();
                let expected = inner(&y, &dy);
                assert_eq!(expected, inner(&x, &dx.unwrap().to_host().unwrap()), "{name}");
                assert_eq!(expected, inner(&w, &unpacked(dw.unwrap(), p.filter_dims())), "{name}");
            }
        }
    }
}

#[test]
fn bytes_do_not_depend_on_threads() {
    for p in [
        problem_of(96, 40, [9, 11, 13], [2; 3]),
        problem_of(320, 48, [4, 4, 5], [1, 2, 2]),
        overlapping(40, 24, [7, 8, 9]),
    ] {
        let (x, dy) = (p.x(), p.dy());
        for devices in threaded_devices() {
            let name = {
                let (w, _) = p.params(&devices[0]);
                testing::conv_transpose3d_gradient_implementations(&devices[0], p.input_dims(), &w, p.how)[0]
            };
            let all = [0, 1, 2].map(|i| {
                let back = p.run_back(&devices[i], &x, &dy, name);
                (bits(&p.run(&devices[i], &x, None)), back.map(|g| bits(&g)))
            });
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
        let a = ops::conv_transpose3d(&mut cx, a, &w, None, ConvTranspose3d::upsampling(stride)).unwrap();
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
            let up = result(ops::conv_transpose3d(&mut cx, up, &transposed, None, p.how).unwrap());
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
        let layer = nn::ConvTranspose3d::load(&source, "up", 17, 20, p.kernel, &device).unwrap();
        let mut cx = Ctx::infer(&device);
        let v = activation(&mut cx, &x, p.input_dims(), true);
        let y = result(layer.forward(&mut cx, v).unwrap());
        assert_eq!(bits(&y), bits(&p.run(&device, &x, None)));
        let e = nn::ConvTranspose3d::load(&source, "up", 20, 17, p.kernel, &device).unwrap_err().to_string();
        assert!(e.contains("expected [17, 20, 1, 2, 2]"), "{e}");
        assert!(nn::ConvTranspose3d::load(&source, "down", 17, 20, p.kernel, &device).is_err());
    }
}

#[test]
fn misfits_are_errors() {
    let device = Device::cpu();
    let filter = |dims: [usize; 5]| testing::transposed_filter(&vec![0.5; dims.iter().product()], dims, &device);
    let run = |dims: [usize; 5], w: &Param, b: Option<&Param>, how: ConvTranspose3d| {
        let mut cx = Ctx::infer(&device);
        let x = activation(&mut cx, &vec![0.0; dims.iter().product()], dims, false);
        let e = ops::conv_transpose3d(&mut cx, x, w, b, how).map(|_| ()).unwrap_err().to_string();
        assert!(e.starts_with("conv_transpose3d: ") && !e.contains('\n'), "{e}");
        e
    };
    let w = filter([4, 8, 2, 2, 2]).unwrap();
    let up = ConvTranspose3d::upsampling([2; 3]);
    assert!(run([1, 8, 4, 4, 4], &w, None, up).contains("expected [8, O"));
    assert!(run([1, 4, 4, 0, 4], &w, None, up).contains("input"));
    assert!(run([1, 4, 4, 4, 4], &w, None, ConvTranspose3d { stride: [2, 0, 2], ..up }).contains("stride 0"));
    assert!(run([1, 4, 4, 4, 4], &w, None, ConvTranspose3d { output_padding: [0, 0, 2], ..up }).contains("on axis 2"));
    assert!(run([1, 4, 1, 4, 4], &w, None, ConvTranspose3d { padding: [1; 3], ..up }).contains("padding 1 on axis 0"));
    let vector = testing::vector(&values(7, 1), &device).unwrap();
    assert!(run([1, 4, 4, 4, 4], &w, Some(&vector), up).contains("bias"));
    assert!(run([1, 4, 4, 4, 4], &vector, None, up).contains("filter"));
    let cx = Ctx::infer(&device);
    let [x, dy] = [[1, 4, 2, 2, 2], [1, 8, 4, 4, 5]]
        .map(|dims: [usize; 5]| activation(&mut Ctx::infer(&device), &vec![0.0; dims.iter().product()], dims, true));
    assert!(testing::conv_transpose3d_gradients("reference", &cx, &x, &w, None, up, &dy).is_err());
    assert!(ops::pack_transposed_filter(&[0.0; 5], [1, 1, 2, 2, 2], &device).is_err());
}
