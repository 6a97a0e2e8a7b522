//! STU-Net against PyTorch, and laws of the whole network.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use stunet::autograd::Ctx;
use stunet::models::StuNetConfig;
use stunet::nn::{Module, ParamSource, RandomParams};
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Error, Isa, Precision, Result};

use crate::common::shared;

/// A reference file; the network's parameters are the tensors `before/NAME`.
pub struct Before {
    path: PathBuf,
    pub tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Before {
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let floats = |b: &[u8]| b.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, t)| (name.into(), (t.shape().to_vec(), floats(t.data())))).collect();
        Self { path: path.into(), tensors }
    }
}

impl ParamSource for Before {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(&format!("before/{name}")).map(|(shape, _)| shape.clone())
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(&self.tensors[&format!("before/{name}")].1))
    }

    fn error(&self, name: &str, what: String) -> Error {
        panic!("{}: {name}: {what}", self.path.display())
    }
}

pub fn usizes(v: &serde_json::Value) -> Vec<usize> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as usize).collect()
}

/// The norm of the difference of `a` and `b` over that of `b`.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut err, mut norm) = (0f64, 0f64);
    for (a, b) in a.iter().zip(b) {
        err += (f64::from(*a) - f64::from(*b)).powi(2);
        norm += f64::from(*b).powi(2);
    }
    (err / norm).sqrt()
}

/// Every head of three STU-Nets on every instruction set: at most four times PyTorch's own float32 error against float64,
/// strictly at most one and a half times.
#[test]
fn golden_train_outputs() {
    let Some(dir) = shared("golden/train") else { return };
    for name in ["net_0_stunet", "net_1_stunet_deep", "net_2_stunet"] {
        let meta: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join(format!("{name}.json"))).unwrap()).unwrap();
        let source = Before::open(&dir.join(format!("{name}.safetensors")));
        let features = usizes(&meta["arch"]["features"]);
        let depth = meta["arch"]["depth"].as_u64().unwrap() as usize;
        let strides: Vec<[usize; 3]> =
            meta["strides"].as_array().unwrap().iter().map(|s| usizes(s).try_into().unwrap()).collect();
        let config = StuNetConfig {
            in_channels: meta["input_channels"].as_u64().unwrap() as usize,
            classes: meta["classes"].as_u64().unwrap() as usize,
            depth: [depth; 6],
            decoder_depth: [depth; 5],
            dims: features.try_into().unwrap(),
            strides: strides.try_into().unwrap(),
        };
        let (shape, input) = &source.tensors["input"];
        let dims = [shape[1], shape[2], shape[3], shape[4], shape[5]];
        for &isa in Isa::available() {
            let device = Device::cpu_with(None, isa).unwrap();
            let net = config.build(&source, &device).unwrap();
            for strict in [false, true] {
                let mut cx = Ctx::infer(&device).strict(strict);
                let x = cx.leaf(Tensor::from_host(&input[..dims.iter().product()], Dims::from(dims), &device).unwrap());
                let outs = net.forward_all(&mut cx, x).unwrap();
                assert_eq!(outs.len(), 5);
                let most = if strict { 1.5 } else { 4.0 };
                for (i, out) in outs.iter().enumerate() {
                    let (_, truth) = &source.tensors[&format!("output/{i}")];
                    let error = relative_error(&out.value().to_host().unwrap(), truth);
                    let torch = meta["torch_f32"]["error"][format!("output/{i}")].as_f64().unwrap();
                    eprintln!("{name} {} strict {strict} output {i}: {error:.2e}, PyTorch {torch:.2e}", isa.name());
                    assert!(error <= most * torch, "{name} {isa:?} output {i}: {error:e} > {most} x {torch:e}");
                }
            }
        }
    }
}

fn run(device: &Device, config: &StuNetConfig, patch: [usize; 3]) -> Vec<u32> {
    let net = config.build_random(device, 3).unwrap();
    let n = config.in_channels * patch.iter().product::<usize>();
    let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1000) as f32) / 500.0 - 1.0).collect();
    let mut cx = Ctx::infer(device);
    let dims = Dims::from([1, config.in_channels, patch[0], patch[1], patch[2]]);
    let x = cx.leaf(Tensor::from_host(&values, dims, device).unwrap());
    let y = device.install(|| net.forward(&mut cx, x)).unwrap();
    y.value().to_host().unwrap().iter().map(|v| v.to_bits()).collect()
}

