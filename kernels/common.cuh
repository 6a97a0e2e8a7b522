// What the kernels share: types, copies to shared memory, matrix fragments, 16-bit storage. No CUDA headers are included:
// every instruction that C++ cannot say is named here.
#pragma once
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

// Activations lie as [N][D][H][W][C] with C padded to a multiple of 16; pad channels hold zero.
constexpr int BLOCK = 16;

// A normalisation that is known but not applied: leaky((x - mean) * scale + shift), as [N][mean, scale, shift][C] f32.
struct Source {
    u64 data;
    u64 norm;       // 0: values are taken as they are
    int channels;   // padded; 0: there is no such source
    int d, h, w;    // its own size; 1 << shift times that is the size it is read at
    int shift_z, shift_y, shift_x;
    float slope;
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// What is told apart by the card: bf16, and copies that run beside the computation, begin with compute capability 8.0. Before
// it a copy goes through registers, and waiting for it means nothing; barriers stand where they stand in any case.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define AMPERE 1
#else
#define AMPERE 0
#endif

#if AMPERE
// 16 bytes, or zeros when `bytes` is 0: the padding of a convolution costs no branch. Past the first-level cache.
__device__ __forceinline__ void copy16(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
#else
__device__ __forceinline__ void copy16(u32 to, const void* from, int bytes) {
    const uint4 v = bytes ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void copy_commit() {}
template <int LEFT>
__device__ __forceinline__ void copy_wait() {}
#endif

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}
// The same of matrices whose rows and columns change places.
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

// A row of `PITCH` bytes holds 16-byte chunks; the chunk number is mixed with the number of the 128 bytes it lies in, so
// that eight rows in a row lie in eight different groups of four banks.
template <int PITCH>
__device__ __forceinline__ u32 swizzle(u32 offset) {
    constexpr u32 KEY = (PITCH < 128 ? PITCH : 128) / 16 - 1;
    return offset ^ ((offset >> 7 & KEY) << 4);
}

// Words to memory that is not shared, at once: what is written as a vector, the compiler may take apart.
__device__ __forceinline__ void store_words(void* to, const u32 (&v)[2]) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(to)), "r"(v[0]), "r"(v[1]) : "memory");
}
__device__ __forceinline__ void store_words(void* to, const u32 (&v)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 ::"l"(__cvta_generic_to_global(to)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

#if AMPERE
struct Bf16 {
    static __device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
    static __device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
#endif

struct F16 {
    static __device__ __forceinline__ float low(u32 v) {
        float f;
        asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v));
        return f;
    }
    static __device__ __forceinline__ float high(u32 v) {
        float f;
        asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;}" : "=f"(f) : "r"(v));
        return f;
    }
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 r;
#if AMPERE
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
        asm("{.reg .b16 l, h;\ncvt.rn.f16.f32 l, %1;\ncvt.rn.f16.f32 h, %2;\nmov.b32 %0, {l, h};}" : "=r"(r) : "f"(low), "f"(high));
#endif
        return r;
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if AMPERE
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
        // The first and the second 8 of the 16 terms.
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
    }
};

// Eight neighbouring values of a tensor as f32, whatever their storage. `i` counts values and is a multiple of 8.
struct F32 {
    static __device__ __forceinline__ void load8(const void* from, u64 i, float (&v)[8]) {
        const float4 a = *(const float4*)((const float*)from + i), b = *(const float4*)((const float*)from + i + 4);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
    static __device__ __forceinline__ void store8(void* to, u64 i, const float (&v)[8]) {
        *(float4*)((float*)to + i) = make_float4(v[0], v[1], v[2], v[3]);
        *(float4*)((float*)to + i + 4) = make_float4(v[4], v[5], v[6], v[7]);
    }
};
template <class T>
struct Halves {
    static __device__ __forceinline__ void load8(const void* from, u64 i, float (&v)[8]) {
        const uint4 u = *(const uint4*)((const u16*)from + i);
        v[0] = T::low(u.x), v[1] = T::high(u.x), v[2] = T::low(u.y), v[3] = T::high(u.y);
        v[4] = T::low(u.z), v[5] = T::high(u.z), v[6] = T::low(u.w), v[7] = T::high(u.w);
    }
    static __device__ __forceinline__ void store8(void* to, u64 i, const float (&v)[8]) {
        *(uint4*)((u16*)to + i) = make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7]));
    }
};

