//! The gradient of a filter of two sources, from as its parts lie to as the filter lies.

use stunet::backend_testing::cuda::conv3d::join::{self, Problem};
use stunet::backend_testing::cuda::{Storage, padded};
use stunet::tensor::cuda::Memory;

use super::sim::Sim;
use super::{SEEDS, cards, random, room};

/// Copies, so every bit is known. Padding of the parts is no number: none of it may come along.
fn check(channels: [usize; 2], filters: usize, taps: usize) {
    let [a, b] = channels;
    let (rows, slabs) = (taps * padded(filters), [padded(a) / 16, padded(b) / 16]);
    let values = random((a + b) * rows, 1);
    let mut apart = vec![f32::NAN; (slabs[0] + slabs[1]) * rows * 16];
    let mut expected = vec![0.0; padded(a + b) * rows];
    for c in 0..a + b {
        let (slab, own) = if c < a { (c / 16, c) } else { (slabs[0] + (c - a) / 16, c - a) };
        for row in 0..rows {
            let value = values[c * rows + row];
            apart[(slab * rows + row) * 16 + own % 16] = value;
            expected[(c / 16 * rows + row) * 16 + c % 16] = value;
        }
    }
    for card in cards(Storage::F32) {
        for seed in SEEDS {
            let sim = Sim::of(seed, *card);
            let apart = sim.with(bytemuck::cast_slice(&apart));
            let out = room(&sim, expected.len(), Storage::F32);
            join::run(&sim, &Problem { channels, filters, taps, apart, out }).unwrap();
            let bytes: &[u8] = bytemuck::cast_slice(&expected);
            assert!(sim.bytes(out) == bytes, "{channels:?} channels, {filters} filters, {taps} taps on {card:?}");
        }
    }
}

#[test]
pub(super) fn cuda_train_conv3d_join() {
    // The second source begins within a block, at the start of one, and fills up one; either source alone is less than one.
    check([20, 17], 17, 3);
    check([16, 8], 16, 27);
    check([24, 40], 20, 9);
    check([5, 3], 4, 1);
    check([1, 31], 40, 1);
    check([70, 33], 33, 2);
}

#[test]
pub(super) fn cuda_train_conv3d_join_refuses_what_does_not_fit() {
    let sim = Sim::new(0);
    let memory = |values| room(&sim, values, Storage::F32);
    let good = Problem { channels: [20, 17], filters: 16, taps: 1, apart: memory(64 * 16), out: memory(48 * 16) };
    let short = |m: Memory| Memory { bytes: m.bytes - 4, ..m };
    let refused = |p: Problem| join::run(&sim, &p).unwrap_err().to_string();
    assert!(refused(Problem { channels: [0, 17], ..good }).contains("0 and 17 channels"));
    assert!(refused(Problem { taps: 0, ..good }).contains("0 taps"));
    assert!(refused(Problem { apart: short(good.apart), ..good }).contains("the two parts"));
    assert!(refused(Problem { out: short(good.out), ..good }).contains("the gradient"));
}
