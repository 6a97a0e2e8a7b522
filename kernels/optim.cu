// targets: 75 80
// max-registers: 80
// A step of an optimizer for all parameters at once: what their gradients' squares come to, then values moved and stored
// again in every order in which they are read. Parameters are of very different sizes; a block finds its own in a table.
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE = BLOCK * BLOCK;     // 16 filters of 16 input channels, or 256 numbers of a vector: what a warp takes
constexpr int EACH = 4;                 // tiles of a warp
constexpr int GATHERED = 8;             // values of a thread that gathers

// A filter transposed, for the gradient of the input: [slab of 16 filters][tap][channel][16 filters].
struct Turned {
    u64 to;
    u32 first, slabs;   // of the input channels in it; no slabs: there is no such order
};

// A filter is [slab of 16 input channels][tap][filter][16], its gradient and what is kept of it likewise.
struct Parameter {
    u64 value;
    u64 gradient;
    u64 kept[2];
    u64 same;           // the order of the values, or 0
    Turned turned[2];
    u32 floats;         // whole tiles of a filter, whole blocks of a vector
    u32 taps;
    u32 groups;         // of 16 filters
    u32 flags;
};
constexpr u32 FRESH = 1, MIRRORED = 2;  // nothing is kept yet; taps of the n-th transposed order are reversed: MIRRORED << n

// An order that is none of tiles: of a range of input channels that begins or ends within a slab.
struct Piece {
    u64 value;
    u64 to;
    u32 values;         // in this order
    u32 taps, groups;
    u32 first, channels;
    u32 order;
};
enum Order { APART, JOINED, TURNED, TURNED_MIRRORED };

// What the host is told of a step; behind it lie the sums of squares of all parameters.
struct Outcome {
    double squares;
    double norm;        // of the gradients without the factor of the loss
    float scale;        // what gradients are multiplied by
    int finite;
    int wrong;          // the first parameter whose gradient is not finite, or -1
    float guard;
};

// The last of `count` ascending numbers, of which the first is 0, that is not above `block`; by all lanes of a warp.
__device__ __forceinline__ int find(const u32* starts, int count, u32 block) {
    const int lane = threadIdx.x % 32;
    int low = 0;
    while (count > 1) {
        const int step = (count + 31) / 32, i = lane * step;
        const bool before = i < count && starts[low + i] <= block;
        const int skipped = (__popc(__ballot_sync(~0u, before)) - 1) * step;
        low += skipped, count = min(step, count - skipped);
    }
    return low;
}

__device__ __forceinline__ bool is_finite(float v) { return (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ bool is_finite(double v) { return (__double2hiint(v) & 0x7ff00000) != 0x7ff00000; }

// All lanes' together, in a fixed order.
__device__ __forceinline__ double warp_sum(double v) {
    #pragma unroll
    for (int far = 16; far; far /= 2) v += __shfl_xor_sync(~0u, v, far);
    return v;
}

// Numbers `k` and following of 8 in registers. That an address from a table is of global memory is known only here.
__device__ __forceinline__ void load4(u64 from, u32 i, float (&v)[8], int k) {
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v[k]), "=f"(v[k + 1]), "=f"(v[k + 2]), "=f"(v[k + 3])
                 : "l"(__cvta_generic_to_global((const float*)from + i)) : "memory");
}
__device__ __forceinline__ void store4(u64 to, u32 i, const float (&v)[8], int k) {
    const u32 words[4] = {__float_as_uint(v[k]), __float_as_uint(v[k + 1]), __float_as_uint(v[k + 2]), __float_as_uint(v[k + 3])};
    store_words((float*)to + i, words);
}
__device__ __forceinline__ void store8(F32, u64 to, u64 i, const float (&v)[8]) {
    store4(to + i * 4, 0, v, 0), store4(to + i * 4, 4, v, 4);
}
template <class T>
__device__ __forceinline__ void store8(Halves<T>, u64 to, u64 i, const float (&v)[8]) {
    const u32 words[4] = {T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7])};
    store_words((u16*)to + i, words);
}

struct SquaresParams {
    u64 starts;         // u32 [parameter], the first block of each
    u64 parameters;
    u64 partials;       // f64 [block]
    int count;
    int unused;
};

