// targets: 75 80
// max-registers: 128
// Transposed convolution whose kernel is its stride: a product for each tap, scattered to the voxels of that tap.
#include "gemm.cuh"

#if AMPERE
GEMM(conv_transpose3d_n16_bf16, Bf16, 8, 1, 1, 2)
GEMM(conv_transpose3d_n32_bf16, Bf16, 4, 2, 2, 2)
GEMM(conv_transpose3d_n64_bf16, Bf16, 4, 2, 2, 4)
#endif
GEMM(conv_transpose3d_n16_f16, F16, 8, 1, 1, 2)
GEMM(conv_transpose3d_n32_f16, F16, 4, 2, 2, 2)
GEMM(conv_transpose3d_n64_f16, F16, 4, 2, 2, 4)

// The plain reference: f32, a thread a value.
extern "C" __global__ void __launch_bounds__(256) conv_transpose3d_f32(const GemmParams p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const int f = (int)(i % p.filters), w = p.w * p.kernel_x, h = p.h * p.kernel_y, d = p.d * p.kernel_z;
    const u64 place = i / p.filters;
    const int x = (int)(place % w), y = (int)(place / w % h), z = (int)(place / ((u64)w * h) % d), n = (int)(place / ((u64)w * h * d));
    if (n >= p.batch) return;
    const int tap = (z % p.kernel_z * p.kernel_y + y % p.kernel_y) * p.kernel_x + x % p.kernel_x;
    const int taps = p.kernel_z * p.kernel_y * p.kernel_x;
    const u64 at = (((u64)n * p.d + z / p.kernel_z) * p.h + y / p.kernel_y) * p.w + x / p.kernel_x;
    float sum = p.bias ? ((const float*)p.bias)[f] : 0.f;
    for (int c = 0; c < p.a.channels; c += 8) {
        float v[8], k[8];
        F32::load8((const void*)p.a.data, at * p.a.channels + c, v);
        F32::load8((const void*)p.weight, (((u64)(c / BLOCK) * taps + tap) * p.filters + f) * BLOCK + c % BLOCK, k);
        if (p.a.norm) {
            Norm8 norm;
            norm.load((const float*)p.a.norm + (u64)n * 3 * p.a.channels, p.a.channels, c);
            norm.apply(v, p.a.slope);
        }
        #pragma unroll
        for (int j = 0; j < 8; ++j) sum = __fmaf_rn(v[j], k[j], sum);
    }
    ((float*)p.out)[i] = sum;
}
