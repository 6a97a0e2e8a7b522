//! Instruction sets behind one trait.
//!
//! A value of a [`Simd`] type is the proof that the processor has the instructions, so arithmetic needs no `unsafe`;
//! only making that proof does. Generic algorithms are `#[inline(always)]` and entered through small
//! `#[target_feature]` functions (see [`simd_entry`]), into which everything is inlined and compiled with the
//! instructions of that set. Closures would not be inlined reliably, hence the plain loops in the algorithms.

use crate::tensor::BLOCK;

/// Arithmetic on one channel block of 16 floats: one AVX-512 register, two of AVX2, four of NEON.
pub(crate) trait Simd: Copy {
    /// Sixteen floats in registers.
    type V: Copy;

    /// The same number sixteen times.
    fn splat(self, x: f32) -> Self::V;
    fn load(self, from: &[f32; BLOCK]) -> Self::V;
    fn store(self, v: Self::V, to: &mut [f32; BLOCK]);
    /// As `store`, past the caches where the set can.
    ///
    /// # Safety
    /// `to` is writable and aligned to 64 bytes; nothing reads it before an `sfence` of this thread.
    unsafe fn stream(self, v: Self::V, to: *mut [f32; BLOCK]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the set can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of each pair; `b` where one of them is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `2^n` for `t = 1.5 * 2^23 + n` with n in [-126, 127]: the low bits of such a float are n itself.
    fn power_of_two(self, t: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// Square roots, correctly rounded.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// `x` where `x > 0`, else `x * slope`.
    fn leaky_relu(self, x: Self::V, slope: Self::V) -> Self::V;
    /// The sum of the sixteen, halves added to halves.
    fn sum(self, v: Self::V) -> f32;
    /// The largest of the sixteen; none may be NaN.
    fn largest(self, v: Self::V) -> f32;
    /// The gradient of `leaky_relu(x, slope)`: `dy` where `x > 0`, else `dy * slope`.
    fn leaky_relu_grad(self, x: Self::V, slope: Self::V, dy: Self::V) -> Self::V;
    /// `a * b + c` of single numbers, rounded once where the set can: for loops that the compiler turns into vectors.
    fn fma_f64(self, a: f64, b: f64, c: f64) -> f64;
}

/// Portable Rust.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type V = [f32; BLOCK];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; BLOCK]
    }
    #[inline(always)]
    fn load(self, from: &[f32; BLOCK]) -> Self::V {
        *from
    }
    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; BLOCK]) {
        *to = v;
    }
    #[inline(always)]
    unsafe fn stream(self, v: Self::V, to: *mut [f32; BLOCK]) {
        // SAFETY: by contract.
        unsafe { *to = v };
    }
    #[inline(always)]
    fn add(self, mut a: Self::V, b: Self::V) -> Self::V {
        for i in 0..BLOCK {
            a[i] += b[i];
        }
        a
    }
    #[inline(always)]
    fn sub(self, mut a: Self::V, b: Self::V) -> Self::V {
        for i in 0..BLOCK {
            a[i] -= b[i];
        }
        a
    }
    #[inline(always)]
    fn mul(self, mut a: Self::V, b: Self::V) -> Self::V {
        for i in 0..BLOCK {
            a[i] *= b[i];
        }
        a
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, mut c: Self::V) -> Self::V {
        // Not `mul_add`: without the instruction it is a slow library call.
        for i in 0..BLOCK {
            c[i] += a[i] * b[i];
        }
        c
    }
    #[inline(always)]
    fn max(self, mut a: Self::V, b: Self::V) -> Self::V {
        for i in 0..BLOCK {
            a[i] = if a[i] > b[i] { a[i] } else { b[i] };
        }
        a
    }
    #[inline(always)]
    fn power_of_two(self, mut t: Self::V) -> Self::V {
        for v in &mut t {
            *v = f32::from_bits((v.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
        }
        t
    }
    #[inline(always)]
    fn div(self, mut a: Self::V, b: Self::V) -> Self::V {
        for i in 0..BLOCK {
            a[i] /= b[i];
        }
        a
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn leaky_relu(self, mut x: Self::V, slope: Self::V) -> Self::V {
        for i in 0..BLOCK {
            x[i] = if x[i] > 0.0 { x[i] } else { x[i] * slope[i] };
        }
        x
    }
    #[inline(always)]
    fn sum(self, mut v: Self::V) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn leaky_relu_grad(self, x: Self::V, slope: Self::V, mut dy: Self::V) -> Self::V {
        for i in 0..BLOCK {
            dy[i] = if x[i] > 0.0 { dy[i] } else { dy[i] * slope[i] };
        }
        dy
    }
    #[inline(always)]
    fn fma_f64(self, a: f64, b: f64, c: f64) -> f64 {
        a * b + c
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, Simd};

    /// AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());

    impl Avx2 {
        /// # Safety
        /// The processor must have AVX2 and FMA.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }

    impl Simd for Avx2 {
        type V = [__m256; 2];

        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: `self` proves AVX2.
            let v = unsafe { _mm256_set1_ps(x) };
            [v, v]
        }
        #[inline(always)]
        fn load(self, from: &[f32; BLOCK]) -> Self::V {
            let p = from.as_ptr();
            // SAFETY: `self` proves AVX2; 16 floats are readable at `p`.
            unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
        }
        #[inline(always)]
        fn store(self, v: Self::V, to: &mut [f32; BLOCK]) {
            let p = to.as_mut_ptr();
            // SAFETY: `self` proves AVX2; 16 floats are writable at `p`.
            unsafe {
                _mm256_storeu_ps(p, v[0]);
                _mm256_storeu_ps(p.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn stream(self, v: Self::V, to: *mut [f32; BLOCK]) {
            let p = to.cast::<f32>();
            // SAFETY: `self` proves AVX2; by contract 16 aligned floats are writable at `p`.
            unsafe {
                _mm256_stream_ps(p, v[0]);
                _mm256_stream_ps(p.add(8), v[1]);
            }
        }
        #[inline(always)]
        fn add(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX2.
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }
        #[inline(always)]
        fn sub(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX2.
            unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        }
        #[inline(always)]
        fn mul(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX2.
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }
        #[inline(always)]
        fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: `self` proves FMA.
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
        #[inline(always)]
        fn max(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX2.
            unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        }
        #[inline(always)]
        fn power_of_two(self, t: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX2.
            unsafe {
                let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
                let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(t[0]));
                let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(t[1]));
                [_mm256_castsi256_ps(_mm256_add_epi32(low, one)), _mm256_castsi256_ps(_mm256_add_epi32(high, one))]
            }
        }
        #[inline(always)]
        fn div(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX2.
            unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
        }
        #[inline(always)]
        fn sqrt(self, a: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX2.
            unsafe { [_mm256_sqrt_ps(a[0]), _mm256_sqrt_ps(a[1])] }
        }
        #[inline(always)]
        fn leaky_relu(self, x: Self::V, slope: Self::V) -> Self::V {
            let mut out = x;
            for i in 0..2 {
                // Chooses the factor, not the result: in place the latter is compiled to masked stores, which are
                // several times slower on AMD. A factor of one is exact.
                // SAFETY: `self` proves AVX2.
                out[i] = unsafe {
                    let positive = _mm256_cmp_ps::<_CMP_GT_OQ>(x[i], _mm256_setzero_ps());
                    _mm256_mul_ps(x[i], _mm256_blendv_ps(slope[i], _mm256_set1_ps(1.0), positive))
                };
            }
            out
        }
        #[inline(always)]
        fn sum(self, v: Self::V) -> f32 {
            // SAFETY: `self` proves AVX2.
            unsafe {
                let v = _mm256_add_ps(v[0], v[1]);
                let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
            }
        }
        #[inline(always)]
        fn largest(self, v: Self::V) -> f32 {
            // SAFETY: `self` proves AVX2.
            unsafe {
                let v = _mm256_max_ps(v[0], v[1]);
                let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
            }
        }
        #[inline(always)]
        fn leaky_relu_grad(self, x: Self::V, slope: Self::V, dy: Self::V) -> Self::V {
            let mut out = dy;
            for i in 0..2 {
                // SAFETY: `self` proves AVX2.
                out[i] = unsafe {
                    let positive = _mm256_cmp_ps::<_CMP_GT_OQ>(x[i], _mm256_setzero_ps());
                    _mm256_mul_ps(dy[i], _mm256_blendv_ps(slope[i], _mm256_set1_ps(1.0), positive))
                };
            }
            out
        }
        #[inline(always)]
        fn fma_f64(self, a: f64, b: f64, c: f64) -> f64 {
            a.mul_add(b, c)
        }
    }

    /// AVX-512 F.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(());

    impl Avx512 {
        /// # Safety
        /// The processor must have AVX-512 F.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }

    impl Simd for Avx512 {
        type V = __m512;

        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, from: &[f32; BLOCK]) -> Self::V {
            // SAFETY: `self` proves AVX-512; 16 floats are readable.
            unsafe { _mm512_loadu_ps(from.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, v: Self::V, to: &mut [f32; BLOCK]) {
            // SAFETY: `self` proves AVX-512; 16 floats are writable.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
        }
        #[inline(always)]
        unsafe fn stream(self, v: Self::V, to: *mut [f32; BLOCK]) {
            // SAFETY: `self` proves AVX-512; by contract 16 aligned floats are writable at `to`.
            unsafe { _mm512_stream_ps(to.cast::<f32>(), v) }
        }
        #[inline(always)]
        fn add(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn max(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        fn power_of_two(self, t: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe {
                let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
                _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_castps_si512(_mm512_set1_ps(1.0))))
            }
        }
        #[inline(always)]
        fn div(self, a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        fn sqrt(self, a: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_sqrt_ps(a) }
        }
        #[inline(always)]
        fn leaky_relu(self, x: Self::V, slope: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe {
                let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_setzero_ps());
                _mm512_mask_blend_ps(positive, _mm512_mul_ps(x, slope), x)
            }
        }
        #[inline(always)]
        fn sum(self, v: Self::V) -> f32 {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_reduce_add_ps(v) }
        }
        #[inline(always)]
        fn largest(self, v: Self::V) -> f32 {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_reduce_max_ps(v) }
        }
        #[inline(always)]
        fn leaky_relu_grad(self, x: Self::V, slope: Self::V, dy: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX-512.
            unsafe {
                let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_setzero_ps());
                _mm512_mask_blend_ps(positive, _mm512_mul_ps(dy, slope), dy)
            }
        }
        #[inline(always)]
        fn fma_f64(self, a: f64, b: f64, c: f64) -> f64 {
            a.mul_add(b, c)
        }
    }
}

/// `simd_entry!(name = algorithm(argument: Type, ..) -> Result)`: a module `name` with one function per instruction set
/// (`scalar`, `avx2`, `avx512`, all of one type and safe to call where the processor has the set), each of which is
/// `algorithm(simd, argument, ..)` compiled for that set, and `name::on(isa, argument, ..)`, which calls the one of `isa`.
/// With `unsafe` before the name, the algorithm has a safety contract, and so has `name::on`.
macro_rules! simd_entry {
    (unsafe $name:ident = $algorithm:ident ( $($a:ident : $t:ty),* )) => {
        pub(super) mod $name {
            #[allow(unused_imports, reason = "not every entry names a type of its file")]
            use super::*;
            use $crate::tensor::Isa;

            /// # Safety
            /// The contract of the algorithm, and the processor must have AVX2 and FMA.
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($a: $t),*) {
                // SAFETY: this function's own contract.
                unsafe { $algorithm($crate::backend::cpu::isa::Avx2::new(), $($a),*) }
            }

            /// # Safety
            /// The contract of the algorithm, and the processor must have AVX-512 F, VL, BW and DQ.
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            unsafe fn avx512($($a: $t),*) {
                // SAFETY: this function's own contract.
                unsafe { $algorithm($crate::backend::cpu::isa::Avx512::new(), $($a),*) }
            }

            /// # Safety
            /// The contract of the algorithm.
            pub(in super::super) unsafe fn on(isa: Isa, $($a: $t),*) {
                // SAFETY: this function's own contract; devices and implementation lists hand out only sets that this
                // processor has.
                unsafe {
                    match isa {
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx512 => avx512($($a),*),
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx2 => avx2($($a),*),
                        _ => $algorithm($crate::backend::cpu::isa::Scalar, $($a),*),
                    }
                }
            }
        }
    };
    ($name:ident = $algorithm:ident ( $($a:ident : $t:ty),* ) $(-> $r:ty)?) => {
        mod $name {
            #[allow(unused_imports, reason = "not every entry names a type of its file")]
            use super::*;
            use $crate::tensor::Isa;

            pub(super) fn scalar($($a: $t),*) $(-> $r)? {
                $algorithm($crate::backend::cpu::isa::Scalar, $($a),*)
            }

            /// # Safety
            /// The processor must have AVX2 and FMA.
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($a: $t),*) $(-> $r)? {
                // SAFETY: this function's own contract.
                $algorithm(unsafe { $crate::backend::cpu::isa::Avx2::new() }, $($a),*)
            }

            /// # Safety
            /// The processor must have AVX-512 F, VL, BW and DQ.
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            unsafe fn avx512($($a: $t),*) $(-> $r)? {
                // SAFETY: this function's own contract.
                $algorithm(unsafe { $crate::backend::cpu::isa::Avx512::new() }, $($a),*)
            }

            pub(super) fn on(isa: Isa, $($a: $t),*) $(-> $r)? {
                match isa {
                    // SAFETY: devices and implementation lists hand out only sets that this processor has.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => unsafe { avx512($($a),*) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => unsafe { avx2($($a),*) },
                    _ => scalar($($a),*),
                }
            }
        }
    };
}
pub(crate) use simd_entry;
