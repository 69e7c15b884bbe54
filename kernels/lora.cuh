// What adapters change of a batch whose rows wear different ones (LoRA, Hu et al. 2021; DoRA's gains, Liu et al. 2024, eq. 5):
//
//   shrunk[row][j] = sum over k of down[j][k] x[row][k]          lora_shrink
//   y[row][o]     += sum over j of up[o][j] shrunk[row][j]       lora_expand
//   y[row][o]      = gain[o] (y[row][o] - b[o]) + b[o] + bias[o] adapt_rows
//   x[row][i]      = gain[i] x[row][i] + sum over j of down[token][j] up[j][i]     embed_adapted
//
// name            grid                                            block  dynamic shared bytes
// lora_shrink     (items, splits or 1, targets * rank tiles)      128    20480
// lora_expand     (any, items, targets)                           128    34816
// linear_worn_*   (linear.cuh): few rows are expanded where their products are summed
// adapt_rows      (rows, (width + 1023) / 1024)                   256    0
// embed_adapted   (rows)                                          256    0
//
// Neighbouring rows that wear one adapter are a Worn; an item is up to 64 of its rows. Factors are as the host's backend has them
// (ops::LowRank), down[rank][in], but for pairs of ranks side by side, up[out / 64][rank / 2][64][2]; bf16, 16-byte aligned, `in` a multiple of 8. Each adapter has a
// table of what it does at each place of the model; where it does nothing the rank is 0 and blocks leave at once.
//
// Bytes of an adapter and a place: 2 rank (in + out), once for up to 64 rows. FLOPs: 2 rows rank (in + out). Few rows are bound by
// their launch and by reading factors, many by reading x from the second-level cache once for every 16 ranks.
//
// A row's bits depend on that row and its adapter alone: a product has a column for each row, splits are of 512 k whoever sums them,
// and are added in order, by the last block to end where several sum. What was shrunk meets `up` as two bf16 numbers, which keep 16 bits
// of it.
// No kernel writes factors or tables, so both are read before the wait for the launch ahead.
#pragma once
#include "common.cuh"

namespace lora {

constexpr u32 ROWS = 64, RANKS = 16, SPLIT = 512, CHUNK = 64, NOBODY = ~0u;

// What an adapter does at one place; null and 0 where it does nothing. 48 bytes.
struct Site {
    const u16* down;
    const u32* up;          // pairs of ranks, the lower first
    const float* gain;
    const float* bias;
    const float* own_bias;  // that of the weights which stand in for the model's own, where `replaced`
    u32 rank, replaced;
};
struct Worn { const Site* sites; u32 first, rows; };
struct Item { u32 worn, row; };
static_assert(sizeof(Site) == 48 && sizeof(Worn) == 16 && sizeof(Item) == 8, "the host lays these out too");

__device__ __forceinline__ u32 rows_of(const Worn& w, const Item& i) { return min(ROWS, w.first + w.rows - i.row); }

}  // namespace lora

struct ShrinkArgs {
    const lora::Worn* worn;
    const lora::Item* items;
    const u16* x;           // bf16 [rows][in]
    u16* high;              // bf16 [targets][items * 64][stride], and what it leaves over
    u16* low;
    float* partials;        // [gridDim.y] as these, where gridDim.y > 1
    u32* ended;             // [targets * tiles][items], zeros before and after
    u32 place[3];
    u32 in, stride, tiles;  // stride a multiple of 16, as many as the widest adapter has ranks; tiles of 16 ranks
};
// 4 warps take 128 k of a split each. `down` is the left operand, as weights are in linear.cuh, with its order of k.
KERNEL(128, 4, lora_shrink)(const __grid_constant__ ShrinkArgs p) {
    using namespace lora;
    SHARED(float, sums);  // [4][64][20]
    const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, in = p.in;
    const u32 target = blockIdx.z / p.tiles, first = blockIdx.z % p.tiles * RANKS, splits = (in + SPLIT - 1) / SPLIT;
    const Item item = p.items[blockIdx.x];
    const Worn worn = p.worn[item.worn];
    const Site site = worn.sites[p.place[target]];
    if (first >= site.rank) {
        grid_wait();
        grid_go();
        return;
    }
    const u32 rows = rows_of(worn, item);
    const u16* down = site.down + (size_t)(first + g) * in + t * 8;
    const bool has[2] = {first + g < site.rank, first + g + 8 < site.rank};
    uint4 a[4][2];
    auto load = [&](u32 k) {
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                a[c][h] = make_uint4(0, 0, 0, 0);
                if (has[h] && k + c * 32 + t * 8 < in) a[c][h] = ld_ahead(reinterpret_cast<const uint4*>(down + (size_t)h * 8 * in + k + c * 32));
            }
    };
    load(blockIdx.y * SPLIT + warp * 128);
    grid_wait();
    grid_go();
    const u16* x = p.x + (size_t)(item.row + g) * in + t * 8;
    float total[8] = {};
    for (u32 split = blockIdx.y; split < splits; split += gridDim.y) {
        const u32 k = split * SPLIT + warp * 128;
        if (split != blockIdx.y) load(k);
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
            if (n * 8 >= rows) continue;
            float acc[4] = {};
#pragma unroll
            for (int c = 0; c < 4; c++) {
                uint4 b = make_uint4(0, 0, 0, 0);
                if (n * 8 + g < rows && k + c * 32 + t * 8 < in) b = *reinterpret_cast<const uint4*>(x + (size_t)n * 8 * in + k + c * 32);
                const uint4 lo = a[c][0], hi = a[c][1];
                const u32 a0[4] = {lo.x, hi.x, lo.y, hi.y}, a1[4] = {lo.z, hi.z, lo.w, hi.w};
                mma_b(acc, a0, b.x, b.y);
                mma_b(acc, a1, b.z, b.w);
            }
            float* to = sums + (warp * ROWS + n * 8 + t * 2) * 20 + g;
            to[0] = acc[0], to[20] = acc[1], to[8] = acc[2], to[28] = acc[3];
        }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            const u32 at = tid / 16 + 8 * i;
            if (at >= rows) continue;
            const float* from = sums + at * 20 + tid % 16;
            float v = from[0];
