// targets: 75 80
// max-registers: 64
// What head_loss.cu leaves is put together in a fixed order: sums of blocks, and the loss of the sums. And labels at the size
// of the scores that they are compared with.
#include "common.cuh"

constexpr int THREADS = 256;

// Sums of rows.
struct MergeParams {
    u64 from;       // f32 [grid's second dimension][row][stride]
    u64 to;         // f32 [grid's second dimension][the first `split` columns]
    u64 rest;       // f32 [the others]
    int rows, stride, columns, split;
};

constexpr int STRANDS = 32;

// A block has 32 columns; its strand k the rows k, k + 32, ...
extern "C" __global__ void __launch_bounds__(32 * STRANDS) head_loss_merge(const MergeParams p) {
    __shared__ double sums[STRANDS][32];
    const int lane = threadIdx.x % 32, strand = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const float* from = (const float*)p.from + (u64)blockIdx.y * p.rows * p.stride + column;
    double sum = 0;
    if (column < p.columns)
        #pragma unroll 4
        for (int i = strand; i < p.rows; i += STRANDS) sum += from[(u64)i * p.stride];
    sums[strand][lane] = sum;
    __syncthreads();
    if (strand || column >= p.columns) return;
    #pragma unroll 4
    for (int i = 1; i < STRANDS; ++i) sum += sums[i][lane];
    float* to = column < p.split ? (float*)p.to + (u64)blockIdx.y * p.split + column : (float*)p.rest + (column - p.split);
    *to = (float)sum;
}

// The loss of sums, and how it grows with them.
struct TermsParams {
    u64 sums;       // f32 [N][intersection, predicted, truth][class], of which every sample has its cross-entropy and its
                    // number of voxels behind it
    u64 slopes;     // as HeadLossParams
    u64 value;      // f32
    double cross_entropy, dice, smooth;
    double count;   // what the cross-entropy is divided by; 0: by the voxels that take part
    int classes;    // padded
    int real;       // without padding
    int first;      // the first that counts in Dice
    int batch, by_sample;
    int unused;
};

extern "C" __global__ void __launch_bounds__(THREADS) head_loss_terms(const TermsParams p) {
    __shared__ double parts[THREADS];
    const int groups = p.by_sample ? p.batch : 1, columns = 3 * p.classes + 2;
    const float* sums = (const float*)p.sums;
    float* slopes = (float*)p.slopes;
    const double each = p.dice / ((double)groups * max(p.real - p.first, 1));
    double part = 0;
    for (int i = threadIdx.x; i < groups * p.classes; i += THREADS) {
        const int group = i / p.classes, k = i % p.classes;
        double both = 0, volume = 0;
        for (int n = group; n < p.batch; n += groups) {
            const float* of = sums + (u64)n * columns + k;
            both += of[0], volume += (double)of[p.classes] + of[2 * p.classes];
        }
        const bool counts = p.dice != 0 && k >= p.first && k < p.real, raised = volume + p.smooth < 1e-8;
        const double denominator = raised ? 1e-8 : volume + p.smooth, numerator = 2 * both + p.smooth;
        const double ratio = each / denominator;
        if (counts) part -= ratio * numerator;
        // A denominator that was raised does not grow.
        slopes[(u64)group * 2 * p.classes + k] = counts ? (float)(-2 * ratio) : 0.f;
        slopes[((u64)group * 2 + 1) * p.classes + k] = counts && !raised ? (float)(ratio * numerator / denominator) : 0.f;
    }
    parts[threadIdx.x] = part;
    __syncthreads();
    if (threadIdx.x) return;
    double value = 0, entropy = 0, valid = 0;
    for (int i = 0; i < THREADS; ++i) value += parts[i];
    for (int n = 0; n < p.batch; ++n) {
        entropy += sums[(u64)(n + 1) * columns - 2], valid += sums[(u64)(n + 1) * columns - 1];
    }
    const double count = p.count != 0 ? p.count : valid;
    const double slope = p.cross_entropy != 0 && count > 0 ? p.cross_entropy / count : 0;
    if (slope != 0) value += slope * entropy;
    // So is told that a label is no class, whatever the weights.
    if (entropy != entropy) value = entropy;
    slopes[(u64)groups * 2 * p.classes] = (float)slope;
    *(float*)p.value = (float)value;
}

// Labels at another size: each voxel has that of the nearest one.
struct LabelsParams {
    u64 from, to;   // u16 [N][D][H][W]
    int from_d, from_h, from_w;
    int d, h, w;
    int batch;
    int unused;
};

__device__ __forceinline__ int nearest(int i, int from, int to) { return (2 * i + 1) * from / (2 * to); }

extern "C" __global__ void __launch_bounds__(THREADS) head_loss_labels(const LabelsParams p) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= p.batch * p.d * p.h * p.w) return;
    const int x = i % p.w, y = i / p.w % p.h, z = i / (p.w * p.h) % p.d, n = i / (p.w * p.h * p.d);
    const u64 row = ((u64)n * p.from_d + nearest(z, p.from_d, p.d)) * p.from_h + nearest(y, p.from_h, p.h);
    ((u16*)p.to)[i] = ((const u16*)p.from)[row * p.from_w + nearest(x, p.from_w, p.w)];
}
