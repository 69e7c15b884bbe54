// Logits to tokens: what of each row's logits leaves the device is a token, and log-probabilities where they were asked for.
//
//   best    = max over ids of l[id]                              l[id] bent by penalties, biases and bans where a row has any
//   q[id]   = floor((best - l[id]) * scale)                      steps of 2^-24 octave below the best; scale = 2^24 log2(e) / temperature
//   w[id]   = 2^40 2^(-q / 2^24), rounded down                   nothing from 40 octaves on
//   e[id]   = q[id] 2^32 + id                                    the order of tokens: nearest the best first, equals by id
//   cut     = the end of the first top-k in this order, or of the fewest whose w reach top-p of what top-k left, or of q <= most (min-p),
//             whichever comes first
//   token   = the least id with  sum of w[i] over i <= id, e[i] <= cut  >  uniform(seed, index) * sum over all e[i] <= cut
//
// Tokens within one step are equals. Greedy rows take the lowest id of the best. The log-probability of a token is l - best -
// ln(sum of w / w(0)) of the logits before they were bent, with scale at temperature 1. `model/draw.rs` has the same arithmetic, and the
// host's sampler chooses the same tokens.
//
// All sums are of integers, so neither the cut into slices nor the order of threads and blocks changes a bit, and a row's result depends
// on that row alone. Weights are a polynomial in integers, the same on every processor; of floats there is one difference and one product.
//
// A row is met in slices by as many blocks; between the kernels of the chain lie partial results of slices, and a histogram of a row's
// weights by q, from which follows how few candidates the cut can be among. They are listed, and one block does the rest on that list.
//
// name            grid             block  dynamic shared bytes     for rows
// sample_best     (slices, rows)   256    64                       all; once more where some bend
// sample_top      (slices, rows)   256    18560                    with log-probabilities
// sample_bend     (rows)           512    0                        that bend
// sample_weigh    (slices, rows)   256    15424                    that draw
// sample_gather   (slices, rows)   256    128                      that draw with top-k or top-p
// sample_choose   (rows)           512    8512                     all; with log-probabilities 320 + 256 slices where that is more
//
// Bytes: 4 vocab a row each of best, top, weigh, gather (twice, the second time from the first-level cache); the first finds them in L2,
// where the output head left them. Operations: 4 an element of best, some 30 of the others, nearly all in integers; so few rows wait for
// launches and latency (best and choose alone when greedy), many for L2 in best, for integer units in the others. Where the candidates
// are more than LISTED, as under a flat distribution, choose reads the row itself some ten times, by one multiprocessor.
#pragma once
#include "common.cuh"

struct SampleRow {
    u64 seed;
    u64 top_p;          // 2^64 top-p, 0: all
    u32 index;          // of the draw
    float scale;        // 2^24 log2(e) / temperature, 0: greedy
    u32 top_k;          // 0: all
    u32 most;           // q of the least weight that min-p keeps
    float repetition;
    u32 token;          // to be scored
    u32 alternatives;   // at most TOP; NONE: no log-probability
    u32 kind;           // SAMPLE_*
    u32 first, penalties, biases, bans;  // its bends: first .. penalties, .. biases, .. bans
};
static_assert(sizeof(SampleRow) == 64, "the host lays it out too");
constexpr u32 SAMPLE_NOTHING = 0, SAMPLE_TOKEN = 1, SAMPLE_SCORE = 2;

// What changes a logit. A penalty: l / repetition (l * repetition where negative) - by; a bias: l + by; a ban: -infinity.
// No kind names a token twice.
struct Bend {
    u32 token;
    float by;
};
struct Found {
    u64 total;          // sum of w at temperature 1; 0 where no log-probability was asked for
    u32 token;          // NONE where no token can be chosen
    float best, logit;  // before bending: the greatest, and the token's
};
static_assert(sizeof(Found) == 24, "the host lays it out too");
struct Alternative {
    u32 token;          // NONE beyond the vocabulary
    float logit;
};

