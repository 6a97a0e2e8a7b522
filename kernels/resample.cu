// targets: 75 80
// max-registers: 80
// From sums over windows to labels on the image's own grid, a plane at a time: sums are divided by what their windows
// counted, interpolated linearly, and the last 1x1x1 layer with its decision is applied to what comes out. Neither features
// nor scores of the image are ever in memory.
#include "scores.cuh"

struct ResampleParams {
    u64 sum;        // f32 [ring][h][w][channels]
    u64 counted;    // f32 [ring][h][w]
    u64 filter;     // f32 [group of 16 classes][channel][16]
    u64 bias;       // f32 [class], minus infinity for the padding
    u64 names;      // u32 [class]: the label of each
    u64 rows;       // {u32 first, u32 second, f32 weight of the second, unused} [height]
    u64 columns;    // the same [width]
    u64 labels;     // u8 or u16 [height][width]
    u64 odd;        // u32 that is set to 1 where a feature is no finite number
    int first, second;      // slots of the ring; the same where the plane is one of the grid's
    float between;          // weight of the second
    int h, w, pad_y, pad_x; // of the sums, and where the grid begins in them
    int channels, classes;  // padded to a multiple of 4, and of 16
    int height, width;      // of the image
    int tile;               // voxels of a block, twice its threads
    int wide;               // labels are u16
    int painted;            // every class above the threshold paints over those before it; else the first largest wins
    float threshold;
    int unused;
};

// Four channels of a voxel of a plane of the sums.
__device__ __forceinline__ float4 feature(const ResampleParams& p, int slot, int y, int x, int c) {
    const u64 at = ((u64)slot * p.h + p.pad_y + y) * p.w + p.pad_x + x;
    const float4 v = *(const float4*)((const float*)p.sum + at * p.channels + c);
    const float inverse = __frcp_rn(((const float*)p.counted)[at]);
    return make_float4(__fmul_rn(v.x, inverse), __fmul_rn(v.y, inverse), __fmul_rn(v.z, inverse), __fmul_rn(v.w, inverse));
}

__device__ __forceinline__ float mix(float a, float b, float w) { return __fmaf_rn(w, __fsub_rn(b, a), a); }
__device__ __forceinline__ float4 mix(float4 a, float4 b, float w) {
    return make_float4(mix(a.x, b.x, w), mix(a.y, b.y, w), mix(a.z, b.z, w), mix(a.w, b.w, w));
}

// Between the planes. What has no weight is not read: it may not be there.
__device__ __forceinline__ float4 through(const ResampleParams& p, int y, int x, int c) {
    const float4 a = feature(p, p.first, y, x, c);
    return p.between == 0.f ? a : mix(a, feature(p, p.second, y, x, c), p.between);
}

__device__ __forceinline__ float4 down(const ResampleParams& p, const uint4& row, int x, int c) {
    const float4 a = through(p, (int)row.x, x, c);
    const float w = __uint_as_float(row.z);
    return w == 0.f ? a : mix(a, through(p, (int)row.y, x, c), w);
}

__device__ __forceinline__ bool finite(float v) { return (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u; }

// A block takes `tile` voxels. Their features are interpolated once, into shared memory [channel][voxel].
extern "C" __global__ void __launch_bounds__(128) resample_labels_f32(const ResampleParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    float* features = (float*)shared;
    float* filter = features + p.channels * p.tile;
    const int threads = blockDim.x, total = p.height * p.width, start = blockIdx.x * p.tile;
    bool sound = true;
    const int quads = p.channels / 4;
    for (int i = threadIdx.x; i < p.tile * quads; i += threads) {
        // Neighbouring threads take neighbouring voxels: no two of a warp meet in a bank.
        const int v = i % p.tile, c = i / p.tile * 4;
        float4 f = make_float4(0.f, 0.f, 0.f, 0.f);
        if (start + v < total) {
            const uint4 row = ((const uint4*)p.rows)[(start + v) / p.width], column = ((const uint4*)p.columns)[(start + v) % p.width];
            f = down(p, row, (int)column.x, c);
            const float w = __uint_as_float(column.z);
            if (w != 0.f) f = mix(f, down(p, row, (int)column.y, c), w);
        }
        sound = sound && finite(f.x) && finite(f.y) && finite(f.z) && finite(f.w);
        features[c * p.tile + v] = f.x;
        features[(c + 1) * p.tile + v] = f.y;
        features[(c + 2) * p.tile + v] = f.z;
        features[(c + 3) * p.tile + v] = f.w;
    }
    if (!sound) atomicOr((u32*)p.odd, 1u);
    float best[PER_THREAD];
    u32 label[PER_THREAD];
    #pragma unroll
    for (int v = 0; v < PER_THREAD; ++v) best[v] = p.threshold, label[v] = 0;
    each_score(features, filter, p.filter, p.bias, p.channels, p.classes, p.tile, [&](int k, float (&score)[PER_THREAD][BLOCK]) {
        #pragma unroll
        for (int q = 0; q < BLOCK; ++q) {
            const u32 name = ((const u32*)p.names)[k + q];
            #pragma unroll
            for (int v = 0; v < PER_THREAD; ++v)
                if (score[v][q] > best[v]) {
                    label[v] = name;
                    if (!p.painted) best[v] = score[v][q];
                }
        }
    });
    #pragma unroll
    for (int v = 0; v < PER_THREAD; ++v) {
        const int at = start + v * threads + threadIdx.x;
        if (at >= total) continue;
        if (p.wide) ((u16*)p.labels)[at] = (u16)label[v];
        else ((u8*)p.labels)[at] = (u8)label[v];
    }
}
