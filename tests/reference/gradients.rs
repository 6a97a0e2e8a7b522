//! Every operation of the reference: its gradient against central differences, its value where no network shows it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::loss::Dice;
use super::sgd::{Sgd, clip};
use super::tape::{Array, Tape, Var, sum};
use crate::common::drive;

/// The step of the differences; they are taken once more at half of it.
const H: f64 = 1e-4;
const U: f64 = f64::EPSILON / 2.0;

/// Numbers in [-1, 1).
fn random(n: usize, seed: u64) -> Vec<f64> {
    drive::values(n, seed).into_iter().map(f64::from).collect()
}

fn array(dims: [usize; 5], seed: u64) -> Array {
    Array::new(dims, random(dims.iter().product(), seed))
}

fn per_channel(c: usize, seed: u64) -> Array {
    array([c, 1, 1, 1, 1], seed)
}

/// `sum(weights * y)`: one number that every element of `y` has its own part in.
fn dot(tape: &mut Tape, y: Var, weights: Vec<f64>) -> Var {
    let value = sum(tape.value(y).values.iter().zip(&weights).map(|(y, w)| y * w));
    tape.result(Array::new([1; 5], vec![value]), &[y], move |_, dy, gradients| {
        gradients.add(y, || weights.iter().map(|w| w * dy[0]).collect());
    })
}

/// What rounding can do to one element of a result: so many operations in a row on terms whose sizes add up to `size`.
#[derive(Clone, Copy)]
struct Work {
    operations: usize,
    size: f64,
}

/// Compares the gradients of `f` by all `inputs` with central differences. Those at H and H / 2 give an estimate whose
/// error is of the fourth order; it is allowed their difference, which is of the second, and what rounding can do.
fn check(inputs: &[Array], work: Work, f: impl Fn(&mut Tape, &[Var]) -> Var) {
    let run = |inputs: &[Array]| {
        let mut tape = Tape::default();
        let vars: Vec<Var> = inputs.iter().map(|x| tape.parameter(x.clone())).collect();
        let y = f(&mut tape, &vars);
        let weights = random(tape.value(y).values.len(), 99);
        let size: f64 = weights.iter().map(|w| w.abs()).sum();
        let loss = dot(&mut tape, y, weights);
        (tape, vars, loss, size)
    };
    let (tape, vars, loss, size) = run(inputs);
    let gradients = tape.backward(loss);
    // The outer sum is compensated: two roundings more. The estimate takes 4/3 of two values at H / 2 and 1/3 of two at
    // H.
    let rounding = 3.0 * (work.operations + 2) as f64 * U * work.size * size / H;
    let mut moved = inputs.to_vec();
    for (k, v) in vars.iter().enumerate() {
        let got = gradients.of(*v).expect("a gradient by every input");
        for i in 0..inputs[k].values.len() {
            let x = inputs[k].values[i];
            let mut slope = |h: f64| {
                let [up, down] = [x + h, x - h].map(|x| {
                    moved[k].values[i] = x;
                    let (tape, _, loss, _) = run(&moved);
                    tape.value(loss).values[0]
                });
                moved[k].values[i] = x;
                (up - down) / ((x + h) - (x - h))
            };
            let (whole, half) = (slope(H), slope(H / 2.0));
            let estimate = (4.0 * half - whole) / 3.0;
            let limit = (half - whole).abs() + rounding;
            let error = (got[i] - estimate).abs();
            assert!(error <= limit, "input {k} [{i}]: {}, differences {estimate} within {limit:e}", got[i]);
        }
    }
}

#[derive(Debug, Clone)]
struct Conv {
    x: [usize; 5],
    w: [usize; 5],
    stride: [usize; 3],
    padding: [usize; 3],
    seed: u64,
}

impl Conv {
    fn inputs(&self) -> [Array; 2] {
        [array(self.x, self.seed), array(self.w, self.seed + 1)]
    }
}

prop_compose! {
    fn conv()(
        (n, ci, co) in (1..=2_usize, 1..=2_usize, 1..=3_usize),
        space in prop::array::uniform3(1..=4_usize),
        kernel in prop::array::uniform3(1..=3_usize),
        stride in prop::array::uniform3(1..=3_usize),
        padding in prop::array::uniform3(0..=2_usize),
        seed in 0..1000_u64,
    ) -> Conv {
        let [d, h, w] = [0, 1, 2].map(|a| space[a].max(kernel[a].saturating_sub(2 * padding[a])));
        Conv { x: [n, ci, d, h, w], w: [co, ci, kernel[0], kernel[1], kernel[2]], stride, padding, seed }
    }
}

/// Every pair of an element of a convolution's input and one of its output, `[z, y, x]`, with the tap between them.
fn taps(small: [usize; 3], kernel: [usize; 3], stride: [usize; 3]) -> Vec<[[usize; 3]; 3]> {
    let all = |[d, h, w]: [usize; 3]| (0..d * h * w).map(move |i| [i / (h * w), i / w % h, i % w]);
    let pairs = all(small).flat_map(|o| all(kernel).map(move |k| (o, k)));
    pairs.map(|(o, k)| [o, k, [0, 1, 2].map(|a| o[a] * stride[a] + k[a])]).collect()
}

