// targets: 80
// max-registers: 255
// Gradient of filters from bf16 activations: 16, 32 or 64 filters a block, many taps or few.
#include "conv3d_wgrad.cuh"

WGRAD(conv3d_wgrad_n16_bf16, Bf16, 8, 1, 1, 4, 2, 1, 2)
WGRAD(conv3d_wgrad_n32_bf16, Bf16, 8, 1, 1, 4, 4, 1, 2)
WGRAD(conv3d_wgrad_n64_bf16, Bf16, 4, 2, 1, 7, 4, 7, 1)
WGRAD(conv3d_wgrad_few_n16_bf16, Bf16, 1, 1, 8, 4, 2, 1, 2)
WGRAD(conv3d_wgrad_few_n32_bf16, Bf16, 1, 1, 8, 4, 4, 1, 2)
WGRAD(conv3d_wgrad_few_n64_bf16, Bf16, 1, 2, 4, 4, 4, 1, 2)