struct SampleArgs {
    float* logits;              // [rows][vocab]; bent in place
    const SampleRow* asked;     // [rows]
    const Bend* bends;
    float* was;                 // as bends: the logit before each
    u64* best;                  // [2][rows][slices]: of the raw, of the bent
    u64* sums;                  // [rows][slices]: of w
    u64* totals;                // [rows][slices]: of w at temperature 1
    u64* tops;                  // [rows][slices][TOP]
    u64* weights;               // [rows][BINS]
    u32* counts;                // [rows][BINS]
    u32* listed;                // [rows]
    u64* list;                  // [rows][LISTED]
    Found* found;               // [rows]
    Alternative* alternatives;  // [rows][TOP]
    u32 rows, vocab, slices, width, bent;
    float unit;                 // scale at temperature 1
};

namespace sample {

constexpr int THREADS = 256, CHOOSERS = 512, DIGITS = 1024;
static_assert(DIGITS == 2 * CHOOSERS, "two bins a thread");
constexpr u32 NONE = ~0u;
constexpr u32 TOP = 32, LISTED = 16384;
// Elements a thread of a slice has at most.
constexpr u32 EACH = 64;
constexpr u32 LIMIT = 40u << 24;
constexpr int SHIFT = 19, BINS = LIMIT >> SHIFT, OWN = BINS / THREADS;
static_assert(BINS % THREADS == 0, "every thread owns as many bins");

// A logit in an order of integers, zeros equal, NaN above all.
__device__ __forceinline__ u32 key_of(float l) {
    u32 u = u_of(l);
    if ((u & 0x7fffffff) > 0x7f800000) return ~0u;
    if (u == 0x80000000) u = 0;
    return u & 0x80000000 ? ~u : u | 0x80000000;
}
__device__ __forceinline__ float of_key(u32 key) { return f_of(key & 0x80000000 ? key & 0x7fffffff : ~key); }
// The greater first, of equals the lower id.
__device__ __forceinline__ u64 ranked(u32 key, u32 id) { return (u64)key << 32 | (u32)~id; }
__device__ __forceinline__ bool finite(u64 best) { return best >> 32 > 0x007fffff && best >> 32 < 0xff800000; }

// Steps below the best; NONE where the weight is nothing.
__device__ __forceinline__ u32 distance(float l, float best, float scale) {
    const float y = (best - l) * scale;
    return y < (float)LIMIT ? (u32)y : NONE;
}
__device__ __forceinline__ u32 mul_high(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
// 2^g in 31 bits after the point, g = 1 - fraction; within 1e-7 of itself, and never less for a lesser q.
__device__ __forceinline__ u64 weight(u32 q) {
    const u32 g = ~(q << 8);
    u32 t = 8071271;
    t = 38616766 + mul_high(t, g);
    t = 239738853 + mul_high(t, g);
    t = 1031476366 + mul_high(t, g);
    t = 2977064037 + mul_high(t, g);
    return ((u64)(0x80000000 + (mul_high(t, g) >> 1)) << 8) >> (q >> 24);
}
// a b / 2^64, rounded down.
__device__ __forceinline__ u64 mul_high(u64 a, u64 b) {
    const u64 al = (u32)a, ah = a >> 32, bl = (u32)b, bh = b >> 32;
    const u64 lh = al * bh, hl = ah * bl;
    const u64 middle = (al * bl >> 32) + (u32)lh + (u32)hl;
    return ah * bh + (lh >> 32) + (hl >> 32) + (middle >> 32);
}
__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
// A number in [0, 1) in 53 bits, as 2^64 of it.
__device__ __forceinline__ u64 uniform(u64 seed, u32 index) {
    return mix(mix(seed + 0x9e3779b97f4a7c15ull) + (u64)index * 0x9e3779b97f4a7c15ull) >> 11 << 11;
}

template <int T> __device__ __forceinline__ u64 block_max(u64 x, u64* shared) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x = max(x, __shfl_xor_sync(~0u, x, i));
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < T / 32; i++) x = max(x, shared[i]);
    return x;
}
// Sum over the threads before this one; `total` is that of all.
template <int T> __device__ __forceinline__ u64 block_before(u64 x, u64* shared, u64& total) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = x;
#pragma unroll
    for (u32 i = 1; i < 32; i *= 2) {
        const u64 y = __shfl_sync(~0u, sum, lane >= i ? lane - i : 0);
        if (lane >= i) sum += y;
    }
    __syncthreads();
    if (lane == 31) shared[warp] = sum;
    __syncthreads();
    u64 before = 0;
    total = 0;
    for (u32 i = 0; i < T / 32; i++) {
        if (i == warp) before = total;
        total += shared[i];
    }
    return before + sum - x;
}
template <int T> __device__ __forceinline__ u64 block_sum(u64 x, u64* shared) {
    u64 total;
    block_before<T>(x, shared, total);
    return total;
}

