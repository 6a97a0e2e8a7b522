//! One register of floats behind a trait: for kernels that keep many values in registers at once, where a whole channel
//! block of [`super::isa::Simd`] would be more than one register and spill.
//!
//! The types are those of [`super::isa`]; a value of one is the proof that the processor has the instructions.

use super::isa::Scalar;
#[cfg(target_arch = "x86_64")]
use super::isa::{Avx2, Avx512};
use crate::tensor::{BLOCK, narrowed, widened};

/// Arithmetic on one register. Another processor family is one more implementation of this trait.
pub(crate) trait Lanes: Copy {
    /// Floats in a register; divides the channel block.
    const N: usize;
    /// How many values a kernel may keep before registers run out, some left for operands.
    const KEEP: usize;
    /// A register.
    type R: Copy;

    /// # Safety
    /// `N` floats are readable at `from`.
    unsafe fn load(self, from: *const f32) -> Self::R;
    /// # Safety
    /// `N` floats are writable at `to`.
    unsafe fn store(self, v: Self::R, to: *mut f32);
    /// Like `store`, past the caches where the set can: for outputs larger than these. [`Lanes::fence`] has to follow
    /// before another thread reads.
    ///
    /// # Safety
    /// As `store`, and `to` is aligned to the register's size.
    unsafe fn stream(self, v: Self::R, to: *mut f32);
    /// Floats from their upper halves.
    ///
    /// # Safety
    /// `N` halves are readable at `from`.
    #[inline(always)]
    unsafe fn widen(self, from: *const u16) -> Self::R {
        let mut v = [0.0; BLOCK];
        for (i, v) in v.iter_mut().enumerate().take(Self::N) {
            // SAFETY: by contract.
            *v = widened(unsafe { from.add(i).read() });
        }
        // SAFETY: the array holds a register.
        unsafe { self.load(v.as_ptr()) }
    }
    /// Rounds to bf16 and stores these upper halves.
    ///
    /// # Safety
    /// `N` halves are writable at `to`.
    #[inline(always)]
    unsafe fn narrow(self, v: Self::R, to: *mut u16) {
        let mut f = [0.0; BLOCK];
        // SAFETY: the array holds a register.
        unsafe { self.store(v, f.as_mut_ptr()) }
        for (i, f) in f.iter().enumerate().take(Self::N) {
            // SAFETY: by contract.
            unsafe { to.add(i).write(narrowed(*f)) }
        }
    }
    /// Orders streamed stores before what follows.
    fn fence(self);
    /// Asks for the cache line of an address that will be read soon. Any address is allowed.
    fn prefetch(self, at: *const f32);
    fn splat(self, x: f32) -> Self::R;
    fn add(self, a: Self::R, b: Self::R) -> Self::R;
    fn sub(self, a: Self::R, b: Self::R) -> Self::R;
    fn mul(self, a: Self::R, b: Self::R) -> Self::R;
    /// `a * b + c`.
    fn fma(self, a: Self::R, b: Self::R, c: Self::R) -> Self::R;
    /// `c - a * b`.
    fn fnma(self, a: Self::R, b: Self::R, c: Self::R) -> Self::R;
    /// The larger of each pair; neither is NaN, or the result is either.
    fn max(self, a: Self::R, b: Self::R) -> Self::R;
}