// Pairs of f32 hold a square and a thread's sum of them to twice their digits; f64 alone would be slow on consumer cards. What
// overflows is done again in f64, where no square of a float does, so that the sum is finite exactly if all gradients are.
extern "C" __global__ void __launch_bounds__(THREADS) optim_squares(const SquaresParams p) {
    __shared__ double sums[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = find((const u32*)p.starts, p.count, blockIdx.x);
    const Parameter* const q = (const Parameter*)p.parameters + at;
    const u64 gradient = q->gradient;
    const u32 floats = q->floats, start = ((blockIdx.x - ((const u32*)p.starts)[at]) * (EACH * WARPS) + warp) * TILE + lane * 4;
    auto place = [&](int i) { return start + i / 2 * (WARPS * TILE) + i % 2 * (TILE / 2); };
    float v[EACH][8] = {};
    #pragma unroll
    for (int i = 0; i < 2 * EACH; ++i)
        if (place(i) < floats) load4(gradient, place(i), v[i / 2], i % 2 * 4);
    float high = 0.f, low = 0.f;
    #pragma unroll
    for (int i = 0; i < EACH; ++i)
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float square = __fmul_rn(v[i][j], v[i][j]), rest = __fmaf_rn(v[i][j], v[i][j], -square);
            const float sum = __fadd_rn(high, square), part = __fsub_rn(sum, high);
            const float lost = __fadd_rn(__fsub_rn(high, __fsub_rn(sum, part)), __fsub_rn(square, part));
            high = sum, low = __fadd_rn(low, __fadd_rn(rest, lost));
        }
    double sum = (double)high + (double)low;
    if (!is_finite(high)) {
        sum = 0;
        #pragma unroll 1
        for (int i = 0; i < 2 * EACH; ++i)
            #pragma unroll 1
            for (int j = 0; j < 4 && place(i) < floats; ++j) {
                const double g = ((const float*)gradient)[place(i) + j];
                sum = fma(g, g, sum);
            }
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    #pragma unroll
    for (int w = 1; w < WARPS; ++w) sum += sums[w];
    ((double*)p.partials)[blockIdx.x] = sum;
}

struct MergeParams {
    u64 starts;
    u64 partials;
    u64 guard;          // f32, or 0
    u64 outcome;        // and f64 [parameter]
    double max_norm, unscale;
    int count, blocks;
};

constexpr int MERGERS = 1024;

extern "C" __global__ void __launch_bounds__(MERGERS) optim_merge(const MergeParams p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32* const starts = (const u32*)p.starts;
    double* const sums = (double*)((Outcome*)p.outcome + 1);
    for (int i = warp; i < p.count; i += MERGERS / 32) {
        const u32 end = i + 1 < p.count ? starts[i + 1] : (u32)p.blocks;
        double sum = 0;
        #pragma unroll 8
        for (u32 k = starts[i] + lane; k < end; k += 32) sum += ((const double*)p.partials)[k];
        sum = warp_sum(sum);
        if (lane == 0) sums[i] = sum;
    }
    __syncthreads();
    if (warp) return;
    double squares = 0;
    int wrong = p.count;
    for (int i = lane; i < p.count; i += 32) {
        squares += sums[i];
        if (!is_finite(sums[i])) wrong = min(wrong, i);
    }
    squares = warp_sum(squares);
    #pragma unroll
    for (int far = 16; far; far /= 2) wrong = min(wrong, __shfl_xor_sync(~0u, wrong, far));
    if (lane) return;
    const float guard = p.guard ? *(const float*)p.guard : 0.f;
    const bool finite = wrong == p.count && is_finite(guard);
    const double norm = __dmul_rn(sqrt(squares), p.unscale), clip = p.max_norm / __dadd_rn(norm, 1e-6);
    Outcome* const to = (Outcome*)p.outcome;
    to->squares = squares;
    to->norm = norm;
    to->scale = finite ? (float)__dmul_rn(clip < 1 ? clip : 1, p.unscale) : 0.f;
    to->finite = finite;
    to->wrong = wrong == p.count ? -1 : wrong;
    to->guard = guard;
}

// Operations and their order are those of the processor's optimizers, so that every result has the same bits. `g` comes scaled.
struct Sgd {
    float weight_decay, momentum, rate;
    int nesterov;

    static constexpr int KEPT = 1;
    static constexpr bool MOVES = true;
    __device__ __forceinline__ bool keeps() const { return momentum != 0.f; }
    __device__ __forceinline__ void move(float (&v)[8], float (&g)[8], float (&kept)[KEPT][8], bool fresh) const {
        float (&m)[8] = kept[0];
        if (weight_decay != 0.f)
            #pragma unroll
            for (int j = 0; j < 8; ++j) g[j] = __fmaf_rn(v[j], weight_decay, g[j]);
        if (momentum != 0.f) {
            #pragma unroll
            for (int j = 0; j < 8; ++j) m[j] = fresh ? g[j] : __fadd_rn(__fmul_rn(m[j], momentum), g[j]);
            #pragma unroll
            for (int j = 0; j < 8; ++j) g[j] = nesterov ? __fmaf_rn(m[j], momentum, g[j]) : m[j];
        }
        #pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = __fmaf_rn(g[j], -rate, v[j]);
    }
};

struct Adam {
    float weight_decay, shrink, share1, beta2, share2, rate, correction, eps;

    static constexpr int KEPT = 2;
    static constexpr bool MOVES = true;
    __device__ __forceinline__ bool keeps() const { return true; }
    __device__ __forceinline__ void move(float (&v)[8], float (&g)[8], float (&kept)[KEPT][8], bool) const {
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
            float &m = kept[0][j], &q = kept[1][j];
            const float p = __fmul_rn(v[j], shrink), d = weight_decay != 0.f ? __fmaf_rn(p, weight_decay, g[j]) : g[j];
            m = __fmaf_rn(share1, __fsub_rn(d, m), m);
            q = __fmaf_rn(__fmul_rn(share2, d), d, __fmul_rn(q, beta2));
            const float under = __fadd_rn(__fdiv_rn(__fsqrt_rn(q), correction), eps);
            v[j] = __fadd_rn(p, __fdiv_rn(__fmul_rn(-rate, m), under));
        }
    }
};

