// targets: 90a
// max-registers: 168
// Convolution of bf16 activations with filters that stay: 16 or 32 filters a block.
#include "conv3d_resident.cuh"

TMA_OF(TmaBf16, Bf16, "bf16")

CONV3D_RESIDENT(conv3d_resident_n16_bf16, TmaBf16, 4, 2)
CONV3D_RESIDENT(conv3d_resident_n32_bf16, TmaBf16, 4, 4)
