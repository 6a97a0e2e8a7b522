// targets: 75 80
// max-registers: 64
// What a card does at its best, for benchmarks to be held against: multiply-additions and products of matrices in registers,
// and copies in memory. Sums are exact, so that a test knows that nothing was left out.
#include "common.cuh"

struct ProbeParams {
    u64 from;       // 16-byte pieces to copy
    u64 to;         // their copies, or f32 [block][thread] of sums
    u64 pieces;
    int rounds;     // products of each chain
    float seed;     // what a product adds
};

// Independent sums: enough to hide how long a product takes.
constexpr int CHAINS = 8;

extern "C" __global__ void __launch_bounds__(256) probe_copy(const ProbeParams p) {
    const u64 step = (u64)gridDim.x * blockDim.x;
    #pragma unroll 4
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.pieces; i += step) ((uint4*)p.to)[i] = ((const uint4*)p.from)[i];
}

extern "C" __global__ void __launch_bounds__(256) probe_fma_f32(const ProbeParams p) {
    float sum[CHAINS], one = p.seed / p.seed;
    #pragma unroll
    for (int k = 0; k < CHAINS; ++k) sum[k] = k + (threadIdx.x & 31);
    #pragma unroll 4
    for (int i = 0; i < p.rounds; ++i)
        #pragma unroll
        for (int k = 0; k < CHAINS; ++k) sum[k] = __fmaf_rn(sum[k], one, p.seed);
    float all = 0.f;
    #pragma unroll
    for (int k = 0; k < CHAINS; ++k) all = __fadd_rn(all, sum[k]);
    ((float*)p.to)[blockIdx.x * blockDim.x + threadIdx.x] = all;
}

// Matrices of 16 x 16 and 16 x 8: all of the first are the seed, all of the second are 1.
template <class T>
__device__ __forceinline__ void products(const ProbeParams& p) {
    const u32 seed = T::pack(p.seed, p.seed), one = T::pack(1.f, 1.f), a[4] = {seed, seed, seed, seed};
    float sum[CHAINS][4];
    #pragma unroll
    for (int k = 0; k < CHAINS; ++k)
        #pragma unroll
        for (int j = 0; j < 4; ++j) sum[k][j] = k + (threadIdx.x & 31);
    for (int i = 0; i < p.rounds; ++i)
        #pragma unroll
        for (int k = 0; k < CHAINS; ++k) T::mma(sum[k], a, one, one);
    float all = 0.f;
    #pragma unroll
    for (int k = 0; k < CHAINS; ++k)
        #pragma unroll
        for (int j = 0; j < 4; ++j) all = __fadd_rn(all, sum[k][j]);
    ((float*)p.to)[blockIdx.x * blockDim.x + threadIdx.x] = all;
}

#if AMPERE
extern "C" __global__ void __launch_bounds__(256) probe_mma_bf16(const ProbeParams p) { products<Bf16>(p); }
#endif
extern "C" __global__ void __launch_bounds__(256) probe_mma_f16(const ProbeParams p) { products<F16>(p); }
