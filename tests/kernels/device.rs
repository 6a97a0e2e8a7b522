//! A network through the library's own operations, on a card that the interpreter stands in for.

use std::sync::Arc;

use stunet::PredictOptions;
use stunet::autograd::Ctx;
use stunet::io::Geometry;
use stunet::models::{StuNetConfig, UnetKind};
use stunet::nn::Module;
use stunet::ops::{self, Affine, Conv3d, ConvTranspose3d, InstanceNorm, Source, Sources, testing};
use stunet::tensor::{Dims, Precision, Tensor};
use stunet::{Device, Image, Predictor, Result};

use super::random;
use super::sim::Sim;
use super::train::unet;

/// Widths that fill blocks of channels, and the demo's kind that does not: 8 in the first stage, 24 and 28 in two halves.
pub(super) const WIDTHS: [[usize; 6]; 2] = [[16, 16, 32, 32, 32, 32], [8, 16, 24, 28, 28, 28]];

pub(super) fn config(dims: [usize; 6]) -> StuNetConfig {
    let strides = [[2, 2, 2], [1, 2, 2], [1; 3], [1; 3], [1; 3]];
    StuNetConfig { dims, ..StuNetConfig::small(1, 5) }.with_strides(strides)
}

pub(super) const PATCH: [usize; 3] = [8, 16, 12];

/// Logits and labels of a window.
fn run(
    config: &StuNetConfig,
    [d, h, w]: [usize; 3],
    device: &Device,
    precision: Precision,
) -> Result<(Vec<f32>, Vec<u16>)> {
    let net = config.build_random_with(device, 3, precision)?;
    let mut cx = Ctx::infer(device);
    let x = Tensor::from_host(&random(d * h * w, 7), Dims::from([1, 1, d, h, w]), device)?;
    let x = cx.leaf(x);
    let labels = net.labels(&mut cx, x.clone())?;
    Ok((net.forward(&mut cx, x)?.into_value().to_host()?, labels))
}

fn error(got: &[f32], exact: &[f32]) -> f64 {
    let sum =
        |f: &dyn Fn(f64, f64) -> f64| got.iter().zip(exact).map(|(g, e)| f(f64::from(*g), f64::from(*e))).sum::<f64>();
    (sum(&|g, e| (g - e).powi(2)) / sum(&|_, e| e * e)).sqrt()
}

/// Holds a window through the network on `cards`, one after the other, against the processor: as near to f32 as the
/// processor is with the same storage, and the same bytes on each of them.
pub(super) fn network_is_near(
    config: &StuNetConfig,
    patch: [usize; 3],
    precision: Precision,
    cards: impl Iterator<Item = Device>,
) {
    let cpu = Device::cpu();
    let (exact, _) = run(config, patch, &cpu, Precision::F32).unwrap();
    let own = error(&run(config, patch, &cpu, Precision::Bf16).unwrap().0, &exact);
    let most = match precision {
        Precision::Bf16 => 1.5 * own,
        // Eight times the digits.
        Precision::F16 => 1.5 * own / 8.0,
        // The processor's own algorithms are off by half of this.
        _ => 1e-5,
    };
    let mut first = None;
    for device in cards {
        let (logits, labels) = run(config, patch, &device, precision).unwrap();
        let e = error(&logits, &exact);
        assert!(e <= most, "{} {precision:?}: {e:e}, the processor's {own:e}", device.name());
        let space: usize = patch.iter().product();
        for (v, &label) in labels.iter().enumerate() {
            let of = |c: usize| logits[c * space + v];
            let top = (0..config.classes).map(of).fold(f32::NEG_INFINITY, f32::max);
            // Logits are rounded when they are stored, the decision's are not.
            assert!(of(usize::from(label)) >= top - 2f32.powi(-7) * top.abs().max(1.0), "voxel {v}: {label}");
        }
        let bits: Vec<u32> = logits.iter().map(|v| v.to_bits()).collect();
        let (same_bits, same_labels) = first.get_or_insert_with(|| (bits.clone(), labels.clone()));
        assert!(*same_bits == bits && *same_labels == labels, "{} {precision:?}: other bytes", device.name());
    }
}

