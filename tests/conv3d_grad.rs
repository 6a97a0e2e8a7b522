//! conv3d_grad: every implementation of every gradient against the definition in f64, and laws.

mod growth;
mod laws;

use std::sync::Arc;

use proptest::prelude::*;
use stunet::autograd::Ctx;
use stunet::ops::conv3d_grad::{self as grad, By, Layer};
use stunet::ops::{self, Affine, Conv3d, InstanceNorm, Source, Sources, testing};
use stunet::tensor::{Device, Precision, Tensor};

use self::growth::growth;
use crate::common::bound::{Bounded, U, check, gamma};
use crate::common::drive::{activation, bits, devices, soil, threaded_devices, values};

#[derive(Debug, Clone)]
struct Problem {
    batch: usize,
    /// Channels of the first source and, where there is one, the second.
    channels: (usize, Option<usize>),
    out_channels: usize,
    /// Of the input as it is seen; a multiple of the factor.
    space: [usize; 3],
    kernel: [usize; 3],
    how: Conv3d,
    /// The first source's voxels stand for so many.
    factor: [usize; 3],
    /// The input is blocked, or repeated or stored as bf16.
    blocked: bool,
    precision: Precision,
    seed: u64,
}

impl Problem {
    fn in_channels(&self) -> usize {
        self.channels.0 + self.channels.1.unwrap_or(0)
    }

    fn layer(&self) -> Layer {
        let ([d, h, w], [kd, kh, kw]) = (self.space, self.kernel);
        Layer {
            x: [self.batch, self.in_channels(), d, h, w],
            w: [self.out_channels, self.in_channels(), kd, kh, kw],
            how: self.how,
        }
    }

