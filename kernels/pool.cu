// targets: 75 80
// max-registers: 64
// Blocks of voxels to their sum, times a factor, and voxels to blocks of copies, times a factor: average pooling, nearest
// upsampling, and the way back of both. And the sum of two tensors.
#include "common.cuh"

struct PoolParams {
    u64 fine, coarse;
    int batch, channels;
    int d, h, w;                    // of the fine one
    int kernel_z, kernel_y, kernel_x;
    int coarse_d, coarse_h, coarse_w;
    float scale;
    int unused;
};

// A thread takes 8 channels of a coarse voxel.
template <class T>
__device__ __forceinline__ void sum(const PoolParams& p) {
    const int chunks = p.channels / 8;
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, place = i / chunks;
    const int c = (int)(i % chunks) * 8, x = (int)(place % p.coarse_w), y = (int)(place / p.coarse_w % p.coarse_h);
    const u64 plane = place / ((u64)p.coarse_w * p.coarse_h);
    const int z = (int)(plane % p.coarse_d), n = (int)(plane / p.coarse_d);
    if (n >= p.batch) return;
    float total[8] = {};
    for (int kz = 0; kz < p.kernel_z; ++kz)
        for (int ky = 0; ky < p.kernel_y; ++ky)
            for (int kx = 0; kx < p.kernel_x; ++kx) {
                const u64 at = (((u64)n * p.d + z * p.kernel_z + kz) * p.h + y * p.kernel_y + ky) * p.w + x * p.kernel_x + kx;
                float v[8];
                T::load8((const void*)p.fine, at * p.channels + c, v);
                #pragma unroll
                for (int k = 0; k < 8; ++k) total[k] += v[k];
            }
    #pragma unroll
    for (int k = 0; k < 8; ++k) total[k] *= p.scale;
    T::store8((void*)p.coarse, i * 8, total);
}

// A thread takes 8 channels of a fine voxel; those past the last whole block are zero.
template <class T>
__device__ __forceinline__ void spread(const PoolParams& p) {
    const int chunks = p.channels / 8;
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, place = i / chunks;
    const int c = (int)(i % chunks) * 8, x = (int)(place % p.w) / p.kernel_x, y = (int)(place / p.w % p.h) / p.kernel_y;
    const u64 plane = place / ((u64)p.w * p.h);
    const int z = (int)(plane % p.d) / p.kernel_z, n = (int)(plane / p.d);
    if (n >= p.batch) return;
    float v[8] = {};
    if (x < p.coarse_w && y < p.coarse_h && z < p.coarse_d) {
        T::load8((const void*)p.coarse, ((((u64)n * p.coarse_d + z) * p.coarse_h + y) * p.coarse_w + x) * p.channels + c, v);
        #pragma unroll
        for (int k = 0; k < 8; ++k) v[k] *= p.scale;
    }
    T::store8((void*)p.fine, i * 8, v);
}

struct AddParams {
    u64 a, b, out;      // out may be a or b
    u64 chunks;         // of 8 values
};

template <class T>
__device__ __forceinline__ void add(const AddParams& p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.chunks) return;
    float a[8], b[8];
    T::load8((const void*)p.a, i * 8, a);
    T::load8((const void*)p.b, i * 8, b);
    #pragma unroll
    for (int k = 0; k < 8; ++k) a[k] = __fadd_rn(a[k], b[k]);
    T::store8((void*)p.out, i * 8, a);
}

#define POOL(NAME, STORAGE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) pool_sum_##NAME(const PoolParams p) { sum<STORAGE>(p); }           \
    extern "C" __global__ void __launch_bounds__(256) pool_spread_##NAME(const PoolParams p) { spread<STORAGE>(p); }     \
    extern "C" __global__ void __launch_bounds__(256) pool_add_##NAME(const AddParams p) { add<STORAGE>(p); }

POOL(f32, F32)
#if AMPERE
POOL(bf16, Halves<Bf16>)
#endif
POOL(f16, Halves<F16>)
