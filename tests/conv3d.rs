//! conv3d: every implementation against the definition in f64, and laws.

use proptest::prelude::*;
use stunet::autograd::{Ctx, Param};
use stunet::ops::{self, Conv3d, Sources, testing};
use stunet::tensor::{Device, Precision};

use crate::common::bound::{Bounded, U, check, gamma};
use crate::common::drive::{activation, bits, devices, result, soil, threaded_devices, values};

#[derive(Debug, Clone)]
struct Problem {
    batch: usize,
    /// Channels of the first source and, where there is one, the second.
    channels: (usize, Option<usize>),
    out_channels: usize,
    space: [usize; 3],
    kernel: [usize; 3],
    how: Conv3d,
    bias: bool,
    /// The input is blocked.
    blocked: bool,
    seed: u64,
}

impl Problem {
    fn in_channels(&self) -> usize {
        self.channels.0 + self.channels.1.unwrap_or(0)
    }

    fn input_dims(&self) -> [usize; 5] {
        let [d, h, w] = self.space;
        [self.batch, self.in_channels(), d, h, w]
    }

    fn filter_dims(&self) -> [usize; 5] {
        let [d, h, w] = self.kernel;
        [self.out_channels, self.in_channels(), d, h, w]
    }

    fn output(&self) -> [usize; 3] {
        [0, 1, 2].map(|a| (self.space[a] + 2 * self.how.padding[a] - self.kernel[a]) / self.how.stride[a] + 1)
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
        let (w, b, [od, oh, ow]) = (self.w(), self.b(), self.output());
        let ([d, h, width], [kd, kh, kw], channels) = (self.space, self.kernel, self.in_channels());
        let terms = channels * kd * kh * kw;
        let mut out = Vec::new();
        for n in 0..self.batch {
            for o in 0..self.out_channels {
                for v in 0..od * oh * ow {
                    let at = [v / (oh * ow), v / ow % oh, v % ow];
                    let bias = b.as_ref().map_or(0.0, |b| f64::from(b[o]));
                    let (mut value, mut absolute) = (bias, bias.abs());
                    for t in 0..terms {
                        let (c, k) = (t / (kd * kh * kw), [t / (kh * kw) % kd, t / kw % kh, t % kw]);
                        let p =
                            [0, 1, 2].map(|a| (at[a] * self.how.stride[a] + k[a]).wrapping_sub(self.how.padding[a]));
                        if p[0] < d && p[1] < h && p[2] < width {
                            let x = x[(((n * channels + c) * d + p[0]) * h + p[1]) * width + p[2]];
                            let product = f64::from(x) * f64::from(w[o * terms + t]);
                            value += product;
                            absolute += product.abs();
                        }
                    }
                    // One rounding per product, per addition and for the bias.
                    out.push(Bounded { value, error: gamma(terms + 2) * absolute });
                }
            }
        }
        out
    }

    /// For every output the unit in which its rounding errors are counted: that of a root mean square of all roundings, if
    /// all inputs of a channel were as large as its largest (Higham and Mary, "A New Approach to Probabilistic Rounding
    /// Error Analysis", 2019).
    fn unit(&self, x: &[f32]) -> Vec<f64> {
        let (w, b, voxels) = (self.w(), self.b(), self.output().iter().product::<usize>());
        let (taps, channels) = (self.kernel.iter().product::<usize>(), self.in_channels());
        let space = self.space.iter().product::<usize>();
        let mut out = Vec::new();
        for n in 0..self.batch {
            let largest = |c: usize| {
                let x = &x[(n * channels + c) * space..][..space];
                x.iter().fold(0.0, |m: f64, v| m.max(f64::from(v.abs())))
            };
            let tops: Vec<f64> = (0..channels).map(largest).collect();
            for o in 0..self.out_channels {
                let mut sum = b.as_ref().map_or(0.0, |b| f64::from(b[o]).powi(2));
                for (c, top) in tops.iter().enumerate() {
                    let of = &w[(o * channels + c) * taps..][..taps];
                    sum += top * top * of.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
                }
                // Three transforms each of inputs, filters and products, of at most six roundings.
                out.extend(std::iter::repeat_n(U * ((channels + 54) as f64 * sum).sqrt(), voxels));
            }
        }
        out
    }

