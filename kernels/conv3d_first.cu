// targets: 75 80
// max-registers: 128
// The first convolution: 1 to 8 channels given as planes [N][C][D][H][W], f32 or 16-bit. Channels times taps are the terms
// of one product of matrices. Otherwise as conv3d.cuh.
#include "conv3d.cuh"

// Weights are [16 terms][filter][16]; term c * taps + t is tap t of channel c, zero beyond the last.
constexpr int MOST = 8, TERMS = MOST * 27 + 8;

// n / d for the numbers of a brick, of which 2^32 / d is known.
__device__ __forceinline__ int quotient(int n, u32 by) { return (int)__umulhi((u32)n, by); }
__device__ __forceinline__ u32 reciprocal(int d) { return 0xffffffffu / (u32)d + 1; }

template <class T, bool WIDE, int NI>
__device__ __forceinline__ void first(const Conv3dParams& p, unsigned char* shared) {
    constexpr int MI = 2, N = NI * 8, TZ = WARPS * MI / 4;
    __shared__ u16 places[TERMS];                                   // where a term's value is, from the voxel's first
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const Tile t(p, TZ, N);
    const int taps = p.kernel_z * p.kernel_y * p.kernel_x, terms = p.a.channels * taps, steps = (terms + 15) / 16;
    const int depth = (TZ - 1) * p.stride_z + p.kernel_z, rows = 7 * p.stride_y + p.kernel_y, edge = 7 * p.stride_x + p.kernel_x;
    const int plane = rows * edge, volume = depth * plane;
    const u32 weight = shared_address(shared);
    u16* brick = (u16*)(shared + steps * N * ROW);
    for (int i = tid; i < steps * N * 2; i += THREADS) {
        const int rest = i % (N * 2);
        const bool ok = t.first + (rest >> 1) < p.filters;
        const u16* from = (const u16*)p.weight + ((u64)(i / (N * 2)) * p.filters + t.first) * BLOCK + rest * 8;
        copy16(weight + swizzle<ROW>(i * 16), ok ? from : (const u16*)p.weight, ok ? 16 : 0);
    }
    copy_commit();
    for (int i = tid; i < steps * 16; i += THREADS) {
        const int c = i / taps, k = i % taps;
        const int z = k / (p.kernel_x * p.kernel_y), y = k / p.kernel_x % p.kernel_y, x = k % p.kernel_x;
        // Beyond the last term the weight is zero; any value that is read anyway will do.
        places[i] = i < terms ? (u16)(c * volume + z * plane + y * edge + x) : (u16)0;
    }
    const u32 by_edge = reciprocal(edge), by_rows = reciprocal(rows), by_depth = reciprocal(depth);
    const int x0 = t.x0 * p.stride_x - p.kernel_x / 2, y0 = t.y0 * p.stride_y - p.kernel_y / 2, z0 = t.z0 * p.stride_z - p.kernel_z / 2;
    for (int i = tid; i < p.a.channels * volume; i += THREADS) {
        const int row = quotient(i, by_edge), slice = quotient(row, by_rows), c = quotient(slice, by_depth);
        const int gx = x0 + i - row * edge, gy = y0 + row - slice * rows, gz = z0 + slice - c * depth;
        u16 v = 0;
        if ((u32)gx < (u32)p.w && (u32)gy < (u32)p.h && (u32)gz < (u32)p.d) {
            const u64 at = (((u64)t.n * p.a.channels + c) * p.d + gz) * p.h * p.w + (u64)gy * p.w + gx;
            v = WIDE ? (u16)T::pack(((const float*)p.a.data)[at], 0.f) : ((const u16*)p.a.data)[at];
        }
        brick[i] = v;
    }
    copy_wait<0>();
    __syncthreads();
    float acc[MI][NI][4] = {};
    const u32 filter = weight + swizzle<ROW>(((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 16);
    for (int s = 0; s < steps; ++s) {
        u32 b[NI / 2][4];
        #pragma unroll
        for (int j = 0; j < NI / 2; ++j) load_matrices(b[j], filter + (s * N + j * 16) * ROW);
        const int k = s * 16 + (lane & 3) * 2;
        const int at[4] = {places[k], places[k + 1], places[k + 8], places[k + 9]};
        #pragma unroll
        for (int i = 0; i < MI; ++i) {
            const int f = warp * MI + i;
            const u16* v = brick + (f >> 2) * p.stride_z * plane + (f & 3) * 2 * p.stride_y * edge + (lane >> 2) * p.stride_x;
            const u16* below = v + p.stride_y * edge;
            const u32 a[4] = {v[at[0]] | (u32)v[at[1]] << 16, below[at[0]] | (u32)below[at[1]] << 16,
                              v[at[2]] | (u32)v[at[3]] << 16, below[at[2]] | (u32)below[at[3]] << 16};
            #pragma unroll
            for (int j = 0; j < NI; ++j) T::mma(acc[i][j], a, b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
        }
    }
    finish<T, WIDE, WARPS, 1, MI, NI>(p, t, acc, warp * MI, shared);
}

#define FIRST(NAME, STORAGE, WIDE, NI)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const Conv3dParams p) {                                \
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