// f(id, logit) for ids of first .. end, in order for each thread; B loads are on their way at a time.
template <int T, int B, class F> __device__ __forceinline__ void over(const float* row, u32 first, u32 end, F f) {
    for (u32 at = first + threadIdx.x; at < end; at += B * T) {
        float l[B];
#pragma unroll
        for (int k = 0; k < B; k++)
            if (at + k * T < end) l[k] = row[at + k * T];
#pragma unroll
        for (int k = 0; k < B; k++)
            if (at + k * T < end) f(at + k * T, l[k]);
    }
}

// Where a slice's block finds its part of a row.
struct Slice {
    const float* row;
    u32 first, end;
    u64 at;  // among all slices
};
__device__ __forceinline__ Slice slice_of(const SampleArgs& p) {
    const u32 first = min(p.vocab, blockIdx.x * p.width);
    return {p.logits + (u64)blockIdx.y * p.vocab, first, min(p.vocab, first + p.width), (u64)blockIdx.y * p.slices + blockIdx.x};
}
template <int T> __device__ __forceinline__ u64 best_of(const SampleArgs& p, u32 row, bool bent, u64* shared) {
    const u64* from = p.best + ((u64)(bent ? p.rows : 0) + row) * p.slices;
    return block_max<T>(threadIdx.x < p.slices ? from[threadIdx.x] : 0, shared);
}
__device__ __forceinline__ bool bends(const SampleRow& r) { return r.first != r.bans; }
__device__ __forceinline__ bool draws(const SampleRow& r) { return r.kind == SAMPLE_TOKEN && r.scale > 0; }
__device__ __forceinline__ bool truncates(const SampleRow& r) { return r.top_k || r.top_p; }

// Adds to a sum of two words. Words wrap and carry alike in any order.
__device__ __forceinline__ void add(u32* low, u32* high, u64 x) {
    const u32 l = (u32)x;
    const u32 carry = l && atomicAdd(low, l) + l < l;
    const u32 h = (u32)(x >> 32) + carry;
    if (h) atomicAdd(high, h);
}

__device__ __forceinline__ void best(const SampleArgs& p) {
    SHARED(u64, shared);
    const SampleRow& r = p.asked[blockIdx.y];
    if (r.kind == SAMPLE_NOTHING || (p.bent && !bends(r))) return;
    const Slice s = slice_of(p);
    if (!p.bent && draws(r) && truncates(r)) {
        for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < BINS; i += p.slices * THREADS) {
            p.counts[(u64)blockIdx.y * BINS + i] = 0;
            p.weights[(u64)blockIdx.y * BINS + i] = 0;
        }
        if (blockIdx.x == 0 && threadIdx.x == 0) p.listed[blockIdx.y] = 0;
    }
    u32 key = 0, id = 0;
    over<THREADS, 8>(s.row, s.first, s.end, [&](u32 i, float l) {
        const u32 k = key_of(l);
        if (k > key) key = k, id = i;
    });
    const u64 x = block_max<THREADS>(key ? ranked(key, id) : 0, shared);
    if (threadIdx.x == 0) p.best[(p.bent ? (u64)p.rows * p.slices : 0) + s.at] = x;
}

