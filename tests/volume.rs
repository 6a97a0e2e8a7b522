//! Components, holes and distances: what scipy 1.17 says of volumes that a formula gives.

use stunet::nnunet::volume::{Neighbours, distance_transform, fill_holes, label};

const SHAPE: [usize; 3] = [23, 37, 70];

/// Voxels of which numbers without any order are below a bound, or shells around the middle.
fn mask(bound: Option<u64>) -> Vec<bool> {
    let noise = |i: u64| (i * i * 7919 + i * 104_729) % 100_003;
    (0..SHAPE.iter().product())
        .map(|i: usize| match bound {
            Some(bound) => noise(i as u64) < bound,
            None => {
                let [z, y, x] = [i / (37 * 70), i / 70 % 37, i % 70];
                let r = z.abs_diff(11).pow(2) * 9 + y.abs_diff(18).pow(2) * 2 + x.abs_diff(35).pow(2);
                r % 700 < 350 && noise(i as u64) < 99_000
            }
        })
        .collect()
}

/// The bound, and what `scipy.ndimage` gave: components by faces and the sum of (number x (index mod 1009 + 1)), both by corners; voxels
/// after `binary_fill_holes`; sum and maximum of `distance_transform_edt` with a sampling of 3, 0.7, 1.1.
type Known = (Option<u64>, [u64; 4], usize, [f64; 2]);

const SCIPY: [Known; 5] = [
    (Some(20_000), [5372, 13_824_702_121, 124, 11_411_354], 11_766, [8_725.676166421596, 1.7804493814764855]),
    (Some(31_000), [4082, 8_328_244_674, 7, 9_251_043], 18_345, [14_075.030080149067, 2.0999999999999996]),
    (Some(70_000), [113, 24_210_800, 1, 21_033_633], 46_977, [40_521.25443536935, 3.1953090617340916]),
    (Some(99_500), [1, 29_916_004, 1, 29_916_004], 59_504, [270_599.70199313905, 13.109538512091108]),
    (None, [16, 111_955_714, 15, 101_544_702], 30_012, [54_094.11751038939, 6.447480127925948]),
];

#[test]
fn volumes_are_those_of_scipy() {
    for (bound, components, filled, [sum, max]) in SCIPY {
        let mut mask = mask(bound);
        let counted = [Neighbours::Faces, Neighbours::Corners].map(|neighbours| {
            let (numbers, n) = label(&mask, SHAPE, neighbours).unwrap();
            let weighed = numbers.iter().zip(0u64..).map(|(l, i)| u64::from(*l) * (i % 1009 + 1));
            [n as u64, weighed.sum()]
        });
        assert_eq!(counted.as_flattened(), components, "{bound:?}");
        let distances = distance_transform(&mask, SHAPE, [3.0, 0.7, 1.1]).unwrap();
        // Each distance is good to 8 epsilon, as tests beside its code say; so is their sum, but for the roundings of as many
        // additions on both sides.
        let total: f64 = distances.iter().sum();
        let additions = distances.len() as f64 * f64::EPSILON;
        assert!((total - sum).abs() <= (8.0 * f64::EPSILON + additions) * sum, "{bound:?}: {total} {sum}");
        let most = distances.iter().copied().fold(0.0, f64::max);
        assert!((most - max).abs() <= 8.0 * f64::EPSILON * max, "{bound:?}: {most} {max}");
        fill_holes(&mut mask, SHAPE).unwrap();
        assert_eq!(mask.iter().filter(|m| **m).count(), filled, "{bound:?}");
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let mut mask = vec![true; 23];
    for shape in [[2, 3, 4], [usize::MAX, 2, 2]] {
        assert!(label(&mask, shape, Neighbours::Faces).is_err());
        assert!(distance_transform(&mask, shape, [1.0; 3]).is_err());
        assert!(fill_holes(&mut mask, shape).is_err());
    }
    for spacing in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(distance_transform(&mask, [1, 1, 23], [1.0, spacing, 1.0]).is_err());
    }
    assert_eq!(label(&[], [0, 3, 4], Neighbours::Corners).unwrap().1, 0);
    fill_holes(&mut [], [3, 0, 4]).unwrap();
}
