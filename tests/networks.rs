//! nnU-Net's U-Nets against PyTorch, and laws of the whole network.

use serde_json::{Value, json};
use stunet::autograd::Ctx;
use stunet::models::{Network, NetworkConfig, UnetConfig, UnetKind};
use stunet::nn::{Module, ParamSource};
use stunet::nnunet::model::{Architecture, ModelOptions, convert, planned_architecture};
use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Isa, Precision};

use crate::common::drive::{bits, values};
use crate::common::shared;
use crate::model_folder::open;
use crate::models::{Before, relative_error, usizes};

const KINDS: [UnetKind; 3] = [UnetKind::Plain, UnetKind::ResEnc, UnetKind::Generic];

/// A small network with every kind of kernel and stride, and channels that fill no block.
fn small(kind: UnetKind) -> UnetConfig {
    UnetConfig {
        kind,
        in_channels: 2,
        classes: 5,
        features: vec![8, 20, 24, 24],
        kernels: vec![[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        strides: vec![[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 1]],
        depth: vec![1, 3, 2, 2],
        // nnU-Net 1 has at least two.
        decoder_depth: vec![2, if kind == UnetKind::Generic { 3 } else { 1 }, 2],
        conv_bias: true,
        head_bias: kind != UnetKind::Generic,
        planar: false,
    }
}

/// The same in 2D.
fn planar(kind: UnetKind) -> UnetConfig {
    let mut c = small(kind);
    c.kernels.iter_mut().chain(&mut c.strides).for_each(|v| v[0] = 1);
    UnetConfig { planar: true, ..c }
}

fn heads(net: &Network, device: &Device, input: &[f32], dims: [usize; 5], strict: bool) -> Vec<Vec<f32>> {
    let mut cx = Ctx::infer(device).strict(strict);
    let x = cx.leaf(Tensor::from_host(input, Dims::from(dims), device).unwrap());
    let outs = net.forward_all(&mut cx, x).unwrap();
    outs.into_iter().map(|y| y.into_value().to_host().unwrap()).collect()
}

/// Every head on every instruction set: strictly at most twice PyTorch's own float32 error against float64, otherwise four
/// times, as STU-Net's.
#[test]
fn golden_networks_outputs() {
    let Some(dir) = shared("golden/train") else { return };
    for (name, kind) in [("net_3_plain", UnetKind::Plain), ("net_4_resenc", UnetKind::ResEnc)] {
        let meta: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join(format!("{name}.json"))).unwrap()).unwrap();
        let source = Before::open(&dir.join(format!("{name}.safetensors")));
        let features = usizes(&meta["arch"]["features"]);
        let stages = features.len();
        let strides = meta["strides"].as_array().unwrap().iter().map(|s| usizes(s).try_into().unwrap());
        let kernel = |s: usize| {
            let conv = match kind {
                UnetKind::Plain => format!("before/encoder.stages.{s}.0.convs.0.conv.weight"),
                _ => format!("before/encoder.stages.{s}.blocks.0.conv1.conv.weight"),
            };
            source.tensors[&conv].0[2..].try_into().unwrap()
        };
        let is = |a: usize, b: usize| if kind == UnetKind::Plain { a } else { b };
        let config = NetworkConfig::from(UnetConfig {
            kind,
            in_channels: meta["input_channels"].as_u64().unwrap() as usize,
            classes: meta["classes"].as_u64().unwrap() as usize,
            kernels: (0..stages).map(kernel).collect(),
            strides: [[1; 3]].into_iter().chain(strides).collect(),
            depth: (0..stages).map(|s| is(2, if s == 0 { 1 } else { 2 })).collect(),
            decoder_depth: vec![is(2, 1); stages - 1],
            conv_bias: true,
            head_bias: true,
            planar: false,
            features,
        });
        // The file's tensors are those of the network, under all their names.
        let mut names: Vec<String> = config.parameters().into_iter().map(|(n, _)| n).collect();
        for (alias, name) in config.aliases() {
            assert_eq!(source.values(&alias).unwrap(), source.values(&name).unwrap(), "{alias}");
            names.push(alias);
        }
        names.sort();
        let mut found: Vec<&str> = source.tensors.keys().filter_map(|n| n.strip_prefix("before/")).collect();
        found.sort_unstable();
        assert_eq!(names, found);
        let (shape, input) = &source.tensors["input"];
        let dims = [shape[1], shape[2], shape[3], shape[4], shape[5]];
        let input = &input[..dims.iter().product()];
        for &isa in Isa::available() {
            let device = Device::cpu_with(None, isa).unwrap();
            let net = config.build(&source, &device).unwrap();
            for (strict, most) in [(false, 4.0), (true, 2.0)] {
                let outs = heads(&net, &device, input, dims, strict);
                assert_eq!(outs.len(), stages - 1);
                for (i, out) in outs.iter().enumerate() {
                    let error = relative_error(out, &source.tensors[&format!("output/{i}")].1);
                    let torch = meta["torch_f32"]["error"][format!("output/{i}")].as_f64().unwrap();
                    eprintln!("{name} {} strict {strict} output {i}: {error:.2e}, PyTorch {torch:.2e}", isa.name());
                    assert!(error <= most * torch, "{name} {isa:?} output {i}: {error:e} > {most} x {torch:e}");
                }
            }
        }
    }
}

