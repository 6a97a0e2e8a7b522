//! The last layer and the decision of STU-Net-S, -B and -H at a patch of 128^3, with the classes of TotalSegmentator, and
//! with few.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops::testing;

use crate::common::{Work, activation, measure};

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let mut cx = Ctx::infer(&device);
    for (channels, classes) in [(16, 105), (32, 105), (96, 105), (32, 2)] {
        let x = activation(&mut cx, [1, channels, 128, 128, 128]);
        let weight: Vec<f32> = (0..channels * classes).map(|i| (i * 7919 % 1021) as f32 / 510.0 - 1.0).collect();
        let work = Work::Roofline(2.0 * (weight.len() << 21) as f64, f64::from((4 * channels as u32) << 21));
        for name in testing::implementations(&device) {
            if name == "scalar" && device.isa() != stunet::Isa::Scalar {
                continue;
            }
            let title = format!("{channels}->{classes} @128 {name}");
            measure(c, &device, "head_labels", &title, work, || {
                testing::head_labels(name, &mut cx, x.clone(), &weight, &vec![0.0; classes])
            });
        }
    }
}
