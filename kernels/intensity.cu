// targets: 75 80
// max-registers: 64
// What is done to the values of one channel: noise, statistics, maps that are put together instead of carried out, power
// curves, and the mirrored result. Arithmetic is that of the processor, but for the order of sums.
#include "intensity.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 16;            // values of a thread
constexpr int PART = THREADS * EACH;

// ---- noise

struct NoiseParams {
    u64 x;          // f32 [values]
    u32 values;     // less than 2^31
    u32 key[2];     // Philox: the seed
    u32 words[3];   // and what the numbers are for
    float sigma;
    int unused;
};

// Philox4x32-10 (Salmon et al., 2011).
__device__ __forceinline__ void philox(u32 k0, u32 k1, u32 (&c)[4]) {
    #pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 a = (u64)0xD2511F53u * c[0], b = (u64)0xCD9E8D57u * c[2];
        const u32 next[4] = {(u32)(b >> 32) ^ c[1] ^ k0, (u32)b, (u32)(a >> 32) ^ c[3] ^ k1, (u32)a};
        #pragma unroll
        for (int k = 0; k < 4; ++k) c[k] = next[k];
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

// Of positive normal numbers: the series of 2 artanh((m - 1) / (m + 1)) for the fraction m in [sqrt(1/2), sqrt(2)).
__device__ __forceinline__ float natural_log(float x) {
    const int bits = __float_as_int(x), exponent = (bits - 0x3f3504f3) >> 23;
    const float m = __int_as_float(bits - (exponent << 23)), e = (float)exponent;
    const float z = __fdiv_rn(__fsub_rn(m, 1.f), __fadd_rn(m, 1.f)), w = __fmul_rn(z, z);
    float p = 2.f / 9.f;
    p = __fadd_rn(2.f / 7.f, __fmul_rn(w, p)), p = __fadd_rn(2.f / 5.f, __fmul_rn(w, p)), p = __fadd_rn(2.f / 3.f, __fmul_rn(w, p));
    const float series = __fmul_rn(__fmul_rn(z, w), p);
    // ln 2 in two parts, the first exact in a product with any exponent.
    return __fadd_rn(__fmul_rn(e, 0.6933594f), __fadd_rn(__fadd_rn(z, z), __fsub_rn(series, __fmul_rn(e, 2.1219444e-4f))));
}

// Cosine and sine of 2 pi (u / 2^32 - 1/8).
__device__ __forceinline__ float2 cos_sin_turns(u32 u) {
    const float t = __fmul_rn(__fsub_rn(__fmul_rn((float)(u >> 8 & 0x3fffffu), 1.f / 4194304.f), 0.5f), 1.57079632679f);
    const float w = __fmul_rn(t, t);
    float s = __fsub_rn(1.f / 5040.f, __fmul_rn(w, 1.f / 362880.f));
    s = __fsub_rn(1.f / 120.f, __fmul_rn(w, s)), s = __fadd_rn(-1.f / 6.f, __fmul_rn(w, s));
    s = __fadd_rn(t, __fmul_rn(__fmul_rn(t, w), s));
    float c = __fsub_rn(1.f / 720.f, __fmul_rn(w, 1.f / 40320.f));
    c = __fsub_rn(1.f / 24.f, __fmul_rn(w, c)), c = __fsub_rn(0.5f, __fmul_rn(w, c)), c = __fsub_rn(1.f, __fmul_rn(w, c));
    const u32 quadrant = u >> 30;
    const float a = quadrant & 1 ? s : c, b = quadrant & 1 ? c : s;
    return make_float2(quadrant == 1 || quadrant == 2 ? -a : a, quadrant >= 2 ? -b : b);
}

// Sixteen places of the stream are four numbers each: two of Box and Muller's pairs, for values 16 apart.
extern "C" __global__ void __launch_bounds__(THREADS) intensity_noise(const NoiseParams p) {
    const u32 place = blockIdx.x * THREADS + threadIdx.x, first = place / 16 * 64 + place % 16;
    if (first >= p.values) return;
    u32 bits[4] = {place, p.words[0], p.words[1], p.words[2]};
    philox(p.key[0], p.key[1], bits);
    float* x = (float*)p.x;
    #pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
        // The middles of 2^24 equal parts of [0, 1]; the last would round to 1, whose logarithm is 0 as well.
        const float u = __fmul_rn(__fadd_rn((float)(bits[2 * pair] >> 8), 0.5f), 1.f / 16777216.f);
        const float radius = __fsqrt_rn(__fmul_rn(-2.f, natural_log(u)));
        const float2 along = cos_sin_turns(bits[2 * pair + 1]);
        const u32 a = first + 32 * pair, b = a + 16;
        if (a < p.values) x[a] = __fadd_rn(x[a], __fmul_rn(p.sigma, __fmul_rn(radius, along.x)));
        if (b < p.values) x[b] = __fadd_rn(x[b], __fmul_rn(p.sigma, __fmul_rn(radius, along.y)));
    }
}

