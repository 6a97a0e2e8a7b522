use super::*;
use crate::base::rng::Rng;

fn rule(order: u8, order_z: u8, force_separate_z: Option<bool>) -> Resampling {
    Resampling { order, order_z, force_separate_z }
}

#[test]
fn separate_axis_decisions() {
    let auto = rule(3, 0, None);
    let iso = [1.0, 1.0, 1.0];
    for (current, new, expected) in [
        (iso, iso, None),
        ([5.0, 1.0, 1.0], iso, Some(0)),
        (iso, [1.0, 5.0, 1.0], Some(1)),
        ([1.0, 1.0, 3.5], iso, Some(2)),
        // Strictly more than three times.
        ([3.0, 1.0, 1.0], iso, None),
        ([3.0 + 1e-9, 1.0, 1.0], iso, Some(0)),
        // Two equally coarse axes: none stands apart, and the other spacing is not asked.
        ([0.2, 1.25, 1.25], [9.0, 1.0, 1.0], None),
        // The current spacing has the first word.
        ([5.0, 1.0, 1.0], [1.0, 5.0, 1.0], Some(0)),
        // The coarsest of all, not the one beyond the threshold against its neighbour.
        ([4.0, 3.9, 1.0], iso, Some(0)),
    ] {
        assert_eq!(separate_axis(&auto, current, new), expected, "{current:?} {new:?}");
    }
    assert_eq!(separate_axis(&rule(3, 0, Some(false)), [9.0, 1.0, 1.0], iso), None);
    assert_eq!(separate_axis(&rule(3, 0, Some(true)), [1.1, 1.0, 1.0], iso), Some(0));
    assert_eq!(separate_axis(&rule(3, 0, Some(true)), iso, [9.0, 1.0, 1.0]), None);
}

#[test]
fn new_shape_rounds_halves_to_even_and_refuses_nonsense() {
    assert_eq!(new_shape([5, 7, 9], [1.0; 3], [2.0; 3]).unwrap(), [2, 4, 4]);
    assert_eq!(new_shape([10, 20, 30], [1.5; 3], [1.5; 3]).unwrap(), [10, 20, 30]);
    for (shape, old, message) in [
        ([1, 9, 9], [0.5, 1.5, 1.5], "too thin"),
        ([512, 512, 512], [1e6, 1.0, 1.0], "must be wrong"),
        ([512, 512, 512], [f64::MAX, 1.0, 1.0], "must be wrong"),
        ([9, 9, 9], [0.0, 1.0, 1.0], "positive"),
        ([9, 9, 9], [f64::NAN, 1.0, 1.0], "positive"),
        ([9, 9, 9], [-1.0, 1.0, 1.0], "positive"),
    ] {
        let error = new_shape(shape, old, [1.5; 3]).unwrap_err().to_string();
        assert!(error.contains(message) && !error.contains('\n'), "{error}");
    }
}

/// The indicator of every label resampled as an image, thresholded, later labels over earlier ones.
fn by_indicators(labels: &[u8], from: [usize; 3], to: [usize; 3], rule: &Resampling, apart: Option<usize>) -> Vec<u8> {
    let mut out = vec![0; to.iter().product()];
    for label in 0..=*labels.iter().max().unwrap() {
        let indicator: Vec<f32> = labels.iter().map(|&l| f32::from(u8::from(l == label))).collect();
        let mut share = vec![0.0; out.len()];
        let held = Held { array: &indicator, view: View::whole(from) };
        resample(&held, to, rule, apart, Isa::detect(), &mut share).unwrap();
        // 1/3 + 1/6 may be a hair below 1/2, here or there.
        for (o, s) in out.iter_mut().zip(share) {
            match s {
                s if (s - 0.5).abs() < 1e-5 => *o = u8::MAX,
                s if s > 0.5 => *o = label,
                _ => {}
            }
        }
    }
    out
}

#[test]
fn labels_are_resampled_by_majority() {
    let mut rng = Rng::new(11, 0);
    let from = [5, 6, 7];
    let labels: Vec<u8> = (0..from.iter().product()).map(|_| rng.uniform(0.0, 4.0) as u8).collect();
    for order in [0, 1] {
        for apart in [None, Some(0), Some(1), Some(2)] {
            for to in [[5, 6, 7], [11, 5, 9], [4, 13, 17]] {
                let rule = rule(order, 0, None);
                let ours = resample_labels(&labels, from, to, &rule, apart).unwrap();
                let reference = by_indicators(&labels, from, to, &rule, apart);
                let odd = ours.iter().zip(&reference).filter(|(o, r)| **r != u8::MAX && o != r).count();
                assert_eq!(odd, 0, "{order} {apart:?} {to:?}");
            }
        }
    }
}

/// `resize_segmentation(a, shape, 1)` of batchgenerators 0.25.1 on exact ties: the later label wins; where three
/// labels share a voxel and none has half of it, background.
#[test]
fn labels_break_ties_upwards_and_fall_back_to_background() {
    let linear = rule(1, 0, None);
    let halves = resample_labels(&[1u8, 2, 2, 1], [1, 1, 4], [1, 1, 2], &linear, None).unwrap();
    assert_eq!(halves, [2, 2]);
    let quarters = resample_labels(&[1u8, 2, 3, 4], [1, 2, 2], [1, 1, 1], &linear, None).unwrap();
    assert_eq!(quarters, [0]);
    let outside = resample_labels(&[5u16, 0, 300, 0], [1, 2, 2], [1, 1, 1], &linear, None).unwrap();
    assert_eq!(outside, [0]);
}

#[test]
fn unknown_orders_are_refused() {
    let (array, view) = (vec![0.0; 8], View::whole([2, 2, 2]));
    let mut out = vec![0.0; 27];
    for (rule, apart) in [(rule(2, 0, None), None), (rule(3, 3, None), Some(0))] {
        let error =
            resample(&Held { array: &array, view }, [3, 3, 3], &rule, apart, Isa::detect(), &mut out).unwrap_err();
        assert!(error.to_string().contains("order"), "{error}");
    }
    assert!(resample_labels(&[0u8; 8], [2; 3], [3; 3], &rule(3, 0, None), None).is_err());
}
