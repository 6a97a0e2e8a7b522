use super::*;
use crate::base::rng::Rng;
use crate::nnunet::dataset::Reader;
use crate::nnunet::preprocess::preprocess;
use crate::nnunet::preprocess::resample::{Held, resample};

/// A dense volume as a source of planes; notes what it was asked for.
struct Dense {
    /// (z, y, x, channel).
    values: Vec<f32>,
    shape: [usize; 3],
    channels: usize,
    asked: Vec<usize>,
}

impl Dense {
    fn random(rng: &mut Rng, shape: [usize; 3], channels: usize) -> Self {
        let n = shape.iter().product::<usize>() * channels;
        Self { values: (0..n).map(|_| rng.normal() as f32).collect(), shape, channels, asked: Vec::new() }
    }

    fn volume(&self, channel: usize) -> Vec<f32> {
        self.values.iter().skip(channel).step_by(self.channels).copied().collect()
    }

    fn map(&self, channels: usize, f: impl Fn(&[f32], &mut [f32])) -> Self {
        let mut values = vec![0.0; self.values.len() / self.channels * channels];
        self.values.chunks(self.channels).zip(values.chunks_mut(channels)).for_each(|(i, o)| f(i, o));
        Self { values, shape: self.shape, channels, asked: Vec::new() }
    }
}

impl Planes for Dense {
    fn channels(&self) -> usize {
        self.channels
    }

    fn shape(&self) -> [usize; 3] {
        self.shape
    }

    fn plane(&mut self, z: usize, out: &mut [f32]) -> Result<()> {
        assert!(self.asked.last().is_none_or(|&last| last < z), "planes come in rising order");
        self.asked.push(z);
        out.copy_from_slice(&self.values[z * out.len()..][..out.len()]);
        Ok(())
    }
}

fn plan(rules: Rules, forward: [usize; 3], spacing: [f64; 3], heads: usize, decision: Decision) -> InferencePlan {
    let mut backward = [0; 3];
    (0..3).for_each(|k| backward[forward[k]] = k);
    let linear = Resampling { order: 1, order_z: 0, force_separate_z: None };
    let channel = serde_json::json!({"name": "CT", "normalization": "none", "use_mask": false, "intensity": null});
    InferencePlan {
        rules,
        dataset: String::new(),
        trainer: String::new(),
        configuration: String::new(),
        reader: Reader::default(),
        channels: vec![serde_json::from_value(channel).unwrap()],
        labels: Vec::new(),
        decision,
        heads,
        patch: [32; 3],
        spacing_mm: spacing.map(Some),
        transpose_forward: forward,
        transpose_backward: backward,
        strides: [[2; 3]; 5],
        mirror_axes: Vec::new(),
        resampling_data: linear,
        resampling_probabilities: linear,
        keep_largest: Vec::new(),
        previous: None,
    }
}

/// What preprocessing says of an image of `shape` that is 1 inside of `bbox` and 0 elsewhere (not transposed).
fn prepared(
    plan: &InferencePlan,
    shape: [usize; 3],
    bbox: [[usize; 2]; 3],
    spacing: [f64; 3],
) -> (Properties, [usize; 3]) {
    let inside = |i: usize| {
        let at = [i / (shape[1] * shape[2]), i / shape[2] % shape[1], i % shape[2]];
        (0..3).all(|k| (bbox[k][0]..bbox[k][1]).contains(&at[k]))
    };
    let values = (0..shape.iter().product()).map(|i| f32::from(u8::from(inside(i)))).collect();
    let image = crate::io::Image::new(vec![values], crate::io::Geometry::new(shape, spacing)).unwrap();
    let prepared = preprocess(&image, plan).unwrap();
    (prepared.properties, prepared.shape)
}