/// Every stage of a STU-Net, on cards of several generations and in several orders of warps.
#[test]
pub(super) fn ptx_stunet_through_the_library() {
    for (capability, precision) in
        [([8, 6], Precision::Bf16), ([8, 6], Precision::F16), ([7, 5], Precision::F16), ([8, 6], Precision::F32)]
    {
        let card = |seed| Device::on(Arc::new(Sim::of(seed, capability)), format!("sim of {capability:?}"));
        network_is_near(&config(WIDTHS[0]), PATCH, precision, [0, 5].into_iter().map(card));
    }
    // Generations differ in kernels, not in what these are given.
    let card = Device::on(Arc::new(Sim::of(0, [8, 6])), "sim".into());
    network_is_near(&config(WIDTHS[1]), PATCH, Precision::Bf16, [card].into_iter());
}

/// What a card's device says of itself, and what it has no kernels for.
#[test]
pub(super) fn ptx_devices_are_honest() {
    let device = Device::on(Arc::new(Sim::of(0, [8, 6])), "sim".into());
    assert!(!device.is_cpu() && device.name() == "sim" && device.precision() == Precision::Bf16);
    assert_eq!(Device::on(Arc::new(Sim::of(0, [7, 5])), "old".into()).precision(), Precision::F16);
    let x = Tensor::from_host(&random(60, 1), Dims::from([1, 1, 3, 4, 5]), &device).unwrap();
    assert_eq!(x.to_host().unwrap(), random(60, 1));
    assert_eq!(device.memory().in_use, 256);
    let mut cx = Ctx::infer(&device);
    let x = cx.leaf(x);
    let e = stunet::ops::leaky_relu(&mut cx, x, 0.1).unwrap_err().to_string();
    assert!(e.contains("leaky_relu on sim"), "{e}");
    device.set_memory_limit(Some(1 << 20));
    let e = Tensor::from_host(&vec![0.0; 1 << 19], Dims::from([1 << 19]), &device).unwrap_err().to_string();
    assert!(e.contains("limit"), "{e}");
    assert!(Tensor::from_host(&[1.0], Dims::from([1]), &Device::cpu()).is_ok());
    let cpu = config(WIDTHS[0]).build_random_with(&Device::cpu(), 0, Precision::F16).unwrap_err().to_string();
    assert!(cpu.contains("float16"), "{cpu}");
}