fn index(dims: [usize; 5], n: usize, c: usize, [z, y, x]: [usize; 3]) -> usize {
    (((n * dims[1] + c) * dims[2] + z) * dims[3] + y) * dims[4] + x
}

/// Sums of products of the same terms in any order.
fn assert_close(got: &[f64], expected: &[f64], terms: usize) {
    let limit = 2.0 * terms as f64 * U * terms as f64;
    assert!(got.iter().zip(expected).all(|(g, e)| (g - e).abs() <= limit), "{got:?}\n{expected:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn golden_train_reference_conv3d(p in conv()) {
        let terms: usize = p.w[1..].iter().product();
        check(&p.inputs(), Work { operations: terms, size: terms as f64 }, |tape, v| {
            tape.conv3d(v[0], v[1], p.stride, p.padding)
        });

        let [x, w] = p.inputs();
        let mut tape = Tape::default();
        let (vx, vw) = (tape.constant(x.clone()), tape.constant(w.clone()));
        let y = tape.conv3d(vx, vw, p.stride, p.padding);
        let y = tape.value(y);
        let mut expected = Array::zeros(y.dims);
        for [o, k, i] in taps(y.space(), w.space(), p.stride) {
            let i = [0, 1, 2].map(|a| i[a].wrapping_sub(p.padding[a]));
            if (0..3).all(|a| i[a] < x.space()[a]) {
                for (n, co, ci) in (0..x.dims[0] * w.dims[0] * w.dims[1])
                    .map(|j| (j / (w.dims[0] * w.dims[1]), j / w.dims[1] % w.dims[0], j % w.dims[1]))
                {
                    let product = w.values[index(w.dims, co, ci, k)] * x.values[index(x.dims, n, ci, i)];
                    expected.values[index(y.dims, n, co, o)] += product;
                }
            }
        }
        assert_close(&y.values, &expected.values, terms);
    }

    #[test]
    fn golden_train_reference_conv_transpose3d(p in conv()) {
        // The same filters the other way: their first axis is the input's.
        let [n, _, d, h, w] = p.x;
        let inputs = [array([n, p.w[0], d, h, w], p.seed), array(p.w, p.seed + 1)];
        let terms = p.w[0] * p.w[2] * p.w[3] * p.w[4];
        check(&inputs, Work { operations: terms, size: terms as f64 }, |tape, v| {
            tape.conv_transpose3d(v[0], v[1], p.stride)
        });

        let [x, w] = inputs;
        let mut tape = Tape::default();
        let (vx, vw) = (tape.constant(x.clone()), tape.constant(w.clone()));
        let y = tape.conv_transpose3d(vx, vw, p.stride);
        let y = tape.value(y);
        let mut expected = Array::zeros(y.dims);
        for [i, k, o] in taps(x.space(), w.space(), p.stride) {
            for (n, ci, co) in (0..x.dims[0] * w.dims[0] * w.dims[1])
                .map(|j| (j / (w.dims[0] * w.dims[1]), j / w.dims[1] % w.dims[0], j % w.dims[1]))
            {
                let product = w.values[index(w.dims, ci, co, k)] * x.values[index(x.dims, n, ci, i)];
                expected.values[index(y.dims, n, co, o)] += product;
            }
        }
        assert_close(&y.values, &expected.values, terms);
    }

    #[test]
    fn golden_train_reference_ops(
        (n, c) in (1..=2_usize, 1..=3_usize),
        space in prop::array::uniform3(1..=3_usize),
        factor in prop::array::uniform3(1..=2_usize),
        seed in 0..1000_u64,
    ) {
        let [d, h, w] = space;
        let dims = [n, c, d, h, w];
        let x = array(dims, seed);
        let other = array([n, 2, d, h, w], seed + 1);
        let one = Work { operations: 2, size: 2.0 };
        check(&[x.clone(), per_channel(c, seed + 2)], one, |tape, v| tape.bias(v[0], v[1]));
        check(&[x.clone(), array(dims, seed + 3)], one, |tape, v| tape.add(v[0], v[1]));
        check(&[x.clone(), x.clone()], one, |tape, v| {
            // A value that is used twice gets both gradients.
            let sum = tape.add(v[0], v[1]);
            tape.add(sum, v[0])
        });
        check(&[x.clone(), other], one, |tape, v| tape.concat(v[0], v[1]));
        check(std::slice::from_ref(&x), one, |tape, v| tape.upsample_nearest(v[0], factor));
        let large = array([n, c, d * factor[0], h * factor[1], w * factor[2]], seed + 4);
        check(&[large], Work { operations: 9, size: 1.0 }, |tape, v| tape.avg_pool(v[0], factor));

        // Away from the kink.
        let mut bent = x.clone();
        bent.values.iter_mut().for_each(|v| *v += 0.1_f64.copysign(*v));
        check(&[bent], one, |tape, v| tape.leaky_relu(v[0], 0.01));

        // A channel of equal voxels is divided by no less than sqrt(1e-5); sums are compensated.
        let norm = Work { operations: 16, size: 2.0 / 1e-5_f64.sqrt() };
        check(&[x, per_channel(c, seed + 5), per_channel(c, seed + 6)], norm, |tape, v| {
            tape.instance_norm(v[0], v[1], v[2])
        });
    }

    #[test]
    fn golden_train_reference_loss_gradients(
        (n, c) in (1..=2_usize, 2..=4_usize),
        space in prop::array::uniform3(1..=3_usize),
        (batch, background, ignore) in any::<(bool, bool, bool)>(),
        seed in 0..1000_u64,
    ) {
        let dims = [n, c, space[0], space[1], space[2]];
        let mut x = array(dims, seed);
        x.values.iter_mut().for_each(|v| *v *= 3.0);
        let voxels = n * space.iter().product::<usize>();
        let draw = |count: usize, of: usize| -> Vec<u8> {
            random(count, seed + 1).iter().map(|v| ((v + 1.0) / 2.0 * of as f64) as u8).collect()
        };
        let dice = Dice { batch, background, smooth: 1e-5 };
        // An exponential, a logarithm and products per channel of each voxel; logits are at most 3, and no ratio
        // exceeds 1.
        let work = Work { operations: 16 * (c + 1), size: 8.0 };
        let labels = draw(voxels, c + usize::from(ignore));
        let ignored = ignore.then_some(c as u8);
        check(std::slice::from_ref(&x), work, |tape, v| tape.dice_ce(v[0], &labels, dice, ignored));
        let nowhere = vec![c as u8; voxels];
        check(std::slice::from_ref(&x), work, |tape, v| tape.dice_ce(v[0], &nowhere, dice, Some(c as u8)));

        let mut regions = draw(voxels * (c + usize::from(ignore)), 2);
        // One valid voxel at least: without any, the sum of nothing is divided by 1e-8.
        if ignore {
            let last = regions.len() - 1;
            regions[last] = 0;
        }
        let work = Work { size: work.size * c as f64, ..work };
        check(std::slice::from_ref(&x), work, |tape, v| tape.dice_bce(v[0], &regions, dice, ignore));

        // Deep supervision: both outputs in one loss.
        check(&[x.clone(), array(dims, seed + 2)], work, |tape, v| {
            let losses = [v[0], v[1]].map(|v| tape.dice_ce(v, &labels, dice, ignored));
            tape.weighted_sum(&losses, &[2.0 / 3.0, 1.0 / 3.0])
        });
    }
}