// ---- statistics

// Of some values.
struct Part {
    double count, mean, squares;
    float min, max;
};

// Put together (Chan, Golub and LeVeque, 1979).
__device__ __forceinline__ Part merged(const Part& a, const Part& b) {
    const double count = a.count + b.count, share = count > 0 ? b.count / count : 0, delta = b.mean - a.mean;
    return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share, fminf(a.min, b.min), fmaxf(a.max, b.max)};
}

constexpr int WARPS = THREADS / 32;

// Shared memory of a block that measures.
struct Measuring {
    float sums[WARPS], low[WARPS], high[WARPS];
};

// The sum of a block's values, for all its threads.
__device__ __forceinline__ float block_sum(float v, float (&room)[WARPS]) {
    #pragma unroll
    for (int k = 16; k; k >>= 1) v = __fadd_rn(v, __shfl_xor_sync(~0u, v, k));
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.f;
    #pragma unroll
    for (int k = 0; k < WARPS; ++k) sum = __fadd_rn(sum, room[k]);
    return sum;
}

// Statistics of a block's values, of which `count` are there; corrected two-pass.
__device__ __forceinline__ void measure(const float (&v)[EACH], int count, Part* to, Measuring& room) {
    float sum = 0.f, low = __int_as_float(0x7f800000), high = -low;
    #pragma unroll
    for (int k = 0; k < EACH; ++k)
        if (k * THREADS + (int)threadIdx.x < count) sum = __fadd_rn(sum, v[k]), low = v[k] < low ? v[k] : low, high = v[k] > high ? v[k] : high;
    const float about = __fdiv_rn(block_sum(sum, room.sums), (float)count);
    float first = 0.f, second = 0.f;
    #pragma unroll
    for (int k = 0; k < EACH; ++k)
        if (k * THREADS + (int)threadIdx.x < count) {
            const float d = __fsub_rn(v[k], about);
            first = __fadd_rn(first, d), second = __fmaf_rn(d, d, second);
        }
    first = block_sum(first, room.sums), second = block_sum(second, room.sums);
    #pragma unroll
    for (int k = 16; k; k >>= 1) low = fminf(low, __shfl_xor_sync(~0u, low, k)), high = fmaxf(high, __shfl_xor_sync(~0u, high, k));
    if (threadIdx.x % 32 == 0) room.low[threadIdx.x / 32] = low, room.high[threadIdx.x / 32] = high;
    __syncthreads();
    if (threadIdx.x) return;
    for (int k = 1; k < WARPS; ++k) low = fminf(low, room.low[k]), high = fmaxf(high, room.high[k]);
    const double n = count, f = first, q = (double)second - f * f / n;
    *to = {n, (double)about + f / n, q > 0 ? q : 0, low, high};
}

