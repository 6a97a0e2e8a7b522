// targets: 75 80
// max-registers: 64
// Sums of a stored tensor over samples and voxels, for each channel: the gradient of a bias.
#include "common.cuh"

struct ChannelSumsParams {
    u64 data;       // [N][voxel][channels]
    u64 sums;       // f32 [part][channels]
    u64 out;        // f32 [channels]
    u64 voxels;     // of all samples
    int channels, parts;
};

constexpr int THREADS = 256, WARPS = THREADS / 32, STRANDS = THREADS / 2;

// Adds up 8 or 16 sums of 16 channels, which lie one after the other.
template <int COUNT>
__device__ __forceinline__ float gathered(const float (&sums)[COUNT][BLOCK], int c) {
    Sum sum;
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) sum.add(sums[i][c]);
    return sum.total();
}

// A block takes 16 channels of a part of the voxels: 2 groups of 8 channels by 128 strands.
template <class T>
__device__ __forceinline__ void channel_sums(const ChannelSumsParams& p) {
    __shared__ float all[WARPS][BLOCK];
    const int tid = threadIdx.x, half = tid % 2 * 8, c = blockIdx.y * BLOCK;
    const u64 end = p.voxels * (blockIdx.x + 1) / p.parts;
    Sum sums[8];
    #pragma unroll 4
    for (u64 i = p.voxels * blockIdx.x / p.parts + tid / 2; i < end; i += STRANDS) {
        float v[8];
        T::load8((const void*)p.data, i * p.channels + c + half, v);
        #pragma unroll
        for (int k = 0; k < 8; ++k) sums[k].add(v[k]);
    }
    #pragma unroll
    for (int k = 0; k < 8; ++k) {
        float v = sums[k].total();
        #pragma unroll
        for (int far = 2; far < 32; far *= 2) v += __shfl_xor_sync(~0u, v, far);
        if (tid % 32 < 2) all[tid / 32][half + k] = v;
    }
    __syncthreads();
    if (tid < BLOCK) ((float*)p.sums)[(u64)blockIdx.x * p.channels + c + tid] = gathered(all, tid);
}

extern "C" __global__ void __launch_bounds__(THREADS) channel_sums_f32(const ChannelSumsParams p) {
    channel_sums<F32>(p);
}
#if AMPERE
extern "C" __global__ void __launch_bounds__(THREADS) channel_sums_bf16(const ChannelSumsParams p) {
    channel_sums<Halves<Bf16>>(p);
}
#endif
extern "C" __global__ void __launch_bounds__(THREADS) channel_sums_f16(const ChannelSumsParams p) {
    channel_sums<Halves<F16>>(p);
}

// A block adds up the parts of 16 channels, 16 strands of them.
extern "C" __global__ void __launch_bounds__(THREADS) channel_sums_merge(const ChannelSumsParams p) {
    __shared__ float all[THREADS / BLOCK][BLOCK];
    const int lane = threadIdx.x % BLOCK, strand = threadIdx.x / BLOCK, c = blockIdx.x * BLOCK;
    Sum sum;
    #pragma unroll 4
    for (int i = strand; i < p.parts; i += THREADS / BLOCK)
        sum.add(((const float*)p.sums)[(u64)i * p.channels + c + lane]);
    all[strand][lane] = sum.total();
    __syncthreads();
    if (strand == 0) ((float*)p.out)[c + lane] = gathered(all, lane);
}
