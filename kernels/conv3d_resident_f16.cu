// targets: 90a
// max-registers: 168
// Convolution of f16 activations with filters that stay: 16 or 32 filters a block.
#include "conv3d_resident.cuh"

TMA_OF(TmaF16, F16, "f16")

CONV3D_RESIDENT(conv3d_resident_n16_f16, TmaF16, 4, 2)
CONV3D_RESIDENT(conv3d_resident_n32_f16, TmaF16, 4, 4)
