//! Cropping, transposing and normalising, on images small enough to check by hand.

use serde_json::json;
use stunet::Error;
use stunet::io::{Geometry, Image};
use stunet::nnunet::plans::InferencePlan;
use stunet::nnunet::preprocess::{Preprocessed, preprocess};

fn plan(rules: &str, channels: serde_json::Value, forward: [usize; 3]) -> InferencePlan {
    let mut backward = [0; 3];
    (0..3).for_each(|k| backward[forward[k]] = k);
    let rule = json!({"order": 3, "order_z": 0, "force_separate_z": null});
    serde_json::from_value(json!({
        "rules": rules, "dataset": "", "trainer": "", "configuration": "", "channels": channels,
        "labels": [], "decision": "argmax", "heads": 2, "patch": [32, 32, 32], "spacing_mm": [1.0, 1.0, 1.0],
        "transpose_forward": forward, "transpose_backward": backward,
        "strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], "mirror_axes": [],
        "resampling_data": rule, "resampling_probabilities": rule,
    }))
    .unwrap()
}

fn channel(normalization: &str, use_mask: bool) -> serde_json::Value {
    json!({"name": "MR", "normalization": normalization, "use_mask": use_mask, "intensity": null})
}

fn image(channels: Vec<Vec<f32>>, shape: [usize; 3]) -> Image {
    Image::new(channels, Geometry::new(shape, [1.0; 3])).unwrap()
}

/// One channel of 5x5x5 voxels: a shell of 2s around a hollow of zeros, one voxel of 8, all in a border of zeros.
fn shell() -> Vec<f32> {
    let mut v = vec![0.0; 125];
    for z in 1..4 {
        for y in 1..4 {
            for x in 1..4 {
                v[(z * 5 + y) * 5 + x] = if (z, y, x) == (2, 2, 2) { 0.0 } else { 2.0 };
            }
        }
    }
    v[(5 + 1) * 5 + 1] = 8.0;
    v[(2 * 5 + 2) * 5 + 4] = 0.0;
    v
}

