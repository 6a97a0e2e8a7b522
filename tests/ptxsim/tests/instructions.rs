//! Single instructions against plain Rust, with a value of its own in every lane.
#![allow(missing_docs, unreachable_pub, reason = "test code")]

mod common;

use common::{bf16_bytes, floats, noise, rounded, words};
use ptxsim::{Machine, Module, Options, Params, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

type Lanes = [u32; 32];

/// Runs `body` in one warp: inputs are in `%r0`, `%r1`..., results are taken from `%o0`, `%o1`...; other names: `%w`, `%p`, `%h`.
fn run(body: &str, inputs: &[Lanes], outputs: usize) -> Vec<Lanes> {
    let loads: String = (0..inputs.len()).map(|i| format!("ld.global.b32 %r{i}, [%d3+{}];\n", 128 * i)).collect();
    let stores: String = (0..outputs).map(|i| format!("st.global.b32 [%d4+{}], %o{i};\n", 128 * i)).collect();
    let text = format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.const .align 4 .b32 table[2] = {{7, 0xfffffffe}};\n\
         .visible .entry k(.param .u64 from, .param .u64 to)\n{{\n.reg .b32 %r<16>;\n.reg .b32 %o<16>;\n.reg .b16 %h<8>;\n\
         .reg .pred %p<8>;\n.reg .b64 %w<8>;\n.reg .b64 %d<8>;\n.reg .b32 %t<8>;\n.shared .align 128 .b8 sm[4096];\n\
         .local .align 16 .b8 depot[64];\nld.param.u64 %d1, [from];\nld.param.u64 %d2, [to];\nmov.u32 %t0, %laneid;\n\
         mul.wide.u32 %d5, %t0, 4;\nadd.s64 %d3, %d1, %d5;\nadd.s64 %d4, %d2, %d5;\n{loads}{body}\n{stores}ret;\n}}\n"
    );
    let module = Module::parse(&text).unwrap_or_else(|e| panic!("{body}: {e}"));
    let mut gpu = Machine::new();
    let bytes: Vec<u8> = inputs.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    let (from, to) = (gpu.upload(&bytes), gpu.alloc(128 * outputs));
    let params = Params::new().u64(from).u64(to);
    let result = gpu.launch(&module, "k", [1; 3], [32, 1, 1], 0, params.as_bytes(), &Options::default());
    result.unwrap_or_else(|e| panic!("{body}: {e}"));
    words(&gpu.download(to).unwrap()).chunks_exact(32).map(|c| c.try_into().unwrap()).collect()
}

fn lanes(f: impl Fn(usize) -> u32) -> Lanes {
    std::array::from_fn(f)
}

/// Numbers of all sizes, with the extremes among them.
fn bits(seed: u32) -> Lanes {
    let edges = [0, 1, u32::MAX, 0x8000_0000, 0x7fff_ffff, 0xffff, 0x10000, 31, 32, 33];
    lanes(|i| {
        let mut x = (i as u32 + 1).wrapping_mul(0x9e37_79b9).wrapping_add(seed.wrapping_mul(0x85eb_ca6b));
        x ^= x >> 15;
        x = x.wrapping_mul(0x2c1b_3c6d);
        if (i + seed as usize).is_multiple_of(3) { edges[(i / 3 + seed as usize) % 10] } else { x >> (i % 5 * 6) }
    })
}

#[track_caller]
fn one(op: &str, f: impl Fn(u32) -> u32) {
    for seed in 0..3 {
        let a = bits(seed);
        assert_eq!(run(&format!("{op} %o0, %r0;"), &[a], 1)[0], lanes(|i| f(a[i])), "{op} of {a:x?}");
    }
}

#[track_caller]
fn two(op: &str, f: impl Fn(u32, u32) -> u32) {
    for seed in 0..3 {
        let (a, b) = (bits(seed), bits(seed + 5));
        let got = run(&format!("{op} %o0, %r0, %r1;"), &[a, b], 1)[0];
        assert_eq!(got, lanes(|i| f(a[i], b[i])), "{op} of {a:x?} and {b:x?}");
    }
}

