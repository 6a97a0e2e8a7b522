// targets: 75 80
// max-registers: 128
// The last 1x1x1 layer with cross-entropy and soft Dice of its scores, and the gradients by its input, filter and bias:
// neither scores nor their gradient are ever in memory. A warp computes the scores of its voxels 16 classes at a time, twice:
// first what a softmax needs of all of them, then the probabilities and what becomes of them. Features and filter are read
// as the fragments of matrices that they are needed as, without shared memory: the order of the channels in a product is
// free, so that a lane takes four neighbours of each 16, which is 8 bytes, and the lanes of a warp whole sectors.
#include "common.cuh"

struct HeadLossParams {
    u64 features;   // [N][voxel][C]
    u64 weight;     // [slab of 16 channels][class][16]
    u64 bias;       // f32 [class], or 0
    u64 labels;     // u16 [N][voxel]
    u64 members;    // u16 [label][16 classes], a bit for each that the label is in, the last row for all higher labels; or
                    // 0: a class is a label
    u64 slopes;     // f32 [sample or batch][intersection, predicted][class], cross-entropy
    u64 partials;   // forward f32 [N][block][intersection, predicted, truth][class], of which every block has its
                    // cross-entropy and its number of voxels behind it; backward f32 [block][part][weight, bias]
    u64 gradient;   // of the features
    int channels;   // padded
    int classes;    // padded
    int real;       // classes without padding
    int voxels, batch;
    int tiles;      // of a sample
    int rows;       // of members
    int ignore;     // a label, or -1
    int by_sample;  // slopes are of samples
    int width;      // 16 classes that the warps of a block share in the gradient of the filter: 1, 2, 4 or 8
    float scale;    // of the gradients
    int unused;
};

constexpr int THREADS = 256, WARPS = THREADS / 32, ROW = 32;

// With f32 storage products are plain sums, and elementary functions as good as f32.
struct Wide { static constexpr bool EXACT = true; };
template <class T>
struct Half : T { static constexpr bool EXACT = false; };