/// All scores of the image, outside of the box `None`: every volume resampled whole, the definition.
fn dense(scores: &Dense, plan: &InferencePlan, p: &Properties, apart: Option<usize>) -> Vec<Option<Vec<f32>>> {
    let to = p.shape_after_cropping;
    let volumes: Vec<Vec<f32>> = (0..scores.channels)
        .map(|c| {
            let (array, mut out) = (scores.volume(c), vec![0.0; to.iter().product()]);
            let held = Held { array: &array, view: View::whole(scores.shape) };
            resample(&held, to, &plan.resampling_probabilities, apart, Isa::detect(), &mut out).unwrap();
            out
        })
        .collect();
    let shape: [usize; 3] = std::array::from_fn(|k| p.shape_before_cropping[plan.transpose_backward[k]]);
    let mut out = vec![None; shape.iter().product()];
    for i in 0..to.iter().product() {
        let inner = [i / (to[1] * to[2]), i / to[2] % to[1], i % to[2]];
        let mut at = [0; 3];
        for k in 0..3 {
            at[plan.transpose_forward[k]] = inner[k] + p.bbox[k][0];
        }
        out[(at[0] * shape[1] + at[1]) * shape[2] + at[2]] = Some(volumes.iter().map(|v| v[i]).collect());
    }
    out
}

/// `None` where rounding may decide.
fn expected(scores: &[f32], winner: Winner<'_>) -> Option<u16> {
    let mut sorted = scores.to_vec();
    sorted.sort_by(f32::total_cmp);
    let near = match winner {
        Winner::Largest => sorted.len() > 1 && sorted[sorted.len() - 1] - sorted[sorted.len() - 2] < 1e-4,
        Winner::Painted { threshold, .. } => scores.iter().any(|s| (s - threshold).abs() < 1e-4),
    };
    (!near).then(|| winner.of(scores))
}

fn compare(labels: &LabelData, reference: &[Option<Vec<f32>>], winner: Winner<'_>) {
    assert_eq!(labels.len(), reference.len());
    let mut near = 0;
    for (i, scores) in reference.iter().enumerate() {
        match scores.as_ref().map(|s| expected(s, winner)) {
            None => assert_eq!(labels.get(i), 0, "outside of the nonzero region"),
            Some(None) => near += 1,
            Some(Some(label)) => assert_eq!(labels.get(i), label, "voxel {i}"),
        }
    }
    assert!(near * 50 < labels.len(), "{near} of {} voxels are undecided", labels.len());
}

const SHAPE: [usize; 3] = [14, 19, 23];
const BOX: [[usize; 2]; 3] = [[1, 13], [0, 17], [3, 23]];

#[test]
fn labels_are_those_of_the_dense_way() {
    let mut rng = Rng::new(1, 7);
    for forward in [[0, 1, 2], [1, 0, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]] {
        for spacing in [[1.0, 1.2, 0.9], [4.0, 1.0, 1.0], [1.0, 4.0, 1.1], [1.3, 1.0, 4.0]] {
            for (heads, regions) in [(3, false), (21, false), (4, true), (300, false)] {
                if heads > 255 && (forward != [2, 0, 1] || spacing[0] != 4.0) {
                    continue;
                }
                let paint = [7u16, 2, 9, 4];
                let decision = if regions { Decision::Regions { paint: paint.to_vec() } } else { Decision::Argmax };
                let mut plan = plan(Rules::NnunetV2, forward, [1.5, 1.1, 1.3], heads, decision);
                plan.mirror_axes.clear();
                let (p, shape) = prepared(&plan, SHAPE, BOX, spacing);
                let mut planes = Dense::random(&mut rng, shape, heads);
                let apart = separate_axis(&plan.resampling_probabilities, [1.5, 1.1, 1.3], forward.map(|a| spacing[a]));
                assert_eq!(apart.map(|a| forward[a]), spacing.iter().position(|&s| s == 4.0));
                let reference = dense(&planes, &plan, &p, apart);
                let export =
                    Export { plan: &plan, properties: &p, scores: Scores::Logits, head: None, isa: Isa::detect() };
                let labels = export.labels(&mut planes).unwrap();
                assert_eq!(matches!(labels, LabelData::U16(_)), heads == 300);
                compare(&labels, &reference, export.winner());
            }
        }
    }
}

