//! Convolution from boxes of tensors on compute capability 9.0, and what a card has to show before it is used.

use stunet::backend_testing::cuda::conv3d::{self, Wish};
use stunet::backend_testing::cuda::{Source, Storage};
use stunet::tensor::cuda::{Driver, Memory};

use super::conv3d::{Case, check_by};
use super::faults::{Faulty, replace};
use super::sim::Sim;

fn case(space: [usize; 3], channels: usize, filters: usize) -> Case {
    Case { card: [9, 0], ..Case::new(space, channels, filters) }
}

/// By these variants, unless a card of another generation stands in for the interpreter.
fn check(c: &Case, parts: &[usize]) {
    if Sim::of(0, c.card).capability() == c.card {
        check_by(c, parts, "tma");
        if c.stride == [1; 3] && parts == [1] {
            check_by(c, parts, "resident");
        }
    }
}

/// More tiles than the interpreter's card has blocks that stay: groups have several each, and filters lie in two groups.
#[test]
pub(super) fn ptx_conv3d_tma_with_filters_that_stay() {
    let sources = vec![(16, [2; 3], false), (20, [1; 3], true)];
    let c = Case { batch: 2, bias: true, sources, ..case([6, 10, 18], 0, 24) };
    if Sim::of(0, c.card).capability() == c.card {
        check_by(&c, &[1], "resident");
        let sources = vec![(20, [1; 3], true)];
        check_by(&Case { storage: Storage::F16, sources, filters: 48, ..c }, &[1], "resident");
    }
}

#[test]
pub(super) fn ptx_conv3d_tma_of_ragged_sizes_and_channels() {
    for (space, channels, filters) in [([5, 9, 11], 16, 16), ([9, 8, 9], 40, 80), ([1, 1, 1], 80, 144)] {
        check(&case(space, channels, filters), &[1]);
    }
}

#[test]
pub(super) fn ptx_conv3d_tma_of_a_batch_in_f16_with_bias() {
    check(&Case { batch: 2, storage: Storage::F16, bias: true, ..case([5, 6, 9], 32, 24) }, &[1]);
}

#[test]
pub(super) fn ptx_conv3d_tma_normalises_as_it_reads() {
    let c = Case { batch: 2, ..case([5, 9, 6], 0, 40) };
    for (a, b) in [((40, true), None), ((20, true), Some((36, false))), ((48, false), Some((16, true)))] {
        let sources = [Some(a), b].into_iter().flatten().map(|(channels, norm)| (channels, [1; 3], norm)).collect();
        check(&Case { sources, ..c.clone() }, &[1]);
    }
}

/// Parts are ranges of slabs; a brick's buffers begin with any of them.
#[test]
pub(super) fn ptx_conv3d_tma_in_parts() {
    let c = Case { batch: 2, bias: true, ..case([5, 6, 10], 0, 40) };
    check(&Case { sources: vec![(20, [1; 3], true), (52, [1; 3], false)], ..c.clone() }, &[2, 6]);
    check(&Case { sources: vec![(72, [1; 3], true)], storage: Storage::F16, ..c }, &[3]);
}

/// A box of voxels that are read twice has half as many, and one at each end; beside it those of a source as it is.
#[test]
pub(super) fn ptx_conv3d_tma_reads_voxels_twice() {
    let c = Case { batch: 2, ..case([6, 10, 8], 0, 40) };
    for (repeat, norm, parts) in [([2; 3], true, &[1, 3][..]), ([1, 2, 2], false, &[1])] {
        let sources = vec![(20, repeat, norm), (20, [1; 3], !norm)];
        check(&Case { sources, ..c.clone() }, parts);
    }
    let sources = vec![(80, [2; 3], false)];
    check(&Case { sources, storage: Storage::F16, bias: true, ..case([2, 4, 8], 0, 144) }, &[1]);
}

#[test]
pub(super) fn ptx_conv3d_tma_strides() {
    for (space, channels, filters) in [([5, 9, 11], 16, 16), ([10, 6, 20], 40, 80), ([1, 1, 2], 80, 144)] {
        check(&Case { stride: [2; 3], ..case(space, channels, filters) }, &[1]);
    }
    let sources = vec![(20, [1; 3], true), (36, [1; 3], false)];
    let c = Case { sources, stride: [2; 3], batch: 2, bias: true, ..case([7, 10, 9], 0, 40) };
    check(&Case { storage: Storage::F16, ..c }, &[1, 3]);
}

fn problem<'a>(storage: Storage, sources: &'a [Source]) -> conv3d::Problem<'a> {
    let anywhere = Memory { address: 0, bytes: usize::MAX };
    conv3d::Problem {
        storage,
        batch: 1,
        sources,
        weight: anywhere,
        bias: None,
        filters: 32,
        kernel: [3; 3],
        stride: [1; 3],
        out: anywhere,
        partials: None,
        workspace: None,
    }
}

