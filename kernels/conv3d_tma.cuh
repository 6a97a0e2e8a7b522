// Convolution from halo bricks that arrive as boxes of tensors, for compute capability 9.0 alone: 3 x 3 x 3 taps at stride 1,
// sources that are read at their own size.
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

struct alignas(64) TensorMap { u64 opaque[16]; };

struct Conv3dTmaParams {
    TensorMap a, b;     // [N][D][H][W][channels], boxes of a brick with its halo by 16 channels; b is a where there is but one
    TensorMap weight;   // [1][slab of 16 channels and plane of taps][tap of the plane][filter][16], boxes of a tap in three planes
    Conv3dParams p;
};

constexpr int SIDE = 10, PLANE_ROWS = SIDE * SIDE;  // voxels of a brick's row and plane
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

// 64 voxels by 32, 64 or 128 filters by 16 channels, added to what is there.
#define TMA_OF(NAME, BASE, TYPE)                                                                                         \
    struct NAME : BASE {                                                                                                 \
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
        static __device__ __forceinline__ void multiply(float (&d)[16][4], const u32 (&a)[4], u64 b) {                   \
            asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                               \
                         R64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"                                                    \
                         : D32(0), D32(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                         \
        }                                                                                                                \
    };
// Each group of four warps has MI planes of 64 voxels by NI * 8 filters. Of the registers that a block begins with, threads
// that load or normalise keep FEW, and those that multiply take MANY.
template <class T, int MI, int NI, int FEW, int MANY>
struct Boxes {
    static constexpr int TZ = GROUPS * MI, N = NI * 8;
    static constexpr int BRICK = (TZ + 2) * PLANE_ROWS * ROW, COLUMN = 3 * N * ROW;
    static_assert(BRICK % 256 == 0 && COLUMN % 256 == 0, "the swizzle of 32 bytes repeats after 256");

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
            const int b = i % BRICKS, c = (first + i) * BLOCK;
            barrier_wait(read(b), (i / BRICKS & 1) ^ 1);
            barrier_expect(arrived(b), BRICK);
            const int x = t.x0 - 1, y = t.y0 - 1, z = t.z0 - 1;
            if (c < p.a.channels) load_box(bricks + b * BRICK, q.a, arrived(b), c, x, y, z, t.n);
            else load_box(bricks + b * BRICK, q.b, arrived(b), c - p.a.channels, x, y, z, t.n);
            for (int column = 0; column < COLUMNS; ++column) {
                barrier_wait(column_read(column), (i & 1) ^ 1);
                barrier_expect(column_arrived(column), COLUMN);
                load_box(weights + column * COLUMN, q.weight, column_arrived(column), 0, t.first, column, (first + i) * 3, 0);
            }
        }
    }

    // Padding stays zero. A thread has one half of every voxel's channels.
    __device__ __forceinline__ void normalise(unsigned char* shared, int thread) const {
        for (int i = 0; i < count; ++i) {
            const int b = i % BRICKS, slab = first + i;
            const bool second = slab * BLOCK >= p.a.channels;
            const u64 norm = second ? p.b.norm : p.a.norm;
            const int channels = second ? p.b.channels : p.a.channels;
            const float slope = second ? p.b.slope : p.a.slope;
            Norm8 affine;
            if (norm)
                affine.load((const float*)norm + (u64)t.n * 3 * channels, channels,
                            slab * BLOCK - (second ? p.a.channels : 0) + (thread & 1) * 8);
            barrier_wait(arrived(b), i / BRICKS & 1);
            if (norm) {
                #pragma unroll 2
                for (int row = thread >> 1; row < (TZ + 2) * PLANE_ROWS; row += NORMALISING * 16) {
                    const int z = t.z0 - 1 + row / PLANE_ROWS, y = t.y0 - 1 + row / SIDE % SIDE, x = t.x0 - 1 + row % SIDE;
                    if ((u32)z >= (u32)p.d || (u32)y >= (u32)p.h || (u32)x >= (u32)p.w) continue;
                    uint4* v = (uint4*)(shared + b * BRICK + swizzle<ROW>(row * ROW + (thread & 1) * 16));
                    *v = affine.template apply<T>(*v, slope);
                }
                // The next box of this buffer comes by the asynchronous proxy, and after these writes.
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            }
            __syncwarp();
            if ((thread & 31) == 0) barrier_arrive(ready(b));
        }
    }

    __device__ __forceinline__ void multiply(float (&acc)[MI][NI][4]) const {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane & 15;
        const int row = (warp >> 2) * MI * PLANE_ROWS + ((warp & 3) * 2 + (r >> 3)) * SIDE + (r & 7);
        #pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const int b = i % BRICKS;
            barrier_wait(ready(b), i / BRICKS & 1);
            u32 a[2][MI + 2][4];        // a column's voxels are multiplied while the next one's are loaded
            #pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                #pragma unroll
                for (int k = 0; k < MI + 2; ++k) {
                    const int at = row + k * PLANE_ROWS + c / 3 * SIDE + c % 3;
                    load_matrices(a[c & 1][k], bricks + b * BRICK + swizzle<ROW>(at * ROW + (lane >> 4) * 16));
                }
                barrier_wait(column_arrived(c), i & 1);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                #pragma unroll
                for (int z = 0; z < 3; ++z)
                    #pragma unroll
                    for (int m = 0; m < MI; ++m) T::multiply(acc[m], a[c & 1][m + z], group_operand(weights + c * COLUMN + z * N * ROW, 8 * ROW));
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
        else finish<T, 0, WARPS, 1, MI, NI, 4, true>(p, t, acc, fragment, shared);
    }
};

// More than there were at the beginning would be waited for without end.
#define CONV3D_TMA(NAME, STORAGE, MI, NI, BLOCKS, FEW, MANY)                                                             \
    static_assert(FEW + GROUPS * MANY <= 65536 / (BLOCKS * ALL) / 8 * 8 * (GROUPS + 1), "registers");                    \
    extern "C" __global__ void __launch_bounds__(ALL, BLOCKS)                                                            \
    NAME(const __grid_constant__ Conv3dTmaParams q) {                                                                    \
        extern __shared__ __align__(1024) unsigned char shared[];                                                        \
        Boxes<STORAGE, MI, NI, FEW, MANY>(q, shared).run(shared);                                                       \
    }
