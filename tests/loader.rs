//! Batches: the same for any number of threads, from the right places, and errors that arrive.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stunet::nnunet::augment::AugmentConfig;
use stunet::nnunet::loader::{Loader, LoaderConfig, Oversampling, Sampler};
use stunet::nnunet::training_case::{ClassKey, ClassLocations, TrainingCase};
use stunet::{Error, Result};

use crate::augment::Case;

fn cases(n: usize) -> Vec<Arc<dyn TrainingCase>> {
    let one = |i| -> Arc<dyn TrainingCase> {
        let mut case = Case::random([9 + i, 14, 11 + 2 * i], 2, i as u64);
        let voxels = (0..40).map(|k| [k % 9, k % 14, k % 11]).collect();
        case.locations.classes = vec![(ClassKey::Label(1), voxels), (ClassKey::Label(2), Vec::new())];
        Arc::new(case)
    };
    (0..n).map(one).collect()
}

fn config(workers: usize) -> LoaderConfig {
    let augment = AugmentConfig::new(&[8, 10, 9], &[true, false]).unwrap();
    LoaderConfig { iterations: 3, workers, ahead: workers + 1, seed: 11, ..LoaderConfig::training(augment, 2) }
}

type Bytes = (Vec<f32>, Vec<u16>, Vec<usize>);

fn take(loader: &mut Loader, n: usize) -> Vec<Bytes> {
    let one = |_| {
        let batch = loader.next().unwrap();
        assert_eq!((batch.image_dims(), batch.target_dims()), ([2, 2, 8, 10, 9], [2, 8, 10, 9]));
        (batch.image.clone(), batch.target.clone(), batch.cases.clone())
    };
    (0..n).map(one).collect()
}

#[test]
fn threads_and_jumps_change_no_byte() {
    let all = take(&mut Loader::new(cases(4), config(1)).unwrap(), 12);
    assert!(all.windows(2).all(|w| w[0].0 != w[1].0));
    for workers in [2, 5] {
        assert!(take(&mut Loader::new(cases(4), config(workers)).unwrap(), 12) == all, "{workers} threads");
    }
    let mut loader = Loader::new(cases(4), config(2)).unwrap();
    for (epoch, iteration) in [(2, 1), (0, 0), (0, 2), (1, 0), (0, 5), (3, 2)] {
        loader.seek(epoch, iteration);
        let at = (epoch * 3 + iteration) as usize;
        assert!(take(&mut loader, 1) == all[at..=at], "{epoch}, {iteration}");
    }
    // Another seed is another run.
    let mut other = Loader::new(cases(4), LoaderConfig { seed: 12, ..config(1) }).unwrap();
    assert!(take(&mut other, 3) != all[..3]);
}

#[test]
fn memory_comes_back() {
    let mut loader = Loader::new(cases(2), LoaderConfig { ahead: 2, ..config(1) }).unwrap();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..40 {
        seen.insert(loader.next().unwrap().image.as_ptr() as usize);
    }
    assert!(seen.len() <= 4, "{} buffers", seen.len());
    // Batches may outlive their loader.
    let batch = loader.next().unwrap();
    drop(loader);
    assert_eq!(batch.image.len(), 2 * 2 * 720);
}

/// A case that cannot be read from the given crop on.
struct Broken(Case, AtomicUsize, bool);

impl TrainingCase for Broken {
    fn channels(&self) -> usize {
        self.0.channels()
    }

    fn shape(&self) -> [usize; 3] {
        self.0.shape()
    }

    fn classes(&self) -> Vec<(&ClassKey, usize)> {
        self.0.classes()
    }

    fn location(&self, class: usize, at: usize) -> Result<[u32; 3]> {
        self.0.location(class, at)
    }

    fn crop(&self, lower: [i64; 3], size: [usize; 3], data: &mut [f32], labels: &mut [i16]) -> Result<()> {
        if self.1.fetch_add(1, Ordering::SeqCst) == 3 {
            assert!(!self.2, "no such crop");
            return Err(Error::Usage { what: "case_7: damaged".into() });
        }
        self.0.crop(lower, size, data, labels)
    }
}

