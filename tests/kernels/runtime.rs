//! What stands between operations and a driver: uploads beside computation, and memory that runs short.

use std::sync::Arc;

use stunet::tensor::{Dims, Tensor};
use stunet::{Device, Result};

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
const LENGTHS: [usize; 7] = [3, 100, 70_000, 5, 20_000, 40_000, (32 << 18) + 7];

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
    for lengths in [&LENGTHS[..2], &[10, 10]] {
        assert!(sent(lengths, Lacks::Patience).unwrap(), "two buffers hold two vectors");
    }
    for lengths in [&[10, 10, 10][..], &LENGTHS] {
        assert!(!sent(lengths, Lacks::Patience).unwrap_or(false), "{lengths:?}: nothing was noticed");
    }
}
