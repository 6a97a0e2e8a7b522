// targets: 75 80
// max-registers: 64
// Adds a window's features, weighted, to the sums of the image: sum += importance * scale * normalised(features). Windows
// follow each other on the stream, so every sum has its order and no atomics are needed.
#include "common.cuh"

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

template <class T>
__device__ __forceinline__ void aggregate(const AggregateParams& p) {
    const int chunks = p.a.channels / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
    const int c = i % chunks * 8, voxel = i / chunks;
    if (voxel >= p.a.d * p.a.h * p.a.w) return;
    const int x = voxel % p.a.w, y = voxel / p.a.w % p.a.h, z = voxel / (p.a.w * p.a.h);
    const u64 to = ((u64)((p.z + z) % p.ring) * p.h + p.y + y) * p.w + p.x + x;
    const int fz = p.flip_z ? p.a.d - 1 - z : z, fy = p.flip_y ? p.a.h - 1 - y : y, fx = p.flip_x ? p.a.w - 1 - x : x;
    float v[8], s[8];
    T::load8((const void*)p.a.data, ((u64)(fz * p.a.h + fy) * p.a.w + fx) * p.a.channels + c, v);
    if (p.a.norm) {
        Norm8 norm;
        norm.load((const float*)p.a.norm, p.a.channels, c);
        norm.apply(v, p.a.slope);
    }
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
