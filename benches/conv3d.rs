//! The convolutions of STU-Net-S and -B at a patch of 128^3 and of -L at 64^3, by every implementation worth timing, and
//! the ends of residual blocks.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops::{self, Affine, Conv3d, InstanceNorm, Source, Sources, testing};
use stunet::tensor::Tensor;

use crate::common::{Work, activation, measure};

/// Input channels of the sources (0: no second one), output channels, side of the cube, kernel, stride.
const LAYERS: [(usize, usize, usize, usize, usize, usize); 21] = [
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
    (64, 64, 64, 64, 3, 1),
    (512, 0, 1024, 8, 3, 2),
    (512, 512, 512, 8, 3, 1),
    (1024, 0, 1024, 4, 3, 1),
    (1024, 0, 1024, 2, 3, 1),
];

/// Width and side of the last blocks of a decoder's stages: a 1x1x1 convolution of a repeated tensor and a skip connection,
/// added to a normalised one.
const ENDS: [(usize, usize); 4] = [(16, 128), (32, 128), (64, 64), (128, 32)];

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    layers(c, &device);
    let how = Conv3d { stride: [1; 3], padding: [0; 3] };
    for (width, side) in ENDS {
        let dims = [width, 2 * width, 1, 1, 1];
        let w = testing::filter(&vec![0.01; dims.iter().product()], dims, &device).expect("memory for a filter");
        let v = testing::vector(&vec![0.5; width], &device).expect("memory for a vector");
        let one = testing::filter(&identity(width), [width, width, 1, 1, 1], &device).expect("memory for a filter");
        let mut cx = Ctx::infer(&device);
        let [low, skip, y] = [side / 2, side, side].map(|n| activation(&mut cx, [1, width, n, n, n]));
        let (y, moments) = ops::conv3d_measured(&mut cx, y, &one, None, how).expect("memory for an output");
        let norm = InstanceNorm { eps: 1e-5, slope: Some(0.01) };
        let norm = Affine::new(&moments, &v, &v, norm).expect("a vector per channel");
        // Two tensors read, one of them written; the low half of the channels costs an eighth.
        let bytes = 3.125 * 4.0 * (width * side.pow(3)) as f64;
        let flops = 2.25 * (width * width * side.pow(3)) as f64;
        let mut y = Some(y);
        measure(
            c,
            &device,
            "conv3d_residual",
            &format!("{width}+{width}->{width} @{side}"),
            Work::Roofline(flops, bytes),
            || {
                let x = Sources::Two(Source::repeated(low.clone(), [2; 3]), skip.clone().into());
                y = y.take().and_then(|y| ops::conv3d_residual(&mut cx, y, &norm, x, &w, None, how).ok());
            },
        );
    }
}

fn identity(n: usize) -> Vec<f32> {
    (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect()
}

fn layers(c: &mut Criterion, device: &Device) {
    for (first, second, out, side, kernel, stride) in LAYERS {
        let dims = [out, first + second, kernel, kernel, kernel];
        let w = testing::filter(&vec![0.01; dims.iter().product()], dims, device).expect("memory for a filter");
        let mut cx = Ctx::infer(device);
        // The network's input is plain.
        let x = if first == 1 {
            let values = vec![0.5; side * side * side];
            let t = Tensor::from_host(&values, [1, 1, side, side, side].into(), device);
            cx.leaf(t.expect("memory for an input"))
        } else {
            activation(&mut cx, [1, first, side, side, side])
        };
        let y = (second > 0).then(|| activation(&mut cx, [1, second, side, side, side]));
        let how = Conv3d { stride: [stride; 3], padding: [kernel / 2; 3] };
        let voxels = side.div_ceil(stride).pow(3);
        let work = Work::Flops(2.0 * (dims.iter().product::<usize>() * voxels) as f64);
        let input = [1, first + second, side, side, side];
        for name in testing::conv3d_implementations(device, input, &w, how) {
            // The reference is for tests; portable kernels are an order slower where there are better ones.
            if name == "reference" || (name.ends_with("_scalar") && device.isa() != stunet::Isa::Scalar) {
                continue;
            }
            let title = format!("{first}+{second}->{out} k{kernel} s{stride} @{side} {name}");
            measure(c, device, "conv3d", &title, work, || {
                let x = match &y {
                    Some(y) => Sources::Two(x.clone().into(), y.clone().into()),
                    None => x.clone().into(),
                };
                testing::conv3d(name, &mut cx, x, &w, None, how)
            });
        }
    }
}