/// Portable Rust: four lanes, which every 64-bit processor has registers for.
impl Lanes for Scalar {
    const N: usize = 4;
    const KEEP: usize = 12;
    type R = [f32; 4];

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::R {
        // SAFETY: by contract; an unaligned read needs no alignment.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, v: Self::R, to: *mut f32) {
        // SAFETY: by contract; an unaligned write needs no alignment.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn stream(self, v: Self::R, to: *mut f32) {
        // SAFETY: by contract.
        unsafe { Lanes::store(self, v, to) }
    }
    #[inline(always)]
    fn fence(self) {}
    #[inline(always)]
    fn prefetch(self, _: *const f32) {}
    #[inline(always)]
    fn splat(self, x: f32) -> Self::R {
        [x; 4]
    }
    #[inline(always)]
    fn add(self, a: Self::R, b: Self::R) -> Self::R {
        [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]]
    }
    #[inline(always)]
    fn sub(self, a: Self::R, b: Self::R) -> Self::R {
        [a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]]
    }
    #[inline(always)]
    fn mul(self, a: Self::R, b: Self::R) -> Self::R {
        [a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]]
    }
    #[inline(always)]
    fn fma(self, a: Self::R, b: Self::R, c: Self::R) -> Self::R {
        // Not `mul_add`: without the instruction it is a slow library call.
        [a[0] * b[0] + c[0], a[1] * b[1] + c[1], a[2] * b[2] + c[2], a[3] * b[3] + c[3]]
    }
    #[inline(always)]
    fn fnma(self, a: Self::R, b: Self::R, c: Self::R) -> Self::R {
        [c[0] - a[0] * b[0], c[1] - a[1] * b[1], c[2] - a[2] * b[2], c[3] - a[3] * b[3]]
    }
    #[inline(always)]
    fn max(self, a: Self::R, b: Self::R) -> Self::R {
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        [larger(a[0], b[0]), larger(a[1], b[1]), larger(a[2], b[2]), larger(a[3], b[3])]
    }
}

/// `Lanes` for an x86-64 set from the names of its intrinsics.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_lanes {
    ($set:ident, $n:literal, $keep:literal, $r:ident, $load:ident, $store:ident, $stream:ident, $splat:ident, $add:ident,
     $sub:ident, $mul:ident, $fma:ident, $fnma:ident, $max:ident) => {
        impl Lanes for $set {
            const N: usize = $n;
            const KEEP: usize = $keep;
            type R = std::arch::x86_64::$r;

            #[inline(always)]
            unsafe fn load(self, from: *const f32) -> Self::R {
                // SAFETY: `self` proves the instruction set; the memory is the caller's promise.
                unsafe { std::arch::x86_64::$load(from) }
            }
            #[inline(always)]
            unsafe fn store(self, v: Self::R, to: *mut f32) {
                // SAFETY: as for `load`.
                unsafe { std::arch::x86_64::$store(to, v) }
            }
            #[inline(always)]
            unsafe fn stream(self, v: Self::R, to: *mut f32) {
                // SAFETY: as for `load`; the alignment is the caller's promise.
                unsafe { std::arch::x86_64::$stream(to, v) }
            }
            #[inline(always)]
            fn fence(self) {
                // SAFETY: SSE is part of x86-64.
                unsafe { std::arch::x86_64::_mm_sfence() }
            }
            #[inline(always)]
            fn prefetch(self, at: *const f32) {
                // SAFETY: SSE is part of x86-64, and a prefetch never faults.
                unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast()) }
            }
            #[inline(always)]
            fn splat(self, x: f32) -> Self::R {
                // SAFETY: `self` proves the instruction set, here and below.
                unsafe { std::arch::x86_64::$splat(x) }
            }
            #[inline(always)]
            fn add(self, a: Self::R, b: Self::R) -> Self::R {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::$add(a, b) }
            }
            #[inline(always)]
            fn sub(self, a: Self::R, b: Self::R) -> Self::R {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::$sub(a, b) }
            }
            #[inline(always)]
            fn mul(self, a: Self::R, b: Self::R) -> Self::R {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::$mul(a, b) }
            }
            #[inline(always)]
            fn fma(self, a: Self::R, b: Self::R, c: Self::R) -> Self::R {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::$fma(a, b, c) }
            }
            #[inline(always)]
            fn fnma(self, a: Self::R, b: Self::R, c: Self::R) -> Self::R {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::$fnma(a, b, c) }
            }
            #[inline(always)]
            fn max(self, a: Self::R, b: Self::R) -> Self::R {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::$max(a, b) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
x86_lanes!(
    Avx512,
    16,
    28,
    __m512,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_stream_ps,
    _mm512_set1_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_fmadd_ps,
    _mm512_fnmadd_ps,
    _mm512_max_ps
);
#[cfg(target_arch = "x86_64")]
x86_lanes!(
    Avx2,
    8,
    12,
    __m256,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_stream_ps,
    _mm256_set1_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_fmadd_ps,
    _mm256_fnmadd_ps,
    _mm256_max_ps
);
