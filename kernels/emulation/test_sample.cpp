// sample.cuh against the definition at its top, by sorting, thread by thread on a CPU:
//   g++ -O2 -march=x86-64-v3 -std=c++17 -DSTRAIT_EMULATED -I.. test_sample.cpp -o test_sample && ./test_sample
#include "sample.cuh"
#include <algorithm>
#include <map>
#include <random>

using namespace sample;
static int failures = 0;
static std::mt19937_64 random_bits(11);
static u32 below(u32 n) { return random_bits() % n; }
static float uniform_float() { return below(1 << 24) / (float)(1 << 24); }
template <class T> static std::vector<T> poison(size_t n) { std::vector<T> x(n); if (n) memset((void*)x.data(), 0xff, n * sizeof(T)); return x; }

struct Ask {
    SampleRow row;
    std::vector<Bend> bends[3];
};
struct Answer {
    Found found;
    std::vector<std::pair<u32, float>> best;
};

// Weights in f64, to tell whether the integers are what they should be.
static void test_weights() {
    double worst = 0;
    u64 before = ~0ull;
    for (u32 q = 0; q < LIMIT; q += 1 + below(2000)) {
        const u64 w = weight(q);
        const double exact = exp2(40 - q / 16777216.0);
        worst = std::max(worst, (fabs(w - exact) - 1) / exact);
        if (w > before) { failures++; printf("FAIL weight(%u) rises\n", q); }
        before = w;
    }
    if (worst > 1e-7) { failures++; printf("FAIL weights are off by %.2g\n", worst); }
    for (int i = 0; i < 1000; i++) {
        const u64 a = random_bits(), b = random_bits();
        if (mul_high(a, b) != (u64)((unsigned __int128)a * b >> 64)) { failures++; printf("FAIL mul_high\n"); }
    }
}

static Answer define(std::vector<float> l, const Ask& ask) {
    const SampleRow& r = ask.row;
    if (r.kind == SAMPLE_NOTHING) return {{0, NONE, 0, 0}, {}};
    const u32 vocab = l.size();
    const std::vector<float> raw = l;
    auto best_of = [](const std::vector<float>& l) { float b = -INFINITY; for (float x : l) { if (std::isnan(x)) return NAN; b = std::max(b, x); } return b; };
    const float raw_best = best_of(l);
    for (auto b : ask.bends[0]) { volatile float x = l[b.token] > 0 ? l[b.token] / r.repetition : l[b.token] * r.repetition; l[b.token] = x - b.by; }
    for (auto b : ask.bends[1]) l[b.token] += b.by;
    for (auto b : ask.bends[2]) l[b.token] = -INFINITY;
    const float best = best_of(l);
    if (!std::isfinite(raw_best) || !std::isfinite(best)) return {{0, NONE, 0, 0}, {}};
    Answer a = {{0, r.token, raw_best, 0}, {}};
    if (r.kind == SAMPLE_TOKEN) {
        std::vector<u64> e;
        for (u32 i = 0; i < vocab; i++) { u32 q = r.scale > 0 ? distance(l[i], best, r.scale) : l[i] == best ? 0 : NONE; if (q != NONE) e.push_back((u64)q << 32 | i); }
        std::sort(e.begin(), e.end());
        if (r.scale == 0) a.found.token = (u32)e[0];
        else {
            auto sum = [&] { u64 s = 0; for (u64 x : e) s += weight(x >> 32); return s; };
            if (r.top_k && r.top_k < e.size()) e.resize(r.top_k);
            if (r.top_p) { const u64 want = std::max(mul_high(r.top_p, sum()), (u64)1); u64 s = 0; size_t n = 0; while (s < want) s += weight(e[n++] >> 32); e.resize(n); }
            e.erase(std::remove_if(e.begin(), e.end(), [&](u64 x) { return x >> 32 > r.most; }), e.end());
            std::sort(e.begin(), e.end(), [](u64 a, u64 b) { return (u32)a < (u32)b; });
            const u64 target = mul_high(uniform(r.seed, r.index), sum());
            u64 s = 0;
            for (u64 x : e) if ((s += weight(x >> 32)) > target) { a.found.token = (u32)x; break; }
        }
    }
    if (r.alternatives != NONE) {
        for (float x : raw) { u32 q = distance(x, raw_best, 24204406.0f); if (q != NONE) a.found.total += weight(q); }
        a.found.logit = raw[a.found.token];
        std::vector<std::pair<float, u32>> order;
        for (u32 i = 0; i < vocab; i++) order.push_back({-raw[i], i});
        std::sort(order.begin(), order.end());
        for (u32 i = 0; i < r.alternatives; i++) a.best.push_back(i < vocab ? std::pair{order[i].second, -order[i].first} : std::pair{NONE, 0.0f});
    }
    return a;
}

