//! Faults planted in the text of the probe kernels, and in small ones: all of them are found, and said to be what they are.
#![allow(missing_docs, unreachable_pub, reason = "test code")]

mod common;

use common::{Conv, text};
use ptxsim::{Error, Fault, Machine, Module, Options, Params, Report, Result};

fn fault<T>(name: &str, result: Result<T>) -> Fault {
    match result {
        Err(Error::Fault { place, fault }) => {
            println!("{name}: {}", Error::Fault { place: place.clone(), fault: fault.clone() });
            assert!(place.line > 0 && !place.text.is_empty() && !place.kernel.is_empty(), "{name}: {place:?}");
            fault
        }
        Err(e) => panic!("{name}: {e}"),
        Ok(_) => panic!("{name}: not found"),
    }
}

/// The text with one thing changed.
fn edit(ptx: &str, from: &str, to: &str) -> String {
    assert!(ptx.contains(from), "the kernel has no {from}");
    ptx.replace(from, to)
}

fn edit_last(ptx: &str, from: &str, to: &str) -> String {
    let at = ptx.rfind(from).unwrap_or_else(|| panic!("the kernel has no {from}"));
    format!("{}{to}{}", &ptx[..at], &ptx[at + from.len()..])
}

struct Mma {
    ptx: String,
    conv: Conv,
}

impl Mma {
    fn new() -> Mma {
        Mma { ptx: text("conv3d_mma.sm80.ptx"), conv: Conv::new([5, 6, 7], 64, 40) }
    }

    fn run(&self, ptx: &str) -> Result<(Vec<u8>, Report)> {
        self.conv.mma(ptx, 0, &Options::default())
    }
}

#[test]
fn a_barrier_removed() {
    let k = Mma::new();
    let found = fault("barrier removed", k.run(&edit(&k.ptx, "bar.sync \t0;", "")));
    assert!(matches!(found, Fault::Unwritten { .. } | Fault::SharedRace { .. }));
}

#[test]
fn a_wait_that_lets_one_group_more_pass() {
    let k = Mma::new();
    let found = fault("wait", k.run(&edit(&k.ptx, "cp.async.wait_group 1;", "cp.async.wait_group 2;")));
    assert!(matches!(found, Fault::Unwritten { .. }));
}

#[test]
fn a_buffer_too_short() {
    let k = Mma::new();
    let found = fault("short", k.conv.mma(&k.ptx, 2, &Options::default()));
    assert!(matches!(found, Fault::OutOfBounds { bytes: 4, offset: 16796, len: 16798, .. }));
}

#[test]
fn a_store_dropped() {
    let k = Mma::new();
    let e = k.run(&edit_last(&k.ptx, "st.global.u32", "// ")).expect_err("an output is missing");
    assert!(e.to_string().contains("never written"), "{e}");
}

#[test]
fn a_wrong_swizzle() {
    let k = Mma::new();
    let result = k.run(&edit_last(&k.ptx, "xor.b32", "or.b32"));
    // Either the bytes hold nothing, or they are others'.
    assert!(result.is_err() || result.is_ok_and(|(y, _)| k.conv.error(&y) > 1e-2));
}

#[test]
fn a_commit_removed() {
    let k = Mma::new();
    let found = fault("commit removed", k.run(&edit(&k.ptx, "cp.async.commit_group;", "")));
    assert!(matches!(found, Fault::Unwritten { .. } | Fault::Barrier(_)));
}

#[test]
fn a_shuffle_by_half_of_a_warp() {
    let ptx = edit(&text("vadd.sm75.ptx"), "shfl.sync.bfly.b32", "@%p1 shfl.sync.bfly.b32");
    let module = Module::parse(&ptx).unwrap();
    let mut gpu = Machine::new();
    let (from, to) = (gpu.upload(&[0; 4 * 1000]), gpu.alloc(4));
    let params = Params::new().u64(from).u64(to).u32(1000);
    let result = gpu.launch(&module, "block_sum_f32", [1; 3], [256, 1, 1], 0, params.as_bytes(), &Options::default());
    // The predicate is that of a loop, true for all lanes or none: then sums are wrong instead.
    if result.is_err() {
        assert!(matches!(fault("shuffle", result), Fault::Divergent { .. }));
    }
}

#[test]
fn block_sums_without_their_barrier() {
    let ptx = edit(&text("vadd.sm75.ptx"), "bar.sync \t0;", "");
    let module = Module::parse(&ptx).unwrap();
    for seed in 0..4 {
        let mut gpu = Machine::new();
        let (from, to) = (gpu.upload(&[0; 4 * 1000]), gpu.alloc(4));
        let params = Params::new().u64(from).u64(to).u32(1000);
        let options = Options { seed, ..Options::default() };
        let result = gpu.launch(&module, "block_sum_f32", [1; 3], [256, 1, 1], 0, params.as_bytes(), &options);
        assert!(matches!(fault("sums", result), Fault::Unwritten { .. } | Fault::SharedRace { .. }));
    }
}