// The best of a slice, as many as are asked for. Those that are no less than the n-th of the threads' own best are at most EACH n.
__device__ __forceinline__ void top(const SampleArgs& p) {
    SHARED(u64, shared);         // [8]
    u64* own = shared + 8;       // [THREADS]
    u64* some = own + THREADS;   // [TOP * EACH]
    u64* least = some + TOP * EACH;
    u32* n = (u32*)(least + 1);
    const SampleRow& r = p.asked[blockIdx.y];
    if (r.kind == SAMPLE_NOTHING || r.alternatives == NONE) return;
    const u64 first = best_of<THREADS>(p, blockIdx.y, false, shared);
    if (!finite(first)) return;
    const float best = of_key((u32)(first >> 32));
    const Slice s = slice_of(p);
    u64 sum = 0, mine = 0;
    over<THREADS, 8>(s.row, s.first, s.end, [&](u32 i, float l) {
        const u32 q = distance(l, best, p.unit);
        if (q != NONE) sum += weight(q);
        mine = max(mine, ranked(key_of(l), i));
    });
    sum = block_sum<THREADS>(sum, shared);
    if (threadIdx.x == 0) p.totals[s.at] = sum;
    if (r.alternatives == 0) return;
    own[threadIdx.x] = mine;
    if (threadIdx.x == 0) *least = 0, *n = 0;
    __syncthreads();
    u32 rank = 0;
    for (int i = 0; i < THREADS; i++) rank += own[i] > mine;
    if (mine && rank == r.alternatives - 1) *least = mine;
    __syncthreads();
    const u64 from = max(*least, (u64)1);
    if (mine >= from)
        over<THREADS, 8>(s.row, s.first, s.end, [&](u32 i, float l) {
            const u64 x = ranked(key_of(l), i);
            if (x >= from) some[atomicAdd(n, 1u)] = x;
        });
    __syncthreads();
    u64* to = p.tops + s.at * TOP;
    for (u32 i = threadIdx.x; i < *n; i += THREADS) {
        u32 before = 0;
        for (u32 j = 0; j < *n; j++) before += some[j] > some[i];
        if (before < r.alternatives) to[before] = some[i];
    }
    for (u32 i = *n + threadIdx.x; i < r.alternatives; i += THREADS) to[i] = 0;
}

__device__ __forceinline__ void bend(const SampleArgs& p) {
    const SampleRow& r = p.asked[blockIdx.x];
    if (r.kind == SAMPLE_NOTHING) return;
    float* row = p.logits + (u64)blockIdx.x * p.vocab;
    for (u32 i = r.first + threadIdx.x; i < r.penalties; i += CHOOSERS) {
        const Bend b = p.bends[i];
        const float l = row[b.token];
        p.was[i] = l;
        row[b.token] = (l > 0 ? l / r.repetition : product(l, r.repetition)) - b.by;
    }
    __syncthreads();
    for (u32 i = r.penalties + threadIdx.x; i < r.biases; i += CHOOSERS) {
        const Bend b = p.bends[i];
        p.was[i] = row[b.token];
        row[b.token] += b.by;
    }
    __syncthreads();
    for (u32 i = r.biases + threadIdx.x; i < r.bans; i += CHOOSERS) {
        const u32 token = p.bends[i].token;
        p.was[i] = row[token];
        row[token] = -INFINITY;
    }
}

// Whether something can be drawn of a row, and its best logit.
__device__ __forceinline__ bool drawn_from(const SampleArgs& p, const SampleRow& r, u64* shared, float& best) {
    if (!draws(r) || !finite(best_of<THREADS>(p, blockIdx.y, false, shared))) return false;
    const u64 x = best_of<THREADS>(p, blockIdx.y, bends(r), shared);
    best = of_key((u32)(x >> 32));
    return finite(x);
}

