// targets: 75 80
// max-registers: 64
// Between planes [N][C][D][H][W] of f32 and voxels [N][D][H][W][padded C], mirrored along axes on the way; and a window
// of an image of planes, zeros outside.
#include "common.cuh"

struct RelayoutParams {
    u64 planes, values;
    int batch, channels;            // without padding
    int d, h, w;
    int flip_z, flip_y, flip_x;
};

// A thread takes 8 channels of a voxel: neighbours read neighbours of a plane.
template <class T, bool BACK>
__device__ __forceinline__ void relayout(const RelayoutParams& p) {
    const int padded = (p.channels + BLOCK - 1) / BLOCK * BLOCK, voxels = p.d * p.h * p.w;
    const int i = blockIdx.x * blockDim.x + threadIdx.x, c = blockIdx.y * 8, n = blockIdx.z;
    if (i >= voxels) return;
    const int x = i % p.w, y = i / p.w % p.h, z = i / (p.w * p.h);
    const int fz = p.flip_z ? p.d - 1 - z : z, fy = p.flip_y ? p.h - 1 - y : y, fx = p.flip_x ? p.w - 1 - x : x;
    const int from = (fz * p.h + fy) * p.w + fx;
    float v[8];
    if (BACK) {
        T::load8((const void*)p.values, ((u64)n * voxels + from) * padded + c, v);
        #pragma unroll
        for (int k = 0; k < 8; ++k)
            if (c + k < p.channels) ((float*)p.planes)[((u64)n * p.channels + c + k) * voxels + i] = v[k];
    } else {
        #pragma unroll
        for (int k = 0; k < 8; ++k)
            v[k] = c + k < p.channels ? ((const float*)p.planes)[((u64)n * p.channels + c + k) * voxels + from] : 0.f;
        T::store8((void*)p.values, ((u64)n * voxels + i) * padded + c, v);
    }
}

extern "C" __global__ void __launch_bounds__(256) relayout_to_f32(const RelayoutParams p) { relayout<F32, false>(p); }
#if AMPERE
extern "C" __global__ void __launch_bounds__(256) relayout_to_bf16(const RelayoutParams p) { relayout<Halves<Bf16>, false>(p); }
#endif
extern "C" __global__ void __launch_bounds__(256) relayout_to_f16(const RelayoutParams p) { relayout<Halves<F16>, false>(p); }
extern "C" __global__ void __launch_bounds__(256) relayout_from_f32(const RelayoutParams p) { relayout<F32, true>(p); }
#if AMPERE
extern "C" __global__ void __launch_bounds__(256) relayout_from_bf16(const RelayoutParams p) { relayout<Halves<Bf16>, true>(p); }
#endif
extern "C" __global__ void __launch_bounds__(256) relayout_from_f16(const RelayoutParams p) { relayout<Halves<F16>, true>(p); }

struct WindowParams {
    u64 image, window;              // f32 planes
    int channels;
    int image_d, image_h, image_w;
    int d, h, w;
    int z, y, x;                    // where the window starts in the image; may be outside
    int flip_z, flip_y, flip_x;
    int unused;
};

extern "C" __global__ void __launch_bounds__(256) relayout_window(const WindowParams p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, voxels = p.d * p.h * p.w, c = blockIdx.y;
    if (i >= voxels) return;
    const int x = i % p.w, y = i / p.w % p.h, z = i / (p.w * p.h);
    const int gz = p.z + (p.flip_z ? p.d - 1 - z : z), gy = p.y + (p.flip_y ? p.h - 1 - y : y), gx = p.x + (p.flip_x ? p.w - 1 - x : x);
    float v = 0.f;
    if ((u32)gz < (u32)p.image_d && (u32)gy < (u32)p.image_h && (u32)gx < (u32)p.image_w)
        v = ((const float*)p.image)[(((u64)c * p.image_d + gz) * p.image_h + gy) * p.image_w + gx];
    ((float*)p.window)[(u64)c * voxels + i] = v;
}