#[test]
fn golden_train_reference_outputs_of_weight_zero_get_no_gradient() {
    let mut tape = Tape::default();
    let [a, b] = [1, 2].map(|seed| tape.parameter(array([1, 2, 1, 1, 2], seed)));
    let dice = Dice { batch: false, background: false, smooth: 1e-5 };
    let losses = [a, b].map(|v| tape.dice_ce(v, &[0, 1], dice, None));
    let loss = tape.weighted_sum(&losses, &[1.0, 0.0]);
    let gradients = tape.backward(loss);
    assert!(gradients.of(a).is_some() && gradients.of(b).is_none());
    assert_eq!(tape.value(loss), tape.value(losses[0]));
}

/// Two steps by hand, and a parameter without a gradient, which decay leaves alone too.
#[test]
fn golden_train_reference_sgd() {
    let one = |v: f64| Array::new([1; 5], vec![v]);
    for (nesterov, after) in [(true, 2.0 - 0.1 * (1.5 * 4.0) - 0.1 * (3.4 + 0.5 * 5.4)), (false, 2.0 - 0.4 - 0.1 * 5.6)]
    {
        let mut parameters = BTreeMap::from([("a".to_string(), one(2.0)), ("b".to_string(), one(7.0))]);
        let gradients = BTreeMap::from([("a".to_string(), vec![2.0])]);
        let mut sgd = Sgd::new(1.0, 0.5, nesterov);
        sgd.step(&mut parameters, &gradients, 0.1);
        // Nesterov: 2 - 0.1 (4 + 0.5 * 4) = 1.4, then g = 3.4, v = 5.4. Plain: 1.6, then g = 3.6, v = 5.6.
        sgd.step(&mut parameters, &gradients, 0.1);
        assert!((parameters["a"].values[0] - after).abs() <= 16.0 * U, "{nesterov}: {:?}", parameters["a"]);
        assert_eq!(parameters["b"], one(7.0));
    }
}

#[test]
fn golden_train_reference_clip() {
    let gradients = BTreeMap::from([("a".to_string(), vec![3.0, 0.0]), ("b".to_string(), vec![4.0])]);
    let mut small = gradients.clone();
    assert_eq!(clip(&mut small, 12.0), 5.0);
    assert_eq!(small, gradients);
    let mut large = gradients;
    assert_eq!(clip(&mut large, 2.5), 5.0);
    let scale = 2.5 / (5.0 + 1e-6);
    assert_eq!(
        large,
        BTreeMap::from([("a".to_string(), vec![3.0 * scale, 0.0]), ("b".to_string(), vec![4.0 * scale])])
    );
}
