// Products of voxels and filters without neighbours, for tensor cores with 16-bit storage: convolutions of one voxel at any
// stride, by themselves or as the end of a residual block, and transposed convolutions whose kernel is their stride, where
// every tap is a product of its own that is scattered.
#pragma once
#include "common.cuh"

struct GemmParams {
    Source a, b;        // one after the other in channels, `a` perhaps repeated
    u64 weight;         // [slab of 16 channels][tap][filter][16]
    u64 bias;           // f32 [filters], or 0
    u64 out;
    int filters;        // padded
    int batch;
    int d, h, w;        // voxels to compute: of the output, or of the input that is scattered
    int stride_z, stride_y, stride_x;   // of the input that is read
    int kernel_z, kernel_y, kernel_x;   // taps that are scattered
    int blocks;         // of a sample and a group of filters, in voxels.cuh
};

// The end of a residual block: leaky(normalised(y) + product + bias).
struct ResidualParams : GemmParams {
    u64 y;          // of the result's size, or the result itself: a block reads what it writes, and nothing else of it
    u64 norm;       // of y, f32 [N][mean, scale, shift][filters]
    float slope;
    int channels;   // of `a` where it is planes
};

constexpr int THREADS = 256, ROWS = 128, ROW = 32;

// What a product is for: itself; the end of a residual block; the end of the first block, whose input is the image as it
// arrives, f32 [N][C][D][H][W] of 1 to 8 channels.
enum Use { PRODUCT, END, END_OF_PLANES };

