// Gradient of a convolution's filters: dW[channel][tap][filter] is the sum over the voxels v of the result of
// x[v * stride + tap - pad][channel] * dy[v][filter], where x is what the convolution read and is zero outside of it.
//
// For tensor cores with 16-bit storage a product has 16 channels as rows, filters as columns, and voxels as its depth.
// Both operands lie in shared memory as they do in memory, [voxel][channel], and are transposed as they are loaded into
// registers: a tap is a shift of the rows that are named, as in conv3d.cuh. A block has some slabs of 16 channels, all
// taps of them, and N filters, whose sums stay in registers while it walks over its share of the bricks of all samples:
// every brick is loaded once for all taps. A part is such a share; the sums of parts are left in memory and added up by
// conv3d_wgrad.cu in their order.
#pragma once
#include "common.cuh"

struct WgradParams {
    Source a, b;    // what the convolution read, one after the other in channels
    Source dy;      // its channels are the filters
    // f32 [part][slab of 16 channels][tap][filter][16]; transposed [part][slab of 16 filters][tap][channel][16]
    u64 out;
    int d, h, w;    // x, as it is read
    int kernel_z, kernel_y, kernel_x;
    int stride_z, stride_y, stride_x;   // in voxels of the brick
    // Of x from voxel to voxel of the brick: 1, or along an axis without neighbours the stride.
    int step_z, step_y, step_x;
    int tiles_z, tiles_y, tiles_x;
    int planes;     // of 8 x 8 voxels of the result in a brick
    int pitch;      // voxels from row to row of x in a brick, a multiple of 4
    int bricks;     // buffers: 2 load the next brick while one is computed with
    int slabs;      // of a block
    int taps;
    int rows, columns, voxels;          // of x in a brick
    u32 by_rows, by_columns;            // n * by >> 16 = n / columns for all n of a brick
    int slab_bytes, brick_bytes;
    int batch, transpose, unused;
};

// Chunks that are loaded side by side where that takes registers, which before 8.0 are there.
constexpr int UNROLL = AMPERE ? 1 : 4;
constexpr int THREADS = 256;
constexpr int ROW = 32;     // bytes of a voxel's 16 channels
constexpr int ODD = 10;     // at stride 2, where the odd columns start: neighbours stay neighbours

// Where the sum of channel `c` of all and filter `f` lies in a part.
__device__ __forceinline__ u64 place_of(const WgradParams& p, int tap, int c, int f) {
    const int inner = p.transpose ? f : c, outer = p.transpose ? c : f;
    const int size = p.transpose ? p.a.channels + p.b.channels : p.dy.channels;
    return (((u64)(inner / BLOCK) * p.taps + tap) * size + outer) * BLOCK + inner % BLOCK;
}

// Values of a part.
__device__ __forceinline__ u64 part_size(const WgradParams& p) {
    return (u64)p.taps * (p.a.channels + p.b.channels) * p.dy.channels;
}

// The tensor that has a slab of all channels, and the slab's first channel in it.
__device__ __forceinline__ Source source_of(const WgradParams& p, int slab, int& c) {
    const bool second = slab * BLOCK >= p.a.channels;
    c = slab * BLOCK - (second ? p.a.channels : 0);
    return second ? p.b : p.a;
}

// WT groups of warps share the taps of all slabs, TI at most for each; WN the filters, NI x 8 for each; WV the voxels,
// each with sums of its own that are added up at the end. AHEAD fragments of x are loaded before the first product with
// them.
template <class T, int WT, int WN, int WV, int TI, int NI, int AHEAD>
struct Wgrad {
    static constexpr int N = WN * NI * 8, CHUNKS = N / 8;
    static_assert(WT * WN * WV * 32 == THREADS, "warps");
    static_assert(NI == 2 || NI == 4, "a bit of the address tells fragments of filters apart");

    // A sample, and the first voxel of the result in a brick.
    struct Place {
        int n, z, y, x;
    };

