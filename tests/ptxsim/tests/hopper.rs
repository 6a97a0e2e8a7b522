//! Operand layouts of wgmma, bulk copies, and mbarriers beyond what the probe kernels use.
#![allow(missing_docs, unreachable_pub, reason = "test code")]

mod common;

use common::{bf16_bytes, bytes, floats, noise, rounded};
use ptxsim::{Machine, Module, Options, Params, Swizzle, TensorMap, f32_to_bf16};

const HEAD: &str = ".version 8.0\n.target sm_90a\n.address_size 64\n";

/// Offset of an element of a 64 x 16 operand, after the tables of the manual, and its descriptor without the start.
struct Layout {
    mode: u64,
    leading: u64,
    stride: u64,
    transposed: bool,
    at: fn(usize, usize) -> usize,
}

const LAYOUTS: [Layout; 8] = [
    Layout {
        mode: 0,
        leading: 128,
        stride: 256,
        transposed: false,
        at: |r, k| r / 8 * 256 + k / 8 * 128 + r % 8 * 16 + k % 8 * 2,
    },
    Layout {
        mode: 3,
        leading: 0,
        stride: 256,
        transposed: false,
        at: |r, k| r * 32 + ((k / 8) ^ (r / 4 % 2)) * 16 + k % 8 * 2,
    },
    Layout {
        mode: 2,
        leading: 0,
        stride: 512,
        transposed: false,
        at: |r, k| r * 64 + ((k / 8) ^ (r / 2 % 4)) * 16 + k % 8 * 2,
    },
    Layout {
        mode: 1,
        leading: 0,
        stride: 1024,
        transposed: false,
        at: |r, k| r * 128 + ((k / 8) ^ (r % 8)) * 16 + k % 8 * 2,
    },
    Layout {
        mode: 0,
        leading: 1024,
        stride: 128,
        transposed: true,
        at: |r, k| r / 8 * 128 + k / 8 * 1024 + k % 8 * 16 + r % 8 * 2,
    },
    Layout {
        mode: 3,
        leading: 512,
        stride: 256,
        transposed: true,
        at: |r, k| r / 16 * 512 + k / 8 * 256 + k % 8 * 32 + ((r % 16 / 8) ^ (k % 8 / 4)) * 16 + r % 8 * 2,
    },
    Layout {
        mode: 2,
        leading: 1024,
        stride: 512,
        transposed: true,
        at: |r, k| r / 32 * 1024 + k / 8 * 512 + k % 8 * 64 + ((r % 32 / 8) ^ (k % 8 / 2)) * 16 + r % 8 * 2,
    },
    Layout {
        mode: 1,
        leading: 0,
        stride: 1024,
        transposed: true,
        at: |r, k| k * 128 + ((r / 8) ^ (k % 8)) * 16 + r % 8 * 2,
    },
];

impl Layout {
    fn descriptor(&self, start: u64) -> u64 {
        start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | self.mode << 62
    }

    fn place(&self, image: &mut [u8], start: usize, x: &[f32]) {
        for (i, v) in x.iter().enumerate() {
            let at = start + (self.at)(i / 16, i % 16);
            image[at..at + 2].copy_from_slice(&f32_to_bf16(*v).to_le_bytes());
        }
    }
}