// For a lambda, so that nothing is decided inside of the innermost loops.
template <bool V>
struct Known { static constexpr bool value = V; };
template <class T>
__device__ __forceinline__ float exponential(float x) {
    const float power = __fmul_rn(x, 1.44269504f);
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(power));
    if constexpr (!T::EXACT) return y;
    // What the product and its factor have lost; of a power that is infinite it is not a number.
    const float lost = __fmaf_rn(x, 1.92596303e-8f, __fmaf_rn(x, 1.44269504f, -power));
    return power > -150.f ? __fmaf_rn(y, lost * 0.693147181f, y) : y;
}
template <class T>
__device__ __forceinline__ float reciprocal(float x) {
    if constexpr (T::EXACT) return __frcp_rn(x);
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
template <class T>
__device__ __forceinline__ float logarithm(float x) {
    if constexpr (T::EXACT) return logf(x);
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y * 0.693147181f;
}

// log(1 + e) for e from 0 to 1, by the series of the area tangent; relative errors are small everywhere.
template <class T>
__device__ __forceinline__ float log_one_plus(float e) {
    const float x = e * reciprocal<T>(2.f + e), q = x * x;
    float y = 1.f / 13;
    y = __fmaf_rn(y, q, 1.f / 11), y = __fmaf_rn(y, q, 1.f / 9), y = __fmaf_rn(y, q, 1.f / 7);
    y = __fmaf_rn(y, q, 1.f / 5), y = __fmaf_rn(y, q, 1.f / 3), y = __fmaf_rn(y, q, 1.f);
    return 2.f * x * y;
}

// What is true of a voxel.
struct Truth {
    int label;      // or the row of members
    bool valid;     // it takes part
    bool strange;   // its label is no class
    __device__ __forceinline__ void load(const HeadLossParams& p, int n, int voxel) {
        label = voxel < p.voxels ? ((const u16*)p.labels)[(u64)n * p.voxels + voxel] : 0;
        const bool known = p.members || label < p.real;
        valid = voxel < p.voxels && label != p.ignore;
        strange = valid && !known, valid = valid && known;
        if (p.members) label = min(label, p.rows - 1);
    }
    // A bit for each of the classes k to k + 15 that it is in.
    __device__ __forceinline__ u32 bits(const HeadLossParams& p, int k) const {
        if (!valid) return 0;
        if (p.members) return ((const u16*)p.members)[(label * p.classes + k) / BLOCK];
        return (label ^ k) < BLOCK ? 1u << label % BLOCK : 0;
    }
};

// The features of a warp's 16 * MI voxels, of which a lane has number g = lane / 4 and every eighth further. Up to SLABS
// slabs are held in registers; with 0 they are read again each time.
template <class T, int SLABS, int MI>
struct Left {
    const unsigned char* at;    // of the lane's first voxel
    int channels;
    u32 inside;                 // a bit for each voxel
    uint2 held[SLABS ? SLABS : 1][MI][2];

    __device__ __forceinline__ uint2 read(int slab, int i, int h) const {
        const u16* from = (const u16*)at + (u64)(i * 16 + h * 8) * channels + slab * BLOCK + threadIdx.x % 4 * 4;
        return inside >> (2 * i + h) & 1 ? *(const uint2*)from : make_uint2(0, 0);
    }
    // From voxel `first` of the sample on.
    __device__ __forceinline__ Left(const HeadLossParams& p, int n, int first) : channels(p.channels) {
        const int g = threadIdx.x % 32 / 4;
        at = (const unsigned char*)p.features + ((u64)n * p.voxels + first + g) * channels * (T::EXACT ? 4 : 2);
        inside = 0;
        #pragma unroll
        for (int r = 0; r < 2 * MI; ++r) inside |= (first + g + r * 8 < p.voxels ? 1u : 0u) << r;
        #pragma unroll
        for (int s = 0; s < SLABS; ++s)
            #pragma unroll
            for (int i = 0; i < MI; ++i)
                #pragma unroll
                for (int h = 0; h < 2; ++h) held[s][i][h] = s * BLOCK < channels ? read(s, i, h) : make_uint2(0, 0);
    }
    __device__ __forceinline__ void fragment(int slab, int i, u32 (&a)[4]) const {
        const uint2 low = SLABS ? held[SLABS ? slab : 0][i][0] : read(slab, i, 0);
        const uint2 high = SLABS ? held[SLABS ? slab : 0][i][1] : read(slab, i, 1);
        a[0] = low.x, a[1] = high.x, a[2] = low.y, a[3] = high.y;
    }
};

// The scores of classes k to k + 15 as products lie: of the lane's voxel 16 i + 8 h + g, those of the classes
// k + 8 j + 2 (lane % 4) + e are z[i][j][2 h + e]. Minus infinity where there is no such class.
template <class T, int SLABS, int MI>
__device__ __forceinline__ void scores(const HeadLossParams& p, const Left<T, SLABS, MI>& left, int k, float (&z)[MI][2][4]) {
    const int column = k + threadIdx.x % 4 * 2, slabs = p.channels / BLOCK;
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float2 bias = p.bias ? *(const float2*)((const float*)p.bias + column + j * 8) : make_float2(0.f, 0.f);
        #pragma unroll
        for (int i = 0; i < MI; ++i) z[i][j][0] = z[i][j][2] = bias.x, z[i][j][1] = z[i][j][3] = bias.y;
    }
    if constexpr (T::EXACT) {
        for (int c = 0; c < p.channels; c += 4) {
            const float* w = (const float*)p.weight + ((u64)(c / BLOCK) * p.classes + column) * BLOCK + c % BLOCK;
            #pragma unroll
            for (int r = 0; r < 2 * MI; ++r) {
                float4 f = make_float4(0.f, 0.f, 0.f, 0.f);
                if (left.inside >> r & 1) f = *(const float4*)((const float*)left.at + (u64)r * 8 * p.channels + c);
                #pragma unroll
                for (int q = 0; q < 4; ++q) {
                    const float4 v = *(const float4*)(w + (q / 2 * 8 + q % 2) * BLOCK);
                    float& to = z[r / 2][q / 2][r % 2 * 2 + q % 2];
                    to = __fmaf_rn(f.x, v.x, to), to = __fmaf_rn(f.y, v.y, to);
                    to = __fmaf_rn(f.z, v.z, to), to = __fmaf_rn(f.w, v.w, to);
                }
            }
        }
    } else {
        auto multiply = [&](int s) {
            // Of the lane's classes k + g and k + g + 8.
            const uint2* w = (const uint2*)p.weight + ((u64)s * p.classes + k) * 4 + threadIdx.x % 32;
            const uint2 b[2] = {w[0], w[8 * 4]};
            #pragma unroll
            for (int i = 0; i < MI; ++i) {
                u32 a[4];
                left.fragment(s, i, a);
                T::mma(z[i][0], a, b[0].x, b[0].y), T::mma(z[i][1], a, b[1].x, b[1].y);
            }
        };
        if constexpr (SLABS != 0) {
            #pragma unroll
            for (int s = 0; s < SLABS; ++s)
                if (s < slabs) multiply(s);
        } else {
            #pragma unroll 1
            for (int s = 0; s < slabs; ++s) multiply(s);
        }
    }
    if (k + BLOCK <= p.real) return;
    #pragma unroll
    for (int q = 0; q < 4; ++q)
        if (column + q / 2 * 8 + q % 2 >= p.real)
            #pragma unroll
            for (int r = 0; r < 2 * MI; ++r) z[r / 2][q / 2][r % 2 * 2 + q % 2] = -__int_as_float(0x7f800000);
}

