// prefill.cuh and prefill_wg.cuh against a definition in f64, thread by thread on a CPU:
//   g++ -O2 -march=x86-64-v3 -std=c++17 -DSTRAIT_EMULATED -I.. test_prefill.cpp -o test_prefill && ./test_prefill
#include "prefill_wg.cuh"
#include <random>

static int failures = 0;
static void check(bool ok, const char* what, double found, double bound) {
    if (!ok) failures++;
    if (!ok || getenv("VERBOSE")) printf("%s %s: %.3g, at most %.3g\n", ok ? "ok  " : "FAIL", what, found, bound);
}
static std::mt19937 random_bits(11);
static float normal() { return std::normal_distribution<float>()(random_bits); }

struct Sequence { u32 position, n; };  // what is in the cache already, and queries

// How the kernels over D channels are launched: S tells queries and threads of a block, and bytes.
template <int D> using By = prefill::Shape<D>;
template <int D> using Wide = prefill::Wide<D>;

// One cache, its queries computed by chunks of `chunk`; returns out. NaN in the cache wherever no position was written, and in q beyond its rows.
template <int D, class S, class K> struct Case {
    K kernel; u32 heads, kv_heads; std::vector<Sequence> sequences;
    u32 rows = 0, total_pages = 0, offset, unit;
    std::vector<u8> room; u8* arena; std::vector<u32> table, starts; std::vector<float> q;
    std::vector<std::vector<float>> k, v;  // [sequence][position][kv_head][D]
    float scale = 1.44269504f / sqrtf(D);

    Case(K kernel, u32 heads, u32 kv_heads, std::vector<Sequence> s) : kernel(kernel), heads(heads), kv_heads(kv_heads), sequences(s) {
        u32 layer = 2 * kv_heads * D * 64 * 2;
        offset = layer; unit = 2 * layer / 64;
        for (auto& s : sequences) { starts.push_back(total_pages); total_pages += (s.position + s.n + 63) / 64; rows += s.n; }
        room.assign((size_t)(total_pages + 1) * unit * 64 + 64, 0xff);
        arena = (u8*)(((uintptr_t)room.data() + 63) & ~uintptr_t(63));
        for (u32 i = 0; i < total_pages; i++) table.push_back((total_pages - 1 - i) * unit);
        q.assign((size_t)(rows + 1) * heads * D, NAN);
        for (size_t i = 0; i < (size_t)rows * heads * D; i++) q[i] = 2 * normal();
        for (size_t i = 0; i < s.size(); i++) {
            u32 length = s[i].position + s[i].n;
            k.push_back(std::vector<float>((size_t)length * kv_heads * D));
            v.push_back(k.back());
            for (u32 p = 0; p < length; p++) write(i, p, false);
        }
    }
    // Position p of sequence s: new numbers, or NaN where it is taken away.
    void write(size_t s, u32 p, bool gone) {
        u16* page = (u16*)(arena + (u64)table[starts[s] + p / 64] * 64 + offset);
        for (u32 h = 0; h < kv_heads; h++) for (u32 c = 0; c < D; c++) {
            size_t at = ((size_t)p * kv_heads + h) * D + c;
            if (!gone && k[s][at] == 0) { k[s][at] = b_of(of_b(normal())); v[s][at] = b_of(of_b(normal())); }
            page[(2 * h * D + c) * 64 + p % 64] = gone ? 0xffff : of_b(k[s][at]);
            page[(2 * h + 1) * D * 64 + p % 64 * D + c] = gone ? 0xffff : of_b(v[s][at]);
        }
    }
    // Chunk by chunk, later positions not there yet, as a server does; all sequences in one launch a round.
    // Where `split` is not zero, pages of the history before the queries are met first, so many at a time, and carried.
    std::vector<u16> run(u32 chunk, u64 seed, u32 split = 0) {
        std::vector<float> carried((size_t)rows * heads * D, NAN), state((size_t)rows * heads * 2, NAN);
        std::vector<u16> out((size_t)(rows + 1) * heads * D, 0xffff);
        for (size_t s = 0; s < sequences.size(); s++) for (u32 i = 0; i < sequences[s].n; i++) write(s, sequences[s].position + i, true);
        for (u32 done = 0;; done += chunk) {
            std::vector<prefill::Row> rs; std::vector<prefill::Item> items; u32 first = 0;
            for (size_t s = 0; s < sequences.size(); first += sequences[s].n, s++) {
                if (done >= sequences[s].n) continue;
                u32 n = std::min(chunk, sequences[s].n - done);
                for (u32 i = 0; i < n; i++) write(s, sequences[s].position + done + i, false);
                for (u32 i = 0; i < n; i += S::QUERIES) items.push_back({(u32)rs.size(), i});
                rs.push_back({first + done, n, sequences[s].position + done, starts[s]});
            }
            if (rs.empty()) return out;
            auto launch = [&] {
                emu::launch(dim3(heads, items.size()), dim3(S::THREADS), S::BYTES,
                            [&] { kernel({arena, table.data(), rs.data(), items.data(), q.data(), out.data(), heads * D, offset, kv_heads, scale, carried.data(), state.data()}); }, seed);
            };
            for (u32 at = 0; split; at += split) {
                // Of those that have more history: items name rows by their place.
                auto all = rs; auto all_items = items;
                for (auto& r : rs) {
                    u32 pages = r.position / 64, n = at < pages ? std::min(split, pages - at) : 0;
                    r.seen = n * 64, r.pages += at, r.carry = prefill::CARRIED_OUT | (at ? prefill::CARRIED_IN : 0);
                }
                items.clear();
                for (auto& i : all_items) if (rs[i.row].seen) items.push_back(i);
                bool any = !items.empty();
                if (any) launch();
                rs = all, items = all_items;
                if (any) continue;
                for (auto& r : rs) if (u32 pages = r.position / 64) r.position -= pages * 64, r.pages += pages, r.carry = prefill::CARRIED_IN;
                break;
            }
            launch();
        }
    }
    void compare(const std::vector<u16>& out) {
        // Queries and weights are rounded to bf16, the first alike here: what remains is half a step (2^-8) of weights and of the result.
        double most = 0; u32 first = 0;
        for (size_t s = 0; s < sequences.size(); first += sequences[s].n, s++) for (u32 i = 0; i < sequences[s].n; i++) for (u32 h = 0; h < heads; h++) {
            u32 seen = sequences[s].position + i + 1, kh = h / (heads / kv_heads); size_t at = ((size_t)(first + i) * heads + h) * D;
            std::vector<double> w(seen); double top = -INFINITY, total = 0;
            for (u32 j = 0; j < seen; j++) {
                for (u32 c = 0; c < D; c++) w[j] += (double)b_of(of_b(q[at + c] * scale)) * k[s][((size_t)j * kv_heads + kh) * D + c];
                top = fmax(top, w[j]);
            }
            for (auto& x : w) total += x = exp2(x - top);
            for (u32 c = 0; c < D; c++) {
                double want = 0, size = 0;
                for (u32 j = 0; j < seen; j++) { double x = w[j] / total * v[s][((size_t)j * kv_heads + kh) * D + c]; want += x; size += fabs(x); }
                double e = fabs(b_of(out[at + c]) - want) / (size + 1e-3);
                if (std::isnan(e) || e > most) most = e;
            }
        }
        char what[100]; snprintf(what, sizeof what, "prefill %d, %d queries by %d threads, %u / %u heads: error of the sum of |weight value|", D, S::QUERIES, S::THREADS, heads, kv_heads);
        check(most < 1.0 / 128, what, most, 1.0 / 128);
        for (size_t i = (size_t)rows * heads * D; i < out.size(); i++) if (out[i] != 0xffff) { check(false, "writes beyond its rows", 0, 0); break; }
    }
};