struct Wgmma {
    ptx: String,
    conv: Conv,
}

impl Wgmma {
    fn new() -> Wgmma {
        Wgmma { ptx: text("conv3d_wgmma.sm90a.ptx"), conv: Conv::new([4, 5, 9], 64, 40) }
    }

    fn run(&self, ptx: &str) -> Result<(Vec<u8>, Report)> {
        self.conv.wgmma(ptx, &Options::default())
    }
}

#[test]
fn a_wgmma_that_is_not_waited_for() {
    let k = Wgmma::new();
    let result = k.run(&edit(&k.ptx, "wgmma.wait_group.sync.aligned 0;", ""));
    let found = result.map_or(true, |(y, _)| k.conv.error(&y) > 0.1);
    assert!(found);
}

#[test]
fn bytes_that_are_not_expected() {
    let k = Wgmma::new();
    let text =
        edit(&k.ptx, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r", "mbarrier.arrive.shared::cta.b64 _, [%r");
    // Without the operand of the bytes.
    let lines = text.lines().map(|l| match l.find("mbarrier.arrive.shared::cta.b64 _, [%r") {
        Some(_) => l.split_once(']').map_or(l.to_string(), |(a, _)| format!("{a}];")),
        None => l.to_string(),
    });
    let text: String = lines.map(|l| l + "\n").collect();
    let found = fault("expect_tx", k.run(&text));
    assert!(matches!(found, Fault::Unwritten { .. } | Fault::SharedRace { .. } | Fault::Barrier(_)), "{found:?}");
}

#[test]
fn a_stage_that_is_never_given_free() {
    let k = Wgmma::new();
    let found = fault("never free", k.run(&edit(&k.ptx, "mbarrier.arrive.shared::cta.b64", "// ")));
    assert!(matches!(found, Fault::Deadlock(_)));
}

#[test]
fn a_stage_that_is_given_free_too_early() {
    // The wait for the products moves behind the signal.
    let k = Wgmma::new();
    let arrive = k.ptx.find("mbarrier.arrive.shared::cta.b64").unwrap();
    let wait = k.ptx[..arrive].rfind("wgmma.wait_group.sync.aligned 0;").expect("a wait before the signal");
    let end = wait + "wgmma.wait_group.sync.aligned 0;".len();
    let text = format!("{}wgmma.wait_group.sync.aligned 1;{}", &k.ptx[..wait], &k.ptx[end..]);
    let mut found = false;
    for seed in 0..6 {
        let options = Options { seed, ..Options::default() };
        found |= k.conv.wgmma(&text, &options).map_or(true, |(y, _)| k.conv.error(&y) > 0.1);
    }
    assert!(found);
}

#[test]
fn an_mbarrier_that_nobody_initialised() {
    let k = Wgmma::new();
    let at = k.ptx.find("mbarrier.init").unwrap();
    let end = at + k.ptx[at..].find(';').unwrap();
    let found = fault("init", k.run(&format!("{}{}", &k.ptx[..at], &k.ptx[end..])));
    assert!(matches!(found, Fault::Barrier(_)));
}

/// A kernel of one pointer and a body; `%r1` is the thread, `%r2` the block, `%rd1` the pointer.
fn small(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 to)\n{{\n.reg .pred %p<8>;\n\
         .reg .f32 %f<8>;\n.reg .b32 %r<32>;\n.reg .b64 %rd<16>;\n.shared .align 16 .b8 sm[2048];\n\
         ld.param.u64 %rd1, [to];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nshl.b32 %r3, %r1, 2;\n\
         mov.u32 %r4, sm;\nadd.s32 %r5, %r4, %r3;\nmul.wide.u32 %rd2, %r1, 4;\nadd.s64 %rd3, %rd1, %rd2;\n\
         {body}\nret;\n}}\n"
    )
}

fn run_small(body: &str, grid: u32, block: u32, seed: u64) -> Result<Vec<u8>> {
    let module = Module::parse(&small(body))?;
    let mut gpu = Machine::new();
    let to = gpu.upload(&[0; 4 * 1024]);
    let params = Params::new().u64(to);
    let options = Options { seed, ..Options::default() };
    gpu.launch(&module, "k", [grid, 1, 1], [block, 1, 1], 0, params.as_bytes(), &options)?;
    gpu.download(to)
}