/// A whole prediction: windows that overlap, mirrored, scores of their few classes summed on the card, or with the processor
/// when the card has no room, and labels on the image's own grid.
#[test]
pub(super) fn ptx_prediction_through_the_library() {
    let config = StuNetConfig { dims: [16, 16, 16, 16, 16, 16], ..StuNetConfig::small(1, 4) }.with_strides([
        [1, 2, 2],
        [1; 3],
        [1; 3],
        [1; 3],
        [1; 3],
    ]);
    let (patch, shape) = ([4, 8, 8], [6, 7, 12]);
    let image = Image::new(vec![random(6 * 7 * 12, 11)], Geometry::new(shape, [1.0; 3])).unwrap();
    let labels = |device: &Device, precision: Precision, mirroring: bool| {
        let net = config.build_random_with(device, 2, precision).unwrap();
        let options = PredictOptions::default().mirroring(mirroring);
        let mut predictor = Predictor::stand_in(net, patch, [1.0; 3], device).unwrap().options(options);
        let labels = predictor.predict(&image).unwrap().labels;
        (0..labels.len()).map(|i| labels.get(i)).collect::<Vec<u16>>()
    };
    let cpu = Device::cpu();
    let agreement = |a: &[u16], b: &[u16]| a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64;
    for mirroring in [false, true] {
        let exact = labels(&cpu, Precision::F32, mirroring);
        assert!((0..4).filter(|l| exact.contains(l)).count() > 2, "{exact:?}");
        let sim = Arc::new(Sim::of(1, [8, 6]));
        let card = Device::on(sim.clone(), "sim".into());
        let got = labels(&card, Precision::F32, mirroring);
        assert!(sim.ran("aggregate_scores_f32") && sim.ran("resample_labels_f32"), "not on the card");
        // Passes after the first find all their memory where it was.
        let memory = card.memory();
        assert!(memory.planned_hits > 0 && memory.planned_misses == 0, "{memory:?}");
        let net = config.build_random_with(&cpu, 2, Precision::F32).unwrap();
        let options = PredictOptions::default().mirroring(mirroring);
        let mut predictor = Predictor::stand_in(net, patch, [1.0; 3], &cpu).unwrap().options(options);
        let scores = predictor.predict_with_scores(&image).unwrap().1.values;
        let voxels: usize = shape.iter().product();
        let size = scores.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (v, (got, exact)) in got.iter().zip(&exact).enumerate() {
            let of = |label: u16| scores[usize::from(label) * voxels + v];
            // Where labels differ, scores are as good as equal.
            assert!(of(*exact) - of(*got) <= 1e-4 * size, "voxel {v}: {got}, expected {exact}");
        }
        let halves = labels(&card, Precision::Bf16, mirroring);
        let own = agreement(&labels(&cpu, Precision::Bf16, mirroring), &exact);
        let got = agreement(&halves, &exact);
        assert!(got >= own - 0.05, "bf16: {got}, the processor's {own}");
        // A card on which only the network has room.
        let scale = Device::on(Arc::new(Sim::of(1, [8, 6])), "scale".into());
        let net = config.build_random_with(&scale, 2, Precision::Bf16).unwrap();
        let needs = scale.memory().in_use + config.activation_bytes(patch, &scale, false, Precision::Bf16);
        drop(net);
        let total = (needs + 64) / 9 * 10 + 10;
        let tight = Device::on(Arc::new(Sim::of(1, [8, 6]).with_total(total)), "tight".into());
        assert!(labels(&tight, Precision::Bf16, mirroring) == halves, "sums elsewhere, other labels");
    }
}

/// Whole predictions by nnU-Net's own networks: transposed convolutions, pooled shortcuts and heads as they are trained, of which
/// the last is asked.
#[test]
pub(super) fn ptx_prediction_of_unets_through_the_library() {
    let (patch, shape) = ([4, 8, 8], [4, 7, 12]);
    let voxels: usize = shape.iter().product();
    let channels = vec![random(voxels, 11), random(voxels, 12)];
    let image = Image::new(channels, Geometry::new(shape, [1.0; 3])).unwrap();
    let agreement = |a: &[u16], b: &[u16]| a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64;
    for kind in [UnetKind::Plain, UnetKind::ResEnc] {
        let predictor = |device: &Device, precision: Precision| {
            let net = unet(kind).build_random_with(device, 2, precision).unwrap();
            let options = PredictOptions::default().mirroring(false);
            Predictor::stand_in(net, patch, [1.0; 3], device).unwrap().options(options)
        };
        let labels = |device: &Device, precision: Precision| {
            let labels = predictor(device, precision).predict(&image).unwrap().labels;
            labels.iter().collect::<Vec<u16>>()
        };
        let cpu = Device::cpu();
        let exact = labels(&cpu, Precision::F32);
        assert!((0..3).filter(|l| exact.contains(l)).count() > 1, "{exact:?}");
        let sim = Arc::new(Sim::of(1, [8, 6]));
        let card = Device::on(sim.clone(), "sim".into());
        let got = labels(&card, Precision::F32);
        let transposed = sim.entries().iter().any(|e| e.starts_with("conv_transpose3d"));
        assert!(transposed && sim.ran("aggregate_scores_f32") && sim.ran("resample_labels_f32"), "not on the card");
        let scores = predictor(&cpu, Precision::F32).predict_with_scores(&image).unwrap().1.values;
        let size = scores.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (v, (got, exact)) in got.iter().zip(&exact).enumerate() {
            let of = |label: u16| scores[usize::from(label) * voxels + v];
            // Where labels differ, scores are as good as equal.
            assert!(of(*exact) - of(*got) <= 1e-4 * size, "{kind:?}, voxel {v}: {got}, expected {exact}");
        }
        let own = agreement(&labels(&cpu, Precision::Bf16), &exact);
        let got = agreement(&labels(&card, Precision::Bf16), &exact);
        assert!(got >= own - 0.05, "{kind:?} in bf16: {got}, the processor's {own}");
    }
}

