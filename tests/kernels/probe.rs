//! A card's peak: what the probes do is what they say.

use std::sync::Arc;

use stunet::Device;
use stunet::backend_testing::cuda::{Storage, probe};
use stunet::ops::testing;
use stunet::tensor::Precision;
use stunet::tensor::cuda::Driver;

use super::cards;
use super::sim::Sim;

/// Every product was added up, and no more were counted.
#[test]
pub(super) fn ptx_probe_products_are_all_done() {
    for (storage, rounds) in [(Storage::F32, 13), (Storage::Bf16, 6), (Storage::F16, 7)] {
        for card in cards(storage) {
            let sim = Sim::of(2, *card);
            let threads = probe::threads(&sim);
            let sums = sim.alloc(4 * threads).unwrap();
            let operations = probe::products(&sim, storage, rounds, sums).unwrap();
            for (i, sum) in Storage::F32.load(&sim.bytes(sums)).into_iter().enumerate() {
                assert!(sum == probe::expected(storage, rounds, i % 32), "{storage:?}: thread {i} has {sum}");
            }
            let each = if storage == Storage::F32 { 2 } else { 2 * 16 * 8 * 16 / 32 };
            assert_eq!(operations, (threads * 8 * rounds * each) as f64);
            assert!(probe::products(&sim, storage, rounds, stunet::tensor::cuda::Memory { bytes: 4, ..sums }).is_err());
        }
    }
}

/// Pieces that do not fill the grid, and more than fill it; no sector is read or written twice.
#[test]
pub(super) fn ptx_probe_copies() {
    for (card, pieces) in [([8, 6], 1000), ([7, 5], 40_000)] {
        let sim = Sim::of(1, card);
        let bytes: Vec<u8> = (0..16 * pieces).map(|i| (i * 31 % 251) as u8).collect();
        let (from, to) = (sim.with(&bytes), sim.alloc(bytes.len()).unwrap());
        assert_eq!(probe::copy(&sim, from, to).unwrap(), 2.0 * bytes.len() as f64);
        assert!(sim.bytes(to) == bytes);
        let less = stunet::tensor::cuda::Memory { bytes: 16, ..to };
        assert!(probe::copy(&sim, from, less).is_err());
    }
}

/// Tries grow until they can be timed, and the best of them counts.
#[test]
pub(super) fn ptx_probe_rates() {
    let sim = Sim::new(0);
    // A card that does a round in a microsecond, and is late at every other try.
    let (mut now, mut tries) = (std::cell::Cell::new(0.0), Vec::new());
    let rate = probe::rate(&sim, &mut || now.get(), |rounds| {
        now.set(now.get() + rounds as f64 * 1e-6 * if tries.len() % 2 == 0 { 3.0 } else { 1.0 });
        tries.push(rounds);
        Ok(rounds as f64 * 100.0)
    });
    assert!((rate.unwrap() * 1e-8 - 1.0).abs() < 1e-9);
    assert_eq!(tries[..4], [64, 64, 256, 1024]);
    assert!(*tries.last().unwrap() as f64 * 3e-6 >= 5e-3 && now.get_mut().is_finite());
    // Through the library, on what there is.
    let card: Arc<dyn Driver> = Arc::new(Sim::new(0).with_total(1 << 25));
    let device = Device::on(card, "sim".into());
    for precision in [Precision::F32, Precision::Bf16] {
        let (operations, bytes) = testing::peaks(&device, precision).unwrap();
        assert!(operations > 0.0 && operations.is_finite() && bytes > 0.0 && bytes.is_finite());
    }
    assert_eq!((device.memory().peak, device.memory().reserved), (0, 0));
}
