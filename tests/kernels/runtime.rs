//! What stands between operations and a driver: uploads beside computation, passes as graphs, and memory that runs short.

use std::sync::Arc;

use stunet::autograd::Ctx;
use stunet::io::Geometry;
use stunet::models::{StuNet, StuNetConfig};
use stunet::nn::Module;
use stunet::ops::{Conv3d, testing};
use stunet::tensor::cuda::Driver;
use stunet::tensor::{Dims, Precision, Tensor};
use stunet::{Device, Image, PredictOptions, Predictor, Result};

use super::device::{PATCH, WIDTHS, config};
use super::random;
use super::sim::{Lacks, Sim};

fn device(sim: &Arc<Sim>) -> Device {
    Device::on(sim.clone(), "sim".into())
}

/// What arrives of vectors of these lengths, of which value `i` of vector `v` is `v + i / 1024`, when all were sent before the
/// first was asked for.
fn sent(lengths: &[usize], lacks: Lacks) -> Result<bool> {
    let device = device(&Arc::new(Sim::new(0).lacking(lacks)));
    let values = |v: usize| (0..lengths[v]).map(|i| v as f32 + i as f32 / 1024.0).collect::<Vec<f32>>();
    let send = |v| Tensor::from_host(&values(v), Dims::from([lengths[v]]), &device);
    let tensors = (0..lengths.len()).map(send).collect::<Result<Vec<_>>>()?;
    let all = tensors.iter().enumerate().map(|(v, t)| Ok(t.to_host()? == values(v)));
    Ok(all.collect::<Result<Vec<_>>>()?.into_iter().all(|same| same))
}

/// Short, longer than the buffers as they are, and longer than they may become.
const LENGTHS: [usize; 7] = [3, 100, 70_000, 5, 20_000, 40_000, (64 << 18) + 7];

/// Uploads of all sizes, one after the other without a wait, and on a machine that gives no page-locked memory.
#[test]
pub(super) fn ptx_runtime_uploads_arrive() {
    for lacks in [Lacks::Nothing, Lacks::Pinning] {
        assert!(sent(&LENGTHS, lacks).unwrap(), "{lacks:?}");
    }
}

/// A buffer that is filled before its copy is done shows.
#[test]
pub(super) fn ptx_runtime_a_missing_wait_is_found() {
    for lengths in [&LENGTHS[..4], &[10; 4]] {
        assert!(sent(lengths, Lacks::Patience).unwrap(), "four buffers hold four vectors");
    }
    for lengths in [&[10; 5][..], &LENGTHS] {
        assert!(!sent(lengths, Lacks::Patience).unwrap_or(false), "{lengths:?}: nothing was noticed");
    }
}

/// Of [`predicted`]: windows, and passes when each is mirrored in all ways.
const PASSES: [usize; 2] = [4, 32];

fn small() -> StuNetConfig {
    let strides = [[1, 2, 2], [1; 3], [1; 3], [1; 3], [1; 3]];
    // More classes than features, so that features are what is summed.
    StuNetConfig { dims: [16; 6], ..StuNetConfig::small(1, 20) }.with_strides(strides)
}

/// The labels of a small image.
fn predicted(device: &Device, mirroring: bool) -> Result<Vec<u16>> {
    let image = Image::new(vec![random(6 * 7 * 12, 11)], Geometry::new([6, 7, 12], [1.0; 3]))?;
    let net = small().build_random_with(device, 2, Precision::Bf16)?;
    let options = PredictOptions::default().mirroring(mirroring);
    let labels = Predictor::stand_in(net, [4, 8, 8], [1.0; 3], device)?.options(options).predict(&image)?.labels;
    Ok((0..labels.len()).map(|i| labels.get(i)).collect())
}

