// targets: 75 80
// max-registers: 96
// The way back of instance normalisation with leaky ReLU (Ioffe and Szegedy, "Batch Normalization", 2015, section 3): with
// h = (x - mean) / deviation and g the gradient before leaky ReLU,
//   dx = scale * (g - mean(g) - h * mean(g h)), dweight = sum(g h), dbias = sum(g).
#include "common.cuh"

struct NormGradParams {
    u64 x;          // [N][voxel][C], before it was normalised
    u64 norm;       // f32 [N][mean, scale, shift][C]
    u64 inverses;   // f32 [N][C]
    u64 dy;         // [N][voxel][C]
    u64 result;     // [N][voxel][C], whose sign tells the side of leaky ReLU, or 0: that of the normalised value does
    u64 masked;     // [N][voxel][C] for g, perhaps dy itself, or 0
    u64 partials;   // f32 [N][tile][g, g h][C]
    u64 sums;       // f32 [N][mean of g, mean of g h][C]
    u64 dx;         // [N][voxel][C], perhaps dy itself
    int voxels, channels, tiles;
    int batch;
    float slope;    // 1: dy is g already
    int unused;
};

constexpr int STRANDS = 64, TILE = 512;

// What eight channels of a sample need.
struct Way8 {
    Norm8 norm;
    float inverse[8];
    __device__ __forceinline__ Way8(const NormGradParams& p, int n, int c) {
        norm.load((const float*)p.norm + (u64)n * 3 * p.channels, p.channels, c);
        F32::load8((const void*)p.inverses, (u64)n * p.channels + c, inverse);
    }
    // g of dy, in its place.
    __device__ __forceinline__ void mask(const float (&x)[8], float (&dy)[8], float slope) const {
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
            const bool positive = __fmaf_rn(__fsub_rn(x[k], norm.mean[k]), norm.scale[k], norm.shift[k]) > 0.f;
            dy[k] = positive ? dy[k] : __fmul_rn(dy[k], slope);
        }
    }
};

// A block takes 16 channels of a tile: 2 groups of 8 channels by 64 strands of 8 voxels.
template <class T>
__device__ __forceinline__ void sums(const NormGradParams& p) {
    __shared__ float all[2][STRANDS][BLOCK];
    const int lane = threadIdx.x % 2 * 8, strand = threadIdx.x / 2, c = blockIdx.y * BLOCK + lane;
    const int tile = blockIdx.x, n = blockIdx.z, start = tile * TILE, count = min(TILE, p.voxels - start);
    const u64 base = ((u64)n * p.voxels + start) * p.channels + c;
    const Way8 way(p, n, c);
    float one[8] = {}, two[8] = {};
    #pragma unroll 2
    for (int i = strand; i < count; i += STRANDS) {
        const u64 at = base + (u64)i * p.channels;
        float x[8], g[8];
        T::load8((const void*)p.x, at, x);
        T::load8((const void*)p.dy, at, g);
        if (p.result) {
            float y[8];
            T::load8((const void*)p.result, at, y);
            #pragma unroll
            for (int k = 0; k < 8; ++k) g[k] = y[k] > 0.f ? g[k] : __fmul_rn(g[k], p.slope);
        } else {
            way.mask(x, g, p.slope);
        }
        if (p.masked) {
            // What is read again is what was added up.
            T::store8((void*)p.masked, at, g);
            T::load8((const void*)p.masked, at, g);
        }
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float h = __fmul_rn(__fsub_rn(x[k], way.norm.mean[k]), way.inverse[k]);
            one[k] += g[k], two[k] = __fmaf_rn(g[k], h, two[k]);
        }
    }
    #pragma unroll
    for (int k = 0; k < 8; ++k) all[0][strand][lane + k] = one[k], all[1][strand][lane + k] = two[k];
    __syncthreads();
    if (threadIdx.x >= 2 * BLOCK) return;
    const int which = threadIdx.x / BLOCK, column = threadIdx.x % BLOCK;
    float sum = 0.f;
    #pragma unroll 8
    for (int s = 0; s < STRANDS; ++s) sum += all[which][s][column];
    ((float*)p.partials)[(((u64)n * p.tiles + tile) * 2 + which) * p.channels + blockIdx.y * BLOCK + column] = sum;
}

