// targets: 75 80
// max-registers: 128
// The last 1x1x1 layer and the decision in one pass: the label of a voxel is the first class of the largest score. Scores
// are never in memory. A voxel without any score above minus infinity gets label 0.
#include "common.cuh"

struct HeadParams {
    Source a;       // features; 16-bit, or f32 sums over windows
    u64 weight;     // 16-bit [slab of 16 channels][class][16]; for f32 features f32 [class][C]
    u64 bias;       // f32 [class], minus infinity for the padding
    u64 weights;    // f32 [voxel]: what the sums are divided by, or 0
    u64 labels;     // u16 [N][voxel]
    int classes;    // padded to a multiple of 16
    int voxels, batch;
    int unused;
};

constexpr int THREADS = 256, ROW = 32, MI = 2;

// A warp takes 32 voxels; it goes through the classes 16 at a time and keeps the best of each voxel.
template <class T>
__device__ __forceinline__ void head(const HeadParams& p, unsigned char* shared) {
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int slabs = p.a.channels / BLOCK, total = p.voxels * p.batch, start = blockIdx.x * THREADS;
    const u32 base = shared_address(shared), weights = slabs * THREADS * ROW;
    for (int i = tid; i < slabs * p.classes * 2; i += THREADS)
        copy16(base + weights + swizzle<ROW>(i * 16), (const u16*)p.weight + (u64)i * 8, 16);
    const int chunks = p.a.channels / 8;
    // Both halves of a voxel's 16 channels side by side: whole sectors are read, and no two threads meet in a bank.
    for (int i = tid; i < THREADS * chunks; i += THREADS) {
        const int v = i / 2 % THREADS, c = i / (2 * THREADS) * 2 + (i & 1);
        const bool ok = start + v < total;
        const u16* from = (const u16*)p.a.data + (ok ? (u64)(start + v) * p.a.channels + c * 8 : 0);
        copy16(base + (c >> 1) * THREADS * ROW + swizzle<ROW>(v * ROW + (c & 1) * 16), from, ok ? 16 : 0);
    }
    copy_commit();
    copy_wait<0>();
    if (p.a.norm)
        for (int i = tid; i < THREADS * chunks; i += THREADS) {     // the thread's own chunks
            const int v = i / 2 % THREADS, c = i / (2 * THREADS) * 2 + (i & 1);
            if (start + v >= total) continue;
            Norm8 norm;
            norm.load((const float*)p.a.norm + (u64)((start + v) / p.voxels) * 3 * p.a.channels, p.a.channels, c * 8);
            uint4* at = (uint4*)(shared + (c >> 1) * THREADS * ROW + swizzle<ROW>(v * ROW + (c & 1) * 16));
            *at = norm.template apply<T>(*at, p.a.slope);
        }
    __syncthreads();
    float best[MI][2];
    int label[MI][2];
    #pragma unroll
    for (int i = 0; i < MI; ++i) best[i][0] = best[i][1] = -__int_as_float(0x7f800000), label[i][0] = label[i][1] = 0;
    const u32 left = base + swizzle<ROW>((warp * 32 + (lane & 15)) * ROW + (lane >> 4) * 16);
    const u32 right = base + weights + swizzle<ROW>(((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 16);
    for (int k = 0; k < p.classes; k += 16) {
        const int column = k + (lane & 3) * 2;
        float acc[MI][2][4];
        #pragma unroll
        for (int j = 0; j < 2; ++j)
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float bias = ((const float*)p.bias)[column + j * 8 + e];
                #pragma unroll
                for (int i = 0; i < MI; ++i) acc[i][j][e] = acc[i][j][2 + e] = bias;
            }
        for (int s = 0; s < slabs; ++s) {
            u32 a[MI][4], b[4];
            load_matrices(b, right + (s * p.classes + k) * ROW);
            #pragma unroll
            for (int i = 0; i < MI; ++i) {
                load_matrices(a[i], left + (s * THREADS + i * 16) * ROW);
                T::mma(acc[i][0], a[i], b[0], b[1]);
                T::mma(acc[i][1], a[i], b[2], b[3]);
            }
        }
        #pragma unroll
        for (int i = 0; i < MI; ++i)
            #pragma unroll
            for (int h = 0; h < 2; ++h)
                #pragma unroll
                for (int j = 0; j < 2; ++j)
                    #pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float v = acc[i][j][2 * h + e];
                        if (v > best[i][h]) best[i][h] = v, label[i][h] = column + j * 8 + e;
                    }
    }
    #pragma unroll
    for (int i = 0; i < MI; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            float v = best[i][h];
            int l = label[i][h];
            #pragma unroll
            for (int far = 1; far < 4; far *= 2) {
                const float other = __shfl_xor_sync(~0u, v, far);
                const int k = __shfl_xor_sync(~0u, l, far);
                if (other > v || (other == v && k < l)) v = other, l = k;
            }
            const int at = start + warp * 32 + i * 16 + h * 8 + (lane >> 2);
            if ((lane & 3) == 0 && at < total) ((u16*)p.labels)[at] = (u16)l;
        }
}

#if AMPERE
extern "C" __global__ void __launch_bounds__(THREADS, 2) head_labels_bf16(const HeadParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    head<Bf16>(p, shared);
}
#endif
extern "C" __global__ void __launch_bounds__(THREADS, 2) head_labels_f16(const HeadParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    head<F16>(p, shared);
}

// From sums over windows: features are divided by the sum of the windows' weights once per voxel, and the layer is applied
// in f32, as the filter is in shared memory 16 classes at a time.
extern "C" __global__ void __launch_bounds__(THREADS) head_labels_f32(const HeadParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    float* weight = (float*)shared;
    const int i = blockIdx.x * THREADS + threadIdx.x, total = p.voxels * p.batch, channels = p.a.channels;
    const bool real = i < total;
    const u64 at = real ? (u64)i * channels : 0;
    float scale = 1.f;
    if (p.weights && real) scale = __frcp_rn(((const float*)p.weights)[i]);
    float best = -__int_as_float(0x7f800000);
    int label = 0;
    for (int k = 0; k < p.classes; k += BLOCK) {
        __syncthreads();
        for (int j = threadIdx.x; j < BLOCK * channels; j += THREADS) weight[j] = ((const float*)p.weight)[(u64)k * channels + j];
        __syncthreads();
        float score[BLOCK] = {};
        for (int c = 0; c < channels; c += 8) {
            float v[8];
            F32::load8((const void*)p.a.data, at + c, v);
            #pragma unroll
            for (int q = 0; q < BLOCK; ++q)
                #pragma unroll
                for (int j = 0; j < 8; ++j) score[q] = __fmaf_rn(v[j], weight[q * channels + c + j], score[q]);
        }
        #pragma unroll
        for (int q = 0; q < BLOCK; ++q) {
            const float v = __fmaf_rn(score[q], scale, ((const float*)p.bias)[k + q]);
            if (v > best) best = v, label = k + q;
        }
    }
    if (real) ((u16*)p.labels)[i] = (u16)label;
}