#[test]
fn writing_the_neighbours_slot() {
    // Every warp writes its own slots, and the last lane of each the first slot of the next warp.
    let body = "st.shared.u32 [%r5], %r1;\nst.shared.u32 [%r5+4], %r1;\nbar.sync 0;";
    for seed in 0..4 {
        assert!(matches!(fault("neighbour", run_small(body, 1, 64, seed)), Fault::SharedRace { .. }));
    }
    // With a barrier between the two it is no race.
    run_small("st.shared.u32 [%r5], %r1;\nbar.sync 0;\nst.shared.u32 [%r5+4], %r1;\nbar.sync 0;", 1, 64, 1).unwrap();
}

#[test]
fn reading_before_the_barrier() {
    let body = "st.shared.u32 [%r5], %r1;\nxor.b32 %r6, %r3, 128;\nadd.s32 %r6, %r4, %r6;\nld.shared.u32 %r7, [%r6];\nbar.sync 0;";
    for seed in 0..4 {
        let found = fault("early", run_small(body, 1, 64, seed));
        assert!(matches!(found, Fault::SharedRace { .. } | Fault::Unwritten { .. }));
    }
}

#[test]
fn a_named_barrier_orders_only_its_own_warps() {
    // Warps 0 and 1 meet at barrier 1, warp 2 does not.
    let body = |reader: u32| {
        format!(
            "shr.u32 %r8, %r1, 5;\nsetp.eq.u32 %p1, %r8, 0;\nsetp.le.u32 %p2, %r8, 1;\n@%p1 st.shared.u32 [%r5], %r1;\n\
             @!%p2 bra L;\nbar.sync 1, 64;\nL:\nsetp.eq.u32 %p3, %r8, {reader};\nand.b32 %r9, %r3, 127;\n\
             add.s32 %r9, %r9, %r4;\n@%p3 ld.shared.u32 %r10, [%r9];"
        )
    };
    for seed in 0..6 {
        run_small(&body(1), 1, 96, seed).unwrap();
        let found = fault("named", run_small(&body(2), 1, 96, seed));
        assert!(matches!(found, Fault::SharedRace { .. } | Fault::Unwritten { .. }));
    }
}

#[test]
fn blocks_that_write_one_place() {
    let found = fault("blocks", run_small("st.global.u32 [%rd3], %r2;", 4, 32, 0));
    assert!(matches!(found, Fault::GlobalRace { .. }));
}

#[test]
fn blocks_that_read_what_others_write() {
    let body = "ld.global.u32 %r6, [%rd1];\nmul.wide.u32 %rd4, %r2, 128;\nadd.s64 %rd5, %rd3, %rd4;\nst.global.u32 [%rd5], %r6;";
    let found = fault("blocks", run_small(body, 4, 32, 0));
    assert!(matches!(found, Fault::GlobalRace { .. }));
}

#[test]
fn blocks_that_share_a_word_but_no_byte() {
    // Block b writes byte b of every word: that is no race.
    let body =
        "cvt.u64.u32 %rd4, %r2;\nadd.s64 %rd5, %rd3, %rd4;\nst.global.u8 [%rd5], %r2;\nld.global.u8 %r6, [%rd5];";
    for seed in 0..3 {
        let y = run_small(body, 4, 32, seed).unwrap();
        assert!(y[..128].chunks_exact(4).all(|c| c == [0, 1, 2, 3]));
    }
    let body = "mov.u32 %r6, 2;\nmin.u32 %r2, %r2, %r6;\ncvt.u64.u32 %rd4, %r2;\nadd.s64 %rd5, %rd3, %rd4;\nst.global.u8 [%rd5], %r2;";
    assert!(matches!(fault("bytes", run_small(body, 4, 32, 0)), Fault::GlobalRace { .. }));
}

#[test]
fn atomics_of_integers_are_no_race() {
    let y = run_small("red.global.add.u32 [%rd1], 1;\natom.global.max.u32 %r6, [%rd1+4], %r1;", 8, 64, 3).unwrap();
    assert_eq!(y[..8], [0, 2, 0, 0, 63, 0, 0, 0]);
    let body = "red.global.add.u32 [%rd1], 1;\nld.global.u32 %r6, [%rd1];";
    assert!(matches!(fault("atomic", run_small(body, 8, 64, 0)), Fault::GlobalRace { .. }));
}

#[test]
fn shared_memory_that_nothing_wrote() {
    let found = fault("shared", run_small("ld.shared.u32 %r6, [%r5];", 1, 32, 0));
    assert!(matches!(found, Fault::Unwritten { offset: 0, .. }));
}

#[test]
fn a_vector_off_its_alignment() {
    let body = "st.global.v2.u32 [%rd1+4], {%r1, %r1};";
    assert!(matches!(fault("vector", run_small(body, 1, 1, 0)), Fault::Misaligned { bytes: 8, .. }));
    let body = "ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r5+8];";
    assert!(matches!(fault("vector", run_small(body, 1, 1, 0)), Fault::Misaligned { bytes: 16, .. }));
}

