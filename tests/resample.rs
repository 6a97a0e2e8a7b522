//! Resampling of images, seen through preprocessing with normalisation off.

use proptest::prelude::*;
use serde_json::json;
use stunet::io::{Geometry, Image};
use stunet::nnunet::plans::InferencePlan;
use stunet::nnunet::preprocess::preprocess;

pub fn plan(order: u8, order_z: u8, force_separate_z: Option<bool>, spacing: [f64; 3]) -> InferencePlan {
    let rule = json!({"order": order, "order_z": order_z, "force_separate_z": force_separate_z});
    serde_json::from_value(json!({
        "rules": "nnunet_v2", "dataset": "", "trainer": "", "configuration": "",
        "channels": [{"name": "CT", "normalization": "none", "use_mask": false, "intensity": null}],
        "labels": [], "decision": "argmax", "heads": 2, "patch": [32, 32, 32], "spacing_mm": spacing,
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], "mirror_axes": [],
        "resampling_data": rule, "resampling_probabilities": rule,
    }))
    .unwrap()
}

/// Resamples `values` of `from` voxels to `to`. `coarse` is the axis with the largest spacing.
fn resampled(
    values: &[f32],
    from: [usize; 3],
    to: [usize; 3],
    coarse: usize,
    rule: (u8, u8, Option<bool>),
) -> Vec<f32> {
    let spacing: [f64; 3] = std::array::from_fn(|k| if k == coarse { 2.0 } else { 1.0 });
    let target = std::array::from_fn(|k| spacing[k] * from[k] as f64 / to[k] as f64);
    let image = Image::new(vec![values.to_vec()], Geometry::new(from, spacing)).unwrap();
    let done = preprocess(&image, &plan(rule.0, rule.1, rule.2, target)).unwrap();
    assert_eq!(done.shape, to);
    assert_eq!(done.properties.shape_after_cropping, from);
    done.data
}

fn near(ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() < 2e-6, "{i}: {a} {b}");
    }
}

/// `skimage.transform.resize(a[None], (1, m), order, mode="edge", anti_aliasing=False)`, scikit-image 0.26, scipy 1.17.
#[test]
fn lines_as_skimage_has_them() {
    let a = [3.0, -1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0];
    let line = |m, order| resampled(&a, [1, 1, 8], [1, 1, m], 0, (order, 0, Some(false)));
    near(&line(5, 0), &[3.0, 4.0, 5.0, 9.0, 6.0]);
    near(&line(13, 0), &[3.0, 3.0, -1.0, 4.0, 4.0, 1.0, 5.0, 5.0, 9.0, 9.0, 2.0, 6.0, 6.0]);
    near(&line(5, 1), &[1.8, 3.5, 3.0, 8.3, 4.8]);
    near(
        &line(13, 1),
        &[
            3.0,
            1.307_692_3,
            -0.807_692_3,
            2.269_230_8,
            3.192_307_7,
            1.346_153_8,
            3.0,
            5.461_538_5,
            7.923_077,
            6.576_923,
            2.269_230_8,
            4.307_692_3,
            6.0,
        ],
    );
    near(&line(5, 3), &[1.535_300_9, 3.745_828_8, 1.915_834_2, 8.543_894, 4.423_45]);
    near(
        &line(13, 3),
        &[
            3.473_840_5,
            0.828_798_06,
            -0.936_114_6,
            2.486_252_8,
            3.763_863_7,
            1.259_258_6,
            1.915_834_2,
            5.841_089,
            9.0,
            6.734_227_8,
            2.108_644_4,
            3.674_77,
            6.512_905_5,
        ],
    );
}

/// (2, 3, 4) voxels that start and end nonzero, so that nothing is cropped.
const VOLUME: [f32; 24] = [
    -4.0, 6.0, -3.0, 2.0, -1.0, -1.0, 2.0, -3.0, 6.0, -4.0, 0.0, -4.0, 6.0, -3.0, 2.0, -1.0, -1.0, 2.0, -3.0, 6.0,
    -4.0, 0.0, -4.0, 6.0,
];

/// `resize(VOLUME, (3, 2, 5), 3, mode="edge", anti_aliasing=False)`; its clipping shows in the corners.
#[test]
fn volumes_as_skimage_has_them() {
    let volume = |order| resampled(&VOLUME, [2, 3, 4], [3, 2, 5], 0, (order, 0, Some(false)));
    near(
        &volume(3),
        &[
            -4.0,
            3.416_447_7,
            2.212_101_7,
            -2.222_452_7,
            1.309_897_3,
            5.889_552_6,
            -2.246_452_7,
            -1.847_923_9,
            0.265_927_75,
            -4.0,
            0.380_361_4,
            1.383_981_7,
            0.478_753_93,
            -0.324_289_27,
            0.833_615,
            0.552_829_1,
            -0.886_554_3,
            -2.079_121,
            -0.874_186_14,
            1.306_315,
            5.753_778,
            -0.648_484_4,
            -1.254_593_8,
            1.573_874_2,
            0.357_332_74,
            -4.0,
            0.473_344,
            -2.310_318_2,
            -2.014_3,
            6.0,
        ],
    );
    near(&volume(1)[..5], &[-3.25, 2.0, 1.25, -1.0, 0.75]);
    near(&volume(0)[..10], &[-4.0, 6.0, -3.0, -3.0, 2.0, 6.0, -4.0, 0.0, 0.0, -4.0]);
}

