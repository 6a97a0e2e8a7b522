//! The operations that are one pass over memory: leaky_relu, add, avg_pool, upsample_nearest.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::Ctx;
use stunet::ops::{self, testing};

use crate::common::{Work, activation, measure};

pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let mut cx = Ctx::infer(&device);
    let dims = [1, 32, 64, 64, 64];
    let bytes_of = |dims: [usize; 5]| (4 * dims.iter().product::<usize>()) as f64;
    let bytes = |passes: usize| Work::Bytes(passes as f64 * bytes_of(dims));
    let r = activation(&mut cx, dims);
    let mut x = Some(activation(&mut cx, dims));
    measure(c, &device, "leaky_relu", "32@64", bytes(2), || {
        x = x.take().and_then(|x| ops::leaky_relu(&mut cx, x, 0.5).ok());
    });
    measure(c, &device, "add", "32@64", bytes(3), || {
        x = x.take().and_then(|x| ops::add(&mut cx, x, r.clone()).ok());
    });
    measure(c, &device, "avg_pool", "32@64 to 32", Work::Bytes(bytes_of(dims) * 9.0 / 8.0), || {
        ops::avg_pool(&mut cx, r.clone(), [2; 3])
    });
    let dy = activation(&mut cx, [1, 32, 32, 32, 32]);
    let name = testing::implementations(&device)[0];
    measure(c, &device, "avg_pool", "32@64 gradient", Work::Bytes(bytes_of(dims) * 9.0 / 8.0), || {
        testing::avg_pool_gradient(name, &mut cx, dy.value(), dims, [2; 3])
    });
    measure(c, &device, "upsample_nearest", "32@64 to 128", bytes(9), || {
        ops::upsample_nearest(&mut cx, r.clone(), [2; 3])
    });
}
