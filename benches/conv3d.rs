//! The convolutions of STU-Net-S and -B at a patch of 128^3, by every implementation worth timing.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops::{Conv3d, Sources, testing};
use stunet::tensor::Tensor;

use crate::common::{Work, activation, measure};

/// Input channels of the sources (0: no second one), output channels, side of the cube, kernel, stride.
const LAYERS: [(usize, usize, usize, usize, usize, usize); 16] = [
    (1, 0, 16, 128, 3, 1),
    (16, 0, 16, 128, 3, 1),
    (16, 16, 16, 128, 3, 1),
    (16, 0, 16, 128, 1, 1),
    (16, 0, 105, 128, 1, 1),
    (16, 0, 32, 128, 3, 2),
    (32, 0, 32, 64, 3, 1),
    (32, 32, 32, 64, 3, 1),
    (64, 0, 64, 32, 3, 1),
    (64, 0, 64, 64, 3, 1),
    (128, 0, 128, 32, 3, 1),
    (128, 0, 256, 16, 3, 2),
    (256, 0, 256, 16, 3, 1),
    (256, 256, 256, 8, 3, 1),
    (512, 0, 512, 8, 3, 1),
    (512, 0, 512, 4, 3, 1),
];

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    for (first, second, out, side, kernel, stride) in LAYERS {
        let dims = [out, first + second, kernel, kernel, kernel];
        let w = testing::filter(&vec![0.01; dims.iter().product()], dims, &device).expect("memory for a filter");
        let mut cx = Ctx::infer(&device);
        // The network's input is plain.
        let x = if first == 1 {
            let values = vec![0.5; side * side * side];
            let t = Tensor::from_host(&values, [1, 1, side, side, side].into(), &device);
            cx.leaf(t.expect("memory for an input"))
        } else {
            activation(&mut cx, [1, first, side, side, side])
        };
        let y = (second > 0).then(|| activation(&mut cx, [1, second, side, side, side]));
        let how = Conv3d { stride: [stride; 3], padding: [kernel / 2; 3] };
        let voxels = side.div_ceil(stride).pow(3);
        let work = Work::Flops(2.0 * (dims.iter().product::<usize>() * voxels) as f64);
        let input = [1, first + second, side, side, side];
        for name in testing::conv3d_implementations(&device, input, &w, how) {
            // The reference is for tests; the portable kernel is an order slower where there is a better one.
            if name == "reference" || (name == "direct_scalar" && device.isa() != stunet::Isa::Scalar) {
                continue;
            }
            let title = format!("{first}+{second}->{out} k{kernel} s{stride} @{side} {name}");
            measure(c, &device, "conv3d", &title, work, || {
                let x = match &y {
                    Some(y) => Sources::Two(x.clone().into(), y.clone().into()),
                    None => x.clone().into(),
                };
                testing::conv3d(name, &mut cx, x, &w, None, how)
            });
        }
    }
}
