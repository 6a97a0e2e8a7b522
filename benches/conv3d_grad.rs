//! conv3d_grad: the gradients of the convolutions of STU-Net-S and -B at a patch of 64^3 and a batch of two, by every
//! implementation worth timing.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops::conv3d_grad::{self as grad, By, Layer};
use stunet::ops::{Conv3d, Source, Sources, testing};
use stunet::tensor::Tensor;

use crate::common::{Work, activation, measure};

/// Input channels of the sources (0: no second one; the first is repeated if there is one), output channels, side of the
/// cube, kernel, stride.
const LAYERS: [(usize, usize, usize, usize, usize, usize); 20] = [
    (1, 0, 16, 64, 3, 1),
    (16, 0, 16, 64, 3, 1),
    (16, 16, 16, 64, 3, 1),
    (16, 0, 16, 64, 1, 1),
    (16, 0, 105, 64, 1, 1),
    (16, 0, 32, 64, 3, 2),
    (32, 0, 32, 32, 3, 1),
    (32, 32, 32, 32, 3, 1),
    (32, 0, 64, 32, 3, 2),
    (64, 0, 64, 16, 3, 1),
    (64, 64, 64, 16, 3, 1),
    (128, 0, 128, 8, 3, 1),
    (128, 128, 128, 8, 3, 1),
    (256, 0, 256, 4, 3, 1),
    (256, 0, 256, 2, 3, 1),
    (32, 0, 32, 64, 3, 1),
    (64, 64, 64, 32, 3, 1),
    (128, 0, 128, 16, 3, 1),
    (256, 256, 256, 8, 3, 1),
    (512, 0, 512, 4, 3, 1),
];

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    for (first, second, out, side, kernel, stride) in LAYERS {
        let how = Conv3d { stride: [stride; 3], padding: [kernel / 2; 3] };
        let layer =
            Layer { x: [2, first + second, side, side, side], w: [out, first + second, kernel, kernel, kernel], how };
        let w = testing::filter(&vec![0.01; layer.w.iter().product()], layer.w, &device).expect("memory for a filter");
        let mut cx = Ctx::infer(&device);
        let to = side.div_ceil(stride);
        let dy = activation(&mut cx, [2, out, to, to, to]).into_value();
        let macs = |channels: usize| (2 * channels * out * (kernel * to).pow(3)) as f64;
        let title = |name: &str| format!("{first}+{second}->{out} k{kernel} s{stride} @{side} {name}");
        // The reference is for tests; portable kernels are an order slower where there are better ones.
        let worth = |n: &&str| *n != "reference" && (!n.ends_with("_scalar") || device.isa() == stunet::Isa::Scalar);
        let chosen = |name: &str, taken: &str| if name == taken { format!("{name} *") } else { name.to_string() };
        for i in (0..2).filter(|i| [first, second][*i] > 1) {
            let factor = if i == 0 && second > 0 { [2; 3] } else { [1; 3] };
            let channels = if i == 0 { 0..first } else { first..first + second };
            let run = |by| grad::dgrad(by, layer, &dy, &w, channels.clone(), factor, None);
            let taken = run(By::default()).expect("memory for a gradient").1;
            for name in grad::dgrad_implementations(&device, layer, factor).into_iter().filter(worth) {
                let title = format!("{} source {i}", title(&chosen(name, taken)));
                let work = Work::Flops(2.0 * macs(channels.len()));
                measure(c, &device, "conv3d_dgrad", &title, work, || run(By { name: Some(name), strict: false }));
            }
        }
        // The network's input is plain.
        let x: Sources = if first == 1 {
            let values = vec![0.5; 2 * side.pow(3)];
            let t = Tensor::from_host(&values, [2, 1, side, side, side].into(), &device);
            cx.leaf(t.expect("memory for an input")).into()
        } else if second == 0 {
            activation(&mut cx, layer.x).into()
        } else {
            let low = activation(&mut cx, [2, first, side / 2, side / 2, side / 2]);
            let skip = activation(&mut cx, [2, second, side, side, side]);
            Sources::Two(Source::repeated(low, [2; 3]), skip.into())
        };
        let run = |by| grad::wgrad(by, x.clone(), layer.w, how, &dy, None);
        let taken = run(By::default()).expect("memory for a gradient").1;
        let names = grad::wgrad_implementations(&device, x.clone(), layer.w, how).unwrap_or_default();
        for name in names.into_iter().filter(worth) {
            let work = Work::Flops(2.0 * macs(first + second));
            let title = title(&chosen(name, taken));
            measure(c, &device, "conv3d_wgrad", &title, work, || run(By { name: Some(name), strict: false }));
        }
    }
}
