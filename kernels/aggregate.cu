// targets: 75 80
// max-registers: 96
// Adds a window's features, weighted, to the sums of the image: sum += importance * scale * normalised(features); or what
// the last 1x1x1 layer makes of them, where that is less. Windows follow each other on the stream, so every sum has its order
// and no atomics are needed.
#include "scores.cuh"

struct AggregateParams {
    Source a;           // [1][D][H][W][C], the window
    u64 importance;     // f32 [D][H][W], or 0 for 1
    u64 sum;            // f32 [ring][H][W][all channels]
    u64 weight;         // f32 [ring][H][W] that importance is added to as well, or 0
    int z, y, x;        // where the window starts
    int ring, h, w;     // planes of the sums, used in turn, and their size
    int channels;       // of the sums
    int first;          // channel of the sums that the window's first is added to
    int flip_z, flip_y, flip_x;     // the window was mirrored: it is read backwards
    float scale;
};

// Where a voxel of the window lies in the sums, and in the window as it was computed.
__device__ __forceinline__ u64 place(const AggregateParams& p, int voxel, u64& from) {
    const int x = voxel % p.a.w, y = voxel / p.a.w % p.a.h, z = voxel / (p.a.w * p.a.h);
    const int fz = p.flip_z ? p.a.d - 1 - z : z, fy = p.flip_y ? p.a.h - 1 - y : y, fx = p.flip_x ? p.a.w - 1 - x : x;
    from = (u64)(fz * p.a.h + fy) * p.a.w + fx;
    return ((u64)((p.z + z) % p.ring) * p.h + p.y + y) * p.w + p.x + x;
}

// Eight channels of a voxel of the window.
template <class T>
__device__ __forceinline__ void features8(const AggregateParams& p, u64 from, int c, float (&v)[8]) {
    T::load8((const void*)p.a.data, from * p.a.channels + c, v);
    if (p.a.norm) {
        Norm8 norm;
        norm.load((const float*)p.a.norm, p.a.channels, c);
        norm.apply(v, p.a.slope);
    }
}

template <class T>
__device__ __forceinline__ void aggregate(const AggregateParams& p) {
    const int chunks = p.a.channels / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
    const int c = i % chunks * 8, voxel = i / chunks;
    if (voxel >= p.a.d * p.a.h * p.a.w) return;
    u64 from;
    const u64 to = place(p, voxel, from);
    float v[8], s[8];
    features8<T>(p, from, c, v);
    const float importance = p.importance ? ((const float*)p.importance)[voxel] : 1.f, g = __fmul_rn(importance, p.scale);
    F32::load8((const void*)p.sum, to * p.channels + p.first + c, s);
    #pragma unroll
    for (int k = 0; k < 8; ++k) s[k] = __fadd_rn(s[k], __fmul_rn(g, v[k]));
    F32::store8((void*)p.sum, to * p.channels + p.first + c, s);
    if (p.weight && c == 0) ((float*)p.weight)[to] = __fadd_rn(((const float*)p.weight)[to], importance);
}

extern "C" __global__ void __launch_bounds__(256) aggregate_f32(const AggregateParams p) { aggregate<F32>(p); }
#if AMPERE
extern "C" __global__ void __launch_bounds__(256) aggregate_bf16(const AggregateParams p) { aggregate<Halves<Bf16>>(p); }
#endif
extern "C" __global__ void __launch_bounds__(256) aggregate_f16(const AggregateParams p) { aggregate<Halves<F16>>(p); }

struct ScoresParams : AggregateParams {
    u64 filter;     // f32 [group of 16 classes][channel][16]
    u64 bias;       // f32 [class], minus infinity for the padding
    int classes;    // padded to a multiple of 16
    int scored;     // without padding; channels of the sums beyond them stay zero
    int how;        // what becomes of the scores before they are added
    int tile;       // voxels of a block, twice its threads
};

enum How { IDENTITY, SOFTMAX, SIGMOID };

__device__ __forceinline__ float exponential(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(__fmul_rn(v, 1.44269504f)));
    return r;
}