    const WgradParams& p;
    int slab, slabs, first;     // the block's first slab, how many it has, its first filter

    __device__ __forceinline__ Wgrad(const WgradParams& p) : p(p) {
        first = blockIdx.x * N, slab = blockIdx.y * p.slabs;
        slabs = min(p.slabs, (p.a.channels + p.b.channels) / BLOCK - slab);
    }

    __device__ __forceinline__ Place place(int i) const {
        const int x = i % p.tiles_x * 8, y = i / p.tiles_x % p.tiles_y * 8, rest = i / (p.tiles_x * p.tiles_y);
        return {rest / p.tiles_z, rest % p.tiles_z * p.planes, y, x};
    }

    __device__ __forceinline__ Place after(Place t) const {
        if ((t.x += 8) < p.dy.w) return t;
        t.x = 0;
        if ((t.y += 8) < p.dy.h) return t;
        t.y = 0;
        if ((t.z += p.planes) < p.dy.d) return t;
        t.z = 0, ++t.n;
        return t;
    }

    // Where the voxel in this column of a row of the brick lies.
    __device__ __forceinline__ int column(int x) const { return p.stride_x == 2 ? (x & 1) * ODD + (x >> 1) : x; }

    // Calls `f` for every chunk of 8 channels of a slab that is the thread's: its place in the brick, and its voxel in
    // the source, -1 for padding.
    template <class F>
    __device__ __forceinline__ void inputs(const Place& t, const Source& s, int start, F f) const {
        const int z0 = t.z * p.stride_z * p.step_z - (p.kernel_z - 1) / 2;
        const int y0 = t.y * p.stride_y * p.step_y - (p.kernel_y - 1) / 2;
        const int x0 = t.x * p.stride_x * p.step_x - (p.kernel_x - 1) / 2;
        #pragma unroll(UNROLL)
        for (int i = threadIdx.x >> 1; i < p.voxels; i += THREADS / 2) {
            const int row = (int)(i * p.by_columns >> 16), across = i - row * p.columns;
            const int plane = (int)(row * p.by_rows >> 16), down = row - plane * p.rows;
            const int z = z0 + plane * p.step_z, y = y0 + down * p.step_y, x = x0 + across * p.step_x;
            const bool ok = (u32)z < (u32)p.d && (u32)y < (u32)p.h && (u32)x < (u32)p.w;
            const int voxel = ((z >> s.shift_z) * s.h + (y >> s.shift_y)) * s.w + (x >> s.shift_x);
            const int at = row * p.pitch + column(across);
            f(swizzle<ROW>(start + at * ROW + (threadIdx.x & 1) * 16), ok ? voxel : -1);
        }
    }

    // The same of 8 filters of the gradient.
    template <class F>
    __device__ __forceinline__ void gradients(const Place& t, F f) const {
        const int c = threadIdx.x % CHUNKS * 8;
        #pragma unroll(UNROLL)
        for (int i = threadIdx.x / CHUNKS; i < p.planes * 64; i += THREADS / CHUNKS) {
            const int z = t.z + (i >> 6), y = t.y + (i >> 3 & 7), x = t.x + (i & 7);
            const bool ok = z < p.dy.d && y < p.dy.h && x < p.dy.w && first + c < p.dy.channels;
            f(p.slabs * p.slab_bytes + swizzle<N * 2>(i * N * 2 + c * 2), ok ? (z * p.dy.h + y) * p.dy.w + x : -1);
        }
    }

    __device__ __forceinline__ void load(const Place& t, u32 to) const {
        // What is padding is copied from nowhere: any address will do.
        auto copy = [&](const Source& s, int c) {
            const u16* from = (const u16*)s.data;
            const u64 start = (u64)t.n * s.d * s.h * s.w * s.channels + c;
            return [=](u32 at, int voxel) {
                copy16(to + at, voxel < 0 ? from : from + start + (u64)(u32)voxel * s.channels, voxel < 0 ? 0 : 16);
            };
        };
        for (int s = 0; s < slabs; ++s) {
            int c;
            const Source from = source_of(p, slab + s, c);
            inputs(t, from, s * p.slab_bytes, copy(from, c + (threadIdx.x & 1) * 8));
        }
        gradients(t, copy(p.dy, first + threadIdx.x % CHUNKS * 8));
    }

