//! Checkpoints of a training: what is written is read, whatever happens in between.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use stunet::autograd::{Ctx, Grads, Param, Var};
use stunet::io::weights::Weights;
use stunet::models::{NetworkConfig, StuNet, StuNetConfig, UnetConfig, UnetKind};
use stunet::nn::{self, GradScaler, Module, Optimizer, ParamSource, RandomParams, Rule};
use stunet::nnunet::checkpoint::{self, Checkpoint, Logged, Logs, Origin, TrainingState};
use stunet::{Device, Error, Precision, Result};

use crate::common::drive::{bits, values};

fn config() -> StuNetConfig {
    StuNetConfig { dims: [4, 6, 8, 8, 8, 8], ..StuNetConfig::small(1, 3) }
}

fn net(seed: u64) -> StuNet {
    config().build_random(&Device::cpu(), seed).unwrap()
}

fn params(net: &dyn Module) -> Vec<&Param> {
    let mut out = Vec::new();
    net.params(&mut |p| out.push(p));
    out
}

fn params_mut(net: &mut dyn Module) -> Vec<&mut Param> {
    let mut out = Vec::new();
    net.params_mut(&mut |p| out.push(p));
    out
}

fn weights(net: &dyn Module) -> Vec<u32> {
    params(net).into_iter().flat_map(|p| bits(&nn::values(p).unwrap())).collect()
}

/// A step with gradients of its own for all parameters but the deepest head's, which nnU-Net gives none.
fn step(net: &mut dyn Module, optimizer: &mut Optimizer, number: u64) {
    let mut grads = Grads::new();
    for (i, p) in params(net).into_iter().enumerate().filter(|(_, p)| !p.name().starts_with("seg_outputs.0")) {
        let g = values(p.dims().len(), 1000 * number + i as u64);
        grads.add_param(p.id(), nn::pack(p, &g, Precision::F32).unwrap()).unwrap();
    }
    optimizer.step(params_mut(net), &mut grads, 0.01).unwrap();
}

fn state() -> TrainingState {
    let object = |v: serde_json::Value| v.as_object().unwrap().clone();
    let origin = Origin {
        trainer: "nnUNetTrainer".into(),
        configuration: "3d_fullres".into(),
        fold: "0".into(),
        plans: object(json!({"plans_name": "nnUNetPlans", "patch": [64, 64, 32], "spacing": [1.5, 1e-3], "x": null})),
        dataset: object(json!({"labels": {"background": 0, "é \"quoted\"\n": 1}, "numTraining": 3})),
        mirror_axes: Some(vec![0, 1, 2]),
    };
    let mut s = TrainingState { epoch: 2, step: 3, best_ema: Some(0.123), ..TrainingState::new(9, origin) };
    s.counters = BTreeMap::from([("augmentation".into(), u64::MAX), ("patches".into(), 17)]);
    s.logs.train_losses = vec![Logged(-0.5), Logged(0.1 + 0.2)];
    s.logs.dice_per_class_or_region = vec![vec![Logged(0.5), Logged(1.0)]; 2];
    s
}

const ADAM: Rule = Rule::Adam { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, decoupled: true };

/// Trains for three steps, writes, reads into another network and trains both on: the same bits.
fn goes_on(write: impl Fn(&Path, &dyn Module, &Optimizer, &TrainingState) -> Result<()>, file: &str) {
    for rule in [Rule::NNUNET, ADAM] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        let (mut a, mut optimizer) = (net(1), Optimizer::new(rule, Some(12.0)).unwrap());
        (0..3).for_each(|k| step(&mut a, &mut optimizer, k));
        write(&path, &a, &optimizer, &state()).unwrap();
        let opened = Checkpoint::open(&path).unwrap();
        assert_eq!(opened.warning(), None);
        let mut b = net(2);
        let mut again = opened.restore(&mut b).unwrap();
        assert_eq!((again.rule(), again.max_norm()), (rule, Some(12.0)));
        assert_eq!(weights(&b), weights(&a));
        let built = config().build(&opened, &Device::cpu()).unwrap();
        assert_eq!(weights(&built), weights(&a));
        for k in 3..6 {
            step(&mut a, &mut optimizer, k);
            step(&mut b, &mut again, k);
        }
        assert_eq!(weights(&b), weights(&a));
        assert!(again.kept(params(&b).iter().find(|p| p.name().starts_with("seg_outputs.0")).unwrap()).is_none());
    }
}