#[test]
fn part_of_a_warp_at_an_instruction_for_all() {
    let branch = "setp.lt.u32 %p1, %r1, 7;\n@%p1 bra L;\n";
    for rest in ["bar.sync 0;\nret;\nL:\n", "shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;\nret;\nL:\nbar.sync 0;"] {
        let result = run_small(&format!("{branch}{rest}"), 1, 32, 0);
        if rest.starts_with("shfl") {
            assert!(matches!(fault("divergent", result), Fault::Divergent { .. }));
        }
    }
    let body = format!("{branch}vote.sync.ballot.b32 %r6, %p1, 0x1;\nL:\n");
    assert!(matches!(fault("members", run_small(&body, 1, 32, 0)), Fault::Divergent { .. }));
    let body = "setp.lt.u32 %p1, %r1, 7;\n@%p1 bar.sync 0;";
    assert!(matches!(fault("guard", run_small(body, 1, 32, 0)), Fault::Divergent { .. }));
}

#[test]
fn a_barrier_that_one_warp_never_reaches() {
    let body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\nbar.sync 1, 64;\nret;\nL:\n";
    let found = fault("deadlock", run_small(body, 1, 64, 0));
    assert!(matches!(&found, Fault::Deadlock(list) if list.contains("bar.sync")), "{found:?}");
    let body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\nbar.sync 1, 64;\nret;\nL:\nbar.sync 1, 96;";
    assert!(matches!(fault("counts", run_small(body, 1, 64, 0)), Fault::Barrier(_)));
}

#[test]
fn an_endless_loop() {
    let module = Module::parse(&small("L:\nbra L;")).unwrap();
    let mut gpu = Machine::new();
    let to = gpu.alloc(4);
    let options = Options { limit: 200_000, ..Options::default() };
    let result = gpu.launch(&module, "k", [1; 3], [32, 1, 1], 0, Params::new().u64(to).as_bytes(), &options);
    assert!(matches!(fault("loop", result), Fault::TooLong));
}

#[test]
fn atomics_of_floats() {
    let found = fault("float", run_small("red.global.add.f32 [%rd1], 0f3F800000;", 1, 32, 0));
    assert_eq!(found, Fault::FloatAtomic);
}

#[test]
fn division_by_zero() {
    let found = fault("zero", run_small("sub.s32 %r6, %r1, 5;\ndiv.s32 %r7, %r1, %r6;", 1, 32, 0));
    assert_eq!(found, Fault::DivisionByZero { lane: 5 });
    assert_eq!(fault("zero", run_small("rem.u32 %r7, %r1, %r1;", 1, 32, 0)), Fault::DivisionByZero { lane: 0 });
}

#[test]
fn wild_addresses_and_freed_buffers() {
    let found = fault("wild", run_small("mov.u64 %rd4, 64;\nld.global.u32 %r6, [%rd4];", 1, 1, 0));
    assert_eq!(found, Fault::WildAddress(64));
    let module = Module::parse(&small("ld.global.u32 %r6, [%rd1];")).unwrap();
    let mut gpu = Machine::new();
    let to = gpu.upload(&[0; 4]);
    gpu.free(to).unwrap();
    assert!(gpu.free(to).is_err());
    let params = Params::new().u64(to);
    let result = gpu.launch(&module, "k", [1; 3], [32, 1, 1], 0, params.as_bytes(), &Options::default());
    assert!(matches!(fault("freed", result), Fault::WildAddress(_)));
}

#[test]
fn launches_that_cannot_be() {
    let module = Module::parse(&text("conv3d_mma.sm80.ptx")).unwrap();
    let mut gpu = Machine::new();
    let mut launch = |grid: [u32; 3], block: [u32; 3], shared: usize, params: usize| {
        let result = gpu.launch(&module, "conv3d_k3_bf16", grid, block, shared, &vec![0; params], &Options::default());
        assert!(matches!(result, Err(Error::Launch(_))), "{result:?}");
    };
    launch([1; 3], [128, 1, 1], 0, 43);
    launch([1; 3], [1025, 1, 1], 0, 44);
    launch([0, 1, 1], [128, 1, 1], 0, 44);
    launch([1; 3], [128, 1, 1], 230 * 1024, 44);
    assert!(gpu.launch(&module, "none", [1; 3], [32, 1, 1], 0, &[], &Options::default()).is_err());
}

#[test]
fn unknown_instructions_name_their_line() {
    for line in
        ["tcgen05.alloc.b32 %r1, %r2;", "add.f16x4 %r1, %r2, %r3;", "add.s32 %r1, %r2, %q7;", "ld.global.u32 %r1;"]
    {
        let Err(Error::Parse { line: at, what }) = Module::parse(&small(line)) else { panic!("{line}: accepted") };
        assert_eq!(at, 19, "{line}: {what}");
    }
}
