//! optim: steps of optimizers against PyTorch, bit by bit, and their laws.

use proptest::prelude::*;
use stunet::autograd::{Grads, Param};
use stunet::nn::{self, Optimizer, PolyLr, Rule};
use stunet::ops::testing;
use stunet::{Device, Error, Isa, Precision};

use crate::common::drive::{bits, devices, threaded_devices, values};

const ADAM: Rule = Rule::Adam { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.1, decoupled: false };
const ADAMW: Rule = Rule::Adam { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.1, decoupled: true };
const PLAIN: Rule = Rule::Sgd { momentum: 0.5, weight_decay: 0.1, nesterov: false };

fn grads(of: &[(&Param, &[f32])]) -> Grads {
    let mut grads = Grads::new();
    for (p, g) in of {
        grads.add_param(p.id(), nn::pack(p, g, Precision::F32).unwrap()).unwrap();
    }
    grads
}

/// Four steps of torch.optim of PyTorch 2.15 on the processor, without clipping, from `p[i] = (37 i mod 101) / 64 - 0.75`
/// with `g[i] = ((53 i + 29 step) mod 97) / 32 - 1.5`.
const TORCH: [(Rule, f64, [u32; 20]); 4] = [
    (
        Rule::NNUNET,
        1e-2,
        [
            0xbf2fc660, 0xbe3f36b5, 0x3edc92db, 0xbf25bd73, 0x3cf95cf6, 0x3f16e62e, 0xbedc49be, 0x3e03d99e, 0x3f2feaed,
            0xbea9f2be, 0x3ea20edd, 0xbf24e109, 0xbe13a15f, 0x3f08a004, 0xbf1ad81e, 0x3d9581e6, 0x3f21cb83, 0xbec67f13,
            0x3e2f6ef3, 0x3f3ad043,
        ],
    ),
    (
        PLAIN,
        0.3,
        [
            0xbd6ed8da, 0xbe7166b8, 0x3ece4b79, 0xbf89c340, 0x3ef18b6c, 0x3f65351c, 0xbebcce38, 0x3d608490, 0x3dbd6168,
            0xbf492489, 0x3f16b6a7, 0xbd985057, 0xbe80ec57, 0x3fa5eb05, 0xbf8bd17f, 0x3ee95271, 0x3f61189e, 0xbec50732,
            0x3d1ebccf, 0x3d9c7d7a,
        ],
    ),
    (
        ADAM,
        1e-2,
        [
            0xbf39548f, 0xbe41c8bb, 0x3ed92a64, 0xbf1e1894, 0x3b9a0dc1, 0x3f0fb211, 0xbed9d95e, 0x3e072a98, 0x3f36fc48,
            0xbe9845a0, 0x3e9c7d3b, 0xbf2d7cc9, 0xbe12d972, 0x3ef530aa, 0xbf12504b, 0x3d4eac6b, 0x3f1b6ccc, 0xbec2935f,
            0x3e35fa17, 0x3f42adf7,
        ],
    ),
    (
        ADAMW,
        1e-2,
        [
            0xbf38e7b6, 0xbe4192af, 0x3ed8d266, 0xbf1dd65a, 0x3b9a2d36, 0x3f0f87a0, 0xbed9d7e4, 0x3e071030, 0x3f36ebed,
            0xbe981d87, 0x3e9c5be4, 0xbf2d19c2, 0xbe12af02, 0x3ef4c4d2, 0xbf120fa6, 0x3d4e871c, 0x3f1b4217, 0xbec296f8,
            0x3e35d668, 0x3f429277,
        ],
    ),
];

/// On sets with fused multiply-adds, which PyTorch's kernels use. Adam's square roots are there those of a library that rounds
/// the last bit otherwise now and then, which moves a value below 1 by at most one unit in the last place in each step.
#[test]
fn four_steps_are_pytorchs() {
    for device in devices().into_iter().filter(|d| d.isa() != Isa::Scalar) {
        for (rule, lr, expected) in TORCH {
            let start: Vec<f32> = (0..20).map(|i| (i * 37 % 101) as f32 / 64.0 - 0.75).collect();
            let mut p = testing::vector(&start, &device).unwrap();
            let mut optimizer = Optimizer::new(rule, None).unwrap();
            for step in 0..4 {
                let g: Vec<f32> = (0..20).map(|i| ((i * 53 + step * 29) % 97) as f32 / 32.0 - 1.5).collect();
                let mut grads = grads(&[(&p, &g)]);
                optimizer.step(vec![&mut p], &mut grads, lr).unwrap();
                assert!(grads.param(&p).is_none(), "a gradient is used up");
            }
            let found = nn::values(&p).unwrap();
            if matches!(rule, Rule::Sgd { .. }) {
                assert_eq!(bits(&found), expected, "{rule:?} on {:?}", device.isa());
                continue;
            }
            for (a, b) in found.iter().zip(expected.map(f32::from_bits)) {
                assert!((a - b).abs() <= 4.0 * f32::EPSILON / 2.0, "{a} is not {b}: {rule:?} on {:?}", device.isa());
            }
        }
    }
}