#[track_caller]
fn three(op: &str, f: impl Fn(u32, u32, u32) -> u32) {
    for seed in 0..3 {
        let (a, b, c) = (bits(seed), bits(seed + 5), bits(seed + 11));
        let got = run(&format!("{op} %o0, %r0, %r1, %r2;"), &[a, b, c], 1)[0];
        assert_eq!(got, lanes(|i| f(a[i], b[i], c[i])), "{op} of {a:x?}, {b:x?}, {c:x?}");
    }
}

#[test]
fn integers() {
    two("add.u32", u32::wrapping_add);
    two("sub.s32", u32::wrapping_sub);
    two("mul.lo.s32", u32::wrapping_mul);
    two("mul.hi.u32", |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32);
    two("mul.hi.s32", |a, b| ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32);
    three("mad.lo.s32", |a, b, c| a.wrapping_mul(b).wrapping_add(c));
    two("min.s32", |a, b| (a as i32).min(b as i32) as u32);
    two("max.u32", u32::max);
    two("shl.b32", |a, b| if b > 31 { 0 } else { a << b });
    two("shr.u32", |a, b| if b > 31 { 0 } else { a >> b });
    two("shr.s32", |a, b| ((a as i32) >> b.min(31)) as u32);
    one("popc.b32", u32::count_ones);
    one("clz.b32", u32::leading_zeros);
    one("brev.b32", u32::reverse_bits);
    one("abs.s32", |a| (a as i32).wrapping_abs() as u32);
    one("neg.s32", u32::wrapping_neg);
    one("bfind.u32", |a| a.checked_ilog2().unwrap_or(u32::MAX));
    two("xor.b32", |a, b| a ^ b);
    three("sad.u32", |a, b, c| a.abs_diff(b).wrapping_add(c));
}

#[test]
fn wide_and_short_integers() {
    let (a, b) = (bits(1), bits(2));
    let body =
        "mul.wide.s32 %w0, %r0, %r1;\nmad.wide.u32 %w1, %r0, %r1, %w0;\nshr.s64 %w2, %w1, 7;\nmov.b64 {%o0, %o1}, %w2;";
    let got = run(body, &[a, b], 2);
    for i in 0..32 {
        let wide = (i64::from(a[i] as i32) * i64::from(b[i] as i32)) as u64;
        let sum = (u64::from(a[i]) * u64::from(b[i])).wrapping_add(wide);
        let expected = (sum as i64 >> 7) as u64;
        assert_eq!(u64::from(got[0][i]) | u64::from(got[1][i]) << 32, expected);
    }
    let body = "cvt.u16.u32 %h0, %r0;\nmul.wide.u16 %o0, %h0, -7281;\nmul.lo.s16 %h1, %h0, 3;\nneg.s16 %h2, %h1;\n\
                cvt.u32.u16 %o1, %h2;\ncvt.s32.s16 %o2, %h2;\ncvt.sat.u8.s32 %o3, %r0;\ncvt.sat.s16.s32 %o4, %r0;";
    let got = run(body, &[a], 5);
    for i in 0..32 {
        let h = a[i] & 0xffff;
        let neg = (h as u16).wrapping_mul(3).wrapping_neg();
        assert_eq!(got[0][i], h.wrapping_mul(0xffff & (-7281i32) as u32));
        assert_eq!(got[1][i], u32::from(neg));
        assert_eq!(got[2][i], neg as i16 as u32);
        assert_eq!(got[3][i], (a[i] as i32).clamp(0, 255) as u32);
        assert_eq!(got[4][i] & 0xffff, (a[i] as i32).clamp(-32768, 32767) as u32 & 0xffff);
    }
}