/// It is offered where it fits and nowhere else.
#[test]
pub(super) fn ptx_conv3d_tma_is_for_its_card_and_problems() {
    let x = Source::plain(Memory { address: 0, bytes: usize::MAX }, 32, [64; 3]);
    let named = |card: [u32; 2], p: &conv3d::Problem<'_>| {
        conv3d::variants(&Sim::of(0, card), p, true).iter().filter(|name| name.starts_with("tma")).count()
    };
    let (sources, f16) = ([x], Storage::F16);
    assert_eq!(named([9, 0], &problem(f16, &sources)), 4);
    assert_eq!(named([9, 0], &conv3d::Problem { stride: [2; 3], ..problem(f16, &sources) }), 3);
    assert_eq!(named([10, 0], &problem(f16, &sources)), 0);
    assert_eq!(named([8, 6], &problem(f16, &sources)), 0);
    assert_eq!(named([9, 0], &problem(Storage::F32, &sources)), 0);
    assert_eq!(named([9, 0], &conv3d::Problem { stride: [1, 1, 2], ..problem(f16, &sources) }), 0);
    assert_eq!(named([9, 0], &conv3d::Problem { kernel: [1, 3, 3], ..problem(f16, &sources) }), 0);
    let twice = Source { repeat: [2; 3], ..x };
    assert_eq!(named([9, 0], &problem(f16, &[twice])), 4);
    assert_eq!(named([9, 0], &problem(f16, &[Source { space: [128; 3], ..x }, twice])), 0);
    assert_eq!(named([9, 0], &conv3d::Problem { stride: [2; 3], ..problem(f16, &[twice]) }), 0);
    let plan = |card, wish| conv3d::plan(&Sim::of(0, card), &problem(f16, &sources), true, wish).unwrap().name();
    // By name only, until a card has run them as they are.
    let chosen = plan([9, 0], Wish::default());
    assert!(!chosen.starts_with("tma") && !chosen.starts_with("resident"), "{chosen}");
    for name in ["resident_n32", "tma_n32", "tma_n64"] {
        assert_eq!(plan([9, 0], Wish { variant: Some(name), parts: None }), name);
    }
}

/// Why a card does not offer a variant in which there is a fault; what it offers and chooses instead is checked.
fn refused(name: &'static str, entry: &'static str, edit: &(dyn Fn(&str) -> String + Sync)) -> String {
    let sim = Sim::of(1, [9, 0]);
    let faulty = Faulty::new(&sim, name, entry, edit);
    let x = Source::plain(Memory { address: 0, bytes: usize::MAX }, 32, [64; 3]);
    let (variant, storage) = entry.strip_prefix("conv3d_").and_then(|e| e.rsplit_once('_')).unwrap();
    let storage = if storage == "f16" { Storage::F16 } else { Storage::Bf16 };
    let (sources, wish) = ([x], Wish { variant: Some(variant), parts: None });
    let p = problem(storage, &sources);
    let e = conv3d::plan(&faulty, &p, false, wish).unwrap_err().to_string();
    assert!(e.contains(variant), "{e}");
    // The others are taken for granted here.
    for other in ["resident_n16", "resident_n32", "tma_n32", "tma_n64", "tma_n96", "tma_n128"]
        .into_iter()
        .filter(|o| *o != variant)
    {
        faulty.findings().keep(&format!("conv3d_{other}_{}", storage.name()), Ok(()));
    }
    let names = conv3d::variants(&faulty, &p, false);
    assert!(names.len() > 4 && !names.contains(&variant), "{names:?}");
    assert!(conv3d::plan(&faulty, &p, false, Wish::default()).unwrap().name() != variant);
    let [(found, why)] = &faulty.findings().refused()[..] else { panic!("{name} was not found") };
    assert_eq!(found, entry);
    why.clone()
}

/// A card that does otherwise than the kernels count on is found out before anything of theirs reaches anyone.
#[test]
pub(super) fn ptx_conv3d_tma_faults_are_found_by_a_trial() {
    let found = |name: &'static str, why: &str, edit: &(dyn Fn(&str) -> String + Sync)| {
        let said = refused(name, "conv3d_tma_n32_bf16", edit);
        assert!(said.contains(why), "{name}: {said}");
    };
    let arrival = "mbarrier.arrive.shared::cta.b64 _, [";
    found("nobody says how much arrives", "nothing wrote", &|t| {
        let at = t.find("mbarrier.arrive.expect_tx").unwrap();
        let end = at + t[at..].find(';').unwrap();
        let barrier = &t[at + t[at..].find('[').unwrap()..=at + t[at..].find(']').unwrap()];
        format!("{}mbarrier.arrive.shared::cta.b64 _, {barrier}{}", &t[..at], &t[end..])
    });
    found("a brick's buffer is never free", "deadlock", &|t| replace(t, arrival, &format!("// {arrival}"), 0));
    found("a column's buffer is never free", "deadlock", &|t| replace(t, arrival, &format!("// {arrival}"), 1));
    found("a normalised brick is not fenced", "fence.proxy.async", &|t| t.replace("fence.proxy.async", "// "));
    found("registers are not given up", "deadlock", &|t| {
        t.replace("setmaxnreg.dec.sync.aligned.u32 48", "setmaxnreg.dec.sync.aligned.u32 56")
    });
    found("products are not waited for", "", &|t| t.replace("wgmma.wait_group.sync.aligned 1;", ""));
    found("one product is left out", "values", &|t| replace(t, "wgmma.mma_async", "// wgmma.mma_async", 0));
    found("voxels are transposed", "values", &|t| {
        let at = t.find("wgmma.fence").unwrap();
        format!(
            "{}{}",
            t[..at].replace("ldmatrix.sync.aligned.m8n8.x4", "ldmatrix.sync.aligned.m8n8.x4.trans"),
            &t[at..]
        )
    });
}