/// A step in the order and with the roundings of torch.optim, one value at a time.
struct Reference {
    fused: bool,
    kept: [Vec<f32>; 2],
    steps: i32,
}

impl Reference {
    fn fma(&self, a: f32, b: f32, c: f32) -> f32 {
        if self.fused { a.mul_add(b, c) } else { a * b + c }
    }

    fn step(&mut self, rule: Rule, p: &mut [f32], g: &[f32], scale: f32, lr: f64) {
        self.steps += 1;
        for i in 0..p.len() {
            let g = g[i] * scale;
            match rule {
                Rule::Sgd { momentum, weight_decay, nesterov } => {
                    let (mu, wd) = (momentum as f32, weight_decay as f32);
                    let mut d = if wd == 0.0 { g } else { self.fma(p[i], wd, g) };
                    if mu != 0.0 {
                        let b = if self.steps == 1 { d } else { self.kept[0][i] * mu + d };
                        self.kept[0][i] = b;
                        d = if nesterov { self.fma(b, mu, d) } else { b };
                    }
                    p[i] = self.fma(d, -(lr as f32), p[i]);
                }
                Rule::Adam { betas: [b1, b2], eps, weight_decay, decoupled } => {
                    if decoupled {
                        p[i] *= (1.0 - lr * weight_decay) as f32;
                    }
                    let wd = if decoupled { 0.0 } else { weight_decay as f32 };
                    let d = if wd == 0.0 { g } else { self.fma(p[i], wd, g) };
                    let m = self.kept[0][i];
                    let m = self.fma((1.0 - b1) as f32, d - m, m);
                    let q = self.fma((1.0 - b2) as f32 * d, d, self.kept[1][i] * b2 as f32);
                    self.kept[0][i] = m;
                    self.kept[1][i] = q;
                    let (c1, c2) = (1.0 - b1.powi(self.steps), 1.0 - b2.powi(self.steps));
                    p[i] += -((lr / c1) as f32) * m / (q.sqrt() / c2.sqrt() as f32 + eps as f32);
                }
            }
        }
    }
}

fn rules() -> impl Strategy<Value = Rule> {
    let decay = prop::sample::select(vec![0.0, 3e-5, 0.1]);
    let sgd = (prop::sample::select(vec![0.0, 0.9, 0.99]), decay.clone(), any::<bool>())
        .prop_map(|(m, wd, n)| Rule::Sgd { momentum: m, weight_decay: wd, nesterov: n && m > 0.0 });
    let adam = (decay, any::<bool>()).prop_map(|(wd, decoupled)| Rule::Adam {
        betas: [0.9, 0.999],
        eps: 1e-8,
        weight_decay: wd,
        decoupled,
    });
    prop_oneof![sgd, adam]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Every implementation against the definition, bit by bit: filters, transposed filters and vectors of all sizes.
    #[test]
    fn steps_are_exact(rule in rules(), o in 1..=40_usize, i in 1..=9_usize, seed in 0..1000_u64,
                       clip in prop::sample::select(vec![None, Some(0.5), Some(1e9)])) {
        for device in devices() {
            for name in testing::optim_implementations(&device) {
                let n = o * i * 27;
                let v = values(n + 8 * o * i + o, seed);
                let mut all = [
                    testing::filter(&v[..n], [o, i, 3, 3, 3], &device).unwrap(),
                    testing::transposed_filter(&v[n..n + 8 * o * i], [i, o, 2, 2, 2], &device).unwrap(),
                    testing::vector(&v[n + 8 * o * i..], &device).unwrap(),
                ];
                // The names of the first two are the same.
                let mut optimizers = [0, 1, 2].map(|_| Optimizer::new(rule, clip).unwrap());
                for (at, p) in all.iter_mut().enumerate() {
                    let mut expected = nn::values(p).unwrap();
                    let none = || vec![0.0; expected.len()];
                    let mut reference = Reference { fused: name != "scalar", kept: [none(), none()], steps: 0 };
                    for step in 0..3 {
                        let g = values(expected.len(), seed + 10 + step);
                        let mut grads = grads(&[(p, &g)]);
                        let norms = optimizers[at].step_by(vec![p], &mut grads, 0.02, Some(name)).unwrap();
                        let truth = g.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                        // Both sums are of at most 2^15 exact squares.
                        prop_assert!((norms.gradient / truth - 1.0).abs() <= 2f64.powi(15 - 53));
                        let coefficient = clip.map_or(1.0, |c| (c / (norms.gradient + 1e-6)).min(1.0));
                        prop_assert_eq!(norms.scale, coefficient);
                        reference.step(rule, &mut expected, &g, coefficient as f32, 0.02);
                        prop_assert_eq!(bits(&nn::values(p).unwrap()), bits(&expected), "{} {:?}", name, rule);
                    }
                    let memory = testing::memory_of(p);
                    nn::set_values(p, &expected).unwrap();
                    prop_assert_eq!(memory, testing::memory_of(p), "pad lanes are zero");
                }
            }
        }
    }
}