template <int D, class S, class K> static void test(K kernel, u32 heads, u32 kv_heads, std::vector<Sequence> sequences, std::vector<u32> chunks, u64 seed) {
    Case<D, S, K> c(kernel, heads, kv_heads, sequences);
    auto whole = c.run(1 << 20, seed);
    c.compare(whole);
    c.compare(seed ? c.run(70, seed + 1, 2) : c.run(1 << 20, seed, 1));
    for (u32 chunk : chunks) {
        auto parts = c.run(chunk, seed + 1);
        size_t other = 0;
        for (size_t i = 0; i < whole.size(); i++) other += parts[i] != whole[i];
        check(other == 0, "results that chunks change", other, 0);
    }
    if (sequences.size() > 1 && sequences[0].n) {
        // The first sequence by itself.
        size_t rows = c.rows, n = (size_t)sequences[0].n * heads * D;
        c.sequences.resize(1); c.rows = sequences[0].n;
        auto alone = c.run(1 << 20, seed + 2);
        c.rows = rows;
        check(!memcmp(alone.data(), whole.data(), n * 2), "results that the batch changes", 0, 0);
    }
}

int main() {
    for (u64 seed : {0, 11, 12}) {
        test<64, By<64>>(prefill_64, 4, 2, {{0, 130}, {63, 1}, {50, 20}, {0, 1}}, {64, 37}, seed);
        test<80, By<80>>(prefill_80, 2, 2, {{3, 70}, {0, 64}}, {13}, seed);
        test<96, By<96>>(prefill_96, 3, 1, {{100, 65}, {128, 2}}, {48}, seed);
        test<128, By<128>>(prefill_128, 4, 1, {{190, 7}, {0, 90}}, {17}, seed);
        test<64, Wide<64>>(prefill_wg_64, 4, 2, {{0, 300}, {63, 1}, {50, 20}, {0, 1}}, {128, 37}, seed);
        test<80, Wide<80>>(prefill_wg_80, 2, 2, {{3, 70}, {0, 64}, {200, 129}}, {13}, seed);
        test<96, Wide<96>>(prefill_wg_96, 3, 1, {{100, 65}, {128, 2}, {500, 1}}, {48}, seed);
        test<128, Wide<128>>(prefill_wg_128, 4, 1, {{190, 7}, {0, 190}}, {17, 128}, seed);
    }
    printf("%s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
