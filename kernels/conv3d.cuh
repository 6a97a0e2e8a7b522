// Convolution from a halo brick, for tensor cores with 16-bit storage (mma.sync, sm_80 and later).
//
// A block computes bricks of 8 x 8 voxels in TZ planes and N filters. 16 channels of the input brick with its halo are
// loaded once into shared memory, where zero fill is the padding, and all taps read it: a tap is a shift of the rows that
// ldmatrix is given. Filters stream beside it, one plane of taps at a time. The input may be two tensors one after the
// other in channels, the first of them repeated along axes, each normalised as it is loaded: neither a concatenation, nor
// an upsampled nor a normalised tensor is ever in memory. Sums for the next normalisation are taken from the f32 results.
//
// Where there are too few bricks to keep a card busy, the grid's second dimension cuts channels and planes of taps into
// parts, each of which leaves its sums in memory.
#pragma once
#include "common.cuh"

struct Conv3dParams {
    Source a, b;
    u64 weight;     // [slab of 16 channels][tap][filter][16]
    u64 bias;       // f32 [filters], or 0
    u64 out;        // [N][voxel][filters]; of a grid of several parts f32 [part][N][voxel][filters]
    u64 partials;   // f32 [N][tile][count, mean, squares][filters], or 0
    int filters;    // padded
    int d, h, w;    // input, as it is read
    int out_d, out_h, out_w;
    int kernel_z, kernel_y, kernel_x;
    int stride_z, stride_y, stride_x;
    int tiles_z, tiles_y, tiles_x;
    int bricks;     // buffers for the brick: 2 load the next while one is computed with
    int batch;
};

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROW = 32;                 // bytes of a voxel's or a filter's 16 channels
constexpr int PITCH_1 = 12;             // voxels from row to row of the brick: a multiple of 4, so that a fragment
constexpr int PITCH_2 = 20;             // two rows further has the same swizzle; twice as wide for stride 2
constexpr int ODD = 10;                 // at stride 2, where the odd columns start: neighbours stay neighbours

// Where a block is and what of it is inside of the output.
struct Tile {
    int n, index, z0, y0, x0, first;    // sample, tile of the sample, first output voxel, first filter
    __device__ __forceinline__ Tile(const Conv3dParams& p, int planes, int filters, int i = blockIdx.x) {
        const int groups = (p.filters + filters - 1) / filters;
        first = i % groups * filters, i /= groups;      // fastest: blocks that share a brick run side by side
        const int tiles = p.tiles_z * p.tiles_y * p.tiles_x;
        n = i / tiles, index = i % tiles;
        x0 = index % p.tiles_x * 8, y0 = index / p.tiles_x % p.tiles_y * 8, z0 = index / (p.tiles_x * p.tiles_y) * planes;
    }
};

// PLANE: stride 1 and 3 x 3 taps in the plane, known to the compiler; WM x WN warps have MI fragments of 16 voxels and NI of 8
// filters each. EVERY: strides of 1 or 2 and kernels of 1 or 3 on every axis. BACK: the gradient of the input of such a
// convolution, see `Class`.
enum Way { PLANE, EVERY, BACK };

// What a convolution of stride 2 does to an input voxel depends on whether its place is even: 8 classes of voxels, a third
// dimension of the grid, each of which is a convolution of stride 1 of the output's gradient with the taps that reach it: of
// 3 the middle one, or the two others; of 1 that one, or none. Filters are mirrored: tap `first + i * step` meets the `i`-th
// voxel from `-pad` on.
struct Class {
    int odd, count, first, step, pad;
    __device__ __forceinline__ Class(int bit, int stride, int kernel) {
        odd = stride == 2 ? (int)blockIdx.z >> bit & 1 : 0;
        count = stride == 1 ? kernel : kernel == 3 ? 1 + odd : 1 - odd;
        first = stride == 2 && kernel == 3 && !odd, step = stride, pad = stride == 1 ? kernel / 2 : 0;
    }
};