#[test]
fn errors_and_panics_arrive() {
    for panics in [false, true] {
        let case = Broken(Case::random([12; 3], 1, 1), AtomicUsize::new(0), panics);
        let config = LoaderConfig { workers: 1, ..LoaderConfig::validation([8; 3], 2) };
        let mut loader = Loader::new(vec![Arc::new(case)], config).unwrap();
        assert!(loader.next().is_ok());
        let e = loader.next().unwrap_err().to_string();
        assert!(e.contains(if panics { "iteration 1: no such crop" } else { "case_7: damaged" }), "{e}");
        assert!(loader.next().is_ok());
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let message = |cases, config| Loader::new(cases, config).unwrap_err().to_string();
    assert!(message(Vec::new(), config(1)).contains("no cases"));
    assert!(message(cases(1), config(0)).contains("workers 0"));
    assert!(message(cases(1), LoaderConfig { batch: 0, ..config(1) }).contains("batch 0"));
    assert!(message(cases(1), LoaderConfig { patch: [8; 3], ..config(1) }).contains("another patch"));
    assert!(message(cases(1), LoaderConfig { previous: vec![1], ..config(1) }).contains("stage before"));
    assert!(message(cases(1), LoaderConfig { batch: usize::MAX / 8, ..config(1) }).contains("too large"));
    let mut mixed = cases(1);
    mixed.push(Arc::new(Case::random([9; 3], 1, 1)));
    assert!(message(mixed, config(1)).contains("case 1 has 1 channels"));
}

/// Initial patch, patch, shape of the case, and the first voxels that the patch may have, both ends included.
type Bounds = ([usize; 3], [usize; 3], [usize; 3], [[i64; 2]; 3]);

/// Bounds that nnU-Net's `get_bbox` draws from.
#[rustfmt::skip]
const BOUNDS: &[Bounds] = &[
    ([205, 205, 205], [128, 128, 128], [200, 190, 60], [[-39, 34], [-39, 24], [-73, -72]]),
    ([205, 205, 205], [128, 128, 128], [205, 206, 300], [[-39, 39], [-39, 40], [-39, 134]]),
    ([12, 13, 14], [8, 8, 8], [3, 20, 9], [[-5, -4], [-3, 10], [-3, -2]]),
    ([12, 13, 14], [12, 13, 14], [12, 13, 14], [[0, 0], [0, 0], [0, 0]]),
    ([12, 13, 14], [12, 13, 14], [11, 10, 20], [[-1, 0], [-2, -1], [0, 6]]),
    ([1, 602, 602], [1, 512, 512], [40, 500, 1000], [[0, 39], [-51, -51], [-45, 443]]),
    ([1, 24, 25], [1, 20, 20], [1, 7, 8], [[0, 0], [-9, -8], [-9, -8]]),
    ([159, 257, 200], [64, 160, 160], [64, 161, 500], [[-48, -47], [-49, -47], [-20, 320]]),
];

#[test]
fn bounds_are_nnunets() {
    for (initial, patch, shape, bounds) in BOUNDS {
        let sampler = Sampler::new(*initial, *patch, 2, Oversampling::LastOfBatch(0.33));
        assert_eq!(sampler.bounds(*shape), *bounds, "{initial:?} {shape:?}");
    }
}

/// A case whose values are the numbers of its voxels from 1 on, beyond it 0.
fn numbered(shape: [usize; 3], classes: Vec<(ClassKey, Vec<[u32; 3]>)>) -> Arc<dyn TrainingCase> {
    let n: usize = shape.iter().product();
    let image = (1..=n).map(|i| i as f32).collect();
    Arc::new(Case { shape, image, labels: vec![0; n], locations: ClassLocations { classes } })
}

/// First voxels of patches and their positions in the batch.
fn lowers(cases: Vec<Arc<dyn TrainingCase>>, config: LoaderConfig, batches: usize) -> Vec<(usize, usize, [i64; 3])> {
    let shapes: Vec<[usize; 3]> = cases.iter().map(|c| c.shape()).collect();
    let mut loader = Loader::new(cases, config).unwrap();
    let mut out = Vec::new();
    for _ in 0..batches {
        let batch = loader.next().unwrap();
        let volume: usize = batch.patch.iter().product();
        for (position, patch) in batch.image.chunks_exact(volume).enumerate() {
            let (at, value) = patch.iter().enumerate().find(|(_, v)| **v != 0.0).unwrap();
            let ([_, h, w], i) = (shapes[batch.cases[position]], *value as usize - 1);
            let [_, ph, pw] = batch.patch;
            let voxel = [i / (h * w), i / w % h, i % w];
            let inside = [at / (ph * pw), at / pw % ph, at % pw];
            let lower = std::array::from_fn(|k| voxel[k] as i64 - inside[k] as i64);
            out.push((batch.cases[position], position, lower));
        }
    }
    out
}

fn near(what: &str, hits: usize, n: usize, p: f64) {
    let error = (p * (1.0 - p) / n as f64).sqrt();
    assert!((hits as f64 / n as f64 - p).abs() <= 3.0 * error, "{what}: {hits} of {n}, expected {p}");
}

#[test]
fn patches_are_from_everywhere() {
    let sizes = LoaderConfig { workers: 2, seed: 3, ..LoaderConfig::validation([4, 5, 3], 3) };
    let cases = || vec![numbered([7, 5, 3], vec![]), numbered([3, 9, 8], vec![]), numbered([20, 6, 4], vec![])];
    let found = lowers(cases(), sizes.clone(), 3000);
    let sampler = Sampler::new([4, 5, 3], [4, 5, 3], 3, Oversampling::LastOfBatch(0.33));
    for (i, case) in cases().iter().enumerate() {
        let here: Vec<[i64; 3]> = found.iter().filter(|f| f.0 == i).map(|f| f.2).collect();
        near("case", here.len(), found.len(), 1.0 / 3.0);
        for (k, [low, high]) in sampler.bounds(case.shape()).into_iter().enumerate() {
            let places = (high - low + 1) as f64;
            for place in low..=high {
                near("place", here.iter().filter(|l| l[k] == place).count(), here.len(), 1.0 / places);
            }
        }
    }
}

#[test]
fn foreground_is_where_it_is_wanted() {
    let voxels = |z: u32| (0..5).map(|i| [z, i, 2 * i]).collect::<Vec<_>>();
    let classes = vec![
        (ClassKey::Label(1), voxels(1)),
        (ClassKey::Label(2), Vec::new()),
        (ClassKey::Region(vec![1, 2]), voxels(8)),
    ];
    let annotated = ClassKey::Region(vec![-1, 0, 1, 2]);
    let base = LoaderConfig { workers: 2, seed: 4, ..LoaderConfig::validation([4, 4, 4], 4) };
    // Of four the last one; of classes with voxels each as often; a voxel in the middle, but never before the first bound.
    let found = lowers(vec![numbered([10, 12, 14], classes.clone())], base.clone(), 1500);
    let forced: Vec<[i64; 3]> = found.iter().filter(|f| f.1 == 3).map(|f| f.2).collect();
    let expected = |z: i64, i: i64| [(z - 2).max(0), (i - 2).max(0), (2 * i - 2).max(0)];
    assert!(forced.iter().all(|l| (0..5).any(|i| *l == expected(1, i) || *l == expected(8, i))));
    near("class", forced.iter().filter(|l| l[0] == 0).count(), forced.len(), 0.5);
    for i in 3..5 {
        near("voxel", forced.iter().filter(|l| l[2] == 2 * i - 2).count(), forced.len(), 0.2);
    }
    let others: Vec<_> = found.iter().filter(|f| f.1 < 3).collect();
    near("others", others.iter().filter(|f| f.2[1] == 8).count(), others.len(), 1.0 / 9.0);
    // Each with the probability.
    let often = LoaderConfig { oversampling: Oversampling::Probability(0.33), ..base.clone() };
    // In planes 7 to 9 no voxel of the class begins a patch by chance.
    let far = vec![(ClassKey::Label(1), vec![[9, 11, 13]])];
    let found = lowers(vec![numbered([10, 12, 14], far)], often, 1500);
    near("forced", found.iter().filter(|f| f.2 == [7, 9, 11]).count(), found.len(), 0.33);
    // With an ignore label what is not forced is on annotated voxels, and what is forced is not.
    let mut marked = classes;
    marked.push((annotated.clone(), vec![[5, 6, 7]]));
    let found = lowers(vec![numbered([10, 12, 14], marked)], base.clone(), 200);
    assert!(found.iter().all(|f| (f.2 == [3, 4, 5]) == (f.1 < 3)));
    // Nothing but that: then it is foreground too. Nothing at all: anywhere.
    let found = lowers(vec![numbered([10, 12, 14], vec![(annotated.clone(), vec![[5, 6, 7]])])], base.clone(), 50);
    assert!(found.iter().all(|f| f.2 == [3, 4, 5]));
    let found = lowers(vec![numbered([10, 12, 14], vec![(annotated, Vec::new())])], base, 50);
    assert!(found.iter().map(|f| f.2).collect::<std::collections::HashSet<_>>().len() > 50);
}

/// `round(batch * (1 - share))` in Python's rounding: which of a batch are on foreground.
#[test]
fn how_many_are_on_foreground() {
    for (batch, share, forced) in
        [(2, 0.33, 1), (3, 0.33, 1), (4, 0.33, 1), (5, 0.33, 2), (12, 0.33, 4), (5, 0.5, 3), (1, 0.33, 0)]
    {
        let config = LoaderConfig {
            oversampling: Oversampling::LastOfBatch(share),
            ..LoaderConfig::validation([2, 2, 2], batch)
        };
        let case = numbered([64, 64, 64], vec![(ClassKey::Label(1), vec![[63, 63, 63]])]);
        let found = lowers(vec![case], config, 1);
        let on: Vec<bool> = found.iter().map(|f| f.2 == [62, 62, 62]).collect();
        assert_eq!(on, (0..batch).map(|j| j >= batch - forced).collect::<Vec<_>>(), "{batch} {share}");
    }
}