// Of a voxel, sums of e^(score - top) over the classes that were added, as they are and weighted.
template <class T>
struct Softmax {
    float top = -3.4e38f, total = 0.f, weighted = 0.f;
    __device__ __forceinline__ void add(const float (&z)[4], const float (&weights)[4]) {
        const float next = fmaxf(top, fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]))), less = exponential<T>(top - next);
        top = next, total *= less, weighted *= less;
        #pragma unroll
        for (int q = 0; q < 4; ++q) {
            const float e = exponential<T>(z[q] - top);
            total += e, weighted = __fmaf_rn(e, weights[q], weighted);
        }
    }
    // Over the four lanes that share the voxel.
    __device__ __forceinline__ void join() {
        float all = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        all = fmaxf(all, __shfl_xor_sync(~0u, all, 2));
        const float less = exponential<T>(top - all);
        top = all, total *= less, weighted *= less;
        #pragma unroll
        for (int far = 1; far < 4; far *= 2)
            total += __shfl_xor_sync(~0u, total, far), weighted += __shfl_xor_sync(~0u, weighted, far);
    }
};

// The probabilities of being in a region and of being out, each as accurate as the other, and e^-|z|.
template <class T>
__device__ __forceinline__ void sigmoid(float z, float& inside, float& outside, float& e) {
    e = exponential<T>(-fabsf(z));
    const float larger = reciprocal<T>(1.f + e), smaller = e * larger;
    inside = z < 0.f ? smaller : larger, outside = z < 0.f ? larger : smaller;
}

// Sums over a warp's voxels: of each lane's four classes v over the eight lanes that have them. The sum of class
// 8 j + 2 (lane % 4) + e ends in the lanes whose bit 4 is j and whose bit 3 is e.
__device__ __forceinline__ float scattered(const float (&v)[4]) {
    const int lane = threadIdx.x % 32;
    const bool j = lane & 16, e = lane & 8;
    const float a = (j ? v[2] : v[0]) + __shfl_xor_sync(~0u, j ? v[0] : v[2], 16);
    const float b = (j ? v[3] : v[1]) + __shfl_xor_sync(~0u, j ? v[1] : v[3], 16);
    const float s = (e ? b : a) + __shfl_xor_sync(~0u, e ? a : b, 8);
    return s + __shfl_xor_sync(~0u, s, 4);
}

