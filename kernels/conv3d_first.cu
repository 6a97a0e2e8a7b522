// targets: 75 80
// max-registers: 128
// The first convolution: 1 to 8 channels given as planes [N][C][D][H][W], f32 or 16-bit. Channels times taps are the terms
// of one product of matrices. What it takes is the time to write the result: a block computes several tiles in turn, so that
// filters, places and divisions are there once for all of them; a warp has a whole plane of a tile, so that sums go once
// through its lanes for 64 voxels; and a thread owns 4 or 8 neighbouring filters, so that it writes what it computed itself.
#include "conv3d.cuh"

// Weights are [16 terms][filter][16]; term c * taps + t is tap t of channel c, zero beyond the last.
constexpr int MOST = 8, TERMS = MOST * 27 + 8;
constexpr int PLANES = 4;               // of 8 x 8 voxels, a warp each
constexpr int TEAM = PLANES * 32;

// n / d for the numbers of a brick, of which 2^32 / d is known.
__device__ __forceinline__ int quotient(int n, u32 by) { return (int)__umulhi((u32)n, by); }
__device__ __forceinline__ u32 reciprocal(int d) { return 0xffffffffu / (u32)d + 1; }

template <class T, bool WIDE, int NI>
__device__ __forceinline__ void first(const Conv3dParams& p, unsigned char* shared) {
    constexpr int MI = 4, N = NI * 8, OWN = NI * 2;                 // filters of a block, and of a thread
    __shared__ u16 places[TERMS];                                   // where a term's value is, from the voxel's first
    __shared__ float sums[3][PLANES][N];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, quad = lane & 3;
    const int groups = (p.filters + N - 1) / N, group = blockIdx.x % groups, filters = group * N;
    const int own = filters + quad * OWN;
    const int taps = p.kernel_z * p.kernel_y * p.kernel_x, terms = p.a.channels * taps, steps = (terms + 15) / 16;
    const int depth = (PLANES - 1) * p.stride_z + p.kernel_z, rows = 7 * p.stride_y + p.kernel_y, edge = 7 * p.stride_x + p.kernel_x;
    const int plane = rows * edge, volume = depth * plane;
    const u32 weight = shared_address(shared);
    u16* brick = (u16*)(shared + steps * N * ROW);
    for (int i = tid; i < steps * N * 2; i += TEAM) {
        const int step = i / (N * 2), rest = i % (N * 2), f = rest >> 1;
        const bool ok = filters + f < p.filters;
        const u16* from = (const u16*)p.weight + ((u64)step * p.filters + filters) * BLOCK + rest * 8;
        // Column j * 8 + quad * 2 + e of the product is filter quad * OWN + j * 2 + e.
        const int column = f % OWN / 2 * 8 + f / OWN * 2 + (f & 1);
        copy16(weight + swizzle<ROW>((step * N + column) * ROW + (rest & 1) * 16), ok ? from : (const u16*)p.weight, ok ? 16 : 0);
    }
    copy_commit();
    for (int i = tid; i < steps * 16; i += TEAM) {
        const int c = i / taps, k = i % taps;
        const int z = k / (p.kernel_x * p.kernel_y), y = k / p.kernel_x % p.kernel_y, x = k % p.kernel_x;
        // Beyond the last term the weight is zero; any value that is read anyway will do.
        places[i] = i < terms ? (u16)(c * volume + z * plane + y * edge + x) : (u16)0;
    }
    float bias[NI][2];
    #pragma unroll
    for (int j = 0; j < NI; ++j)
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int f = own + j * 2 + e;
            bias[j][e] = p.bias && f < p.filters ? ((const float*)p.bias)[f] : 0.f;
        }
    const u32 by_edge = reciprocal(edge), by_rows = reciprocal(rows), by_depth = reciprocal(depth);
    const u32 filter = weight + swizzle<ROW>(((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 16);
    // The block's tiles are neighbours.
    const int tiles = p.tiles_z * p.tiles_y * p.tiles_x, all = p.batch * tiles, blocks = gridDim.x / groups, block = blockIdx.x / groups;
    const int begin = all / blocks * block + min(block, all % blocks), end = begin + all / blocks + (block < all % blocks);
    int n = begin / tiles, tx = begin % p.tiles_x, ty = begin / p.tiles_x % p.tiles_y, tz = begin / (p.tiles_x * p.tiles_y) % p.tiles_z;
    for (int tile = begin; tile < end; ++tile) {
        const int x0 = tx * 8 * p.stride_x - p.kernel_x / 2, y0 = ty * 8 * p.stride_y - p.kernel_y / 2;
        const int z0 = tz * PLANES * p.stride_z - p.kernel_z / 2;
        #pragma unroll 4
        for (int i = tid; i < p.a.channels * volume; i += TEAM) {
            const int row = quotient(i, by_edge), slice = quotient(row, by_rows), c = quotient(slice, by_depth);
            const int gx = x0 + i - row * edge, gy = y0 + row - slice * rows, gz = z0 + slice - c * depth;
            u16 v = 0;
            if ((u32)gx < (u32)p.w && (u32)gy < (u32)p.h && (u32)gz < (u32)p.d) {
                const u32 line = ((u32)(n * p.a.channels + c) * p.d + gz) * p.h + gy;
                const u64 at = (u64)line * (u32)p.w + (u32)gx;
                v = WIDE ? (u16)T::pack(((const float*)p.a.data)[at], 0.f) : ((const u16*)p.a.data)[at];
            }
            brick[i] = v;
        }
        if (tile == begin) copy_wait<0>();
        __syncthreads();
        float acc[MI][NI][4] = {};
        const u16* const corner = brick + warp * p.stride_z * plane + (lane >> 2) * p.stride_x;
        #pragma unroll 1
        for (int s = 0; s < steps; ++s) {
            u32 b[NI / 2][4];
            #pragma unroll
            for (int j = 0; j < NI / 2; ++j) load_matrices(b[j], filter + (s * N + j * 16) * ROW);
            const int k = s * 16 + quad * 2;
            const u16* v[4] = {corner + places[k], corner + places[k + 1], corner + places[k + 8], corner + places[k + 9]};
            #pragma unroll
            for (int i = 0; i < MI; ++i) {
                u32 a[4];
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    a[h] = *v[0] | (u32)*v[1] << 16, a[2 + h] = *v[2] | (u32)*v[3] << 16;
                    #pragma unroll
                    for (int t = 0; t < 4; ++t) v[t] += p.stride_y * edge;
                }
                #pragma unroll
                for (int j = 0; j < NI; ++j) T::mma(acc[i][j], a, b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
            }
        }
        // A thread's voxels are those of a column in the warp's plane.
        const int z = tz * PLANES + warp, x = tx * 8 + (lane >> 2), high = p.out_h - ty * 8;
        const int count = z < p.out_d && x < p.out_w ? min(8, high) : 0;
        const u64 voxel = (((u64)n * p.out_d + z) * p.out_h + ty * 8) * p.out_w + x;
        u16* to = (u16*)p.out + voxel * p.filters + own;
        #pragma unroll
        for (int i = 0; i < MI; ++i)
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                u32 v[NI];
                #pragma unroll
                for (int j = 0; j < NI; ++j) {
                    acc[i][j][2 * h] += bias[j][0], acc[i][j][2 * h + 1] += bias[j][1];
                    v[j] = T::pack(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
                }
                if (i * 2 + h < count && own < p.filters) store_words(to, v);
                to += (u64)(u32)p.out_w * (u32)p.filters;
            }
        if (p.partials) {
            // Corrected two-pass, as in conv3d.cuh.
            const int many = min(PLANES, p.out_d - tz * PLANES) * min(8, high) * min(8, p.out_w - tx * 8);
            const float inverse = __frcp_rn((float)many);
            #pragma unroll
            for (int j = 0; j < NI; ++j)
                #pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float s = 0.f;
                    #pragma unroll
                    for (int r = 0; r < 8; ++r) s += r < count ? acc[r >> 1][j][(r & 1) * 2 + e] : 0.f;
                    #pragma unroll
                    for (int far = 4; far < 32; far *= 2) s += __shfl_xor_sync(~0u, s, far);
                    if (lane < 4) sums[0][warp][quad * OWN + j * 2 + e] = s;
                }
            __syncthreads();
            #pragma unroll
            for (int j = 0; j < NI; ++j)
                #pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int c = quad * OWN + j * 2 + e;
                    float s = 0.f, once = 0.f, twice = 0.f;
                    #pragma unroll
                    for (int k = 0; k < PLANES; ++k) s += sums[0][k][c];
                    const float mean = s * inverse;
                    #pragma unroll
                    for (int r = 0; r < 8; ++r) {
                        const float d = r < count ? acc[r >> 1][j][(r & 1) * 2 + e] - mean : 0.f;
                        once += d, twice = __fmaf_rn(d, d, twice);
                    }
                    #pragma unroll
                    for (int far = 4; far < 32; far *= 2)
                        once += __shfl_xor_sync(~0u, once, far), twice += __shfl_xor_sync(~0u, twice, far);
                    if (lane < 4) sums[1][warp][c] = once, sums[2][warp][c] = twice;
                }
            __syncthreads();
            if (tid < N && filters + tid < p.filters) {
                float s = 0.f, once = 0.f, twice = 0.f;
                #pragma unroll
                for (int k = 0; k < PLANES; ++k) s += sums[0][k][tid], once += sums[1][k][tid], twice += sums[2][k][tid];
                const float off = once * inverse;
                float* moments = (float*)p.partials + (u64)tile * 3 * p.filters + filters + tid;
                moments[0] = (float)many;
                moments[p.filters] = s * inverse + off;
                moments[2 * p.filters] = fmaxf(__fmaf_rn(-off, once, twice), 0.f);
            }
        } else {
            __syncthreads();                    // the brick is read no more
        }
        if (++tx == p.tiles_x) {
            tx = 0;
            if (++ty == p.tiles_y) {
                ty = 0;
                if (++tz == p.tiles_z) tz = 0, ++n;
            }
        }
    }
}

#define FIRST(NAME, STORAGE, WIDE, NI)                                                                                   \
    extern "C" __global__ void __launch_bounds__(TEAM, 4) NAME(const Conv3dParams p) {                                   \
        extern __shared__ __align__(128) unsigned char shared[];                                                         \
        first<STORAGE, WIDE, NI>(p, shared);                                                                             \
    }
#if AMPERE
FIRST(conv3d_first_n16_bf16, Bf16, false, 2)
FIRST(conv3d_first_n32_bf16, Bf16, false, 4)
FIRST(conv3d_first_n16_f32_bf16, Bf16, true, 2)
FIRST(conv3d_first_n32_f32_bf16, Bf16, true, 4)
#endif
FIRST(conv3d_first_n16_f16, F16, false, 2)
FIRST(conv3d_first_n32_f16, F16, false, 4)
FIRST(conv3d_first_n16_f32_f16, F16, true, 2)
FIRST(conv3d_first_n32_f32_f16, F16, true, 4)