/// Windows as graphs give the labels that their launches give. A graph is made when two passes in a row were the same: the
/// first has its memory elsewhere, so that it is the fourth.
#[test]
pub(super) fn ptx_graph_of_a_pass_gives_the_same_bytes() {
    for (mirroring, passes) in [false, true].into_iter().zip(PASSES) {
        let sims = [Lacks::Nothing, Lacks::Graphs].map(|l| Arc::new(Sim::new(1).lacking(l)));
        let [with, without] = sims.each_ref().map(|s| predicted(&device(s), mirroring).unwrap());
        assert!(with == without, "other labels");
        let [with, without] = sims.map(|s| s.count());
        assert_eq!((with.graphs, with.replays), (1, passes - 3), "{with:?}");
        assert_eq!((without.graphs, without.replays), (0, 0));
        // A graph is all of the network, none of the sums.
        let of_graph = (without.launches - with.launches) / with.replays;
        assert!(of_graph > 20 && without.launches - passes >= of_graph * passes, "{of_graph} of {without:?}");
    }
}

/// A graph holds what its launches were given of tensors whose boxes they copy. No prediction takes such a kernel by itself.
#[test]
pub(super) fn ptx_graph_of_boxes_by_tma_gives_the_same_bytes() {
    let results = [Lacks::Nothing, Lacks::Graphs].map(|lacks| {
        let sim = Arc::new(Sim::of(1, [9, 0]).lacking(lacks));
        let (device, dims) = (device(&sim), [1, 16, 5, 6, 9]);
        let w = testing::stored_filter(&random(16 * 16 * 27, 1), [16, 16, 3, 3, 3], Precision::Bf16, &device).unwrap();
        let how = Conv3d { stride: [1; 3], padding: [1; 3] };
        let run = || {
            let mut cx = Ctx::infer(&device);
            let x = Tensor::from_host(&random(dims.iter().product(), 2), Dims::from(dims), &device).unwrap();
            let mut y = cx.leaf(x);
            // A shorter pass is not worth a graph.
            for _ in 0..8 {
                y = testing::conv3d("tma_n32", &mut cx, y, &w, None, how).unwrap().0;
            }
            y.into_value().to_host().unwrap()
        };
        // With its trial.
        run();
        let pass = |_| {
            // While the card has something to do, as in `pass`.
            let work = Tensor::from_host(&[0.0], Dims::from([1]), &device).unwrap();
            let y = device.planned(&[7], run);
            drop(work);
            y
        };
        let all: Vec<Vec<f32>> = (0..6).map(pass).collect();
        assert!(all.iter().all(|y| *y == all[0]) && sim.ran("conv3d_tma_n32_bf16"));
        (all, sim.count().replays > 0)
    });
    assert!(results[0].0 == results[1].0, "other values");
    assert!(results[0].1 && !results[1].1);
}

/// The logits of one window, while the card has something to do.
fn pass(net: &StuNet, device: &Device) -> Vec<f32> {
    let work = Tensor::from_host(&[0.0], Dims::from([1]), device).unwrap();
    let logits = device.planned(&[7], || {
        let mut cx = Ctx::infer(device);
        let [d, h, w] = PATCH;
        let x = Tensor::from_host(&random(d * h * w, 7), Dims::from([1, 1, d, h, w]), device).unwrap();
        let x = cx.leaf(x);
        net.forward(&mut cx, x).unwrap().into_value().to_host().unwrap()
    });
    drop(work);
    logits
}

/// One key for networks that differ in weights, storage or address: what runs is always what was asked for.
#[test]
pub(super) fn ptx_graph_of_another_network_is_never_run() {
    let nets = |device: &Device| {
        let net = |seed, precision| config(WIDTHS[0]).build_random_with(device, seed, precision).unwrap();
        [net(3, Precision::Bf16), net(4, Precision::Bf16), net(3, Precision::F16), net(3, Precision::Bf16)]
    };
    let plain = device(&Arc::new(Sim::new(1).lacking(Lacks::Graphs)));
    let expected = nets(&plain).map(|n| pass(&n, &plain));
    assert!(expected[0] != expected[1] && expected[0] != expected[2] && expected[0] == expected[3]);
    let sim = Arc::new(Sim::new(1));
    let card = device(&sim);
    let nets = nets(&card);
    let run = |which: usize, times: usize| {
        for _ in 0..times {
            assert!(pass(&nets[which], &card) == expected[which], "network {which}: other bytes");
        }
        sim.count().replays
    };
    assert_eq!(run(0, 6), 3);
    for which in [1, 0, 2, 3, 0, 2] {
        assert_eq!(run(which, 1), 3, "network {which}");
    }
    // Memory is planned anew for the last of them before its passes are the same.
    assert!(run(3, 8) > 3);
}