/// One m64n64k16 product; `registers` takes A from there.
fn product(a: &Layout, b: &Layout, registers: bool, scale: i32) {
    let (x, y) = (rounded(noise(64 * 16, 1)), rounded(noise(64 * 16, 2)));
    let mut image = vec![0; 16384];
    a.place(&mut image, 0, &x);
    b.place(&mut image, 8192, &y);
    let names = |p: &str, n: usize| (0..n).map(|i| format!("%{p}{i}")).collect::<Vec<_>>().join(",");
    let (d, flags) = (names("f", 32), |v: bool| u32::from(v));
    let (operand, transposes) = if registers {
        ("{%r8,%r9,%r10,%r11}", format!("{}", flags(b.transposed)))
    } else {
        ("%w6", format!("{}, {}", flags(a.transposed), flags(b.transposed)))
    };
    let loads: String = (0..4).map(|q| format!("ld.global.b32 %r{}, [%w5+{}];\n", 8 + q, 512 * q)).collect();
    let stores: String = (0..32).map(|q| format!("st.global.f32 [%w4+{}], %f{q};\n", 4 * q)).collect();
    let text = format!(
        "{HEAD}.visible .entry k(.param .u64 from, .param .u64 to, .param .u64 frags)\n{{\n.reg .b32 %r<16>;\n.reg .f32 %f<32>;\n\
         .reg .b64 %w<10>;\n.reg .pred %p<2>;\n.shared .align 1024 .b8 sm[16384];\nld.param.u64 %w1, [from];\nld.param.u64 %w2, [to];\n\
         ld.param.u64 %w8, [frags];\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %w3, %r0, 128;\nadd.s64 %w4, %w2, %w3;\n\
         mul.wide.u32 %w5, %r0, 4;\nadd.s64 %w5, %w5, %w8;\n{loads}shl.b32 %r1, %r0, 4;\nL:\ncvt.u64.u32 %w7, %r1;\n\
         add.s64 %w7, %w7, %w1;\nld.global.v4.b32 {{%r2,%r3,%r4,%r5}}, [%w7];\nst.shared.v4.b32 [%r1], {{%r2,%r3,%r4,%r5}};\n\
         add.s32 %r1, %r1, 2048;\nsetp.lt.u32 %p1, %r1, 16384;\n@%p1 bra L;\nfence.proxy.async;\nbar.sync 0;\n\
         mov.b64 %w6, {};\nmov.b64 %w9, {};\nwgmma.fence.sync.aligned;\n\
         wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{d}}}, {operand}, %w9, 0, {scale}, 1, {transposes};\n\
         wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{d}}}, {operand}, %w9, 1, {scale}, 1, {transposes};\n\
         wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n{stores}ret;\n}}\n",
        a.descriptor(0),
        b.descriptor(8192)
    );
    let module = Module::parse(&text).unwrap();
    // Register q of a thread: rows of its warp as in mma.
    let fragment = |q: usize, t: usize| {
        let at = (t / 32 * 16 + t % 32 / 4 + 8 * (q & 1)) * 16 + t % 4 * 2 + 8 * (q >> 1);
        [x[at], x[at + 1]]
    };
    let frags: Vec<f32> = (0..4).flat_map(|q| (0..128).flat_map(move |t| fragment(q, t)).collect::<Vec<_>>()).collect();
    for seed in 0..3 {
        let mut gpu = Machine::new();
        let (from, to, frags) = (gpu.upload(&image), gpu.alloc(128 * 128), gpu.upload(&bf16_bytes(&frags)));
        let params = Params::new().u64(from).u64(to).u64(frags);
        let options = Options { seed, ..Options::default() };
        let run = gpu.launch(&module, "k", [1; 3], [128, 1, 1], 0, params.as_bytes(), &options);
        run.unwrap_or_else(|e| panic!("{e}"));
        let got = floats(&gpu.download(to).unwrap());
        for t in 0..128 {
            for q in 0..32 {
                let (row, col) = (t / 32 * 16 + t % 32 / 4 + 8 * (q / 2 % 2), q / 4 * 8 + t % 4 * 2 + q % 2);
                let dot: f32 = (0..16).map(|k| x[row * 16 + k] * y[col * 16 + k]).sum();
                let expected = 2.0 * dot * scale as f32;
                assert!(
                    (got[t * 32 + q] - expected).abs() < 1e-4,
                    "row {row}, column {col}: {} {expected}",
                    got[t * 32 + q]
                );
            }
        }
    }
}

#[test]
fn operands_of_wgmma_in_every_layout() {
    for layout in &LAYOUTS {
        product(layout, &LAYOUTS[3], false, 1);
        product(&LAYOUTS[0], layout, false, -1);
    }
    product(&LAYOUTS[0], &LAYOUTS[7], true, 1);
    product(&LAYOUTS[0], &LAYOUTS[3], true, -1);
}