    // Normalises the chunks that this thread loaded itself: they need no barrier. Padding stays zero.
    __device__ __forceinline__ void normalise(const Place& t, unsigned char* brick) const {
        auto apply = [&](const Source& s, int c) {
            const float* norm = (const float*)s.norm + (u64)t.n * 3 * s.channels;
            return [=](u32 at, int voxel) {
                if (voxel < 0) return;
                // Four channels at a time: the registers are needed for the sums.
                #pragma unroll 1
                for (int half = 0; half < 2; ++half) {
                    uint2* v = (uint2*)(brick + at) + half;
                    Norm4 n;
                    n.load(norm, s.channels, c + 4 * half);
                    *v = n.template apply<T>(*v, s.slope);
                }
            };
        };
        for (int s = 0; s < slabs; ++s) {
            int c;
            const Source from = source_of(p, slab + s, c);
            if (from.norm) inputs(t, from, s * p.slab_bytes, apply(from, c + (threadIdx.x & 1) * 8));
        }
        const int c = first + threadIdx.x % CHUNKS * 8;
        if (p.dy.norm && c < p.dy.channels) gradients(t, apply(p.dy, c));
    }

    // Adds up a brick. The warp has the taps wt, wt + WT, ..., `mine` of them, which start at `shift` in the brick.
    __device__ __forceinline__ void multiply(float (&acc)[TI][NI][4], const Place& t, u32 brick, const int (&shift)[TI],
                                             int mine, int wn, int wv) const {
        const int lane = threadIdx.x & 31, row = p.pitch * ROW;
        const int own = (lane >> 4) * p.stride_y * row + (lane & 7) * ROW + (lane >> 3 & 1) * 16;
        const u32 right = brick + p.slabs * p.slab_bytes
                          + swizzle<N * 2>((lane & 15) * N * 2 + (wn * NI + (lane >> 4)) * 16);
        // Pairs of rows of 8 voxels, without those that lie outside.
        const int planes = min(p.planes, p.dy.d - t.z), pairs = (min(8, p.dy.h - t.y) + 1) / 2;
        for (int z = 0, y = wv;; y += WV) {
            while (y >= pairs) y -= pairs, ++z;
            if (z >= planes) return;
            const int from = own + (z * p.stride_z * p.rows + y * 2 * p.stride_y) * row;
            const int voxel = (z * 4 + y) * 16 * N * 2;
            u32 a[AHEAD][4], b[NI / 2][4];
            #pragma unroll
            for (int j = 0; j < NI / 2; ++j) load_transposed(b[j], (right ^ j * 32) + voxel);
            #pragma unroll
            for (int first = 0; first < TI; first += AHEAD) {
                #pragma unroll
                for (int i = first; i < first + AHEAD && i < TI; ++i)
                    if (i < mine) load_transposed(a[i - first], brick + swizzle<ROW>(from + shift[i]));
                #pragma unroll
                for (int i = first; i < first + AHEAD && i < TI; ++i) {
                    if (i >= mine) continue;
                    #pragma unroll
                    for (int j = 0; j < NI; ++j)
                        T::mma(acc[i][j], a[i - first], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
                }
            }
        }
    }

    // Adds up what the WV warps with the same taps and filters have: the upper half to the lower, until one is left.
    __device__ __forceinline__ void gather(float (&acc)[TI][NI][4], unsigned char* shared, int other, int wv) const {
        float4* const sums = (float4*)shared + other * TI * NI * 32 + (threadIdx.x & 31);
        #pragma unroll
        for (int half = WV / 2; half; half /= 2) {
            float4* const at = sums + wv % half * WT * WN * TI * NI * 32;
            __syncthreads();        // the bricks, or the sums of before, are read no more
            if (wv >= half && wv < 2 * half)
                #pragma unroll
                for (int i = 0; i < TI * NI; ++i) {
                    const float(&v)[4] = acc[i / NI][i % NI];
                    at[i * 32] = make_float4(v[0], v[1], v[2], v[3]);
                }
            __syncthreads();
            if (wv < half)
                #pragma unroll
                for (int i = 0; i < TI * NI; ++i) {
                    float(&v)[4] = acc[i / NI][i % NI];
                    const float4 w = at[i * 32];
                    v[0] += w.x, v[1] += w.y, v[2] += w.z, v[3] += w.w;
                }
        }
    }

    __device__ __forceinline__ void run(unsigned char* shared) const {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        const int wt = warp % WT, wn = warp / WT % WN, wv = warp / (WT * WN);
        // A warp whose filters are all beyond the last has nothing to do but to load.
        const int mine = first + wn * NI * 8 < p.dy.channels ? (slabs * p.taps - wt + WT - 1) / WT : 0;
        int shift[TI];
        #pragma unroll
        for (int i = 0; i < TI; ++i) {
            const int slot = wt + i * WT, s = slot / p.taps, tap = slot % p.taps;
            const int x = tap % p.kernel_x, y = tap / p.kernel_x % p.kernel_y, z = tap / (p.kernel_x * p.kernel_y);
            shift[i] = s * p.slab_bytes + ((z * p.rows + y) * p.pitch + column(x)) * ROW;
        }
        float acc[TI][NI][4] = {};
        const u32 start = shared_address(shared);
        const u64 all = (u64)p.batch * p.tiles_z * p.tiles_y * p.tiles_x;
        const u64 begin = all * blockIdx.z / gridDim.z;
        int left = (int)(all * (blockIdx.z + 1) / gridDim.z - begin), buffer = 0;
        Place t = place((int)begin);
        load(t, start);
        copy_commit();
        while (true) {
            copy_wait<0>();
            normalise(t, shared + buffer * p.brick_bytes);
            __syncthreads();                                // loaded by all, and the brick before is done by all
            const bool more = --left > 0;
            if (more && p.bricks == 2) {
                load(after(t), start + (buffer ^ 1) * p.brick_bytes);
                copy_commit();
            }
            multiply(acc, t, start + buffer * p.brick_bytes, shift, mine, wn, wv);
            if (!more) break;
            t = after(t);
            if (p.bricks == 2) {
                buffer ^= 1;
            } else {
                __syncthreads();                            // the only buffer is read no more
                load(t, start);
                copy_commit();
            }
        }
        if constexpr (WV > 1) {
            gather(acc, shared, wt + wn * WT, wv);
            if (wv) return;
        }
        float* const out = (float*)p.out + blockIdx.z * part_size(p);
        #pragma unroll
        for (int i = 0; i < TI; ++i) {
            if (i >= mine) return;
            const int slot = wt + i * WT, c = (slab + slot / p.taps) * BLOCK + (lane >> 2);
            #pragma unroll
            for (int j = 0; j < NI; ++j) {
                const int f = first + (wn * NI + j) * 8 + (lane & 3) * 2;
                if (f >= p.dy.channels) continue;
                #pragma unroll
                for (int e = 0; e < 4; ++e) out[place_of(p, slot % p.taps, c + e / 2 * 8, f + e % 2)] = acc[i][j][e];
            }
        }
    }
};

#define WGRAD(NAME, STORAGE, WT, WN, WV, TI, NI, AHEAD, BLOCKS)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, AMPERE ? BLOCKS : 1) NAME(const WgradParams p) {             \
        extern __shared__ __align__(128) unsigned char shared[];                                                       \
        Wgrad<STORAGE, WT, WN, WV, TI, NI, AHEAD>(p).run(shared);                                                      \
    }
