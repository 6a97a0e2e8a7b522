// targets: 75 80
// max-registers: 64
// The end of a convolution in parts: their sums are added in the order of the parts, and then is done what conv3d.cuh does
// with the sums of a whole one.
#include "common.cuh"

struct SumParams {
    u64 sums;       // f32 [part][N][voxel][filters]
    u64 bias;       // f32 [filters], or 0
    u64 out;        // [N][voxel][filters]
    u64 partials;   // f32 [N][tile][count, mean, squares][filters], or 0
    int parts, batch, voxels, filters;
};

constexpr int TILE = 64, WARPS = 2 * TILE / 32;

// Adds up what the lanes of a warp hold for the same filters: every other lane.
__device__ __forceinline__ float strided_sum(float v) {
    #pragma unroll
    for (int far = 2; far < 32; far *= 2) v += __shfl_xor_sync(~0u, v, far);
    return v;
}

// A block takes 16 filters of 64 voxels of a sample, a thread 8 of one voxel.
template <class T>
__device__ __forceinline__ void sum(const SumParams& p) {
    __shared__ float sums[3][WARPS][BLOCK];
    const int tid = threadIdx.x, half = tid % 2 * 8, warp = tid / 32, first = blockIdx.y * BLOCK, n = blockIdx.z;
    const int voxel = blockIdx.x * TILE + tid / 2, count = min(TILE, p.voxels - (int)blockIdx.x * TILE);
    const bool real = voxel < p.voxels;
    float v[8] = {};
    if (real) {
        const u64 at = ((u64)n * p.voxels + voxel) * p.filters + first + half, part = (u64)p.batch * p.voxels * p.filters;
        F32::load8((const void*)p.sums, at, v);
        #pragma unroll 4
        for (int i = 1; i < p.parts; ++i) {
            float next[8];
            F32::load8((const void*)p.sums, at + i * part, next);
            #pragma unroll
            for (int k = 0; k < 8; ++k) v[k] += next[k];
        }
        if (p.bias) {
            float bias[8];
            F32::load8((const void*)p.bias, first + half, bias);
            #pragma unroll
            for (int k = 0; k < 8; ++k) v[k] += bias[k];
        }
        Halves<T>::store8((void*)p.out, at, v);
    }
    if (!p.partials) return;
    // Corrected two-pass, as in conv3d.cuh.
    const float inverse = __frcp_rn((float)count);
    #pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float s = strided_sum(v[k]);
        if (tid % 32 < 2) sums[0][warp][half + k] = s;
    }
    __syncthreads();
    #pragma unroll
    for (int k = 0; k < 8; ++k) {
        float s = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) s += sums[0][w][half + k];
        const float d = real ? v[k] - s * inverse : 0.f;
        const float one = strided_sum(d), two = strided_sum(d * d);
        if (tid % 32 < 2) sums[1][warp][half + k] = one, sums[2][warp][half + k] = two;
    }
    __syncthreads();
    if (tid >= BLOCK) return;
    float s = 0.f, one = 0.f, two = 0.f;
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) s += sums[0][w][tid], one += sums[1][w][tid], two += sums[2][w][tid];
    const float off = one * inverse;
    float* to = (float*)p.partials + ((u64)n * gridDim.x + blockIdx.x) * 3 * p.filters + first + tid;
    to[0] = (float)count;
    to[p.filters] = s * inverse + off;
    to[2 * p.filters] = fmaxf(__fmaf_rn(-off, one, two), 0.f);
}

#if AMPERE
extern "C" __global__ void __launch_bounds__(2 * TILE) conv3d_sum_bf16(const SumParams p) { sum<Bf16>(p); }
#endif
extern "C" __global__ void __launch_bounds__(2 * TILE) conv3d_sum_f16(const SumParams p) { sum<F16>(p); }