#[test]
fn forward_is_the_same_for_any_thread_count() {
    let config = StuNetConfig { dims: [8, 16, 20, 24, 24, 24], ..StuNetConfig::small(2, 5) }.with_strides([
        [1, 2, 2],
        [2, 2, 2],
        [2, 2, 2],
        [1, 2, 2],
        [1, 1, 1],
    ]);
    let bits = [1, 2, 7].map(|t| run(&Device::cpu_with_threads(t).unwrap(), &config, [8, 48, 32]));
    assert_eq!(bits[0], bits[1]);
    assert_eq!(bits[0], bits[2]);
    assert!(bits[0].iter().all(|&b| f32::from_bits(b).is_finite()));
}

/// Parameters whose filters are rounded to bf16.
struct Rounded(RandomParams);

impl ParamSource for Rounded {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }

    fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let mut values = self.0.values(name)?;
        if self.shape(name).is_some_and(|s| s.len() == 5) {
            values.to_mut().iter_mut().for_each(|v| *v = Precision::Bf16.round(*v));
        }
        Ok(values)
    }

    fn error(&self, name: &str, what: String) -> Error {
        self.0.error(name, what)
    }
}

/// A network stored as bf16 takes half the memory of the network with rounded filters, and each of its heads differs from
/// that one's by as much as its activations, which are rounded too, lose; with the same bytes for any number of threads.
#[test]
fn bf16_storage_is_the_rounded_network() {
    let config = StuNetConfig { dims: [16, 24, 40, 48, 48, 48], ..StuNetConfig::small(2, 5) };
    let params = RandomParams::new(3, config.parameters().into_iter().collect());
    let rounded = Rounded(params.clone());
    let values = crate::common::drive::values(2 * 64 * 96 * 64, 8);
    // Values that are stored between the image and the last head: two per block of at most six stages down and five up, the
    // mixed and the repeated one of each level. Each is off by 2^-8 of itself at most and 2^-8 / sqrt(3) times 3/4 on average over
    // mantissas; errors of different layers are independent. Twice that, since normalisations of few voxels, of which the
    // deepest have twelve here, make errors larger.
    let most = 2.0 * 2f64.powi(-8) / 3f64.sqrt() * f64::from(11 * 2 + 5 * 2).sqrt();
    for &isa in Isa::available() {
        let mut stored: [Option<Vec<Vec<f32>>>; 2] = [None, None];
        for threads in [1, 3] {
            let device = || Device::cpu_with(Some(threads), isa).unwrap();
            let (first, second) = (device(), device());
            let full = config.build(&rounded, &first).unwrap();
            let half = config.build_with(&params, &second, Precision::Bf16).unwrap();
            assert_eq!(half.head().unwrap(), full.head().unwrap());
            let (twice, once) = (first.memory().peak, second.memory().peak);
            assert!(once < twice * 51 / 100 && once == second.memory().in_use, "{once} {twice}");
            for strict in [false, true] {
                let [a, b] = [(&full, &first), (&half, &second)].map(|(net, device)| {
                    let mut cx = Ctx::infer(device).strict(strict);
                    let x = Tensor::from_host(&values, Dims::from([1, 2, 64, 96, 64]), device).unwrap();
                    let x = cx.leaf(x);
                    let heads = net.forward_all(&mut cx, x).unwrap();
                    heads.into_iter().map(|y| y.into_value().to_host().unwrap()).collect::<Vec<_>>()
                });
                for (a, b) in a.iter().zip(&b) {
                    let sum = |f: &dyn Fn(f64, f64) -> f64| {
                        a.iter().zip(b).map(|(a, b)| f(f64::from(*a), f64::from(*b))).sum::<f64>()
                    };
                    let error = (sum(&|a, b| (a - b).powi(2)) / sum(&|a, _| a * a)).sqrt();
                    assert!(error <= most && error > 0.0, "{isa:?} {threads} {strict}: {error:e}, at most {most:e}");
                }
                let first = stored[usize::from(strict)].get_or_insert_with(|| b.clone());
                assert!(*first == b, "{isa:?} {strict}: other bytes with {threads} threads");
            }
        }
    }
}

#[test]
fn wrong_inputs_are_refused() {
    let device = Device::cpu();
    let config = StuNetConfig { dims: [4; 6], ..StuNetConfig::small(1, 2) };
    let net = config.build_random(&device, 0).unwrap();
    for dims in [[1, 2, 32, 32, 32], [1, 1, 32, 32, 40]] {
        let x = Tensor::from_host(&vec![0.0; dims.iter().product()], Dims::from(dims), &device).unwrap();
        let mut cx = Ctx::infer(&device);
        let x = cx.leaf(x);
        assert!(net.features(&mut cx, x).is_err());
    }
}