    fn output(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| (self.space[a] + 2 * self.how.padding[a] - self.kernel[a]) / self.how.stride[a] + 1)
    }

    fn dy_dims(&self) -> [usize; 5] {
        let [d, h, w] = self.output();
        [self.batch, self.out_channels, d, h, w]
    }

    fn w(&self) -> Vec<f32> {
        values(self.layer().w.iter().product(), self.seed + 1)
    }

    fn dy(&self) -> Vec<f32> {
        values(self.dy_dims().iter().product(), self.seed + 2)
    }

    /// Sizes of the sources as they are stored, and their values, rounded as they are stored.
    fn sources(&self) -> Vec<([usize; 5], Vec<f32>)> {
        let source = |i: u64, channels: usize, factor: [usize; 3]| {
            let [d, h, w] = [0, 1, 2].map(|a| self.space[a] / factor[a]);
            let dims = [self.batch, channels, d, h, w];
            let x = values(dims.iter().product(), self.seed + 10 + i);
            (dims, x.into_iter().map(|v| self.precision.round(v)).collect())
        };
        let second = self.channels.1.map(|c| source(1, c, [1; 3]));
        [source(0, self.channels.0, self.factor)].into_iter().chain(second).collect()
    }

    /// The input as it is seen, `[N, C, D, H, W]`.
    fn x(&self) -> Vec<f32> {
        let ([d, h, w], sources) = (self.space, self.sources());
        let mut out = Vec::new();
        for n in 0..self.batch {
            for (i, ([_, channels, _, lh, lw], x)) in sources.iter().enumerate() {
                let f = if i == 0 { self.factor } else { [1; 3] };
                let len = x.len() / self.batch / channels;
                for (c, v) in (0..*channels).flat_map(|c| (0..d * h * w).map(move |v| (c, v))) {
                    let at = [v / (h * w) / f[0], v / w % h / f[1], v % w / f[2]];
                    out.push(x[(n * channels + c) * len + (at[0] * lh + at[1]) * lw + at[2]]);
                }
            }
        }
        out
    }

    fn read(&self, cx: &mut Ctx<'_>) -> Sources {
        let mut all = Vec::new();
        for (i, (dims, x)) in self.sources().into_iter().enumerate() {
            let blocked = self.blocked || i > 0 || self.precision != Precision::F32;
            let mut v = activation(cx, &x, dims, blocked);
            if self.precision != Precision::F32 {
                v = cx.leaf(testing::stored(v.into_value(), self.precision).unwrap());
            }
            all.push(if i == 0 { Source::repeated(v, self.factor) } else { v.into() });
        }
        let second = all.split_off(1).pop();
        let first = all.remove(0);
        second.map_or_else(|| Sources::One(first.clone()), |s| Sources::Two(first.clone(), s))
    }

    /// Calls `f(output place, input place, weight place, n)` for every product of the convolution.
    fn products(&self, mut f: impl FnMut(usize, usize, usize)) {
        let ([od, oh, ow], [d, h, w], [kd, kh, kw]) = (self.output(), self.space, self.kernel);
        let channels = self.in_channels();
        for n in 0..self.batch {
            for v in 0..od * oh * ow {
                let at = [v / (oh * ow), v / ow % oh, v % ow];
                for t in 0..kd * kh * kw {
                    let k = [t / (kh * kw), t / kw % kh, t % kw];
                    let p = [0, 1, 2].map(|a| (at[a] * self.how.stride[a] + k[a]).wrapping_sub(self.how.padding[a]));
                    if p[0] >= d || p[1] >= h || p[2] >= w {
                        continue;
                    }
                    let i = (p[0] * h + p[1]) * w + p[2];
                    for o in 0..self.out_channels {
                        for c in 0..channels {
                            f(
                                (n * self.out_channels + o) * od * oh * ow + v,
                                (n * channels + c) * d * h * w + i,
                                (o * channels + c) * kd * kh * kw + t,
                            );
                        }
                    }
                }
            }
        }
    }

    /// Both gradients by definition in f64, of the input as it is seen and of the filter. The bound is that of a sum in any
    /// order; beside it the root of the sum of squares, for the bounds of few products.
    fn reference(&self) -> (Vec<Sum>, Vec<Sum>) {
        let (x, w, dy) = (self.x(), self.w(), self.dy());
        let (mut dx, mut dw) = (vec![Sum::default(); x.len()], vec![Sum::default(); w.len()]);
        self.products(|o, i, k| {
            dx[i].add(f64::from(w[k]) * f64::from(dy[o]));
            dw[k].add(f64::from(x[i]) * f64::from(dy[o]));
        });
        (dx, dw)
    }

    /// The input's gradient summed over voxels of the first source, or that of the second.
    fn of_source(&self, dx: &[Sum], second: bool) -> Vec<Sum> {
        let ([d, h, w], f) = (self.space, if second { [1; 3] } else { self.factor });
        let [_, lh, lw] = [0, 1, 2].map(|a| self.space[a] / f[a]);
        let (first, channels) =
            if second { (self.channels.0, self.channels.1.unwrap_or(0)) } else { (0, self.channels.0) };
        let len = d * h * w / f.iter().product::<usize>();
        let mut out = vec![Sum::default(); self.batch * channels * len];
        for (i, s) in dx.iter().enumerate() {
            let (n, c, v) =
                (i / (self.in_channels() * d * h * w), i / (d * h * w) % self.in_channels(), i % (d * h * w));
            if (first..first + channels).contains(&c) {
                let at = [v / (h * w) / f[0], v / w % h / f[1], v % w / f[2]];
                out[(n * channels + c - first) * len + (at[0] * lh + at[1]) * lw + at[2]].merge(*s);
            }
        }
        out
    }

    fn tensor(&self, device: &Device, values: &[f32], dims: [usize; 5]) -> Tensor {
        testing::blocked(Tensor::from_host(values, dims.into(), device).unwrap()).unwrap()
    }

    /// The gradient of a source, unless it is plain, by the named implementation, or that which is chosen.
    fn dgrad(&self, device: &Device, name: Option<&str>, second: bool, into: Option<Tensor>) -> Tensor {
        let w = testing::filter(&self.w(), self.layer().w, device).unwrap();
        let dy = self.tensor(device, &self.dy(), self.dy_dims());
        let channels = if second { self.channels.0..self.in_channels() } else { 0..self.channels.0 };
        let factor = if second { [1; 3] } else { self.factor };
        soil(device, self.layer().x);
        let by = By { name, strict: false };
        grad::dgrad(by, self.layer(), &dy, &w, channels, factor, into).unwrap().0
    }

    fn wgrad(&self, device: &Device, name: Option<&str>, into: Option<Tensor>) -> Tensor {
        let mut cx = Ctx::infer(device);
        let dy = self.tensor(device, &self.dy(), self.dy_dims());
        let x = self.read(&mut cx);
        soil(device, self.layer().x);
        grad::wgrad(By { name, strict: false }, x, self.layer().w, self.how, &dy, into).unwrap().0
    }

    fn dgrad_names(&self, device: &Device, second: bool) -> Vec<&'static str> {
        grad::dgrad_implementations(device, self.layer(), if second { [1; 3] } else { self.factor })
    }

    fn wgrad_names(&self, device: &Device) -> Vec<&'static str> {
        let mut cx = Ctx::infer(device);
        let x = self.read(&mut cx);
        grad::wgrad_implementations(device, x, self.layer().w, self.how).unwrap()
    }

    /// Every implementation of every instruction set within its bound.
    fn check(&self) {
        let (dx, dw) = self.reference();
        for device in devices() {
            for second in [false, true].into_iter().take(1 + usize::from(self.channels.1.is_some())) {
                let expected = self.of_source(&dx, second);
                let names = self.dgrad_names(&device, second);
                assert!(names.contains(&"reference") && (names.len() > 1 || self.factor.iter().any(|f| *f > 2)));
                for name in names {
                    let got = self.dgrad(&device, Some(name), second, None);
                    assert!(testing::padding_is_zero(&got), "{name} {self:?}");
                    let bounds = self.dgrad_bounds(name, second, &expected);
                    check(&format!("dgrad {name} {self:?}"), &got.to_host().unwrap(), &bounds);
                }
            }
            for name in self.wgrad_names(&device) {
                let got = unpacked(&self.wgrad(&device, Some(name), None), self.layer().w);
                check(&format!("wgrad {name} {self:?}"), &got, &self.wgrad_bounds(name, &dw));
            }
        }
    }

    fn dgrad_bounds(&self, name: &str, second: bool, expected: &[Sum]) -> Vec<Bounded> {
        // A gradient at stride 1 is a convolution with outputs for inputs.
        let Some(growth) = growth(name, self.kernel, [1; 3]) else { return plain(expected) };
        let (w, taps) = (self.w(), self.kernel.iter().product::<usize>());
        let (first, channels, factor) = if second {
            (self.channels.0, self.channels.1.unwrap_or(0), 1)
        } else {
            (0, self.channels.0, self.factor.iter().product())
        };
        let unit = |c: usize| {
            let of = |o: usize| &w[(o * self.in_channels() + first + c) * taps..][..taps];
            let squares: f64 = (0..self.out_channels).flat_map(of).map(|w| f64::from(*w).powi(2)).sum();
            U * ((self.out_channels as f64 + TRANSFORMS) * squares).sqrt() * largest(&self.dy())
        };
        let units: Vec<f64> = (0..channels).map(unit).collect();
        let len = expected.len() / self.batch / channels;
        // The errors of neighbours that are summed have much in common.
        let grown = DEVIATIONS * growth.input * factor as f64;
        let bound = |(i, s): (usize, &Sum)| Bounded { value: s.value, error: grown * units[i / len % channels] };
        expected.iter().enumerate().map(bound).collect()
    }

    fn wgrad_bounds(&self, name: &str, expected: &[Sum]) -> Vec<Bounded> {
        let Some(growth) = growth(name, self.kernel, self.how.stride) else { return plain(expected) };
        let tiles: usize = (0..3).map(|a| self.output()[a].div_ceil(growth.tile[a])).product();
        let tiles = (tiles * self.batch) as f64;
        let unit = U * ((tiles + TRANSFORMS) * tiles).sqrt() * largest(&self.x()) * largest(&self.dy());
        expected.iter().map(|s| Bounded { value: s.value, error: DEVIATIONS * growth.filter * unit }).collect()
    }

    fn positions(&self) -> usize {
        self.batch * self.output().iter().product::<usize>()
    }
}