#[test]
fn a_training_goes_on_bit_by_bit() {
    goes_on(|path, net, optimizer, state| checkpoint::write(path, net, optimizer, state), "latest.stunet");
}

#[test]
fn a_training_goes_on_from_nnunets_file() {
    goes_on(
        |path, net, optimizer, state| checkpoint::write_nnunet(path, net, optimizer, state),
        "checkpoint_latest.pth",
    );
}

#[test]
fn all_of_the_state_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (own, pth) = (dir.path().join("a"), dir.path().join("checkpoint_best.pth"));
    let mut all = state();
    all.scaler = Some(GradScaler::new(2048.0, 100).unwrap());
    all.logs.dice_per_class_or_region[0][1] = Logged(f64::NAN);
    let (a, optimizer) = (net(1), Optimizer::nnunet());
    checkpoint::write(&own, &a, &optimizer, &all).unwrap();
    checkpoint::write_nnunet(&pth, &a, &optimizer, &all).unwrap();
    // NaN is not equal to itself.
    let text = |s: &TrainingState| serde_json::to_string(s).unwrap();
    assert_eq!(text(Checkpoint::open(&own).unwrap().state()), text(&all));
    // nnU-Net keeps no random numbers and counts no steps, of which an epoch has 250.
    let found = Checkpoint::open(&pth).unwrap().state().clone();
    let expected = TrainingState { step: 500, seed: 0, counters: BTreeMap::new(), ..all.clone() };
    assert_eq!(text(&found), text(&expected));
    let all = TrainingState { origin: Origin { fold: "all".into(), mirror_axes: None, ..all.origin }, ..all };
    checkpoint::write_nnunet(&pth, &a, &optimizer, &all).unwrap();
    assert_eq!(Checkpoint::open(&pth).unwrap().state().origin, all.origin);
}

#[test]
fn equal_states_give_equal_files() {
    let dir = tempfile::tempdir().unwrap();
    let (a, optimizer) = (net(1), Optimizer::nnunet());
    let bytes = ["a", "b"].map(|name| {
        let file = |ending: &str| dir.path().join(name).with_extension(ending);
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
        let pth = dir.path().join(name).join("checkpoint_final.pth");
        checkpoint::write(file("ck"), &a, &optimizer, &state()).unwrap();
        checkpoint::write_nnunet(&pth, &a, &optimizer, &state()).unwrap();
        [std::fs::read(file("ck")).unwrap(), std::fs::read(pth).unwrap()]
    });
    assert!(bytes[0] == bytes[1]);
}

#[test]
fn the_one_before_is_kept_and_used_when_the_last_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("latest");
    let optimizer = Optimizer::nnunet();
    for epoch in 1..=3 {
        checkpoint::write(&path, &net(u64::from(epoch)), &optimizer, &TrainingState { epoch, ..state() }).unwrap();
    }
    let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["latest", "latest.previous"]);
    let epoch = || Checkpoint::open(&path).map(|c| (c.state().epoch, c.warning().map(str::to_string)));
    assert_eq!(epoch().unwrap(), (3, None));
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, &good[..good.len() - 1]).unwrap();
    let (found, warning) = epoch().unwrap();
    let warning = warning.unwrap();
    assert!(found == 2 && warning.contains("latest.previous is used") && !warning.contains('\n'), "{warning}");
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(epoch().unwrap(), (2, Some(_))));
    std::fs::write(dir.path().join("latest.previous"), b"x").unwrap();
    assert!(matches!(epoch(), Err(Error::Io { .. })));
}

/// Every cut and every flipped byte is found, by one clear line.
#[test]
fn damage_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    checkpoint::write(&path, &net(1), &Optimizer::nnunet(), &state()).unwrap();
    let good = std::fs::read(&path).unwrap();
    let bad = dir.path().join("bad");
    let refused = |bytes: &[u8], what: &str| {
        let _ = std::fs::remove_file(&bad);
        std::fs::write(&bad, bytes).unwrap();
        let e = Checkpoint::open(&bad).expect_err(what);
        let text = e.to_string();
        assert!(matches!(e, Error::Model { .. } | Error::Unsupported { .. }), "{what}: {text}");
        assert!(text.contains("bad") && !text.contains('\n'), "{what}: {text}");
    };
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for at in (0..200).chain((200..8 + header).step_by(97)).chain((8 + header..good.len()).step_by(4099)) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        refused(&bytes, &format!("byte {at}"));
    }
    for len in [0, 1, 8, 100, header, 8 + header, good.len() - 1] {
        refused(&good[..len], &format!("cut to {len}"));
    }
    let mut longer = good.clone();
    longer.push(0);
    refused(&longer, "one byte more");
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(&huge, "a huge header");
    assert!(Checkpoint::open(&path).is_ok());
}

