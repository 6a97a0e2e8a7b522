// targets: 75 80
// max-registers: 96
// Moments for instance normalisation: of a stored tensor by tiles, and tiles put together in a fixed order.
#include "common.cuh"

// Mean, scale and shift of every channel from the moments of its tiles.
struct MergeParams {
    u64 partials;   // f32 [N][tile][count, mean, squares][C]
    u64 weight;     // f32 [C]
    u64 bias;       // f32 [C]
    u64 norm;       // f32 [N][mean, scale, shift][C]
    u64 inverses;   // f32 [N][C], one over the deviation, or 0
    double inverse; // 1 / voxels
    int tiles, channels;
    float eps;
    int unused;
};

constexpr int STRANDS = 64;

// A block puts together 16 channels of a sample; its strand k the tiles k, k + 64, ... Deviations are from the first
// tile's mean, which is near the channel's against its deviation, so that nothing cancels.
extern "C" __global__ void __launch_bounds__(BLOCK * STRANDS) moments_merge(const MergeParams p) {
    __shared__ double sums[2][STRANDS][BLOCK];
    const int lane = threadIdx.x % BLOCK, strand = threadIdx.x / BLOCK, c = blockIdx.x * BLOCK + lane, n = blockIdx.y;
    const float* tiles = (const float*)p.partials + (u64)n * p.tiles * 3 * p.channels + c;
    const float pivot = tiles[p.channels];
    Sum first, second;
    #pragma unroll 4
    for (int i = strand; i < p.tiles; i += STRANDS) {
        const float* t = tiles + (u64)i * 3 * p.channels;
        const float count = t[0], d = __fsub_rn(t[p.channels], pivot), weighted = __fmul_rn(count, d);
        first.add(weighted);
        second.add(t[2 * p.channels]);
        second.add(__fmul_rn(weighted, d));
    }
    sums[0][strand][lane] = (double)first.sum - (double)first.error;
    sums[1][strand][lane] = (double)second.sum - (double)second.error;
    __syncthreads();
    if (strand) return;
    double s = 0, q = 0;
    #pragma unroll 4
    for (int i = 0; i < STRANDS; ++i) s += sums[0][i][lane], q += sums[1][i][lane];
    const double off = s * p.inverse, variance = (q - s * off) * p.inverse;
    const float deviation = __fsqrt_rn((float)(variance > 0 ? variance + p.eps : (double)p.eps));
    float* to = (float*)p.norm + (u64)n * 3 * p.channels + c;
    to[0] = (float)(pivot + off);
    to[p.channels] = __fdiv_rn(((const float*)p.weight)[c], deviation);
    to[2 * p.channels] = ((const float*)p.bias)[c];
    if (p.inverses) ((float*)p.inverses)[(u64)n * p.channels + c] = __frcp_rn(deviation);
}

// Moments of tiles of a stored tensor.
struct TilesParams {
    u64 data;       // [N][voxel][C]
    u64 partials;   // f32 [N][tile][count, mean, squares][C]
    int voxels, channels, tiles;
    int unused;
};

constexpr int TILE = 512;

// A block takes 16 channels of a tile: 2 groups of 8 channels by 64 strands of 8 voxels, looked at twice.
template <class T>
__device__ __forceinline__ void tile_moments(const TilesParams& p) {
    __shared__ float sums[3][STRANDS][BLOCK];
    const int lane = threadIdx.x % 2 * 8, strand = threadIdx.x / 2, c = blockIdx.y * BLOCK + lane;
    const int tile = blockIdx.x, n = blockIdx.z, start = tile * TILE, count = min(TILE, p.voxels - start);
    const u64 base = ((u64)n * p.voxels + start) * p.channels + c;
    const float inverse = __frcp_rn((float)count);
    float total[8] = {};
    for (int i = strand; i < count; i += STRANDS) {
        float v[8];
        T::load8((const void*)p.data, base + (u64)i * p.channels, v);
        #pragma unroll
        for (int k = 0; k < 8; ++k) total[k] += v[k];
    }
    #pragma unroll
    for (int k = 0; k < 8; ++k) sums[0][strand][lane + k] = total[k];
    __syncthreads();
    float mean[8] = {}, first[8] = {}, second[8] = {};
    #pragma unroll 4
    for (int s = 0; s < STRANDS; ++s)
        #pragma unroll
        for (int k = 0; k < 8; ++k) mean[k] += sums[0][s][lane + k];
    #pragma unroll
    for (int k = 0; k < 8; ++k) mean[k] *= inverse;
    for (int i = strand; i < count; i += STRANDS) {
        float v[8];
        T::load8((const void*)p.data, base + (u64)i * p.channels, v);
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float d = v[k] - mean[k];
            first[k] += d, second[k] = __fmaf_rn(d, d, second[k]);
        }
    }
    #pragma unroll
    for (int k = 0; k < 8; ++k) sums[1][strand][lane + k] = first[k], sums[2][strand][lane + k] = second[k];
    __syncthreads();
    if (strand) return;
    float* to = (float*)p.partials + ((u64)n * p.tiles + tile) * 3 * p.channels + c;
    #pragma unroll 1
    for (int k = 0; k < 8; ++k) {
        float f = 0.f, q = 0.f;
        #pragma unroll 4
        for (int s = 0; s < STRANDS; ++s) f += sums[1][s][lane + k], q += sums[2][s][lane + k];
        const float off = f * inverse;
        to[k] = (float)count;
        to[p.channels + k] = mean[k] + off;
        to[2 * p.channels + k] = fmaxf(__fmaf_rn(-off, f, q), 0.f);
    }
}

extern "C" __global__ void __launch_bounds__(2 * STRANDS) moments_tiles_f32(const TilesParams p) { tile_moments<F32>(p); }
#if AMPERE
extern "C" __global__ void __launch_bounds__(2 * STRANDS) moments_tiles_bf16(const TilesParams p) { tile_moments<Halves<Bf16>>(p); }
#endif
extern "C" __global__ void __launch_bounds__(2 * STRANDS) moments_tiles_f16(const TilesParams p) { tile_moments<Halves<F16>>(p); }