#[test]
fn fields_bytes_and_logic() {
    for (p, n) in [(0u32, 32u32), (3, 5), (28, 8), (31, 1), (32, 4), (5, 0), (0, 31)] {
        let field = |a: u32| -> (u32, u32) {
            let mut u = 0;
            let top = (p + n).min(32);
            for i in p.min(32)..top {
                u |= (a >> i & 1) << (i - p);
            }
            if n == 0 {
                return (0, 0);
            }
            let sign = a >> (p + n - 1).min(31) & 1;
            let kept = top.saturating_sub(p);
            let s = if sign == 1 && kept < 32 { u | u32::MAX << kept } else { u };
            (u, s)
        };
        let a = bits(4);
        let body =
            format!("bfe.u32 %o0, %r0, {p}, {n};\nbfe.s32 %o1, %r0, {p}, {n};\nbfi.b32 %o2, %r0, %r1, {p}, {n};");
        let b = bits(6);
        let got = run(&body, &[a, b], 3);
        for i in 0..32 {
            assert_eq!((got[0][i], got[1][i]), field(a[i]), "bfe of {:x} at {p}, {n}", a[i]);
            let mut expected = b[i];
            for j in (0..n).filter(|j| p + j < 32) {
                expected = expected & !(1 << (p + j)) | (a[i] >> j & 1) << (p + j);
            }
            assert_eq!(got[2][i], expected);
        }
    }
    for table in [0x80, 0xfe, 0x96, 0xe8, 0x40, 0xca] {
        let (a, b, c) = (bits(1), bits(2), bits(3));
        let got = run(&format!("lop3.b32 %o0, %r0, %r1, %r2, {table};"), &[a, b, c], 1)[0];
        let bit = |i: usize, j: u32| table >> ((a[i] >> j & 1) << 2 | (b[i] >> j & 1) << 1 | c[i] >> j & 1) & 1;
        assert_eq!(got, lanes(|i| (0..32).fold(0, |s, j| s | bit(i, j) << j)));
    }
    three("prmt.b32", |a, b, s| {
        let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
        u32::from_le_bytes(std::array::from_fn(|j| {
            let nibble = s >> (4 * j) & 15;
            let byte = bytes[(nibble & 7) as usize];
            if nibble & 8 == 0 { byte } else { (byte as i8 >> 7) as u8 }
        }))
    });
    three("shf.l.wrap.b32", |a, b, n| ((u64::from(b) << 32 | u64::from(a)) << (n & 31) >> 32) as u32);
    three("shf.r.clamp.b32", |a, b, n| ((u64::from(b) << 32 | u64::from(a)) >> n.min(32)) as u32);
}

#[test]
fn floats_and_their_orders() {
    let f = f32::from_bits;
    let equal = |got: u32, e: f32| if e.is_nan() { f(got).is_nan() } else { got == e.to_bits() };
    let special =
        lanes(|i| [f32::NAN, 0.0, -0.0, 1.0, -1.0, f32::INFINITY, f32::MIN_POSITIVE / 2.0, 3e38][i % 8].to_bits());
    let other = lanes(|i| [0.5, -0.0, f32::NAN, -3.0][i / 8].to_bits());
    let got =
        run("min.f32 %o0, %r0, %r1;\nmax.NaN.f32 %o1, %r0, %r1;\nfma.rn.f32 %o2, %r0, %r1, %r0;", &[special, other], 3);
    for i in 0..32 {
        let (a, b) = (f(special[i]), f(other[i]));
        let zeros = a == 0.0 && b == 0.0;
        let min = if zeros { f(a.to_bits() | b.to_bits()) } else { a.min(b) };
        let max = if zeros { f(a.to_bits() & b.to_bits()) } else { a.max(b) };
        assert!(equal(got[0][i], min), "min of {a} and {b}");
        assert!(equal(got[1][i], if a.is_nan() || b.is_nan() { f32::NAN } else { max }), "max of {a} and {b}");
        assert!(equal(got[2][i], a.mul_add(b, a)), "fma of {a} and {b}");
    }
    for (name, holds) in [
        ("lt", (|a, b| a < b) as fn(f32, f32) -> bool),
        ("ne", |a, b| a != b && !a.is_nan() && !b.is_nan()),
        ("neu", |a, b| a != b),
        ("geu", |a, b| a >= b || a.is_nan() || b.is_nan()),
        ("num", |a, b| !a.is_nan() && !b.is_nan()),
    ] {
        let body = format!("setp.{name}.f32 %p0|%p1, %r0, %r1;\nselp.b32 %o0, 1, 0, %p0;\nselp.b32 %o1, 1, 0, %p1;");
        let got = run(&body, &[special, other], 2);
        for i in 0..32 {
            let expected = holds(f(special[i]), f(other[i]));
            assert_eq!(
                (got[0][i] == 1, got[1][i] == 0),
                (expected, expected),
                "{name} of {} and {}",
                f(special[i]),
                f(other[i])
            );
        }
    }
    let x = lanes(|i| (i as f32 - 15.5).to_bits());
    let got = run(
        "ex2.approx.ftz.f32 %o0, %r0;\nrcp.approx.ftz.f32 %o1, %r0;\nabs.f32 %o2, %r0;\nrsqrt.approx.f32 %o3, %o2;",
        &[x],
        4,
    );
    for i in 0..32 {
        let v = f(x[i]);
        for (g, e) in [(got[0][i], v.exp2()), (got[1][i], 1.0 / v), (got[3][i], 1.0 / v.abs().sqrt())] {
            assert!((f(g) - e).abs() <= e.abs() * 1e-6);
        }
    }
}

