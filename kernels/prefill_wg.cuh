// Attention of chunks of queries as prefill.cuh has it, by Hopper's products of warpgroups: the same arguments, rows and carried sums; items
// are of 128 queries, and sums are rounded otherwise.
//
// name               grid                           block  dynamic shared bytes: 1536 D
// prefill_wg_D       (heads, blocks of 128 queries) 256    D 64: 98304, 80: 122880, 96: 147456, 128: 196608
//
// A block is two warpgroups of 64 queries each, which meet two pages a step. Queries are left operands and stay in registers, so do
// weights, which are what scores become where they stand; keys and values are right operands, read from shared memory by the matrix unit, both with
// their page's own rows as rows of k. A step's scores are asked for beside the sums of the step before; while the matrix unit is at the
// sums, the scores become weights (the order of FlashAttention-3, arXiv 2407.08608, section 3.2). The two warpgroups meet at a barrier a step, and nothing else tells
// them whose turn the matrix unit is (its section 3.1 does). One without queries only copies.
//
// FLOPs and bytes are those of prefill.cuh, with 128 queries a block: half of its traffic with the second-level cache, 256 D bytes a page,
// block and head. A step of D 128 is 2048 clocks of the matrix unit for both warpgroups, some 300 instructions a warp and 1024 clocks of
// exponentials beside them. Bound by the matrix unit; predicted at 500 TFLOP/s, and not timed yet.
//
// Chunks change nothing here either: steps are counted from position 0, and one that a query does not see adds exact zeros.
#pragma once
#include "prefill.cuh"