/// Labels are the largest logits', whichever of the two ways they are reached; where two logits all but tie, either wins.
#[test]
fn labels_are_the_largest_logits() {
    let config = StuNetConfig { dims: [20, 24, 24, 24, 24, 24], ..StuNetConfig::small(1, 19) };
    let dims = Dims::from([2, 1, 32, 32, 32]);
    let values: Vec<f32> = (0..dims.len()).map(|i| ((i * 7919 % 1000) as f32) / 500.0 - 1.0).collect();
    for &isa in Isa::available() {
        let device = Device::cpu_with(None, isa).unwrap();
        let net = config.build_random(&device, 5).unwrap();
        let mut cx = Ctx::infer(&device).traced();
        let x = cx.leaf(Tensor::from_host(&values, dims, &device).unwrap());
        let labels = net.labels(&mut cx, x.clone()).unwrap();
        let last = cx.steps().last().unwrap();
        assert_eq!((last.operation, last.macs), ("head_labels", (2 * 20 * 19) << 15));
        let logits = net.forward(&mut cx, x).unwrap().into_value().to_host().unwrap();
        let (space, mut seen) = (1 << 15, [false; 19]);
        assert_eq!(labels.len(), 2 * space);
        for (i, &label) in labels.iter().enumerate() {
            let of = |c: usize| logits[(i / space * 19 + c) * space + i % space];
            let top = (0..19).map(of).fold(f32::NEG_INFINITY, f32::max);
            assert!(of(usize::from(label)) >= top - 1e-4 * top.abs().max(1.0), "{isa:?}: voxel {i}, label {label}");
            seen[usize::from(label)] = true;
        }
        assert!(seen.iter().filter(|s| **s).count() > 5);
    }
}

/// The planned peak is never below what a pass really takes, and close to it.
#[test]
fn activation_bytes_bound_the_measured_peak() {
    let config = StuNetConfig::small(1, 3);
    for (patch, precision) in [
        ([32, 32, 64], Precision::F32),
        ([32, 32, 64], Precision::Bf16),
        ([64, 64, 96], Precision::F32),
        ([64, 64, 96], Precision::Bf16),
    ] {
        let device = Device::cpu();
        let net = config.build_random_with(&device, 0, precision).unwrap();
        let weights = device.memory().in_use;
        device.reset_peak();
        let mut cx = Ctx::infer(&device);
        let [d, h, w] = patch;
        let x = Tensor::from_host(&vec![0.5; d * h * w], Dims::from([1, 1, d, h, w]), &device).unwrap();
        let x = cx.leaf(x);
        drop(net.features(&mut cx, x).unwrap());
        let peak = device.memory().peak - weights;
        let plan = config.activation_bytes(patch, &device, false, precision);
        assert!(peak <= plan, "{patch:?} {precision:?}: peak {peak} is above the plan {plan}");
        assert!(peak * 2 > plan, "{patch:?} {precision:?}: the plan {plan} is far above the peak {peak}");
    }
}

/// A pass asks for the same memory each time: once learnt, all of it is in the planned region, and nothing else changes.
#[test]
fn planned_passes_miss_nothing_and_give_the_same() {
    for threads in [1, 3] {
        let config = StuNetConfig { dims: [8, 16, 20, 24, 24, 24], ..StuNetConfig::small(1, 3) };
        let device = Device::cpu_with_threads(threads).unwrap();
        let net = config.build_random(&device, 0).unwrap();
        let values: Vec<f32> = (0..32 * 32 * 64).map(|i| (i % 61) as f32 / 30.0 - 1.0).collect();
        let pass = || {
            let mut cx = Ctx::infer(&device);
            let x = cx.leaf(Tensor::from_host(&values, Dims::from([1, 1, 32, 32, 64]), &device).unwrap());
            net.features(&mut cx, x).unwrap().into_value().to_host().unwrap()
        };
        let plain = pass();
        device.trim();
        // With the filters in the forms that convolutions keep from the first pass on.
        let weights = device.memory().in_use;
        for run in 0..4 {
            assert_eq!(device.planned(&[32, 32, 64], pass), plain, "run {run}");
        }
        let memory = device.memory();
        assert!(memory.planned_hits > 100 && memory.planned_misses == 0, "{memory:?}");
        let (peak, region) = (memory.peak - weights, memory.reserved - weights);
        assert!(region <= peak + peak / 10, "region {region}, peak of a pass {peak}");
        device.trim();
        assert_eq!(device.memory().reserved, weights);
    }
}
