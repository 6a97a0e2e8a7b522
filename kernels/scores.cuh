// The last 1x1x1 layer in f32, from features in shared memory.
#pragma once
#include "common.cuh"

constexpr int PER_THREAD = 2;

// Scores of a block's `tile` voxels, twice its threads: `use(k, score)` gets those of classes k to k + 15 of the thread's
// voxels, `threadIdx.x` and the one `blockDim.x` further. `features` is [channel][voxel], written but not yet waited for;
// the filter f32 [group of 16 classes][channel][16] passes through `filter`, and each of its weights serves two voxels.
template <class Use>
__device__ __forceinline__ void each_score(const float* features, float* filter, u64 weight, u64 bias, int channels, int classes,
                                           int tile, Use use) {
    const int threads = blockDim.x;
    for (int k = 0; k < classes; k += BLOCK) {
        __syncthreads();
        for (int i = threadIdx.x; i < channels * 4; i += threads)
            ((float4*)filter)[i] = ((const float4*)weight)[(u64)k / 4 * channels + i];
        __syncthreads();
        float score[PER_THREAD][BLOCK];
        #pragma unroll
        for (int q = 0; q < BLOCK; ++q) {
            const float b = ((const float*)bias)[k + q];
            #pragma unroll
            for (int v = 0; v < PER_THREAD; ++v) score[v][q] = b;
        }
        #pragma unroll 2
        for (int c = 0; c < channels; ++c) {
            float f[PER_THREAD];
            #pragma unroll
            for (int v = 0; v < PER_THREAD; ++v) f[v] = features[c * tile + v * threads + threadIdx.x];
            #pragma unroll
            for (int q = 0; q < BLOCK; q += 4) {
                const float4 w = *(const float4*)(filter + c * BLOCK + q);
                #pragma unroll
                for (int v = 0; v < PER_THREAD; ++v) {
                    score[v][q] = __fmaf_rn(w.x, f[v], score[v][q]);
                    score[v][q + 1] = __fmaf_rn(w.y, f[v], score[v][q + 1]);
                    score[v][q + 2] = __fmaf_rn(w.z, f[v], score[v][q + 2]);
                    score[v][q + 3] = __fmaf_rn(w.w, f[v], score[v][q + 3]);
                }
            }
        }
        use(k, score);
    }
}
