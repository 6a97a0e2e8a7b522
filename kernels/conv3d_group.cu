// targets: 90a
// max-registers: 224
// Convolution by warp groups, for compute capability 9.0 alone: 3 x 3 taps in the plane at stride 1.
//
// It counts on the swizzle of a matrix operand being that of the address, so that an operand may start at any row. NVIDIA does
// not document this; the host side tries it on every card before it is used.
#include "conv3d.cuh"

// 64 voxels by 64 or 128 filters by 16 channels, added to what is there.
#define GROUP_OF(NAME, BASE, TYPE)                                                                                       \
    struct NAME : BASE {                                                                                                 \
        static __device__ __forceinline__ void multiply_group(float (&d)[8][4], u64 a, u64 b) {                          \
            asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                \
                         R32                                                                                             \
                         "}, %32, %33, 1, 1, 1, 0, 0;" : D32(0) : "l"(a), "l"(b));                                       \
        }                                                                                                                \
        static __device__ __forceinline__ void multiply_group(float (&d)[16][4], u64 a, u64 b) {                         \
            asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                               \
                         R64                                                                                             \
                         "}, %64, %65, 1, 1, 1, 0, 0;" : D32(0), D32(8) : "l"(a), "l"(b));                               \
        }                                                                                                                \
    };
GROUP_OF(GroupBf16, Bf16, "bf16")
GROUP_OF(GroupF16, F16, "f16")

CONV3D(conv3d_group_n64_bf16, GroupBf16, GROUP, 8, 1, 2, 8, 1)
CONV3D(conv3d_group_n128_bf16, GroupBf16, GROUP, 8, 1, 2, 16, 1)
CONV3D(conv3d_group_n64_f16, GroupF16, GROUP, 8, 1, 2, 8, 1)
CONV3D(conv3d_group_n128_f16, GroupF16, GROUP, 8, 1, 2, 16, 1)