#if WARPGROUPS
namespace prefill {

template <int D> struct Wide {
    static constexpr int QUERIES = 128, THREADS = 256, STEP = 2 * PAGE, RING = 3;
    // In tiles of 8 x 8, for wg_tile: keys [D / 8][STEP / 8], values [STEP / 8][D / 8].
    static constexpr u32 KEYS_NEXT = STEP * 16, VALUES_NEXT = D * 16, KEYS = D * STEP * 2, SLOT = 2 * KEYS, BYTES = RING * SLOT;
};

// Two pages' keys and values. Eight neighbouring lanes bring 16 bytes of eight rows, which are a tile's: that writes to all banks once, and
// four such eights read 64 bytes of each row. Values from position `there` on are zero, as what is not there yet may be NaN; such keys are masked.
template <int D> __device__ __forceinline__ void load_wide(u8* slot, const u8* const (&from)[2], u32 there) {
    typedef Wide<D> W;
    const u32 row = threadIdx.x % 8, tile = threadIdx.x / 8;
#pragma unroll
    for (u32 page = 0; page < 2; page++) {
#pragma unroll
        for (u32 i = 0; i < D; i += 32) {
            const u32 k8 = (tile + i) / 8, n8 = (tile + i) % 8;
            if (D % 32 == 0 || tile + i < D) cp16(slot + k8 * W::KEYS_NEXT + (8 * page + n8) * 128 + row * 16, from[page] + (k8 * 8 + row) * (PAGE * 2) + n8 * 16);
        }
#pragma unroll
        for (u32 i = 0; i < D; i += 32) {
            const u32 k8 = (tile + i) / (D / 8), n8 = (tile + i) % (D / 8), position = k8 * 8 + row;
            if (D % 32 == 0 || tile + i < D)
                cp16_if(slot + W::KEYS + (8 * page + k8) * W::VALUES_NEXT + n8 * 128 + row * 16, from[page] + D * PAGE * 2 + position * (D * 2) + n8 * 16,
                        page * PAGE + position < there);
        }
    }
    cp_commit();
}

template <int D> __device__ __forceinline__ void attend_wide(const PrefillArgs& p) {
    typedef Wide<D> W;
    constexpr int N8 = W::STEP / 8;
    SHARED(u8, shared);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 heads = gridDim.x, head = blockIdx.x, kv_head = head / (heads / p.kv_heads);
    const Item item = p.items[blockIdx.y];
    const Row row = p.rows[item.row];
    const u32 queries = min(row.n - item.query, (u32)W::QUERIES), begin = row.seen ? row.seen - 1 : row.position + item.query, last = row.seen ? begin : begin + queries - 1;
    const u32* table = p.pages + row.pages;
    const u8* arena = p.arena + p.offset + (u64)kv_head * 4 * D * PAGE;
    const u32 pages = last / PAGE + 1, steps = last / W::STEP + 1;
    // A step's pages; of a second one that is not there the first stands in, and nothing of it is seen.
    u32 next[2];
    auto look_up = [&](u32 step) {
        if (step < steps) next[0] = table[2 * step], next[1] = table[min(2 * step + 1, pages - 1)];
    };
    auto bring = [&](u32 step) {
        if (step >= steps) return;
        const u8* from[2] = {arena + (u64)next[0] * UNIT, arena + (u64)next[1] * UNIT};
        load_wide<D>(shared + step % W::RING * W::SLOT, from, last + 1 - step * W::STEP);
    };
    look_up(0);
    bring(0);
    look_up(1);
    bring(1);
    look_up(2);

    if (threadIdx.x / 128 * 64 >= queries) {
        // All that the other warpgroup waits for.
        for (u32 step = 0; step < steps; step++) {
            if (step == 0 && steps > 1) cp_wait<1>();
            else cp_wait<0>();
            wg_shared_written();
            __syncthreads();
            if (step > 0) bring(step + 1), look_up(step + 2);
        }
        return;
    }
    const u32 mine = warp * 16 + g;
    // Queries times scale in base 2. Zero past the end.
    u32 a[D / 16][4];
    const float* q = p.q + (u64)(row.first + item.query) * p.q_stride + head * D;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float* from = q + (u64)(mine + 8 * half) * p.q_stride + 2 * t;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            const float2 x = mine + 8 * half < queries ? *(const float2*)(from + i * 8) : float2{0, 0};
            a[i / 2][half + i % 2 * 2] = b_pair(x.x * p.scale, x.y * p.scale);
        }
    }
    float o[D / 8][4] = {}, s[N8][4], top[2] = {-f_of(0x7f800000), -f_of(0x7f800000)}, sum[2] = {};
    if (row.carry & CARRIED_IN) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 query = mine + 8 * half;
            if (query >= queries) continue;
            const u64 line = (u64)(row.first + item.query + query) * heads + head;
            const float2 state = *(const float2*)(p.carried_state + 2 * line);
            // Of the four lanes of a query one has the sum, which they add up at the end.
            top[half] = state.x, sum[half] = t == 0 ? state.y : 0.0f;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float2 x = *(const float2*)(p.carried + line * D + 2 * t + n * 8);
                o[n][2 * half] = x.x, o[n][2 * half + 1] = x.y;
            }
        }
    }
    // Positions up to this one are seen by every query of the warp.
    const u32 all_see = min(begin + warp * 16, last);
    u32 weights[N8 / 2][4] = {};

    auto score = [&](u32 step) {
        const WgTile keys = wg_tile(shared + step % W::RING * W::SLOT, 128, W::KEYS_NEXT);
        wg_mma_b<true, false>(s, a[0], keys);
#pragma unroll
        for (int k = 1; k < D / 16; k++) wg_mma_b<true, true>(s, a[k], wg_at(keys, k * W::KEYS_NEXT / 8));
        wg_commit();
    };
    auto add_up = [&](u32 step) {
        const WgTile values = wg_tile(shared + step % W::RING * W::SLOT + W::KEYS, 128, W::VALUES_NEXT);
#pragma unroll
        for (int k = 0; k < N8 / 2; k++) wg_mma_b<true, true>(o, weights[k], wg_at(values, k * W::VALUES_NEXT / 8));
        wg_commit();
    };
    // Scores of a step become weights, in place; `shrink` is what sums so far come to beside them.
    float shrink[2];
    auto weigh = [&](u32 step) {
        const u32 at = step * W::STEP;
        if (at + W::STEP - 1 > all_see) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                // A query past the end sees what the last one sees, so that it meets no more; it is not written.
                const int seen = (int)(min(begin + mine + 8 * half, last) - at - 2 * t);
#pragma unroll
                for (int n = 0; n < N8; n++) {
                    if (n * 8 > seen) s[n][2 * half] = -f_of(0x7f800000);
                    if (n * 8 + 1 > seen) s[n][2 * half + 1] = -f_of(0x7f800000);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = top[half];
#pragma unroll
            for (int n = 0; n < N8; n++) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            shrink[half] = ex2(top[half] - most);  // position 0 is seen by all, so the greatest is finite
            top[half] = most;
            float more[2] = {};
#pragma unroll
            for (int n = 0; n < N8; n++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) { s[n][i] = ex2(s[n][i] - most); more[i % 2] += s[n][i]; }
            }
            sum[half] = fmaf(sum[half], shrink[half], more[0] + more[1]);
        }
    };
    // And left operands of the next product: what one gives two neighbouring tiles of columns is what the next takes as 16 columns. The sums they
    // are left behind by are waited for. The greatest seldom moves once a history is long, and products with one change nothing. That all weights
    // are asked about keeps the compiler from waiting first and weighing then, which would leave nothing beside the sums: it moves no wait across a branch.
    auto pack = [&] {
        if (__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f || !(sum[0] + sum[1] >= 0))) {
            wg_wait<0>();
            wg_settle(o);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) o[n][i] *= shrink[i / 2];
            }
        }
        wg_wait<0>();
        wg_settle(weights);
        wg_settle(o);
