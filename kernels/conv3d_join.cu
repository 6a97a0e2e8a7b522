// targets: 75 80
// max-registers: 48
// The gradient of a filter of two sources whose channels do not fill whole blocks: as the two parts lie, each padded by
// itself, and as the filter lies, whose channels go on without a gap.
#include "common.cuh"

struct JoinParams {
    u64 apart;      // f32 [slab of 16 channels of either source][tap][filter][16]
    u64 out;        // f32 [slab of 16 channels][tap][filter][16]
    int rows;       // taps times padded filters
    int first, channels;    // of the first source, and of both
    int unused;
};

// A thread takes 16 channels of a filter's tap.
extern "C" __global__ void __launch_bounds__(256) conv3d_join_f32(const JoinParams p) {
    const int slabs = (p.channels + BLOCK - 1) / BLOCK;
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)slabs * p.rows) return;
    const int slab = (int)(i / p.rows), row = (int)(i % p.rows), before = (p.first + BLOCK - 1) / BLOCK;
    #pragma unroll
    for (int half = 0; half < BLOCK; half += 8) {
        float v[8];
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int c = slab * BLOCK + half + k, own = c < p.first ? c : c - p.first;
            const int from = own / BLOCK + (c < p.first ? 0 : before);
            v[k] = c < p.channels ? ((const float*)p.apart)[((u64)from * p.rows + row) * BLOCK + own % BLOCK] : 0.f;
        }
        F32::store8((void*)p.out, i * BLOCK + half, v);
    }
}
