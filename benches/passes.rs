//! The operations that are one pass over memory: leaky_relu, add, avg_pool, upsample_nearest, optim.

use criterion::Criterion;
use stunet::Device;
use stunet::autograd::{Ctx, Grads};
use stunet::nn::{self, Optimizer, Rule};
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
    // A filter of STU-Net-B's deepest stage. A gradient takes no copy: the step uses up a clone that shares its memory.
    let dims = [512, 512, 3, 3, 3];
    let values = vec![0.5; dims.iter().product()];
    let mut w = testing::filter(&values, dims, &device).expect("memory for a benchmark");
    let g = nn::pack(&w, &values, w.precision()).expect("memory for a benchmark");
    let floats = values.len() as f64;
    let adam = Rule::Adam { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, decoupled: false };
    // Reads and writes; the norm reads the gradient once more.
    for (name, rule, passes) in [("sgd 512x512x27", Rule::NNUNET, 6.0), ("adam 512x512x27", adam, 8.0)] {
        let mut optimizer = Optimizer::new(rule, Some(12.0)).expect("an optimizer");
        measure(c, &device, "optim", name, Work::Bytes(4.0 * passes * floats), || {
            let mut grads = Grads::new();
            grads.add_param(w.id(), g.clone()).and_then(|()| optimizer.step(vec![&mut w], &mut grads, 1e-3))
        });
    }
}
