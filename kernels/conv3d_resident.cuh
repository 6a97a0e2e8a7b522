// Convolution whose filters stay in shared memory, for compute capability 9.0 alone: 3 x 3 x 3 taps at stride 1, few channels
// and few filters at many voxels, where conv3d_tma.cuh would load the same filters for every brick and have its matrix units
// wait while results are written.
//
// A block lives as long as the kernel. Two groups of four warps each have tiles of their own, in turn, with bricks of their
// own: one multiplies while the other one writes. The loading and the normalising warps run ahead of both.
#pragma once
#include "conv3d_tma.cuh"

// Each group of four warps has MI planes of 64 voxels by NI * 8 filters.
template <class T, int MI, int NI>
struct Resident {
    static constexpr int CREW = THREADS / GROUPS, N = NI * 8, SIDE = 10, DEPTH = MI + 2;
    static constexpr int BRICK = (DEPTH * SIDE * SIDE * ROW + 255) / 256 * 256, COLUMN = 3 * N * ROW, RESULTS = MI * 64 * N * 2;
    static_assert(COLUMN % 256 == 0 && RESULTS % 256 == 0 && MI % 2 == 0, "boxes");

    const Conv3dTmaParams& q;
    const Conv3dParams& p;
    const int slabs, groups, units;     // of channels; of filters; tiles of all samples
    const u32 bricks, results, weights, barriers;

    __device__ __forceinline__ Resident(const Conv3dTmaParams& q, unsigned char* shared)
        : q(q), p(q.p), slabs((p.a.channels + p.b.channels) / BLOCK), groups((p.filters + N - 1) / N),
          units(p.batch * p.tiles_z * p.tiles_y * p.tiles_x), bricks(shared_address(shared)),
          results(bricks + GROUPS * BRICKS * BRICK), weights(results + GROUPS * RESULTS),
          barriers(weights + slabs * COLUMNS * COLUMN) {}

    // A brick has arrived, is normalised, is read no more; a slab's filters have arrived.
    __device__ __forceinline__ u32 arrived(int b) const { return barriers + b * 8; }
    __device__ __forceinline__ u32 ready(int b) const { return barriers + (GROUPS * BRICKS + b) * 8; }
    __device__ __forceinline__ u32 read(int b) const { return barriers + (2 * GROUPS * BRICKS + b) * 8; }
    __device__ __forceinline__ u32 filters(int slab) const { return barriers + (3 * GROUPS * BRICKS + slab) * 8; }

    // The block's first unit of work and how far it is to the next; all of them have the same filters.
    __device__ __forceinline__ int begin() const { return blockIdx.x / groups; }
    __device__ __forceinline__ int step() const { return gridDim.x / groups; }
    __device__ __forceinline__ Tile tile(int unit) const { return Tile(p, MI, N, unit * groups + blockIdx.x % groups); }

    __device__ __forceinline__ Shape shape(int slab) const { return Shape(source_of(p, slab), MI, 1); }

    __device__ __forceinline__ void start() const {
        if (threadIdx.x == 0) {
            for (int b = 0; b < GROUPS * BRICKS; ++b)
                barrier_init(arrived(b), 1), barrier_init(ready(b), NORMALISING), barrier_init(read(b), WARPS / GROUPS);
            for (int s = 0; s < slabs; ++s) barrier_init(filters(s), 1);
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }

    // What the loading and the normalising warps do for every slab of every unit, in one order: `use(tile, slab, buffer,
    // parity)` of a buffer whose contents are the parity's.
    template <class Use>
    __device__ __forceinline__ void each(Use use) const {
        int turn = 0, count = 0;        // whose unit it is; bricks that each of the groups has had before it
        for (int unit = begin(); unit < units; unit += step(), count += turn ? slabs : 0, turn ^= 1) {
            const Tile t = tile(unit);
            for (int s = 0; s < slabs; ++s) {
                const int i = count + s;
                use(t, s, turn * BRICKS + i % BRICKS, i / BRICKS & 1);
            }
        }
    }

    // One thread.
    __device__ __forceinline__ void load() const {
        bool first = true;
        each([&](const Tile& t, int slab, int b, int parity) {
            barrier_wait(read(b), parity ^ 1);
            load_brick(q, t, shape(slab), slab, bricks + b * BRICK, arrived(b));
            if (first) {
                barrier_expect(filters(slab), COLUMNS * COLUMN);
                for (int column = 0; column < COLUMNS; ++column)
                    load_box(weights + (slab * COLUMNS + column) * COLUMN, q.weight, filters(slab), 0, t.first, column, slab * 3, 0);
            }
            first = first && slab + 1 < slabs;
        });
    }

    __device__ __forceinline__ void normalise(unsigned char* shared, int thread) const {
        each([&](const Tile& t, int slab, int b, int parity) {
            normalise_brick<T, MI, 1>(p, t, slab, shared + b * BRICK, arrived(b), parity, ready(b), thread);
        });
    }

    __device__ __forceinline__ void multiply(float (&acc)[MI][NI][4], int slab, int b, int parity) const {
        const Shape s = shape(slab);
        const Voxels voxels(s, bricks + b * BRICK, 0);
        const u32 weight = weights + slab * COLUMNS * COLUMN;
        barrier_wait(filters(slab), 0);
        barrier_wait(ready(b), parity);
        u32 a[2][MI + 2][4];        // a column's voxels are multiplied while the next one's are loaded
        #pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            voxels.load(a[c & 1], c);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            #pragma unroll
            for (int z = 0; z < 3; ++z)
                #pragma unroll
                for (int m = 0; m < MI; ++m)
                    T::multiply(acc[m], a[c & 1][m + z], group_operand(weight + c * COLUMN + z * N * ROW, 8 * ROW));
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (c > 0) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        }
        // Voxels are in registers.
        if ((threadIdx.x & 31) == 0) barrier_arrive(read(b));
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }

    __device__ __forceinline__ void run(unsigned char* shared) const {
        start();
        const int warp = threadIdx.x >> 5, own = threadIdx.x / CREW;
        if (warp >= WARPS) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
            if (threadIdx.x == THREADS) load();
            if (warp > WARPS) normalise(shared, threadIdx.x - THREADS - 32);
            return;
        }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        int i = 0;                  // bricks that the group has had
        for (int unit = begin() + own * step(); unit < units; unit += GROUPS * step()) {
            float acc[MI][NI][4] = {};
            for (int slab = 0; slab < slabs; ++slab, ++i) multiply(acc, slab, own * BRICKS + i % BRICKS, i / BRICKS & 1);
            finish<T, 0, WARPS / GROUPS, 1, MI, NI, 4, CREW>(p, tile(unit), acc, warp & 3, shared + (results - bricks) + own * RESULTS);
        }
    }
};

#define CONV3D_RESIDENT(NAME, STORAGE, MI, NI)                                                                           \
    extern "C" __global__ void __launch_bounds__(ALL, 1)                                                                 \
    NAME(const __grid_constant__ Conv3dTmaParams q) {                                                                    \
        extern __shared__ __align__(1024) unsigned char shared[];                                                        \
        Resident<STORAGE, MI, NI>(q, shared).run(shared);                                                                \
    }