// Values stay where they are and are only stored again.
struct Still {
    int unused[2];

    static constexpr int KEPT = 1;
    static constexpr bool MOVES = false;
};

template <class Rule>
struct StepParams {
    u64 starts;
    u64 parameters;
    u64 outcome;        // 0: nothing is asked
    int count;
    int unused;
    Rule rule;
};

// A tile in its own order from the lanes that hold 4 of its first and 4 of its second half each.
__device__ __forceinline__ void store_tile(F32, u64 to, u32 start, int lane, const float (&v)[8]) {
    store4(to, start + lane * 4, v, 0), store4(to, start + lane * 4 + TILE / 2, v, 4);
}
template <class T>
__device__ __forceinline__ void store_tile(Halves<T>, u64 to, u32 start, int lane, const float (&v)[8]) {
    // Neighbours change what each has of the other's half, so that it stores 16 bytes.
    u32 own[4];
    #pragma unroll
    for (int k = 0; k < 4; ++k) own[k] = T::pack(v[2 * k], v[2 * k + 1]);
    const bool odd = lane & 1;
    const u32 a = __shfl_xor_sync(~0u, odd ? own[0] : own[2], 1), b = __shfl_xor_sync(~0u, odd ? own[1] : own[3], 1);
    const u32 piece[4] = {odd ? a : own[0], odd ? b : own[1], odd ? own[2] : a, odd ? own[3] : b};
    store_words((u16*)to + start + lane / 2 * 8 + (odd ? TILE / 2 : 0), piece);
}

// Where a tile's value is while the tile is transposed: stores of 4 channels apart meet no bank twice.
constexpr int STAGED = TILE + 3 * 8;
__device__ __forceinline__ int staged_at(int channel, int filter) { return channel * BLOCK + channel / 4 * 8 + filter; }