static void test_rows(u32 vocab, u32 slices, const std::vector<std::vector<float>>& logits, const std::vector<Ask>& asks, u64 seed, const char* what) {
    const u32 rows = asks.size();
    std::vector<float> all;
    std::vector<SampleRow> asked;
    std::vector<Bend> bends;
    for (u32 i = 0; i < rows; i++) {
        all.insert(all.end(), logits[i].begin(), logits[i].end());
        SampleRow r = asks[i].row;
        r.first = bends.size();
        u32* ends[3] = {&r.penalties, &r.biases, &r.bans};
        for (int k = 0; k < 3; k++) { bends.insert(bends.end(), asks[i].bends[k].begin(), asks[i].bends[k].end()); *ends[k] = bends.size(); }
        asked.push_back(r);
    }
    auto was = poison<float>(bends.size());
    auto best = poison<u64>(2 * rows * slices), sums = poison<u64>(rows * slices), totals = sums, tops = poison<u64>(rows * slices * TOP), weights = poison<u64>(rows * BINS), list = poison<u64>((size_t)rows * LISTED);
    auto counts = poison<u32>(rows * BINS), listed = poison<u32>(rows);
    auto found = poison<Found>(rows);
    auto alternatives = poison<Alternative>(rows * TOP);
    SampleArgs p = {all.data(), asked.data(), bends.data(), was.data(), best.data(), sums.data(), totals.data(), tops.data(), weights.data(), counts.data(), listed.data(), list.data(), found.data(), alternatives.data(), rows, vocab, slices, (vocab + slices - 1) / slices, 0, 24204406.0f};
    SampleArgs again = p;
    again.bent = 1;
    const dim3 sliced(slices, rows);
    emu::launch(sliced, dim3(256), 64, [&] { sample_best(p); }, seed);
    emu::launch(sliced, dim3(256), 18560, [&] { sample_top(p); }, seed);
    emu::launch(dim3(rows), dim3(512), 0, [&] { sample_bend(p); }, seed);
    emu::launch(sliced, dim3(256), 64, [&] { sample_best(again); }, seed);
    emu::launch(sliced, dim3(256), 15424, [&] { sample_weigh(p); }, seed);
    emu::launch(sliced, dim3(256), 128, [&] { sample_gather(p); }, seed);
    emu::launch(dim3(rows), dim3(512), std::max(8512u, 320 + 8 * slices * TOP), [&] { sample_choose(p); }, seed);
    for (u32 i = 0; i < rows; i++) {
        const SampleRow& r = asked[i];
        const Answer want = define(logits[i], asks[i]);
        const Found& f = found[i];
        const bool same = r.kind == SAMPLE_NOTHING || (f.token == want.found.token && f.total == want.found.total && f.best == want.found.best && f.logit == want.found.logit);
        bool best_same = true;
        for (size_t k = 0; k < want.best.size(); k++) best_same &= alternatives[i * TOP + k].token == want.best[k].first && alternatives[i * TOP + k].logit == want.best[k].second;
        if (!same || !best_same) {
            failures++;
            printf("FAIL %s: row %u of %u logits in %u slices: token %u for %u, total %llu for %llu, logit %g for %g, alternatives %s; scale %g k %u p %g most %u\n", what, i, vocab, slices, f.token, want.found.token, f.total, want.found.total, f.logit, want.found.logit, best_same ? "same" : "differ", r.scale, r.top_k, r.top_p / 18446744073709551616.0, r.most);
        }
    }
}

