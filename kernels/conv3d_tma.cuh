// Convolution from halo bricks that arrive as boxes of tensors, for compute capability 9.0 alone: 3 x 3 x 3 taps at stride 1
// or 2. At stride 1 the first source may be one of which each voxel is read twice along an axis: its box is half as long, and
// a tap finds its voxel by the address that a lane gives.
//
// Twelve warps share the work of a block. One asks for bricks and filters as soon as there is room: a box that reaches out of
// its tensor arrives with zeros there, which is the padding. Three normalise a brick where it lies. Eight, two groups of four,
// multiply. They tell each other by mbarriers, so that no part waits for more than it needs.
//
// A tap begins at any voxel of the brick. NVIDIA documents the swizzle of an operand in shared memory for rows that begin
// where its pattern does; voxels therefore go through registers, for which every lane gives ldmatrix the address of its row,
// and one that was loaded serves three planes of taps. Filters begin where the pattern does and stay in shared memory.
#pragma once
#include "conv3d.cuh"
#include "wgmma.cuh"

struct alignas(64) TensorMap { u64 opaque[16]; };

struct Conv3dTmaParams {
    TensorMap a, b;     // [N][D][H][W][channels], boxes of a brick with its halo by 16 channels; b is a where there is but one
    TensorMap weight;   // [1][slab of 16 channels and plane of taps][tap of the plane][filter][16], boxes of a tap in three planes
    Conv3dParams p;
};

constexpr int BRICKS = 2, COLUMNS = 9;              // buffers: a brick is a slab, a column one tap of three planes
constexpr int GROUPS = 2, NORMALISING = 3;          // warp groups that multiply, warps that normalise
constexpr int ALL = THREADS + (1 + NORMALISING) * 32;

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of that parity is complete; of a new barrier the phase before the first counts as complete.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// The box that begins at these coordinates, the innermost first.
__device__ __forceinline__ void load_box(u32 to, const TensorMap& map, u32 barrier, int a, int b, int c, int d, int e) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6,%7}], [%2];"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e) : "memory");
}