/// A sum of products.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    value: f64,
    absolute: f64,
    squares: f64,
    terms: usize,
}

impl Sum {
    fn add(&mut self, product: f64) {
        self.merge(Sum { value: product, absolute: product.abs(), squares: product * product, terms: 1 });
    }

    fn merge(&mut self, o: Sum) {
        self.value += o.value;
        self.absolute += o.absolute;
        self.squares += o.squares;
        self.terms += o.terms;
    }
}

fn largest(x: &[f32]) -> f64 {
    x.iter().fold(0.0, |m, v| m.max(f64::from(v.abs())))
}

/// Weights in `[O, I, kD, kH, kW]` order from the packed filter's, after a look at its pad lanes.
fn unpacked(packed: &Tensor, [o, i, kd, kh, kw]: [usize; 5]) -> Vec<f32> {
    let (packed, taps) = (packed.to_host().unwrap(), kd * kh * kw);
    let padded = o.next_multiple_of(16);
    let at = |o: usize, i2: usize, t: usize| {
        let group = o / 32;
        let width = (padded - group * 32).min(32);
        packed[group * 32 * i * taps + (t * i + i2) * width + o % 32]
    };
    for (c, t) in (0..i).flat_map(|c| (0..taps).map(move |t| (c, t))) {
        assert!((o..padded).all(|lane| at(lane, c, t) == 0.0), "a pad lane is not zero");
    }
    (0..o * i * taps).map(|n| at(n / (i * taps), n / taps % i, n % taps)).collect()
}

