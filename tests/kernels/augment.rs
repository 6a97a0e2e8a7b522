//! Augmentation on a card beside the processor's, by the same parameters. The processor's is compared with
//! batchgeneratorsv2 in `tests/augment.rs`.

use std::sync::Arc;

use stunet::Device;
use stunet::nnunet::augment::{AugmentConfig, Augmenter, Item, Parameters, RawPatch, Scratch, Spatial};
use stunet::nnunet::testing::augmented;

use super::SEEDS;
use super::sim::Sim;
use crate::augment::Case;
use crate::common::bound::gamma;

/// On the newest kernels, or on those of cards before Ampere.
fn sim(seed: u64, capability: [u32; 2]) -> Device {
    Device::on(Arc::new(Sim::of(seed, capability)), "sim".into())
}

/// Augmentation of patches of that size, two sizes for a plane. The case has two channels, of which the second is masked.
fn config(patch: &[usize]) -> AugmentConfig {
    AugmentConfig::new(patch, &[false, true]).unwrap()
}

fn case(config: &AugmentConfig, seed: u64) -> Case {
    Case::random(config.initial_patch.map(|n| n + 2), 2, seed)
}

/// The patches of a batch by the processor.
fn here(config: &AugmentConfig, batch: &[(Case, Parameters)]) -> (Vec<f32>, Vec<u16>) {
    let n: usize = config.patch.iter().product();
    let augmenter = Augmenter::new(config.clone(), &[]);
    let (mut image, mut labels) = (vec![0.0; 2 * n * batch.len()], vec![0; n * batch.len()]);
    for (i, (case, p)) in batch.iter().enumerate() {
        let (image, labels) = (&mut image[2 * i * n..][..2 * n], &mut labels[i * n..][..n]);
        augmenter.run(case, [-1, 0, 1], p, &mut Scratch::default(), image, labels).unwrap();
    }
    (image, labels)
}

/// The same by a card.
fn there(config: &AugmentConfig, batch: &[(Case, Parameters)], device: &Device) -> (Vec<f32>, Vec<u16>) {
    let augmenter = Augmenter::new(config.clone(), &[]);
    let read = |(case, p): &(Case, Parameters)| {
        let mut raw = RawPatch::default();
        augmenter.read(case, [-1, 0, 1], p.clone(), &mut raw).unwrap();
        raw
    };
    let raw: Vec<RawPatch> = batch.iter().map(read).collect();
    augmented(&augmenter, &raw, device).unwrap()
}

/// Labels are equal, values differ by no more than `error`.
fn check(what: &str, config: &AugmentConfig, parameters: Vec<Parameters>, error: f64) {
    let batch: Vec<_> = parameters.into_iter().enumerate().map(|(i, p)| (case(config, i as u64), p)).collect();
    let expected = here(config, &batch);
    for capability in [[8, 6], [7, 5]] {
        let got = there(config, &batch, &sim(SEEDS[0], capability));
        assert!(got.1 == expected.1, "{what}: labels");
        let off = got.0.iter().zip(&expected.0).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
        let worst = off.fold(0.0, f64::max);
        assert!(worst <= error, "{what}: off by {worst:e}, expected {error:e}");
    }
}

fn with(change: impl Fn(&mut Parameters)) -> Parameters {
    let mut p = Parameters::default();
    change(&mut p);
    p
}

/// Interpolation by three products and sums, which a processor without fused ones rounds twice, of differences up to 2.
const INTERPOLATED: usize = 2 * 3 * 2;

#[test]
pub(super) fn cuda_train_augment_warps() {
    let turned = |angles: [f64; 3], scale| with(|p| p.spatial = Some(Spatial { angles, scale }));
    // Also a scale alone: places on voxels and halfway between them, so that labels have equal shares.
    let all = vec![turned([0.4, -0.2, 0.3], 1.3), turned([0.0; 3], 0.5), turned([0.0; 3], 1.0)];
    for patch in [&[6, 10, 17][..], &[3, 12, 14], &[11, 18]] {
        check(&format!("{patch:?}"), &config(patch), all.clone(), gamma(INTERPOLATED));
    }
}

#[test]
pub(super) fn cuda_train_augment_adds_noise() {
    let config = config(&[5, 9, 13]);
    // The first few patches of an epoch that are given noise.
    let drawn = (0..).map(|index| Parameters::draw(&config, 2, 0, Item { seed: 3, epoch: 1, index }).noise);
    let noisy: Vec<_> = drawn.flatten().take(2).map(|n| with(|p| p.noise = Some(n))).collect();
    // No sum has another order: the same bits.
    check("noise", &config, noisy, 0.0);
}