__device__ __forceinline__ void weigh(const SampleArgs& p) {
    SHARED(u64, shared);              // [8]
    u32* low = (u32*)(shared + 8);    // [BINS]
    u32* high = low + BINS;
    u32* count = high + BINS;
    const SampleRow& r = p.asked[blockIdx.y];
    float best;
    if (!drawn_from(p, r, shared, best)) return;
    const Slice s = slice_of(p);
    const float scale = r.scale;
    if (!truncates(r)) {
        const u32 most = r.most;
        u64 sum = 0;
        over<THREADS, 8>(s.row, s.first, s.end, [&](u32, float l) {
            const u32 q = distance(l, best, scale);
            if (q <= most) sum += weight(q);
        });
        sum = block_sum<THREADS>(sum, shared);
        if (threadIdx.x == 0) p.sums[s.at] = sum;
        return;
    }
    for (int i = threadIdx.x; i < BINS; i += THREADS) low[i] = high[i] = count[i] = 0;
    __syncthreads();
    over<THREADS, 8>(s.row, s.first, s.end, [&](u32, float l) {
        const u32 q = distance(l, best, scale);
        if (q == NONE) return;
        atomicAdd(count + (q >> SHIFT), 1u);
        add(low + (q >> SHIFT), high + (q >> SHIFT), weight(q));
    });
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (!count[i]) continue;
        atomicAdd(p.counts + (u64)blockIdx.y * BINS + i, count[i]);
        atomicAdd(p.weights + (u64)blockIdx.y * BINS + i, (u64)high[i] << 32 | low[i]);
    }
}

__device__ __forceinline__ void gather(const SampleArgs& p) {
    SHARED(u64, shared);    // [8]
    u64* said = shared + 8; // the last bin of candidates, how many they are, where this block's begin
    const SampleRow& r = p.asked[blockIdx.y];
    float best;
    if (!draws(r) || !truncates(r) || !drawn_from(p, r, shared, best)) return;
    u64 amount[OWN], own = 0, total, candidates = 0;
    u32 count[OWN];
    const u64 bin = (u64)blockIdx.y * BINS + threadIdx.x * OWN;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        count[i] = p.counts[bin + i];
        amount[i] = r.top_k ? count[i] : p.weights[bin + i];
        own += amount[i];
        candidates += count[i];
    }
    u64 before = block_before<THREADS>(own, shared, total);
    const u64 want = r.top_k ? min((u64)r.top_k, total) : max(mul_high(r.top_p, total), (u64)1);
    u64 all, listed = block_before<THREADS>(candidates, shared, all);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        listed += count[i];
        if (before < want && before + amount[i] >= want) said[0] = threadIdx.x * OWN + i, said[1] = listed;
        before += amount[i];
    }
    __syncthreads();
    const u32 last = (u32)said[0];
    if (said[1] > LISTED) return;
    const Slice s = slice_of(p);
    const float scale = r.scale;
    u32 n = 0;
    over<THREADS, 8>(s.row, s.first, s.end, [&](u32, float l) { n += distance(l, best, scale) >> SHIFT <= last; });
    u64 of_block, at = block_before<THREADS>(n, shared, of_block);
    if (threadIdx.x == 0) said[2] = of_block ? atomicAdd(p.listed + blockIdx.y, (u32)of_block) : 0;
    __syncthreads();
    u64* to = p.list + (u64)blockIdx.y * LISTED + said[2] + at;
    if (n) {
        over<THREADS, 8>(s.row, s.first, s.end, [&](u32 i, float l) {
            const u32 q = distance(l, best, scale);
            if (q >> SHIFT <= last) *to++ = (u64)q << 32 | i;
        });
    }
}

// Tokens to choose from, as e: a list, or part of a row; those up to `cut`.
struct Source {
    const u64* list;
    u32 n;
    const float* row;
    u32 first, end;
    float best, scale;
    u64 cut;
};
template <class F> __device__ __forceinline__ void each(const Source& s, F f) {
    if (s.list) {
        for (u32 i = threadIdx.x; i < s.n; i += CHOOSERS)
            if (s.list[i] <= s.cut) f(s.list[i]);
    } else {
        over<CHOOSERS, 8>(s.row, s.first, s.end, [&](u32 i, float l) {
            const u32 q = distance(l, s.best, s.scale);
            const u64 e = (u64)q << 32 | i;
            if (q != NONE && e <= s.cut) f(e);
        });
    }
}
__device__ __forceinline__ u64 sum_of(const Source& s, u64* shared) {
    u64 sum = 0;
    each(s, [&](u64 e) { sum += weight((u32)(e >> 32)); });
    return block_sum<CHOOSERS>(sum, shared);
}