/// A safetensors file that begins with the byte of a pickle, or the letters of a zip file, is still one.
#[test]
fn defect_a_header_of_any_length_is_told_from_pytorchs_containers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    for len in [0x80_usize, 0x280, 0x4b50] {
        let mut text = String::from("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}");
        text.extend(std::iter::repeat_n(' ', len - text.len()));
        let bytes = [&(len as u64).to_le_bytes()[..], text.as_bytes(), &1.5f32.to_le_bytes()].concat();
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Weights::open(&path).unwrap().values("a").unwrap()[..], [1.5]);
    }
}

#[test]
fn another_network_is_refused_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (own, pth) = (dir.path().join("a"), dir.path().join("checkpoint_final.pth"));
    let (mut a, mut optimizer) = (net(1), Optimizer::nnunet());
    step(&mut a, &mut optimizer, 0);
    checkpoint::write(&own, &a, &optimizer, &state()).unwrap();
    checkpoint::write_nnunet(&pth, &a, &optimizer, &state()).unwrap();
    let wider = StuNetConfig { dims: [4, 6, 8, 8, 8, 9], ..config() };
    let deeper = StuNetConfig { depth: [1, 1, 1, 1, 1, 2], ..config() };
    let shallower = StuNetConfig { classes: 2, ..config() };
    for other in [wider, deeper, shallower] {
        let mut b = other.build_random(&Device::cpu(), 3).unwrap();
        let before = weights(&b);
        for path in [&own, &pth] {
            let e = Checkpoint::open(path).unwrap().restore(&mut b).unwrap_err();
            assert!(matches!(e, Error::Model { .. }) && e.to_string().contains("expected"), "{e}");
        }
        assert_eq!(weights(&b), before);
    }
    // Fewer parameters than the file has.
    let mut part = Bag::new(&config().parameters()[..8], 1);
    let e = Checkpoint::open(&own).unwrap().restore(&mut part).unwrap_err().to_string();
    assert!(e.contains("not of a parameter of this network"), "{e}");
    let e = Checkpoint::open(&pth).unwrap().restore(&mut part).unwrap_err().to_string();
    assert!(e.contains("130 parameters, the network has 8"), "{e}");
}

/// Parameters without operations.
struct Bag(Vec<Param>);

impl Bag {
    fn new(parameters: &[(String, Vec<usize>)], seed: u64) -> Self {
        let source = RandomParams::new(seed, parameters.iter().cloned().collect());
        let device = Device::cpu();
        let param = |(name, shape): &(String, Vec<usize>)| match shape[..] {
            [n] => nn::vector(&source, name, n, &device),
            [a, b, c, d, e] if name.contains("transpconvs") => {
                nn::transposed_filter(&source, name, [a, b, c, d, e], &device)
            }
            [a, b, c, d, e] => nn::filter(&source, name, [a, b, c, d, e], Precision::F32, &device),
            _ => panic!("{name}: {shape:?}"),
        };
        Self(parameters.iter().map(|p| param(p).unwrap()).collect())
    }
}

impl Module for Bag {
    fn forward<'m>(&'m self, _: &mut Ctx<'m>, x: Var) -> Result<Var> {
        Ok(x)
    }

    fn params<'m>(&'m self, visit: &mut dyn FnMut(&'m Param)) {
        self.0.iter().for_each(visit);
    }

    fn params_mut<'m>(&'m mut self, visit: &mut dyn FnMut(&'m mut Param)) {
        self.0.iter_mut().for_each(visit);
    }
}

