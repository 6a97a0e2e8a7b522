//! The processor's peak, for benchmarks to be held against.

use super::isa::{Simd, simd_entry};
use crate::base::par;
use crate::tensor::{BLOCK, Isa};

/// Rounds of sixteen-fold multiply-adds per call and thread.
const ROUNDS: usize = 1 << 20;

/// Keeps `threads` threads busy with fused multiply-adds in registers; returns how many operations that was, counting
/// a multiply-add as two.
pub(crate) fn spin(isa: Isa, threads: usize) -> f64 {
    let sums = par::map(threads, |i| spinning::on(isa, i as f32));
    // The sums must be used, or there is nothing to compute.
    let keep = sums.iter().map(|s| s.0).fold(0.0, f32::max);
    let chains = sums.first().map_or(0, |s| s.1);
    2.0 * (BLOCK * chains * ROUNDS * threads) as f64 + f64::from(keep.min(0.0))
}

simd_entry!(spinning = spin_on(seed: f32) -> (f32, usize));

/// Twelve chains where a block is one register, six where it is two: enough to hide the latency, none spilled.
#[inline(always)]
fn spin_on<S: Simd>(s: S, seed: f32) -> (f32, usize) {
    const CHAINS: usize = 12;
    let chains = if size_of::<S::V>() == 64 && align_of::<S::V>() == 64 { CHAINS } else { CHAINS / 2 };
    let (a, b) = (s.splat(0.999_9), s.splat(seed));
    let mut sums = [s.splat(seed); CHAINS];
    for _ in 0..ROUNDS {
        for sum in &mut sums[..chains] {
            *sum = s.fma(*sum, a, b);
        }
    }
    let mut total = s.splat(0.0);
    for sum in sums {
        total = s.add(total, sum);
    }
    let mut out = [0.0; BLOCK];
    s.store(total, &mut out);
    (out[0], chains)
}