// A block takes every gridDim.x-th tile of a sample. `shared` holds the sums of each warp, [intersection, predicted,
// truth][class], each of which only one lane touches.
template <class T, int SLABS, int MI>
__device__ __forceinline__ void forward(const HeadLossParams& p, float* shared) {
    constexpr int VOXELS = 2 * MI;
    __shared__ double entropies[WARPS];
    __shared__ int valids[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockIdx.y, columns = 3 * p.classes;
    float* own = shared + warp * columns;
    for (int i = lane; i < columns; i += 32) own[i] = 0.f;
    __syncwarp();
    const int place = (lane >> 4) * 8 + lane % 4 * 2 + (lane >> 3 & 1);
    double entropy = 0;
    int valid = 0;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const int first = (tile * WARPS + warp) * MI * 16;
        if (first >= p.voxels) continue;
        const Left<T, SLABS, MI> left(p, n, first);
        Truth truth[VOXELS];
        bool strange = false;
        #pragma unroll
        for (int r = 0; r < VOXELS; ++r) {
            truth[r].load(p, n, first + lane / 4 + r * 8);
            strange |= truth[r].strange, valid += truth[r].valid;
        }
        float top[VOXELS], inverse[VOXELS], log[VOXELS];
        if (!p.members) {
            Softmax<T> softmax[VOXELS];
            for (int k = 0; k < p.classes; k += BLOCK) {
                float z[MI][2][4];
                scores(p, left, k, z);
                #pragma unroll
                for (int r = 0, h = 0; r < VOXELS; ++r, h ^= 2) {
                    const float(&v)[2][4] = z[r / 2];
                    softmax[r].add({v[0][h], v[0][h + 1], v[1][h], v[1][h + 1]}, {});
                }
            }
            #pragma unroll
            for (int r = 0; r < VOXELS; ++r) {
                softmax[r].join();
                const float total = softmax[r].total;
                top[r] = softmax[r].top, inverse[r] = reciprocal<T>(total), log[r] = logarithm<T>(total);
            }
        }
        float sum = strange ? __int_as_float(0x7fc00000) : 0.f;
        for (int k = 0; k < p.classes; k += BLOCK) {
            float z[MI][2][4], intersection[4] = {}, predicted[4] = {};
            scores(p, left, k, z);
            u32 counts = 0;     // a byte for each class
            auto count = [&](auto regions) {
                #pragma unroll
                for (int i = 0; i < 4 * VOXELS; ++i) {
                    const int r = i / 4, q = i % 4;
                    const float v = z[r / 2][q / 2][r % 2 * 2 + q % 2];
                    const u32 is = truth[r].bits(p, k) >> lane % 4 * 2 >> (q / 2 * 8 + q % 2) & 1;
                    float probability, cost, outside, e;
                    if constexpr (decltype(regions)::value) {
                        sigmoid<T>(v, probability, outside, e);
                        cost = truth[r].valid ? fmaxf(v, 0.f) - (is ? v : 0.f) + log_one_plus<T>(e) : 0.f;
                    } else {
                        probability = exponential<T>(v - top[r]) * inverse[r];
                        cost = is ? top[r] - v + log[r] : 0.f;
                    }
                    sum += cost;
                    predicted[q] += truth[r].valid ? probability : 0.f;
                    intersection[q] += is ? probability : 0.f;
                    counts += is << 8 * q;
                }
            };
            if (p.members) count(Known<true>());
            else count(Known<false>());
            const float all = scattered(predicted);
            if (!(lane & 4)) own[p.classes + k + place] += all;
            if (!__any_sync(~0u, counts)) continue;
            const float both = scattered(intersection);
            #pragma unroll
            for (int far = 4; far < 32; far *= 2) counts += __shfl_xor_sync(~0u, counts, far);
            if (!(lane & 4)) {
                own[k + place] += both;
                own[2 * p.classes + k + place] += (float)(counts >> ((lane >> 4) * 16 + (lane >> 3 & 1) * 8) & 255);
            }
        }
        entropy += sum;
    }
    #pragma unroll
    for (int far = 1; far < 32; far *= 2) {
        entropy += __shfl_xor_sync(~0u, entropy, far);
        if (far >= 4) valid += __shfl_xor_sync(~0u, valid, far);    // four lanes have counted the same voxels
    }
    if (lane == 0) entropies[warp] = entropy, valids[warp] = valid;
    __syncthreads();
    float* to = (float*)p.partials + ((u64)n * gridDim.x + blockIdx.x) * (columns + 2);
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        float s = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) s += shared[w * columns + i];
        to[i] = s;
    }
    if (threadIdx.x) return;
    #pragma unroll
    for (int w = 1; w < WARPS; ++w) entropy += entropies[w], valid += valids[w];
    to[columns] = (float)entropy, to[columns + 1] = (float)valid;
}