#[test]
fn conversions_round() {
    let x = lanes(|i| {
        let list = [0.5f32, 1.5, 2.5, -0.5, -1.5, 1e10, -1e10, f32::NAN, 65519.0, 65520.0, 1.0009766, 3.0517578e-5];
        list[i % list.len()].to_bits()
    });
    let body = "cvt.rni.s32.f32 %o0, %r0;\ncvt.rzi.u32.f32 %o1, %r0;\ncvt.rmi.f32.f32 %o2, %r0;\ncvt.rn.f16.f32 %h0, %r0;\n\
                mov.b32 %o3, {%h0, %h0};\ncvt.rn.bf16x2.f32 %o4, %r0, %r1;\ncvt.rz.f16x2.f32 %o5, %r0, %r1;\n\
                cvt.rna.tf32.f32 %o6, %r0;\ncvt.f32.f16 %o7, %h0;\ncvt.rn.relu.bf16x2.f32 %o8, %r0, %r1;\ncvt.sat.f32.f32 %o9, %r0;";
    let y = lanes(|i| (i as f32 * 1.37 - 20.0).to_bits());
    let got = run(body, &[x, y], 10);
    for i in 0..32 {
        let (a, b) = (f32::from_bits(x[i]), f32::from_bits(y[i]));
        assert_eq!(got[0][i] as i32, a.round_ties_even() as i32);
        assert_eq!(got[1][i], a.trunc() as u32);
        assert!(f32::from_bits(got[2][i]) == a.floor() || a.is_nan());
        let half = u32::from(f32_to_f16(a));
        assert_eq!(got[3][i], half | half << 16);
        assert_eq!(got[4][i], u32::from(f32_to_bf16(a)) << 16 | u32::from(f32_to_bf16(b)));
        let toward_zero = f16_to_f32((got[5][i] & 0xffff) as u16);
        assert!(toward_zero.abs() <= b.abs() && b.abs() - toward_zero.abs() < b.abs() / 1000.0);
        if a.is_finite() {
            let tf32 = f32::from_bits(got[6][i]);
            assert!(got[6][i].trailing_zeros() >= 13 && (tf32 - a).abs() <= a.abs() / 2048.0);
            assert_eq!(got[7][i], f16_to_f32(half as u16).to_bits());
            assert_eq!(got[9][i], a.clamp(0.0, 1.0).to_bits());
        }
        assert_eq!(got[8][i] & 0xffff, u32::from(f32_to_bf16(b.max(0.0))));
    }
}

