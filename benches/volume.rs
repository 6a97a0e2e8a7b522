//! Components, holes and distances of a label of 512^3 voxels.

use std::sync::OnceLock;

use criterion::Criterion;
use stunet::Device;
use stunet::nnunet::volume::{Neighbours, distance_transform, fill_holes, label};

use crate::common::{Work, measure};

const SHAPE: [usize; 3] = [512; 3];

/// Shells around the middle, with a speck of nothing every few thousand voxels.
fn mask() -> Vec<bool> {
    let inside = |i: usize| {
        let [z, y, x] = [i >> 18, i >> 9 & 511, i & 511].map(|v| v.abs_diff(256).pow(2));
        (z + y + x) % 30_000 < 15_000 && i.wrapping_mul(2_654_435_761) >> 7 & 0xfff != 0
    };
    (0..SHAPE.iter().product()).map(inside).collect()
}

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let voxels = SHAPE.iter().product::<usize>() as f64;
    // Made when first asked for: the filter may leave a benchmark out.
    let kept = OnceLock::new();
    for (name, neighbours) in [("faces", Neighbours::Faces), ("corners", Neighbours::Corners)] {
        let name = format!("components by {name}");
        measure(c, &device, "volume", &name, Work::Bytes(5.0 * voxels), || {
            device.install(|| label(kept.get_or_init(mask), SHAPE, neighbours).expect("components"))
        });
    }
    measure(c, &device, "volume", "distances", Work::Bytes(25.0 * voxels), || {
        device.install(|| distance_transform(kept.get_or_init(mask), SHAPE, [3.0, 0.7, 1.1]).expect("distances"))
    });
    // Of a copy: what is filled once has no holes the next time.
    measure(c, &device, "volume", "a copy without its holes", Work::Bytes(4.0 * voxels), || {
        let mut filled = kept.get_or_init(mask).clone();
        device.install(|| fill_holes(&mut filled, SHAPE).expect("holes"));
        filled
    });
}