/// From the network's grid to finer and coarser ones on the card: the labels that the processor's own way gives, which is
/// taken where probabilities are asked for, and those of a prediction without a card.
#[test]
pub(super) fn ptx_prediction_on_another_grid_through_the_library() {
    // More classes than features: those are what is summed.
    let config = StuNetConfig { dims: [16; 6], ..StuNetConfig::small(1, 24) };
    let config = config.with_strides([[1, 2, 2], [1, 2, 2], [1; 3], [1; 3], [1; 3]]);
    let patch = [4, 8, 8];
    let agreement = |a: &[u16], b: &[u16]| a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64;
    // Several windows along every axis; one window, wider than the image; an axis that is resampled apart.
    for (shape, spacing) in
        [([5, 8, 17], [1.3, 0.9, 0.8]), ([5, 11, 9], [0.7, 0.6, 0.75]), ([3, 9, 10], [4.0, 1.0, 0.9])]
    {
        let image = Image::new(vec![random(shape.iter().product(), 12)], Geometry::new(shape, spacing)).unwrap();
        let labels = |device: &Device| {
            let net = config.build_random_with(device, 2, Precision::F32).unwrap();
            let options = PredictOptions::default().mirroring(false);
            let mut predictor = Predictor::stand_in(net, patch, [1.0; 3], device).unwrap().options(options);
            let labels = predictor.predict(&image).unwrap().labels;
            labels.iter().collect::<Vec<u16>>()
        };
        let sim = Arc::new(Sim::of(1, [8, 6]));
        let card = Device::on(sim.clone(), "sim".into());
        let got = labels(&card);
        assert!(sim.ran("resample_labels_f32"), "the labels were made elsewhere");
        let exact = labels(&Device::cpu());
        assert!((0..24).filter(|l| exact.contains(l)).count() > 2, "{exact:?}");
        // Near ties: sums differ by their order.
        assert!(agreement(&got, &exact) >= 0.998, "{shape:?}: {}", agreement(&got, &exact));
    }
}

/// What measurements walk: every variant by its name, one of which is taken without.
#[test]
pub(super) fn ptx_variants_through_the_library() {
    let device = Device::on(Arc::new(Sim::of(0, [8, 6])), "sim".into());
    let (dims, how) = ([1, 48, 3, 9, 10], Conv3d { stride: [1; 3], padding: [1; 3] });
    let weight = random(40 * 48 * 27, 3);
    let w = testing::stored_filter(&weight, [40, 48, 3, 3, 3], Precision::Bf16, &device).unwrap();
    let input = |device: &Device| {
        let values = Precision::Bf16;
        let values: Vec<f32> = random(48 * 270, 4).into_iter().map(|v| values.round(v)).collect();
        Tensor::from_host(&values, Dims::from(dims), device).unwrap()
    };
    let cpu = Device::cpu();
    let rounded: Vec<f32> = weight.iter().map(|v| Precision::Bf16.round(*v)).collect();
    let own = testing::filter(&rounded, [40, 48, 3, 3, 3], &cpu).unwrap();
    let mut cx = Ctx::infer(&cpu);
    let x = cx.leaf(input(&cpu));
    let exact = ops::conv3d(&mut cx, x, &own, None, how).unwrap().into_value().to_host().unwrap();
    let variants = testing::conv3d_estimates(&device, dims, &[48], &w, how, false).unwrap();
    assert!(variants.len() > 3 && variants.iter().filter(|v| v.chosen).count() == 1, "{variants:?}");
    for v in variants {
        let mut cx = Ctx::infer(&device).traced();
        let x = testing::stored(input(&device), Precision::Bf16).unwrap();
        let x = cx.leaf(x);
        let (y, _) = testing::conv3d(v.name, &mut cx, x, &w, None, how).unwrap();
        assert_eq!(cx.steps()[0].macs, 40 * 48 * 27 * 270);
        for (g, e) in y.into_value().to_host().unwrap().iter().zip(&exact) {
            assert!((g - e).abs() <= 2f32.powi(-8) * e.abs() + 1e-3, "{}: {g} {e}", v.name);
        }
    }
}

