//! A course of training against the f64 reference at the course's own parameters, with the kinks that it crossed.
//!
//! Four steps cannot be held against one truth: a voxel that rounding puts on the other side of leaky ReLU's kink sends
//! the course another way, PyTorch's no less than ours. What can be held is each step: outputs, loss and gradients from
//! the parameters that it began with, against the reference from the very same parameters, with voxels within rounding
//! of a kink on the side that the course took. And the end: where the reference's own descent along these gradients goes.

use std::collections::BTreeMap;

use super::{Training, norm};
use crate::common::golden_train::GoldenTrain;
use crate::reference::golden::{Forward, array};
use crate::reference::kinks::{ByName, Explained, Run, Turned};
use crate::reference::sgd::{Sgd, clip};
use crate::reference::tape::Array;

type Parameters = BTreeMap<String, Array>;

/// How many times PyTorch's error one error may be, and the median of them.
const WORST: f64 = 3.0;
const MEDIAN: f64 = 2.0;
/// The same for gradients of later steps and for updates of a course that crossed a kink, for which PyTorch's errors are not stored and are taken to be the first step's,
/// and of other instruction sets than the best, which add in other orders. A bias's gradient is a sum that cancels, each
/// time to another size, so that its relative error is another draw: the quotient of two draws reaches further.
const WORST_DRAWN: f64 = 2.0 * WORST;
/// What every loss may be off by, of itself.
const LOSS: f64 = 1e-5;

/// Norm of the difference over `size`.
fn distance(got: &[f32], truth: &[f64], size: f64) -> f64 {
    assert_eq!(got.len(), truth.len());
    norm(got.iter().zip(truth).map(|(g, t)| f64::from(*g) - t)) / size
}

fn size(v: &[f64]) -> f64 {
    norm(v.iter().copied())
}

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|v| f64::from(*v)).collect()
}

/// Errors as multiples of PyTorch's own.
struct Errors(Vec<(f64, String)>);

impl Errors {
    fn median(&self) -> f64 {
        let mut v: Vec<f64> = self.0.iter().map(|e| e.0).collect();
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    }

    fn worst(&self) -> f64 {
        self.0.iter().map(|e| e.0).fold(0.0, f64::max)
    }

    fn judge(&self, what: &str, worst: f64) {
        assert!(self.median() <= MEDIAN, "{what}: median {} times PyTorch's error", self.median());
        for (error, name) in &self.0 {
            // NaN is not less than anything and fails.
            assert!(*error <= worst, "{what}: {name}: {error} times PyTorch's error");
        }
    }
}

/// The reference's descent.
struct Descent {
    parameters: Parameters,
    sgd: Sgd,
}

impl Descent {
    fn new(case: &GoldenTrain) -> Self {
        let s = &case.settings;
        let parameters = case.before.iter().map(|(n, a)| (n.clone(), array(a))).collect();
        Self { parameters, sgd: Sgd::new(s.weight_decay, s.momentum, s.nesterov) }
    }

    fn step(&mut self, case: &GoldenTrain, step: usize, mut gradients: ByName) {
        clip(&mut gradients, case.settings.clip);
        self.sgd.step(&mut self.parameters, &gradients, case.steps[step].lr);
    }
}

/// PyTorch's smallest error of an output, and twice its largest. Gradients are functions of the outputs: one that is nearer
/// to the truth than any of them is so by luck. And they are computed by a pass there and one back: one that is farther
/// crossed a kink.
fn range(case: &GoldenTrain) -> [f64; 2] {
    let outputs = || case.torch.outputs.iter().copied();
    [outputs().fold(f64::INFINITY, f64::min), 2.0 * outputs().fold(0.0, f64::max)]
}

/// PyTorch's error of a gradient within [`range`].
fn own_error(case: &GoldenTrain, name: &str) -> f64 {
    let [least, most] = range(case);
    case.torch.gradients[name].clamp(least, most)
}

/// Where the true gradient is zero, before an instance norm, PyTorch's is rounding: how large that may be as a part of the
/// largest gradient.
fn zero_error(case: &GoldenTrain) -> f64 {
    case.torch.gradient_to_largest.min(range(case)[1])
}

/// Beside the largest.
fn is_zero(size: f64, largest: f64) -> bool {
    size <= 1e-9 * largest
}

/// Whether all inputs of leaky ReLUs have the same signs in both.
fn same_sides(a: &Forward, b: &Forward) -> bool {
    let inputs = a.pass.kinks.iter().zip(&b.pass.kinks);
    let mut values = inputs.flat_map(|(x, y)| a.tape.value(x.x).values.iter().zip(&b.tape.value(y.x).values));
    values.all(|(x, y)| (*x > 0.0) == (*y > 0.0))
}

