//! What is done to masks and label maps of 200 x 512 x 512 voxels, and the importance of a window's voxels.

use std::cell::OnceCell;

use criterion::Criterion;
use stunet::Device;
use stunet::nnunet::testing;

use crate::common::{CT, Work, measure, phantom};

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let voxels = CT.iter().product::<usize>() as f64;
    // Made when first asked for: the filter may leave a benchmark out. Air is 0 as in a stripped image: the lungs are
    // holes.
    let body = || phantom().0.channels[0].iter().map(|&v| if v > -400.0 { v + 2000.0 } else { 0.0 }).collect();
    let kept = OnceCell::new();
    measure(c, &device, "labels", "nonzero mask, holes filled", Work::Bytes(4.0 * voxels), || {
        let body: &Vec<f32> = kept.get_or_init(body);
        device.install(|| testing::filled(body, CT))
    });
    let wanted: Vec<u16> = (1..=255).collect();
    let mut found = None;
    measure(c, &device, "labels", "largest component of every label", Work::Bytes(voxels), || {
        let found = found.get_or_insert_with(|| phantom().1.labels.clone());
        device.install(|| testing::keep_largest_components(found, CT, &wanted));
    });
    measure(c, &device, "labels", "gaussian 128^3", Work::Bytes(f64::from(4 << 21)), || {
        device.install(|| testing::gaussian([128; 3]))
    });
}