// The least key with which the amounts of all keys up to it reach `want`, ten bits of it at a time; ~0 where all of them do not.
// Keys are ids, or e; amounts are weights, or ones. Of e it may be a greater one with nothing in between. `bits`: of an id, 20 or 30.
template <bool IDS, bool ONES> __device__ __forceinline__ u64 reach(const Source& s, u64 want, int bits, u64* shared) {
    u64* said = shared + 32;                    // bin, amount before it, amount in it
    u32* low = (u32*)(shared + 40);             // [DIGITS]
    u32* high = low + DIGITS;
    u64 prefix = 0;
    for (int shift = IDS ? bits - 10 : 52;; shift -= 10) {
        if (shift < 0 || (!IDS && shift == 22)) {
            // From the steps below the best on to the id.
            shift = bits - 10;
            prefix <<= 32 - bits;
        }
        for (int i = threadIdx.x; i < DIGITS; i += CHOOSERS) low[i] = high[i] = 0;
        if (threadIdx.x == 0) said[0] = NONE;
        __syncthreads();
        each(s, [&](u64 e) {
            const u64 key = IDS ? (u64)(u32)e : e;
            if (key >> shift >> 10 != prefix) return;
            const u32 bin = (u32)(key >> shift) % DIGITS;
            if (ONES) atomicAdd(low + bin, 1u);
            else add(low + bin, high + bin, weight((u32)(e >> 32)));
        });
        __syncthreads();
        u64 amount[2], total;
#pragma unroll
        for (int i = 0; i < 2; i++) amount[i] = (u64)high[2 * threadIdx.x + i] << 32 | low[2 * threadIdx.x + i];
        u64 before = block_before<CHOOSERS>(amount[0] + amount[1], shared, total);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (before < want && before + amount[i] >= want) said[0] = 2 * threadIdx.x + i, said[1] = before, said[2] = amount[i];
            before += amount[i];
        }
        __syncthreads();
        if (said[0] == NONE) return ~0ull;
        prefix = prefix << 10 | said[0];
        want -= said[1];
        const bool whole = said[2] == want;
        // What was said is read before it is said anew.
        __syncthreads();
        if (!IDS && whole) return prefix << shift | (((u64)1 << shift) - 1);
        if (shift == 0) return prefix;
    }
}

__device__ __forceinline__ u32 draw(const SampleArgs& p, const SampleRow& r, u64 top, u32 row, u64* shared) {
    const int bits = p.vocab <= 1 << 20 ? 20 : 30;
    const u64 u = uniform(r.seed, r.index);
    Source s = {nullptr, 0, p.logits + (u64)row * p.vocab, 0, p.vocab, of_key((u32)(top >> 32)), r.scale, ~0ull};
    const u64 most = (u64)r.most << 32 | NONE;
    if (!truncates(r)) {
        // The slice it is in, then where.
        u64 total, sum = threadIdx.x < p.slices ? p.sums[(u64)row * p.slices + threadIdx.x] : 0;
        const u64 before = block_before<CHOOSERS>(sum, shared, total), want = mul_high(u, total) + 1;
        u64* said = shared + 32;
        if (before < want && before + sum >= want) said[0] = threadIdx.x, said[1] = before;
        __syncthreads();
        s.first = (u32)said[0] * p.width;
        s.end = min(p.vocab, s.first + p.width);
        s.cut = most;
        const u64 left = want - said[1];
        __syncthreads();
        return (u32)reach<true, false>(s, left, bits, shared);
    }
    if (p.listed[row]) s.list = p.list + (u64)row * LISTED, s.n = p.listed[row];
    if (r.top_k) s.cut = reach<false, true>(s, r.top_k, bits, shared);
    if (r.top_p) {
        u64 total;
        if (r.top_k) {
            total = sum_of(s, shared);
        } else {
            u64 sum = 0;
            for (u32 i = threadIdx.x; i < BINS; i += CHOOSERS) sum += p.weights[(u64)row * BINS + i];
            total = block_sum<CHOOSERS>(sum, shared);
        }
        s.cut = min(s.cut, reach<false, false>(s, max(mul_high(r.top_p, total), (u64)1), bits, shared));
    }
    s.cut = min(s.cut, most);
    const u64 want = mul_high(u, sum_of(s, shared)) + 1;
    return (u32)reach<true, false>(s, want, bits, shared);
}