__device__ __forceinline__ float leaky(float v, float slope) { return v > 0.f ? v : __fmul_rn(v, slope); }

// A sum whose rounding errors are carried along (Kahan): the order is fixed, and thousands of terms lose nothing. Sums of
// f64 would be slow on consumer cards.
struct Sum {
    float sum = 0.f, error = 0.f;
    __device__ __forceinline__ void add(float v) {
        const float y = __fsub_rn(v, error), t = __fadd_rn(sum, y);
        error = __fsub_rn(__fsub_rn(t, sum), y), sum = t;
    }
    __device__ __forceinline__ float total() const { return __fsub_rn(sum, error); }
};

// The subtraction is rounded before the multiply-add: what the tests compute, to the bit.
__device__ __forceinline__ float normalised(float v, float mean, float scale, float shift, float slope) {
    return leaky(__fmaf_rn(__fsub_rn(v, mean), scale, shift), slope);
}

// Mean, scale and shift of eight channels.
struct Norm8 {
    float mean[8], scale[8], shift[8];
    // From channel `c` of the sample whose planes start at `norm`.
    __device__ __forceinline__ void load(const float* norm, int channels, int c) {
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 m = *(const float4*)(norm + c + 4 * half), s = *(const float4*)(norm + channels + c + 4 * half),
                         b = *(const float4*)(norm + 2 * channels + c + 4 * half);
            mean[4 * half] = m.x, mean[4 * half + 1] = m.y, mean[4 * half + 2] = m.z, mean[4 * half + 3] = m.w;
            scale[4 * half] = s.x, scale[4 * half + 1] = s.y, scale[4 * half + 2] = s.z, scale[4 * half + 3] = s.w;
            shift[4 * half] = b.x, shift[4 * half + 1] = b.y, shift[4 * half + 2] = b.z, shift[4 * half + 3] = b.w;
        }
    }
    template <class T>
    __device__ __forceinline__ u32 pair(u32 v, int k, float slope) const {
        return T::pack(normalised(T::low(v), mean[k], scale[k], shift[k], slope),
                       normalised(T::high(v), mean[k + 1], scale[k + 1], shift[k + 1], slope));
    }
    __device__ __forceinline__ void apply(float (&v)[8], float slope) const {
        #pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = normalised(v[k], mean[k], scale[k], shift[k], slope);
    }
    template <class T>
    __device__ __forceinline__ uint4 apply(uint4 v, float slope) const {
        return make_uint4(pair<T>(v.x, 0, slope), pair<T>(v.y, 2, slope), pair<T>(v.z, 4, slope), pair<T>(v.w, 6, slope));
    }
};

// The same of four.
struct Norm4 {
    float4 mean, scale, shift;
    __device__ __forceinline__ void load(const float* norm, int channels, int c) {
        mean = *(const float4*)(norm + c), scale = *(const float4*)(norm + channels + c), shift = *(const float4*)(norm + 2 * channels + c);
    }
    template <class T>
    __device__ __forceinline__ uint2 apply(uint2 v, float slope) const {
        return make_uint2(T::pack(normalised(T::low(v.x), mean.x, scale.x, shift.x, slope), normalised(T::high(v.x), mean.y, scale.y, shift.y, slope)),
                          T::pack(normalised(T::low(v.y), mean.z, scale.z, shift.z, slope), normalised(T::high(v.y), mean.w, scale.w, shift.w, slope)));
    }
};
