// targets: 75 80
// max-registers: 128
// The end of a residual block whose shortcut is a convolution with a kernel of one voxel, at any stride: neither the
// shortcut nor the normalised tensor it is added to is ever in memory. 16, 32 or 64 filters a block.
#include "gemm.cuh"

#define RESIDUAL(NAME, STORAGE, USE, WM, WN, MI, NI)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const ResidualParams p) {                              \
        gemm<STORAGE, USE, WM, WN, MI, NI>(p);                                                                           \
    }

#if AMPERE
RESIDUAL(conv3d_residual_n16_bf16, Bf16, END, 8, 1, 1, 2)
RESIDUAL(conv3d_residual_n32_bf16, Bf16, END, 4, 2, 2, 2)
RESIDUAL(conv3d_residual_n64_bf16, Bf16, END, 4, 2, 2, 4)
RESIDUAL(conv3d_residual_planes_n16_bf16, Bf16, END_OF_PLANES, 8, 1, 1, 2)
RESIDUAL(conv3d_residual_planes_n32_bf16, Bf16, END_OF_PLANES, 4, 2, 2, 2)
RESIDUAL(conv3d_residual_planes_n64_bf16, Bf16, END_OF_PLANES, 4, 2, 2, 4)
#endif
RESIDUAL(conv3d_residual_n16_f16, F16, END, 8, 1, 1, 2)
RESIDUAL(conv3d_residual_n32_f16, F16, END, 4, 2, 2, 2)
RESIDUAL(conv3d_residual_n64_f16, F16, END, 4, 2, 2, 4)
RESIDUAL(conv3d_residual_planes_n16_f16, F16, END_OF_PLANES, 8, 1, 1, 2)
RESIDUAL(conv3d_residual_planes_n32_f16, F16, END_OF_PLANES, 4, 2, 2, 2)
RESIDUAL(conv3d_residual_planes_n64_f16, F16, END_OF_PLANES, 4, 2, 2, 4)