template <class T>
__device__ __forceinline__ void aggregate_scores(const ScoresParams& p, unsigned char* shared) {
    float *features = (float*)shared, *filter = features + p.a.channels * p.tile;
    const int threads = blockDim.x, start = blockIdx.x * p.tile, total = p.a.d * p.a.h * p.a.w;
    for (int i = threadIdx.x; i < p.tile * (p.a.channels / 8); i += threads) {
        // Two threads side by side take 16 channels of a voxel: whole sectors are read.
        const int v = i / 2 % p.tile, c = (i / (2 * p.tile) * 2 + (i & 1)) * 8;
        float f[8] = {};
        if (start + v < total) {
            u64 from;
            place(p, start + v, from);
            features8<T>(p, from, c, f);
        }
        #pragma unroll
        for (int k = 0; k < 8; ++k) features[(c + k) * p.tile + v] = f[k];
    }
    float most[PER_THREAD], sum[PER_THREAD];
    #pragma unroll
    for (int v = 0; v < PER_THREAD; ++v) most[v] = -__int_as_float(0x7f800000), sum[v] = 0.f;
    // Softmax takes the scores twice: they are cheaper to make again than to keep.
    if (p.how == SOFTMAX)
        each_score(features, filter, p.filter, p.bias, p.a.channels, p.classes, p.tile, [&](int, float (&score)[PER_THREAD][BLOCK]) {
            #pragma unroll
            for (int v = 0; v < PER_THREAD; ++v) {
                float m = most[v];
                #pragma unroll
                for (int q = 0; q < BLOCK; ++q) m = fmaxf(m, score[v][q]);
                float s = __fmul_rn(sum[v], exponential(__fsub_rn(most[v], m)));
                #pragma unroll
                for (int q = 0; q < BLOCK; ++q) s = __fadd_rn(s, exponential(__fsub_rn(score[v][q], m)));
                sum[v] = s, most[v] = m;
            }
        });
    bool real[PER_THREAD];
    u64 to[PER_THREAD];
    float g[PER_THREAD];
    #pragma unroll
    for (int v = 0; v < PER_THREAD; ++v) {
        const int voxel = start + v * threads + threadIdx.x;
        real[v] = voxel < total;
        u64 from;
        to[v] = place(p, real[v] ? voxel : 0, from);
        const float importance = real[v] && p.importance ? ((const float*)p.importance)[voxel] : 1.f;
        g[v] = __fmul_rn(importance, p.scale);
        if (real[v] && p.weight) ((float*)p.weight)[to[v]] = __fadd_rn(((const float*)p.weight)[to[v]], importance);
        if (p.how == SOFTMAX) sum[v] = __frcp_rn(sum[v]);
    }
    auto weighted = [&](int k, int v, float score) {
        if (k >= p.scored) return 0.f;
        if (p.how == SOFTMAX) score = __fmul_rn(exponential(__fsub_rn(score, most[v])), sum[v]);
        if (p.how == SIGMOID) score = __frcp_rn(__fadd_rn(1.f, exponential(-score)));
        return __fmul_rn(g[v], score);
    };
    each_score(features, filter, p.filter, p.bias, p.a.channels, p.classes, p.tile, [&](int k, float (&score)[PER_THREAD][BLOCK]) {
        #pragma unroll
        for (int v = 0; v < PER_THREAD; ++v)
            #pragma unroll
            for (int q = 0; q < BLOCK; q += 4) {
                if (!real[v] || k + q >= p.channels) continue;
                float4* at = (float4*)((float*)p.sum + to[v] * p.channels + k + q);
                float4 s = *at;
                s.x = __fadd_rn(s.x, weighted(k + q, v, score[v][q])), s.y = __fadd_rn(s.y, weighted(k + q + 1, v, score[v][q + 1]));
                s.z = __fadd_rn(s.z, weighted(k + q + 2, v, score[v][q + 2])), s.w = __fadd_rn(s.w, weighted(k + q + 3, v, score[v][q + 3]));
                *at = s;
            }
    });
}

#define SCORES(NAME, STORAGE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(128, 6) NAME(const ScoresParams p) {                                    \
        extern __shared__ __align__(128) unsigned char shared[];                                                         \
        aggregate_scores<STORAGE>(p, shared);                                                                            \
    }
SCORES(aggregate_scores_f32, F32)
#if AMPERE
SCORES(aggregate_scores_bf16, Halves<Bf16>)
#endif
SCORES(aggregate_scores_f16, Halves<F16>)