fn moments(values: &[f32]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    (mean, (values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt())
}

#[test]
fn the_nonzero_box_is_kept_and_its_hollow_with_it() {
    let plan = plan("nnunet_v2", json!([channel("z_score", true)]), [0, 1, 2]);
    let done = preprocess(&image(vec![shell()], [5; 3]), &plan).unwrap();
    assert_eq!(done.properties.shape_before_cropping, [5; 3]);
    assert_eq!(done.properties.bbox, [[1, 4]; 3]);
    assert_eq!(done.properties.shape_after_cropping, [3; 3]);
    // The hollow belongs to the mask: 25 twos, one eight, one zero.
    let mean = 58.0 / 27.0_f64;
    let std = ((25.0 * 4.0 + 64.0) / 27.0 - mean * mean).sqrt();
    let expected = [(8.0 - mean) / std, -mean / std];
    assert!((done.data[0] - expected[0] as f32).abs() < 1e-6);
    assert!((done.data[13] - expected[1] as f32).abs() < 1e-6);
}

#[test]
fn outside_of_the_mask_stays_zero_only_where_the_mask_is_used() {
    let mut open = shell();
    // A voxel far off widens the box; what lies between is outside of the mask.
    open[0] = 5.0;
    let all = |use_mask, rules: &str| {
        let plan = plan(rules, json!([channel("z_score", use_mask)]), [0, 1, 2]);
        preprocess(&image(vec![open.clone()], [5; 3]), &plan).unwrap()
    };
    for rules in ["nnunet_v1", "nnunet_v2"] {
        let masked = all(true, rules);
        assert_eq!(masked.shape, [4; 3]);
        let inside: Vec<f32> = masked.data.iter().copied().filter(|&v| v != 0.0).collect();
        assert_eq!(inside.len(), 28, "27 of the shell and its hollow, and the far one");
        let (mean, std) = moments(&inside);
        assert!(mean.abs() < 1e-6 && (std - 1.0).abs() < 1e-6);
        let (mean, std) = moments(&all(false, rules).data);
        assert!(mean.abs() < 1e-6 && (std - 1.0).abs() < 1e-6);
    }
}

#[test]
fn schemes() {
    let values: Vec<f32> = (0..27).map(|v| v as f32 * 10.0).collect();
    let mut first = values.clone();
    first[0] = 1.0;
    let run = |channel: serde_json::Value| {
        preprocess(&image(vec![first.clone()], [3; 3]), &plan("nnunet_v2", json!([channel]), [0, 1, 2])).unwrap().data
    };
    let ct = json!({"name": "CT", "normalization": "ct", "use_mask": false, "intensity":
        {"mean": 100.0, "std": 50.0, "percentile_00_5": 15.0, "percentile_99_5": 205.0}});
    let ct = run(ct);
    assert_eq!((ct[0], ct[10], ct[26]), ((15.0 - 100.0) / 50.0, 0.0, (205.0 - 100.0) / 50.0));
    assert_eq!(run(channel("none", false)), first);
    let unit = run(channel("rescale_to01", false));
    assert_eq!((unit[0], unit[26]), (0.0, 1.0));
    let error = preprocess(
        &image(vec![first.clone()], [3; 3]),
        &plan("nnunet_v2", json!([channel("rgb_to01", false)]), [0, 1, 2]),
    );
    assert!(error.unwrap_err().to_string().contains("0 to 255"));
    first.iter_mut().for_each(|v| *v = v.min(255.0));
    let rgb =
        preprocess(&image(vec![first], [3; 3]), &plan("nnunet_v2", json!([channel("rgb_to01", false)]), [0, 1, 2]));
    assert_eq!(rgb.unwrap().data[26], 1.0);
}

#[test]
fn axes_are_permuted_like_numpy_transpose() {
    let shape = [2, 3, 4];
    let values: Vec<f32> = (1..=24).map(|v| v as f32).collect();
    for forward in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        for rules in ["nnunet_v1", "nnunet_v2"] {
            let plan = plan(rules, json!([channel("none", false)]), forward);
            let done = preprocess(&image(vec![values.clone()], shape), &plan).unwrap();
            assert_eq!(done.shape, forward.map(|a| shape[a]));
            assert_eq!(done.properties.spacing_mm, [1.0; 3]);
            let at = |d: &Preprocessed, i: [usize; 3]| d.data[(i[0] * d.shape[1] + i[1]) * d.shape[2] + i[2]];
            for (i, &v) in values.iter().enumerate() {
                let here = [i / 12, i / 4 % 3, i % 4];
                assert_eq!(at(&done, forward.map(|a| here[a])), v, "{forward:?}");
            }
        }
    }
}

#[test]
fn a_box_of_all_channels_together() {
    let (mut a, mut b) = (vec![0.0; 64], vec![0.0; 64]);
    a[16 + 4 + 1] = 3.0;
    b[2 * 16 + 2 * 4 + 2] = 3.0;
    let plan = plan("nnunet_v2", json!([channel("none", false), channel("none", false)]), [0, 1, 2]);
    let done = preprocess(&image(vec![a, b], [4; 3]), &plan).unwrap();
    assert_eq!((done.channels, done.properties.bbox), (2, [[1, 3]; 3]));
    assert_eq!((done.data[0], done.data[8 + 7]), (3.0, 3.0));
}

#[test]
fn an_image_of_zeros_is_kept_whole_by_v2_and_refused_by_v1() {
    let zeros = image(vec![vec![0.0; 27]], [3; 3]);
    let done = preprocess(&zeros, &plan("nnunet_v2", json!([channel("z_score", true)]), [0, 1, 2])).unwrap();
    assert_eq!((done.shape, done.data), ([3; 3], vec![0.0; 27]));
    let error = preprocess(&zeros, &plan("nnunet_v1", json!([channel("z_score", false)]), [0, 1, 2])).unwrap_err();
    assert!(error.to_string().contains("every voxel is 0"));
}