struct StatsParams {
    u64 x;          // f32 [values]
    u64 values;
    u64 state;
    u64 parts;      // of `Part`, one for each block
    float gamma;    // of a curve
    int unused;
};

__device__ __forceinline__ int part_count(const StatsParams& p) {
    const u64 left = p.values - (u64)blockIdx.x * PART;
    return left < PART ? (int)left : PART;
}

// Of `map(x)`.
extern "C" __global__ void __launch_bounds__(THREADS) intensity_stats(const StatsParams p) {
    __shared__ Measuring room;
    const int count = part_count(p);
    const float* x = (const float*)p.x + (u64)blockIdx.x * PART;
    const Map map = ((const State*)p.state)->map;
    float v[EACH];
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int i = k * THREADS + threadIdx.x;
        v[k] = i < count ? map.of(x[i]) : 0.f;
    }
    measure(v, count, (Part*)p.parts + blockIdx.x, room);
}

// e^x for x up to 88 (Cephes `expf`); below -87 as good as 0. NaN stays NaN.
__device__ __forceinline__ float exponential(float x) {
    constexpr float MAGIC = 12582912.f;     // adding it rounds to an integer
    x = -87.f > x ? -87.f : x;
    const float t = __fmaf_rn(x, 1.44269504f, MAGIC), n = __fsub_rn(t, MAGIC);
    const float r = __fmaf_rn(n, 2.1219444e-4f, __fmaf_rn(n, -0.6933594f, x));
    float p = 1.9875691e-4f;
    p = __fmaf_rn(p, r, 1.3982e-3f), p = __fmaf_rn(p, r, 8.333452e-3f), p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.6666665e-1f), p = __fmaf_rn(p, r, 0.5f);
    const float y = __fadd_rn(__fmaf_rn(__fmul_rn(p, r), r, r), 1.f);
    return __fmul_rn(y, __uint_as_float((__float_as_uint(t) << 23) + 0x3f800000u));
}

// x <- ((map(x) - min) / max(range, 1e-7))^gamma range + min, min and range those of the state, and statistics of the result.
extern "C" __global__ void __launch_bounds__(THREADS) intensity_power(const StatsParams p) {
    __shared__ Measuring room;
    const int count = part_count(p);
    float* x = (float*)p.x + (u64)blockIdx.x * PART;
    const State* state = (const State*)p.state;
    const Map map = state->map;
    const float min = state->min, range = __fsub_rn(state->max, min), inverse = __fdiv_rn(1.f, fmaxf(range, 1e-7f));
    float v[EACH];
    #pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int i = k * THREADS + threadIdx.x;
        if (i >= count) {
            v[k] = 0.f;
            continue;
        }
        const float t = __fmul_rn(__fsub_rn(map.of(x[i]), min), inverse);
        // Of a normal number; any power of it by more than 1/2 is nothing beside 1.
        v[k] = __fmaf_rn(exponential(__fmul_rn(p.gamma, natural_log(t < 1e-36f ? 1e-36f : t))), range, min);
        x[i] = v[k];
    }
    measure(v, count, (Part*)p.parts + blockIdx.x, room);
}

// ---- what is known

enum Step { BEGIN = 0, KNOW = 1, AFFINE = 2, CONTRAST = 3, CURVE = 4 };

struct SettleParams {
    u64 state;
    u64 parts;              // measured of the values, in one block's steps
    double scale, shift;
    int count;              // of parts
    int step;
};

__device__ __forceinline__ float moved(float v, double scale, double shift) { return (float)__dadd_rn(__dmul_rn(v, scale), shift); }

