//! The operations that are one pass over memory: leaky_relu, add, upsample_nearest.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops;

use crate::common::{Work, activation, measure};

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let mut cx = Ctx::infer(&device);
    let dims = [1, 32, 64, 64, 64];
    let bytes = |passes: usize| Work::Bytes((passes * 4 * dims.iter().product::<usize>()) as f64);
    let r = activation(&mut cx, dims);
    let mut x = Some(activation(&mut cx, dims));
    measure(c, &device, "leaky_relu", "32@64", bytes(2), || {
        x = x.take().and_then(|x| ops::leaky_relu(&mut cx, x, 0.5).ok());
    });
    measure(c, &device, "add", "32@64", bytes(3), || {
        x = x.take().and_then(|x| ops::add(&mut cx, x, r.clone()).ok());
    });
    measure(c, &device, "upsample_nearest", "32@64 to 128", bytes(9), || {
        ops::upsample_nearest(&mut cx, r.clone(), [2; 3])
    });
}
