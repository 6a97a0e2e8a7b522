//! upsample_nearest: every implementation against the definition.

use proptest::prelude::*;
use stunet::autograd::Ctx;
use stunet::ops::{self, testing};

use crate::common::drive::{activation, bits, devices, result, soil, values};

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn is_exact(n in 1..=2_usize, c in 1..=35_usize, space in prop::array::uniform3(1..=4_usize),
                factor in prop::array::uniform3(1..=3_usize), seed in 0..1000_u64, blocked: bool) {
        let [d, h, w] = space;
        let [od, oh, ow] = [d * factor[0], h * factor[1], w * factor[2]];
        let dims = [n, c, d, h, w];
        let x = values(dims.iter().product(), seed);
        let expected: Vec<f32> = (0..n * c * od * oh * ow)
            .map(|i| {
                let (nc, z, y, x_) = (i / (od * oh * ow), i / (oh * ow) % od, i / ow % oh, i % ow);
                x[((nc * d + z / factor[0]) * h + y / factor[1]) * w + x_ / factor[2]]
            })
            .collect();
        for device in devices() {
            for name in testing::implementations(&device) {
                let mut cx = Ctx::infer(&device);
                // A factor of one everywhere hands the input back, whatever its layout.
                let v = activation(&mut cx, &x, dims, blocked || factor == [1; 3]);
                soil(&device, [n, c, od, oh, ow]);
                let y = testing::upsample_nearest(name, &mut cx, v, factor).unwrap();
                prop_assert_eq!(y.value().dims().as_slice(), &[n, c, od, oh, ow]);
                prop_assert_eq!(bits(&result(y)), bits(&expected), "{}", name);
            }
        }
    }
}

#[test]
fn a_factor_of_zero_is_an_error() {
    let device = stunet::Device::cpu();
    let mut cx = Ctx::infer(&device);
    let x = activation(&mut cx, &[0.0; 8], [1, 1, 2, 2, 2], true);
    assert!(ops::upsample_nearest(&mut cx, x, [2, 0, 2]).unwrap_err().to_string().contains("factor"));
}