/// The names that nnU-Net's networks store twice share a storage, and all of them are there.
#[test]
fn nnunets_files_have_all_names() {
    let shapes: Vec<(String, Vec<usize>)> = [
        ("encoder.stages.0.0.convs.0.conv.weight", vec![4, 1, 3, 3, 3]),
        ("encoder.stages.0.0.convs.0.conv.bias", vec![4]),
        ("encoder.stages.0.0.convs.0.norm.weight", vec![4]),
        ("encoder.stages.0.0.convs.0.norm.bias", vec![4]),
        ("decoder.transpconvs.0.weight", vec![6, 4, 2, 2, 2]),
        ("decoder.seg_layers.0.weight", vec![2, 4, 1, 1, 1]),
    ]
    .map(|(n, s)| (n.to_string(), s))
    .to_vec();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint_final.pth");
    let bag = Bag::new(&shapes, 4);
    checkpoint::write_nnunet(&path, &bag, &Optimizer::nnunet(), &state()).unwrap();
    let file = Weights::open(&path).unwrap();
    assert_eq!(file.names().len(), 4 * 4 + 2);
    let same = |a: &str, b: &str| file.values(a).unwrap().as_ptr() == file.values(b).unwrap().as_ptr();
    let conv = "encoder.stages.0.0.convs.0";
    assert!(same(&format!("{conv}.conv.weight"), &format!("decoder.{conv}.all_modules.0.weight")));
    assert!(same(&format!("{conv}.norm.bias"), &format!("{conv}.all_modules.1.bias")));
    for (p, (name, shape)) in bag.0.iter().zip(&shapes) {
        assert_eq!(file.shape(name), Some(&shape[..]));
        assert_eq!(bits(&file.values(name).unwrap()), bits(&nn::values(p).unwrap()), "{name}");
    }
    let opened = Checkpoint::open(&path).unwrap();
    let mut other = Bag::new(&shapes, 5);
    opened.restore(&mut other).unwrap();
    assert_eq!(weights(&other), weights(&bag));
    assert_eq!(ParamSource::shape(&opened, &shapes[4].0), Some(shapes[4].1.clone()));
    // The storages lie where PyTorch's own do, at multiples of 64 bytes.
    let bytes = std::fs::read(&path).unwrap();
    let first = nn::values(&bag.0[0]).unwrap()[0].to_le_bytes();
    assert!(bytes.chunks_exact(64).any(|line| line[..4] == first));
}

/// Filters of a 2D network have four axes in files, as PyTorch's have.
#[test]
fn networks_in_two_dimensions() {
    let config = NetworkConfig::from(UnetConfig {
        kind: UnetKind::Plain,
        in_channels: 1,
        classes: 2,
        features: vec![4, 8],
        kernels: vec![[1, 3, 3]; 2],
        strides: vec![[1; 3], [1, 2, 2]],
        depth: vec![1; 2],
        decoder_depth: vec![1],
        conv_bias: true,
        head_bias: true,
        planar: true,
    });
    let device = Device::cpu();
    let dir = tempfile::tempdir().unwrap();
    for file in ["checkpoint_latest.pth", "latest"] {
        let path = dir.path().join(file);
        let mut net = config.build_random(&device, 1).unwrap();
        let mut optimizer = Optimizer::nnunet();
        step(&mut net, &mut optimizer, 1);
        let write = if file == "latest" { checkpoint::write } else { checkpoint::write_nnunet };
        write(path.as_path(), &net, &optimizer, &state()).unwrap();
        let opened = Checkpoint::open(&path).unwrap();
        for (name, shape) in config.parameters() {
            assert_eq!(ParamSource::shape(&opened, &name), Some(shape), "{name}");
        }
        let mut other = config.build_random(&device, 2).unwrap();
        let mut restored = opened.restore(&mut other).unwrap();
        assert_eq!(weights(&other), weights(&net));
        assert_eq!(weights(&config.build(&opened, &device).unwrap()), weights(&net));
        step(&mut net, &mut optimizer, 2);
        step(&mut other, &mut restored, 2);
        assert_eq!(weights(&other), weights(&net));
    }
}

