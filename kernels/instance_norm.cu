// targets: 75 80
// max-registers: 64
// Normalisation by itself, and the end of a residual block without a convolution in its shortcut:
// y = leaky(normalised(x) + shortcut), each read once.
#include "common.cuh"

struct NormParams {
    Source x;           // with its normalisation, if any
    Source shortcut;    // of the same size, or absent
    u64 out;
    int batch, d, h, w;
    float slope;
    int unused;
};

template <class T>
__device__ __forceinline__ void add(const Source& s, u64 at, int n, int c, float (&sum)[8]) {
    float v[8];
    T::load8((const void*)s.data, at, v);
    if (s.norm) {
        Norm8 norm;
        norm.load((const float*)s.norm + (u64)n * 3 * s.channels, s.channels, c);
        norm.apply(v, s.slope);
    }
    #pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] = __fadd_rn(sum[k], v[k]);
}

// A thread takes 8 channels of a voxel.
template <class T>
__device__ __forceinline__ void instance_norm(const NormParams& p) {
    const int chunks = p.x.channels / 8, voxels = p.d * p.h * p.w;
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)p.batch * voxels * chunks) return;
    const u64 place = i / chunks;
    const int c = (int)(i % chunks) * 8, n = (int)(place / voxels);
    float v[8] = {};
    add<T>(p.x, i * 8, n, c, v);
    if (p.shortcut.channels) add<T>(p.shortcut, i * 8, n, c, v);
    #pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = leaky(v[k], p.slope);
    T::store8((void*)p.out, i * 8, v);
}

extern "C" __global__ void __launch_bounds__(256) instance_norm_f32(const NormParams p) { instance_norm<F32>(p); }
#if AMPERE
extern "C" __global__ void __launch_bounds__(256) instance_norm_bf16(const NormParams p) { instance_norm<Halves<Bf16>>(p); }
#endif
extern "C" __global__ void __launch_bounds__(256) instance_norm_f16(const NormParams p) { instance_norm<Halves<F16>>(p); }
