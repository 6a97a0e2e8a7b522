//! The planner by itself, and the arena through the door of a device.

use proptest::prelude::*;

use super::super::{Device, Dims, Layout, Tensor};
use super::*;

/// Most bytes that live at one time.
fn peak(pieces: &[Piece]) -> usize {
    let live = |p: &Piece, t: usize| p.until.is_some_and(|until| p.from <= t && t < until);
    let at = |t: usize| pieces.iter().filter(|p| live(p, t)).map(|p| p.size).sum::<usize>();
    pieces.iter().map(|p| at(p.from)).max().unwrap_or(0)
}

fn check(pieces: &[Piece]) -> usize {
    let (offsets, bytes) = place(pieces);
    for (i, (a, oa)) in pieces.iter().zip(&offsets).enumerate() {
        assert_eq!(oa.is_some(), a.until.is_some());
        let (Some(oa), Some(ua)) = (oa, a.until) else { continue };
        assert!(oa % 64 == 0 && oa + a.size <= bytes);
        for (b, ob) in pieces[..i].iter().zip(&offsets) {
            let (Some(ob), Some(ub)) = (ob, b.until) else { continue };
            let together = a.from < ub && b.from < ua;
            assert!(!together || oa + a.size <= *ob || ob + b.size <= *oa, "{a:?} at {oa}, {b:?} at {ob}");
        }
    }
    assert!(bytes >= peak(pieces));
    bytes
}

fn pieces(max: usize) -> impl Strategy<Value = Vec<Piece>> {
    let piece = (1usize..40, 0usize..100, prop_oneof![4 => (1usize..60).prop_map(Some), 1 => Just(None)]);
    proptest::collection::vec(piece, 0..max).prop_map(|v| {
        v.into_iter().map(|(n, from, life)| Piece { size: n * 64, from, until: life.map(|l| from + l) }).collect()
    })
}

proptest! {
    #[test]
    fn pieces_that_live_together_never_overlap(p in pieces(60)) {
        check(&p);
    }

    /// Of equal sizes, placing in the order they begin is optimal.
    #[test]
    fn equal_sizes_take_the_peak(mut p in pieces(60)) {
        p.iter_mut().for_each(|p| p.size = 192);
        prop_assert_eq!(check(&p), peak(&p));
    }

    /// A stack whose larger pieces live longer.
    #[test]
    fn nested_lifetimes_take_the_peak(mut sizes in proptest::collection::vec(1usize..50, 0..30)) {
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        let n = sizes.len();
        let nested = |(i, s): (usize, &usize)| Piece { size: s * 64, from: i, until: Some(2 * n - i) };
        let p: Vec<Piece> = sizes.iter().enumerate().map(nested).collect();
        prop_assert_eq!(check(&p), peak(&p));
    }

    /// Any order of requests, returns and runs: no live tensor is ever written to by another one, and the sum of what
    /// lives is what the device says.
    #[test]
    fn live_tensors_keep_their_values(
        runs in proptest::collection::vec((0usize..3, proptest::collection::vec((0usize..6, 0usize..5), 0..25)), 1..6),
    ) {
        let dev = Device::cpu();
        let mut kept: Vec<(f32, Tensor)> = Vec::new();
        let mut mark = 0.0;
        for (key, steps) in runs {
            dev.planned(&[key], || {
                for (size, gone) in steps {
                    mark += 1.0;
                    kept.push((mark, tensor(&dev, 16 * (size + 1), mark)));
                    if gone < kept.len() && gone > 1 {
                        kept.remove(kept.len() - gone);
                    }
                    for (mark, t) in &kept {
                        assert!(t.as_slice().iter().all(|v| v == mark));
                    }
                    let least: usize = kept.iter().map(|(_, t)| 4 * t.dims().len()).sum();
                    let m = dev.memory();
                    // A recycled piece may be a quarter larger than what was asked for.
                    assert!(least <= m.in_use && m.in_use <= least + least / 4 && m.in_use <= m.reserved);
                }
            });
            kept.truncate(3);
        }
        kept.clear();
        dev.trim();
        prop_assert_eq!((dev.memory().in_use, dev.memory().reserved), (0, 0));
    }
}

fn tensor(dev: &Device, floats: usize, value: f32) -> Tensor {
    let mut t = Tensor::empty(Dims::from([floats]), Layout::PLAIN, dev).unwrap();
    t.as_mut_slice().unwrap().fill(value);
    t
}

fn address(t: &Tensor) -> usize {
    t.as_slice().as_ptr().addr()
}

fn counts(dev: &Device) -> (u64, u64) {
    (dev.memory().planned_hits, dev.memory().planned_misses)
}

/// Two large tensors and a small one, never all at once; the result is what they hold and where they are.
fn pass(dev: &Device) -> (f32, [usize; 3]) {
    let a = tensor(dev, 1 << 19, 1.0);
    let b = tensor(dev, 1 << 18, 2.0);
    let (pa, pb, sum) = (address(&a), address(&b), a.as_slice()[7] + b.as_slice()[7]);
    drop(a);
    let c = tensor(dev, 100, 3.0);
    (sum + b.as_slice()[0] + c.as_slice()[99], [pa, pb, address(&c)])
}