// Fragment `f` is two rows of 8 voxels: four to a plane.
template <int OWNER = PLANE>
__device__ __forceinline__ bool voxel_of(const Conv3dParams& p, const Tile& t, int f, int row, int& z, int& y, int& x) {
    z = t.z0 + (f >> 2), y = t.y0 + (f & 3) * 2 + (row >> 3), x = t.x0 + (row & 7);
    if constexpr (OWNER == BACK) {
        z = z * p.stride_z + Class(2, p.stride_z, 1).odd, y = y * p.stride_y + Class(1, p.stride_y, 1).odd;
        x = x * p.stride_x + Class(0, p.stride_x, 1).odd;
    }
    return z < p.out_d && y < p.out_h && x < p.out_w;
}

// All threads of a crew have come here: the block, or one of several runs of CREW threads that each have a tile.
template <int CREW>
__device__ __forceinline__ void meet() {
    if constexpr (CREW == 0) __syncthreads();
    else if constexpr (CREW == THREADS) asm volatile("bar.sync 1, %0;" ::"n"(CREW) : "memory");
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / CREW), "n"(CREW) : "memory");
}

// Adds the bias, takes the sums, and writes the results through shared memory: 16 bytes a thread, neighbours beside
// neighbours. `shared` is free and at least WM * MI * 16 * N * 2 bytes. OWNER tells entries apart that would otherwise
// share one static array, which PTX would have to declare outside of both.
// The warp's i-th fragment is number `fragment` + i * STEP of the tile, which a crew of CREW threads has; 0: the whole block.
template <class T, int OWNER, int WM, int WN, int MI, int NI, int STEP = 1, int CREW = 0>
__device__ __forceinline__ void finish(const Conv3dParams& p, const Tile& t, float (&acc)[MI][NI][4], int fragment,
                                       unsigned char* shared) {
    constexpr int N = WN * NI * 8, COUNT = CREW ? CREW : THREADS;
    __shared__ float all[THREADS / COUNT][3][WM][N];
    float(&sums)[3][WM][N] = all[CREW ? threadIdx.x / COUNT : 0];
    const int tid = CREW ? threadIdx.x % COUNT : threadIdx.x, lane = tid & 31, warp = tid >> 5, wm = warp / WN, wn = warp % WN;
    const int column = wn * NI * 8 + (lane & 3) * 2;
    bool inside[MI][2];
    #pragma unroll
    for (int i = 0; i < MI; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            int z, y, x;
            inside[i][h] = voxel_of<OWNER>(p, t, fragment + i * STEP, h * 8 + (lane >> 2), z, y, x);
        }
    if (p.bias) {
        const float* bias = (const float*)p.bias + t.first;
        #pragma unroll
        for (int j = 0; j < NI; ++j)
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int c = column + j * 8 + e;
                const float v = t.first + c < p.filters ? bias[c] : 0.f;
                #pragma unroll
                for (int i = 0; i < MI; ++i) acc[i][j][e] += v, acc[i][j][2 + e] += v;
            }
    }
    // From here on no warp reads the bricks.
    meet<CREW>();
    #pragma unroll
    for (int i = 0; i < MI; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h)
            #pragma unroll
            for (int j = 0; j < NI; ++j) {
                const int row = (fragment + i * STEP) * 16 + h * 8 + (lane >> 2);
                const u32 at = swizzle<N * 2>(row * N * 2 + (column + j * 8) * 2);
                *(u32*)(shared + at) = T::pack(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
            }
    if (p.partials) {
        // Corrected two-pass: squares of deviations from the tile's own mean, whose rounding error is then removed. Every
        // addition has its place, so that the same input always gives the same bytes.
        const int ez = min(WM * MI / 4, p.out_d - t.z0), ey = min(8, p.out_h - t.y0), ex = min(8, p.out_w - t.x0);
        const float count = (float)(ez * ey * ex), inverse = __frcp_rn(count);
        float mean[NI][2];
        #pragma unroll
        for (int j = 0; j < NI; ++j)
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                float s = 0.f;
                #pragma unroll
                for (int i = 0; i < MI; ++i)
                    #pragma unroll
                    for (int h = 0; h < 2; ++h) s += inside[i][h] ? acc[i][j][2 * h + e] : 0.f;
                #pragma unroll
                for (int far = 4; far < 32; far *= 2) s += __shfl_xor_sync(~0u, s, far);
                if (lane < 4) sums[0][wm][column + j * 8 + e] = s;
            }
        meet<CREW>();
        #pragma unroll
        for (int j = 0; j < NI; ++j)
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                float s = 0.f;
                #pragma unroll
                for (int k = 0; k < WM; ++k) s += sums[0][k][column + j * 8 + e];
                mean[j][e] = s * inverse;
                float first = 0.f, second = 0.f;
                #pragma unroll
                for (int i = 0; i < MI; ++i)
                    #pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float d = inside[i][h] ? acc[i][j][2 * h + e] - mean[j][e] : 0.f;
                        first += d, second = __fmaf_rn(d, d, second);
                    }
                #pragma unroll
                for (int far = 4; far < 32; far *= 2)
                    first += __shfl_xor_sync(~0u, first, far), second += __shfl_xor_sync(~0u, second, far);
                if (lane < 4) sums[1][wm][column + j * 8 + e] = first, sums[2][wm][column + j * 8 + e] = second;
            }
        meet<CREW>();
        if (tid < N && t.first + tid < p.filters) {
            float s = 0.f, first = 0.f, second = 0.f;
            #pragma unroll
            for (int k = 0; k < WM; ++k) s += sums[0][k][tid], first += sums[1][k][tid], second += sums[2][k][tid];
            const float off = first * inverse;
            const u64 tile = (u64)t.n * p.tiles_z * p.tiles_y * p.tiles_x + t.index;
            float* to = (float*)p.partials + tile * 3 * p.filters + t.first + tid;
            to[0] = count;
            to[p.filters] = s * inverse + off;
            to[2 * p.filters] = fmaxf(__fmaf_rn(-off, first, second), 0.f);
        }
    } else {
        meet<CREW>();
    }
    #pragma unroll 2
    for (int i = tid; i < WM * MI * 16 * (N / 8); i += COUNT) {
        const int row = i / (N / 8), c = i % (N / 8) * 8;
        int z, y, x;
        if (voxel_of<OWNER>(p, t, row >> 4, row & 15, z, y, x) && t.first + c < p.filters) {
            const uint4 v = *(const uint4*)(shared + swizzle<N * 2>(row * N * 2 + c * 2));
            const u64 voxel = (((u64)t.n * p.out_d + z) * p.out_h + y) * p.out_w + x;
            *(uint4*)((u16*)p.out + voxel * p.filters + t.first + c) = v;
        }
    }
}

