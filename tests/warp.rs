//! Rotation and scale against the definition in f64.

use proptest::prelude::*;
use stunet::Isa;
use stunet::nnunet::augment::{AugmentConfig, Parameters, Spatial};

use crate::augment::Case;

type Matrix = [[f64; 3]; 3];

fn product(a: Matrix, b: Matrix) -> Matrix {
    a.map(|row| std::array::from_fn(|j| (0..3).map(|k| row[k] * b[k][j]).sum()))
}

/// A turn of the plane of the axes `a` and `b` from `a` to `b`.
fn turn(a: usize, b: usize, angle: f64) -> Matrix {
    let mut m: Matrix = std::array::from_fn(|i| std::array::from_fn(|j| f64::from(u8::from(i == j))));
    (m[a][a], m[b][b], m[b][a], m[a][b]) = (angle.cos(), angle.cos(), angle.sin(), -angle.sin());
    m
}

/// Value and scores of the labels -1 to 3, in thousandths, at a place of the case.
fn at(case: &Case, place: [f64; 3]) -> (f64, [f64; 5]) {
    let (mut value, mut scores) = (0.0, [0.0; 5]);
    for corner in 0..8 {
        let mut weight = 1.0;
        let mut voxel = [0i64; 3];
        for k in 0..3 {
            let share = place[k] - place[k].floor();
            let after = corner >> k & 1;
            voxel[k] = place[k].floor() as i64 + after;
            weight *= if after == 1 { share } else { 1.0 - share };
        }
        let inside = (0..3).all(|k| (0..case.shape[k] as i64).contains(&voxel[k]));
        let i = voxel.iter().zip(case.shape).fold(0, |i, (v, n)| i * n as i64 + v) as usize;
        value += weight * if inside { f64::from(case.image[i]) } else { 0.0 };
        scores[if inside { (case.labels[i] + 1) as usize } else { 0 }] += 1000.0 * weight;
    }
    (value, scores)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn warps_are_the_definition(
        size in prop::array::uniform3(1usize..24),
        extra in prop::array::uniform3(0usize..12),
        angles in prop::array::uniform3(-3.2f64..3.2),
        scale in 0.5f64..2.0,
        kind in 0usize..3,
        seed: u64,
    ) {
        // A volume, planes, 2D.
        let mut size = size;
        let list = if kind == 2 { vec![size[1], size[2]] } else { size.to_vec() };
        let mut config = AugmentConfig::new(&list, &[]).unwrap();
        (config.planes, size) = (kind > 0, config.patch);
        config.initial_patch = std::array::from_fn(|k| size[k] + if k == 0 && kind > 0 { 0 } else { extra[k] });
        let case = Case::random(config.initial_patch, 1, seed);
        let mut p = Parameters::default();
        p.spatial = Some(Spatial { angles, scale });
        let turned = if kind > 0 {
            turn(1, 2, angles[2])
        } else {
            product(product(turn(0, 1, angles[2]), turn(2, 0, angles[1])), turn(1, 2, angles[0]))
        };
        let initial = config.initial_patch;
        for &isa in Isa::available() {
            let (image, target) = case.run(&config, &p, isa);
            for (i, (v, l)) in image.iter().zip(&target).enumerate() {
                let t = [i / (size[1] * size[2]), i / size[2] % size[1], i % size[2]];
                let centred: [f64; 3] = std::array::from_fn(|k| t[k] as f64 - (size[k] as f64 - 1.0) / 2.0);
                let place = std::array::from_fn(|k| {
                    if k == 0 && kind > 0 {
                        return t[0] as f64;
                    }
                    let s = if k == 0 || kind == 0 { 0.0 } else { turned[k][0] * centred[0] };
                    let along = turned[k][0] * centred[0] + turned[k][1] * centred[1] + turned[k][2] * centred[2] - s;
                    along * scale + (initial[k] as f64 - 1.0) / 2.0
                });
                let (value, scores) = at(&case, place);
                // A place is rounded a few times in f32, at most 2^7 voxels from the box's begin: 4 x 2^-17 voxels along each
                // axis, times differences of values of at most 2.
                prop_assert!((f64::from(*v) - value).abs() < 3.0 * 2.0 * 4.0 / 131_072.0, "{isa:?} {i}: {v} {value}");
                let best = (0..5).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
                let second = (0..5).filter(|s| *s != best).map(|s| scores[s]).fold(0.0, f64::max);
                // Below a difference of one thousandth, half precision decides.
                if scores[best] - second > 1.0 {
                    prop_assert_eq!(i64::from(*l), (best as i64 - 1).max(0), "{:?} {}: {:?}", isa, i, scores);
                }
            }
        }
    }
}
