// targets: 75 80
// max-registers: 128
// Convolution with a kernel of one voxel at any stride: 16, 32 or 64 filters a block.
#include "gemm.cuh"

#if AMPERE
GEMM(conv3d_pointwise_n16_bf16, Bf16, 8, 1, 1, 2)
GEMM(conv3d_pointwise_n32_bf16, Bf16, 4, 2, 2, 2)
GEMM(conv3d_pointwise_n64_bf16, Bf16, 4, 2, 2, 4)
#endif
GEMM(conv3d_pointwise_n16_f16, F16, 8, 1, 1, 2)
GEMM(conv3d_pointwise_n32_f16, F16, 4, 2, 2, 2)
GEMM(conv3d_pointwise_n64_f16, F16, 4, 2, 2, 4)