#[test]
fn a_head_may_come_after_the_interpolation() {
    let mut rng = Rng::new(2, 7);
    for (features, heads, regions, spacing, before) in [
        (16, 30, false, [1.5, 1.1, 1.3], false),
        (5, 3, true, [1.5, 1.1, 1.3], false),
        (32, 2, false, [1.5, 1.1, 1.3], false),
        // A plane of the network's grid has a third of the image's voxels: scores are interpolated after all.
        (16, 30, false, [1.5, 1.9, 3.1], true),
        (32, 2, false, [1.5, 1.9, 3.1], true),
        (16, 3, false, [0.7, 2.0, 2.0], true),
        (16, 4, true, [1.5, 1.9, 3.1], false),
    ] {
        let paint: Vec<u16> = (1..=heads as u16).collect();
        let decision = if regions { Decision::Regions { paint } } else { Decision::Argmax };
        let plan = plan(Rules::NnunetV2, [1, 0, 2], spacing, heads, decision);
        let (p, shape) = prepared(&plan, SHAPE, BOX, [1.0, 0.7, 2.0]);
        let mut planes = Dense::random(&mut rng, shape, features);
        let weight: Vec<f32> = (0..features * heads).map(|_| rng.normal() as f32).collect();
        let bias: Vec<f32> = (0..heads).map(|_| rng.normal() as f32).collect();
        let head = LinearHead::new(&weight, &bias).unwrap();
        let mut scores = planes.map(heads, |i, o| head.apply(i, o));
        let reference = dense(&scores, &plan, &p, None);
        for &isa in Isa::available() {
            planes.asked.clear();
            scores.asked.clear();
            let with = Export { plan: &plan, properties: &p, scores: Scores::Logits, head: Some(&head), isa };
            let without = Export { head: None, ..with };
            let grid = Grid::new(shape, p.shape_after_cropping, &plan.resampling_probabilities, None).unwrap();
            assert_eq!(with.scores_first(&head, shape, &grid), before, "{shape:?}");
            compare(&with.labels(&mut planes).unwrap(), &reference, with.winner());
            compare(&without.labels(&mut scores).unwrap(), &reference, with.winner());
        }
        let export = Export { plan: &plan, properties: &p, scores: Scores::Logits, head: None, isa: Isa::Scalar };
        assert!(export.labels(&mut planes).is_err(), "features are not scores");
    }
}

#[test]
fn probabilities_fill_the_image_and_agree_with_the_labels() {
    let mut rng = Rng::new(3, 7);
    for regions in [false, true] {
        let decision = if regions { Decision::Regions { paint: vec![1, 2, 3] } } else { Decision::Argmax };
        let plan = plan(Rules::NnunetV2, [2, 0, 1], [1.5, 1.1, 1.3], 3, decision);
        let (p, shape) = prepared(&plan, SHAPE, BOX, [1.0, 0.7, 2.0]);
        let mut planes = Dense::random(&mut rng, shape, 3);
        let reference = dense(&planes, &plan, &p, None);
        let export = Export { plan: &plan, properties: &p, scores: Scores::Logits, head: None, isa: Isa::detect() };
        let (labels, found) = export.labels_and_probabilities(&mut planes).unwrap();
        assert_eq!((found.shape, found.channels), (SHAPE, 3));
        compare(&labels, &reference, export.winner());
        let n = labels.len();
        for (i, scores) in reference.iter().enumerate() {
            let ours = [found.values[i], found.values[n + i], found.values[2 * n + i]];
            let theirs: Vec<f32> = match scores {
                None => vec![f32::from(u8::from(!regions)), 0.0, 0.0],
                Some(s) if regions => s.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect(),
                Some(s) => {
                    let sum: f32 = s.iter().map(|v| v.exp()).sum();
                    s.iter().map(|v| v.exp() / sum).collect()
                }
            };
            assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-5), "{ours:?} {theirs:?}");
        }
    }
}

