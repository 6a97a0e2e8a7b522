// targets: 90a
// max-registers: 168
// Convolution of bf16 activations from boxes of tensors: 32 to 128 filters a block.
#include "conv3d_tma.cuh"

TMA_OF(TmaBf16, Bf16, "bf16")

CONV3D_TMA(conv3d_tma_n32_bf16, TmaBf16, 2, 4, 2, 48, 96, 1)
CONV3D_TMA(conv3d_tma_n64_bf16, TmaBf16, 4, 8, 1, 72, 216, 1)
CONV3D_TMA(conv3d_tma_n96_bf16, TmaBf16, 2, 12, 1, 72, 216, 1)
CONV3D_TMA(conv3d_tma_n128_bf16, TmaBf16, 2, 16, 1, 72, 216, 1)