/// Outputs of a step beside the reference's; returns the largest relative error.
fn outputs(case: &GoldenTrain, what: &str, forward: &Forward, ours: &[Vec<f32>]) -> f64 {
    assert_eq!(forward.pass.outputs.len(), ours.len());
    let truth = forward.pass.outputs.iter().map(|y| &forward.tape.value(*y).values);
    let errors: Vec<f64> = ours.iter().zip(truth).map(|(y, t)| distance(y, t, size(t))).collect();
    let ratios = errors.iter().zip(&case.torch.outputs).enumerate().map(|(i, (e, own))| (e / own, i.to_string()));
    Errors(ratios.collect()).judge(&format!("{what}: outputs"), WORST);
    errors.into_iter().fold(0.0, f64::max)
}

/// Gradients of a step beside the reference's, with voxels turned where need be.
fn gradients(
    case: &GoldenTrain,
    worst: f64,
    what: &str,
    forward: &mut Forward,
    got: &BTreeMap<String, Vec<f32>>,
    spread: f64,
) -> Explained {
    let all = forward.tape.backward(forward.loss);
    let plain = forward.by_parameter(&all);
    assert!(plain.keys().eq(got.keys()), "{what}: which parameters have a gradient");
    let largest = plain.values().map(|g| size(g)).fold(0.0, f64::max);
    let mut own = BTreeMap::new();
    for (name, g) in &plain {
        if is_zero(size(g), largest) {
            let got = size(&wide(&got[name])) / largest;
            assert!(got <= zero_error(case), "{what}: {name}: {got:e} of the largest gradient for zero");
        } else {
            own.insert(name.clone(), own_error(case, name) * size(g));
        }
    }
    let errors =
        |truth: &ByName| Errors(own.iter().map(|(n, own)| (distance(&got[n], &truth[n], *own), n.clone())).collect());
    let run = Run {
        gradients: &got.iter().map(|(n, g)| (n.clone(), wide(g))).collect(),
        bounds: &own.iter().map(|(n, own)| (n.clone(), worst * own)).collect(),
        spread,
    };
    let explained = run.explain(forward, all);
    let (before, after) = (errors(&plain), errors(&explained.gradients));
    let (median, most) = (before.median(), before.worst());
    eprint!("{what}: gradients median {median:.2}, worst {most:.2} times PyTorch's error");
    if !explained.turned.is_empty() {
        let (median, most) = (after.median(), after.worst());
        let (count, near) = (explained.turned.len(), explained.near);
        let voxel = |t: &Turned| format!("{} [{}] {:.1}", t.norm, t.voxel, t.away.abs());
        let voxels: Vec<String> = explained.turned.iter().map(voxel).collect();
        eprint!(
            "; {median:.2} and {most:.2} with {count} of {near} voxels near a kink on its other side, in deviations: "
        );
        eprint!("{}", voxels.join(", "));
    }
    eprintln!();
    assert!(explained.is_plausible(), "{what}: {} of {} turned", explained.turned.len(), explained.near);
    after.judge(&format!("{what}: gradients"), worst);
    explained
}

/// The changes of all parameters beside those of the truth.
fn updates(case: &GoldenTrain, what: &str, training: &Training, truth: &Parameters, worst: f64) {
    let mut errors = Errors(Vec::new());
    for (name, before) in &case.before {
        let (got, truth) = (&training.after[name], &truth[name].values);
        if !case.gradients.contains_key(name) {
            // A head that no loss looks at stays as it is.
            assert!(*got == before.values && *truth == before.to_f64(), "{what}: {name} moved");
            continue;
        }
        let update = norm(truth.iter().zip(&before.values).map(|(t, b)| t - f64::from(*b)));
        errors.0.push((distance(got, truth, update) / case.torch.updates[name], name.clone()));
    }
    eprintln!("{what}: median {:.2}, worst {:.2} times PyTorch's error", errors.median(), errors.worst());
    errors.judge(what, worst);
}

/// Whether a first step gives what a proved one gives, on the same sides of all kinks: within [`WORST`] of it, which adds
/// as much to the limits that the proved one met.
pub(super) fn is_beside(case: &GoldenTrain, proved: &Training, other: &Training) -> bool {
    let (a, b) = (&proved.steps[0], &other.steps[0]);
    let near = |a: &[f32], b: &[f32], most: f64| distance(a, &wide(b), 1.0) <= most;
    let truth = |n: &str| size(&case.gradients[n].to_f64());
    let largest = case.gradients.keys().map(|n| truth(n)).fold(0.0, f64::max);
    let gradient = |(n, a): (&String, &Vec<f32>)| {
        let size = truth(n);
        let most = if is_zero(size, largest) { zero_error(case) * largest } else { WORST * own_error(case, n) * size };
        b.gradients.get(n).is_some_and(|b| near(a, b, most))
    };
    let output = |((a, b), own): ((&Vec<f32>, &Vec<f32>), &f64)| near(a, b, WORST * own * size(&wide(a)));
    a.gradients.len() == b.gradients.len()
        && a.gradients.iter().all(gradient)
        && a.outputs.iter().zip(&b.outputs).zip(&case.torch.outputs).all(output)
        && (a.loss - b.loss).abs() <= LOSS * a.loss.abs()
}

