// targets: 75 80
// max-registers: 96
// Affine maps of a grid: images are interpolated linearly, labels are those with the largest interpolated share. Arithmetic
// and its order are those of the processor's warp, so that labels are the same to the last tie.
#include "common.cuh"

struct WarpParams {
    u64 image, labels;              // f32 [C][source], i16 [source]
    u64 image_out, labels_out;      // f32 [C][grid], i16 [grid]
    double matrix[9], shift[3];     // of (z, y, x)
    int channels;
    int source[3], grid[3];
    int odd[3];                     // the source begins at an odd voxel of its volume
};

// Where a voxel of the grid lies: the corner before it, and its shares of the corners after it.
struct Place {
    u64 corner;
    int voxel[3];
    float share[3];
};

template <int FIRST>
__device__ __forceinline__ Place place(const WarpParams& p, int z, int y, int x) {
    Place at;
    at.corner = FIRST ? (u64)z * p.source[1] * p.source[2] : 0;
    at.voxel[0] = 0, at.share[0] = 0.f;
    #pragma unroll
    for (int k = FIRST; k < 3; ++k) {
        const double* row = p.matrix + 3 * k;
        const float begin = (float)__dadd_rn(__dadd_rn(p.shift[k], __dmul_rn(row[0], z)), __dmul_rn(row[1], y));
        const float last = (float)(p.source[k] - 1);
        float v = __fadd_rn(begin, __fmul_rn((float)row[2], (float)x));
        v = v > 0.f ? v : 0.f;      // also of NaN
        v = v < last ? v : last;
        const int i = min((int)v, p.source[k] - 2);
        const u64 stride = k == 0 ? (u64)p.source[1] * p.source[2] : k == 1 ? p.source[2] : 1;
        at.voxel[k] = i, at.share[k] = __fsub_rn(v, (float)i), at.corner += i * stride;
    }
    return at;
}

__device__ __forceinline__ float between(float a, float b, float share) { return __fmaf_rn(share, __fsub_rn(b, a), a); }

// Rounded to the eleven bits of a half-precision number, ties to even.
__device__ __forceinline__ float eleven_bits(float x) {
    const u32 bits = __float_as_uint(x);
    return __uint_as_float((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
}

template <int CORNERS>
__device__ __forceinline__ float score(const int (&labels)[CORNERS], const float (&weight)[CORNERS], int label) {
    float sum = 0.f;
    #pragma unroll
    for (int c = 0; c < CORNERS; ++c) sum = __fadd_rn(sum, labels[c] == label ? weight[c] : 0.f);
    return eleven_bits(sum);
}

// The label with the largest share, shares rounded as nnU-Net rounds them: thousandths in half precision. Where several
// have it, the label of the nearest voxel if it is one of them, else the smallest.
template <int CORNERS>
__device__ __forceinline__ int winner(const WarpParams& p, const Place& at, const int (&labels)[CORNERS]) {
    float weight[CORNERS];
    #pragma unroll
    for (int c = 0; c < CORNERS; ++c) {
        const float z = c & 4 ? at.share[0] : __fsub_rn(1.f, at.share[0]), y = c & 2 ? at.share[1] : __fsub_rn(1.f, at.share[1]),
                    x = c & 1 ? at.share[2] : __fsub_rn(1.f, at.share[2]);
        weight[c] = __fmul_rn(1000.f, __fmul_rn(z, __fmul_rn(y, x)));
    }
    int best = labels[0];
    float most = score(labels, weight, best);
    bool tied = false;
    #pragma unroll
    for (int c = 1; c < CORNERS; ++c) {
        bool seen = false;
        #pragma unroll
        for (int b = 0; b < c; ++b) seen |= labels[b] == labels[c];
        if (seen) continue;
        const float s = score(labels, weight, labels[c]);
        if (s > most)
            best = labels[c], most = s, tied = false;
        else if (s == most)
            best = min(best, labels[c]), tied = true;
    }
    if (!tied) return best;
    int nearest = 0;
    #pragma unroll
    for (int k = CORNERS == 8 ? 0 : 1; k < 3; ++k)
        if (at.share[k] > 0.5f || (at.share[k] == 0.5f && (at.voxel[k] & 1) != p.odd[k])) nearest |= 4 >> k;
    int label = labels[0];
    #pragma unroll
    for (int c = 1; c < CORNERS; ++c)
        if (c == nearest) label = labels[c];
    return score(labels, weight, label) == most ? label : best;
}

// A thread takes a voxel of the grid. CORNERS is 8, or 4 in planes, whose plane z is plane z of the source.
template <int CORNERS>
__device__ __forceinline__ void warp(const WarpParams& p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, grid = (u64)p.grid[0] * p.grid[1] * p.grid[2];
    if (i >= grid) return;
    const int x = (int)(i % p.grid[2]), y = (int)(i / p.grid[2] % p.grid[1]), z = (int)(i / ((u64)p.grid[1] * p.grid[2]));
    const Place at = place<CORNERS == 8 ? 0 : 1>(p, z, y, x);
    const u64 w = p.source[2], plane = w * p.source[1], source = plane * p.source[0];
    const u64 rows[4] = {0, w, plane, plane + w};
    for (int c = 0; c < p.channels; ++c) {
        const float* from = (const float*)p.image + c * source + at.corner;
        float planes[2];
        #pragma unroll
        for (int k = 0; k < CORNERS / 4; ++k) {
            const float *a = from + rows[2 * k], *b = from + rows[2 * k + 1];
            planes[k] = between(between(a[0], a[1], at.share[2]), between(b[0], b[1], at.share[2]), at.share[1]);
        }
        ((float*)p.image_out)[c * grid + i] = CORNERS == 8 ? between(planes[0], planes[1], at.share[0]) : planes[0];
    }
    int labels[CORNERS];
    bool same = true;
    #pragma unroll
    for (int c = 0; c < CORNERS; ++c) {
        labels[c] = ((const short*)p.labels)[at.corner + rows[c / 2] + c % 2];
        same &= labels[c] == labels[0];
    }
    ((short*)p.labels_out)[i] = (short)(same ? labels[0] : winner<CORNERS>(p, at, labels));
}

extern "C" __global__ void __launch_bounds__(256) warp_volumes(const WarpParams p) { warp<8>(p); }
extern "C" __global__ void __launch_bounds__(256) warp_planes(const WarpParams p) { warp<4>(p); }
