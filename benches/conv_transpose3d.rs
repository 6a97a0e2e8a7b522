//! The transposed convolutions of nnU-Net's decoder at a patch of 128^3, by every implementation worth timing.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops::{ConvTranspose3d, testing};

use crate::common::{Work, activation, measure};

/// Input channels, output channels, side of the input's cube, kernel and stride.
const LAYERS: [(usize, usize, usize, [usize; 3]); 6] = [
    (320, 320, 4, [2; 3]),
    (320, 256, 8, [2; 3]),
    (256, 128, 16, [2; 3]),
    (128, 64, 32, [2; 3]),
    (64, 32, 64, [2; 3]),
    (64, 32, 64, [1, 2, 2]),
];

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    for (inputs, out, side, stride) in LAYERS {
        let [d, h, w] = stride;
        let dims = [inputs, out, d, h, w];
        let weights: usize = dims.iter().product();
        let filter = testing::transposed_filter(&vec![0.01; weights], dims, &device).expect("memory for a filter");
        let mut cx = Ctx::infer(&device);
        let x = activation(&mut cx, [1, inputs, side, side, side]);
        let voxels = side.pow(3);
        let floats = weights + voxels * (inputs + out * d * h * w);
        let work = Work::Roofline(2.0 * (weights * voxels) as f64, 4.0 * floats as f64);
        let (how, slow) = (ConvTranspose3d::upsampling(stride), device.isa() != stunet::Isa::Scalar);
        for name in testing::conv_transpose3d_implementations(&device, [1, inputs, side, side, side], &filter, how) {
            // The reference is for tests; the portable kernel is an order slower where there is a better one.
            if name == "reference" || (name.ends_with("scalar") && slow) {
                continue;
            }
            let title = format!("{inputs}->{out} k{d}{h}{w} @{side} {name}");
            measure(c, &device, "conv_transpose3d", &title, work, || {
                testing::conv_transpose3d(name, &mut cx, x.clone(), &filter, None, how)
            });
        }
        let dy = activation(&mut cx, [1, out, d * side, h * side, w * side]);
        let names =
            testing::conv_transpose3d_gradient_implementations(&device, [1, inputs, side, side, side], &filter, how);
        let both = Work::Roofline(4.0 * (weights * voxels) as f64, 4.0 * (2 * floats) as f64);
        let title = format!("{inputs}->{out} k{d}{h}{w} @{side} gradients");
        measure(c, &device, "conv_transpose3d", &title, both, || {
            testing::conv_transpose3d_gradients(names[0], &cx, &x, &filter, None, how, &dy)
        });
    }
}
