//! The machine's own limits, and measurements held against them.

use std::hint::black_box;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use stunet::Device;
use stunet::autograd::{Ctx, Var};
use stunet::io::{Image, Segmentation};
use stunet::ops::{self, testing};
use stunet::phantom::Phantom;
use stunet::tensor::Tensor;

/// What a measurement is limited by, and how much of it one run does.
#[derive(Clone, Copy)]
pub enum Work {
    /// Floating-point operations, a multiply-add counted as two.
    Flops(f64),
    /// Bytes read and written.
    Bytes(f64),
    /// Operations and bytes, whichever takes longer.
    Roofline(f64, f64),
}

/// Voxels along (z, y, x) of the pipeline's benchmarks.
pub const CT: [usize; 3] = [200, 512, 512];

/// A CT of that size and its labels.
pub fn phantom() -> &'static (Image, Segmentation) {
    static ONCE: OnceLock<(Image, Segmentation)> = OnceLock::new();
    ONCE.get_or_init(|| Phantom::new(1).with_grid(CT, [1.5, 0.8, 0.8]).expect("a grid").render())
}

fn fastest(mut f: impl FnMut()) -> f64 {
    f();
    (0..5).fold(f64::INFINITY, |best, _| {
        let start = Instant::now();
        f();
        best.min(start.elapsed().as_secs_f64())
    })
}

/// Operations and bytes per second that this machine reaches, measured once.
fn roofline(device: &Device) -> (f64, f64) {
    static ONCE: OnceLock<(f64, f64)> = OnceLock::new();
    *ONCE.get_or_init(|| {
        let mut operations = 0.0;
        let flops = fastest(|| operations = testing::spin(device));
        let mut cx = Ctx::infer(device);
        let mut x = Some(activation(&mut cx, [1, 16, 128, 128, 128]));
        let bytes = fastest(|| x = x.take().and_then(|x| ops::leaky_relu(&mut cx, x, 0.5).ok()));
        (operations / flops, f64::from(2 * 4 * (16 << 21)) / bytes)
    })
}

/// A blocked activation.
pub fn activation(cx: &mut Ctx<'_>, dims: [usize; 5]) -> Var {
    let values = vec![0.5; dims.iter().product()];
    let t = Tensor::from_host(&values, dims.into(), cx.device()).and_then(testing::blocked);
    cx.leaf(t.expect("memory for a benchmark"))
}

/// Measures `f` under `group/name`, if criterion's filter lets it run, and prints the fastest run's rate as a share of
/// the machine's.
pub fn measure<R>(c: &mut Criterion, device: &Device, group: &str, name: &str, work: Work, mut f: impl FnMut() -> R) {
    static KEYS: AtomicUsize = AtomicUsize::new(0);
    let key = KEYS.fetch_add(1, Ordering::Relaxed);
    let mut fastest = f64::INFINITY;
    let mut benchmarks = c.benchmark_group(group);
    benchmarks.sample_size(10).warm_up_time(Duration::from_millis(50)).measurement_time(Duration::from_millis(500));
    benchmarks.throughput(match work {
        Work::Flops(n) | Work::Roofline(n, _) => Throughput::Elements(n as u64),
        Work::Bytes(n) => Throughput::Bytes(n as u64),
    });
    benchmarks.bench_function(BenchmarkId::from_parameter(name), |b| {
        b.iter_custom(|runs| {
            let mut total = Duration::ZERO;
            for _ in 0..runs {
                let start = Instant::now();
                // Runs repeat, as passes of a network do: no time goes into fresh memory.
                device.planned(&[key], || drop(black_box(f())));
                let time = start.elapsed();
                fastest = fastest.min(time.as_secs_f64());
                total += time;
            }
            total
        });
    });
    benchmarks.finish();
    if fastest == f64::INFINITY {
        return;
    }
    let (flops, bytes) = roofline(device);
    let (amount, unit, limit) = match work {
        Work::Flops(n) => (n, "GFLOP/s", flops),
        Work::Bytes(n) => (n, "GB/s", bytes),
        Work::Roofline(n, moved) => (n, "GFLOP/s", flops.min(n / moved * bytes)),
    };
    let (rate, limit) = (amount / fastest * 1e-9, limit * 1e-9);
    println!("{group}/{name}: at best {rate:.1} {unit}, {:.0} % of {limit:.1}\n", 100.0 * rate / limit);
}