#pragma unroll
            for (u32 w = 1; w < 4; w++) v += from[w * ROWS * 20];
            total[i] = split == blockIdx.y ? v : total[i] + v;
        }
        __syncthreads();
    }
    const size_t all = (size_t)(gridDim.z / p.tiles) * gridDim.x * ROWS * p.stride;
    const size_t at = ((size_t)target * gridDim.x + blockIdx.x) * ROWS * p.stride + tid / 16 * p.stride + first + tid % 16;
    if (gridDim.y > 1) {
        // The last block of an item and a tile adds them up.
#pragma unroll
        for (u32 i = 0; i < 8; i++)
            if (tid / 16 + 8 * i < rows) p.partials[blockIdx.y * all + at + i * 8 * p.stride] = total[i];
        __threadfence();
        __syncthreads();
        u32* ended = p.ended + blockIdx.z * gridDim.x + blockIdx.x;
        const bool last = any_of_block(tid == 0 && atomicAdd(ended, 1u) == gridDim.y - 1);
        if (!last) return;
        __threadfence();
        if (tid == 0) *ended = 0;
        const float* from = p.partials + at;
        if (rows <= 8) {
            if (tid / 16 < rows) {
                float v = ld_fresh(from);
#pragma unroll 8
                for (u32 i = 1; i < gridDim.y; i++) v += ld_fresh(from + i * all);
                total[0] = v;
            }
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; i++) total[i] = tid / 16 + 8 * i < rows ? ld_fresh(from + i * 8 * p.stride) : 0.0f;
#pragma unroll 2
            for (u32 k = 1; k < gridDim.y; k++)
#pragma unroll
                for (u32 i = 0; i < 8; i++)
                    if (tid / 16 + 8 * i < rows) total[i] += ld_fresh(from + k * all + i * 8 * p.stride);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 8; i++)
        if (tid / 16 + 8 * i < rows) {
            const u16 h = of_b(total[i]);
            p.high[at + i * 8 * p.stride] = h;
            p.low[at + i * 8 * p.stride] = of_b(total[i] - b_of(h));
        }
}

