//! Instance norm with leaky ReLU, in place, with and without a residual.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops::{self, InstanceNorm, testing};

use crate::common::{Work, activation, measure};

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let how = InstanceNorm { eps: 1e-5, slope: Some(0.01) };
    for (channels, side) in [(16, 128), (32, 64), (64, 32), (256, 8)] {
        let w = testing::vector(&vec![1.0; channels], &device).expect("memory for a vector");
        for residual in [false, true] {
            let mut cx = Ctx::infer(&device);
            let dims = [1, channels, side, side, side];
            let mut x = Some(activation(&mut cx, dims));
            let r = residual.then(|| activation(&mut cx, dims));
            // Read for the statistics, read and written to normalise.
            let passes = if residual { 4 } else { 3 };
            let work = Work::Bytes((passes * 4 * dims.iter().product::<usize>()) as f64);
            let title = format!("{channels}@{side}{}", if residual { " + residual" } else { "" });
            measure(c, &device, "instance_norm", &title, work, || {
                x = x.take().and_then(|x| ops::instance_norm(&mut cx, x, &w, &w, r.clone(), how).ok());
            });
        }
    }
}
