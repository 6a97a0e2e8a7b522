//! The synthetic patient: reproducible, varied, and anatomically the right way round.

use stunet::io::{Image, Segmentation};
use stunet::phantom::{NAMES, Phantom, label};

fn small(seed: u64) -> Phantom {
    Phantom::new(seed).with_grid([72, 54, 75], [4.0; 3]).unwrap()
}

/// Mean patient position (right, front, top) of a label in mm.
fn centre(seg: &Segmentation, label: u8) -> [f64; 3] {
    let [_, ny, nx] = seg.geometry.shape;
    let mut sum = [0.0; 4];
    for (i, _) in seg.labels.iter().enumerate().filter(|l| l.1 == u16::from(label)) {
        let index = [(i % nx) as f64, (i / nx % ny) as f64, (i / nx / ny) as f64];
        for (s, row) in sum.iter_mut().zip(&seg.geometry.affine) {
            *s += row[3] + (0..3).map(|a| row[a] * index[a]).sum::<f64>();
        }
        sum[3] += 1.0;
    }
    [0, 1, 2].map(|a| sum[a] / sum[3])
}

/// Mean intensity of a label in HU.
fn mean_hu(ct: &Image, seg: &Segmentation, label: u8) -> f64 {
    let (mut sum, mut n) = (0.0, 0.0);
    for (&hu, _) in ct.channels[0].iter().zip(seg.labels.iter()).filter(|v| v.1 == u16::from(label)) {
        (sum, n) = (sum + f64::from(hu), n + 1.0);
    }
    sum / n
}

#[test]
fn the_same_seed_gives_the_same_voxels_for_any_thread_count() {
    let render = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| small(3).render())
    };
    let (one, two, seven) = (render(1), render(2), render(7));
    assert!(one == two && one == seven);
    assert!(one.0 != small(4).render().0, "another seed must give another patient");
}

#[test]
fn organs_lie_where_they_belong() {
    for seed in 0..6 {
        let (ct, truth) = small(seed).render();
        let at = |l| centre(&truth, l);
        // Patient coordinates are right, front, top.
        assert!(at(label::LIVER)[0] > 20.0, "the liver lies on the right");
        assert!(at(label::SPLEEN)[0] < -20.0, "the spleen lies on the left");
        assert!(at(label::KIDNEY_RIGHT)[0] > 20.0 && at(label::KIDNEY_LEFT)[0] < -20.0);
        assert!(at(label::LUNG_RIGHT)[0] > 20.0 && at(label::LUNG_LEFT)[0] < -20.0);
        assert!(at(label::LUNG_RIGHT)[2] > at(label::LIVER)[2], "the lung lies above the liver");
        assert!(at(label::SPINE)[1] < at(label::AORTA)[1], "the aorta lies before the spine");
        let hu = |l| mean_hu(&ct, &truth, l);
        assert!(hu(label::LUNG_LEFT) < -700.0 && hu(label::LUNG_RIGHT) < -700.0);
        for l in [label::LIVER, label::SPLEEN, label::KIDNEY_LEFT, label::KIDNEY_RIGHT, label::AORTA] {
            assert!((80.0..220.0).contains(&hu(l)), "label {l}: {} HU", hu(l));
        }
        assert!(hu(label::SPINE) > 100.0);
    }
}

#[test]
fn every_organ_is_large_enough_in_every_patient() {
    for seed in 100..124 {
        let (_, truth) = small(seed).render();
        for (value, name) in NAMES {
            let ml = truth.volume_ml(value);
            assert!((35.0..1400.0).contains(&ml), "seed {seed}: {name} has {ml:.0} ml");
        }
    }
}

#[test]
fn voxels_are_integers_of_a_ct_with_the_noise_asked_for() {
    let (noisy, _) = small(1).render();
    assert!(noisy.channels[0].iter().all(|v| v.fract() == 0.0 && (-1024.0..=3071.0).contains(v)));
    let (clean, _) = small(1).with_noise(0.0).unwrap().render();
    // In air the noise is cut off at -1024, so it is measured in tissue.
    let differences: Vec<f64> = noisy.channels[0]
        .iter()
        .zip(&clean.channels[0])
        .filter(|(_, c)| **c > -900.0)
        .map(|(n, c)| f64::from(n - c))
        .collect();
    let sd = (differences.iter().map(|d| d * d).sum::<f64>() / differences.len() as f64).sqrt();
    assert!((sd - 15.0).abs() < 0.3, "noise of {sd} HU");
}

#[test]
fn the_anatomy_does_not_depend_on_the_grid() {
    let fine = Phantom::new(5).with_grid([96, 72, 100], [3.0; 3]).unwrap().render().1;
    let coarse = Phantom::new(5).with_grid([48, 36, 50], [6.0; 3]).unwrap().render().1;
    for (value, name) in NAMES {
        let (a, b) = (fine.volume_ml(value), coarse.volume_ml(value));
        assert!((a - b).abs() < 0.06 * a, "{name}: {a:.0} ml and {b:.0} ml");
    }
}

#[test]
fn impossible_grids_are_refused() {
    for (shape, spacing) in [([0, 5, 5], [1.0; 3]), ([usize::MAX, 9, 9], [1.0; 3]), ([5; 3], [1.0, 0.0, 1.0])] {
        assert!(Phantom::new(1).with_grid(shape, spacing).is_err());
    }
    assert!(Phantom::new(1).with_grid([5; 3], [1.0, f64::NAN, 1.0]).is_err());
    assert!(Phantom::new(1).with_grid([5; 3], [1.0, 1.0, f64::INFINITY]).is_err());
    assert!(Phantom::new(1).with_noise(-1.0).is_err());
}