#[test]
fn later_runs_reuse_the_same_addresses() {
    let dev = Device::cpu();
    let first = dev.planned(&[1, 2], || pass(&dev));
    assert_eq!(counts(&dev), (0, 0));
    let second = dev.planned(&[1, 2], || pass(&dev));
    let third = dev.planned(&[1, 2], || pass(&dev));
    assert_eq!(first.0, second.0);
    assert_eq!(second, third);
    assert_eq!(counts(&dev), (6, 0));
    let m = dev.memory();
    // One region of both large tensors, in which the small one follows the first.
    assert_eq!((m.in_use, m.peak), (0, (1 << 21) + (1 << 20)));
    // Nor does the pool keep what served the first run.
    assert_eq!(m.reserved, m.peak);
    dev.trim();
    assert_eq!(dev.memory().reserved, 0);
    assert_eq!(dev.planned(&[1, 2], || pass(&dev)).0, first.0);
    assert_eq!(counts(&dev), (9, 0));
}

#[test]
fn results_that_outlive_the_run_are_left_to_the_pool() {
    let dev = Device::cpu();
    let mut kept = Vec::new();
    for i in 0..4 {
        kept.push(dev.planned(&[], || {
            pass(&dev);
            tensor(&dev, 1 << 18, 10.0 + i as f32)
        }));
    }
    assert_eq!(counts(&dev), (9, 0));
    for (i, t) in kept.iter().enumerate() {
        assert!(t.as_slice().iter().all(|&v| v == 10.0 + i as f32));
    }
}

#[test]
fn late_drops_and_other_requests_fall_back_and_are_learnt() {
    let dev = Device::cpu();
    dev.planned(&[], || pass(&dev));
    // The large tensor outlives the run, unlike in the trace: two places are taken when the next run comes.
    let late = dev.planned(&[], || tensor(&dev, 1 << 19, 5.0));
    assert_eq!(counts(&dev), (1, 0));
    let (sum, [a, ..]) = dev.planned(&[], || pass(&dev));
    assert_eq!(sum, 8.0);
    assert_ne!(a, address(&late));
    assert_eq!(counts(&dev).1, 2);
    assert!(late.as_slice().iter().all(|&v| v == 5.0));
    // A live range keeps its region, and its values outlive the device.
    dev.trim();
    assert!(dev.memory().reserved >= 1 << 21);
    drop(late);
    let other = || drop([tensor(&dev, 64, 1.0), tensor(&dev, 999, 1.0)]);
    dev.planned(&[], other); // learns
    let (hits, misses) = counts(&dev);
    dev.planned(&[], other);
    assert_eq!(counts(&dev), (hits + 2, misses));
    // Without end: a computation that never repeats is served all the same.
    for i in 1..20 {
        dev.planned(&[], || tensor(&dev, 100 * i, 1.0));
    }
    assert_eq!(dev.memory().in_use, 0);
    let range = {
        let dev = Device::cpu();
        dev.planned(&[], || pass(&dev));
        dev.planned(&[], || tensor(&dev, 1 << 19, 6.0))
    };
    assert!(range.as_slice().iter().all(|&v| v == 6.0));
}

#[test]
fn a_limit_without_room_for_the_region_leaves_the_pool() {
    let dev = Device::cpu();
    let weights = tensor(&dev, 1 << 20, 0.0);
    let region = (1 << 21) + (1 << 20);
    dev.planned(&[], || pass(&dev));
    let all = 4 * weights.dims().len() + region;
    // The region would fit by itself, but not beside another tensor that is alive when it is wanted.
    let other = tensor(&dev, 1 << 18, 0.0);
    dev.set_memory_limit(Some(all));
    let fits = |dev: &Device| tensor(dev, 1 << 18, 1.0).as_slice()[3];
    assert_eq!(dev.planned(&[], || fits(&dev)), 1.0);
    assert_eq!(counts(&dev), (0, 1));
    assert!(dev.memory().reserved <= all);
    drop(other);
    assert_eq!(dev.planned(&[], || pass(&dev)).0, 8.0);
    assert_eq!(counts(&dev), (3, 1));
    assert!(dev.memory().reserved <= all + 448);
    // The region goes where a tensor needs its room, and more than the limit is refused as ever.
    let large = tensor(&dev, region / 4, 0.0);
    assert_eq!(dev.memory().reserved, all);
    let e = Tensor::empty(Dims::from([64]), Layout::PLAIN, &dev).unwrap_err();
    assert!(matches!(e, crate::Error::OutOfMemory { asked: 256, .. }), "{e}");
    drop(large);
}

#[test]
fn nested_panicking_and_parallel_runs_are_just_run() {
    let dev = Device::cpu();
    let nested = || dev.planned(&[1], || dev.planned(&[2], || pass(&dev)).0 + pass(&dev).0);
    assert_eq!(nested(), 16.0);
    assert_eq!(nested(), 16.0);
    assert_eq!(counts(&dev), (6, 0));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        dev.planned(&[1], || {
            let _t = tensor(&dev, 1 << 19, 1.0);
            panic!("on purpose");
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(nested(), 16.0);
    assert_eq!(counts(&dev), (13, 0));
    std::thread::scope(|s| {
        for key in 0..4 {
            let dev = &dev;
            s.spawn(move || (0..50).for_each(|_| assert_eq!(dev.planned(&[key], || pass(dev)).0, 8.0)));
        }
    });
    assert_eq!(dev.memory().in_use, 0);
    assert_eq!(dev.planned(&[1], || dev.planned(&[1], || pass(&dev)).0), 8.0);
}