template <class T, Use USE, int WM, int WN, int MI, int NI, class Params>
__device__ __forceinline__ void gemm(const Params& p) {
    constexpr bool ENDS = USE != PRODUCT;
    constexpr int N = WN * NI * 8, STAGE = (ROWS + N) * ROW, STAGES = 4;
    static_assert(WM * WN * 32 == THREADS && WM * MI * 16 == ROWS && NI % 2 == 0, "tile");
    static_assert(ENDS || STAGES * STAGE >= ROWS * N * 2, "results reuse the stages");
    __shared__ __align__(128) unsigned char shared[STAGES * STAGE + (ENDS ? ROWS * N * 2 : 0)];
    // Results lie in the place of what they are added to.
    unsigned char* const results = shared + (ENDS ? STAGES * STAGE : 0);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, wm = warp / WN, wn = warp % WN;
    const int groups = (p.filters + N - 1) / N, taps = p.kernel_z * p.kernel_y * p.kernel_x;
    const int group = blockIdx.x % (groups * taps), first = group % groups * N, tap = group / groups;
    const int start = blockIdx.x / (groups * taps) * ROWS, rows = p.batch * p.d * p.h * p.w;

    // The thread's row of the left matrix: a voxel, in either source.
    const int row = start + (tid >> 1), part = (tid & 1) * 8;
    const bool real = row < rows;
    const int x = row % p.w * p.stride_x, y = row / p.w % p.h * p.stride_y, z = row / (p.w * p.h) % p.d * p.stride_z;
    const int n = real ? row / (p.w * p.h * p.d) : 0;
    auto voxel = [&](const Source& s) {
        return (((u64)n * s.d + (z >> s.shift_z)) * s.h + (y >> s.shift_y)) * s.w + (x >> s.shift_x);
    };
    const u16* from_a = (const u16*)p.a.data + (real ? voxel(p.a) * p.a.channels : 0) + part;
    const u16* from_b = (const u16*)p.b.data + (real ? voxel(p.b) * p.b.channels : 0) + part;
    const u32 base = shared_address(shared), place = swizzle<ROW>(tid * 16);

    auto load = [&](int slab, int stage) {
        const int c = slab * BLOCK;
        const u32 to = base + stage * STAGE;
        copy16(to + place, c < p.a.channels ? from_a + c : from_b + (c - p.a.channels), real ? 16 : 0);
        if (tid < N * 2) {
            const bool ok = first + (tid >> 1) < p.filters;
            const u16* w = (const u16*)p.weight + ((u64)(slab * taps + tap) * p.filters + first) * BLOCK + tid * 8;
            copy16(to + ROWS * ROW + place, ok ? w : (const u16*)p.weight, ok ? 16 : 0);
        }
    };
    const int slabs = (p.a.channels + p.b.channels) / BLOCK;
    #pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < slabs) load(s, s);
        // Under way from the beginning, needed at the end.
        if constexpr (ENDS)
            if (s == STAGES - 2)
                for (int i = tid; i < ROWS * (N / 8); i += THREADS) {
                    const int m = i / (N / 8), c = i % (N / 8) * 8;
                    const bool ok = start + m < rows && first + c < p.filters;
                    const u16* from = (const u16*)p.y + (ok ? (u64)(start + m) * p.filters + first + c : 0);
                    copy16(shared_address(results) + swizzle<N * 2>(m * N * 2 + c * 2), from, ok ? 16 : 0);
                }
        copy_commit();
    }
    float acc[MI][NI][4] = {};
    const int r = wm * MI * 16 + (lane & 15), f = wn * NI * 8 + (lane & 7) + (lane >> 4) * 8;
    const u32 left = swizzle<ROW>(r * ROW + (lane >> 4) * 16), right = ROWS * ROW + swizzle<ROW>(f * ROW + (lane >> 3 & 1) * 16);
    for (int s = 0; s < slabs; ++s) {
        copy_wait<STAGES - 2>();
        const bool second = s * BLOCK >= p.a.channels;
        const u64 norm = second ? p.b.norm : p.a.norm;
        if (norm && real) {                     // the thread's own chunk needs no barrier
            const int channels = second ? p.b.channels : p.a.channels;
            Norm8 affine;
            affine.load((const float*)norm + (u64)n * 3 * channels, channels, s * BLOCK - (second ? p.a.channels : 0) + part);
            uint4* v = (uint4*)(shared + s % STAGES * STAGE + place);
            *v = affine.template apply<T>(*v, second ? p.b.slope : p.a.slope);
        }
        __syncthreads();                        // loaded by all, and the stage before is done by all
        if (s + STAGES - 1 < slabs) load(s + STAGES - 1, (s + STAGES - 1) % STAGES);
        copy_commit();
        const u32 at = base + s % STAGES * STAGE;
        u32 a[MI][4], b[NI / 2][4];
        #pragma unroll
        for (int i = 0; i < MI; ++i) load_matrices(a[i], at + left + i * 16 * ROW);
        #pragma unroll
        for (int j = 0; j < NI / 2; ++j) load_matrices(b[j], at + right + j * 16 * ROW);
        #pragma unroll
        for (int i = 0; i < MI; ++i)
            #pragma unroll
            for (int j = 0; j < NI; ++j) T::mma(acc[i][j], a[i], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
    }
    if (ENDS) copy_wait<0>();
    __syncthreads();
    #pragma unroll
    for (int j = 0; j < NI; ++j) {
        const int c = wn * NI * 8 + j * 8 + (lane & 3) * 2;
        const bool biased = p.bias && first + c < p.filters;
        const float b0 = biased ? ((const float*)p.bias)[first + c] : 0.f, b1 = biased ? ((const float*)p.bias)[first + c + 1] : 0.f;
        float2 mean = {}, scale = {}, shift = {};
        int held = -1;
        #pragma unroll
        for (int i = 0; i < MI; ++i)
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int m = (wm * MI + i) * 16 + h * 8 + (lane >> 2);
                u32* to = (u32*)(results + swizzle<N * 2>(m * N * 2 + c * 2));
                float low = acc[i][j][2 * h] + b0, high = acc[i][j][2 * h + 1] + b1;
                if constexpr (ENDS) {
                    // A tile may lie in several samples.
                    const int sample = min(start + m, rows - 1) / (p.w * p.h * p.d);
                    if (sample != held && first + c < p.filters) {
                        const float* planes = (const float*)p.norm + (u64)sample * 3 * p.filters + first + c;
                        mean = *(const float2*)planes, scale = *(const float2*)(planes + p.filters);
                        shift = *(const float2*)(planes + 2 * p.filters), held = sample;
                    }
                    low = leaky(__fadd_rn(__fmaf_rn(__fsub_rn(T::low(*to), mean.x), scale.x, shift.x), low), p.slope);
                    high = leaky(__fadd_rn(__fmaf_rn(__fsub_rn(T::high(*to), mean.y), scale.y, shift.y), high), p.slope);
                }
                *to = T::pack(low, high);
            }
    }
    __syncthreads();
    const int tx = tap % p.kernel_x, ty = tap / p.kernel_x % p.kernel_y, tz = tap / (p.kernel_x * p.kernel_y);
    for (int i = tid; i < ROWS * (N / 8); i += THREADS) {
        const int m = i / (N / 8), c = i % (N / 8) * 8, to = start + m;
        if (to >= rows || first + c >= p.filters) continue;
        u64 out = to;
        if (taps > 1) {
            const int ox = to % p.w * p.kernel_x + tx, oy = to / p.w % p.h * p.kernel_y + ty;
            out = ((u64)(to / (p.w * p.h)) * p.kernel_z + tz) * p.h * p.kernel_y + oy;     // sample and plane together
            out = out * p.w * p.kernel_x + ox;
        }
        *(uint4*)((u16*)p.out + out * p.filters + first + c) = *(const uint4*)(results + swizzle<N * 2>(m * N * 2 + c * 2));
    }
}

#define GEMM(NAME, STORAGE, WM, WN, MI, NI)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const GemmParams p) {                                  \
        gemm<STORAGE, PRODUCT, WM, WN, MI, NI>(p);                                                                       \
    }
