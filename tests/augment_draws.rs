//! What is drawn for 100 000 patches: frequencies and ranges of nnU-Net's transforms, within three standard errors.

use stunet::nnunet::augment::{AugmentConfig, Item, Operator, Parameters};

const N: usize = 100_000;
const CHANNELS: usize = 2;
const LABELS: usize = 3;

fn drawn(config: &AugmentConfig) -> Vec<Parameters> {
    let item = |i: usize| Item { seed: 5, epoch: (i / 500) as u32, index: (i % 500) as u32 };
    (0..N).map(|i| Parameters::draw(config, CHANNELS, LABELS, item(i))).collect()
}

fn rate(what: &str, hits: usize, n: usize, p: f64) {
    let (found, error) = (hits as f64 / n as f64, (p * (1.0 - p) / n as f64).sqrt());
    assert!((found - p).abs() < 3.0 * error, "{what}: {found} of {n}, expected {p} +- {error}");
}

/// Mean, both ends, and no hole in between (Kolmogorov and Smirnov, one in a thousand).
fn uniform(what: &str, mut x: Vec<f64>, low: f64, high: f64) {
    let n = x.len() as f64;
    assert!(x.len() > 1000, "{what}: {n} numbers");
    assert!(x.iter().all(|v| (low..=high).contains(v)), "{what}: outside of {low} to {high}");
    let (mean, error) = (x.iter().sum::<f64>() / n, (high - low) / (12.0 * n).sqrt());
    assert!((mean - (low + high) / 2.0).abs() < 3.0 * error, "{what}: mean {mean}");
    x.sort_by(f64::total_cmp);
    let far = |(i, v): (usize, &f64)| ((v - low) / (high - low) - (i as f64 + 0.5) / n).abs();
    let worst = x.iter().enumerate().map(far).fold(0.0, f64::max);
    assert!(worst < 1.95 / n.sqrt(), "{what}: {worst} away from uniform");
}

fn about_one(what: &str, lists: &[&Vec<f32>], gate: f64, low: f64, high: f64) {
    rate(what, lists.iter().filter(|l| !l.is_empty()).count(), N, gate);
    assert!(lists.iter().all(|l| l.is_empty() || l.len() == CHANNELS), "{what}: every channel");
    let all: Vec<f64> = lists.iter().flat_map(|l| l.iter()).map(|v| f64::from(*v)).collect();
    let (below, above): (Vec<f64>, Vec<f64>) = all.iter().partition(|v| **v < 1.0);
    rate(what, below.len(), all.len(), 0.5);
    uniform(what, below, f64::from(low as f32), 1.0);
    uniform(what, above, 1.0, high);
}

fn column(all: &[Parameters], get: impl Fn(&Parameters) -> &Vec<f32>) -> Vec<&Vec<f32>> {
    all.iter().map(get).collect()
}

#[test]
fn frequencies_and_ranges_are_nnunets() {
    let config = AugmentConfig::new(&[128, 128, 128], &[]).unwrap();
    let all = drawn(&config);
    let count = |f: &dyn Fn(&Parameters) -> bool| all.iter().filter(|p| f(p)).count();

    let spatial: Vec<_> = all.iter().filter_map(|p| p.spatial).collect();
    let (rotated, scaled): (Vec<_>, Vec<_>) = (
        spatial.iter().filter(|s| s.angles != [0.0; 3]).collect(),
        spatial.iter().filter(|s| s.scale != 1.0).collect(),
    );
    rate("rotation", rotated.len(), N, 0.2);
    rate("scale", scaled.len(), N, 0.2);
    rate("either", spatial.len(), N, 0.36);
    let most = 30f64.to_radians();
    for k in 0..3 {
        uniform("angle", rotated.iter().map(|s| s.angles[k]).collect(), -most, most);
    }
    uniform("scale", scaled.iter().map(|s| s.scale).collect(), 0.7, 1.4);

    rate("noise", count(&|p| p.noise.is_some()), N, 0.1);
    uniform("sigma", all.iter().filter_map(|p| p.noise).map(|n| f64::from(n.sigma())).collect(), 0.0, 0.1);

    let blurred: Vec<_> = all.iter().filter(|p| !p.blur.is_empty()).collect();
    rate("blur", blurred.len(), N, 0.2);
    let sigmas: Vec<_> = blurred.iter().flat_map(|p| &p.blur).filter_map(|s| *s).collect();
    rate("blurred channels", sigmas.len(), CHANNELS * blurred.len(), 0.5);
    for k in 0..3 {
        uniform("sigma of blur", sigmas.iter().map(|s| s[k]).collect(), 0.5, 1.0);
    }

    about_one("brightness", &column(&all, |p| &p.brightness), 0.15, 0.75, 1.25);
    about_one("contrast", &column(&all, |p| &p.contrast), 0.15, 0.75, 1.25);
    about_one("gamma, inverted", &column(&all, |p| &p.gamma_inverted), 0.1, 0.7, 1.5);
    about_one("gamma", &column(&all, |p| &p.gamma), 0.3, 0.7, 1.5);

    let low: Vec<_> = all.iter().filter(|p| !p.low_resolution.is_empty()).collect();
    rate("low resolution", low.len(), N, 0.25);
    let scales: Vec<_> = low.iter().flat_map(|p| &p.low_resolution).filter_map(|s| s.map(f64::from)).collect();
    rate("channels of low resolution", scales.len(), CHANNELS * low.len(), 0.5);
    uniform("scale of low resolution", scales, 0.5, 1.0);

    for k in 0..3 {
        rate("mirror", count(&|p| p.mirror[k]), N, 0.5);
        rate("mirror, two axes", count(&|p| p.mirror[k] && p.mirror[(k + 1) % 3]), N, 0.25);
    }
    // Transforms know nothing of each other.
    rate("gamma and gamma, inverted", count(&|p| !p.gamma.is_empty() && !p.gamma_inverted.is_empty()), N, 0.03);
    rate("rotation and blur", count(&|p| p.spatial.is_some() && !p.blur.is_empty()), N, 0.072);
    rate("noise and mirror", count(&|p| p.noise.is_some() && p.mirror[0]), N, 0.05);
}

