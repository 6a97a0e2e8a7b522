//! How fast the interpreter runs kernels: `cargo bench -p ptxsim`.
#![allow(missing_docs, unreachable_pub, reason = "test code")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Conv, bytes, noise, text};
use ptxsim::{Machine, Module, Options, Params, Report};

fn show(name: &str, flops: f64, run: impl Fn(&Options) -> Report) {
    for threads in [1, 2] {
        let options = Options { threads, ..Options::default() };
        let start = Instant::now();
        let report = run(&options);
        let s = start.elapsed().as_secs_f64();
        let (lanes, warps) = (report.lane_instructions as f64 / s / 1e6, report.warp_instructions as f64 / s / 1e6);
        let rate = flops / s / 1e9;
        println!(
            "{name}, {threads} threads: {s:.3} s, {warps:.1} M warp and {lanes:.0} M lane instructions/s, {rate:.2} GFLOP/s"
        );
    }
}

fn main() {
    arithmetic();
    sums();
    norm();
    mma();
    hopper();
}

fn sums() {
    let module = Module::parse(&text("vadd.sm75.ptx")).unwrap();
    let n = 1 << 23;
    let a = bytes(&noise(n, 1));
    show("block sums", 0.0, |o| {
        let mut gpu = Machine::new();
        let (from, to) = (gpu.upload(&a), gpu.alloc(4 * 64));
        let params = Params::new().u64(from).u64(to).u32(n as u32);
        gpu.launch(&module, "block_sum_f32", [64, 1, 1], [256, 1, 1], 0, params.as_bytes(), o).unwrap()
    });
}

fn norm() {
    let module = Module::parse(&text("vadd.sm75.ptx")).unwrap();
    let n = 1 << 23;
    let a = bytes(&noise(n, 1));
    let c = 64;
    show("instance norm", 0.0, |o| {
        let mut gpu = Machine::new();
        let (x, g, y) = (gpu.upload(&a), gpu.upload(&a[..4 * c]), gpu.alloc(4 * n));
        let params = Params::new().u64(x).u64(g).u64(g).u64(y).u32(c as u32).u32((n / c) as u32).f32(1e-5).f32(0.01);
        gpu.launch(&module, "inorm_apply_f32", [c as u32, 1, 1], [256, 1, 1], 0, params.as_bytes(), o).unwrap()
    });
}

fn mma() {
    let conv = Conv::new([16, 16, 16], 64, 64);
    let ptx = text("conv3d_mma.sm80.ptx");
    show("mma", conv.flops(), |o| conv.mma(&ptx, 0, o).unwrap().1);
}

fn hopper() {
    let conv = Conv::new([16, 16, 16], 64, 64);
    let ptx = text("conv3d_brick.sm90a.ptx");
    show("brick", conv.flops(), |o| conv.brick(&ptx, o).unwrap().1);
    let conv = Conv::new([8, 16, 16], 64, 128);
    let ptx = text("conv3d_wgmma.sm90a.ptx");
    show("wgmma", conv.flops(), |o| conv.wgmma(&ptx, o).unwrap().1);
}

fn arithmetic() {
    let mut body = String::new();
    for i in 0..32 {
        body += match i % 4 {
            0 => "fma.rn.f32 %f1, %f2, %f3, %f1;\n",
            1 => "mad.lo.s32 %r2, %r2, %r3, %r1;\n",
            2 => "xor.b32 %r3, %r2, %r1;\n",
            _ => "add.f32 %f2, %f1, %f3;\n",
        };
    }
    let text = format!(
        ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{{\n.reg .f32 %f<4>;\n.reg .b32 %r<5>;\n\
         .reg .pred %p<2>;\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, 3;\nmov.u32 %r3, 5;\nmov.u32 %r4, 0;\n\
         mov.f32 %f1, 0f3F800000;\nmov.f32 %f2, 0f3F000000;\nmov.f32 %f3, 0f3F000000;\nL:\n{body}\
         add.s32 %r4, %r4, 1;\nsetp.lt.s32 %p1, %r4, 1000;\n@%p1 bra L;\nret;\n}}\n"
    );
    let module = Module::parse(&text).unwrap();
    show("arithmetic", 0.0, |o| Machine::new().launch(&module, "k", [64, 1, 1], [256, 1, 1], 0, &[], o).unwrap());
}