// 64 voxels by 16, 32, 64, 96 or 128 filters by 16 channels, added to what is there.
#define TMA_OF(NAME, BASE, TYPE)                                                                                         \
    struct NAME : BASE {                                                                                                 \
        static __device__ __forceinline__ void multiply(float (&d)[2][4], const u32 (&a)[4], u64 b) {                    \
            asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {"                                \
                         R8 "}, {%8,%9,%10,%11}, %12, 1, 1, 1, 0;"                                                       \
                         : D4(0), D4(1) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                           \
        }                                                                                                                \
        static __device__ __forceinline__ void multiply(float (&d)[4][4], const u32 (&a)[4], u64 b) {                    \
            asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {"                                \
                         R16 "}, {%16,%17,%18,%19}, %20, 1, 1, 1, 0;"                                                    \
                         : D16(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
        }                                                                                                                \
        static __device__ __forceinline__ void multiply(float (&d)[8][4], const u32 (&a)[4], u64 b) {                    \
            asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                \
                         R32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"                                                    \
                         : D32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
        }                                                                                                                \
        static __device__ __forceinline__ void multiply(float (&d)[12][4], const u32 (&a)[4], u64 b) {                   \
            asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32." TYPE "." TYPE " {"                                \
                         R48 "}, {%48,%49,%50,%51}, %52, 1, 1, 1, 0;"                                                    \
                         : D32(0), D16(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                         \
        }                                                                                                                \
        static __device__ __forceinline__ void multiply(float (&d)[16][4], const u32 (&a)[4], u64 b) {                   \
            asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                               \
                         R64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"                                                    \
                         : D32(0), D32(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                         \
        }                                                                                                                \
    };
// How a source lies in a brick of so many planes of output: voxels of its rows, rows of its planes, planes; how far its
// coordinates are shifted. Of voxels that are read twice, the ten of a row are six.
struct Shape {
    int stride, side_x, side_y, depth, shift_x, shift_y, shift_z;
    __device__ __forceinline__ Shape(const Source& s, int planes, int stride) : stride(stride) {
        // At stride 2 no source is repeated.
        shift_x = stride == 1 ? s.shift_x : 0, shift_y = stride == 1 ? s.shift_y : 0, shift_z = stride == 1 ? s.shift_z : 0;
        side_x = shift_x ? 6 : 7 * stride + 3, side_y = shift_y ? 6 : 7 * stride + 3;
        depth = shift_z ? planes / 2 + 2 : (planes - 1) * stride + 3;
    }
    __device__ __forceinline__ int voxels() const { return depth * side_y * side_x; }
    // Where the brick of a tile begins, in the source's own voxels.
    __device__ __forceinline__ int x(const Tile& t) const { return (t.x0 * stride >> shift_x) - 1; }
    __device__ __forceinline__ int y(const Tile& t) const { return (t.y0 * stride >> shift_y) - 1; }
    __device__ __forceinline__ int z(const Tile& t) const { return (t.z0 * stride >> shift_z) - 1; }
};
__device__ __forceinline__ bool is_second(const Conv3dParams& p, int slab) { return slab * BLOCK >= p.a.channels; }
__device__ __forceinline__ const Source& source_of(const Conv3dParams& p, int slab) { return is_second(p, slab) ? p.b : p.a; }

// Asks for the brick of a slab.
__device__ __forceinline__ void load_brick(const Conv3dTmaParams& q, const Tile& t, const Shape& s, int slab, u32 to, u32 arrived) {
    barrier_expect(arrived, s.voxels() * ROW);
    const int c = slab * BLOCK;
    if (is_second(q.p, slab)) load_box(to, q.b, arrived, c - q.p.a.channels, s.x(t), s.y(t), s.z(t), t.n);
    else load_box(to, q.a, arrived, c, s.x(t), s.y(t), s.z(t), t.n);
}

// Normalises the brick of a slab where it lies, if it is to be, from when it has arrived; then it is ready. Padding stays zero. A
// thread of those that normalise has a quarter of every voxel's channels.
template <class T, int PLANES, int STRIDE>
__device__ __forceinline__ void normalise_brick(const Conv3dParams& p, const Tile& t, int slab, unsigned char* brick, u32 arrived,
                                                u32 parity, u32 ready, int thread) {
    const Source& source = source_of(p, slab);
    Norm4 affine;
    if (source.norm)
        affine.load((const float*)source.norm + (u64)t.n * 3 * source.channels, source.channels,
                    slab * BLOCK - (is_second(p, slab) ? p.a.channels : 0) + (thread & 3) * 4);
    barrier_wait(arrived, parity);
    if (source.norm) {
        const Shape s(source, PLANES, STRIDE);
        const int x0 = s.x(t), y0 = s.y(t), z0 = s.z(t);
        // n * by >> 16 = n / side for the numbers of a brick.
        const u32 by_x = 65536 / s.side_x + 1, by_y = 65536 / s.side_y + 1;
        #pragma unroll 1
        for (int at = thread >> 2; at < s.voxels(); at += NORMALISING * 8) {
            const int row = at * by_x >> 16, slice = row * by_y >> 16;
            const int z = z0 + slice, y = y0 + row - slice * s.side_y, x = x0 + at - row * s.side_x;
            if ((u32)z >= (u32)source.d || (u32)y >= (u32)source.h || (u32)x >= (u32)source.w) continue;
            uint2* v = (uint2*)(brick + swizzle<ROW>(at * ROW + (thread & 3) * 8));
            *v = affine.template apply<T>(*v, source.slope);
        }
        // The next box of this buffer comes by the asynchronous proxy, and after these writes.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    if ((thread & 31) == 0) barrier_arrive(ready);
}

// A lane's voxels of a brick: those of its row of the output's planes from `plane` on, tap by tap.
struct Voxels {
    const Shape& s;
    const u32 from;
    int across[3], y, z;        // where a tap's voxel is in its row; a box of halves begins with half a voxel
    __device__ __forceinline__ Voxels(const Shape& s, u32 brick, int plane) : s(s), from(brick) {
        const int r = threadIdx.x & 15;
        #pragma unroll
        for (int k = 0; k < 3; ++k) across[k] = ((r & 7) * s.stride + k + s.shift_x) >> s.shift_x;
        y = ((threadIdx.x >> 5 & 3) * 2 + (r >> 3)) * s.stride + s.shift_y, z = plane * s.stride + s.shift_z;
    }
    template <int PLANES>
    __device__ __forceinline__ void load(u32 (&a)[PLANES][4], int column) const {
        const int row = ((y + column / 3) >> s.shift_y) * s.side_x + across[column % 3], half = (threadIdx.x >> 4 & 1) * 16;
        #pragma unroll
        for (int k = 0; k < PLANES; ++k) {
            const int at = row + ((z + k) >> s.shift_z) * s.side_y * s.side_x;
            load_matrices(a[k], from + swizzle<ROW>(at * ROW + half));
        }
    }
};

// Each group of four warps has MI planes of 64 voxels by NI * 8 filters. Of the registers that a block begins with, threads
// that load or normalise keep FEW, and those that multiply take MANY. STRIDE is that of every axis.
template <class T, int MI, int NI, int FEW, int MANY, int STRIDE>
struct Boxes {
    static constexpr int TZ = GROUPS * MI, N = NI * 8;
    // Voxels along an axis of the largest brick, and planes of it; planes that a group reads.
    static constexpr int SIDE = 7 * STRIDE + 3, DEPTH = (TZ - 1) * STRIDE + 3, PLANES = (MI - 1) * STRIDE + 3;
    // The swizzle of 32 bytes repeats after 256.
    static constexpr int BRICK = (DEPTH * SIDE * SIDE * ROW + 255) / 256 * 256, COLUMN = 3 * N * ROW;
    static_assert(COLUMN % 256 == 0 && TZ % 2 == 0, "boxes");

    const Conv3dTmaParams& q;
    const Conv3dParams& p;
    const Tile t;
    const u32 bricks, weights, barriers;
    int first, count;           // slabs of this part

    __device__ __forceinline__ Boxes(const Conv3dTmaParams& q, unsigned char* shared)
        : q(q), p(q.p), t(q.p, TZ, N), bricks(shared_address(shared)), weights(bricks + BRICKS * BRICK),
          barriers(weights + COLUMNS * COLUMN) {
        const int slabs = (p.a.channels + p.b.channels) / BLOCK;
        first = slabs * blockIdx.y / gridDim.y, count = slabs * (blockIdx.y + 1) / gridDim.y - first;
    }

    // A brick has arrived, is normalised, is read no more; a column has arrived, is read no more.
    __device__ __forceinline__ u32 arrived(int b) const { return barriers + b * 8; }
    __device__ __forceinline__ u32 ready(int b) const { return barriers + (BRICKS + b) * 8; }
    __device__ __forceinline__ u32 read(int b) const { return barriers + (2 * BRICKS + b) * 8; }
    __device__ __forceinline__ u32 column_arrived(int c) const { return barriers + (3 * BRICKS + c) * 8; }
    __device__ __forceinline__ u32 column_read(int c) const { return barriers + (3 * BRICKS + COLUMNS + c) * 8; }

    __device__ __forceinline__ Shape shape(int slab) const { return Shape(source_of(p, slab), TZ, STRIDE); }

    __device__ __forceinline__ void start() const {
        if (threadIdx.x == 0) {
            for (int b = 0; b < BRICKS; ++b)
                barrier_init(arrived(b), 1), barrier_init(ready(b), NORMALISING), barrier_init(read(b), WARPS);
            for (int c = 0; c < COLUMNS; ++c) barrier_init(column_arrived(c), 1), barrier_init(column_read(c), WARPS);
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }

    // One thread.
    __device__ __forceinline__ void load() const {
        for (int i = 0; i < count; ++i) {
            const int b = i % BRICKS;
            barrier_wait(read(b), (i / BRICKS & 1) ^ 1);
            load_brick(q, t, shape(first + i), first + i, bricks + b * BRICK, arrived(b));
            for (int column = 0; column < COLUMNS; ++column) {
                barrier_wait(column_read(column), (i & 1) ^ 1);
                barrier_expect(column_arrived(column), COLUMN);
                load_box(weights + column * COLUMN, q.weight, column_arrived(column), 0, t.first, column, (first + i) * 3, 0);
            }
        }
    }

    __device__ __forceinline__ void normalise(unsigned char* shared, int thread) const {
        for (int i = 0; i < count; ++i) {
            const int b = i % BRICKS;
            normalise_brick<T, TZ, STRIDE>(p, t, first + i, shared + b * BRICK, arrived(b), i / BRICKS & 1, ready(b), thread);
        }
    }

    __device__ __forceinline__ void multiply(float (&acc)[MI][NI][4]) const {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        #pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const int b = i % BRICKS;
            const Shape s = shape(first + i);
            const Voxels voxels(s, bricks + b * BRICK, (warp >> 2) * MI);
            barrier_wait(ready(b), i / BRICKS & 1);
            u32 a[2][PLANES][4];        // a column's voxels are multiplied while the next one's are loaded
            #pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                voxels.load(a[c & 1], c);
                barrier_wait(column_arrived(c), i & 1);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                #pragma unroll
                for (int z = 0; z < 3; ++z)
                    #pragma unroll
                    for (int m = 0; m < MI; ++m)
                        T::multiply(acc[m], a[c & 1][m * STRIDE + z], group_operand(weights + c * COLUMN + z * N * ROW, 8 * ROW));
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (c > 0) {
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    if (lane == 0) barrier_arrive(column_read(c - 1));
                }
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (lane == 0) barrier_arrive(column_read(COLUMNS - 1)), barrier_arrive(read(b));
        }
    }

    __device__ __forceinline__ void run(unsigned char* shared) const {
        start();
        const int warp = threadIdx.x >> 5;
        if (warp >= WARPS) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
            if (threadIdx.x == THREADS) load();
            if (warp > WARPS) normalise(shared, threadIdx.x - THREADS - 32);
            return;
        }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
        float acc[MI][NI][4] = {};
        multiply(acc);
        const int fragment = (warp >> 2) * MI * 4 + (warp & 3);
        if (gridDim.y > 1) leave<1, MI, NI, 4>(p, t, acc, fragment);
        else finish<T, 0, WARPS, 1, MI, NI, 4, THREADS>(p, t, acc, fragment, shared);
    }
};

// More than there were at the beginning would be waited for without end.
#define CONV3D_TMA(NAME, STORAGE, MI, NI, BLOCKS, FEW, MANY, STRIDE)                                                     \
    static_assert(FEW + GROUPS * MANY <= 65536 / (BLOCKS * ALL) / 8 * 8 * (GROUPS + 1), "registers");                    \
    extern "C" __global__ void __launch_bounds__(ALL, BLOCKS)                                                            \
    NAME(const __grid_constant__ Conv3dTmaParams q) {                                                                    \
        extern __shared__ __align__(1024) unsigned char shared[];                                                        \
        Boxes<STORAGE, MI, NI, FEW, MANY, STRIDE>(q, shared).run(shared);                                               \
    }