/// PyTorch: gradients of norm 33.604244 clipped to 12.
#[test]
fn gradients_are_clipped_by_the_norm_of_all() {
    let device = Device::cpu();
    let v = |f: f32, s: i32| (0..20).map(|i| f * (((i * 53 + s * 29) % 97) as f32 / 32.0 - 1.5)).collect::<Vec<f32>>();
    let (g, h) = (v(7.0, 1), v(5.0, 2));
    let mut p = testing::vector(&[0.0; 20], &device).unwrap();
    let mut q = testing::filter(&[0.0; 20], [20, 1, 1, 1, 1], &device).unwrap();
    let rule = Rule::Sgd { momentum: 0.0, weight_decay: 0.0, nesterov: false };
    let mut optimizer = Optimizer::new(rule, Some(12.0)).unwrap();
    let mut grads = grads(&[(&p, &g), (&q, &h)]);
    let norms = optimizer.step(vec![&mut p, &mut q], &mut grads, 1.0).unwrap();
    assert_eq!(norms.gradient as f32, 33.604_244);
    assert!((norms.scale * norms.gradient - 12.0).abs() < 1e-5);
    // PyTorch's norm is rounded to f32 twice, its coefficient three times.
    let (clipped, torch) = (-nn::values(&p).unwrap()[0], -1.484_187_5_f32);
    assert!((clipped / torch - 1.0).abs() <= 4.0 * f32::EPSILON, "{clipped}");
}

#[test]
fn without_a_gradient_nothing_happens_and_with_a_zero_one_weights_decay() {
    let device = Device::cpu();
    let mut p = testing::vector(&[1.0; 5], &device).unwrap();
    let mut q = testing::filter(&[1.0; 6], [2, 3, 1, 1, 1], &device).unwrap();
    let mut optimizer = Optimizer::new(PLAIN, Some(12.0)).unwrap();
    let mut grads = grads(&[(&p, &[0.0; 5])]);
    let norms = optimizer.step(vec![&mut p, &mut q], &mut grads, 0.5).unwrap();
    assert_eq!((norms.gradient, norms.scale), (0.0, 1.0));
    assert_eq!(nn::values(&p).unwrap(), [0.95; 5]);
    assert_eq!(nn::values(&q).unwrap(), [1.0; 6]);
    assert!(optimizer.kept(&q).is_none());
    assert_eq!(optimizer.kept(&p).unwrap().unwrap(), (1, vec![vec![0.1; 5]]));
    // Nothing at all.
    let norms = optimizer.step(vec![&mut p, &mut q], &mut Grads::new(), 0.5).unwrap();
    assert_eq!((norms.gradient, optimizer.steps(&p)), (0.0, 1));
}