    fn params(&self, device: &Device) -> (Param, Option<Param>) {
        let w = testing::filter(&self.w(), self.filter_dims(), device).unwrap();
        (w, self.b().map(|b| testing::vector(&b, device).unwrap()))
    }

    fn sources(&self, cx: &mut Ctx<'_>, x: &[f32]) -> Sources {
        let [n, _, d, h, w] = self.input_dims();
        let Some(second) = self.channels.1 else {
            return activation(cx, x, self.input_dims(), self.blocked).into();
        };
        let (first, space) = (self.channels.0, d * h * w);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for sample in x.chunks_exact((first + second) * space) {
            a.extend_from_slice(&sample[..first * space]);
            b.extend_from_slice(&sample[first * space..]);
        }
        let a = activation(cx, &a, [n, first, d, h, w], self.blocked);
        // Sources of different layouts are allowed, too.
        Sources::Two(a.into(), activation(cx, &b, [n, second, d, h, w], true).into())
    }

    /// Runs the named implementation, or the one the operation picks.
    fn run(&self, device: &Device, x: &[f32], name: Option<&str>) -> Vec<f32> {
        let (w, b) = self.params(device);
        self.run_with(device, x, name, &w, b.as_ref())
    }

    fn run_with(&self, device: &Device, x: &[f32], name: Option<&str>, w: &Param, b: Option<&Param>) -> Vec<f32> {
        let mut cx = Ctx::infer(device);
        let [d, h, width] = self.output();
        let sources = self.sources(&mut cx, x);
        soil(device, [self.batch, self.out_channels, d, h, width]);
        result(
            match name {
                None => ops::conv3d(&mut cx, sources, w, b, self.how),
                Some(name) => testing::conv3d(name, &mut cx, sources, w, b, self.how).map(|r| r.0),
            }
            .unwrap(),
        )
    }

    /// Every implementation of every instruction set within the bound.
    fn check(&self) {
        let x = self.x();
        let expected = self.reference(&x);
        for device in devices() {
            let names = testing::conv3d_implementations(&device, self.input_dims(), &self.params(&device).0, self.how);
            assert!(names.contains(&"reference"));
            for name in names {
                let growth = growth(name, &self.how, self.kernel);
                let expected: Vec<_> = match growth {
                    None => expected.clone(),
                    Some(g) => {
                        // Six times the deviation of a sum of many small errors is never seen.
                        let unit = self.unit(&x);
                        let bound = |(i, e): (usize, &Bounded)| Bounded { error: 6.0 * g * unit[i], ..*e };
                        expected.iter().enumerate().map(bound).collect()
                    }
                };
                check(&format!("{name} {self:?}"), &self.run(&device, &x, Some(name)), &expected);
            }
        }
    }
}

