//! Predictions against truths: numbers of nnU-Net's, surfaces by definition, files that do not depend on threads.

use std::path::Path;

use proptest::prelude::*;
use serde_json::Value;
use stunet::io::{self, Geometry, LabelData, Segmentation};
use stunet::nnunet::dataset::DatasetJson;
use stunet::nnunet::evaluate::surface::{Surfaces, compare_surfaces};
use stunet::nnunet::evaluate::{Class, CompareOptions, Folders};
use stunet::{Device, Event, Flow};

use crate::common::shared;

/// Every number of two JSON files, and every name of a file without its folder.
fn same(ours: &Value, theirs: &Value, at: &str) -> usize {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            assert!(a.keys().eq(b.keys()), "{at}: {:?} {:?}", a.keys(), b.keys());
            a.iter().map(|(k, v)| same(v, &b[k], &format!("{at}.{k}"))).sum()
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{at}");
            a.iter().zip(b).enumerate().map(|(i, (a, b))| same(a, b, &format!("{at}[{i}]"))).sum()
        }
        (Value::String(a), Value::String(b)) => {
            assert_eq!(Path::new(a).file_name(), Path::new(b).file_name(), "{at}");
            0
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() <= 1e-9 * b.abs().max(1.0), "{at}: {a} {b}");
            1
        }
        _ => {
            assert_eq!(ours, theirs, "{at}");
            1
        }
    }
}

/// `NaN`, which Python writes, as null.
fn json(text: &str) -> Value {
    serde_json::from_str(&text.replace("NaN", "null")).unwrap()
}

#[test]
fn golden_networks_evaluation_is_that_of_nnunet() {
    let Some(folder) = shared("golden/pipeline") else { return };
    let mut numbers = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let data = entry.unwrap().path();
        let Ok(theirs) = std::fs::read_to_string(data.join("evaluation/summary.json")) else { continue };
        let raw = data.join("raw");
        let dataset = DatasetJson::read(&raw.join("dataset.json")).unwrap();
        let predictions = data.join("predictions/plain");
        let folders = Folders::of_dataset(&raw.join("labelsTs"), &predictions, &dataset).unwrap();
        let found = folders.evaluate(&CompareOptions::default(), &Device::cpu(), &mut ()).unwrap();
        numbers += same(&json(&found.summary.to_json()), &json(&theirs), &data.display().to_string());
    }
    assert!(numbers > 200, "{numbers}");
}

fn map(labels: Vec<u8>, shape: [usize; 3], spacing: [f64; 3]) -> Segmentation {
    Segmentation::new(LabelData::U8(labels), Geometry::new(shape, spacing), Vec::new()).unwrap()
}