#[test]
fn forward_is_the_same_for_any_thread_count() {
    for kind in KINDS {
        for (config, dims) in [(small(kind), [2, 2, 8, 24, 16]), (planar(kind), [2, 2, 1, 40, 32])] {
            let input = values(dims.iter().product(), 3);
            let all = [1, 2, 7].map(|t| {
                let device = Device::cpu_with_threads(t).unwrap();
                let net = NetworkConfig::from(config.clone()).build_random(&device, 3).unwrap();
                heads(&net, &device, &input, dims, false)
            });
            assert!(all[0] == all[1] && all[0] == all[2]);
            assert!(all[0].iter().flatten().all(|v| v.is_finite()));
            let sizes: Vec<usize> = all[0].iter().map(Vec::len).collect();
            let voxels = |s: usize| {
                dims[2..].iter().product::<usize>() / config.strides[..=s].iter().flatten().product::<usize>()
            };
            assert_eq!(sizes, [0, 1, 2].map(|s| 2 * 5 * voxels(s)));
        }
    }
}

/// A 2D network gives what the 3D network of one slice does, filters of the same values; without biases, too.
#[test]
fn a_2d_network_is_a_slice() {
    for kind in KINDS {
        for conv_bias in [true, false] {
            let flat = UnetConfig { conv_bias, ..planar(kind) };
            let whole = UnetConfig { planar: false, ..flat.clone() };
            assert!(flat.parameters().iter().all(|(_, s)| matches!(s.len(), 1 | 4)));
            assert_eq!(flat.parameter_count(), whole.parameter_count());
            let (device, dims) = (Device::cpu(), [1, 2, 1, 24, 16]);
            let input = values(dims.iter().product(), 4);
            let [a, b] = [flat, whole].map(|c| {
                let net = NetworkConfig::from(c).build_random(&device, 9).unwrap();
                heads(&net, &device, &input, dims, false).concat()
            });
            assert_eq!(bits(&a), bits(&b));
        }
    }
}

#[test]
fn wrong_inputs_are_refused() {
    let device = Device::cpu();
    for kind in KINDS {
        let nets = [small(kind), planar(kind)].map(|c| NetworkConfig::from(c).build_random(&device, 0).unwrap());
        for (net, dims) in [(0, [1, 3, 8, 16, 16]), (0, [1, 2, 6, 16, 16]), (1, [1, 2, 8, 16, 16])] {
            let mut cx = Ctx::infer(&device);
            let x = Tensor::from_host(&vec![0.0; dims.iter().product()], Dims::from(dims), &device).unwrap();
            let x = cx.leaf(x);
            assert!(nets[net].features(&mut cx, x).unwrap_err().to_string().starts_with("unet: "));
        }
        let wrong = UnetConfig { kernels: vec![[5; 3]; 4], ..small(kind) };
        assert!(
            NetworkConfig::from(wrong).build_random(&device, 0).unwrap_err().to_string().contains("kernel [5, 5, 5]")
        );
    }
}

