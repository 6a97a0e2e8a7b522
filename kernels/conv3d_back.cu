// targets: 75 80
// max-registers: 128
// The gradient of a convolution's input at stride 2 on some axis: 16, 32 or 64 channels a block, and the plain reference. At
// stride 1 it is a convolution with the filters mirrored and the two sides of channels exchanged.
#include "conv3d.cuh"

#if AMPERE
CONV3D(conv3d_back_n16_bf16, Bf16, BACK, 8, 1, 1, 2, 2)
CONV3D(conv3d_back_n32_bf16, Bf16, BACK, 4, 2, 2, 2, 2)
CONV3D(conv3d_back_n64_bf16, Bf16, BACK, 4, 2, 2, 4, 2)
#endif
CONV3D(conv3d_back_n16_f16, F16, BACK, 8, 1, 1, 2, 2)
CONV3D(conv3d_back_n32_f16, F16, BACK, 4, 2, 2, 2, 2)
CONV3D(conv3d_back_n64_f16, F16, BACK, 4, 2, 2, 4, 2)

// A thread a value, every product in order.
extern "C" __global__ void __launch_bounds__(256) conv3d_back_f32(const Conv3dParams p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const int voxels = p.out_d * p.out_h * p.out_w;
    const int c = (int)(i % p.filters);
    const u64 place = i / p.filters;
    const int n = (int)(place / voxels), voxel = (int)(place % voxels);
    if (n >= p.batch) return;
    const int x0 = voxel % p.out_w + p.kernel_x / 2, y0 = voxel / p.out_w % p.out_h + p.kernel_y / 2,
              z0 = voxel / (p.out_w * p.out_h) + p.kernel_z / 2;
    const int taps = p.kernel_z * p.kernel_y * p.kernel_x;
    float sum = 0.f;
    for (int slab = 0; slab < p.a.channels / BLOCK; ++slab)
        for (int t = 0; t < taps; ++t) {
            // Twice the output voxel that this tap of the mirrored filter belongs to, or once.
            const int x = x0 - (p.kernel_x - 1 - t % p.kernel_x), y = y0 - (p.kernel_y - 1 - t / p.kernel_x % p.kernel_y),
                      z = z0 - (p.kernel_z - 1 - t / (p.kernel_x * p.kernel_y));
            if (x < 0 || y < 0 || z < 0 || x % p.stride_x || y % p.stride_y || z % p.stride_z) continue;
            const int ox = x / p.stride_x, oy = y / p.stride_y, oz = z / p.stride_z;
            if (ox >= p.w || oy >= p.h || oz >= p.d) continue;
            const u64 at = (((u64)n * p.d + oz) * p.h + oy) * p.w + ox;
            #pragma unroll
            for (int half = 0; half < BLOCK; half += 8) {
                float v[8], w[8];
                F32::load8((const void*)p.a.data, at * p.a.channels + slab * BLOCK + half, v);
                F32::load8((const void*)p.weight, (((u64)slab * taps + t) * p.filters + c) * BLOCK + half, w);
                #pragma unroll
                for (int k = 0; k < 8; ++k) sum = __fmaf_rn(v[k], w[k], sum);
            }
        }
    ((float*)p.out)[i] = sum;
}