#[test]
fn lanes_speak_to_each_other() {
    let a = bits(3);
    let body = "shfl.sync.bfly.b32 %o0, %r0, 5, 31, -1;\nshfl.sync.down.b32 %o1|%p0, %r0, 3, 0x101f, -1;\n\
                shfl.sync.up.b32 %o2, %r0, 2, 0, -1;\nshfl.sync.idx.b32 %o3, %r0, 9, 31, -1;\nselp.b32 %o4, 1, 0, %p0;\n\
                setp.gt.s32 %p1, %r0, 100;\nvote.sync.ballot.b32 %o5, %p1, -1;\nand.b32 %r1, %t0, 3;\n\
                match.any.sync.b32 %o6, %r1, -1;\nredux.sync.add.u32 %o7, %r0, -1;\nredux.sync.max.s32 %o8, %r0, -1;\nactivemask.b32 %o9;";
    let got = run(body, &[a], 10);
    let ballot = (0..32).fold(0, |s, i| s | u32::from(a[i] as i32 > 100) << i);
    for i in 0..32 {
        assert_eq!(got[0][i], a[i ^ 5]);
        let inside = i % 16 + 3 < 16;
        assert_eq!((got[1][i], got[4][i] == 1), (a[if inside { i + 3 } else { i }], inside));
        assert_eq!(got[2][i], a[if i >= 2 { i - 2 } else { i }]);
        assert_eq!(got[3][i], a[9]);
        assert_eq!(got[5][i], ballot);
        assert_eq!(got[6][i], 0x1111_1111 << (i % 4));
        assert_eq!(got[7][i], a.iter().fold(0, |s: u32, v| s.wrapping_add(*v)));
        assert_eq!(got[8][i] as i32, a.iter().map(|v| *v as i32).max().unwrap());
        assert_eq!(got[9][i], u32::MAX);
    }
    let body = "setp.lt.u32 %p0, %t0, 8;\n@%p0 bra L;\nmov.u32 %o0, 1;\nbra.uni M;\nL:\nactivemask.b32 %o0;\nM:\nbar.warp.sync -1;";
    assert_eq!(run(body, &[], 1)[0], lanes(|i| if i < 8 { 0xff } else { 1 }));
}

#[test]
fn memory_of_every_kind() {
    let a = bits(7);
    let body = "mov.u64 %w0, depot;\ncvta.local.u64 %w1, %w0;\nst.local.u32 [%w0+4], %r0;\nld.u32 %o0, [%w1+4];\n\
                ld.const.u32 %o1, [table+4];\nmov.u32 %t1, sm;\nmad.lo.s32 %t2, %t0, 16, %t1;\n\
                st.shared.v4.u32 [%t2], {%r0, %t0, %r0, %t0};\nbar.warp.sync -1;\nld.shared.s8 %o2, [%t2];\n\
                ld.shared.u16 %o3, [%t2+2];\nld.shared.v2.u32 {%o4, %o5}, [%t2+8];\ncvt.u64.u32 %w2, %t2;\n\
                cvta.shared.u64 %w3, %w2;\nld.volatile.u32 %o6, [%w3+4];\natom.shared.add.u32 %o7, [%t1+12], 1;";
    let got = run(body, &[a], 8);
    for i in 0..32 {
        let v = a[i];
        let expected = [v, 0xffff_fffe, v as i8 as u32, v >> 16, v, i as u32, i as u32, i as u32];
        assert_eq!(got.iter().map(|o| o[i]).collect::<Vec<_>>(), expected, "lane {i}");
    }
}

/// Row-major matrices of numbers that bf16 holds.
fn matrix(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    rounded(noise(rows * cols, seed))
}

fn product(a: &[f32], b: &[f32], c: &[f32], [m, n, k]: [usize; 3], i: usize) -> f32 {
    let (row, col) = (i / n, i % n);
    assert!(row < m);
    (0..k).map(|t| f64::from(a[row * k + t]) * f64::from(b[t * n + col])).sum::<f64>() as f32 + c[i]
}

