//! The tape: what it records, adds up, keeps and refuses; and the gradients of operations without parameters.

use proptest::prelude::*;
use stunet::Device;
use stunet::autograd::{Ctx, Grads, Param, Var};
use stunet::ops::{self, Affine, Conv3d, InstanceNorm, Source, testing};
use stunet::tensor::{Dims, Tensor};

use crate::common::bound::{Bounded, check, gamma};
use crate::common::drive::{bits, devices, result, soil, threaded_devices, values};

fn blocked(values: &[f32], dims: [usize; 5], device: &Device) -> Tensor {
    testing::blocked(Tensor::from_host(values, Dims::from(dims), device).unwrap()).unwrap()
}

/// The gradient of `sum(dy * f(x))` by x.
fn gradient(
    device: &Device,
    x: &[f32],
    dims: [usize; 5],
    dy: &[f32],
    f: impl FnOnce(&mut Ctx<'_>, Var) -> Var,
) -> Vec<f32> {
    let mut cx = Ctx::train(device);
    let x = cx.variable(blocked(x, dims, device));
    soil(device, dims);
    let y = f(&mut cx, x.clone());
    let dy = blocked(dy, y.value().dims().five(), device);
    let mut grads = Grads::new();
    cx.backward_from(vec![(y, dy)], &mut grads).unwrap();
    let g = grads.variable(&x).unwrap().clone();
    result(cx.leaf(g))
}

prop_compose! {
    fn sizes()(n in 1..=2_usize, c in 1..=20_usize, s in prop::array::uniform3(1..=7_usize)) -> [usize; 5] {
        [n, c, s[0], s[1], s[2]]
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Exactly: a factor of one or a single product.
    #[test]
    fn leaky_relu_gradient(dims in sizes(), slope in prop_oneof![Just(0.01_f32), Just(0.0), Just(-0.5)], seed in 0..99_u64) {
        let n = dims.iter().product();
        let (mut x, dy) = (values(n, seed), values(n, seed + 1));
        x[0] = 0.0;
        let expected: Vec<f32> = x.iter().zip(&dy).map(|(x, dy)| if *x > 0.0 { *dy } else { dy * slope }).collect();
        for device in devices() {
            let got = gradient(&device, &x, dims, &dy, |cx, x| ops::leaky_relu(cx, x, slope).unwrap());
            assert_eq!(bits(&got), bits(&expected));
        }
    }

    /// Sums of as many terms as a voxel has repetitions. This is the adjoint, as the operation only copies.
    #[test]
    fn upsample_nearest_gradient(dims in sizes(), factor in prop::array::uniform3(1..=3_usize), seed in 0..99_u64) {
        let [n, c, d, h, w] = dims;
        let up = [d * factor[0], h * factor[1], w * factor[2]];
        let dy = values(n * c * up.iter().product::<usize>(), seed);
        let mut expected = vec![Bounded { value: 0.0, error: 0.0 }; dims.iter().product()];
        for (i, dy) in dy.iter().enumerate() {
            let (z, y, x) = (i / (up[1] * up[2]) % up[0], i / up[2] % up[1], i % up[2]);
            let nc = i / up.iter().product::<usize>();
            let to = &mut expected[((nc * d + z / factor[0]) * h + y / factor[1]) * w + x / factor[2]];
            to.value += f64::from(*dy);
            to.error += gamma(factor.iter().product()) * f64::from(dy.abs());
        }
        for device in devices() {
            let x = values(dims.iter().product(), seed + 1);
            let f = |cx: &mut Ctx<'_>, x| ops::upsample_nearest(cx, x, factor).unwrap();
            check("upsample_nearest", &gradient(&device, &x, dims, &dy, f), &expected);
        }
    }

    /// A value that is used twice has the sum of two gradients; that of a sum is the sum's.
    #[test]
    fn gradients_add_up(dims in sizes(), seed in 0..99_u64) {
        let n = dims.iter().product();
        let (x, dy) = (values(n, seed), values(n, seed + 1));
        let twice: Vec<f32> = dy.iter().map(|v| v + v).collect();
        for device in devices() {
            let got = gradient(&device, &x, dims, &dy, |cx, x| ops::add(cx, x.clone(), x).unwrap());
            assert_eq!(bits(&got), bits(&twice));
        }
    }
}

/// A block of a residual network, by itself or run again on the way back.
struct Block {
    w: [Param; 3],
    norm: [Param; 4],
    bias: Param,
}

const CHANNELS: usize = 20;

impl Block {
    fn new(device: &Device) -> Self {
        let filter = |k: usize, seed| {
            let dims = [CHANNELS, CHANNELS, k, k, k];
            testing::filter(&values(dims.iter().product(), seed), dims, device).unwrap()
        };
        Self {
            w: [filter(3, 1), filter(3, 2), filter(1, 3)],
            norm: [4, 5, 6, 7].map(|s| testing::vector(&values(CHANNELS, s), device).unwrap()),
            bias: testing::vector(&values(CHANNELS, 8), device).unwrap(),
        }
    }

    fn params(&self) -> impl Iterator<Item = &Param> {
        self.w.iter().chain(&self.norm).chain([&self.bias])
    }

    fn run<'m>(&'m self, cx: &mut Ctx<'m>, x: Var) -> stunet::Result<Var> {
        let how = |k: usize| Conv3d { stride: [1; 3], padding: [k / 2; 3] };
        let norm = InstanceNorm { eps: 1e-5, slope: Some(0.01) };
        let (y, m) = ops::conv3d_measured(cx, x.clone(), &self.w[0], None, how(3))?;
        let first = Affine::new(&m, &self.norm[0], &self.norm[1], norm)?;
        let (y, m) = ops::conv3d_measured(cx, Source::normalised(y, first.into()), &self.w[1], None, how(3))?;
        let second = Affine::new(&m, &self.norm[2], &self.norm[3], norm)?;
        ops::conv3d_residual(cx, y, &second, x, &self.w[2], Some(&self.bias), how(1))
    }
}

/// Bits of the result and of all gradients of two blocks in a row, and the bytes kept.
fn two_blocks(device: &Device, again: bool) -> (Vec<Vec<u32>>, usize) {
    let dims = [2, CHANNELS, 6, 9, 7];
    let n = dims.iter().product();
    let blocks = [Block::new(device), Block::new(device)];
    let mut cx = Ctx::train(device);
    let x = cx.variable(blocked(&values(n, 20), dims, device));
    let mut y = x.clone();
    for block in &blocks {
        y = if again {
            cx.checkpoint(vec![y], move |cx, mut x| block.run(cx, x.remove(0))).unwrap()
        } else {
            block.run(&mut cx, y).unwrap()
        };
    }
    let kept = cx.saved().iter().map(|s| s.bytes).sum();
    let mut all = vec![bits(&y.value().to_host().unwrap())];
    let mut grads = Grads::new();
    cx.backward_from(vec![(y, blocked(&values(n, 21), dims, device))], &mut grads).unwrap();
    all.push(bits(&grads.variable(&x).unwrap().to_host().unwrap()));
    for p in blocks.iter().flat_map(Block::params) {
        all.push(bits(&grads.param(p).unwrap().to_host().unwrap()));
    }
    (all, kept)
}

#[test]
fn recomputation_changes_no_byte() {
    for device in devices() {
        let (plain, much) = two_blocks(&device, false);
        let (again, little) = two_blocks(&device, true);
        assert!(plain == again);
        // Two inputs, the second of them the first block's result, instead of two raw results and a result a block as well.
        let tensor = 4 * 2 * 32 * 6 * 9 * 7;
        assert_eq!((much, little), (7 * tensor, 2 * tensor));
    }
}

#[test]
fn gradients_do_not_depend_on_threads() {
    for devices in threaded_devices() {
        let all = devices.map(|d| two_blocks(&d, false).0);
        assert!(all[0] == all[1] && all[0] == all[2]);
    }
}

/// Two passes into one set of gradients: batches may be cut.
#[test]
fn passes_add_to_gradients() {
    let device = Device::cpu();
    let block = Block::new(&device);
    let dims = [1, CHANNELS, 3, 4, 5];
    let n = dims.iter().product();
    let pass = |seeds: &[u64]| {
        let mut grads = Grads::new();
        for seed in seeds {
            let mut cx = Ctx::train(&device);
            let x = cx.leaf(blocked(&values(n, *seed), dims, &device));
            let y = block.run(&mut cx, x).unwrap();
            cx.backward_from(vec![(y, blocked(&values(n, 9), dims, &device))], &mut grads).unwrap();
        }
        block.params().map(|p| grads.param(p).unwrap().to_host().unwrap()).collect::<Vec<_>>()
    };
    let (a, b, both) = (pass(&[1]), pass(&[2]), pass(&[1, 2]));
    for ((a, b), both) in a.iter().zip(&b).zip(&both) {
        let sum: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
        assert_eq!(bits(&sum), bits(both));
    }
}

#[test]
fn misuse_is_an_error() {
    let device = Device::cpu();
    let dims = [1, 3, 2, 2, 2];
    let tensor = || blocked(&[1.0; 24], dims, &device);
    let mut grads = Grads::new();
    let mut cx = Ctx::train(&device);
    let x = cx.variable(tensor());
    let y = ops::leaky_relu(&mut cx, x.clone(), 0.1).unwrap();
    // No scalar, another size, another pass, not recorded.
    assert!(cx.backward(y.clone(), &mut grads).unwrap_err().to_string().contains("expected [1]"));
    let small = blocked(&[1.0; 3], [1, 3, 1, 1, 1], &device);
    assert!(cx.backward_from(vec![(y.clone(), small)], &mut grads).is_err());
    let e = cx.backward_from(vec![(y, tensor())], &mut grads).unwrap_err().to_string();
    assert!(e.contains("another pass"), "{e}");
    let free = cx.leaf(tensor());
    assert!(cx.backward_from(vec![(free, tensor())], &mut grads).is_err());
    let mut cx = Ctx::infer(&device);
    let x = cx.variable(tensor());
    assert!(cx.backward_from(vec![(x, tensor())], &mut grads).is_err());
    assert!(grads.variable(&Ctx::train(&device).variable(tensor())).is_none());
    // The side of a leaky ReLU after a sum cannot be told from its result.
    let ones = testing::vector(&[1.0; 3], &device).unwrap();
    let mut cx = Ctx::train(&device);
    let (x, r) = (cx.variable(tensor()), cx.variable(tensor()));
    let how = ops::InstanceNorm { eps: 1e-5, slope: Some(-0.5) };
    let e = ops::instance_norm(&mut cx, x, &ones, &ones, Some(r), how).unwrap_err().to_string();
    assert!(e.contains("slope -0.5"), "{e}");
}

/// An image of planes that is repeated while it is read.
#[test]
fn planes_are_repeated_and_learnt_from() {
    let device = Device::cpu();
    let x = values(2 * 3 * 4 * 5, 1);
    let w = testing::filter(&values(4 * 2 * 27, 2), [4, 2, 3, 3, 3], &device).unwrap();
    let how = ops::Conv3d { stride: [1; 3], padding: [1; 3] };
    let learnt = |planes: bool| {
        let mut grads = Grads::new();
        let mut cx = Ctx::train(&device);
        let image = Tensor::from_host(&x, Dims::from([1, 2, 3, 4, 5]), &device).unwrap();
        let image = cx.variable(if planes { image } else { blocked(&x, [1, 2, 3, 4, 5], &device) });
        let y = ops::conv3d(&mut cx, ops::Source::repeated(image.clone(), [2; 3]), &w, None, how).unwrap();
        let dy = blocked(&values(4 * 6 * 8 * 10, 3), [1, 4, 6, 8, 10], &device);
        cx.backward_from(vec![(y, dy)], &mut grads).unwrap();
        [grads.param(&w), grads.variable(&image)].map(|g| bits(&g.unwrap().to_host().unwrap()))
    };
    assert_eq!(learnt(true), learnt(false));
}
