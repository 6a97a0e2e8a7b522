// targets: 75 80
// max-registers: 128
// max-spill: 16
// (Of conv3d_residual_deep_f16 alone, and where 9.0 assembles what is for 7.5; it has a file of its own for 8.0.)
// The end of a residual block whose shortcut is a convolution with a kernel of one voxel, at any stride: neither the
// shortcut nor the normalised tensor it is added to is ever in memory. 16, 32 or 64 filters a block with the weights of all
// channels in shared memory; 32 of few voxels with many channels; 64 of many of both, as conv3d_pointwise.cu.
#include "voxels.cuh"

#define RESIDUAL(NAME, STORAGE, USE, MI, NI, DEEP, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, AMPERE ? BLOCKS : 2) NAME(const ResidualParams p) {            \
        extern __shared__ __align__(128) unsigned char shared[];                                                         \
        voxels<STORAGE, USE, MI, NI, DEEP>(p, shared);                                                                   \
    }
#define WIDE(NAME, STORAGE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const ResidualParams p) {                              \
        gemm<STORAGE, END, 4, 2, 2, 4>(p);                                                                               \
    }

#if AMPERE
RESIDUAL(conv3d_residual_n16_bf16, Bf16, END, 1, 2, false, 3)
RESIDUAL(conv3d_residual_n32_bf16, Bf16, END, 1, 4, false, 2)
RESIDUAL(conv3d_residual_n64_bf16, Bf16, END, 1, 8, false, 2)
RESIDUAL(conv3d_residual_deep_bf16, Bf16, END, 2, 4, true, 2)
RESIDUAL(conv3d_residual_planes_n16_bf16, Bf16, END_OF_PLANES, 2, 2, false, 3)
RESIDUAL(conv3d_residual_planes_n32_bf16, Bf16, END_OF_PLANES, 1, 4, false, 4)
RESIDUAL(conv3d_residual_planes_n64_bf16, Bf16, END_OF_PLANES, 1, 8, false, 3)
WIDE(conv3d_residual_wide_bf16, Bf16)
#endif
RESIDUAL(conv3d_residual_n16_f16, F16, END, 1, 2, false, 3)
RESIDUAL(conv3d_residual_n32_f16, F16, END, 1, 4, false, 2)
RESIDUAL(conv3d_residual_n64_f16, F16, END, 1, 8, false, 2)
RESIDUAL(conv3d_residual_deep_f16, F16, END, 2, 4, true, 2)
RESIDUAL(conv3d_residual_planes_n16_f16, F16, END_OF_PLANES, 2, 2, false, 3)
RESIDUAL(conv3d_residual_planes_n32_f16, F16, END_OF_PLANES, 1, 4, false, 4)
RESIDUAL(conv3d_residual_planes_n64_f16, F16, END_OF_PLANES, 1, 8, false, 3)
WIDE(conv3d_residual_wide_f16, F16)
