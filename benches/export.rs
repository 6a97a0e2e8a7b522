//! From 16 features on the network's grid to labels of 105 classes on the image's.

use criterion::Criterion;
use stunet::Device;
use stunet::nnunet::testing;

use crate::common::{CT, Work, measure};

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 32768.0) - 1.0).collect()
}

pub fn bench(c: &mut Criterion) {
    const CHANNELS: usize = 16;
    const CLASSES: usize = 105;
    let device = Device::cpu();
    let (weight, bias) = (numbers(CHANNELS * CLASSES), numbers(CLASSES));
    for (name, from, to, smooth) in [
        ("105 classes, 1.5 mm to 1.5 x 0.8 x 0.8 mm", [200, 273, 273], CT, true),
        ("105 classes, 1.5 mm to 1.5 x 0.8 x 0.8 mm, noise", [200, 273, 273], CT, false),
        ("105 classes, 1.5 mm to 0.75 x 0.8 x 0.8 mm", [100, 273, 273], CT, true),
        ("105 classes, 1.5 mm to 3 mm", [224, 202, 244], [112, 101, 122], true),
    ] {
        let [_, ny, nx] = from;
        let mut plane = numbers(ny * nx * CHANNELS);
        if smooth {
            // Regions of some tens of voxels, as organs are; every voxel of noise has a class of its own.
            for (i, v) in plane.iter_mut().enumerate() {
                let (y, x, c) = ((i / CHANNELS / nx) as f32, (i / CHANNELS % nx) as f32, (i % CHANNELS) as f32);
                *v = 0.02 * *v + (0.05 * x + c).sin() * (0.04 * y - 0.7 * c).cos();
            }
        }
        // The head applied to every voxel of the result.
        let flops = (2 * CHANNELS * CLASSES * to.iter().product::<usize>()) as f64;
        measure(c, &device, "export", name, Work::Flops(flops), || {
            testing::labels_from_features(&plane, [&weight, &bias], from, to, &device).expect("labels")
        });
    }
}