// Writes a part's sums as they are, for conv3d_sum.cu: four lanes fill a sector.
template <int WN, int MI, int NI, int STEP, int OWNER = PLANE>
__device__ __forceinline__ void leave(const Conv3dParams& p, const Tile& t, const float (&acc)[MI][NI][4], int fragment) {
    const int lane = threadIdx.x & 31, wn = (threadIdx.x >> 5) % WN;
    const int column = t.first + wn * NI * 8 + (lane & 3) * 2;
    const u64 sample = (u64)blockIdx.y * p.batch + t.n;
    #pragma unroll
    for (int i = 0; i < MI; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            int z, y, x;
            if (!voxel_of<OWNER>(p, t, fragment + i * STEP, h * 8 + (lane >> 2), z, y, x)) continue;
            float* to = (float*)p.out + (((sample * p.out_d + z) * p.out_h + y) * p.out_w + x) * p.filters + column;
            #pragma unroll
            for (int j = 0; j < NI; ++j)
                if (column + j * 8 < p.filters) *(float2*)(to + j * 8) = make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
        }
}

template <class T, Way WAY, int WM, int WN, int MI, int NI>
struct Brick {
    static constexpr bool ANY = WAY != PLANE;
    static constexpr int TZ = WM * MI / 4, N = WN * NI * 8;
    static_assert(WM * WN == WARPS && 4 % MI == 0, "warps");
    static_assert(NI % 2 == 0, "filters are loaded by 16");