// The best of all slices in order: a warp whose lanes each hold the heads of every 32nd slice.
__device__ __forceinline__ void merge_tops(const SampleArgs& p, u32 row, u32 n, u64* tops) {
    constexpr int HEADS = 4;
    const u32 lane = threadIdx.x;
    const u64* from = p.tops + (u64)row * p.slices * TOP;
    for (u32 i = lane; i < p.slices * TOP; i += CHOOSERS)
        if (i % TOP < n) tops[i] = from[i];
    __syncthreads();
    if (lane >= 32) return;
    u64 head[HEADS];
    u32 at[HEADS];
#pragma unroll
    for (int j = 0; j < HEADS; j++) {
        at[j] = 0;
        head[j] = n && lane + 32 * j < p.slices ? tops[(lane + 32 * j) * TOP] : 0;
    }
    for (u32 i = 0; i < n; i++) {
        u64 x = max(max(head[0], head[1]), max(head[2], head[3]));
#pragma unroll
        for (int k = 16; k > 0; k /= 2) x = max(x, __shfl_xor_sync(~0u, x, k));
#pragma unroll
        for (int j = 0; j < HEADS; j++)
            if (x && head[j] == x) head[j] = ++at[j] < n ? tops[(lane + 32 * j) * TOP + at[j]] : 0;
        if (lane == 0) p.alternatives[(u64)row * TOP + i] = x ? Alternative{~(u32)x, of_key((u32)(x >> 32))} : Alternative{NONE, 0};
    }
}

__device__ __forceinline__ void choose(const SampleArgs& p) {
    SHARED(u64, shared);  // [32] of warps, [8] said, then u32 [2][DIGITS], or u64 [slices][TOP]
    const u32 row = blockIdx.x;
    const SampleRow& r = p.asked[row];
    if (r.kind == SAMPLE_NOTHING) return;
    const bool scores = r.alternatives != NONE;
    const u64 raw = best_of<CHOOSERS>(p, row, false, shared);
    const u64 top = bends(r) ? best_of<CHOOSERS>(p, row, true, shared) : raw;
    if (!finite(raw) || !finite(top)) {
        if (threadIdx.x == 0) p.found[row] = {0, NONE, 0, 0};
        return;
    }
    u64 total = 0;
    if (scores) {
        total = block_sum<CHOOSERS>(threadIdx.x < p.slices ? p.totals[(u64)row * p.slices + threadIdx.x] : 0, shared);
        merge_tops(p, row, r.alternatives, shared + 40);
        __syncthreads();
    }
    u32 token = r.token;
    if (r.kind == SAMPLE_TOKEN) token = r.scale > 0 ? draw(p, r, top, row, shared) : ~(u32)top;
    float logit = 0;
    if (scores) {
        // As it was before its first bend.
        u64 bent = 0;
        for (u32 i = r.first + threadIdx.x; i < r.bans; i += CHOOSERS)
            if (p.bends[i].token == token) bent = max(bent, (u64)(r.bans - i));
        bent = block_max<CHOOSERS>(bent, shared);
        logit = bent ? p.was[r.bans - (u32)bent] : p.logits[(u64)row * p.vocab + token];
    }
    if (threadIdx.x == 0) p.found[row] = {total, token, of_key((u32)(raw >> 32)), logit};
}

}  // namespace sample

KERNEL(256, 4, sample_best)(SampleArgs p) { grid_wait(); grid_go(); sample::best(p); }
KERNEL(256, 4, sample_top)(SampleArgs p) { grid_wait(); grid_go(); sample::top(p); }
KERNEL(512, 2, sample_bend)(SampleArgs p) { grid_wait(); grid_go(); sample::bend(p); }
KERNEL(256, 4, sample_weigh)(SampleArgs p) { grid_wait(); grid_go(); sample::weigh(p); }
KERNEL(256, 3, sample_gather)(SampleArgs p) { grid_wait(); grid_go(); sample::gather(p); }
KERNEL(512, 1, sample_choose)(SampleArgs p) { grid_wait(); grid_go(); sample::choose(p); }
