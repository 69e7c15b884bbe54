// What the device can do at best, to judge the others by.
#pragma once
#include "common.cuh"

struct ReadArgs {
    const uint4* from;
    u64 n;
    u32* out;
};

// Sums n vectors of 16 bytes: bytes = 16 n. Memory binds. Grid any, block 512.
KERNEL(512, 2, probe_read)(ReadArgs p) {
    u32 sum = 0;
    const u64 step = (u64)gridDim.x * 512 * 8;
    for (u64 i = ((u64)blockIdx.x * 8) * 512 + threadIdx.x; i < p.n; i += step) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = i + k * 512 < p.n ? ld_once(p.from + i + k * 512) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    // Never so, but the compiler cannot know.
    if (sum == 0x12345679u) p.out[0] = sum;
}