/// Holds a course against the reference; one by the `best` instruction set to the tighter limits.
pub(super) fn prove(case: &GoldenTrain, training: &Training, best: bool) {
    let mut explained = Descent::new(case);
    // Until the course has crossed a kink, the stored truth is its truth too.
    let mut truth = Some(Descent::new(case));
    for (i, ours) in training.steps.iter().enumerate() {
        let what = format!("{} step {}", training.what, i + 1);
        let sized = |(n, p): (&String, &Array)| (n.clone(), Array::new(p.dims, wide(&ours.parameters[n])));
        let parameters: Parameters = explained.parameters.iter().map(sized).collect();
        let mut forward = Forward::run(case, i, &parameters);
        let loss = forward.value();
        assert!((ours.loss - loss).abs() <= LOSS * loss.abs(), "{what}: loss {}, expected {loss}", ours.loss);
        if truth.is_some() {
            let loss = case.steps[i].loss;
            let most = (LOSS * loss.abs()).max(2.0 * (case.torch.steps[i].loss - loss).abs());
            assert!((ours.loss - loss).abs() <= most, "{what}: loss {}, in truth {loss}", ours.loss);
        }
        let worst = if best && i == 0 { WORST } else { WORST_DRAWN };
        let spread = outputs(case, &what, &forward, &ours.outputs);
        let Explained { gradients, turned, .. } = gradients(case, worst, &what, &mut forward, &ours.gradients, spread);
        truth = truth.filter(|_| turned.is_empty()).and_then(|mut truth| {
            if truth.parameters == parameters {
                truth.step(case, i, gradients.clone());
                return Some(truth);
            }
            let there = Forward::run(case, i, &truth.parameters);
            let same = same_sides(&there, &forward);
            truth.step(case, i, there.by_parameter(&there.tape.backward(there.loss)));
            same.then_some(truth)
        });
        explained.step(case, i, gradients);
    }
    if training.steps.len() < case.steps.len() {
        return;
    }
    // Of a course that is not PyTorch's, its errors are another draw.
    let worst = if truth.is_some() { WORST } else { WORST_DRAWN };
    updates(case, &format!("{}: updates", training.what), training, &explained.parameters, worst);
    if truth.is_some() {
        let after: Parameters = case.after.iter().map(|(n, a)| (n.clone(), array(a))).collect();
        updates(
            case,
            &format!("{}: no kink crossed: updates beside the truth", training.what),
            training,
            &after,
            WORST,
        );
    }
}

/// The search finds the voxel that was turned, and that one only; no voxel explains a gradient that is wrong.
#[test]
fn golden_train_kinks_explain_nothing_else() {
    let Some(case) = GoldenTrain::read(3) else { return };
    let start = Descent::new(&case).parameters;
    let mut there = Forward::run(&case, 0, &start);
    let plain = there.by_parameter(&there.tape.backward(there.loss));
    let largest = plain.values().map(|g| size(g)).fold(0.0, f64::max);
    let bounded = plain.iter().map(|(n, g)| (n, size(g))).filter(|(_, s)| !is_zero(*s, largest));
    let bounds = bounded.map(|(n, size)| (n.clone(), WORST * own_error(&case, n) * size)).collect();

    // The voxel nearest to a kink of the last leaky ReLU.
    let kinks = there.pass.kinks.last().unwrap().clone();
    let x = &there.tape.value(kinks.x).values;
    let voxel = (0..x.len()).min_by(|a, b| x[*a].abs().total_cmp(&x[*b].abs())).unwrap();
    let spread = x[voxel].abs() / (size(x) / (x.len() as f64).sqrt());
    there.tape.turn(kinks.y, voxel);
    let turned = there.by_parameter(&there.tape.backward(there.loss));
    let explain = |gradients: &ByName| {
        let mut forward = Forward::run(&case, 0, &start);
        let all = forward.tape.backward(forward.loss);
        Run { gradients, bounds: &bounds, spread }.explain(&mut forward, all)
    };
    let found = explain(&turned);
    let names: Vec<_> = found.turned.iter().map(|t| (&t.norm, t.voxel)).collect();
    assert_eq!(names, [(&kinks.norm, voxel)]);
    assert_eq!(found.gradients, turned);

    let name = "encoder.stages.0.0.convs.1.conv.weight";
    let mut wrong = plain;
    wrong.get_mut(name).unwrap().iter_mut().for_each(|g| *g *= 1.0001);
    let found = explain(&wrong);
    let left = norm(wrong[name].iter().zip(&found.gradients[name]).map(|(a, b)| a - b));
    assert!(left > bounds[name], "{left:e}, at most {:e}", bounds[name]);
}