#[test]
fn a_flat_image_is_not_divided_by_zero() {
    for rules in ["nnunet_v1", "nnunet_v2"] {
        let plan = plan(rules, json!([channel("z_score", false)]), [0, 1, 2]);
        let done = preprocess(&image(vec![vec![7.0; 27]], [3; 3]), &plan).unwrap();
        assert_eq!(done.data, vec![0.0; 27]);
    }
}

#[test]
fn values_that_are_no_numbers() {
    let mut values = vec![2.0; 27];
    values[3] = f32::NAN;
    values[4] = f32::NAN;
    let run = |rules: &str, v: &[f32]| {
        preprocess(&image(vec![v.to_vec()], [3; 3]), &plan(rules, json!([channel("none", false)]), [0, 1, 2]))
    };
    let error = run("nnunet_v2", &values).unwrap_err().to_string();
    assert_eq!(error, "the image: channel 0 (MR): 2 voxels are not finite numbers");
    let done = run("nnunet_v1", &values).unwrap().data;
    assert_eq!((done[2], done[3], done[4], done[5]), (2.0, 0.0, 0.0, 2.0));
    values[5] = f32::INFINITY;
    assert!(run("nnunet_v1", &values).unwrap_err().to_string().contains("1 voxels are not finite"));
}

#[test]
fn values_too_far_apart_for_f32_are_refused() {
    let mut values = vec![0.5; 27];
    (values[0], values[1]) = (-3e38, 3e38);
    for scheme in ["rescale_to01", "z_score"] {
        let plan = plan("nnunet_v2", json!([channel(scheme, false)]), [0, 1, 2]);
        match preprocess(&image(vec![values.clone()], [3; 3]), &plan) {
            Ok(done) => assert!(done.data.iter().all(|v| v.is_finite()), "{scheme}"),
            Err(e) => assert!(matches!(e, Error::Input { .. }) && e.to_string().contains("too far apart"), "{e}"),
        }
    }
    let plan = plan("nnunet_v2", json!([channel("rescale_to01", false)]), [0, 1, 2]);
    assert!(preprocess(&image(vec![values], [3; 3]), &plan).is_err());
}

#[test]
fn errors_name_what_was_expected() {
    let two = plan("nnunet_v2", json!([channel("none", false), channel("none", false)]), [0, 1, 2]);
    let error = preprocess(&image(vec![vec![1.0; 27]], [3; 3]), &two).unwrap_err();
    assert!(matches!(error, Error::Input { .. }) && error.exit_code() == 3);
    assert_eq!(error.to_string(), "the image: 1 channels, the model expects 2 (MR, MR)");

    let ct = plan("nnunet_v2", json!([channel("ct", false)]), [0, 1, 2]);
    let error = preprocess(&image(vec![vec![1.0; 27]], [3; 3]), &ct).unwrap_err().to_string();
    assert!(error.contains("channel 0 (MR)") && error.contains("intensity statistics"), "{error}");

    let mut twisted = plan("nnunet_v2", json!([channel("none", false)]), [0, 1, 2]);
    twisted.transpose_forward = [0, 0, 7];
    let error = preprocess(&image(vec![vec![1.0; 27]], [3; 3]), &twisted).unwrap_err().to_string();
    assert!(error.contains("transposes [0, 0, 7]"), "{error}");
}

#[test]
fn threads_change_nothing() {
    let shape = [20, 33, 41];
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| ((i * 7919) % 1009) as f32).collect();
    let mut plan = plan("nnunet_v2", json!([channel("z_score", true)]), [1, 0, 2]);
    plan.spacing_mm = [0.7, 1.3, 1.1].map(Some);
    let image = image(vec![values], shape);
    let run = |threads| {
        stunet::Device::cpu_with_threads(threads).unwrap().install(|| preprocess(&image, &plan)).unwrap().data
    };
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let one = bits(run(1));
    assert!(one == bits(run(2)) && one == bits(run(7)));
}