/// What no training can go on from is not written over what one can.
#[test]
fn what_is_not_finite_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (file, write) in [("latest", true), ("latest.pth", false)] {
        let path = dir.path().join(file);
        let write = |net: &StuNet, o: &Optimizer| {
            if write {
                checkpoint::write(&path, net, o, &state())
            } else {
                checkpoint::write_nnunet(&path, net, o, &state())
            }
        };
        let mut net = net(1);
        let mut optimizer = Optimizer::new(ADAM, None).unwrap();
        step(&mut net, &mut optimizer, 1);
        write(&net, &optimizer).unwrap();
        let before = std::fs::read(&path).unwrap();
        // Its square is infinite.
        let mut grads = Grads::new();
        let p = params(&net)[0];
        grads.add_param(p.id(), nn::pack(p, &vec![1e21; p.dims().len()], Precision::F32).unwrap()).unwrap();
        let name = p.name().to_string();
        optimizer.step(params_mut(&mut net), &mut grads, 0.01).unwrap();
        let e = write(&net, &optimizer).unwrap_err();
        assert!(matches!(e, Error::NotFinite { .. }) && e.to_string().contains(&name), "{e}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}

/// nnU-Net's file tells neither how many epochs there are nor how many steps were done.
#[test]
fn a_trainers_name_tells_its_epochs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint_latest.pth");
    for (trainer, epochs) in [
        ("nnUNetTrainer_250epochs_NoDeepSupervision", 250),
        ("nnUNetTrainer_1epoch", 1),
        ("nnUNetTrainer_onlyMirror01_1500ep", 1500),
        ("STUNetTrainer", 1000),
    ] {
        let mut state = state();
        state.origin.trainer = trainer.into();
        checkpoint::write_nnunet(&path, &net(1), &Optimizer::nnunet(), &state).unwrap();
        let opened = Checkpoint::open(&path).unwrap();
        assert_eq!((opened.state().schedule.epochs, opened.state().step), (epochs, 500));
    }
    // Other people's trainers log more.
    let logs: Logs = serde_json::from_value(json!({"lrs": [0.01], "other": {"a": [1]}})).unwrap();
    assert_eq!(logs, Logs { lrs: vec![Logged(0.01)], ..Logs::default() });
}

const CHILD: &str = "STUNET_TEST_CHECKPOINTS";

/// A process that writes checkpoints is killed at twenty random moments: what is found is always whole, and at least as new
/// as the last one that it had written.
#[cfg(unix)]
#[test]
fn a_killed_process_leaves_a_whole_checkpoint() {
    if let Some(path) = std::env::var_os(CHILD) {
        return write_for_ever(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("latest");
    let mut rng = values(20, 77).into_iter();
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "checkpoint::a_killed_process_leaves_a_whole_checkpoint", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(|l| l.ok());
        let number = |l: &str| l.strip_prefix("written ").map(|n| n.parse::<u32>().unwrap());
        let mut last = lines.by_ref().find_map(|l| number(&l)).expect("the child writes");
        let wait = 1.0 + f64::from(rng.next().unwrap());
        #[expect(clippy::disallowed_methods, reason = "a moment that the child does not choose is what is tested")]
        std::thread::sleep(std::time::Duration::from_secs_f64(0.04 * wait));
        child.kill().unwrap();
        child.wait().unwrap();
        last = lines.filter_map(|l| number(&l)).last().unwrap_or(last);
        let found = Checkpoint::open(&path).unwrap();
        let epoch = found.state().epoch;
        // A file may have its name before the child says so.
        assert!(epoch == last || epoch == last + 1, "round {round}: {epoch} after {last}");
        assert_eq!(found.warning(), None);
        let mut bag = small_bag();
        found.restore(&mut bag).unwrap();
        assert!(nn::values(&bag.0[0]).unwrap().iter().all(|v| *v == epoch as f32));
    }
    // Nothing grows: one temporary file at most.
    assert!(std::fs::read_dir(dir.path()).unwrap().count() <= 4);
}

#[cfg(unix)]
fn small_bag() -> Bag {
    Bag::new(&[("conv.weight".into(), vec![32, 32, 3, 3, 3]), ("conv.bias".into(), vec![32])], 0)
}

#[cfg(unix)]
fn write_for_ever(path: &Path) {
    let mut bag = small_bag();
    let first = Checkpoint::open(path).map_or(0, |c| c.state().epoch);
    for epoch in first + 1.. {
        nn::set_values(&mut bag.0[0], &vec![epoch as f32; 32 * 32 * 27]).unwrap();
        checkpoint::write(path, &bag, &Optimizer::nnunet(), &TrainingState { epoch, ..state() }).unwrap();
        println!("written {epoch}");
    }
}