/// The definition, voxel by voxel and pair by pair.
fn by_definition(
    truth: &Segmentation,
    found: &Segmentation,
    label: u8,
    ignore: Option<u8>,
    tolerance: f64,
) -> [f64; 2] {
    let shape = truth.geometry.shape.map(|n| n as isize);
    let spacing = truth.geometry.spacing_mm;
    let index = |p: [isize; 3]| ((p[0] * shape[1] + p[1]) * shape[2] + p[2]) as usize;
    let ignored = |p: [isize; 3]| ignore.is_some_and(|l| truth.labels.get(index(p)) == u16::from(l));
    let surface = |seg: &Segmentation| {
        let mut out: Vec<[isize; 3]> = Vec::new();
        for i in 0..shape.iter().product::<isize>() {
            let p = [i / (shape[1] * shape[2]), i / shape[2] % shape[1], i % shape[2]];
            let is = |p: [isize; 3]| seg.labels.get(index(p)) == u16::from(label) && !ignored(p);
            let flat = |k: usize| shape[k] == 1 && shape != [1; 3];
            let open = (0..6).filter(|side| !flat(side / 2)).any(|side| {
                let mut to = p;
                to[side / 2] += if side % 2 == 0 { 1 } else { -1 };
                let inside = (0..3).all(|k| (0..shape[k]).contains(&to[k]));
                !inside || !is(to) && !ignored(to)
            });
            if is(p) && open {
                out.push(p);
            }
        }
        out
    };
    let (a, b) = (surface(truth), surface(found));
    if a.is_empty() || b.is_empty() {
        let exists = |seg: &Segmentation| {
            (0..seg.labels.len()).any(|i| {
                seg.labels.get(i) == u16::from(label) && ignore.is_none_or(|l| truth.labels.get(i) != u16::from(l))
            })
        };
        return if exists(truth) == exists(found) { [f64::NAN; 2] } else { [0.0, f64::INFINITY] };
    }
    let distances = |from: &[[isize; 3]], to: &[[isize; 3]]| {
        let distance = |p: &[isize; 3], q: &[isize; 3]| {
            (0..3).map(|k| ((p[k] - q[k]) as f64 * spacing[k]).powi(2)).sum::<f64>().sqrt()
        };
        let mut out: Vec<f64> =
            from.iter().map(|p| to.iter().map(|q| distance(p, q)).fold(f64::INFINITY, f64::min)).collect();
        out.sort_by(f64::total_cmp);
        out
    };
    let both = [distances(&a, &b), distances(&b, &a)];
    let near = both.iter().flatten().filter(|d| **d <= tolerance * (1.0 + 1e-6)).count();
    let percentile = |d: &[f64]| {
        let place = 0.95 * (d.len() - 1) as f64;
        let (low, high) = (d[place as usize], d[(place as usize + 1).min(d.len() - 1)]);
        low + (high - low) * place.fract()
    };
    [near as f64 / (a.len() + b.len()) as f64, percentile(&both[0]).max(percentile(&both[1]))]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn surfaces_are_their_definition(
        shape in [1usize..5, 1usize..8, 1usize..8],
        values in proptest::collection::vec(0u8..12, 2 * 4 * 7 * 7),
        dense: bool,
        ignores: bool,
        spacing in [0.4f64..3.0, 0.4f64..3.0, 0.4f64..3.0],
        tolerance in 0.0f64..4.0,
    ) {
        let n: usize = shape.iter().product();
        // Of few labels or of many, so that surfaces are small and large.
        let label = |v: &u8| if dense { u8::from(*v < 9) + u8::from(*v > 10) * 3 } else { v % 4 };
        let [truth, found] = [0, 1].map(|k| map(values[k * n..][..n].iter().map(label).collect(), shape, spacing));
        let ignore = ignores.then_some(3u8);
        for class in 1..3 {
            let expected = by_definition(&truth, &found, class, ignore, tolerance);
            let classes = [Class::label(u16::from(class))];
            let Surfaces { surface_dice, hausdorff_95_mm, .. } =
                compare_surfaces(&truth, &found, &classes, ignore.map(u16::from), tolerance).unwrap()[0];
            // Counts are exact, distances have the roundings of three squares, two sums, a root and an interpolation.
            prop_assert!(surface_dice == expected[0] || surface_dice.is_nan() && expected[0].is_nan());
            let close = (hausdorff_95_mm - expected[1]).abs() <= 16.0 * f64::EPSILON * expected[1];
            prop_assert!(close || hausdorff_95_mm.to_bits() == expected[1].to_bits(), "{hausdorff_95_mm} {expected:?}");
        }
    }
}