#[test]
fn v1_exports_probabilities_of_the_crop_and_labels_fast() {
    let mut rng = Rng::new(4, 7);
    let plan = plan(Rules::NnunetV1, [1, 0, 2], [1.5; 3], 4, Decision::Argmax);
    let (p, shape) = prepared(&plan, SHAPE, BOX, [1.0, 0.7, 2.0]);
    let mut planes = Dense::random(&mut rng, shape, 4);
    let reference = dense(&planes, &plan, &p, None);
    let export = Export { plan: &plan, properties: &p, scores: Scores::Probabilities, head: None, isa: Isa::detect() };
    let (labels, found) = export.labels_and_probabilities(&mut planes).unwrap();
    compare(&labels, &reference, Winner::Largest);
    assert_eq!(found.shape, BOX.map(|[lo, hi]| hi - lo));
    let inside: Vec<&Vec<f32>> = reference.iter().flatten().collect();
    let n = inside.len();
    for (i, scores) in inside.iter().enumerate() {
        assert!((0..4).all(|c| (found.values[c * n + i] - scores[c]).abs() < 1e-5));
    }
    for order in [0, 1] {
        planes.asked.clear();
        let fast = export.labels_fast(&mut planes, order).unwrap();
        assert_eq!(planes.asked, (0..shape[0]).collect::<Vec<_>>());
        let coarse: Vec<u8> = planes.values.chunks(4).map(|v| Winner::Largest.of(v) as u8).collect();
        let rule = Resampling { order, order_z: 0, force_separate_z: None };
        let fine = resample_labels(&coarse, shape, p.shape_after_cropping, &rule, None, Vote::Half).unwrap();
        let counts = |v: &mut dyn Iterator<Item = u16>| v.fold([0; 4], |mut t, l| (t[usize::from(l)] += 1, t).1);
        let (mut a, b) = (counts(&mut fast.iter()), counts(&mut fine.iter().map(|&l| u16::from(l))));
        a[0] -= fast.len() - fine.len();
        assert_eq!(a, b);
    }
}

#[test]
fn planes_without_weight_are_left_out_and_threads_change_nothing() {
    let mut rng = Rng::new(5, 7);
    let plan = plan(Rules::NnunetV2, [0, 1, 2], [0.3, 0.9, 1.0], 20, Decision::Argmax);
    let (p, shape) = prepared(&plan, [9, 40, 30], [[0, 9], [0, 40], [0, 30]], [0.9, 1.0, 1.0]);
    assert_eq!(shape, [27, 44, 30]);
    let mut planes = Dense::random(&mut rng, shape, 20);
    let export = Export { plan: &plan, properties: &p, scores: Scores::Logits, head: None, isa: Isa::detect() };
    let mut runs = Vec::new();
    for threads in [1, 2, 7] {
        planes.asked.clear();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        runs.push(pool.install(|| export.labels(&mut planes)).unwrap());
        // Three to one: every middle plane alone.
        assert_eq!(planes.asked, (0..9).map(|z| 3 * z + 1).collect::<Vec<_>>());
    }
    assert!(runs.windows(2).all(|w| w[0] == w[1]));
}

#[test]
fn threads_change_nothing_where_scores_are_interpolated() {
    let mut rng = Rng::new(6, 7);
    let plan = plan(Rules::NnunetV2, [0, 1, 2], [1.0, 2.0, 2.0], 20, Decision::Argmax);
    // More rows than a band has.
    let (p, shape) = prepared(&plan, [3, 90, 40], [[0, 3], [0, 90], [0, 40]], [1.0; 3]);
    let weight: Vec<f32> = (0..16 * 20).map(|_| rng.normal() as f32).collect();
    let head = LinearHead::new(&weight, &[0.1; 20]).unwrap();
    let mut planes = Dense::random(&mut rng, shape, 16);
    let export = Export { plan: &plan, properties: &p, scores: Scores::Logits, head: Some(&head), isa: Isa::detect() };
    let mut runs = Vec::new();
    for threads in [1, 2, 7] {
        planes.asked.clear();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        runs.push(pool.install(|| export.labels(&mut planes)).unwrap());
    }
    assert!(runs.windows(2).all(|w| w[0] == w[1]));
}
