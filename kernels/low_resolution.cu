// targets: 75 80
// max-registers: 64
// A channel seen through a coarser grid: the nearest voxel at each of its points (PyTorch's "nearest-exact"), then
// interpolated linearly (PyTorch's "linear" without aligned corners).
#include "intensity.cuh"

struct LowResolutionParams {
    u64 from, to;       // f32 [D][H][W]
    u64 state;          // of the values of `from`
    int shape[3], coarse[3];
    float down[3];      // shape / coarse
    float up[3];        // coarse / shape
};

extern "C" __global__ void __launch_bounds__(256) low_resolution(const LowResolutionParams p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, plane = (u64)p.shape[1] * p.shape[2];
    if (i >= plane * p.shape[0]) return;
    const int at[3] = {(int)(i / plane), (int)(i / p.shape[2] % p.shape[1]), (int)(i % p.shape[2])};
    int voxel[3][2];
    float share[3];
    #pragma unroll
    for (int k = 0; k < 3; ++k) {
        const float place = fmaxf(__fsub_rn(__fmul_rn(__fadd_rn((float)at[k], 0.5f), p.up[k]), 0.5f), 0.f);
        const int before = min((int)place, p.coarse[k] - 1), after = min(before + 1, p.coarse[k] - 1);
        share[k] = __fsub_rn(place, (float)before);
        voxel[k][0] = min((int)__fmul_rn(__fadd_rn((float)before, 0.5f), p.down[k]), p.shape[k] - 1);
        voxel[k][1] = min((int)__fmul_rn(__fadd_rn((float)after, 0.5f), p.down[k]), p.shape[k] - 1);
    }
    const Map map = ((const State*)p.state)->map;
    float planes[2];
    #pragma unroll
    for (int z = 0; z < 2; ++z) {
        float rows[2];
        #pragma unroll
        for (int y = 0; y < 2; ++y) {
            const float* row = (const float*)p.from + voxel[0][z] * plane + (u64)voxel[1][y] * p.shape[2];
            const float a = map.of(row[voxel[2][0]]), b = map.of(row[voxel[2][1]]);
            rows[y] = __fadd_rn(a, __fmul_rn(share[2], __fsub_rn(b, a)));
        }
        planes[z] = __fmaf_rn(share[1], __fsub_rn(rows[1], rows[0]), rows[0]);
    }
    ((float*)p.to)[i] = __fmaf_rn(share[0], __fsub_rn(planes[1], planes[0]), planes[0]);
}
