//! Parameters of a module, and their values in PyTorch's order.

use proptest::prelude::*;
use stunet::autograd::{Param, ParamKind};
use stunet::models::StuNetConfig;
use stunet::nn::{self, Module};
use stunet::ops::testing;
use stunet::{Device, Precision};

use crate::common::drive::{bits, values};

fn check(p: &Param, values: &[f32]) -> Result<(), TestCaseError> {
    prop_assert_eq!(bits(&nn::values(p).unwrap()), bits(values));
    let again = nn::pack(p, values, p.precision()).unwrap();
    prop_assert_eq!(bits(&nn::unpack(p, &again).unwrap()), bits(values));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn unpacking_is_the_inverse_of_packing(o in 1..=70_usize, i in 1..=19_usize,
            k in prop::array::uniform3(prop::sample::select(vec![1_usize, 3])), seed in 0..1000_u64) {
        let device = Device::cpu();
        let dims = [o, i, k[0], k[1], k[2]];
        let v = values(dims.iter().product(), seed);
        check(&testing::filter(&v, dims, &device).unwrap(), &v)?;
        let rounded: Vec<f32> = v.iter().map(|v| Precision::Bf16.round(*v)).collect();
        check(&testing::stored_filter(&v, dims, Precision::Bf16, &device).unwrap(), &rounded)?;
        check(&testing::vector(&v[..o], &device).unwrap(), &v[..o])?;
        let dims = [i, o, 1 + k[0] / 3, 1 + k[1] / 3, 1 + k[2] / 3];
        let v = values(dims.iter().product(), seed);
        let p = testing::transposed_filter(&v, dims, &device).unwrap();
        prop_assert_eq!(p.kind(), ParamKind::TransposedFilter);
        check(&p, &v)?;
    }
}

fn small() -> StuNetConfig {
    let depth = [1, 2, 1, 1, 1, 1];
    StuNetConfig { dims: [4, 6, 8, 8, 8, 20], depth, decoder_depth: [2, 1, 1, 1, 1], ..StuNetConfig::small(2, 3) }
}

/// The order of PyTorch's `parameters()`, which is that of the state dict.
#[test]
fn a_stunet_shows_its_parameters_in_pytorchs_order() {
    let mut net = small().build_random(&Device::cpu(), 1).unwrap();
    let mut seen = Vec::new();
    net.params(&mut |p| seen.push((p.name().to_string(), p.dims().as_slice().to_vec())));
    assert_eq!(seen, small().parameters());
    let mut again = Vec::new();
    net.params_mut(&mut |p| again.push(p.name().to_string()));
    assert!(again.iter().eq(seen.iter().map(|s| &s.0)));
}

#[test]
fn the_head_is_that_of_changed_parameters() {
    let mut net = small().build_random(&Device::cpu(), 1).unwrap();
    let before = net.head().unwrap().clone();
    net.params_mut(&mut |_| {});
    assert_eq!(*net.head().unwrap(), before);
    net.params_mut(&mut |p| {
        let doubled: Vec<f32> = nn::values(p).unwrap().iter().map(|v| 2.0 * v + 1.0).collect();
        nn::set_values(p, &doubled).unwrap();
    });
    let after = net.head().unwrap();
    assert!(after.weight.iter().zip(&before.weight).all(|(a, b)| *a == 2.0 * b + 1.0));
    assert_eq!(after.bias, [1.0; 3]);
}

#[test]
fn another_number_of_values_is_an_error() {
    let mut p = testing::filter(&[0.0; 6], [2, 3, 1, 1, 1], &Device::cpu()).unwrap();
    let e = nn::set_values(&mut p, &[0.0; 5]).unwrap_err().to_string();
    assert!(e.contains("5 values") && e.contains("filter"), "{e}");
}