#[test]
pub(super) fn cuda_train_augment_filters() {
    let blurred = with(|p| p.blur = vec![None, Some([0.5, 0.9, 1.0])]);
    let coarse = with(|p| p.low_resolution = vec![Some(0.5), Some(0.83)]);
    let both = with(|p| (p.blur, p.low_resolution) = (blurred.blur.clone(), coarse.low_resolution.clone()));
    for patch in [&[4, 9, 19][..], &[2, 8, 12], &[9, 21], &[3, 3, 3]] {
        // Three filters of up to seven weights that add up to 1, after that interpolation.
        let error = gamma(3 * 7 + INTERPOLATED);
        check(&format!("{patch:?}"), &config(patch), vec![blurred.clone(), coarse.clone(), both.clone()], error);
    }
}

/// Mean and deviation are sums in another order, of more values than one block takes.
#[test]
pub(super) fn cuda_train_augment_knows_statistics() {
    let brighter = with(|p| p.brightness = vec![1.2, 0.8]);
    let contrast = with(|p| p.contrast = vec![1.2, 0.75]);
    let curves = with(|p| (p.gamma_inverted, p.gamma) = (vec![0.7, 1.5], vec![1.4, 0.8]));
    let all = with(|p| {
        p.brightness = vec![0.9, 1.1];
        p.contrast = vec![0.8, 1.25];
        p.low_resolution = vec![None, Some(0.7)];
        p.gamma_inverted = vec![1.2, 0.9];
        p.gamma = vec![0.75, 1.3];
    });
    // Values up to 1.4 after at most two curves. A curve's logarithm and power are the processor's, of arguments that differ
    // by the error of mean and deviation: half a unit for each value of a strand and each level of a tree, 16 + 8 + 8, and
    // the slope of a curve of exponent 0.7, which at the next but smallest of 10 000 evenly spread values is
    // 0.7 * 10000^0.3 = 11.
    let error = 1.4 * 11.0 * gamma(32);
    check("statistics", &config(&[16, 18, 20]), vec![brighter, contrast, curves, all], error);
    // Of one value there is no deviation, of equal values none.
    let mut flat = case(&config(&[2, 4, 4]), 1);
    flat.image.fill(0.25);
    let p = with(|p| (p.gamma, p.contrast) = (vec![0.7, 1.4], vec![1.2, 0.8]));
    let batch = [(flat, p)];
    let (got, _) = there(&config(&[2, 4, 4]), &batch, &sim(0, [8, 6]));
    assert_eq!(got, here(&config(&[2, 4, 4]), &batch).0);
}

#[test]
pub(super) fn cuda_train_augment_mirrors_and_masks() {
    let axes = |z, y, x| with(|p| p.mirror = [z, y, x]);
    let all =
        vec![axes(true, false, false), axes(false, true, true), axes(true, true, true), axes(false, false, false)];
    check("mirror", &config(&[3, 5, 7]), all, 0.0);
}

/// What is drawn, in batches, and under every schedule the same bytes.
#[test]
pub(super) fn cuda_train_augment_whole_batches() {
    for patch in [&[6, 8, 10][..], &[10, 12]] {
        let config = config(patch);
        let draw = |index| Parameters::draw(&config, 2, 0, Item { seed: 5, epoch: 0, index });
        // Much is done to these.
        let busy = (0..).map(draw).filter(|p| {
            let lists = [p.brightness.len(), p.contrast.len(), p.gamma.len(), p.gamma_inverted.len(), p.blur.len()];
            lists.iter().filter(|n| **n > 0).count() + usize::from(p.spatial.is_some()) >= 3
        });
        let parameters: Vec<_> = busy.take(3).collect();
        // As above, after a warp, a filter and a coarser grid.
        let error = 1.4 * 11.0 * gamma(32 + 3 * 7 + 2 * INTERPOLATED);
        check(&format!("{patch:?}"), &config, parameters.clone(), error);
        let batch: Vec<_> = parameters.into_iter().enumerate().map(|(i, p)| (case(&config, i as u64), p)).collect();
        let first = there(&config, &batch, &sim(SEEDS[0], [8, 6]));
        for seed in &SEEDS[1..] {
            assert!(there(&config, &batch, &sim(*seed, [8, 6])) == first, "bytes depend on the schedule");
        }
    }
    // What does not fit.
    let config = config(&[4, 4, 4]);
    let augmenter = Augmenter::new(config.clone(), &[]);
    assert!(augmented(&augmenter, &[], &sim(0, [8, 6])).is_err());
    assert!(augmented(&augmenter, &[RawPatch::default()], &sim(0, [8, 6])).is_err());
    let plain = Augmenter::plain([4; 3], &[]);
    assert!(plain.read(&case(&config, 1), [0; 3], Parameters::default(), &mut RawPatch::default()).is_err());
}