struct ExpandArgs {
    const lora::Worn* worn;
    const lora::Item* items;
    const u16* high;        // as lora_shrink leaves them
    const u16* low;
    float* y[3];            // [rows][out]
    u32 place[3], out[3];
    u32 stride;
};
// Tiles of 64 outputs, 16 a warp; 64 ranks at a time. Blocks of one item take every so many-th tile.
KERNEL(128, 4, lora_expand)(const __grid_constant__ ExpandArgs p) {
    using namespace lora;
    SHARED(u8, shared);
    constexpr u32 TILE = CHUNK * 128, LINE = CHUNK + 8;  // a line of a tile: 64 outputs of two ranks, 256 bytes
    u16* high = reinterpret_cast<u16*>(shared + 2 * TILE);  // [64 rows][72]
    u16* low = high + ROWS * LINE;
    const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, target = blockIdx.z;
    const Item item = p.items[blockIdx.y];
    const Worn worn = p.worn[item.worn];
    const Site site = worn.sites[p.place[target]];
    const u32 rank = site.rank, out = p.out[target], tiles = (out + 63) / 64, chunks = (rank + CHUNK - 1) / CHUNK;
    if (rank == 0 || blockIdx.x >= tiles) {
        grid_wait();
        grid_go();
        return;
    }
    const u32 rows = rows_of(worn, item), steps = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x * chunks;
    // A line keeps its outputs exchanged by eights and its number, so that a product's four lines lie in banks of their own.
    auto feed = [&](u32 step) {
        if (step < steps) {
            const u32 tile = blockIdx.x + step / chunks * gridDim.x, at = step % chunks * CHUNK, pairs = min(CHUNK, (rank - at + 15) & ~15u) / 2;
            u8* to = shared + (step & 1) * TILE;
            const u32* from = site.up + ((size_t)tile * ((rank + 1) / 2) + at / 2) * 64;
            for (u32 e = tid; e < pairs * 16; e += 128)
                cp16_if(to + (e >> 4) * 256 + (((e & 15) ^ (e >> 4 & 3) << 1) << 4), from + (size_t)e * 4, at + (e >> 4) * 2 < rank);
        }
        cp_commit();
    };
    feed(0);
    grid_wait();
    grid_go();
    const size_t of_item = ((size_t)target * gridDim.y + blockIdx.y) * ROWS * p.stride;
    float acc[8][4];
    for (u32 step = 0; step < steps; step++) {
        const u32 at = step % chunks * CHUNK, ranks = min(CHUNK, (rank - at + 15) & ~15u);
        feed(step + 1);
        if (step == 0 || chunks > 1) {
            for (u32 e = tid; e < rows * ranks / 8; e += 128) {
                const u32 row = e / (ranks / 8), j = e % (ranks / 8) * 8;
                const size_t from = of_item + row * p.stride + at + j;
                *reinterpret_cast<uint4*>(high + row * LINE + j) = *reinterpret_cast<const uint4*>(p.high + from);
                *reinterpret_cast<uint4*>(low + row * LINE + j) = *reinterpret_cast<const uint4*>(p.low + from);
            }
        }
        cp_wait<1>();
        __syncthreads();
        if (at == 0)
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) acc[n][c] = 0.0f;
        const u8* tile = shared + (step & 1) * TILE;
        for (u32 k = 0; k < ranks; k += 16) {
            const u32 *pair = reinterpret_cast<const u32*>(tile) + (k / 2 + t) * 64, o = warp * 16 + g ^ t << 3;
            const u32 a[4] = {pair[o], pair[o ^ 8], pair[256 + o], pair[256 + (o ^ 8)]};
#pragma unroll
            for (u32 n = 0; n < 8; n++) {
                if (n * 8 >= rows) continue;
                const u32 b = (n * 8 + g) * LINE + k + t * 2;
                const u32 *h = reinterpret_cast<const u32*>(high + b), *l = reinterpret_cast<const u32*>(low + b);
                mma_b(acc[n], a, l[0], l[4]);
                mma_b(acc[n], a, h[0], h[4]);
            }
        }
        if (at + CHUNK >= rank) {
            const u32 o = (blockIdx.x + step / chunks * gridDim.x) * 64 + warp * 16 + g;
            float* y = p.y[target] + (size_t)item.row * out + o;
#pragma unroll
            for (u32 n = 0; n < 8; n++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    const u32 row = n * 8 + t * 2 + (c & 1), more = (c >> 1) * 8;
                    if (row < rows && o + more < out) y[(size_t)row * out + more] += acc[n][c];
                }
        }
        __syncthreads();
    }
}

struct AdaptArgs {
    const lora::Worn* worn;
    const u32* of_row;      // [rows]: which Worn, or NOBODY
    float* y;               // [rows][width]: a linear layer's own output, bias included
    float* onto;            // [rows][width], or null: where the result is added for every row, instead of staying in y
    const float* bias;      // [width], the model's own, or null
    u32 place, width;
};
// Bytes: 8 rows width, 12 where there is `onto`; gains and biases come from the caches.
KERNEL(256, 4, adapt_rows)(AdaptArgs p) {
    grid_wait();
    grid_go();
    const u32 of = p.of_row[blockIdx.x];
    const lora::Site* site = of == lora::NOBODY ? nullptr : &p.worn[of].sites[p.place];
    const float* gain = site ? site->gain : nullptr;
    const float* bias = site ? site->bias : nullptr;
    const float* own = site && site->replaced ? site->own_bias : p.bias;
    if (!p.onto && !gain && !bias) return;
    for (u32 i = blockIdx.y * 1024 + threadIdx.x; i < min(p.width, (blockIdx.y + 1) * 1024); i += 256) {
        const size_t at = (size_t)blockIdx.x * p.width + i;
        float v = p.y[at];
        if (gain) v += (gain[i] - 1.0f) * (v - (own ? own[i] : 0.0f));
        if (bias) v += bias[i];
        if (p.onto) p.onto[at] += v;
        else p.y[at] = v;
    }
}

struct EmbedAdaptedArgs {
    const u32* tokens;      // [rows]
    const float* gain;      // [width], or null
    const u16* down;        // bf16 [vocabulary][rank]
    const float* up;        // [rank][width]
    float* x;               // [rows][width]: the vectors of the tokens
    u32 width, rank;
};
// Bytes: 8 rows width, and 4 rank width of `up` from the caches.
KERNEL(256, 4, embed_adapted)(EmbedAdaptedArgs p) {
    grid_wait();
    grid_go();
    const u16* down = p.down + (size_t)p.tokens[blockIdx.x] * p.rank;
    float* x = p.x + (size_t)blockIdx.x * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += 256) {
        float v = x[i];
        if (p.gain) v *= p.gain[i];
        for (u32 j = 0; j < p.rank; j++) v += b_of(down[j]) * p.up[(size_t)j * p.width + i];
        x[i] = v;
    }
}