#[test]
fn frequencies_of_cascades_are_nnunets() {
    let all = drawn(&AugmentConfig::new(&[128, 128, 128], &[]).unwrap());
    let operations: Vec<_> = all.iter().flat_map(|p| &p.operations).collect();
    // At least one of three labels.
    rate("operations", all.iter().filter(|p| !p.operations.is_empty()).count(), N, 0.4 * 0.875);
    for label in 0..LABELS {
        rate("label", operations.iter().filter(|o| o.channel == label).count(), N, 0.4 * 0.5);
        rate("removal", all.iter().filter(|p| p.removals.iter().any(|r| r.channel == label)).count(), N, 0.2 * 0.5);
    }
    for operator in [Operator::Dilation, Operator::Erosion, Operator::Closing, Operator::Opening] {
        rate("operator", operations.iter().filter(|o| o.operator == operator).count(), operations.len(), 0.25);
    }
    uniform("radius", operations.iter().map(|o| o.radius).collect(), 1.0, 8.0);
    uniform("choice", all.iter().flat_map(|p| &p.removals).map(|r| r.choice).collect(), 0.0, 1.0);
    let pairs: Vec<_> = all.iter().filter(|p| p.operations.len() == 2).collect();
    let rising = pairs.iter().filter(|p| p.operations[0].channel < p.operations[1].channel).count();
    rate("order", rising, pairs.len(), 0.5);
}

/// Planes turn freely, z is never mirrored in 2D, and what is not allowed is not drawn.
#[test]
fn configurations_limit_what_is_drawn() {
    let mut config = AugmentConfig::new(&[64, 64], &[]).unwrap();
    config.mirror[2] = false;
    let all = drawn(&config);
    let half = std::f64::consts::PI;
    let angles = all.iter().filter_map(|p| p.spatial).filter(|s| s.angles != [0.0; 3]).map(|s| s.angles[2]);
    uniform("angle", angles.collect(), -half, half);
    assert!(all.iter().all(|p| !p.mirror[0] && !p.mirror[2]));
    rate("mirror", all.iter().filter(|p| p.mirror[1]).count(), N, 0.5);
}

/// A patch is named by seed, epoch and place, and by nothing else.
#[test]
fn patches_are_their_names() {
    let config = AugmentConfig::new(&[128, 128, 128], &[]).unwrap();
    let draw = |seed, epoch, index| Parameters::draw(&config, CHANNELS, LABELS, Item { seed, epoch, index });
    let many: Vec<Parameters> = (0..100).map(|i| draw(1, 2, i)).collect();
    assert_eq!(many, (0..100).map(|i| draw(1, 2, i)).collect::<Vec<_>>());
    for other in [(2, 2, 0), (1, 3, 0), (1, 2, 100)] {
        let there: Vec<Parameters> = (0..100).map(|i| draw(other.0, other.1, other.2 + i)).collect();
        assert!(many.iter().zip(&there).filter(|(a, b)| a == b).count() < 20, "{other:?}");
    }
}