/// Labels that nobody reads are decided all the same, and their memory is given back.
#[test]
pub(super) fn ptx_head_labels_that_stay() {
    let sim = Arc::new(Sim::of(0, [8, 6]));
    let device = Device::on(sim.clone(), "sim".into());
    let mut cx = Ctx::infer(&device);
    let x = Tensor::from_host(&random(16 * 60, 1), Dims::from([1, 16, 3, 4, 5]), &device).unwrap();
    let x = cx.leaf(testing::stored(x, Precision::Bf16).unwrap());
    let before = device.memory().in_use;
    testing::head_labels_unread(&mut cx, x.clone(), &random(7 * 16, 2), &random(7, 3)).unwrap();
    device.synchronize().unwrap();
    assert!(sim.ran("head_labels_bf16"));
    assert_eq!(device.memory().in_use, before);
    let e = testing::head_labels_unread(&mut cx, x, &random(7 * 15, 2), &random(7, 3)).unwrap_err().to_string();
    assert!(e.contains("105 weights for 7 classes and 16 channels"), "{e}");
}

/// The image as it arrives, at every stride: what the processor makes of it, without voxels of it in memory.
#[test]
pub(super) fn ptx_first_layers_through_the_library() {
    let (dims, weight) = ([1, 2, 5, 9, 18], random(20 * 2 * 27, 3));
    for stride in [[1; 3], [2; 3], [1, 2, 2]] {
        let run = |device: &Device, precision: Precision| {
            let values: Vec<f32> = random(2 * 5 * 9 * 18, 4).iter().map(|v| Precision::Bf16.round(*v)).collect();
            let rounded: Vec<f32> = weight.iter().map(|v| Precision::Bf16.round(*v)).collect();
            let w = testing::stored_filter(&rounded, [20, 2, 3, 3, 3], precision, device).unwrap();
            let mut cx = Ctx::infer(device).traced();
            let x = cx.leaf(Tensor::from_host(&values, Dims::from(dims), device).unwrap());
            let y = ops::conv3d(&mut cx, x, &w, None, Conv3d { stride, padding: [1; 3] }).unwrap();
            let kernel = cx.steps()[0].implementation;
            (y.into_value().to_host().unwrap(), kernel)
        };
        let device = Device::on(Arc::new(Sim::of(0, [8, 6])), "sim".into());
        let (got, kernel) = run(&device, Precision::Bf16);
        assert_eq!(kernel, "first");
        assert!(error(&got, &run(&Device::cpu(), Precision::F32).0) < 2f64.powi(-8), "{stride:?}");
    }
}