// The gradient of 16 voxels' scores of classes k to k + 15, as the scores lie.
template <class T>
struct Gradient {
    const float* slopes;    // of the sample
    float entropy, scale;
    Truth truth[2];
    float top[2], inverse[2], mean[2];

    // Slopes with the probabilities of the lane's classes.
    __device__ __forceinline__ void load(const HeadLossParams& p, int k, float (&intersection)[4],
                                         float (&predicted)[4]) const {
        #pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float* from = slopes + k + threadIdx.x % 4 * 2 + j * 8;
            const float2 a = *(const float2*)from, b = *(const float2*)(from + p.classes);
            intersection[2 * j] = a.x * scale, intersection[2 * j + 1] = a.y * scale;
            predicted[2 * j] = b.x * scale, predicted[2 * j + 1] = b.y * scale;
        }
    }

    template <int SLABS>
    __device__ __forceinline__ Gradient(const HeadLossParams& p, const Left<T, SLABS, 1>& left, int n, int first) {
        slopes = (const float*)p.slopes;
        scale = p.scale, entropy = slopes[(u64)(p.by_sample ? p.batch : 1) * 2 * p.classes] * scale;
        if (p.by_sample) slopes += (u64)n * 2 * p.classes;
        #pragma unroll
        for (int h = 0; h < 2; ++h) truth[h].load(p, n, first + threadIdx.x % 32 / 4 + h * 8);
        if (p.members) return;
        Softmax<T> softmax[2];
        for (int k = 0; k < p.classes; k += BLOCK) {
            float z[1][2][4], intersection[4], predicted[4];
            scores(p, left, k, z);
            load(p, k, intersection, predicted);
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 bits = truth[h].bits(p, k) >> threadIdx.x % 4 * 2;
                float v[4], slope[4];
                #pragma unroll
                for (int q = 0; q < 4; ++q) {
                    v[q] = z[0][q / 2][h * 2 + q % 2];
                    slope[q] = predicted[q] + (bits >> (q / 2 * 8 + q % 2) & 1 ? intersection[q] : 0.f);
                }
                softmax[h].add(v, slope);
            }
        }
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            softmax[h].join();
            top[h] = softmax[h].top, inverse[h] = reciprocal<T>(softmax[h].total), mean[h] = softmax[h].weighted * inverse[h];
        }
    }

    // Of softmax p (s - sum of p s) + k (p - t), of sigmoids p (1 - p) s + k (p - t): with s the slope with the
    // probability, k that with the cross-entropy and t the truth.
    __device__ __forceinline__ void of(const HeadLossParams& p, int k, float (&z)[2][4]) const {
        float intersection[4], predicted[4];
        load(p, k, intersection, predicted);
        auto derive = [&](auto regions) {
            #pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int h = i / 4, q = i % 4;
                float& v = z[q / 2][h * 2 + q % 2];
                const bool is = truth[h].bits(p, k) >> threadIdx.x % 4 * 2 >> (q / 2 * 8 + q % 2) & 1;
                const float slope = predicted[q] + (is ? intersection[q] : 0.f);
                float d, inside, outside, e;
                if constexpr (decltype(regions)::value) {
                    sigmoid<T>(v, inside, outside, e);
                    d = __fmaf_rn(inside * outside, slope, entropy * (is ? -outside : inside));
                } else {
                    inside = exponential<T>(v - top[h]) * inverse[h];
                    d = __fmaf_rn(inside, slope - mean[h] + entropy, is ? -entropy : 0.f);
                }
                v = truth[h].valid ? d : 0.f;
            }
        };
        if (p.members) derive(Known<true>());
        else derive(Known<false>());
    }
};

