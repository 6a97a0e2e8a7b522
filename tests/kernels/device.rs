//! A network through the library's own operations, on a card that the interpreter stands in for.

use std::sync::Arc;

use stunet::PredictOptions;
use stunet::autograd::Ctx;
use stunet::io::Geometry;
use stunet::models::StuNetConfig;
use stunet::nn::Module;
use stunet::tensor::{Dims, Precision, Tensor};
use stunet::{Device, Image, Predictor, Result};

use super::random;
use super::sim::Sim;

fn config() -> StuNetConfig {
    let strides = [[2, 2, 2], [1, 2, 2], [1; 3], [1; 3], [1; 3]];
    StuNetConfig { dims: [16, 16, 32, 32, 32, 32], ..StuNetConfig::small(1, 5) }.with_strides(strides)
}

const PATCH: [usize; 3] = [8, 16, 12];

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
        network_is_near(&config(), PATCH, precision, [0, 5].into_iter().map(card));
    }
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
    let cpu = config().build_random_with(&Device::cpu(), 0, Precision::F16).unwrap_err().to_string();
    assert!(cpu.contains("float16"), "{cpu}");
}

/// A whole prediction: windows that overlap, mirrored, their features summed on the card, or with the processor when the
/// card has no room, and labels on the image's own grid.
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
        let card = Device::on(Arc::new(Sim::of(1, [8, 6])), "sim".into());
        let got = labels(&card, Precision::F32, mirroring);
        assert!(agreement(&got, &exact) >= 0.998, "f32: {}", agreement(&got, &exact));
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