/// Labels are the largest logits', and bf16 storage changes few of them.
#[test]
fn labels_and_bf16_storage() {
    let (device, dims) = (Device::cpu(), [1, 2, 16, 32, 32]);
    let input = values(dims.iter().product(), 5);
    for kind in KINDS {
        let config = NetworkConfig::from(small(kind));
        let run = |precision| {
            let net = config.build_random_with(&device, 5, precision).unwrap();
            let mut cx = Ctx::infer(&device);
            let x = cx.leaf(Tensor::from_host(&input, Dims::from(dims), &device).unwrap());
            let labels = net.labels(&mut cx, x.clone()).unwrap();
            (labels, net.forward(&mut cx, x).unwrap().into_value().to_host().unwrap())
        };
        let ((labels, logits), (_, half)) = (run(Precision::F32), run(Precision::Bf16));
        let space = labels.len();
        for (i, label) in labels.iter().enumerate() {
            let of = |c: usize| logits[c * space + i];
            let top = (0..5).map(of).fold(f32::NEG_INFINITY, f32::max);
            assert!(of(usize::from(*label)) >= top - 1e-4 * top.abs().max(1.0));
        }
        // Stored values on the longest path, each off by 2^-8 / sqrt(3) times 3/4 of itself on average; errors of different
        // layers are independent. Twice that, since normalisations of few voxels make errors larger.
        let most = 2.0 * 2f64.powi(-8) / 3f64.sqrt() * 30f64.sqrt();
        let error = relative_error(&half, &logits);
        assert!(error <= most && error > 0.0, "{kind:?}: {error:e}, at most {most:e}");
    }
}

/// The planned peak is never below what a pass really takes, and close to it.
#[test]
fn activation_bytes_bound_the_measured_peak() {
    for kind in KINDS {
        for precision in [Precision::F32, Precision::Bf16] {
            for patch in [[16, 32, 32], [16, 64, 96]] {
                let device = Device::cpu();
                let config = UnetConfig { features: vec![16, 32, 64, 64], ..small(kind) };
                let net = NetworkConfig::from(config.clone()).build_random_with(&device, 0, precision).unwrap();
                let weights = device.memory().in_use;
                device.reset_peak();
                let [d, h, w] = patch;
                let mut cx = Ctx::infer(&device);
                let x = Tensor::from_host(&vec![0.5; 2 * d * h * w], Dims::from([1, 2, d, h, w]), &device).unwrap();
                let x = cx.leaf(x);
                drop(net.features(&mut cx, x).unwrap());
                let peak = device.memory().peak - weights;
                let plan = config.activation_bytes(patch, &device, false, precision);
                assert!(peak <= plan, "{kind:?} {patch:?} {precision:?}: peak {peak} is above the plan {plan}");
                assert!(peak * 2 > plan, "{kind:?} {patch:?} {precision:?}: the plan {plan} is far above {peak}");
            }
        }
    }
}

/// The U-Nets of the same data sets: told from their tensors as the plans have them, and converted without the tensors'
/// other names.
#[test]
fn golden_networks_of_model_folders() {
    let Some(root) = shared("golden/pipeline") else { return };
    for name in crate::golden_predict::DATASETS {
        for (arch, kind) in [("plain", UnetKind::Plain), ("resenc", UnetKind::ResEnc)] {
            let folder = root.join(name).join("model").join(arch);
            let m = open(&folder);
            let Architecture::Unet(sizes) = &m.architecture else { panic!("{name} {arch}") };
            assert_eq!(sizes.kind, kind);
            let (inputs, classes) = (m.plan.channels.len(), m.plan.heads);
            let plans = folder.join("plans.json");
            assert_eq!(planned_architecture(&plans, "3d_fullres", inputs, classes).unwrap(), m.architecture);
            let flat = planned_architecture(&plans, "2d", inputs, classes).unwrap();
            assert!(matches!(flat, Architecture::Unet(s) if s.planar && s.kernels.iter().all(|k| *k == [1, 3, 3])));
            let dir = tempfile::tempdir().unwrap();
            let own = dir.path().join("own");
            convert(&folder, &own, &ModelOptions::new()).unwrap();
            let o = open(&own);
            assert_eq!((&m.plan, &m.architecture), (&o.plan, &o.architecture), "{name} {arch}");
            assert_eq!(o.folds[0].weights.names().len(), m.architecture.tensors().len());
            let found = o.inspect().unwrap();
            assert_eq!(found.strides, sizes.strides[1..]);
        }
    }
}

