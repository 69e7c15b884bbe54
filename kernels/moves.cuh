// Rows and tiles from one place to another. All bound by memory, or by their launch.
#pragma once
#include "common.cuh"

struct HiddenArgs {
    u8* arena;
    const u32* pages;       // [rows], in units of 64 bytes
    const u32* positions;   // [rows]
    float* x;               // [rows][hidden]
    u32 offset, hidden;     // bytes of the hidden states in a workspace page; hidden is a multiple of 4
    int to_pages;
};
// Hidden states of positions into their workspace pages, or out of them. Grid (rows), block 256.
KERNEL(256, 4, hidden_rows)(HiddenArgs p) {
    grid_wait();
    grid_go();
    const u32 row = blockIdx.x;
    float4* page = (float4*)(p.arena + (u64)p.pages[row] * 64 + p.offset + (u64)(p.positions[row] % PAGE) * p.hidden * 4);
    float4* x = (float4*)(p.x + (u64)row * p.hidden);
    for (u32 i = threadIdx.x; i < p.hidden / 4; i += 256) {
        if (p.to_pages) page[i] = x[i];
        else x[i] = page[i];
    }
}

struct PickArgs {
    const float* from;      // [..][width], width a multiple of 4
    const u32* rows;        // [grid]
    float* to;              // [grid][width]
    u32 width;
};
// Some rows, side by side. Grid (rows picked), block 256.
KERNEL(256, 4, pick_rows)(PickArgs p) {
    grid_wait();
    grid_go();
    const float4* from = (const float4*)(p.from + (u64)p.rows[blockIdx.x] * p.width);
    float4* to = (float4*)(p.to + (u64)blockIdx.x * p.width);
    for (u32 i = threadIdx.x; i < p.width / 4; i += 256) to[i] = from[i];
}

struct SinksJob {
    u32 from, offset, to, n;
};
struct SinksArgs {
    u8* arena;
    const SinksJob* jobs;
    u32 to_offset, stride, d, bytes;    // of the layer in the sinks block; positions it has room for; of an element
};
// The first n positions of an exact tile into the narrower tile of a sinks block. Grid (jobs, KV heads), block 128.
KERNEL(128, 4, keep_sinks)(SinksArgs p) {
    grid_wait();
    grid_go();
    const SinksJob job = p.jobs[blockIdx.x];
    const u8* from = p.arena + (u64)job.from * 64 + job.offset + (u64)2 * blockIdx.y * p.d * PAGE * p.bytes;
    u8* to = p.arena + (u64)job.to * 64 + p.to_offset + (u64)2 * blockIdx.y * p.d * p.stride * p.bytes;
    const u8* values = from + (u64)p.d * PAGE * p.bytes;
    u8* to_values = to + (u64)p.d * p.stride * p.bytes;
    // In steps of two bytes: every element is so many.
    const u32 halves = p.bytes / 2;
    for (u32 i = threadIdx.x; i < p.d * job.n * halves; i += 128) {
        const u32 c = i / (job.n * halves), k = i % (job.n * halves);
        ((u16*)to)[c * p.stride * halves + k] = ((const u16*)from)[c * PAGE * halves + k];
        ((u16*)to_values)[i] = ((const u16*)values)[i];
    }
}