#[test]
fn a_gradient_that_is_no_number_is_named_and_nothing_changes() {
    let device = Device::cpu();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut p = testing::vector(&[1.0; 5], &device).unwrap();
        let mut q = testing::filter(&[1.0; 6], [2, 3, 1, 1, 1], &device).unwrap();
        let mut optimizer = Optimizer::nnunet();
        let mut grads = grads(&[(&p, &[2.0; 5]), (&q, &[1.0, 1.0, bad, 1.0, 1.0, 1.0])]);
        let e = optimizer.step(vec![&mut p, &mut q], &mut grads, 0.5).unwrap_err();
        assert!(matches!(&e, Error::NotFinite { .. }) && e.to_string() == "the gradient of filter: not finite", "{e}");
        assert_eq!((nn::values(&p).unwrap(), optimizer.steps(&p)), (vec![1.0; 5], 0));
        assert!(grads.param(&p).is_some());
    }
}

#[test]
fn equal_for_any_number_of_threads_and_after_a_round_trip() {
    let (n, m) = (70 * 40 * 27, 70);
    for row in threaded_devices() {
        for rule in [Rule::NNUNET, ADAMW] {
            let run = |device: &Device, resume: bool| {
                let mut p = testing::filter(&values(n, 1), [70, 40, 3, 3, 3], device).unwrap();
                let mut q = testing::vector(&values(m, 2), device).unwrap();
                let mut optimizer = Optimizer::new(rule, Some(12.0)).unwrap();
                for step in 0..4 {
                    if resume && step == 2 {
                        let mut other = Optimizer::new(rule, Some(12.0)).unwrap();
                        for p in [&p, &q] {
                            let (steps, kept) = optimizer.kept(p).unwrap().unwrap();
                            let kept: Vec<&[f32]> = kept.iter().map(|k| &k[..]).collect();
                            other.set_kept(p, steps, &kept).unwrap();
                        }
                        optimizer = other;
                    }
                    let mut grads = grads(&[(&p, &values(n, 10 + step)), (&q, &values(m, 20 + step))]);
                    optimizer.step(vec![&mut p, &mut q], &mut grads, 0.01).unwrap();
                }
                [bits(&nn::values(&p).unwrap()), bits(&nn::values(&q).unwrap())]
            };
            let first = run(&row[0], false);
            assert!(row.iter().all(|d| run(d, false) == first));
            assert!(run(&row[0], true) == first);
        }
    }
}

/// nnU-Net's PolyLRScheduler(optimizer, 0.01, 1000).
#[test]
fn learning_rates_of_nnunet() {
    let lr = PolyLr::NNUNET;
    let expected = [(0, 0.01), (1, 0.009990999549834914), (500, 0.005358867312681466), (999, 1.995262314968881e-05)];
    for (epoch, rate) in expected {
        assert!((lr.at(epoch) / rate - 1.0).abs() < 1e-13, "{epoch}: {}", lr.at(epoch));
    }
    assert_eq!((lr.at(1000), lr.at(2000)), (0.0, 0.0));
}

#[test]
fn bad_arguments_are_errors() {
    let sgd = |momentum, weight_decay, nesterov| Rule::Sgd { momentum, weight_decay, nesterov };
    for rule in [sgd(1.0, 0.0, false), sgd(0.9, -1.0, false), sgd(0.0, 0.0, true), sgd(f64::NAN, 0.0, false)] {
        assert!(Optimizer::new(rule, None).is_err(), "{rule:?}");
    }
    // Nothing as f32: a gradient of zero would be divided by it.
    let adam = Rule::Adam { betas: [0.9, 0.999], eps: 1e-50, weight_decay: 0.0, decoupled: false };
    assert!(Optimizer::new(adam, None).is_err());
    assert!(Optimizer::new(Rule::NNUNET, Some(0.0)).is_err());
    let device = Device::cpu();
    let mut p = testing::vector(&[1.0; 5], &device).unwrap();
    let mut q = testing::vector(&[1.0; 5], &device).unwrap();
    let mut optimizer = Optimizer::nnunet();
    for lr in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(optimizer.step(vec![&mut p], &mut Grads::new(), lr).is_err());
    }
    let mut both = grads(&[(&p, &[1.0; 5]), (&q, &[1.0; 5])]);
    let e = optimizer.step(vec![&mut p, &mut q], &mut both, 0.1).unwrap_err().to_string();
    assert!(e.contains("two parameters of the name vector"), "{e}");
    let mut half = testing::stored_filter(&[1.0; 6], [2, 3, 1, 1, 1], Precision::Bf16, &device).unwrap();
    let mut g = grads(&[(&half, &[1.0; 6])]);
    let e = optimizer.step(vec![&mut half], &mut g, 0.1).unwrap_err().to_string();
    assert!(e.contains("bf16"), "{e}");
}
