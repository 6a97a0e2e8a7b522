// targets: 75 80
// max-registers: 168
// Convolution of f16 activations: 16, 32 or 64 filters a block, for 3 x 3 taps in the plane at stride 1 and for any.
#include "conv3d.cuh"

CONV3D(conv3d_n16_f16, F16, PLANE, 8, 1, 4, 2, 2)
CONV3D(conv3d_n32_f16, F16, PLANE, 8, 1, 4, 4, 2)
CONV3D(conv3d_n64_f16, F16, PLANE, 4, 2, 4, 4, 2)
CONV3D(conv3d_any_n16_f16, F16, EVERY, 8, 1, 1, 2, 2)
CONV3D(conv3d_any_n32_f16, F16, EVERY, 4, 2, 2, 2, 2)
CONV3D(conv3d_any_n64_f16, F16, EVERY, 4, 2, 2, 4, 2)
