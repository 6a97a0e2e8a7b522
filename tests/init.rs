//! Random parameters: distributions, and what they depend on.

use std::collections::BTreeMap;

use stunet::Device;
use stunet::models::{NetworkConfig, StuNetConfig, UnetConfig, UnetKind};
use stunet::nn::{ParamSource, RandomParams, Scheme};

use crate::common::drive::bits;

/// A convolution, a transposed one and a norm, as nnU-Net's networks name them.
fn shapes() -> BTreeMap<String, Vec<usize>> {
    let mut all = BTreeMap::new();
    for (name, weight, bias) in [
        ("encoder.stages.0.blocks.0.conv2.conv", vec![48, 20, 3, 3, 3], 48),
        ("encoder.stages.0.blocks.0.conv2.norm", vec![48], 48),
        // [I, O, ..]: PyTorch's fan in counts the outputs.
        ("decoder.transpconvs.0", vec![64, 96, 2, 2, 2], 96),
    ] {
        all.insert(format!("{name}.weight"), weight);
        all.insert(format!("{name}.bias"), vec![bias]);
    }
    all
}

/// A residual encoder's blocks begin as their shortcuts; nothing else of it is zero but what all begin with.
#[test]
fn networks_begin_as_their_trainers_have_it() {
    let unet = |kind| {
        NetworkConfig::from(UnetConfig {
            kind,
            in_channels: 1,
            classes: 3,
            features: vec![8, 12, 16],
            kernels: vec![[3; 3]; 3],
            strides: vec![[1; 3], [2; 3], [2; 3]],
            depth: vec![2; 3],
            decoder_depth: vec![1; 2],
            conv_bias: true,
            head_bias: true,
            planar: false,
        })
    };
    for (config, scheme) in [
        (unet(UnetKind::Plain), Scheme::He),
        (unet(UnetKind::ResEnc), Scheme::He),
        (NetworkConfig::from(StuNetConfig::small(1, 3)), Scheme::Torch),
    ] {
        let source = config.initial(7, scheme);
        let mut zeros = 0;
        for (name, _) in config.parameters() {
            let zero = values(&source, &name).iter().all(|v| *v == 0.0);
            let last = name.contains(".conv2.norm.") && name.starts_with("encoder.stages");
            assert_eq!(zero, last || (name.ends_with("bias") && scheme == Scheme::He) || is_norm_bias(&name), "{name}");
            zeros += usize::from(zero && name.ends_with("norm.weight"));
        }
        assert_eq!(zeros, if matches!(&config, NetworkConfig::Unet(c) if c.kind == UnetKind::ResEnc) { 6 } else { 0 });
        assert_eq!(config.build(&source, &Device::cpu()).unwrap().parameters(), config.parameters());
    }
}

fn is_norm_bias(name: &str) -> bool {
    name.ends_with("bias") && name.rsplit('.').nth(1).is_some_and(|layer| layer.starts_with("norm"))
}

fn values(source: &RandomParams, name: &str) -> Vec<f32> {
    source.values(name).unwrap().into_owned()
}

/// Central moments of order 1 to 4 of `x / scale` about 0.
fn moments(x: &[f32], scale: f64) -> [f64; 4] {
    [1, 2, 3, 4].map(|k| x.iter().map(|v| (f64::from(*v) / scale).powi(k)).sum::<f64>() / x.len() as f64)
}

/// Each sample moment of order k of n independent values has the variance (m_2k - m_k^2) / n; five standard deviations of
/// a nearly normal mean are passed once in a million seeds.
fn check(name: &str, x: &[f32], scale: f64, truth: [f64; 8]) {
    for (k, found) in moments(x, scale).into_iter().enumerate() {
        let deviation = ((truth[2 * k + 1] - truth[k] * truth[k]) / x.len() as f64).sqrt();
        assert!((found - truth[k]).abs() < 5.0 * deviation, "{name}: moment {} is {found}, not {}", k + 1, truth[k]);
    }
}

const FILTERS: [(&str, f64); 2] =
    [("encoder.stages.0.blocks.0.conv2.conv", 20.0 * 27.0), ("decoder.transpconvs.0", 96.0 * 8.0)];

#[test]
fn he_is_normal_with_the_variance_of_the_fan_in() {
    let normal = [0.0, 1.0, 0.0, 3.0, 0.0, 15.0, 0.0, 105.0];
    for seed in 0..3 {
        let source = RandomParams::new(seed, shapes());
        for (layer, fan_in) in FILTERS {
            let std = (2.0 / (1.0 + 1e-4) / fan_in).sqrt();
            check(layer, &values(&source, &format!("{layer}.weight")), std, normal);
            assert!(values(&source, &format!("{layer}.bias")).iter().all(|v| *v == 0.0));
        }
    }
}

#[test]
fn pytorchs_own_is_uniform_within_the_root_of_the_fan_in() {
    let uniform = [0.0, 1.0 / 3.0, 0.0, 1.0 / 5.0, 0.0, 1.0 / 7.0, 0.0, 1.0 / 9.0];
    for seed in 0..3 {
        let source = RandomParams::new(seed, shapes()).scheme(Scheme::Torch);
        for (layer, fan_in) in FILTERS {
            let most = 1.0 / f64::sqrt(fan_in);
            for part in ["weight", "bias"] {
                let x = values(&source, &format!("{layer}.{part}"));
                check(layer, &x, most, uniform);
                assert!(x.iter().all(|v| f64::from(v.abs()) <= most * (1.0 + 1e-7)), "{layer}.{part}");
            }
        }
    }
}

#[test]
fn norms_begin_as_identities_or_where_asked_as_zero() {
    let norm = "encoder.stages.0.blocks.0.conv2.norm";
    for scheme in [Scheme::He, Scheme::Torch] {
        let source = RandomParams::new(4, shapes()).scheme(scheme);
        assert_eq!(values(&source, &format!("{norm}.weight")), [1.0; 48]);
        assert_eq!(values(&source, &format!("{norm}.bias")), [0.0; 48]);
        let source = source.zeros(|n| n.contains(".conv2.norm."));
        assert_eq!(values(&source, &format!("{norm}.weight")), [0.0; 48]);
        assert!(values(&source, "encoder.stages.0.blocks.0.conv2.conv.weight").iter().any(|v| *v != 0.0));
    }
}

/// Any thread may ask, in any order, for any part of the network.
#[test]
fn values_depend_on_seed_name_and_shape_only() {
    for scheme in [Scheme::He, Scheme::Torch] {
        let source = |seed| RandomParams::new(seed, shapes()).scheme(scheme);
        let name = "decoder.transpconvs.0.weight";
        let first = values(&source(7), name);
        let other = source(7);
        let _ = values(&other, "encoder.stages.0.blocks.0.conv2.conv.weight");
        let threads: Vec<_> = std::thread::scope(|s| {
            let asked: Vec<_> = (0..3).map(|_| s.spawn(|| values(&other, name))).collect();
            asked.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(threads.iter().all(|t| bits(t) == bits(&first)));
        let fewer = RandomParams::new(7, BTreeMap::from([(name.to_string(), shapes()[name].clone())])).scheme(scheme);
        assert_eq!(bits(&values(&fewer, name)), bits(&first));
        assert_ne!(bits(&values(&source(8), name)), bits(&first));
        let renamed = BTreeMap::from([("decoder.transpconvs.1.weight".to_string(), shapes()[name].clone())]);
        let renamed = RandomParams::new(7, renamed).scheme(scheme);
        assert_ne!(bits(&values(&renamed, "decoder.transpconvs.1.weight")), bits(&first));
    }
}
