// targets: 75 80
// max-registers: 128
// Gradient of a convolution's filters: the plain reference of f32, and the sum of the parts of all.
#include "conv3d_wgrad.cuh"

// A thread has a channel, a tap and eight filters; a part is a range of rows of the result. Products of a row are added
// in order, rows with their rounding errors carried along.
extern "C" __global__ void __launch_bounds__(THREADS) conv3d_wgrad_f32(const WgradParams p) {
    const int i = blockIdx.x * THREADS + threadIdx.x, eights = p.dy.channels / 8;
    const int f = i / BLOCK % eights * 8, rest = i / BLOCK / eights, tap = rest % p.taps, slab = rest / p.taps;
    if (slab >= (p.a.channels + p.b.channels) / BLOCK) return;
    int c;
    const Source s = source_of(p, slab, c);
    c += i % BLOCK;
    const int tx = tap % p.kernel_x - (p.kernel_x - 1) / 2, ty = tap / p.kernel_x % p.kernel_y - (p.kernel_y - 1) / 2,
              tz = tap / (p.kernel_x * p.kernel_y) - (p.kernel_z - 1) / 2;
    const int stride_x = p.stride_x * p.step_x, stride_y = p.stride_y * p.step_y, stride_z = p.stride_z * p.step_z;
    const u64 rows = (u64)p.batch * p.dy.d * p.dy.h, end = rows * (blockIdx.z + 1) / gridDim.z;
    Sum sums[8];
    for (u64 row = rows * blockIdx.z / gridDim.z; row < end; ++row) {
        const int y = (int)(row % p.dy.h) * stride_y + ty, plane = (int)(row / p.dy.h);
        const int z = plane % p.dy.d * stride_z + tz, n = plane / p.dy.d;
        if ((u32)y >= (u32)p.h || (u32)z >= (u32)p.d) continue;
        const u64 line = (((u64)n * s.d + (z >> s.shift_z)) * s.h + (y >> s.shift_y)) * s.w;
        const float* x = (const float*)s.data + line * s.channels + c;
        const float* norm = (const float*)s.norm + (u64)n * 3 * s.channels + c;
        float mean = 0.f, scale = 1.f, shift = 0.f;
        if (s.norm) mean = norm[0], scale = norm[s.channels], shift = norm[2 * s.channels];
        Norm8 of_dy;
        if (p.dy.norm) of_dy.load((const float*)p.dy.norm + (u64)n * 3 * p.dy.channels, p.dy.channels, f);
        float sum[8] = {};
        for (int o = 0; o < p.dy.w; ++o) {
            const int at = o * stride_x + tx;
            if ((u32)at >= (u32)p.w) continue;
            float v = x[(u64)(at >> s.shift_x) * s.channels], dy[8];
            if (s.norm) v = normalised(v, mean, scale, shift, s.slope);
            F32::load8((const void*)p.dy.data, (row * p.dy.w + o) * p.dy.channels + f, dy);
            if (p.dy.norm) of_dy.apply(dy, p.dy.slope);
            #pragma unroll
            for (int k = 0; k < 8; ++k) sum[k] = __fmaf_rn(v, dy[k], sum[k]);
        }
        #pragma unroll
        for (int k = 0; k < 8; ++k) sums[k].add(sum[k]);
    }
    float* const out = (float*)p.out + blockIdx.z * part_size(p);
    #pragma unroll
    for (int k = 0; k < 8; ++k) out[place_of(p, tap, slab * BLOCK + i % BLOCK, f + k)] = sums[k].total();
}

struct WgradSumParams {
    u64 sums;       // f32 [part][value]
    u64 out;        // f32 [value]
    u64 values;     // a multiple of 128
    int parts, unused;
};

constexpr int STRANDS = THREADS / 32;

// A warp adds up every eighth part, four values a thread; then the first of them the sums of all.
extern "C" __global__ void __launch_bounds__(THREADS) conv3d_wgrad_sum(const WgradSumParams p) {
    __shared__ float4 all[STRANDS][32];
    const int lane = threadIdx.x & 31, strand = threadIdx.x >> 5;
    const u64 at = ((u64)blockIdx.x * 32 + lane) * 4;
    Sum sums[4], totals[4];
    #pragma unroll 4
    for (int i = strand; i < p.parts; i += STRANDS) {
        const float4 v = *(const float4*)((const float*)p.sums + i * p.values + at);
        sums[0].add(v.x), sums[1].add(v.y), sums[2].add(v.z), sums[3].add(v.w);
    }
    all[strand][lane] = make_float4(sums[0].total(), sums[1].total(), sums[2].total(), sums[3].total());
    __syncthreads();
    if (strand) return;
    #pragma unroll
    for (int i = 0; i < STRANDS; ++i) {
        const float4 v = all[i][lane];
        totals[0].add(v.x), totals[1].add(v.y), totals[2].add(v.z), totals[3].add(v.w);
    }
    *(float4*)((float*)p.out + at) =
        make_float4(totals[0].total(), totals[1].total(), totals[2].total(), totals[3].total());
}
