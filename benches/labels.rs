//! What is done to masks and label maps of 200 x 512 x 512 voxels, and the importance of a window's voxels.

use criterion::Criterion;
use stunet::Device;
use stunet::nnunet::testing;

use crate::common::{CT, Work, measure, phantom};

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let (image, segmentation) = phantom();
    let voxels = CT.iter().product::<usize>() as f64;
    // Air is 0 as in a stripped image: the lungs are holes.
    let body: Vec<f32> = image.channels[0].iter().map(|&v| if v > -400.0 { v + 2000.0 } else { 0.0 }).collect();
    measure(c, &device, "labels", "nonzero mask, holes filled", Work::Bytes(4.0 * voxels), || {
        device.install(|| testing::filled(&body, CT))
    });
    let wanted: Vec<u16> = (1..=255).collect();
    let mut found = segmentation.labels.clone();
    measure(c, &device, "labels", "largest component of every label", Work::Bytes(voxels), || {
        device.install(|| testing::keep_largest_components(&mut found, CT, &wanted));
    });
    measure(c, &device, "labels", "gaussian 128^3", Work::Bytes(f64::from(4 << 21)), || {
        device.install(|| testing::gaussian([128; 3]))
    });
}