#pragma unroll
        for (int k = 0; k < N8 / 2; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) weights[k][i] = b_pair(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
        }
        wg_settle(weights);
        wg_settle(o);
    };

    // Step 0 is here, 1 may be on its way.
    if (steps > 1) cp_wait<1>();
    else cp_wait<0>();
    wg_shared_written();
    __syncthreads();
    wg_settle(a);
    wg_fence();
    score(0);
    wg_wait<0>();
    wg_settle(s);
    wg_settle(a);
    weigh(0);
    pack();
#pragma unroll 1
    for (u32 step = 1; step < steps; step++) {
        // This step is there for all, and all are done with the one before the last, whose place the next one takes.
        cp_wait<0>();
        wg_shared_written();
        __syncthreads();
        wg_fence();
        score(step);
        add_up(step - 1);
        bring(step + 1);
        look_up(step + 2);
        wg_wait<1>();
        wg_settle(s);
        wg_settle(a);
        weigh(step);
        pack();
    }
    wg_fence();
    add_up(steps - 1);
    wg_wait<0>();
    wg_settle(weights);
    wg_settle(o);

#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const float inverse = 1.0f / total;
        const u32 query = mine + 8 * half;
        if (query >= queries) continue;
        const u64 line = (u64)(row.first + item.query + query) * heads + head;
        if (row.carry & CARRIED_OUT) {
            if (t == 0) *(float2*)(p.carried_state + 2 * line) = float2{top[half], total};
#pragma unroll
            for (int n = 0; n < D / 8; n++) *(float2*)(p.carried + line * D + 2 * t + n * 8) = float2{o[n][2 * half], o[n][2 * half + 1]};
            continue;
        }
        u16* to = p.out + line * D + 2 * t;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(u32*)(to + n * 8) = b_pair(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
    }
}

}  // namespace prefill
#define PREFILL_WG(D, OCCUPANCY) \
    KERNEL(256, OCCUPANCY, prefill_wg_##D)(const __grid_constant__ PrefillArgs p) { grid_wait(); grid_go(); prefill::attend_wide<D>(p); }
#else
#define PREFILL_WG(D, OCCUPANCY) KERNEL(256, 1, prefill_wg_##D)(const __grid_constant__ PrefillArgs) {}
#endif
PREFILL_WG(64, 1)
PREFILL_WG(80, 1)
PREFILL_WG(96, 1)
PREFILL_WG(128, 1)
#undef PREFILL_WG