/// Balls of two labels, another size in each case, one of them missing in some predictions.
fn write_cases(folder: &Path, n: usize) {
    let shape = [9, 14, 17];
    for sub in ["truth", "found", "images"] {
        std::fs::create_dir_all(folder.join(sub)).unwrap();
    }
    let geometry = Geometry::new(shape, [2.0, 0.75, 0.75]);
    for case in 0..n {
        let ball = |shift: f64, second: bool| {
            let label = |i: usize| {
                let p = [i / (14 * 17), i / 17 % 14, i % 17].map(|v| v as f64);
                let within = |c: [f64; 3], r: f64| (0..3).map(|k| (p[k] - c[k]).powi(2)).sum::<f64>() < r * r;
                let radius = 2.2 + case as f64 / 4.0;
                if within([4.0, 5.0 + shift, 5.0], radius) {
                    1
                } else {
                    u8::from(second && within([4.0, 9.0, 12.0 - shift], radius)) * 2
                }
            };
            map((0..shape.iter().product()).map(label).collect(), shape, geometry.spacing_mm)
        };
        let name = format!("case_{case:02}.nii.gz");
        io::write_nifti(folder.join("truth").join(&name), &ball(0.0, true)).unwrap();
        io::write_nifti(folder.join("found").join(&name), &ball(case as f64 / 3.0, case % 4 != 3)).unwrap();
        let voxels = (0..shape.iter().product()).map(|i| i as f32).collect();
        let image = io::Image::new(vec![voxels], geometry.clone()).unwrap();
        io::write_image(folder.join("images").join(format!("case_{case:02}_0000.nii.gz")), &image).unwrap();
    }
}

#[test]
fn files_are_the_same_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    write_cases(dir.path(), 7);
    let [truth, found, images] = ["truth", "found", "images"].map(|n| dir.path().join(n));
    let folders = Folders::of_labels(&truth, &found, &[1, 2], None).unwrap();
    let texts = [1, 3].map(|threads| {
        let device = Device::cpu_with_threads(threads).unwrap();
        let mut cases = 0;
        let mut progress = |e: Event<'_>| {
            cases += usize::from(matches!(e, Event::Cases { .. }));
            Flow::Continue
        };
        let evaluation = folders.evaluate(&CompareOptions::default(), &device, &mut progress).unwrap();
        assert_eq!(cases, 7);
        #[cfg(feature = "picture")]
        let page = {
            let shown = device.install(|| folders.shown(&evaluation, Some(&images))).unwrap();
            evaluation.to_html(&shown).unwrap()
        };
        #[cfg(not(feature = "picture"))]
        let page = images.display().to_string();
        [evaluation.summary.to_json(), evaluation.to_csv(), page]
    });
    assert_eq!(texts[0], texts[1]);
    let [_, csv, page] = &texts[0];
    assert_eq!(csv.lines().count(), 1 + 7 * 2);
    assert!(csv.lines().next().unwrap().ends_with(",surface_dice_1mm,hausdorff_95_mm"), "{csv}");
    // The first prediction is the truth; the fourth lacks label 2.
    assert!(csv.lines().nth(1).unwrap().starts_with("case_00,1,label 1,1,1,"), "{csv}");
    assert!(csv.lines().nth(8).unwrap().starts_with("case_03,2,label 2,0,0,0,0,"), "{csv}");
    assert!(csv.lines().nth(8).unwrap().ends_with(",0,inf"), "{csv}");
    if cfg!(feature = "picture") {
        assert_eq!(page.matches("data:image/png;base64,").count(), 6);
        assert!(page.contains("Not a medical device") && page.contains("&infin;"));
        for external in ["http:", "https:", "<script", "<link", "url("] {
            assert!(!page.contains(external), "{external}");
        }
    }
}

#[test]
fn means_leave_out_what_is_no_number() {
    let dir = tempfile::tempdir().unwrap();
    write_cases(dir.path(), 5);
    let folders = Folders::of_labels(&dir.path().join("truth"), &dir.path().join("found"), &[1, 2, 7], None).unwrap();
    let found = folders.evaluate(&CompareOptions::default(), &Device::cpu(), &mut ()).unwrap();
    let means = found.class_means();
    assert_eq!((means[0].cases, means[1].cases, means[2].cases), (5, 5, 0));
    assert_eq!((means[0].in_one_only, means[1].in_one_only), (0, 1));
    assert!(means[1].hausdorff_95_mm.is_finite() && means[2].surface_dice.is_nan());
    assert!(means[0].dice > means[1].dice && means[0].dice < 1.0);
    assert!(found.summary.foreground_dice().is_nan());
}