    const Conv3dParams& p;
    const Tile t;
    int sz, sy, sx, planes, ky, kx, pitch, rows, columns, depth;
    u32 by_columns, by_rows;    // n * by >> 16 = n / columns for all n of a brick

    __device__ __forceinline__ Brick(const Conv3dParams& p) : p(p), t(p, TZ, N) {
        if constexpr (WAY == BACK) {
            sz = sy = sx = 1;
            planes = of_z().count, ky = of_y().count, kx = of_x().count;
        } else {
            sz = ANY ? p.stride_z : 1, sy = ANY ? p.stride_y : 1, sx = ANY ? p.stride_x : 1;
            ky = ANY ? p.kernel_y : 3, kx = ANY ? p.kernel_x : 3;
        }
        pitch = sx == 2 ? PITCH_2 : PITCH_1;
        rows = 7 * sy + ky, columns = 7 * sx + kx, depth = (TZ - 1) * sz + kz();
        by_columns = 65536 / columns + 1, by_rows = 65536 / rows + 1;
    }
    // Planes of taps; what the parameters say takes no register.
    __device__ __forceinline__ int kz() const { return WAY == BACK ? planes : p.kernel_z; }
    __device__ __forceinline__ Class of_z() const { return Class(2, p.stride_z, p.kernel_z); }
    __device__ __forceinline__ Class of_y() const { return Class(1, p.stride_y, p.kernel_y); }
    __device__ __forceinline__ Class of_x() const { return Class(0, p.stride_x, p.kernel_x); }
    __device__ __forceinline__ int bytes() const { return depth * rows * pitch * ROW; }
    __device__ __forceinline__ int slabs() const { return (p.a.channels + p.b.channels) / BLOCK; }

    // The `i`-th voxel to load, and its place in the brick.
    __device__ __forceinline__ u32 place(int i, int& z, int& y, int& x) const {
        const int row = ANY ? (int)(i * by_columns >> 16) : i / 10;
        x = i - row * columns;
        z = ANY ? (int)(row * by_rows >> 16) : row / 10;
        y = row - z * rows;
        const int at = ANY && sx == 2 ? (x & 1) * ODD + (x >> 1) : x;
        return swizzle<ROW>((row * pitch + at) * ROW + (threadIdx.x & 1) * 16);
    }

    // Starts to load 16 channels; returns a bit for each of the thread's chunks that is no padding.
    __device__ __forceinline__ u32 load(int slab, u32 to) const {
        const bool second = slab * BLOCK >= p.a.channels;
        const int channels = second ? p.b.channels : p.a.channels;
        const int h = second ? p.b.h : p.a.h, w = second ? p.b.w : p.a.w, d = second ? p.b.d : p.a.d;
        const int shift_z = second ? p.b.shift_z : p.a.shift_z, shift_y = second ? p.b.shift_y : p.a.shift_y,
                  shift_x = second ? p.b.shift_x : p.a.shift_x;
        const int c = slab * BLOCK - (second ? p.a.channels : 0) + (threadIdx.x & 1) * 8;
        const u16* from = (const u16*)(second ? p.b.data : p.a.data) + (u64)t.n * d * h * w * channels + c;
        const int z0 = t.z0 * sz - (WAY == BACK ? of_z().pad : (kz() - 1) / 2), y0 = t.y0 * sy - (WAY == BACK ? of_y().pad : (ky - 1) / 2),
                  x0 = t.x0 * sx - (WAY == BACK ? of_x().pad : (kx - 1) / 2);
        const int voxels = depth * rows * columns;
        u32 real = 0, bit = 1;
        #pragma unroll 2
        for (int i = threadIdx.x >> 1; i < voxels; i += THREADS / 2, bit += bit) {
            int z, y, x;
            const u32 at = place(i, z, y, x);
            z += z0, y += y0, x += x0;
            const bool ok = (u32)z < (u32)p.d && (u32)y < (u32)p.h && (u32)x < (u32)p.w;
            const int voxel = ((z >> shift_z) * h + (y >> shift_y)) * w + (x >> shift_x);
            copy16(to + at, ok ? from + (u64)(u32)voxel * channels : from, ok ? 16 : 0);
            real |= ok ? bit : 0;
        }
        return real;
    }