/// Fragments as the manual of PTX draws them, written down once more and by another way than the interpreter's.
#[test]
fn fragments_of_mma() {
    let half = |kind: &str, x: f32| u32::from(if kind == "f16" { f32_to_f16(x) } else { f32_to_bf16(x) });
    for (kind, k) in [("bf16", 16), ("f16", 16), ("f16", 8), ("bf16", 8)] {
        let (a, b, c) = (matrix(16, k, 1), matrix(k, 8, 2), noise(16 * 8, 3));
        let mut inputs: Vec<Lanes> = Vec::new();
        for q in 0..k / 4 {
            // a0,a1: row g; a2,a3: row g + 8; a4.. : the same with k + 8.
            let at = |l: usize, h: usize| (l / 4 + 8 * (q & 1)) * k + (l & 3) * 2 + h + 8 * (q >> 1);
            inputs.push(lanes(|l| half(kind, a[at(l, 0)]) | half(kind, a[at(l, 1)]) << 16));
        }
        for q in 0..k / 8 {
            let at = |l: usize, h: usize| ((l & 3) * 2 + h + 8 * q) * 8 + l / 4;
            inputs.push(lanes(|l| half(kind, b[at(l, 0)]) | half(kind, b[at(l, 1)]) << 16));
        }
        let place = |l: usize, q: usize| (l / 4 + 8 * (q >> 1)) * 8 + (l & 3) * 2 + (q & 1);
        inputs.extend((0..4).map(|q| lanes(|l| c[place(l, q)].to_bits())));
        let list = |from: usize, n: usize| (from..from + n).map(|i| format!("%r{i}")).collect::<Vec<_>>().join(", ");
        let (na, nb) = (k / 4, k / 8);
        let (ra, rb, rc) = (list(0, na), list(na, nb), list(na + nb, 4));
        let b1 = if nb == 1 { rb } else { format!("{{{rb}}}") };
        let body = format!(
            "mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%o0, %o1, %o2, %o3}}, {{{ra}}}, {b1}, {{{rc}}};"
        );
        let got = run(&body, &inputs, 4);
        for q in 0..4 {
            for l in 0..32 {
                let expected = product(&a, &b, &c, [16, 8, k], place(l, q));
                assert!((f32::from_bits(got[q][l]) - expected).abs() < 1e-5, "{kind} k{k}, register {q}, lane {l}");
            }
        }
    }
}

#[test]
fn fragments_of_tf32() {
    let k = 8;
    let (a, b, c) = (matrix(16, k, 4), matrix(k, 8, 5), noise(16 * 8, 6));
    let mut inputs: Vec<Lanes> = Vec::new();
    inputs.extend((0..4).map(|q| lanes(|l| a[(l / 4 + 8 * (q & 1)) * k + (l & 3) + 4 * (q >> 1)].to_bits())));
    inputs.extend((0..2).map(|q| lanes(|l| b[((l & 3) + 4 * q) * 8 + l / 4].to_bits())));
    let place = |l: usize, q: usize| (l / 4 + 8 * (q >> 1)) * 8 + (l & 3) * 2 + (q & 1);
    inputs.extend((0..4).map(|q| lanes(|l| c[place(l, q)].to_bits())));
    let body = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%o0, %o1, %o2, %o3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, \
                {%r6, %r7, %r8, %r9};";
    let got = run(body, &inputs, 4);
    for (q, l) in (0..4).flat_map(|q| (0..32).map(move |l| (q, l))) {
        let expected = product(&a, &b, &c, [16, 8, k], place(l, q));
        assert!((f32::from_bits(got[q][l]) - expected).abs() < 1e-5);
    }
}