template <class T, class Rule>
__device__ __forceinline__ void step(const StepParams<Rule>& p) {
    __shared__ __align__(16) float staged[WARPS][STAGED];
    float scale = 1.f;
    if (p.outcome) {
        const Outcome* const outcome = (const Outcome*)p.outcome;
        if (!outcome->finite) return;
        scale = outcome->scale;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = find((const u32*)p.starts, p.count, blockIdx.x);
    const Parameter q = ((const Parameter*)p.parameters)[at];
    const u32 first = (blockIdx.x - ((const u32*)p.starts)[at]) * (EACH * WARPS) + warp;
    const bool fresh = q.flags & FRESH;
    float* const own = staged[warp];
    #pragma unroll 1
    for (int i = 0; i < EACH; ++i) {
        const u32 tile = first + i * WARPS, start = tile * TILE, k = start + lane * 4;
        if (start >= q.floats) return;
        float v[8] = {};
        #pragma unroll
        for (int h = 0; h < 2; ++h)         // the last tile of a vector is not full
            if (k + h * (TILE / 2) < q.floats) load4(q.value, k + h * (TILE / 2), v, 4 * h);
        if constexpr (Rule::MOVES) {
            float g[8] = {}, b[Rule::KEPT][8] = {};
            const bool keeps = p.rule.keeps();
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 j = k + h * (TILE / 2);
                if (j >= q.floats) continue;
                load4(q.gradient, j, g, 4 * h);
                if (keeps && !fresh)
                    #pragma unroll
                    for (int n = 0; n < Rule::KEPT; ++n) load4(q.kept[n], j, b[n], 4 * h);
            }
            #pragma unroll
            for (int j = 0; j < 8; ++j) g[j] = __fmul_rn(g[j], scale);
            p.rule.move(v, g, b, fresh);
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 j = k + h * (TILE / 2);
                if (j >= q.floats) continue;
                store4(q.value, j, v, 4 * h);
                if (keeps)
                    #pragma unroll
                    for (int n = 0; n < Rule::KEPT; ++n) store4(q.kept[n], j, b[n], 4 * h);
            }
        }
        if (q.same) store_tile(T(), q.same, start, lane, v);
        if (!q.turned[0].slabs) continue;
        __syncwarp();                       // the tile before has been read
        #pragma unroll
        for (int j = 0; j < 8; ++j) own[staged_at(lane % 4 * 4 + j % 4, lane / 4 + j / 4 * 8)] = v[j];
        __syncwarp();
        float row[8];                       // 8 filters of a channel
        const float* const from = own + staged_at(lane / 2, lane % 2 * 8);
        const float4 low = *(const float4*)from, high = *(const float4*)(from + 4);
        row[0] = low.x, row[1] = low.y, row[2] = low.z, row[3] = low.w;
        row[4] = high.x, row[5] = high.y, row[6] = high.z, row[7] = high.w;
        const u32 group = tile % q.groups, tap = tile / q.groups % q.taps, slab = tile / q.groups / q.taps;
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            const u32 to = slab - q.turned[n].first;    // wraps around below the first
            if (to >= q.turned[n].slabs) continue;
            const u32 t = q.flags & MIRRORED << n ? q.taps - 1 - tap : tap;
            store8(T(), q.turned[n].to, ((u64)(group * q.taps + t) * q.turned[n].slabs + to) * TILE + lane * 8, row);
        }
    }
}

struct GatherParams {
    u64 starts;         // u32 [piece], the first block of each
    u64 pieces;
    u64 outcome;        // as in StepParams
    int count;
    int unused;
};

template <class T>
__device__ __forceinline__ void gather(const GatherParams& p) {
    if (p.outcome && !((const Outcome*)p.outcome)->finite) return;
    const int at = find((const u32*)p.starts, p.count, blockIdx.x);
    const Piece q = ((const Piece*)p.pieces)[at];
    const u32 k = ((blockIdx.x - ((const u32*)p.starts)[at]) * THREADS + threadIdx.x) * GATHERED;
    if (k >= q.values) return;
    const u32 row = k / BLOCK, lane = k % BLOCK, filters = q.groups * BLOCK, taps = q.taps;
    const u32 padded = (q.channels + BLOCK - 1) / BLOCK * BLOCK;
    const float* const value = (const float*)q.value;
    auto read = [&](u32 channel, u32 tap, u32 filter) {
        const u32 c = q.first + channel;
        return channel < q.channels ? value[((u64)(c / BLOCK * taps + tap) * filters + filter) * BLOCK + c % BLOCK] : 0.f;
    };
    float v[GATHERED];
    #pragma unroll
    for (int j = 0; j < GATHERED; ++j) {
        const u32 i = lane + j;
        if (q.order == APART) v[j] = read(row / filters / taps * BLOCK + i, row / filters % taps, row % filters);
        else if (q.order == JOINED) {
            const u32 term = row / filters * BLOCK + i;
            v[j] = read(term / taps, term % taps, row % filters);
        } else {
            const u32 tap = row / padded % taps;
            v[j] = read(row % padded, q.order == TURNED ? tap : taps - 1 - tap, row / padded / taps * BLOCK + i);
        }
    }
    store8(T(), q.to, k, v);
}

#define ENTRIES(STORAGE, TYPE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) optim_sgd_##STORAGE(const StepParams<Sgd> p) { step<TYPE>(p); }   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) optim_adam_##STORAGE(const StepParams<Adam> p) { step<TYPE>(p); } \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) optim_pack_##STORAGE(const StepParams<Still> p) { step<TYPE>(p); } \
    extern "C" __global__ void __launch_bounds__(THREADS) optim_gather_##STORAGE(const GatherParams p) { gather<TYPE>(p); }

ENTRIES(f32, F32)
#if AMPERE
ENTRIES(bf16, Halves<Bf16>)
#endif
ENTRIES(f16, Halves<F16>)