    // Normalises the chunks that this thread loaded itself: they need no barrier. Padding stays zero.
    __device__ __forceinline__ void normalise(int slab, unsigned char* brick, u32 real) const {
        const bool second = slab * BLOCK >= p.a.channels;
        const u64 norm = second ? p.b.norm : p.a.norm;
        if (!norm) return;
        const int channels = second ? p.b.channels : p.a.channels;
        const int c = slab * BLOCK - (second ? p.a.channels : 0) + (threadIdx.x & 1) * 8;
        const float slope = second ? p.b.slope : p.a.slope;
        Norm8 n;
        n.load((const float*)norm + (u64)t.n * 3 * channels, channels, c);
        #pragma unroll 1
        for (int i = threadIdx.x >> 1; real; i += THREADS / 2, real >>= 1) {
            if (!(real & 1)) continue;
            int z, y, x;
            uint4* v = (uint4*)(brick + place(i, z, y, x));
            *v = n.template apply<T>(*v, slope);
        }
    }

    // Starts to load the filters of one plane of taps.
    __device__ __forceinline__ void load_weights(int slab, int tz, u32 to) const {
        const int taps = ky * kx;
        const u16* from;
        if constexpr (WAY == BACK) {
            const Class z = of_z(), y = of_y(), x = of_x();
            const u64 start = ((slab * p.kernel_z + z.first + tz * z.step) * p.kernel_y + y.first) * p.kernel_x + x.first;
            from = (const u16*)p.weight + (start * p.filters + t.first) * BLOCK;
        } else {
            from = (const u16*)p.weight + ((u64)(slab * kz() + tz) * taps * p.filters + t.first) * BLOCK;
        }
        #pragma unroll 2
        for (int i = threadIdx.x; i < taps * N * 2; i += THREADS) {
            const int tap = i / (N * 2), rest = i % (N * 2);
            const bool ok = t.first + (rest >> 1) < p.filters;
            const int far = WAY == BACK ? tap / kx * p.stride_y * p.kernel_x + tap % kx * p.stride_x : tap;
            copy16(to + swizzle<ROW>(i * 16), ok ? from + (u64)far * p.filters * BLOCK + rest * 8 : from, ok ? 16 : 0);
        }
    }

