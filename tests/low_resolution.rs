//! Low resolution against the definition in f64.

use proptest::prelude::*;
use stunet::Isa;
use stunet::nnunet::augment::{AugmentConfig, Parameters};

use crate::augment::Case;

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn low_resolution_is_the_definition(
        shape in prop::array::uniform3(2usize..36),
        scale in 0.5f32..1.0,
        planes: bool,
        seed: u64,
    ) {
        let mut config = AugmentConfig::new(&shape, &[]).unwrap();
        (config.planes, config.initial_patch) = (planes, shape);
        let case = Case::random(shape, 1, seed);
        let mut p = Parameters::default();
        p.low_resolution = vec![Some(scale)];
        let coarse: [usize; 3] = std::array::from_fn(|k| {
            if planes && k == 0 { shape[0] } else { (shape[k] as f64 * f64::from(scale)).round_ties_even() as usize }
        });
        // PyTorch computes places in f32; where they decide about a voxel they are computed in f32 here too.
        let nearest = |k: usize, i: usize| {
            ((i as f32 + 0.5) * (shape[k] as f32 / coarse[k] as f32)).floor().min(shape[k] as f32 - 1.0) as usize
        };
        let taps = |k: usize, i: usize| {
            let at = ((i as f64 + 0.5) * coarse[k] as f64 / shape[k] as f64 - 0.5).max(0.0);
            let before = at.floor() as usize;
            [(before, 1.0 - (at - before as f64)), ((before + 1).min(coarse[k] - 1), at - before as f64)]
        };
        for &isa in Isa::available() {
            let (image, _) = case.run(&config, &p, isa);
            for (i, v) in image.iter().enumerate() {
                let t = [i / (shape[1] * shape[2]), i / shape[2] % shape[1], i % shape[2]];
                let mut expected = 0.0;
                for (z, wz) in taps(0, t[0]) {
                    for (y, wy) in taps(1, t[1]) {
                        for (x, wx) in taps(2, t[2]) {
                            let from = (nearest(0, z) * shape[1] + nearest(1, y)) * shape[2] + nearest(2, x);
                            expected += wz * wy * wx * f64::from(case.image[from]);
                        }
                    }
                }
                // A place below 2^6 rounded four times, differences of values of at most 2, along each axis; three
                // interpolations.
                let bound = f64::from(f32::EPSILON) * 3.0 * (64.0 * 4.0 * 2.0 + 4.0);
                prop_assert!((f64::from(*v) - expected).abs() < bound, "{isa:?} {i}: {v} {expected}");
            }
        }
    }
}