#[test]
fn planned_networks_of_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plans.json");
    let kwargs = json!({
        "n_stages": 3, "features_per_stage": [8, 16, 32], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], 3], "strides": [1, [1, 2, 2], 2], "n_conv_per_stage": [2, 2, 1],
        "n_conv_per_stage_decoder": 2, "conv_bias": true, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": true}, "dropout_op": null, "dropout_op_kwargs": null,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": true},
    });
    let of = |conf: Value| {
        std::fs::write(&path, json!({"configurations": {"a": conf}}).to_string()).unwrap();
        planned_architecture(&path, "a", 1, 4)
    };
    let with = |class: &str, change: &dyn Fn(&mut Value)| {
        let mut kwargs = kwargs.clone();
        change(&mut kwargs);
        of(json!({"architecture": {"network_class_name": class, "arch_kwargs": kwargs}}))
    };
    let plain = "dynamic_network_architectures.architectures.unet.PlainConvUNet";
    let net = with(plain, &|_| {}).unwrap();
    let Architecture::Unet(sizes) = &net else { panic!() };
    assert_eq!((sizes.kernels[2], sizes.strides[1], &sizes.decoder_depth[..]), ([3; 3], [1, 2, 2], &[2, 2][..]));
    let refused = |class: &str, key: &str, value: Value| {
        let e = with(class, &|k| k[key] = value.clone()).unwrap_err();
        assert_eq!(e.exit_code(), 4);
        e.to_string()
    };
    assert!(refused("my.Net", "n_stages", json!(3)).contains("\"my.Net\""));
    assert!(refused(plain, "conv_op", json!("torch.nn.Conv1d")).contains("conv_op \"torch.nn.Conv1d\""));
    assert!(refused(plain, "norm_op", json!("torch.nn.BatchNorm3d")).contains("norm_op \"torch.nn.BatchNorm3d\""));
    assert!(refused(plain, "norm_op_kwargs", json!({"eps": 1e-3, "affine": true})).contains("norm_op_kwargs"));
    assert!(refused(plain, "nonlin", json!("torch.nn.ReLU")).contains("nonlin \"torch.nn.ReLU\""));
    assert!(refused(plain, "dropout_op", json!("torch.nn.Dropout3d")).contains("dropout_op"));
    assert!(refused(plain, "squeeze_excitation", json!(true)).contains("squeeze_excitation"));
    assert!(refused(plain, "kernel_sizes", json!([[1, 3, 3], [3, 3, 3], [5, 3, 3]])).contains("kernel [5, 3, 3]"));
    assert!(refused(plain, "strides", json!([[1, 1, 1], [4, 2, 2], [2, 2, 2]])).contains("stride [4, 2, 2]"));
    assert!(refused(plain, "strides", json!([[1, 1, 1], [2, 2]])).contains("strides[1]: 2 items, expected 3"));
    assert!(refused(plain, "features_per_stage", json!([1, 2])).contains("features_per_stage"));
    assert!(with("ResidualEncoderUNet", &|_| {}).unwrap_err().to_string().contains("n_conv_per_stage"));

    // Keys of nnU-Net 2.2.
    let old = json!({
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 8, "unet_max_num_features": 20,
        "n_conv_per_stage_encoder": [2, 2, 1], "n_conv_per_stage_decoder": [2, 2],
        "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    });
    let Architecture::Unet(found) = of(old).unwrap() else { panic!() };
    assert_eq!(found.features, [8, 16, 20]);
    assert_eq!((found.kernels, found.strides), (sizes.kernels.clone(), sizes.strides.clone()));
}