// dx of g, or of dy where that is not g yet; a thread takes 8 channels of a voxel.
template <class T>
__device__ __forceinline__ void input(const NormGradParams& p) {
    const int chunks = p.channels / 8;
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, place = i / chunks;
    const int c = (int)(i % chunks) * 8, n = (int)(place / p.voxels);
    if (n >= p.batch) return;
    const Way8 way(p, n, c);
    float x[8], g[8], one[8], two[8];
    T::load8((const void*)p.x, i * 8, x);
    T::load8((const void*)(p.masked ? p.masked : p.dy), i * 8, g);
    if (!p.masked) way.mask(x, g, p.slope);
    F32::load8((const void*)p.sums, (u64)n * 2 * p.channels + c, one);
    F32::load8((const void*)p.sums, ((u64)n * 2 + 1) * p.channels + c, two);
    #pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float h = __fmul_rn(__fsub_rn(x[k], way.norm.mean[k]), way.inverse[k]);
        g[k] = __fmul_rn(way.norm.scale[k], __fmaf_rn(-h, two[k], __fsub_rn(g[k], one[k])));
    }
    T::store8((void*)p.dx, i * 8, g);
}

struct NormMergeParams {
    u64 partials;   // f32 [N][tile][g, g h][C]
    u64 sums;       // f32 [N][mean of g, mean of g h][C]
    u64 dweight;    // f32 [C]
    u64 dbias;      // f32 [C]
    double inverse; // 1 / voxels
    int tiles, channels, batch;
    int unused;
};

// A block puts together 16 channels, sample after sample; its strand k the tiles k, k + 64, ...
extern "C" __global__ void __launch_bounds__(BLOCK * STRANDS) instance_norm_grad_merge(const NormMergeParams p) {
    __shared__ double all[2][STRANDS][BLOCK];
    const int lane = threadIdx.x % BLOCK, strand = threadIdx.x / BLOCK, c = blockIdx.x * BLOCK + lane;
    double weight = 0, bias = 0;
    for (int n = 0; n < p.batch; ++n) {
        const float* tiles = (const float*)p.partials + (u64)n * p.tiles * 2 * p.channels + c;
        Sum one, two;
        #pragma unroll 4
        for (int i = strand; i < p.tiles; i += STRANDS) {
            one.add(tiles[(u64)i * 2 * p.channels]);
            two.add(tiles[((u64)i * 2 + 1) * p.channels]);
        }
        all[0][strand][lane] = (double)one.sum - (double)one.error;
        all[1][strand][lane] = (double)two.sum - (double)two.error;
        __syncthreads();
        if (strand == 0) {
            double g = 0, gh = 0;
            #pragma unroll 4
            for (int i = 0; i < STRANDS; ++i) g += all[0][i][lane], gh += all[1][i][lane];
            float* to = (float*)p.sums + (u64)n * 2 * p.channels + c;
            to[0] = (float)(g * p.inverse), to[p.channels] = (float)(gh * p.inverse);
            bias += g, weight += gh;
        }
        __syncthreads();
    }
    if (strand) return;
    ((float*)p.dweight)[c] = (float)weight;
    ((float*)p.dbias)[c] = (float)bias;
}

extern "C" __global__ void __launch_bounds__(2 * STRANDS) instance_norm_grad_sums_f32(const NormGradParams p) { sums<F32>(p); }
extern "C" __global__ void __launch_bounds__(256) instance_norm_grad_input_f32(const NormGradParams p) { input<F32>(p); }
#if AMPERE
extern "C" __global__ void __launch_bounds__(2 * STRANDS) instance_norm_grad_sums_bf16(const NormGradParams p) { sums<Halves<Bf16>>(p); }
extern "C" __global__ void __launch_bounds__(256) instance_norm_grad_input_bf16(const NormGradParams p) { input<Halves<Bf16>>(p); }
#endif
extern "C" __global__ void __launch_bounds__(2 * STRANDS) instance_norm_grad_sums_f16(const NormGradParams p) { sums<Halves<F16>>(p); }
extern "C" __global__ void __launch_bounds__(256) instance_norm_grad_input_f16(const NormGradParams p) { input<Halves<F16>>(p); }
