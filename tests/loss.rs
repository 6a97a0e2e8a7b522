//! loss: every implementation against the definition in f64, value and gradient, and laws.

use proptest::prelude::*;
use safetensors::SafeTensors;
use stunet::Result;
use stunet::autograd::{Backward, Ctx, Grads, Var};
use stunet::nnunet::loss::{Criterion, deep_supervised, deep_supervision_weights, downsampled};
use stunet::ops::{self, LabelMap, Loss, Outputs, testing};
use stunet::tensor::{Device, Tensor};

use crate::common::bound::{Bounded, U, check, gamma};
use crate::common::drive::{bits, devices, soil, threaded_devices, values};
use crate::common::shared;

#[derive(Debug, Clone)]
struct Problem {
    dims: [usize; 5],
    x: Vec<f32>,
    labels: Vec<u16>,
    how: Loss,
    /// Another owner of the logits.
    keep: bool,
}

/// An operation that does nothing, so that its result has one owner while the gradient of its input can be asked for.
struct Same;

impl<'m> Backward<'m> for Same {
    fn name(&self) -> &'static str {
        "same"
    }

    fn saved<'s>(&'s self, _: &mut dyn FnMut(&'s Tensor)) {}

    fn backward(self: Box<Self>, _: &mut Ctx<'m>, _: &mut Grads, dy: Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(dy)])
    }
}

/// A variable, and a value of its own that depends on it.
fn variable(cx: &mut Ctx<'_>, x: &[f32], dims: [usize; 5]) -> (Var, Var) {
    let [a, b] = [0; 2].map(|_| Tensor::from_host(x, dims.into(), cx.device()).and_then(testing::blocked).unwrap());
    let a = cx.variable(a);
    let b = cx.record(b, &[a.node()], || Box::new(Same));
    (a, b)
}

/// Probabilities closer than this to 0 are not told from 0.
const TINY: f64 = 2e-38;

/// Relative error of an exponential, tested with it.
const EXP: f64 = 2.5e-7;

/// What a problem gives in f64, and how far f32 may be from it, to first order.
struct Expected {
    value: f64,
    error: f64,
    gradient: Vec<Bounded>,
}

impl Problem {
    /// Logits of size `scale` and labels below `labels`.
    fn new(dims: [usize; 5], scale: f32, labels: u16, how: Loss, seed: u64) -> Self {
        let x = values(dims.iter().product(), seed).into_iter().map(|v| v * scale).collect();
        let voxels = dims[0] * dims[2] * dims[3] * dims[4];
        let label = |v: f32| ((v + 1.0) * 0.5 * f32::from(labels)) as u16;
        let labels = values(voxels, seed + 1).into_iter().map(|v| label(v).min(labels - 1)).collect();
        Self { dims, x, labels, how, keep: false }
    }

    fn space(&self) -> usize {
        self.dims[2..].iter().product()
    }

    fn target(&self) -> LabelMap {
        let [n, _, d, h, w] = self.dims;
        LabelMap::new(self.labels.clone(), [n, d, h, w]).unwrap()
    }

    fn truth(&self, voxel: usize, c: usize) -> f64 {
        let label = self.labels[voxel];
        let is = match &self.how.outputs {
            Outputs::Labels => usize::from(label) == c,
            Outputs::Regions(regions) => regions[c].contains(&label),
        };
        f64::from(u8::from(is))
    }

    fn is_valid(&self, voxel: usize) -> bool {
        self.how.ignore != Some(self.labels[voxel])
    }