/// A box comes by a tensor map, is doubled, and goes back by another one.
const DOUBLE: &str = ".visible .entry k(.param .align 64 .b8 from[128], .param .align 64 .b8 to[128], .param .u32 x, .param .u32 y)\n{\n\
    .reg .b32 %r<16>;\n.reg .f32 %f<4>;\n.reg .b64 %w<8>;\n.reg .pred %p<4>;\n.shared .align 128 .b8 sm[1024];\n\
    .shared .align 8 .b8 bar[8];\nmov.u32 %r0, %tid.x;\nld.param.u32 %r6, [x];\nld.param.u32 %r7, [y];\nmov.u32 %r1, bar;\n\
    mov.u32 %r2, sm;\nmov.b64 %w1, from;\ncvta.param.u64 %w2, %w1;\nmov.b64 %w3, to;\ncvta.param.u64 %w4, %w3;\n\
    setp.ne.s32 %p1, %r0, 0;\n@%p1 bra A;\nmbarrier.init.shared::cta.b64 [%r1], 1;\nfence.mbarrier_init.release.cluster;\n\
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 1024;\n\
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%w2, {%r6, %r7}], [%r1];\nA:\n\
    bar.sync 0;\nW:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0;\n@!%p2 bra W;\nmad.lo.s32 %r3, %r0, 4, %r2;\n\
    ld.shared.f32 %f1, [%r3];\nadd.f32 %f1, %f1, %f1;\nst.shared.f32 [%r3], %f1;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n\
    @%p1 bra Z;\ncp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%w4, {%r6, %r7}], [%r2];\n\
    cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\nZ:\nret;\n}\n";

fn double(text: &str, x: i32, y: i32, seed: u64) -> Result<Vec<f32>, String> {
    let module = Module::parse(&format!("{HEAD}{text}")).map_err(|e| e.to_string())?;
    let (width, height) = (12, 20);
    let mut gpu = Machine::new();
    let input: Vec<f32> = (0..width * height).map(|i| i as f32).collect();
    let (from, to) = (gpu.upload(&bytes(&input)), gpu.upload(&bytes(&vec![-1.0; width * height])));
    let map = |base| TensorMap {
        base,
        element: 4,
        dims: vec![width as u64, height as u64],
        strides: vec![width as u64 * 4],
        tile: vec![16, 16],
        element_strides: vec![1; 2],
        swizzle: Swizzle::None,
        im2col: None,
    };
    let maps = [from, to].map(|a| gpu.tensor_map(map(a)).unwrap());
    let params = Params::new().map(&maps[0]).map(&maps[1]).i32(x).i32(y);
    let options = Options { seed, ..Options::default() };
    gpu.launch(&module, "k", [1; 3], [256, 1, 1], 0, params.as_bytes(), &options).map_err(|e| e.to_string())?;
    Ok(floats(&gpu.download(to).unwrap()))
}

#[test]
fn boxes_come_and_go() {
    for (seed, (x, y)) in [(0, 0), (-4, -3), (5, 7), (12, 30)].into_iter().enumerate() {
        let got = double(DOUBLE, x, y, seed as u64).unwrap();
        for (i, v) in got.iter().enumerate() {
            let (c, r) = ((i % 12) as i32, (i / 12) as i32);
            let inside = (x..x + 16).contains(&c) && (y..y + 16).contains(&r);
            assert_eq!(*v, if inside { 2.0 * i as f32 } else { -1.0 }, "column {c}, row {r}");
        }
    }
}