/// Planes as they arrive are made voxels by whoever reads them; what does not fit is refused, not read as something else.
#[test]
pub(super) fn ptx_operands_are_what_they_are_taken_for() {
    let sim = || Device::on(Arc::new(Sim::of(0, [8, 6])), "sim".into());
    let (device, cpu, dims) = (sim(), Device::cpu(), [1, 16, 3, 4, 5]);
    let x = |device: &Device, seed| Tensor::from_host(&random(16 * 60, seed), Dims::from(dims), device).unwrap();
    let how = InstanceNorm { eps: 1e-5, slope: Some(0.01) };
    let run = |device: &Device| {
        let [w, b] = [1, 2].map(|s| testing::vector(&random(16, s), device).unwrap());
        let mut cx = Ctx::infer(device);
        let [a, r, f] = [3, 4, 5].map(|s| x(device, s)).map(|t| cx.leaf(t));
        let y = ops::instance_norm(&mut cx, a, &w, &b, Some(r), how).unwrap().into_value().to_host().unwrap();
        (y, ops::head_labels(&mut cx, f, &random(7 * 16, 6), &random(7, 7)).unwrap())
    };
    let (got, exact) = (run(&device), run(&cpu));
    assert!(error(&got.0, &exact.0) < 1e-5 && got.1 == exact.1);
    // Halves of 28 channels each, the first repeated, at the end of a block.
    let residual = |device: &Device, precision: Precision| {
        let w = testing::stored_filter(&random(20 * 56, 8), [20, 56, 1, 1, 1], precision, device).unwrap();
        let [weight, bias] = [1, 2].map(|s| testing::vector(&random(20, s), device).unwrap());
        let identity = testing::stored_filter(
            &(0..400).map(|i| if i % 21 == 0 { 1.0 } else { 0.0 }).collect::<Vec<_>>(),
            [20, 20, 1, 1, 1],
            precision,
            device,
        )
        .unwrap();
        let mut cx = Ctx::infer(device);
        let tensor = |dims: [usize; 5], seed| {
            let n = dims.iter().product();
            let t = Tensor::from_host(&random(n, seed), Dims::from(dims), device).unwrap();
            testing::stored(t, precision).unwrap()
        };
        let [low, skip, y] = [([1, 28, 2, 2, 3], 9), ([1, 28, 4, 4, 6], 10), ([1, 20, 4, 4, 6], 11)];
        let [low, skip, y] = [low, skip, y].map(|(d, s)| cx.leaf(tensor(d, s)));
        let how1 = Conv3d { stride: [1; 3], padding: [0; 3] };
        let (y, moments) = ops::conv3d_measured(&mut cx, y, &identity, None, how1).unwrap();
        let norm = Affine::new(&moments, &weight, &bias, how).unwrap();
        let sources = Sources::Two(Source::repeated(low, [2; 3]), skip.into());
        ops::conv3d_residual(&mut cx, y, &norm, sources, &w, None, how1).unwrap().into_value().to_host().unwrap()
    };
    let exact = residual(&cpu, Precision::F32);
    assert!(error(&residual(&device, Precision::F32), &exact) < 1e-5);
    assert!(error(&residual(&device, Precision::Bf16), &exact) < 1e-2);
    // Two cards, a card and the processor, 16 bits that the card does not have, storage that differs.
    let other = sim();
    let w = testing::stored_filter(&random(16 * 16, 1), [16, 16, 1, 1, 1], Precision::Bf16, &device).unwrap();
    let how = Conv3d { stride: [1; 3], padding: [0; 3] };
    for (place, what) in [(&other, "sim"), (&cpu, "cpu")] {
        let mut cx = Ctx::infer(&device);
        let foreign = cx.leaf(x(place, 1));
        let e = ops::conv3d(&mut cx, foreign, &w, None, how).unwrap_err().to_string();
        assert!(e.contains(what), "{e}");
        let mut cx = Ctx::infer(place);
        let own = cx.leaf(x(place, 1));
        assert!(ops::conv3d(&mut cx, own, &w, None, how).is_err());
        let foreign = cx.leaf(x(&device, 1));
        assert!(ops::leaky_relu(&mut cx, foreign, 0.1).is_err());
    }
    let mut cx = Ctx::infer(&device);
    let floats = testing::stored(x(&device, 1), Precision::F32).unwrap();
    let floats = cx.leaf(floats);
    assert!(ops::conv3d(&mut cx, floats, &w, None, how).unwrap_err().to_string().contains("f32 beside bf16"));
    let mut cx = Ctx::infer(&device).strict(true);
    let plain = cx.leaf(x(&device, 1));
    assert!(ops::conv3d(&mut cx, plain, &w, None, how).is_err());
    let old = Device::on(Arc::new(Sim::of(0, [7, 5])), "old".into());
    assert!(testing::stored_filter(&random(16, 1), [1, 16, 1, 1, 1], Precision::Bf16, &old).is_err());
    // Only transposed convolutions whose kernel is their stride.
    let w = testing::transposed_filter(&random(16 * 16 * 8, 1), [16, 16, 2, 2, 2], &device).unwrap();
    let mut cx = Ctx::infer(&device);
    let plain = cx.leaf(x(&device, 1));
    let how = ConvTranspose3d { stride: [1; 3], padding: [0; 3], output_padding: [0; 3] };
    assert!(ops::conv_transpose3d(&mut cx, plain, &w, None, how).is_err());
}