/// Bounds of sums in any order.
fn plain(sums: &[Sum]) -> Vec<Bounded> {
    // One rounding per product and per addition, and in sums of weights one more for each axis.
    sums.iter().map(|s| Bounded { value: s.value, error: gamma(s.terms + 5) * s.absolute }).collect()
}

/// Six times the deviation of a sum of many small errors is never seen (Higham and Mary, "A New Approach to Probabilistic
/// Rounding Error Analysis", 2019).
const DEVIATIONS: f64 = 6.0;

/// Roundings of three transforms along three axes, of at most six each.
const TRANSFORMS: f64 = 54.0;

fn axis() -> impl Strategy<Value = (usize, usize, usize, usize)> {
    (prop_oneof![Just(1_usize), Just(3)], 1..=2_usize).prop_flat_map(|(kernel, stride)| {
        let padding = 0..=kernel / 2;
        (Just(kernel), Just(stride), padding).prop_flat_map(|(kernel, stride, padding)| {
            (Just(kernel), Just(stride), Just(padding), kernel - 2 * padding..=7)
        })
    })
}

prop_compose! {
    fn problem()(
        batch in 1..=2_usize,
        first in 1..=36_usize,
        second in proptest::option::of(1..=20_usize),
        out_channels in 1..=50_usize,
        (z, y, x) in (axis(), axis(), axis()),
        wide in 0..=12_usize,
        factor in [1..=2_usize, 1..=2_usize, 1..=2_usize],
        (repeated, blocked, halves) in any::<(bool, bool, bool)>(),
        seed in 0..1_000_000_u64,
    ) -> Problem {
        let factor = if repeated { factor } else { [1; 3] };
        let space = [z.3, y.3, x.3 + wide];
        Problem {
            batch,
            channels: (first, second),
            out_channels,
            space: [0, 1, 2].map(|a| space[a].next_multiple_of(factor[a])),
            kernel: [z.0, y.0, x.0],
            how: Conv3d { stride: [z.1, y.1, x.1], padding: [z.2, y.2, x.2] },
            factor,
            blocked,
            precision: if halves { Precision::Bf16 } else { Precision::F32 },
            seed,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_problem(p in problem()) {
        p.check();
    }
}

fn cube(channels: (usize, Option<usize>), out_channels: usize, space: [usize; 3], stride: usize) -> Problem {
    Problem {
        batch: 2,
        channels,
        out_channels,
        space,
        kernel: [3; 3],
        how: Conv3d { stride: [stride; 3], padding: [1; 3] },
        factor: [1; 3],
        blocked: true,
        precision: Precision::F32,
        seed: 7,
    }
}

/// The shapes of real networks, and their edges.
#[test]
fn shapes_of_networks() {
    cube((16, None), 32, [3, 4, 37], 1).check();
    cube((16, Some(16)), 16, [4, 6, 8], 1).check();
    Problem { factor: [2; 3], ..cube((20, Some(12)), 24, [4, 6, 10], 1) }.check();
    Problem { factor: [1, 2, 2], ..cube((16, None), 16, [3, 6, 10], 1) }.check();
    cube((32, None), 40, [4, 5, 13], 2).check();
    Problem { blocked: false, ..cube((1, None), 16, [4, 5, 19], 1) }.check();
    Problem { blocked: false, ..cube((4, None), 32, [5, 4, 9], 2) }.check();
    cube((48, None), 33, [1; 3], 1).check();
    cube((17, None), 16, [2, 1, 3], 2).check();
    let pointwise = Conv3d { stride: [1; 3], padding: [0; 3] };
    Problem { kernel: [1; 3], how: pointwise, ..cube((16, None), 105, [3, 9, 17], 1) }.check();
    Problem { kernel: [1; 3], how: Conv3d { stride: [2; 3], ..pointwise }, ..cube((16, Some(3)), 20, [3, 4, 5], 1) }
        .check();
    Problem { how: pointwise, ..cube((20, None), 18, [5, 4, 6], 1) }.check();
    let flat = Conv3d { stride: [1, 2, 2], padding: [0, 1, 1] };
    Problem { kernel: [1, 3, 3], how: flat, ..cube((20, None), 33, [2, 6, 21], 1) }.check();
}

/// Values of a whole network's convolution: several chunks and pieces of the outputs.
#[test]
fn many_voxels() {
    cube((3, None), 4, [12, 14, 70], 1).check();
    cube((16, None), 5, [9, 20, 40], 2).check();
}

/// `<dy, conv(x)> = <dgrad(dy), x> = <x, dy in wgrad, w>`: the three are one bilinear form.
#[test]
fn gradients_are_adjoint() {
    for p in [
        cube((20, Some(16)), 24, [6, 5, 9], 1),
        Problem { factor: [2; 3], ..cube((16, Some(16)), 16, [8, 8, 8], 1) },
        cube((16, None), 32, [7, 6, 9], 2),
    ] {
        let dot = |a: &[f32], b: &[f32]| -> (f64, f64) {
            let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.fold((0.0, 0.0), |(s, t), p| (s + p, t + p.abs()))
        };
        // What any of the three may be off: as much as all products' roundings together.
        let mut absolute = 0.0;
        let (x, w, dy) = (p.x(), p.w(), p.dy());
        p.products(|o, i, k| absolute += f64::from((x[i] * w[k] * dy[o]).abs()));
        for device in devices() {
            let filter = testing::filter(&w, p.layer().w, &device).unwrap();
            let mut cx = Ctx::infer(&device);
            let sources = p.read(&mut cx);
            let y = ops::conv3d(&mut cx, sources, &filter, None, p.how).unwrap();
            let forward = dot(&dy, &y.into_value().to_host().unwrap()).0;
            let mut back = 0.0;
            for (i, (_, x)) in p.sources().iter().enumerate() {
                back += dot(&p.dgrad(&device, None, i > 0, None).to_host().unwrap(), x).0;
            }
            let weights = dot(&unpacked(&p.wgrad(&device, None, None), p.layer().w), &w).0;
            let most = gamma(p.in_channels().max(p.out_channels) * 27) * absolute;
            assert!((forward - back).abs() <= most && (forward - weights).abs() <= most, "{forward} {back} {weights}");
        }
    }
}

/// The reference itself: the convolution is linear in each of its operands, so a difference of its values over any
/// distance is a derivative.
#[test]
fn reference_is_the_derivative() {
    let p = Problem { batch: 1, ..cube((2, None), 3, [3, 4, 5], 2) };
    let (dx, dw) = p.reference();
    let (x, w, dy) = (p.x(), p.w(), p.dy());
    let loss = |x: &[f32], w: &[f32]| {
        let mut y = vec![0.0; dy.len()];
        p.products(|o, i, k| y[o] += f64::from(x[i]) * f64::from(w[k]));
        y.iter().zip(&dy).map(|(y, d)| y * f64::from(*d)).sum::<f64>()
    };
    let moved = |v: &[f32], i: usize, by: f32| {
        let mut v = v.to_vec();
        v[i] += by;
        v
    };
    // Steps of a quarter change values of at most 24 bits without rounding by more than a part in 2^23.
    for i in 0..x.len() {
        let slope = (loss(&moved(&x, i, 0.25), &w) - loss(&moved(&x, i, -0.25), &w)) / 0.5;
        assert!((slope - dx[i].value).abs() <= 1e-6 * (1.0 + dx[i].absolute), "{slope} {:?}", dx[i]);
    }
    for i in 0..w.len() {
        let slope = (loss(&x, &moved(&w, i, 0.25)) - loss(&x, &moved(&w, i, -0.25))) / 0.5;
        assert!((slope - dw[i].value).abs() <= 1e-6 * (1.0 + dw[i].absolute), "{slope} {:?}", dw[i]);
    }
}

/// How large the errors of either gradient are, beside those of a plain sequence of f32 sums.
#[test]
fn rounding_errors_are_those_of_f32() {
    for p in [cube((16, None), 16, [16, 16, 20], 1), cube((32, None), 16, [16, 16, 16], 2)] {
        let (dx, dw) = p.reference();
        let (x, w, dy) = (p.x(), p.w(), p.dy());
        let (mut sx, mut sw) = (vec![0f32; x.len()], vec![0f32; w.len()]);
        p.products(|o, i, k| {
            sx[i] += w[k] * dy[o];
            sw[k] += x[i] * dy[o];
        });
        let rms = |got: &[f32], exact: &[Sum]| {
            let e: f64 = got.iter().zip(exact).map(|(g, s)| (f64::from(*g) - s.value).powi(2)).sum();
            (e / exact.iter().map(|s| s.value.powi(2)).sum::<f64>()).sqrt()
        };
        let (sx, sw) = (rms(&sx, &dx), rms(&sw, &dw));
        for device in devices() {
            for name in p.dgrad_names(&device, false) {
                let error = rms(&p.dgrad(&device, Some(name), false, None).to_host().unwrap(), &dx) / sx;
                eprintln!("dgrad {name}: {error:.2} times {sx:.1e}");
                assert!(error <= most("dgrad", name), "dgrad {name}: {error:.2} times {sx:.1e}");
            }
            let chosen = rms(&p.dgrad(&device, None, false, None).to_host().unwrap(), &dx) / sx;
            assert!(chosen <= 1.25, "the chosen one: {chosen:.2} times {sx:.1e}");
            for name in p.wgrad_names(&device) {
                let error = rms(&unpacked(&p.wgrad(&device, Some(name), None), p.layer().w), &dw) / sw;
                eprintln!("wgrad {name}: {error:.2} times {sw:.1e}");
                assert!(error <= most("wgrad", name), "wgrad {name}: {error:.2} times {sw:.1e}");
            }
        }
    }
}

/// The most that errors may be, beside a plain sequence's. Another order of the same sum moves its error by some percent.
/// Of few products, an input's gradient has those of the convolution, which are largest where little is added up: with
/// 16 channels 3.5 and 1.9 for F(4,4,4) and F(2,4,4). A filter's has 1.2 and less: there, tiles are added up.
fn most(gradient: &str, name: &str) -> f64 {
    match (gradient, name.split('_').nth(1)) {
        ("dgrad", Some("444")) => 4.0,
        (_, Some("444" | "244")) => 2.25,
        _ => 1.25,
    }
}

/// Adding to what is there is the same as adding afterwards.
#[test]
fn accumulates() {
    let p = Problem { factor: [2; 3], ..cube((16, Some(16)), 32, [8, 8, 12], 1) };
    for p in [p, cube((32, None), 16, [5, 6, 7], 2), cube((3, None), 16, [12, 14, 40], 1)] {
        for device in devices() {
            for name in p.dgrad_names(&device, false) {
                let fresh = p.dgrad(&device, Some(name), false, None).to_host().unwrap();
                let before = values(fresh.len(), 99);
                let [d, h, w] = [0, 1, 2].map(|a| p.space[a] / p.factor[a]);
                let into = p.tensor(&device, &before, [p.batch, p.channels.0, d, h, w]);
                let got = p.dgrad(&device, Some(name), false, Some(into));
                assert!(testing::padding_is_zero(&got));
                // The reference begins with what is there.
                let terms = 27 * p.out_channels * p.factor.iter().product::<usize>() + 1;
                let most = if name == "reference" { gamma(terms) * terms as f64 } else { 0.0 };
                for ((g, f), b) in got.to_host().unwrap().iter().zip(&fresh).zip(&before) {
                    assert!(f64::from((g - (f + b)).abs()) <= most, "{name}: {g} for {f} + {b}");
                }
            }
            for name in p.wgrad_names(&device) {
                let once = p.wgrad(&device, Some(name), None);
                let fresh = once.to_host().unwrap();
                let twice = p.wgrad(&device, Some(name), Some(once)).to_host().unwrap();
                for (t, f) in twice.iter().zip(&fresh) {
                    let most = 4.0 * gamma(p.positions() + 1) * p.positions() as f64;
                    assert!(f64::from((t - 2.0 * f).abs()) <= most, "{name}: {t} for twice {f}");
                }
            }
        }
    }
}