/// Two threads with a network each on one card: what one holds back is issued before the other goes on.
#[test]
pub(super) fn ptx_graph_beside_another_thread() {
    let alone = predicted(&device(&Arc::new(Sim::new(1))), true).unwrap();
    let shared = device(&Arc::new(Sim::new(1)));
    std::thread::scope(|s| {
        let both = [0, 1].map(|_| s.spawn(|| predicted(&shared, true).unwrap()));
        both.into_iter().for_each(|labels| assert!(labels.join().unwrap() == alone, "other labels"));
    });
}

/// The next window is put together while the card computes this one, wherever the sums are. Other programs decide whether
/// there is room for these, and for anything at all.
#[test]
pub(super) fn ptx_runtime_windows_are_staged_beside_work_on_a_shared_card() {
    let labels = predicted(&device(&Arc::new(Sim::new(1))), false).unwrap();
    let scale = device(&Arc::new(Sim::new(1)));
    let net = small().build_random_with(&scale, 2, Precision::Bf16).unwrap();
    let needs = scale.memory().in_use + small().activation_bytes([4, 8, 8], &scale, false, Precision::Bf16);
    drop(net);
    for (free, sums_on_card) in [(needs + (64 << 20), true), (needs + 64, false)] {
        let sim = Arc::new(Sim::new(1));
        sim.lose(sim.total() - sim.total() / 32 - free);
        assert!(predicted(&device(&sim), false).unwrap() == labels, "other labels");
        assert_eq!(sim.entries().iter().any(|e| e.starts_with("aggregate")), sums_on_card);
        assert_eq!(sim.count().filled_beside, PASSES[0] - 1);
    }
    let sim = Arc::new(Sim::new(1));
    sim.lose(sim.total() - sim.total() / 32);
    let e = predicted(&device(&sim), false).unwrap_err().to_string();
    // By then its network was there, and what it took was not free.
    assert!(e.contains(&format!("of whose {} bytes ", sim.total())) && e.contains(" are free, needs "), "{e}");
}

/// What the pool keeps goes before a tensor is refused.
#[test]
pub(super) fn ptx_runtime_idle_memory_is_given_up() {
    let sim = Arc::new(Sim::new(0).with_total(1 << 20));
    let device = device(&sim);
    let tensor = |kib: usize| Tensor::from_host(&vec![1.0; kib << 8], Dims::from([kib << 8]), &device);
    let both = [tensor(300).unwrap(), tensor(300).unwrap()];
    drop(both);
    device.trim();
    // Idle, and no more than was in use before.
    drop(tensor(300).unwrap());
    sim.lose(600 << 10);
    assert_eq!(device.available_memory().unwrap(), Some(424 << 10));
    let kept = tensor(200).unwrap();
    assert_eq!((device.memory().reserved, sim.available().unwrap()), (200 << 10, 224 << 10));
    let e = tensor(300).unwrap_err().to_string();
    assert!(e.contains("out of memory"), "{e}");
    assert!(kept.to_host().unwrap().iter().all(|v| *v == 1.0));
}

/// Beside a card the processor has as many threads as were asked for.
#[test]
pub(super) fn ptx_runtime_threads_beside_a_card() {
    let host = Device::cpu_with_threads(3).unwrap();
    let device = Device::on_beside(Arc::new(Sim::new(0)), "sim".into(), host);
    assert_eq!((device.threads(), device.host().threads()), (3, 3));
    let inside = device.install(|| std::thread::current().name().map(str::to_owned));
    assert!(inside.is_some_and(|n| n.starts_with("stunet-")));
    assert!(device.host().is_cpu() && device.host().host().is_cpu());
}