// v <- scale v + shift
__device__ __forceinline__ void affine(State& s, double scale, double shift) {
    const float low = moved(scale < 0 ? s.map.high : s.map.low, scale, shift), high = moved(scale < 0 ? s.map.low : s.map.high, scale, shift);
    // No bound times 0 is none.
    s.map = {(float)__dmul_rn(s.map.scale, scale), moved(s.map.shift, scale, shift), low == low ? low : __int_as_float(0xff800000),
             high == high ? high : __int_as_float(0x7f800000)};
    const float min = moved(scale < 0 ? s.max : s.min, scale, shift), max = moved(scale < 0 ? s.min : s.max, scale, shift);
    s.min = min, s.max = max, s.mean = __dadd_rn(__dmul_rn(s.mean, scale), shift), s.deviation = s.deviation * fabs(scale);
}

extern "C" __global__ void __launch_bounds__(THREADS) intensity_settle(const SettleParams p) {
    __shared__ Part parts[THREADS];
    const float infinity = __int_as_float(0x7f800000);
    const Map identity = {1.f, 0.f, -infinity, infinity};
    Part mine = {0, 0, 0, infinity, -infinity};
    for (int i = threadIdx.x; i < p.count; i += THREADS) mine = merged(mine, ((const Part*)p.parts)[i]);
    parts[threadIdx.x] = mine;
    for (int half = THREADS / 2; half; half >>= 1) {
        __syncthreads();
        if ((int)threadIdx.x < half) parts[threadIdx.x] = merged(parts[threadIdx.x], parts[threadIdx.x + half]);
    }
    if (threadIdx.x) return;
    State* to = (State*)p.state;
    if (p.step == BEGIN) {
        *to = {identity, 0.f, 0.f, 0, 0};
        return;
    }
    State s = *to;
    const double mean = s.mean, deviation = s.deviation;
    if (p.count) {
        const Part all = parts[0];
        s.min = all.min, s.max = all.max, s.mean = all.mean, s.deviation = sqrt(all.squares / (all.count - 1));
    }
    if (p.step == AFFINE) affine(s, p.scale, p.shift);
    if (p.step == CONTRAST) {
        const float min = s.min, max = s.max;
        affine(s, p.scale, s.mean * (1 - p.scale));
        s.map.low = min, s.map.high = max;
    }
    if (p.step == CURVE) {
        // Back to the mean and the deviation of before.
        const double scale = deviation / (s.deviation > 1e-7 ? s.deviation : 1e-7);
        s.map = identity;
        affine(s, scale, mean - s.mean * scale);
    }
    *to = s;
}

// ---- results

struct PutParams {
    u64 from, to;       // f32 [D][H][W]; or i16 and u16
    u64 state;
    u64 outside;        // i16 [D][H][W] that is negative where values are 0, or 0
    int shape[3], flip[3];
};

__device__ __forceinline__ u64 mirrored(const PutParams& p, u64 i) {
    const int x = (int)(i % p.shape[2]), y = (int)(i / p.shape[2] % p.shape[1]), z = (int)(i / ((u64)p.shape[1] * p.shape[2]));
    const u64 fz = p.flip[0] ? p.shape[0] - 1 - z : z, fy = p.flip[1] ? p.shape[1] - 1 - y : y, fx = p.flip[2] ? p.shape[2] - 1 - x : x;
    return (fz * p.shape[1] + fy) * p.shape[2] + fx;
}

extern "C" __global__ void __launch_bounds__(THREADS) intensity_put(const PutParams p) {
    const u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (u64)p.shape[0] * p.shape[1] * p.shape[2]) return;
    const u64 from = mirrored(p, i);
    const bool zero = p.outside && ((const short*)p.outside)[from] < 0;
    ((float*)p.to)[i] = zero ? 0.f : ((const State*)p.state)->map.of(((const float*)p.from)[from]);
}

extern "C" __global__ void __launch_bounds__(THREADS) intensity_put_labels(const PutParams p) {
    const u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (u64)p.shape[0] * p.shape[1] * p.shape[2]) return;
    const short label = ((const short*)p.from)[mirrored(p, i)];
    ((u16*)p.to)[i] = (u16)(label > 0 ? label : 0);
}
