// Ends of residual blocks whose time is that of their memory: every warp is on its own. A thread reads four channels of
// its voxels in one piece and owns 4 or 8 neighbouring filters of them, so that inputs, what is added to the product, and
// results go between memory and registers without a place in shared memory and without a barrier. That costs nothing: a
// matrix product does not care which number a channel or a filter has, as long as both its sides agree. Sums are those of
// gemm.cuh, but for the order of the 16 terms within a product and, where it is said, of the parts.
#pragma once
#include "gemm.cuh"

// Products of 16 channels whose voxels are asked for before the first of them is computed.
constexpr int AHEAD = 4;

// n / by for 0 <= n < 2^31 with one multiplication: the quotient by 2^32 - 1 over `by` is right or one too small.
struct Divisor {
    u32 by, inverse;
    __device__ __forceinline__ Divisor(int by) : by((u32)by), inverse(0xffffffffu / (u32)by) {}
    __device__ __forceinline__ int quotient(int n, int& rest) const {
        u32 q = __umulhi((u32)n, inverse), r = (u32)n - q * by;
        if (r >= by) ++q, r -= by;
        rest = (int)r;
        return (int)q;
    }
};

// Blocks walk over the tiles of a sample, `p.blocks` of them side by side. DEEP, for few voxels of many channels: the warps
// of a block share a tile, each with its part of the channels, and the first of them add the parts up, in order; else the
// weights of all channels lie in shared memory. OWN fragments of 16 voxels by NI of 8 filters are a warp's.
template <class T, Use USE, int MI, int NI, bool DEEP, class Params>
__device__ __forceinline__ void voxels(const Params& p, unsigned char* shared) {
    static_assert(USE != PRODUCT, "ends of blocks");
    constexpr int WARPS = THREADS / 32, N = NI * 8, G = NI < 4 ? NI : 4, GROUPS = NI / G, OWN = DEEP ? 1 : MI;
    constexpr int TILE = DEEP ? MI * 16 : WARPS * MI * 16, SUMS = WARPS * MI * NI * 32 * 16;
    static_assert(NI % G == 0 && NI % 2 == 0, "filters of a thread");
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane & 3;
    const int groups = (p.filters + N - 1) / N, slabs = (p.a.channels + p.b.channels) / BLOCK;
    const int first = blockIdx.x % groups * N, n = blockIdx.x / groups / p.blocks, start = blockIdx.x / groups % p.blocks;
    const int count = p.d * p.h * p.w, tiles = (count + TILE - 1) / TILE;

    // Bias, mean, scale and shift of the block's filters.
    float* const planes = (float*)(shared + (DEEP ? SUMS : slabs * N * ROW));
    for (int i = threadIdx.x; i < 4 * N; i += THREADS) {
        const int f = first + i % N;
        float v = 0.f;
        if (f < p.filters) {
            if (i < N) v = p.bias ? ((const float*)p.bias)[f] : 0.f;
            else v = ((const float*)p.norm)[((u64)n * 3 + i / N - 1) * p.filters + f];
        }
        planes[i] = v;
    }
    // A column of the product is filter g * 8 * G + quad * 2 * G + j % G * 2 + e. In shared memory the halves of 128 bytes
    // change places where `quad` is odd, so that the filters that a warp reads at once lie in different banks.
    constexpr int KEY = G == 4 ? 8 : 7;
    if constexpr (!DEEP) {
        const u16* from = (const u16*)p.weight + (u64)first * BLOCK;
        for (int i = threadIdx.x; i < slabs * N * 2; i += THREADS) {
            const int slab = i / (N * 2), rest = i % (N * 2);
            const bool ok = first + (rest >> 1) < p.filters;
            const u32 to = i * 16;
            copy16(shared_address(shared) + (to ^ (to >> KEY & 1) << 6), ok ? from + (u64)slab * p.filters * BLOCK + rest * 8 : from,
                   ok ? 16 : 0);
        }
        copy_commit();
    }
    // The lane's own row of the right matrix, as bytes.
    const int column = (lane >> 3) * 2 * G + (lane >> 2 & 1), even = (column * ROW + quad * 8) ^ (DEEP ? 0 : (lane >> 3 & 1) << 6);
    auto right = [&](int slab, int j) -> uint2 {
        const int at = j / G * 8 * G * ROW + (j % G >> 1) * 128;
        if constexpr (DEEP) {
            // Filters beyond the last are read as another, and not written.
            const int f = min(first + at / ROW + column + (j & 1) * 2, p.filters - 1);
            return *(const uint2*)((const u16*)p.weight + ((u64)slab * p.filters + f) * BLOCK + quad * 4);
        } else {
            return *(const uint2*)(shared + slab * N * ROW + at + (even ^ (j & 1) << 6));
        }
    };
    const Divisor width(p.w), height(p.h);
    const bool same = (p.stride_z | p.stride_y | p.stride_x) == 1;
    const bool plain_a = same && (p.a.shift_z | p.a.shift_y | p.a.shift_x) == 0;
    const bool plain = plain_a && (p.b.channels == 0 || (p.b.shift_z | p.b.shift_y | p.b.shift_x) == 0);
    const u64 size_a = (u64)p.a.d * p.a.h * p.a.w, size_b = (u64)p.b.d * p.b.h * p.b.w;
    const u16* const from_a = (const u16*)p.a.data + n * size_a * p.a.channels + quad * 4;
    const u16* const from_b = (const u16*)p.b.data + n * size_b * p.b.channels + quad * 4;
    const u64 mine = (u64)n * count * p.filters + first + quad * 2 * G;         // what the thread writes of a row
    u16* const out = (u16*)p.out + mine;
    const int part = DEEP ? slabs * warp / WARPS : 0, end = DEEP ? slabs * (warp + 1) / WARPS : slabs;
    if constexpr (!DEEP) {
        copy_wait<0>();
        __syncthreads();
    }
    for (int tile = start; tile < tiles; tile += p.blocks) {
        // What the product is added to is asked for first and needed last.
        const int own = tile * TILE + warp * OWN * 16 + (lane >> 2);
        u32 y[OWN][2][NI];
        #pragma unroll
        for (int i = 0; i < OWN; ++i)
            #pragma unroll
            for (int h = 0; h < 2; ++h)
                #pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    // Nothing else is read of `y`: others may have written there.
                    const int row = own + i * 16 + h * 8;
                    u32* to = y[i][h] + g * G;
                    #pragma unroll
                    for (int j = 0; j < G; ++j) to[j] = 0;
                    if (row >= count || first + (g * 4 + quad) * 2 * G >= p.filters || DEEP && warp >= MI) continue;
                    const u16* from = (const u16*)p.y + mine + (u64)(u32)row * (u32)p.filters + g * 8 * G;
                    if constexpr (G == 4) {
                        const uint4 v = *(const uint4*)from;
                        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
                    } else {
                        const uint2 v = *(const uint2*)from;
                        to[0] = v.x, to[1] = v.y;
                    }
                }
        // Rows beyond the last are read as the last, and not written.
        int at_a[MI][2], at_b[MI][2];
        #pragma unroll
        for (int i = 0; i < MI; ++i)
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = min(tile * TILE + (DEEP ? 0 : warp * MI * 16) + i * 16 + h * 8 + (lane >> 2), count - 1);
                at_a[i][h] = at_b[i][h] = row;
                if (plain) continue;
                int x, y;
                const int z = height.quotient(width.quotient(row, x), y) * p.stride_z;
                x *= p.stride_x, y *= p.stride_y;
                at_a[i][h] = ((z >> p.a.shift_z) * p.a.h + (y >> p.a.shift_y)) * p.a.w + (x >> p.a.shift_x);
                at_b[i][h] = ((z >> p.b.shift_z) * p.b.h + (y >> p.b.shift_y)) * p.b.w + (x >> p.b.shift_x);
            }
        float acc[MI][NI][4] = {};
        auto multiply = [&](int slab, const uint2 (&v)[MI][2]) {
            #pragma unroll
            for (int j = 0; j < NI; ++j) {
                const uint2 w = right(slab, j);
                #pragma unroll
                for (int i = 0; i < MI; ++i) {
                    const u32 a[4] = {v[i][0].x, v[i][1].x, v[i][0].y, v[i][1].y};
                    T::mma(acc[i][j], a, w.x, w.y);
                }
            }
        };
        if constexpr (USE == END_OF_PLANES) {
            uint2 v[MI][2];
            const float* from = (const float*)p.a.data + (n * (u64)p.channels + quad * 4) * size_a;
            #pragma unroll
            for (int i = 0; i < MI; ++i)
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float c[4];
                    #pragma unroll
                    for (int k = 0; k < 4; ++k) c[k] = quad * 4 + k < p.channels ? from[k * size_a + at_a[i][h]] : 0.f;
                    v[i][h] = make_uint2(T::pack(c[0], c[1]), T::pack(c[2], c[3]));
                }
            multiply(0, v);
        } else {
            #pragma unroll 1
            for (int slab = part; slab < end; slab += AHEAD) {
                uint2 v[AHEAD][MI][2];
                #pragma unroll
                for (int u = 0; u < AHEAD; ++u) {
                    if (slab + u >= end) continue;
                    const int c = (slab + u) * BLOCK;
                    const bool second = c >= p.a.channels;
                    const u16* from = second ? from_b + (c - p.a.channels) : from_a + c;
                    const u32 channels = second ? p.b.channels : p.a.channels;
                    #pragma unroll
                    for (int i = 0; i < MI; ++i)
                        #pragma unroll
                        for (int h = 0; h < 2; ++h)
                            v[u][i][h] = *(const uint2*)(from + (u64)(u32)(second ? at_b[i][h] : at_a[i][h]) * channels);
                }
                #pragma unroll
                for (int u = 0; u < AHEAD; ++u) {
                    if (slab + u >= end) continue;
                    const bool second = (slab + u) * BLOCK >= p.a.channels;
                    const u64 norm = second ? p.b.norm : p.a.norm;
                    if (norm) {
                        const int channels = second ? p.b.channels : p.a.channels;
                        const float slope = second ? p.b.slope : p.a.slope;
                        Norm4 affine;
                        affine.load((const float*)norm + (u64)n * 3 * channels, channels,
                                    (slab + u) * BLOCK + quad * 4 - (second ? p.a.channels : 0));
                        #pragma unroll
                        for (int i = 0; i < MI; ++i)
                            #pragma unroll
                            for (int h = 0; h < 2; ++h) v[u][i][h] = affine.template apply<T>(v[u][i][h], slope);
                    }
                    multiply(slab + u, v[u]);
                }
            }
        }
        if constexpr (DEEP) {
            float4* const sums = (float4*)shared + lane;
            #pragma unroll
            for (int i = 0; i < MI; ++i)
                #pragma unroll
                for (int j = 0; j < NI; ++j)
                    sums[((warp * MI + i) * NI + j) * 32] = make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]);
            __syncthreads();
            if (warp >= MI) return;
            #pragma unroll
            for (int j = 0; j < NI; ++j) {
                float4 sum = sums[(warp * NI + j) * 32];
                #pragma unroll
                for (int w = 1; w < WARPS; ++w) {
                    const float4 v = sums[((w * MI + warp) * NI + j) * 32];
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                acc[0][j][0] = sum.x, acc[0][j][1] = sum.y, acc[0][j][2] = sum.z, acc[0][j][3] = sum.w;
            }
        }
        #pragma unroll
        for (int j = 0; j < NI; j += 2) {
            const float* const of = planes + (j / G * 4 + quad) * 2 * G + j % G * 2;
            const float4 bias = *(const float4*)of;
            const float4 mean = *(const float4*)(of + N), scale = *(const float4*)(of + 2 * N), shift = *(const float4*)(of + 3 * N);
            #pragma unroll
            for (int i = 0; i < OWN; ++i)
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float v[4] = {acc[i][j][2 * h] + bias.x, acc[i][j][2 * h + 1] + bias.y, acc[i][j + 1][2 * h] + bias.z,
                                  acc[i][j + 1][2 * h + 1] + bias.w};
                    u32* to = y[i][h] + j;
                    auto ended = [&](float y, float mean, float scale, float shift, float product) {
                        return leaky(__fadd_rn(__fmaf_rn(__fsub_rn(y, mean), scale, shift), product), p.slope);
                    };
                    v[0] = ended(T::low(to[0]), mean.x, scale.x, shift.x, v[0]), v[1] = ended(T::high(to[0]), mean.y, scale.y, shift.y, v[1]);
                    v[2] = ended(T::low(to[1]), mean.z, scale.z, shift.z, v[2]), v[3] = ended(T::high(to[1]), mean.w, scale.w, shift.w, v[3]);
                    to[0] = T::pack(v[0], v[1]), to[1] = T::pack(v[2], v[3]);
                }
        }
        #pragma unroll
        for (int i = 0; i < OWN; ++i)
            #pragma unroll
            for (int h = 0; h < 2; ++h)
                #pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    const int row = own + i * 16 + h * 8;
                    if (row >= count || first + (g * 4 + quad) * 2 * G >= p.filters) continue;
                    u16* const to = out + (u64)(u32)row * (u32)p.filters + g * 8 * G;
                    u32 v[G];
                    #pragma unroll
                    for (int j = 0; j < G; ++j) v[j] = y[i][h][g * G + j];
                    store_words(to, v);
                }
    }
}