constexpr int TILE = WARPS * 16;
// A block takes every gridDim.x-th tile of the batch. It computes the gradient of up to 16 * GROUP channels of the features,
// and of the filter for them and up to 128 classes; there the grid's second dimension are the channels, the third the
// classes. A warp has 16 voxels. Its gradients of the scores are at once the left matrix of the product with the filter; the
// filter's own gradient is the product of all gradients of a tile, which lie in `shared` as [16 classes][voxel][16] and
// after them the features as [slab][voxel][16]: a warp has 16 classes of it, in registers all the time, or of fewer classes
// several warps a part of the voxels each.
template <class T, int SLABS, int GROUP>
__device__ __forceinline__ void backward(const HeadLossParams& p, unsigned char* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_slab = blockIdx.y * GROUP, first_class = blockIdx.z * WARPS;
    const int slabs = min(GROUP, p.channels / BLOCK - first_slab), chunks = min(WARPS, p.classes / BLOCK - first_class);
    const int chunk = warp % p.width, part = warp / p.width, steps = p.width;
    const u32 base = shared_address(shared), features = base + chunks * TILE * ROW;
    const u32 store = swizzle<ROW>((warp * 16 + lane / 4) * ROW + lane % 4 * 4);
    const u32 left_place = base + chunk * TILE * ROW +
                           swizzle<ROW>(((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 16);
    const u32 right_place = features + swizzle<ROW>((lane & 15) * ROW + (lane >> 4) * 16);
    const u32 one = T::pack(1.f, 1.f);
    float weight[GROUP][2][4] = {}, bias[4] = {};
    for (int tile = blockIdx.x; tile < p.tiles * p.batch; tile += gridDim.x) {
        const int n = tile / p.tiles, start = tile % p.tiles * TILE, first = start + warp * 16;
        __syncthreads();                                    // the tile before is read no more
        const int voxel = start + threadIdx.x / 2;
        const u16* copied = (const u16*)p.features + threadIdx.x % 2 * 8 + first_slab * BLOCK;
        if (voxel < p.voxels) copied += ((u64)n * p.voxels + voxel) * p.channels;
        for (int s = 0; s < slabs; ++s)
            copy16(features + s * TILE * ROW + swizzle<ROW>(threadIdx.x * 16), copied + s * BLOCK, voxel < p.voxels ? 16 : 0);
        copy_commit();
        const Left<T, SLABS, 1> left(p, n, first);
        const Gradient<T> gradient(p, left, n, first);
        float input[GROUP][2][4] = {};
        // The first classes' blocks see all classes for the gradient of the features.
        const int from = blockIdx.z ? first_class * BLOCK : 0, to = blockIdx.z ? from + chunks * BLOCK : p.classes;
        for (int k = from; k < to; k += BLOCK) {
            float z[1][2][4];
            scores(p, left, k, z);
            gradient.of(p, k, z[0]);
            const u32 a[4] = {T::pack(z[0][0][0], z[0][0][1]), T::pack(z[0][0][2], z[0][0][3]),
                              T::pack(z[0][1][0], z[0][1][1]), T::pack(z[0][1][2], z[0][1][3])};
            const int mine = k / BLOCK - first_class;
            if (mine < chunks) {
                unsigned char* at = shared + mine * TILE * ROW;
                *(u32*)(at + store) = a[0], *(u32*)(at + (store ^ 16)) = a[2];
                *(u32*)(at + store + 8 * ROW) = a[1], *(u32*)(at + (store ^ 16) + 8 * ROW) = a[3];
            }
            if (blockIdx.z) continue;
            #pragma unroll
            for (int s = 0; s < GROUP; ++s) {
                if (s >= slabs) break;
                // Of the lane's classes 2 (lane % 4) and those 1, 8 and 9 further two channels each: one for either product.
                const u32* w = (const u32*)p.weight;
                w += (((u64)(first_slab + s) * p.classes + k + lane % 4 * 2) * BLOCK + lane / 4 * 2) / 2;
                const u32 b[4] = {w[0], w[BLOCK / 2], w[8 * BLOCK / 2], w[9 * BLOCK / 2]};
                T::mma(input[s][0], a, __byte_perm(b[0], b[1], 0x5410), __byte_perm(b[2], b[3], 0x5410));
                T::mma(input[s][1], a, __byte_perm(b[0], b[1], 0x7632), __byte_perm(b[2], b[3], 0x7632));
            }
        }
        if (blockIdx.z == 0) {
            #pragma unroll
            for (int s = 0; s < GROUP; ++s)
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (s >= slabs || !(left.inside >> h & 1)) continue;
                    const u64 voxel = (u64)n * p.voxels + first + lane / 4 + h * 8;
                    const u32 v[2] = {T::pack(input[s][0][2 * h], input[s][1][2 * h]),
                                      T::pack(input[s][0][2 * h + 1], input[s][1][2 * h + 1])};
                    store_words((u16*)p.gradient + voxel * p.channels + (first_slab + s) * BLOCK + lane % 4 * 4, v);
                }
        }
        copy_wait<0>();
        __syncthreads();
        if (chunk >= chunks) continue;
        #pragma unroll 1
        for (int step = part * steps; step < (part + 1) * steps; ++step) {
            u32 a[4];
            load_transposed(a, left_place + step * 16 * ROW);
            T::mma(bias, a, one, one);
            #pragma unroll
            for (int s = 0; s < GROUP; ++s) {
                if (s >= slabs) break;
                u32 b[4];
                load_transposed(b, right_place + (s * TILE + step * 16) * ROW);
                T::mma(weight[s][0], a, b[0], b[1]), T::mma(weight[s][1], a, b[2], b[3]);
            }
        }
    }
    if (chunk >= chunks) return;
    const u64 size = (u64)p.classes * (p.channels + 1);
    float* row = (float*)p.partials + ((u64)blockIdx.x * (WARPS / p.width) + part) * size;
    #pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int k = (first_class + chunk) * BLOCK + lane / 4 + h * 8;
        #pragma unroll
        for (int s = 0; s < GROUP; ++s)
            #pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (s >= slabs) continue;
                float* to = row + ((u64)(first_slab + s) * p.classes + k) * BLOCK + j * 8 + lane % 4 * 2;
                *(float2*)to = make_float2(weight[s][j][2 * h], weight[s][j][2 * h + 1]);
            }
        if (blockIdx.y == 0 && lane % 4 == 0) row[(u64)p.classes * p.channels + k] = bias[2 * h];
    }
}