    /// Probabilities and their relative errors, cross-entropies and their errors, of the channels of a voxel.
    fn voxel(&self, x: &[f64], voxel: usize) -> Vec<[f64; 4]> {
        let channels = self.dims[1];
        let at = |c: usize| x[(voxel / self.space() * channels + c) * self.space() + voxel % self.space()];
        if self.how.outputs != Outputs::Labels {
            let one = |c: usize| {
                let p = 1.0 / (1.0 + (-at(c)).exp());
                let log = (-at(c).abs()).exp().ln_1p();
                // A logarithm of a ratio with the errors of an exponential, two quotients and itself.
                let entropy = at(c).max(0.0) - at(c) * self.truth(voxel, c) + log;
                [p, EXP + 4.0 * U, entropy, log * (EXP + 5e-7 + 8.0 * U) + 2.0 * U * entropy + TINY]
            };
            return (0..channels).map(one).collect();
        }
        let top = (0..channels).map(at).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = (0..channels).map(|c| (at(c) - top).exp()).sum();
        // The difference to the largest is rounded, which the exponential enlarges; sums of blocks, then of 16 lanes.
        let own = |c: usize| EXP + U * (at(c) - top).abs();
        let sum = gamma(channels.div_ceil(16) + 6);
        let all = sum + (0..channels).map(|c| (at(c) - top).exp() / total * own(c)).sum::<f64>();
        let one = |c: usize| {
            let entropy = self.truth(voxel, c) * (total.ln() + top - at(c));
            [(at(c) - top).exp() / total, own(c) + all + 3.0 * U, entropy, all + U * entropy]
        };
        (0..channels).map(one).collect()
    }

    /// The definition, of logits in f64.
    fn reference(&self, x: &[f64]) -> Expected {
        let ([n, channels, ..], how) = (self.dims, &self.how);
        let voxels = n * self.space();
        let each: Vec<Vec<[f64; 4]>> = (0..voxels).map(|v| self.voxel(x, v)).collect();
        let valid = (0..voxels).filter(|v| self.is_valid(*v)).count();
        let regions = how.outputs != Outputs::Labels;
        let mut counts: Vec<bool> = (0..voxels).map(|v| self.is_valid(v)).collect();
        let entropy = |v: usize| each[v].iter().map(|e| e[2]).sum::<f64>();
        let count = match how.top {
            Some(top) => {
                let k = ((voxels as f64 * top / 100.0) as usize).max(1);
                let mut order: Vec<usize> = (0..voxels).collect();
                let key = |v: usize| if self.is_valid(v) { entropy(v) } else { 0.0 };
                order.sort_by(|a, b| key(*b).total_cmp(&key(*a)));
                order[k..].iter().for_each(|v| counts[*v] = false);
                k
            }
            None if regions && how.ignore.is_none() => voxels * channels,
            None => valid,
        };
        let kappa = if count > 0 { how.cross_entropy / count as f64 } else { 0.0 };
        let chosen = || (0..voxels).filter(|v| counts[*v]);
        let mut value = kappa * chosen().map(entropy).sum::<f64>();
        let mut error = kappa.abs() * chosen().flat_map(|v| &each[v]).map(|e| e[3]).sum::<f64>();
        // Tiles of 32 voxels are summed in f32 where channels are regions.
        error += gamma(32) * value.abs();

        // Slopes with intersection and volume, and their errors.
        let groups = if how.batch_dice { 1 } else { n };
        let first = usize::from(!how.background);
        let weight = how.dice / (groups * (channels - first)) as f64;
        let mut slopes = vec![[0.0; 4]; groups * channels];
        for group in 0..groups {
            let own = |v: &usize| self.is_valid(*v) && (how.batch_dice || v / self.space() == group);
            for c in first..channels {
                let (mut i, mut p, mut g, mut di, mut dp) = (0.0, 0.0, 0.0, 0.0, 0.0);
                for v in (0..voxels).filter(own) {
                    let ([q, e, ..], t) = (each[v][c], self.truth(v, c));
                    (i, p, g) = (i + q * t, p + q, g + t);
                    (di, dp) = (di + (q * e + TINY) * t, dp + q * e + TINY);
                }
                (di, dp) = (di + gamma(34) * i, dp + gamma(34) * p);
                let (numerator, d) = (2.0 * i + how.smooth, (p + g + how.smooth).max(1e-8));
                let raised = p + g + how.smooth < 1e-8;
                let a = -2.0 * weight / d;
                let b = if raised { 0.0 } else { weight * numerator / (d * d) };
                slopes[group * channels + c] =
                    [a, b, a.abs() * (dp / d + U), weight.abs() * 2.0 * di / (d * d) + b.abs() * (2.0 * dp / d + U)];
                value -= weight * numerator / d;
                error += a.abs() * di + b.abs() * dp;
            }
        }

        let mut gradient = vec![Bounded { value: 0.0, error: 0.0 }; x.len()];
        for v in (0..voxels).filter(|v| self.is_valid(*v)) {
            let (sample, k) = (v / self.space(), if counts[v] { kappa } else { 0.0 });
            let slope = |c: usize| slopes[if how.batch_dice { 0 } else { sample * channels } + c];
            let q = |c: usize| slope(c)[0] * self.truth(v, c) + slope(c)[1];
            let size = |c: usize| slope(c)[0].abs() * self.truth(v, c) + slope(c)[1].abs();
            let off = |c: usize| slope(c)[2] * self.truth(v, c) + slope(c)[3];
            let (mut mean, mut mean_size, mut mean_off) = (0.0, 0.0, 0.0);
            for (c, e) in each[v].iter().enumerate().filter(|_| !regions) {
                mean += e[0] * q(c);
                mean_size += e[0] * size(c);
                mean_off += (e[0] * e[1] + TINY) * size(c) + e[0] * off(c);
            }
            mean_off += gamma(channels.div_ceil(16) + 8) * mean_size;
            for (c, e) in each[v].iter().enumerate() {
                let ([p, r, ..], t) = (*e, self.truth(v, c));
                let steep = if regions { p * (1.0 - p) } else { p };
                let dp = p * r + TINY;
                let scale = size(c) + mean_size + k.abs();
                let rounding = 8.0 * U * (steep * scale + k.abs() * p.max(t) + t * (p * slope(c)[0]).abs());
                let steep_error = if regions { steep * 3.0 * r + TINY } else { dp };
                gradient[(sample * channels + c) * self.space() + v % self.space()] = Bounded {
                    value: steep * (q(c) - mean) + k * (p - t),
                    error: 1.01 * (steep_error * scale + dp * k.abs() + steep * (off(c) + mean_off) + rounding),
                };
            }
        }
        Expected { value, error: 1.01 * error + U * value.abs(), gradient }
    }