#[test]
fn ldmatrix_and_stmatrix() {
    // Every 16-bit cell of shared memory holds its own number; row r of matrix q lies at 128 q + 16 r.
    let fill = "mov.u32 %t1, sm;\nmad.lo.s32 %t2, %t0, 16, %t1;\nshl.b32 %t3, %t0, 3;\nadd.s32 %t4, %t3, 1;\n\
                mov.b32 %r10, {%h0, %h1};\n";
    let cells: String = (0..4)
        .map(|j| {
            format!(
                "add.s32 %t5, %t3, {};\nadd.s32 %t6, %t4, {};\nshl.b32 %t6, %t6, 16;\nor.b32 %t5, %t5, %t6;\nst.shared.u32 [%t2+{}], %t5;\n",
                2 * j,
                2 * j,
                4 * j
            )
        })
        .collect();
    let fill = fill.replace("mov.b32 %r10, {%h0, %h1};\n", "") + &cells + "bar.warp.sync -1;\n";
    let got = run(&format!("{fill}ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%o0, %o1, %o2, %o3}}, [%t2];"), &[], 4);
    for (q, l) in (0..4).flat_map(|q| (0..32).map(move |l| (q, l))) {
        let cell = (64 * q + l / 4 * 8 + l % 4 * 2) as u32;
        assert_eq!(got[q][l], cell | (cell + 1) << 16);
    }
    let got = run(&format!("{fill}ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%o0, %o1}}, [%t2];"), &[], 2);
    for (q, l) in (0..2).flat_map(|q| (0..32).map(move |l| (q, l))) {
        let cell = |c: usize| (64 * q + (l % 4 * 2 + c) * 8 + l / 4) as u32;
        assert_eq!(got[q][l], cell(0) | cell(1) << 16);
    }
    // What stmatrix writes, ldmatrix reads.
    let (a, b) = (bits(1), bits(2));
    for trans in ["", ".trans"] {
        let body = format!(
            "mov.u32 %t1, sm;\nmad.lo.s32 %t2, %t0, 16, %t1;\nstmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%t2], {{%r0, %r1}};\n\
             ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%o0, %o1}}, [%t2];\nmovmatrix.sync.aligned.m8n8.trans.b16 %o2, %r0;\n\
             movmatrix.sync.aligned.m8n8.trans.b16 %o3, %o2;"
        );
        let got = run(&body, &[a, b], 4);
        assert_eq!((got[0], got[1], got[3]), (a, b, a));
    }
}

#[test]
fn traffic_is_counted() {
    let sites = |body: &str| {
        let text = format!(
            ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 to)\n{{\n.reg .b32 %r<8>;\n\
             .reg .b64 %w<8>;\n.shared .align 128 .b8 sm[8192];\nld.param.u64 %w1, [to];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, sm;\n\
             {body}\nret;\n}}\n"
        );
        let module = Module::parse(&text).unwrap();
        let mut gpu = Machine::new();
        let to = gpu.upload(&[0; 8192]);
        let params = Params::new().u64(to);
        let run = gpu.launch(&module, "k", [1; 3], [32, 1, 1], 0, params.as_bytes(), &Options::default());
        *run.unwrap().counters.values().last().unwrap()
    };
    let store = |stride: u32| sites(&format!("mad.lo.s32 %r3, %r1, {stride}, %r2;\nst.shared.u32 [%r3], %r1;"));
    assert_eq!([4, 8, 128, 132].map(|s| store(s).wavefronts), [1, 2, 32, 1]);
    let wide = sites("mad.lo.s32 %r3, %r1, 16, %r2;\nst.shared.v4.u32 [%r3], {%r1, %r1, %r1, %r1};");
    assert_eq!((wide.wavefronts, wide.ideal_wavefronts), (4, 4));
    let load = |stride: u32| {
        sites(&format!("mul.wide.u32 %w2, %r1, {stride};\nadd.s64 %w3, %w1, %w2;\nld.global.u32 %r4, [%w3];"))
    };
    assert_eq!([4, 8, 32, 128].map(|s| load(s).sectors), [4, 8, 32, 32]);
    assert_eq!(load(32).ideal_sectors, 4);
}

#[test]
fn bf16_arithmetic() {
    let (x, y) = (rounded(noise(64, 1)), rounded(noise(64, 2)));
    let pairs = |v: &[f32]| -> Lanes { words(&bf16_bytes(v)).try_into().unwrap() };
    let got = run(
        "fma.rn.bf16x2 %o0, %r0, %r1, %r0;\nmax.bf16x2 %o1, %r0, %r1;\nneg.bf16x2 %o2, %r0;",
        &[pairs(&x), pairs(&y)],
        3,
    );
    for i in 0..64 {
        let value = |q: usize| bf16_to_f32((got[q][i / 2] >> (16 * (i % 2))) as u16);
        let expected = [x[i].mul_add(y[i], x[i]), x[i].max(y[i]), -x[i]].map(|v| bf16_to_f32(f32_to_bf16(v)));
        assert_eq!([value(0), value(1), value(2)], expected);
    }
    assert_eq!(floats(&1f32.to_le_bytes()), [1.0]);
}