/// `resample_data_or_seg(VOLUME[None], (3, 2, 5), False, axis, 3, True, 0)` of nnU-Net 2.8.1: slices by cubic splines,
/// each clipped to its own range, then the nearest slice.
#[test]
fn a_coarse_axis_apart_as_nnunet_has_it() {
    let apart = |axis, to, order_z| resampled(&VOLUME, [2, 3, 4], to, axis, (3, order_z, Some(true)));
    near(
        &apart(0, [3, 2, 5], 0),
        &[
            -4.0,
            3.144_275,
            1.979_984_6,
            -1.968_264_7,
            1.246_117_1,
            5.174_898,
            -2.064_345_2,
            -1.878_884_1,
            0.113_252_15,
            -4.0,
            5.034_209_7,
            -0.376_311_6,
            -1.022_476_8,
            1.319_686_2,
            0.421_112_93,
            -4.0,
            0.291_236_5,
            -2.279_358,
            -1.861_624_4,
            6.0,
            5.034_209_7,
            -0.376_311_6,
            -1.022_476_8,
            1.319_686_2,
            0.421_112_93,
            -4.0,
            0.291_236_5,
            -2.279_358,
            -1.861_624_4,
            6.0,
        ],
    );
    near(
        &apart(1, [3, 2, 5], 0),
        &[
            -4.0,
            4.811_671,
            2.242_471_5,
            -3.240_546_5,
            2.715_439_8,
            6.0,
            -1.946_605_2,
            -2.602_885_7,
            -0.270_838_05,
            -4.0,
            0.941_424_2,
            1.601_004_5,
            0.449_759_53,
            -0.452_458_1,
            0.583_117_87,
            1.147_252_4,
            -1.108_721_6,
            -2.602_885_7,
            -1.108_721_6,
            1.147_252_4,
            6.0,
            -1.609_661_9,
            -1.342_952_4,
            2.335_630_1,
            -1.549_204,
            -4.0,
            -0.270_838_05,
            -2.602_885_7,
            -1.946_605_2,
            6.0,
        ],
    );
    near(
        &apart(2, [3, 2, 5], 0)[..15],
        &[
            -4.0,
            5.150_854,
            -2.030_019,
            -2.030_019,
            1.011_158_7,
            5.298_809_7,
            -4.0,
            1.066_752_3,
            1.066_752_3,
            -4.0,
            0.461_417_87,
            1.418_329_8,
            -0.419_591_08,
            -0.419_591_08,
            0.742_488_1,
        ],
    );
    // order_z = 1: linear between the slices.
    near(
        &apart(1, [3, 5, 5], 1)[..15],
        &[
            -4.0,
            4.811_671,
            2.242_471_5,
            -3.240_546_5,
            2.715_439_8,
            -2.765_348_6,
            2.201_102_3,
            1.811_547_9,
            -1.491_824_9,
            0.429_263_85,
            -0.913_371_5,
            -1.714_750_6,
            1.165_162_5,
            1.131_257_4,
            -3.0,
        ],
    );
}

#[derive(Debug, Clone)]
struct Case {
    from: [usize; 3],
    to: [usize; 3],
    rule: (u8, u8, Option<bool>),
    coarse: usize,
    values: Vec<f32>,
}

fn case() -> impl Strategy<Value = Case> {
    let rule = (
        prop_oneof![Just(0u8), Just(1), Just(3)],
        0u8..=1,
        prop_oneof![Just(None), Just(Some(true)), Just(Some(false))],
    );
    (prop::array::uniform3(1usize..40), prop::array::uniform3(1usize..40), rule, 0usize..3).prop_flat_map(
        |(from, to, rule, coarse)| {
            // Nowhere 0, so that nothing is cropped.
            prop::collection::vec(1f32..1000.0, from.iter().product::<usize>()).prop_map(move |values| Case {
                from,
                to,
                rule,
                coarse,
                values,
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Values stay in the range of the image, a constant image stays what it is, and equal sizes change nothing.
    #[test]
    fn range_constants_and_identity(c in case()) {
        let out = resampled(&c.values, c.from, c.to, c.coarse, c.rule);
        let range = |v: &[f32]| v.iter().fold((f32::MAX, f32::MIN), |(l, h), &x| (l.min(x), h.max(x)));
        let (whole, ours) = (range(&c.values), range(&out));
        prop_assert!(whole.0 <= ours.0 && ours.1 <= whole.1);
        let flat = vec![c.values[0]; c.values.len()];
        prop_assert!(resampled(&flat, c.from, c.to, c.coarse, c.rule).iter().all(|&v| v == c.values[0]));
        prop_assert_eq!(resampled(&c.values, c.from, c.from, c.coarse, c.rule), c.values);
    }

    /// Order 1 is linear in the image; order 0 only ever copies.
    #[test]
    fn linearity_and_copies(c in case()) {
        let other: Vec<f32> = c.values.iter().rev().copied().collect();
        let sum: Vec<f32> = c.values.iter().zip(&other).map(|(a, b)| a + b).collect();
        let run = |v: &[f32], order| resampled(v, c.from, c.to, c.coarse, (order, 0, c.rule.2));
        for ((a, b), s) in run(&c.values, 1).iter().zip(run(&other, 1)).zip(run(&sum, 1)) {
            prop_assert!((a + b - s).abs() < 1e-3);
        }
        prop_assert!(run(&c.values, 0).iter().all(|v| c.values.contains(v)));
    }
}
