//! Batches of two patches of 128^3 voxels, and what single transforms cost: on the thread that asks, as in the loader's.

use std::sync::{Arc, OnceLock};

use criterion::Criterion;
use stunet::Device;
use stunet::nnunet::augment::{AugmentConfig, Augmenter, Item, Parameters, Scratch, Spatial};
use stunet::nnunet::loader::{Loader, LoaderConfig};
use stunet::nnunet::training_case::{ClassKey, ClassLocations, TrainingCase};
use stunet::phantom::Phantom;

use crate::common::{Work, measure};

const PATCH: usize = 128;
const SHAPE: [usize; 3] = [200; 3];

/// A case in memory, read row by row.
struct Case {
    image: Vec<f32>,
    labels: Vec<i16>,
    locations: ClassLocations,
}

impl TrainingCase for Case {
    fn channels(&self) -> usize {
        1
    }

    fn shape(&self) -> [usize; 3] {
        SHAPE
    }

    fn classes(&self) -> Vec<(&ClassKey, usize)> {
        self.locations.counts()
    }

    fn location(&self, class: usize, at: usize) -> stunet::Result<[u32; 3]> {
        Ok(self.locations.classes[class].1[at])
    }

    fn crop(&self, lower: [i64; 3], size: [usize; 3], data: &mut [f32], labels: &mut [i16]) -> stunet::Result<()> {
        let [_, h, w] = SHAPE;
        let rows = data.chunks_exact_mut(size[2]).zip(labels.chunks_exact_mut(size[2]));
        for (row, (data, labels)) in rows.enumerate() {
            let (z, y) = (lower[0] + (row / size[1]) as i64, lower[1] + (row % size[1]) as i64);
            data.fill(0.0);
            labels.fill(-1);
            let (first, last) = (lower[2].max(0), (lower[2] + size[2] as i64).min(w as i64));
            if z < 0 || y < 0 || z >= SHAPE[0] as i64 || y >= h as i64 || first >= last {
                continue;
            }
            let from = (z as usize * h + y as usize) * w;
            let from = from + first as usize..from + last as usize;
            let at = (first - lower[2]) as usize;
            data[at..at + from.len()].copy_from_slice(&self.image[from.clone()]);
            labels[at..at + from.len()].copy_from_slice(&self.labels[from]);
        }
        Ok(())
    }
}

fn cases() -> Vec<Arc<dyn TrainingCase>> {
    static ONCE: OnceLock<Vec<Arc<dyn TrainingCase>>> = OnceLock::new();
    let one = |seed| -> Arc<dyn TrainingCase> {
        let (image, truth) = Phantom::new(seed).with_grid(SHAPE, [1.5; 3]).expect("a grid").render();
        let labels: Vec<i16> = (0..image.channels[0].len()).map(|i| truth.labels.get(i).min(5) as i16).collect();
        let image = image.channels[0].iter().map(|v| v / 500.0).collect();
        let locations = ClassLocations { classes: vec![(ClassKey::Label(1), vec![[100; 3]])] };
        Arc::new(Case { image, labels, locations })
    };
    ONCE.get_or_init(|| (0..4).map(one).collect()).clone()
}

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let config = AugmentConfig::new(&[PATCH; 3], &[]).expect("a patch");
    let volume = PATCH * PATCH * PATCH;
    // What no loader can avoid: every voxel of the patch read and written.
    let bytes = Work::Bytes((volume * (4 + 4 + 2 + 2)) as f64);
    let mut loader = None;
    measure(c, &device, "loader", "8 batches, two threads", Work::Bytes((16 * volume * 12) as f64), || {
        let loader = loader.get_or_insert_with(|| {
            let how = LoaderConfig { workers: 2, ..LoaderConfig::training(config.clone(), 2) };
            Loader::new(cases(), how).expect("a loader")
        });
        (0..8).map(|_| loader.next().expect("a batch").image[0]).sum::<f32>()
    });
    let noise = (0..).map(|index| Item { seed: 1, epoch: 0, index });
    let noise = noise.map(|i| Parameters::draw(&config, 1, 0, i).noise).find(Option::is_some).flatten();
    let with = |set: &dyn Fn(&mut Parameters)| {
        let mut p = Parameters::default();
        set(&mut p);
        p
    };
    let turned = Some(Spatial { angles: [0.3, -0.2, 0.4], scale: 1.1 });
    for (group, name, p) in [
        ("augment", "nothing", Parameters::default()),
        ("warp", "rotation and scale", with(&|p| p.spatial = turned)),
        ("warp", "scale", with(&|p| p.spatial = Some(Spatial { angles: [0.0; 3], scale: 1.3 }))),
        ("blur", "three axes", with(&|p| p.blur = vec![Some([0.6, 0.8, 0.95])])),
        ("low_resolution", "to 0.7", with(&|p| p.low_resolution = vec![Some(0.7)])),
        ("intensity", "noise", with(&|p| p.noise = noise)),
        ("intensity", "brightness and contrast", with(&|p| (p.brightness, p.contrast) = (vec![1.2], vec![0.8]))),
        ("intensity", "both gammas", with(&|p| (p.gamma_inverted, p.gamma) = (vec![0.8], vec![1.2]))),
        ("intensity", "mirrored", with(&|p| p.mirror = [true; 3])),
    ] {
        let augmenter = Augmenter::new(config.clone(), &[]);
        let (mut scratch, mut image, mut target) = (Scratch::default(), vec![0.0; volume], vec![0; volume]);
        measure(c, &device, group, name, bytes, || {
            augmenter.run(&*cases()[0], [-2; 3], &p, &mut scratch, &mut image, &mut target).expect("a patch");
        });
    }
}
