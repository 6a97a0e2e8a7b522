// targets: 90a
// max-registers: 168
// Convolution of f16 activations from boxes of tensors at stride 2: 32 to 128 filters a block.
#include "conv3d_tma.cuh"

TMA_OF(TmaF16, F16, "f16")

CONV3D_TMA(conv3d_tma_s2_n32_f16, TmaF16, 2, 4, 1, 72, 216, 2)
CONV3D_TMA(conv3d_tma_s2_n64_f16, TmaF16, 2, 8, 1, 72, 216, 2)
CONV3D_TMA(conv3d_tma_s2_n128_f16, TmaF16, 1, 16, 1, 72, 216, 2)
