//! Every kernel as it ships, its PTX, on an interpreter: results against f64 references within computed bounds, the same
//! bytes under several schedules, and what the interpreter checks by itself: bounds, alignment, races, missing waits,
//! bytes that nothing wrote.

mod aggregate;
mod augment;
mod channel_sums;
mod context;
mod conv3d;
mod conv3d_dgrad;
mod conv3d_first;
mod conv3d_join;
mod conv3d_residual;
mod conv3d_tma;
mod conv3d_wgrad;
mod conv_transpose3d;
mod device;
mod entries;
mod faults;
mod head_labels;
mod head_loss;
mod instance_norm;
mod instance_norm_grad;
mod moments;
mod network;
mod optim;
mod pool;
mod probe;
mod relayout;
mod resample;
mod runtime;
mod sim;
mod train;

use stunet::backend_testing::cuda::{Norm, Source, Storage, padded};
use stunet::tensor::cuda::Memory;

use crate::common::bound::{Bounded, gamma};
pub use sim::Sim;

/// Schedules under which every result has to have the same bytes.
const SEEDS: [u64; 3] = [0, 1, 2];

/// Compute capabilities, one for each set of PTX files that the storage has.
fn cards(storage: Storage) -> &'static [[u32; 2]] {
    if storage == Storage::Bf16 { &[[8, 6]] } else { &[[8, 6], [7, 5]] }
}

/// Values between -1 and 1, the same for the same `seed`.
fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// The values as they are after storing and loading.
fn rounded(values: &[f32], storage: Storage) -> Vec<f32> {
    storage.load(&storage.store(values))
}

/// Half the distance to the next stored value: the error that storing adds.
fn half_ulp(value: f64, storage: Storage) -> f64 {
    let (digits, least) = match storage {
        Storage::F32 => (24, -149),
        Storage::Bf16 => (8, -133),
        Storage::F16 => (11, -24),
    };
    (value.abs() * 2f64.powi(-digits)).max(2f64.powi(least - 1))
}

/// A sum of `terms` products whose absolute values add up to `magnitude`, accumulated in f32 and stored.
fn stored(value: f64, magnitude: f64, terms: usize, storage: Storage) -> Bounded {
    let accumulated = gamma(terms + 1) * magnitude;
    Bounded { value, error: accumulated + half_ulp(value.abs() + accumulated, storage) }
}

/// `[N][D][H][W][padded C]` with random channels and zeros for the padding.
fn activation(batch: usize, space: [usize; 3], channels: usize, storage: Storage, seed: u64) -> Vec<f32> {
    let voxels = batch * space.iter().product::<usize>();
    let values = random(voxels * channels, seed);
    let mut out = Vec::with_capacity(voxels * padded(channels));
    for v in values.chunks_exact(channels) {
        out.extend_from_slice(v);
        out.resize(out.len().next_multiple_of(16), 0.0);
    }
    rounded(&out, storage)
}

/// An input on both sides: the device's source and the values that the operation has to work with, at the size at which
/// they are read and without padding, `[N][D][H][W][C]`.
struct Input {
    source: Source,
    values: Vec<f32>,
}

/// Random values, normalised as they are read when `norm`. The normalisation is computed here in f32 in the order that
/// kernels promise, so that its rounding is no matter of tolerance.
fn input(
    sim: &Sim,
    storage: Storage,
    batch: usize,
    space: [usize; 3],
    channels: usize,
    repeat: [usize; 3],
    norm: bool,
    seed: u64,
) -> Input {
    input_in(sim, storage, storage, batch, space, channels, repeat, norm, seed)
}

/// As [`input`] for an operation that keeps normalised values in `kept`.
fn input_in(
    sim: &Sim,
    storage: Storage,
    kept: Storage,
    batch: usize,
    space: [usize; 3],
    channels: usize,
    repeat: [usize; 3],
    norm: bool,
    seed: u64,
) -> Input {
    let c = padded(channels);
    let stored = activation(batch, space, channels, storage, seed);
    let mut source = Source::plain(sim.with(&storage.store(&stored)), channels, space);
    source.repeat = repeat;
    let mut values = stored;
    if norm {
        let slope = 0.01;
        let planes = norm_planes(batch, channels, seed + 1);
        values = rounded(&normalised(&values, &planes, space.iter().product(), channels, slope), kept);
        source.norm = Some(Norm { planes: sim.with(bytemuck::cast_slice(&planes)), slope });
    }
    let [d, h, w] = source.read_space();
    let mut read = Vec::with_capacity(batch * d * h * w * channels);
    for n in 0..batch {
        for (z, y, x) in voxels([d, h, w]) {
            let from = ((n * space[0] + z / repeat[0]) * space[1] + y / repeat[1]) * space[2] + x / repeat[2];
            read.extend_from_slice(&values[from * c..][..channels]);
        }
    }
    Input { source, values: read }
}

/// A normalisation `[N][mean, scale, shift][padded C]`, zero for the padding.
fn norm_planes(batch: usize, channels: usize, seed: u64) -> Vec<f32> {
    let c = padded(channels);
    let mut planes = random(batch * 3 * c, seed);
    for (i, v) in planes.iter_mut().enumerate() {
        let (plane, channel) = (i / c % 3, i % c);
        *v = if channel >= channels { 0.0 } else { [*v * 0.3, *v + 1.5, *v * 0.5][plane] };
    }
    planes
}

/// Values `[N][voxel][padded C]` normalised in f32 in the order that kernels promise.
fn normalised(values: &[f32], planes: &[f32], voxels: usize, channels: usize, slope: f32) -> Vec<f32> {
    let c = padded(channels);
    let one = |(i, v): (usize, &f32)| {
        let at = |plane: usize| planes[(i / c / voxels * 3 + plane) * c + i % c];
        let n = (v - at(0)).mul_add(at(1), at(2));
        if n > 0.0 { n } else { n * slope }
    };
    values.iter().enumerate().map(one).collect()
}

/// The source of an input that the device gets in another way.
fn absent() -> Source {
    Source::plain(Memory { address: 0, bytes: 0 }, 0, [0; 3])
}

/// All (z, y, x) in order.
fn voxels([d, h, w]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..d * h * w).map(move |i| (i / (h * w), i / w % h, i % w))
}

/// The values without the padding of channels, which has to be zero.
fn unpadded(values: &[f32], channels: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for v in values.chunks_exact(padded(channels)) {
        out.extend_from_slice(&v[..channels]);
        assert!(v[channels..].iter().all(|v| *v == 0.0), "padding is not zero");
    }
    out
}

/// Memory for `n` values.
fn room(sim: &Sim, n: usize, storage: Storage) -> Memory {
    use stunet::tensor::cuda::Driver;
    sim.alloc(n * storage.bytes()).unwrap()
}
