// targets: 75 80
// max-registers: 128
// The plain reference: convolution of f32, a thread a value, every product in order.
#include "conv3d.cuh"

// Filters are those of the tensor-core kernels: [slab of 16 channels][tap][filter][16].
extern "C" __global__ void __launch_bounds__(256) conv3d_f32(const Conv3dParams p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const int voxels = p.out_d * p.out_h * p.out_w;
    const int f = (int)(i % p.filters);
    const u64 place = i / p.filters;
    const int n = (int)(place / voxels), voxel = (int)(place % voxels);
    if (n >= p.batch) return;
    const int x0 = voxel % p.out_w * p.stride_x - (p.kernel_x - 1) / 2, y0 = voxel / p.out_w % p.out_h * p.stride_y - (p.kernel_y - 1) / 2,
              z0 = voxel / (p.out_w * p.out_h) * p.stride_z - (p.kernel_z - 1) / 2;
    const int taps = p.kernel_z * p.kernel_y * p.kernel_x;
    float sum = p.bias ? ((const float*)p.bias)[f] : 0.f;
    int slab = 0;
    for (int s = 0; s < 2; ++s) {
        const Source& from = s ? p.b : p.a;
        for (int c = 0; c < from.channels; c += BLOCK, ++slab)
            for (int half = 0; half < BLOCK; half += 8) {
                Norm8 norm;
                if (from.norm) norm.load((const float*)from.norm + (u64)n * 3 * from.channels, from.channels, c + half);
                for (int t = 0; t < taps; ++t) {
                    const int x = x0 + t % p.kernel_x, y = y0 + t / p.kernel_x % p.kernel_y, z = z0 + t / (p.kernel_x * p.kernel_y);
                    if ((u32)x >= (u32)p.w || (u32)y >= (u32)p.h || (u32)z >= (u32)p.d) continue;
                    const u64 at = (((u64)n * from.d + (z >> from.shift_z)) * from.h + (y >> from.shift_y)) * from.w + (x >> from.shift_x);
                    float v[8], w[8];
                    F32::load8((const void*)from.data, at * from.channels + c + half, v);
                    F32::load8((const void*)p.weight, (((u64)slab * taps + t) * p.filters + f) * BLOCK + half, w);
                    if (from.norm) norm.apply(v, from.slope);
                    #pragma unroll
                    for (int k = 0; k < 8; ++k) sum = __fmaf_rn(v[k], w[k], sum);
                }
            }
    }
    ((float*)p.out)[i] = sum;
}
