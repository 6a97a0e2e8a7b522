//! What tests of operations share: values, devices, values of a result.

use stunet::autograd::{Ctx, Var};
use stunet::ops::testing;
use stunet::tensor::{Device, Dims, Isa, Tensor};

/// Repeatable values in [-1, 1), different for every seed (SplitMix64).
pub fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 40
    };
    (0..n).map(|_| next() as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// One device per instruction set of this processor.
pub fn devices() -> Vec<Device> {
    Isa::available().iter().map(|isa| Device::cpu_with(None, *isa).unwrap()).collect()
}

/// Devices with 1, 2 and 7 threads per instruction set, in runs of three.
pub fn threaded_devices() -> Vec<[Device; 3]> {
    Isa::available().iter().map(|isa| [1, 2, 7].map(|t| Device::cpu_with(Some(t), *isa).unwrap())).collect()
}

/// An activation as the network's input arrives (plain) or as it passes between operations (blocked).
pub fn activation(cx: &mut Ctx<'_>, values: &[f32], dims: [usize; 5], blocked: bool) -> Var {
    let t = Tensor::from_host(values, Dims::from(dims), cx.device()).unwrap();
    cx.leaf(if blocked { testing::blocked(t).unwrap() } else { t })
}

/// The values of a result, after a look at its pad lanes.
pub fn result(y: Var) -> Vec<f32> {
    assert!(testing::padding_is_zero(y.value()), "pad lanes of {:?} are not zero", y.value().dims());
    y.into_value().to_host().unwrap()
}

/// Leaves garbage in the memory that the next results will be given.
pub fn soil(device: &Device, dims: [usize; 5]) {
    let n: usize = dims.iter().product();
    let x = Tensor::from_host(&vec![f32::NAN; n], Dims::from(dims), device).unwrap();
    drop(testing::blocked(x));
}

/// The bits, to compare results that must be equal and not only close.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}