    // One plane of taps. `row` is the brick's voxel that the lane's first row starts at.
    __device__ __forceinline__ void multiply(float (&acc)[MI][NI][4], u32 brick, u32 weight, int row) const {
        const int lane = threadIdx.x & 31;
        const u32 chunk = (lane >> 4) * 16;
        const int far = 2 * sy * pitch * ROW;
        for (int ty = 0; ty < ky; ++ty)
            #pragma unroll(ANY ? 1 : 3)
            for (int tx = 0; tx < kx; ++tx) {
                const int at = row + ty * pitch + (ANY && sx == 2 ? (tx & 1) * ODD + (tx >> 1) : tx);
                const u32 from = brick + swizzle<ROW>(at * ROW + chunk);
                u32 a[MI][4], b[NI / 2][4];
                #pragma unroll
                for (int j = 0; j < NI / 2; ++j) load_matrices(b[j], weight + (ty * kx + tx) * N * ROW + j * 16 * ROW);
                #pragma unroll
                for (int i = 0; i < MI; ++i) load_matrices(a[i], from + i * far);
                #pragma unroll
                for (int i = 0; i < MI; ++i)
                    #pragma unroll
                    for (int j = 0; j < NI; ++j) T::mma(acc[i][j], a[i], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
            }
    }

    __device__ __forceinline__ void run(unsigned char* shared) const {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wm = warp / WN, wn = warp % WN;
        const u32 start = shared_address(shared);
        const int brick_bytes = bytes(), weight_bytes = ky * kx * N * ROW, weights = p.bricks * brick_bytes;
        const int f = wm * MI, r = lane & 15;
        const int row = ((f >> 2) * sz * rows + ((f & 3) * 2 + (r >> 3)) * sy) * pitch + (r & 7);
        const u32 filter = swizzle<ROW>((wn * NI * 8 + (lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 16);
        float acc[MI][NI][4] = {};
        // A stage is a plane of taps of a slab; a part has a range of them.
        if constexpr (WAY == BACK) {
            // At stride 1 all voxels are of one class.
            if ((blockIdx.z & 4 && p.stride_z == 1) || (blockIdx.z & 2 && p.stride_y == 1) || (blockIdx.z & 1 && p.stride_x == 1)) return;
            // Where no tap reaches, the gradient is zero.
            if (kz() * ky * kx == 0) {
                end_with(acc, f, shared);
                return;
            }
        }
        int stage = slabs() * kz() * blockIdx.y / gridDim.y;
        const int end = slabs() * kz() * (blockIdx.y + 1) / gridDim.y;
        int slab = stage / kz(), tz = stage % kz();
        u32 real = load(slab, start + (p.bricks == 2 ? slab & 1 : 0) * brick_bytes);
        load_weights(slab, tz, start + weights + (stage & 1) * weight_bytes);
        copy_commit();
        for (bool fresh = true, asked = false; stage < end; ++stage) {
            const int buffer = p.bricks == 2 ? slab & 1 : 0;
            // The second plane of taps needs its filters but not yet the next brick, which was asked for after them.
            if (asked && !fresh) copy_wait<1>();
            else copy_wait<0>();
            if (fresh) normalise(slab, shared + buffer * brick_bytes, real);
            __syncthreads();                                // loaded by all, and the stage before is done by all
            const bool last = tz + 1 == kz(), more = stage + 1 < end;
            if (more) {
                load_weights(last ? slab + 1 : slab, last ? 0 : tz + 1, start + weights + (~stage & 1) * weight_bytes);
                copy_commit();
            }
            asked = fresh && p.bricks == 2 && stage - tz + kz() < end;
            if (asked) {
                real = load(slab + 1, start + (buffer ^ 1) * brick_bytes);
                copy_commit();
            }
            const u32 brick = start + buffer * brick_bytes, weight = start + weights + (stage & 1) * weight_bytes;
            multiply(acc, brick, weight + filter, row + tz * rows * pitch);
            fresh = last, tz = last ? 0 : tz + 1;
            if (!last || !more) continue;
            ++slab;
            if (p.bricks == 1) {
                __syncthreads();                            // the only buffer is read no more
                real = load(slab, start);
                copy_commit();
            }
        }
        end_with(acc, f, shared);
    }

    __device__ __forceinline__ void end_with(float (&acc)[MI][NI][4], int f, unsigned char* shared) const {
        if (gridDim.y > 1) leave<WN, MI, NI, 1, WAY>(p, t, acc, f);
        else finish<T, WAY, WM, WN, MI, NI>(p, t, acc, f, shared);
    }
};

#define CONV3D(NAME, STORAGE, WAY, WM, WN, MI, NI, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, AMPERE ? BLOCKS : 1) NAME(const Conv3dParams p) {              \
        extern __shared__ __align__(128) unsigned char shared[];                                     \
        Brick<STORAGE, WAY, WM, WN, MI, NI>(p).run(shared);                                                              \
    }