#[test]
fn boxes_with_faults() {
    let edit = |from: &str, to: &str| {
        assert!(DOUBLE.contains(from));
        (0..4).map(|seed| double(&DOUBLE.replace(from, to), 0, 0, seed).expect_err(from)).collect::<Vec<_>>().join("\n")
    };
    // Nobody waits for the box.
    assert!(edit("@!%p2 bra W;", "").contains("nothing wrote"));
    assert!(
        edit("expect_tx.shared::cta.b64 _, [%r1], 1024", "expect_tx.shared::cta.b64 _, [%r1], 1040")
            .contains("deadlock")
    );
    assert!(
        edit("try_wait.parity.shared::cta.b64 %p2, [%r1], 0", "try_wait.parity.shared::cta.b64 %p2, [%r1], 1")
            .contains("nothing wrote")
    );
    assert!(
        edit("mad.lo.s32 %r3, %r0, 4, %r2;", "mad.lo.s32 %r3, %r0, 4, %r2;\nadd.s32 %r2, %r2, 16;")
            .contains("multiple of 128")
    );
    assert!(edit("[%r2], [%w2, {%r6, %r7}]", "[%r2], [%w2, {%r6}]").contains("tensor map"));
    assert!(edit("fence.proxy.async.shared::cta;\n", "").contains("no fence.proxy.async"));
    assert!(
        edit("cvta.param.u64 %w2, %w1;", "cvta.param.u64 %w2, %w1;\nadd.s64 %w2, %w2, 32;").contains("multiple of 64")
    );
    // Without the barrier the box leaves before other warps have doubled it.
    assert!(edit("fence.proxy.async.shared::cta;\nbar.sync 0;", "fence.proxy.async.shared::cta;").contains("race"));
}

/// Two warps share what they begin with, 168 a thread.
#[test]
fn registers_are_given_up_before_they_are_taken() {
    let run = |few: u32, many: u32| {
        let text = format!(
            "{HEAD}.visible .entry k()\n.maxntid 384, 1, 1\n.minnctapersm 1\n{{\n.reg .b32 %r<4>;\n.reg .pred %p<2>;\n\
             mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\nsetmaxnreg.inc.sync.aligned.u32 {many};\nret;\nL:\n\
             setmaxnreg.dec.sync.aligned.u32 {few};\nret;\n}}\n"
        );
        let module = Module::parse(&text).unwrap();
        let options = Options::default();
        Machine::new().launch(&module, "k", [1; 3], [64, 1, 1], 0, &[], &options).map_err(|e| e.to_string())
    };
    run(120, 216).unwrap();
    assert!(run(128, 216).unwrap_err().contains("deadlock"));
    assert!(run(120, 212).unwrap_err().contains("212 registers"));
}

#[test]
fn copies_tell_an_mbarrier() {
    let text = format!(
        "{HEAD}.visible .entry k(.param .u64 from, .param .u64 to)\n{{\n.reg .b32 %r<8>;\n.reg .b64 %w<8>;\n.reg .pred %p<4>;\n\
         .shared .align 16 .b8 sm[1024];\n.shared .align 8 .b8 bar[8];\nld.param.u64 %w1, [from];\nld.param.u64 %w2, [to];\n\
         mov.u32 %r0, %tid.x;\nmov.u32 %r1, bar;\nmov.u32 %r2, sm;\nsetp.ne.s32 %p1, %r0, 0;\n\
         @!%p1 mbarrier.init.shared::cta.b64 [%r1], 64;\nbar.sync 0;\nmul.wide.u32 %w3, %r0, 16;\nadd.s64 %w4, %w1, %w3;\n\
         shl.b32 %r3, %r0, 4;\nadd.s32 %r3, %r3, %r2;\ncp.async.cg.shared.global [%r3], [%w4], 16, 12;\n\
         cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1];\nW:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0;\n\
         @!%p2 bra W;\nxor.b32 %r4, %r3, 512;\nld.shared.v4.b32 {{%r4,%r5,%r6,%r7}}, [%r4];\nadd.s64 %w5, %w2, %w3;\n\
         st.global.v4.b32 [%w5], {{%r4,%r5,%r6,%r7}};\nret;\n}}\n"
    );
    for seed in 0..4 {
        let module = Module::parse(&text).unwrap();
        let mut gpu = Machine::new();
        let input: Vec<f32> = (0..256).map(|i| i as f32 + 1.0).collect();
        let (from, to) = (gpu.upload(&bytes(&input)), gpu.alloc(1024));
        let params = Params::new().u64(from).u64(to);
        let options = Options { seed, ..Options::default() };
        gpu.launch(&module, "k", [1; 3], [64, 1, 1], 0, params.as_bytes(), &options).unwrap();
        let got = floats(&gpu.download(to).unwrap());
        let expected: Vec<f32> = (0..256).map(|i| if i % 4 == 3 { 0.0 } else { input[i ^ 128] }).collect();
        assert_eq!(got, expected);
    }
}