/// How much larger than in a plain sum rounding errors grow where few products stand for many, all axes together; none for
/// implementations that do the plain sum.
///
/// Along one axis an output is `sum_j A_ij (sum_k G_jk w_k) (sum_l B_jl x_l)`. Independent errors add up as squares, so for
/// inputs of one size they grow by the root of `sum_j A_ij^2 max_k G_jk^2 sum_l B_jl^2`.
fn growth(name: &str, how: &Conv3d, kernel: [usize; 3]) -> Option<f64> {
    let numbers = name.strip_prefix("winograd_")?.as_bytes();
    // Along each axis, the square.
    let axis = |a: usize| -> f64 {
        // Points 0, +-a, +-b and infinity; without 0 at stride 2, where the middle tap goes by itself.
        let (squares, ends) = match (kernel[a], how.stride[a], numbers[a] - b'0') {
            (1, ..) => return 1.0,
            (_, 1, 2) => return 2.0 + 2.0 * 0.25 * 2.0,
            (_, 2, 2) => return 2.0 + 1.0 + 1.0,
            (_, 1, _) => ([0.5, 2.0], [true, false, false, true]),
            _ => ([0.375 * 0.375, 1.375 * 1.375], [false, false, false, true]),
        };
        let stride = how.stride[a];
        let [a2, b2]: [f64; 2] = squares;
        let end = 1.0 + (a2 + b2).powi(2) + (a2 * b2).powi(2);
        let output = |i: usize| {
            let pair = |p2: f64, q2: f64| {
                let inputs = (1.0 + q2 * q2) * (1.0 + p2);
                // Differences to the other points, and the largest of the taps' powers.
                let (differences, power) = if stride == 1 {
                    (2.0 * p2 * (p2 - q2), 1f64.max(p2))
                } else {
                    (2.0 * p2.sqrt() * (p2 - q2), 1f64.max(p2.sqrt()))
                };
                2.0 * p2.powi(i as i32) * inputs * (power / differences).powi(2)
            };
            let middle = if stride == 2 { 1.0 } else { 0.0 };
            pair(a2, b2) + pair(b2, a2) + middle + if ends[i] { end } else { 0.0 }
        };
        (0..4).map(output).fold(0.0, f64::max)
    };
    Some((axis(0) * axis(1) * axis(2)).sqrt())
}

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
        wide in 0..=30_usize,
        (bias, blocked) in any::<(bool, bool)>(),
        seed in 0..1_000_000_u64,
    ) -> Problem {
        Problem {
            batch,
            channels: (first, second),
            out_channels,
            space: [z.3, y.3, x.3 + wide],
            kernel: [z.0, y.0, x.0],
            how: Conv3d { stride: [z.1, y.1, x.1], padding: [z.2, y.2, x.2] },
            bias,
            blocked,
            seed,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_problem(p in problem()) {
        p.check();
    }
}

fn cube(channels: (usize, Option<usize>), out_channels: usize, space: [usize; 3], stride: usize) -> Problem {
    Problem {
        batch: 1,
        channels,
        out_channels,
        space,
        kernel: [3; 3],
        how: Conv3d { stride: [stride; 3], padding: [1; 3] },
        bias: true,
        blocked: true,
        seed: 7,
    }
}

/// The shapes of real networks: every tile width, several output groups, rows longer than a work item's segment.
#[test]
fn shapes_of_networks() {
    cube((16, None), 32, [3, 4, 49], 1).check();
    cube((32, Some(32)), 32, [3, 3, 32], 1).check();
    cube((20, Some(12)), 24, [4, 4, 13], 2).check();
    cube((48, None), 80, [4, 4, 4], 1).check();
    Problem { blocked: false, ..cube((1, None), 16, [4, 5, 35], 1) }.check();
    Problem { blocked: false, ..cube((4, None), 32, [5, 4, 33], 2) }.check();
    // The head: pointwise, many classes, more voxels than one segment.
    let pointwise = Conv3d { stride: [1; 3], padding: [0; 3] };
    Problem { kernel: [1; 3], how: pointwise, ..cube((16, None), 105, [7, 9, 17], 1) }.check();
    // 2D.
    let flat = Conv3d { stride: [1; 3], padding: [0, 1, 1] };
    Problem { kernel: [1, 3, 3], how: flat, batch: 2, ..cube((20, None), 33, [1, 6, 500], 1) }.check();
}

/// A filter that fills caches, walked group by group.
#[test]
fn large_filter() {
    cube((96, Some(64)), 64, [2, 3, 9], 1).check();
}

/// A filter stored as bf16 gives, to the bit, what rounding it first gives, by every implementation: with transformed
/// filters that are kept and that are made on the way, of one group of output channels and of several.
#[test]
fn bf16_storage_is_rounding_first() {
    let pointwise = Conv3d { stride: [1; 3], padding: [0; 3] };
    for p in [
        cube((20, None), 40, [20, 18, 22], 1),
        cube((24, Some(20)), 24, [5, 6, 9], 1),
        cube((160, None), 96, [4, 4, 4], 1),
        cube((32, None), 48, [7, 8, 9], 2),
        Problem { blocked: false, ..cube((1, None), 16, [4, 5, 35], 1) },
        Problem { kernel: [1; 3], how: pointwise, ..cube((20, Some(16)), 105, [3, 5, 17], 1) },
        Problem { kernel: [1, 3, 3], batch: 2, ..cube((33, None), 17, [3, 6, 8], 1) },
    ] {
        let (x, dims) = (p.x(), p.filter_dims());
        let w = p.w();
        let rounded: Vec<f32> = w.iter().map(|w| Precision::Bf16.round(*w)).collect();
        for [one, two, seven] in threaded_devices() {
            let (any, b) = p.params(&one);
            for name in testing::conv3d_implementations(&one, p.input_dims(), &any, p.how) {
                // One of its own: a transformed filter is kept for all sets, and they round differently.
                let full = testing::filter(&rounded, dims, &one).unwrap();
                let expected = bits(&p.run_with(&one, &x, Some(name), &full, b.as_ref()));
                for device in [&one, &two, &seven] {
                    let half = testing::stored_filter(&w, dims, Precision::Bf16, device).unwrap();
                    // Twice: the second time with the filter that the first has kept.
                    for _ in 0..2 {
                        let got = p.run_with(device, &x, Some(name), &half, b.as_ref());
                        assert!(bits(&got) == expected, "{name} {p:?} {}", device.threads());
                    }
                }
            }
        }
    }
}

/// What [`Precision::Bf16`] promises of a layer's weights, and that storing them takes half the memory.
#[test]
fn bf16_moves_weights_little() {
    let dims = [32, 24, 3, 3, 3];
    let w = values(dims.iter().product(), 5);
    let (mut moved, mut norm) = (0.0, 0.0);
    for &w in &w {
        let error = f64::from(Precision::Bf16.round(w)) - f64::from(w);
        assert!(error.abs() <= f64::from(w).abs() / 256.0);
        assert_eq!(Precision::F32.round(w).to_bits(), w.to_bits());
        (moved, norm) = (moved + error * error, norm + f64::from(w).powi(2));
    }
    assert!((moved / norm).sqrt() <= 1.0 / 512.0, "{:e}", (moved / norm).sqrt());
    // Ties go to the even neighbour.
    for (w, even) in [(1.0 + 1.0 / 256.0, 1.0), (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0)] {
        assert_eq!(Precision::Bf16.round(w), even);
    }
    let bytes = [Precision::F32, Precision::Bf16].map(|precision| {
        let device = Device::cpu();
        let stored = testing::stored_filter(&w, dims, precision, &device).unwrap();
        assert_eq!(stored.precision(), precision);
        device.memory().peak
    });
    assert_eq!(bytes[0], 2 * bytes[1]);
}

#[test]
fn bytes_do_not_depend_on_threads() {
    for p in [cube((24, Some(20)), 40, [9, 17, 33], 1), cube((96, None), 96, [5, 6, 8], 2)] {
        let x = p.x();
        for devices in threaded_devices() {
            let all = devices.map(|d| bits(&p.run(&d, &x, None)));
            assert!(all[0] == all[1] && all[0] == all[2], "{p:?}");
        }
    }
}

/// Splitting the input into sources changes nothing, not even the rounding, where blocks are summed in one order.
#[test]
fn two_sources_are_one_concatenated() {
    for first in [1, 4, 12, 16, 20, 32] {
        let one = cube((44, None), 24, [3, 5, 14], 1);
        let two = Problem { channels: (first, Some(44 - first)), ..one.clone() };
        for device in devices() {
            let x = one.x();
            for name in testing::conv3d_implementations(&device, one.input_dims(), &one.params(&device).0, one.how) {
                let (a, b) = (one.run(&device, &x, Some(name)), two.run(&device, &x, Some(name)));
                assert!(bits(&a) == bits(&b), "{name} {first}");
            }
        }
    }
}

/// conv(a x + y) = a conv(x) + conv(y) without bias, within the bounds of the three.
#[test]
fn is_linear() {
    let p = Problem { bias: false, ..cube((20, None), 24, [4, 5, 13], 1) };
    let (x, y) = (p.x(), values(p.x().len(), 99));
    // A power of two, so that forming the combination of small integers rounds nothing.
    let (x, y): (Vec<f32>, Vec<f32>) =
        (x.iter().map(|v| (v * 64.0).round()).collect(), y.iter().map(|v| (v * 64.0).round()).collect());
    let mix: Vec<f32> = x.iter().zip(&y).map(|(x, y)| 2.0 * x + y).collect();
    for device in devices() {
        let [fx, fy, fm] = [&x, &y, &mix].map(|v| p.run(&device, v, None));
        let [ex, ey, em] = [&x, &y, &mix].map(|v| p.reference(v));
        for i in 0..fm.len() {
            let error = (f64::from(fm[i]) - 2.0 * f64::from(fx[i]) - f64::from(fy[i])).abs();
            assert!(error <= em[i].error + 2.0 * ex[i].error + ey[i].error, "{i}: {error}");
        }
    }
}

/// Shifting the input shifts the output, away from the border, to the last bit: every tile sums in one order.
#[test]
fn shift_in_shift_out() {
    let p = cube((8, None), 16, [3, 3, 50], 1);
    let x = p.x();
    let mut shifted = x.clone();
    for row in shifted.chunks_exact_mut(50) {
        row.rotate_right(1);
    }
    for device in devices() {
        let (a, b) = (p.run(&device, &x, None), p.run(&device, &shifted, None));
        for (a, b) in a.chunks_exact(50).zip(b.chunks_exact(50)) {
            assert_eq!(bits(&a[1..48]), bits(&b[2..49]));
        }
    }
}

#[test]
fn misfits_are_errors() {
    let device = Device::cpu();
    let w = testing::filter(&values(8 * 4 * 27, 1), [8, 4, 3, 3, 3], &device).unwrap();
    let b = testing::vector(&values(7, 1), &device).unwrap();
    let ok = Conv3d { stride: [1; 3], padding: [1; 3] };
    let run = |dims: [usize; 5], b: Option<&Param>, how: Conv3d| {
        let mut cx = Ctx::infer(&device);
        let x = activation(&mut cx, &vec![0.0; dims.iter().product()], dims, false);
        ops::conv3d(&mut cx, x, &w, b, how).map(|_| ()).unwrap_err().to_string()
    };
    for (dims, how) in [
        ([1, 5, 4, 4, 4], ok),
        ([1, 4, 4, 0, 4], ok),
        ([1, 4, 2, 4, 4], Conv3d { padding: [0; 3], ..ok }),
        ([1, 4, 4, 4, 4], Conv3d { stride: [3, 1, 1], ..ok }),
        ([1, 4, 4, 4, 4], Conv3d { padding: [1, 2, 1], ..ok }),
    ] {
        let e = run(dims, None, how);
        assert!(e.starts_with("conv3d: ") && !e.contains('\n'), "{e}");
    }
    assert!(run([1, 4, 4, 4, 4], Some(&b), ok).contains("bias"));
    assert!(ops::pack_filter(&[0.0; 5], [1, 1, 3, 3, 3], Precision::F32, &device).is_err());
    let mut cx = Ctx::infer(&device);
    let (a, c) = (
        activation(&mut cx, &[0.0; 16], [1, 2, 2, 2, 2], false),
        activation(&mut cx, &[0.0; 16], [1, 2, 2, 4, 1], false),
    );
    assert!(ops::conv3d(&mut cx, Sources::Two(a.into(), c.into()), &w, None, ok).is_err());
}