// The plain reference: sums grow in memory, each in that of the one thread that has it.
__device__ __forceinline__ void backward_wide(const HeadLossParams& p) {
    __shared__ float shared[TILE][BLOCK + 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* row = (float*)p.partials + (u64)blockIdx.x * p.classes * (p.channels + 1);
    for (int tile = blockIdx.x; tile < p.tiles * p.batch; tile += gridDim.x) {
        const int n = tile / p.tiles, start = tile % p.tiles * TILE, first = start + warp * 16;
        const int count = min(TILE, p.voxels - start);
        const bool fresh = tile == blockIdx.x;
        const float* features = (const float*)p.features + ((u64)n * p.voxels + start) * p.channels;
        float* out = (float*)p.gradient + ((u64)n * p.voxels + start) * p.channels;
        const Left<Wide, 0, 1> left(p, n, first);
        const Gradient<Wide> gradient(p, left, n, first);
        for (int k = 0; k < p.classes; k += BLOCK) {
            float z[1][2][4];
            scores(p, left, k, z);
            gradient.of(p, k, z[0]);
            __syncthreads();                                // the classes before are read no more
            #pragma unroll
            for (int i = 0; i < 8; ++i)
                shared[warp * 16 + i % 4 / 2 * 8 + lane / 4][i / 4 * 8 + lane % 4 * 2 + i % 2] = z[0][i / 4][i % 4];
            __syncthreads();
            for (int i = threadIdx.x; i < count * p.channels; i += THREADS) {
                const int v = i / p.channels, c = i % p.channels;
                const float* w = (const float*)p.weight + ((u64)(c / BLOCK) * p.classes + k) * BLOCK + c % BLOCK;
                float s = k ? out[i] : 0.f;
                #pragma unroll
                for (int q = 0; q < BLOCK; ++q) s = __fmaf_rn(shared[v][q], w[q * BLOCK], s);
                out[i] = s;
            }
            // One channel more, of ones, is the bias.
            for (int i = threadIdx.x; i < BLOCK * (p.channels + 1); i += THREADS) {
                const bool one = i >= BLOCK * p.channels;
                const int q = one ? i % BLOCK : i / BLOCK % BLOCK, c = i / (BLOCK * BLOCK) * BLOCK + i % BLOCK;
                float* to = row + (one ? (u64)p.classes * p.channels + k + q
                                       : ((u64)(c / BLOCK) * p.classes + k + q) * BLOCK + c % BLOCK);
                float s = 0.f;
                for (int v = 0; v < count; ++v) s = __fmaf_rn(shared[v][q], one ? 1.f : features[(u64)v * p.channels + c], s);
                *to = fresh ? s : *to + s;
            }
        }
    }
}

#define FORWARD(NAME, STORAGE, SLABS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) head_loss_forward_##NAME(const HeadLossParams p) {          \
        extern __shared__ __align__(128) unsigned char shared[];                                                         \
        forward<Half<STORAGE>, SLABS, 2>(p, (float*)shared);                                                             \
    }
#define BACKWARD(NAME, STORAGE, SLABS, GROUP)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) head_loss_backward_##NAME(const HeadLossParams p) {         \
        extern __shared__ __align__(128) unsigned char shared[];                                                         \
        backward<Half<STORAGE>, SLABS, GROUP>(p, shared);                                                                \
    }

#if AMPERE
FORWARD(c32_bf16, Bf16, 2)
FORWARD(c64_bf16, Bf16, 4)
FORWARD(any_bf16, Bf16, 0)
BACKWARD(c32_bf16, Bf16, 2, 2)
BACKWARD(any_bf16, Bf16, 0, 4)
#endif
FORWARD(c32_f16, F16, 2)
FORWARD(c64_f16, F16, 4)
FORWARD(any_f16, F16, 0)
BACKWARD(c32_f16, F16, 2, 2)
BACKWARD(any_f16, F16, 0, 4)

extern "C" __global__ void __launch_bounds__(THREADS) head_loss_forward_f32(const HeadLossParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    forward<Wide, 0, 1>(p, (float*)shared);
}
extern "C" __global__ void __launch_bounds__(THREADS) head_loss_backward_f32(const HeadLossParams p) { backward_wide(p); }