    fn expected(&self) -> Expected {
        self.reference(&self.x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>())
    }

    /// The loss as f32 and f64, and the gradient by the logits.
    fn run(&self, device: &Device, name: Option<&str>) -> (f32, f64, Vec<f32>) {
        let mut cx = Ctx::train(device);
        let (variable, x) = variable(&mut cx, &self.x, self.dims);
        let (at, kept) = (testing::address(x.value()), self.keep.then(|| x.value().clone()));
        soil(device, self.dims);
        let (loss, value) = match name {
            None => ops::loss(&mut cx, x, &self.target(), &self.how),
            Some(name) => testing::loss(name, &mut cx, x, &self.target(), &self.how),
        }
        .unwrap();
        assert_eq!(loss.value().dims().as_slice(), [1]);
        let single = loss.value().to_host().unwrap()[0];
        let mut grads = Grads::new();
        cx.backward(loss, &mut grads).unwrap();
        let gradient = grads.variable(&variable).unwrap();
        let broken = self.x.iter().any(|v| v.is_nan());
        assert!(broken || testing::padding_is_zero(gradient), "pad lanes are not zero");
        assert_eq!(testing::address(gradient) == at, !self.keep, "in place for the last owner only");
        if let Some(kept) = kept {
            assert_eq!(bits(&kept.to_host().unwrap()), bits(&self.x), "a clone was changed");
        }
        (single, value, gradient.to_host().unwrap())
    }

    fn check(&self) {
        let expected = self.expected();
        for device in devices() {
            for name in testing::implementations(&device) {
                let what = format!("{name} {:?} {:?}", self.dims, self.how);
                let (single, value, gradient) = self.run(&device, Some(name));
                let off = (value - expected.value).abs();
                assert!(off <= expected.error, "{what}: {value}, not {} within {}", expected.value, expected.error);
                assert_eq!(single, value as f32);
                check(&what, &gradient, &expected.gradient);
            }
        }
    }
}

/// So many regions, each of every label whose number has one of its bits.
fn regions(channels: usize) -> Outputs {
    Outputs::Regions((0..channels).map(|c| (1..12).filter(|l| (l >> (c % 4)) & 1 == 1).collect()).collect())
}

