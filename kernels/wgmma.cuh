// Operands and registers of matrix instructions of warp groups (wgmma), compute capability 9.0.
#pragma once
#include "common.cuh"

// K-major rows of 32 bytes, swizzled; `far` bytes from 8 rows to the next 8.
__device__ __forceinline__ u64 group_operand(u32 address, u32 far) {
    return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | (u64)(far >> 4) << 32 | 3ull << 62;
}

#define D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define D16(j) D4(j), D4(j + 1), D4(j + 2), D4(j + 3)
#define D32(j) D16(j), D16(j + 4)
#define R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define R32 R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R48 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