static SampleRow token_row(float temperature) {
    return {random_bits(), 0, below(1000), temperature > 0 ? (float)(24204406.323 / temperature) : 0, 0, LIMIT - 1, 1, NONE, NONE, SAMPLE_TOKEN, 0, 0, 0, 0};
}
static Ask ask_at_random(u32 vocab) {
    Ask a = {token_row(std::vector<float>{0, 0.3f, 0.7f, 1, 1, 2}[below(6)]), {}};
    SampleRow& r = a.row;
    if (below(8) == 0) r.kind = SAMPLE_NOTHING;
    if (below(6) == 0) { r.kind = SAMPLE_SCORE; r.scale = 0; r.token = below(vocab); r.alternatives = below(3) * 10; return a; }
    if (below(2)) r.top_k = std::vector<u32>{1, 2, 20, 1000, vocab}[below(5)];
    if (below(2)) r.top_p = std::vector<double>{0.99, 0.9, 0.5, 1e-6}[below(4)] * 18446744073709551615.0;
    if (below(3) == 0) r.most = below(4u << 24);
    if (below(2)) r.alternatives = std::vector<u32>{0, 1, 5, 20, 32}[below(5)];
    r.repetition = below(2) ? 1.3f : 0.7f;
    for (int k = 0; k < 3; k++) {
        if (below(2)) continue;
        std::map<u32, float> some;
        for (u32 n = below(std::min(vocab, k ? 9u : 700u)); n > 0; n--) some[below(vocab)] = uniform_float() * 6 - 3;
        // A token of several kinds, which other threads meet.
        if (k && !a.bends[0].empty() && below(2)) some[a.bends[0].back().token] = 20;
        if (k == 2 && some.size() >= vocab) continue;
        for (auto [token, by] : some) a.bends[k].push_back({token, by});
    }
    return a;
}
static std::vector<float> logits_at_random(u32 vocab) {
    const float spread = std::vector<float>{0.5f, 3, 12}[below(3)];
    std::vector<float> l(vocab);
    for (auto& x : l) x = spread * (uniform_float() + uniform_float() + uniform_float() - 1.5f);
    for (u32 n = below(6); n > 0; n--) l[below(vocab)] += 4 * spread * uniform_float();
    if (below(3) == 0) for (auto& x : l) x = roundf(x * 4) / 4;
    if (below(3) == 0) for (u32 i = 1; i < vocab; i += 3) l[i] = -INFINITY;
    if (below(9) == 0) l[below(vocab)] = std::vector<float>{NAN, -NAN, INFINITY}[below(3)];
    return l;
}

int main() {
    test_weights();
    for (u64 seed : {0, 1, 2}) {
        for (auto [vocab, slices, rows] : {std::tuple{1u, 1u, 8u}, {2u, 2u, 8u}, {7u, 3u, 24u}, {1000u, 1u, 24u}, {1000u, 4u, 24u}, {5003u, 7u, 8u}, {40000u, 128u, 3u}, {16384u, 1u, 2u}}) {
            std::vector<std::vector<float>> logits;
            std::vector<Ask> asks;
            for (u32 i = 0; i < rows; i++) logits.push_back(logits_at_random(vocab)), asks.push_back(ask_at_random(vocab));
            test_rows(vocab, slices, logits, asks, seed, "at random");
        }
        // More candidates than are listed, ties all of them; and as many in one thread's hands as there can be.
        Ask half = {token_row(1), {}}, many = half, best = half;
        half.row.top_p = 1ull << 63;
        many.row.top_k = 20000, many.row.top_p = 3ull << 62;
        best.row.alternatives = TOP;
        std::vector<float> flat(40000, -0.5f), teeth(16384, 0);
        test_rows(40000, 3, {flat, flat}, {half, many}, seed, "flat");
        for (u32 i = 0; i < 16384; i++) teeth[i] = i % 256 < TOP ? 5 + i % 256 + i * 1e-5f : 0;
        test_rows(16384, 1, {teeth}, {best}, seed, "teeth");
    }
    printf("%s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