prop_compose! {
    fn problem()(
        (n, channels, keep) in (1..=3_usize, prop_oneof![1..=6_usize, 14..=34_usize, Just(105_usize), Just(130)], any::<bool>()),
        space in prop_oneof![Just([1_usize; 3]), prop::array::uniform3(1..=6_usize)],
        (over, ignore, batch_dice, background, top) in any::<(bool, bool, bool, bool, bool)>(),
        weights in prop_oneof![Just([1.0, 1.0]), Just([1.0, 0.0]), Just([0.0, 1.0]), Just([0.3, 2.0])],
        smooth in prop_oneof![Just(1e-5), Just(1.0)],
        (scale, seed) in (prop_oneof![Just(0.1_f32), Just(3.0), Just(20.0)], 0..1000_u64),
    ) -> Problem {
        let (outputs, labels) = if over { (regions(channels), 12) } else { (Outputs::Labels, channels as u16) };
        let how = Loss {
            ignore: ignore.then_some(labels),
            cross_entropy: weights[0],
            dice: weights[1],
            batch_dice,
            background: background || over || channels == 1,
            // One channel has equal cross-entropies only.
            top: (top && !over && channels > 1).then_some(30.0),
            smooth,
            ..Loss::new(outputs)
        };
        let dims = [n, channels, space[0], space[1], space[2]];
        Problem { keep, ..Problem::new(dims, scale, labels + u16::from(ignore), how, seed) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_problem(p in problem()) {
        p.check();
    }
}

/// The reference itself: its gradient against differences of its value.
#[test]
fn gradient_of_the_reference_is_that_of_its_value() {
    let labels = Loss { ignore: Some(3), ..Loss::new(Outputs::Labels) };
    let problems = [
        Problem::new([2, 3, 1, 2, 3], 2.0, 4, labels.clone(), 1),
        Problem::new([2, 3, 1, 2, 3], 2.0, 4, Loss { batch_dice: true, background: true, ..labels.clone() }, 2),
        Problem::new([1, 4, 3, 3, 3], 2.0, 4, Loss { top: Some(40.0), dice: 0.5, ..labels }, 3),
        Problem::new([2, 3, 1, 2, 3], 2.0, 8, Loss::new(regions(3)), 4),
        Problem::new([2, 3, 1, 2, 3], 2.0, 8, Loss { ignore: Some(7), batch_dice: true, ..Loss::new(regions(3)) }, 5),
    ];
    for p in problems {
        let x: Vec<f64> = p.x.iter().map(|v| f64::from(*v)).collect();
        let gradient = p.reference(&x).gradient;
        for (i, g) in gradient.iter().enumerate() {
            let at = |d: f64| {
                p.reference(&x.iter().enumerate().map(|(k, v)| if k == i { v + d } else { *v }).collect::<Vec<_>>())
                    .value
            };
            let slope = (at(1e-4) - at(-1e-4)) / 2e-4;
            assert!((slope - g.value).abs() < 1e-7, "{:?} [{i}]: {slope} {}", p.how, g.value);
        }
    }
}

/// Several pieces of parallel work, of one block of channels and of several.
#[test]
fn large_problems() {
    let labels = Loss { ignore: Some(20), batch_dice: true, ..Loss::new(Outputs::Labels) };
    let p = Problem::new([2, 20, 17, 16, 18], 5.0, 21, labels, 7);
    p.check();
    Problem { keep: true, how: Loss { top: Some(10.0), ..p.how.clone() }, ..p }.check();
    Problem::new([2, 3, 17, 16, 18], 5.0, 12, Loss::new(regions(3)), 8).check();
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let labels = Loss { ignore: Some(20), ..Loss::new(Outputs::Labels) };
    let problems = [
        Problem::new([2, 20, 17, 16, 18], 5.0, 21, labels.clone(), 7),
        Problem::new([2, 20, 17, 16, 18], 5.0, 21, Loss { top: Some(10.0), ..labels }, 7),
        Problem::new([3, 3, 17, 16, 18], 5.0, 12, Loss::new(regions(3)), 8),
    ];
    for p in problems {
        for devices in threaded_devices() {
            let all = devices.map(|d| p.run(&d, None)).map(|(_, value, gradient)| (value.to_bits(), bits(&gradient)));
            assert!(all[0] == all[1] && all[0] == all[2]);
        }
    }
}

/// Probabilities of 0 and 1 to the last bit: the loss is large, everything is finite and as the definition says.
#[test]
fn extreme_logits() {
    for (channels, outputs) in [(3, Outputs::Labels), (19, Outputs::Labels), (3, regions(3)), (19, regions(19))] {
        for size in [80.0, 1e4] {
            let how = Loss { batch_dice: true, ..Loss::new(outputs.clone()) };
            let mut p = Problem::new([2, channels, 2, 3, 4], 1.0, 3, how, 3);
            p.x.iter_mut().for_each(|v| *v = if *v > 0.0 { size } else { -size });
            p.check();
            p.x.iter_mut().for_each(|v| *v = -size);
            p.check();
            let (single, _, gradient) = p.run(&Device::cpu(), None);
            assert!(single.is_finite() && gradient.iter().all(|g| g.is_finite()));
        }
    }
}

/// Nothing to learn from: no cross-entropy, perfect Dice, no gradient.
#[test]
fn all_voxels_ignored() {
    for (outputs, background) in [(Outputs::Labels, false), (regions(4), true)] {
        for batch_dice in [false, true] {
            let how = Loss { ignore: Some(4), batch_dice, background, ..Loss::new(outputs.clone()) };
            let mut p = Problem::new([2, 4, 2, 3, 4], 3.0, 4, how, 5);
            p.labels.fill(4);
            p.check();
            let (single, _, gradient) = p.run(&Device::cpu(), None);
            assert_eq!((single, gradient.iter().all(|g| *g == 0.0)), (-1.0, true));
        }
    }
}

/// Classes without a voxel, with and without smoothing.
#[test]
fn absent_classes() {
    for smooth in [0.0, 1e-5] {
        for batch_dice in [false, true] {
            let how = Loss { smooth, batch_dice, ..Loss::new(Outputs::Labels) };
            let mut p = Problem::new([2, 18, 2, 3, 4], 3.0, 18, how, 5);
            p.labels.iter_mut().for_each(|l| *l %= 2);
            p.check();
        }
    }
}

/// Of equal cross-entropies the first ones count.
#[test]
fn ties_among_the_largest() {
    let how = Loss { top: Some(50.0), dice: 0.0, ..Loss::new(Outputs::Labels) };
    let p = Problem { x: vec![0.5; 2 * 8], labels: vec![1; 8], ..Problem::new([1, 2, 2, 2, 2], 1.0, 2, how, 1) };
    for device in devices() {
        let (single, _, gradient) = p.run(&device, None);
        assert!((single - 2.0f32.ln()).abs() < 1e-6);
        assert_eq!(gradient[..8], [0.125, 0.125, 0.125, 0.125, 0.0, 0.0, 0.0, 0.0]);
    }
}

/// A broken network must show.
#[test]
fn nan_stays_nan() {
    for device in devices() {
        for outputs in [Outputs::Labels, regions(3)] {
            for at in [0, 17, 71] {
                let mut p = Problem::new([1, 3, 2, 3, 4], 1.0, 3, Loss::new(outputs.clone()), 1);
                p.x[at] = f32::NAN;
                let (single, value, gradient) = p.run(&device, None);
                assert!(single.is_nan() && value.is_nan() && gradient.iter().any(|g| g.is_nan()));
            }
        }
    }
}

#[test]
fn misfits_are_errors() {
    let device = Device::cpu();
    let error = |labels: &[u16], how: &Loss| {
        let mut cx = Ctx::infer(&device);
        let x = cx.leaf(Tensor::from_host(&[0.0; 16], [1, 2, 2, 2, 2].into(), &device).unwrap());
        let target = LabelMap::new(labels, [1, 2, 2, labels.len() / 4]).unwrap();
        ops::loss(&mut cx, x, &target, how).unwrap_err().to_string()
    };
    let labels = Loss::new(Outputs::Labels);
    assert_eq!(error(&[0, 1, 0, 1, 2, 0, 0, 0], &labels), "loss: label 2 for 2 channels");
    assert!(error(&[0; 12], &labels).starts_with("loss: labels of [1, 2, 2, 3]"));
    let wrong = [
        Loss::new(regions(3)),
        Loss { top: Some(10.0), ..Loss::new(regions(2)) },
        Loss { top: Some(0.0), ..labels.clone() },
        Loss { dice: f64::NAN, ..labels.clone() },
        Loss { smooth: -1.0, ..labels.clone() },
    ];
    for how in wrong {
        assert!(error(&[0; 8], &how).starts_with("loss: "), "{how:?}");
    }
    assert!(LabelMap::new(vec![0; 8], [1, 2, 2, 3]).is_err());
}

#[test]
fn weighted_sum_of_scalars() {
    let device = Device::cpu();
    let mut cx = Ctx::train(&device);
    let mut scalar = |v: f32| cx.variable(Tensor::from_host(&[v], [1].into(), &device).unwrap());
    let [a, b, c] = [1.5, -2.0, f32::NAN].map(&mut scalar);
    let terms = vec![(a.clone(), 0.5), (b.clone(), 0.25), (c.clone(), 0.0)];
    let sum = ops::weighted_sum(&mut cx, terms).unwrap();
    assert_eq!(sum.value().to_host().unwrap(), [0.25]);
    let mut grads = Grads::new();
    cx.backward(sum, &mut grads).unwrap();
    let of = |x: &Var| grads.variable(x).map(|g| g.to_host().unwrap());
    assert_eq!([of(&a), of(&b), of(&c)], [Some(vec![0.5]), Some(vec![0.25]), None]);
    assert!(ops::weighted_sum(&mut Ctx::train(&device), vec![(c, 0.0)]).is_err());
}

#[test]
fn deep_supervision_counts_all_outputs_but_the_last() {
    assert_eq!(deep_supervision_weights(1), [1.0]);
    assert_eq!(deep_supervision_weights(2), [1.0, 0.0]);
    assert_eq!(deep_supervision_weights(4), [4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0]);
    let device = Device::cpu();
    let how = Criterion::DiceCe.loss(Outputs::Labels, None, true).unwrap();
    let spaces = [[4, 8, 6], [4, 4, 3], [2, 2, 1]];
    let whole = Problem::new([2, 3, 4, 8, 6], 2.0, 3, how.clone(), 1);
    let each = spaces.map(|[d, h, w]| {
        let labels = downsampled(&whole.target(), [d, h, w]).unwrap().labels().to_vec();
        Problem { labels, ..Problem::new([2, 3, d, h, w], 2.0, 3, how.clone(), d as u64 * 7 + h as u64) }
    });
    let mut cx = Ctx::train(&device);
    let (variables, outputs): (Vec<Var>, Vec<Var>) = each.iter().map(|p| variable(&mut cx, &p.x, p.dims)).unzip();
    let (loss, value) = deep_supervised(&mut cx, outputs, &whole.target(), &how).unwrap();
    let single = loss.value().to_host().unwrap()[0];
    let mut grads = Grads::new();
    cx.backward(loss, &mut grads).unwrap();
    let mut total = 0.0;
    for (p, (weight, x)) in each.iter().zip([2.0 / 3.0, 1.0 / 3.0].into_iter().zip(&variables)) {
        let expected = p.expected();
        total += weight * expected.value;
        let scaled =
            |b: &Bounded| Bounded { value: weight * b.value, error: weight * b.error + 3.0 * U * b.value.abs() };
        let expected: Vec<Bounded> = expected.gradient.iter().map(scaled).collect();
        check("deep supervision", &grads.variable(x).unwrap().to_host().unwrap(), &expected);
    }
    assert!(grads.variable(&variables[2]).is_none(), "an output of weight 0 has a gradient");
    assert!((value - total).abs() < 1e-6 && (f64::from(single) - total).abs() < 1e-6);
}

#[test]
fn labels_of_the_nearest_centres() {
    let map = |labels: Vec<u16>, dims| LabelMap::new(labels, dims).unwrap();
    let row = map((0..12).collect(), [1, 1, 1, 12]);
    let at = |n| downsampled(&row, [1, 1, n]).unwrap().labels().to_vec();
    assert_eq!(at(6), [1, 3, 5, 7, 9, 11]);
    assert_eq!(at(4), [1, 4, 7, 10]);
    assert_eq!(at(5), [1, 3, 6, 8, 10]);
    assert_eq!(at(1), [6]);
    let cube = map((0..2 * 4 * 4 * 2).collect(), [2, 4, 4, 2]);
    assert_eq!(downsampled(&cube, [2, 2, 2]).unwrap().labels()[..4], [10, 11, 14, 15]);
    assert!(downsampled(&cube, [0, 2, 2]).is_err());
}

#[test]
fn criteria_for_labels_refuse_regions() {
    for criterion in [Criterion::Ce, Criterion::TopK10, Criterion::DiceTopK10] {
        assert!(criterion.loss(regions(2), None, true).is_err());
        assert!(criterion.loss(Outputs::Labels, Some(3), true).is_ok());
    }
    let how = Criterion::Dice.loss(regions(2), None, true).unwrap();
    assert!(how.background && how.cross_entropy == 0.0);
}

/// PyTorch in f64, and nnU-Net's own code, which agrees with it to 2e-6.
#[test]
fn golden_train_losses() {
    let Some(root) = shared("golden/train") else { return };
    let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(root.join("losses.json")).unwrap()).unwrap();
    let bytes = std::fs::read(root.join("losses.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: String| -> (Vec<usize>, Vec<f32>) {
        let t = file.tensor(&name).unwrap();
        let values = t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (t.shape().to_vec(), values)
    };
    let (mut worst, mut steepest) = (0.0f64, 0.0f64);
    for (k, case) in meta.as_array().unwrap().iter().enumerate() {
        let (shape, x) = floats(format!("{k}/logits"));
        let dims: [usize; 5] = shape.try_into().unwrap();
        let [n, channels, d, h, w] = dims;
        let space = d * h * w;
        let raw = file.tensor(&format!("{k}/target")).unwrap().data();
        let planes = raw.len() / (n * space);
        let over = case["regions"].as_bool().unwrap();
        // A label for every set of regions, and one that is ignored.
        let sets = 1u16 << channels;
        let label = |v: usize| {
            let at = |plane: usize| u16::from(raw[(v / space * planes + plane) * space + v % space]);
            match over {
                false => at(0),
                true if planes > channels && at(channels) == 1 => sets,
                true => (0..channels).map(|c| at(c) << c).sum(),
            }
        };
        let region = |c: usize| (0..sets).filter(|l| (l >> c) & 1 == 1).collect();
        let outputs = if over { Outputs::Regions((0..channels).map(region).collect()) } else { Outputs::Labels };
        let ignore = match case["ignore_channel"].as_bool().unwrap() {
            true => Some(sets),
            false => case["ignore_label"].as_u64().map(|l| l as u16),
        };
        let how = Criterion::DiceCe.loss(outputs, ignore, case["batch_dice"].as_bool().unwrap()).unwrap();
        let p = Problem { dims, x, labels: (0..n * space).map(label).collect(), how, keep: false };
        let (loss, gradient) = (case["loss"].as_f64().unwrap(), floats(format!("{k}/grad")).1);
        for device in devices() {
            let (_, value, ours) = p.run(&device, None);
            let off = (value - loss).abs() / loss.abs();
            let norm = |d: &dyn Fn(usize) -> f64| (0..ours.len()).map(|i| d(i).powi(2)).sum::<f64>().sqrt();
            let far = norm(&|i| f64::from(ours[i]) - f64::from(gradient[i])) / norm(&|i| f64::from(gradient[i]));
            assert!(
                off <= 1e-6 && far <= 1e-5,
                "case {k} on {}: loss off by {off:e}, gradient by {far:e}",
                device.name()
            );
            (worst, steepest) = (worst.max(off), steepest.max(far));
        }
    }
    eprintln!("losses differ by {worst:.1e} at most, gradients by {steepest:.1e}");
}
