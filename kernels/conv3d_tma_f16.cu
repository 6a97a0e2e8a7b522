// targets: 90a
// max-registers: 168
// Convolution of f16 activations from boxes of tensors: 32 to 128 filters a block.
#include "conv3d_tma.cuh"

TMA_OF(TmaF16, F16, "f16")

CONV3D_TMA(conv3d_tma_n32_f16, TmaF16, 2, 4, 2, 48, 96, 1)
CONV3D_TMA(conv3d_tma_n64_f16, TmaF16, 4, 8, 1, 72, 216, 1)
CONV3D_TMA(conv3d_tma_n96_f16, TmaF16, 2, 12, 1, 72, 216, 1)
CONV3D_TMA(conv3d_tma_n128_f16, TmaF16, 2, 16, 1, 72, 216, 1)
