// targets: 75 80
// max-registers: 64
// A filter of one short symmetric kernel along one axis, mirrored about the end voxels.
#include "common.cuh"

constexpr int TAPS = 7;

struct BlurParams {
    u64 from, to;           // f32 [outer][length][inner]
    u64 values;
    u64 inner;
    int length, taps;       // taps: 1, 3, 5 or 7
    float weights[TAPS];
    int unused;
};

// The voxel that stands for voxel `i` of `n`: -1 is voxel 1.
__device__ __forceinline__ int mirrored(int i, int n) {
    const int last = n - 1;
    while (last > 0 && (i < 0 || i > last)) i = i < 0 ? -i : 2 * last - i;
    return last > 0 ? i : 0;
}

extern "C" __global__ void __launch_bounds__(256) blur_axis(const BlurParams p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.values) return;
    const int at = (int)(i / p.inner % p.length);
    const float* line = (const float*)p.from + (i - at * p.inner);
    float sum = 0.f;
    #pragma unroll
    for (int k = 0; k < TAPS; ++k) {
        if (k >= p.taps) break;
        const float v = line[mirrored(at + k - p.taps / 2, p.length) * p.inner];
        sum = k ? __fmaf_rn(p.weights[k], v, sum) : __fmul_rn(p.weights[k], v);
    }
    ((float*)p.to)[i] = sum;
}
