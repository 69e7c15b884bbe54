// lora.cuh, and what linear.cuh does with it, against sums in f64: ragged ranks and shapes, several adapters in one batch, places where one does nothing, poisoned and
// forbidden memory, shuffled threads, and a row's bits among others and however sums are split. A crash is a read past an input.
// g++ -O2 -march=x86-64-v3 -std=c++17 -DSTRAIT_EMULATED -I.. test_lora.cpp && ./a.out
#include "linear.cuh"
#include <algorithm>
#include <cmath>
#include <sys/mman.h>

static u64 state = 1;
static float uniform() { state = state * 6364136223846793005ull + 1442695040888963407ull; return (float)(int)(state >> 40) / 8388608.0f - 1.0f; }
static int failures = 0;
#define FAIL(...) do { failures++; if (failures < 20) { printf(__VA_ARGS__); printf("\n"); } } while (0)

// What is only read: a page that may not be touched lies right behind it.
template <class T> struct Guarded {
    u8* base;
    size_t n, size;
    explicit Guarded(size_t n) : n(n), size((n * sizeof(T) + 4095 + 4096) / 4096 * 4096) {
        base = (u8*)mmap(nullptr, size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(base, 0xff, size);
        if (mprotect(base + size, 4096, PROT_NONE)) abort();
    }
    Guarded(Guarded&& o) : base(o.base), n(o.n), size(o.size) { o.base = nullptr; }
    ~Guarded() { if (base) munmap(base, size + 4096); }
    T* at() { return (T*)(base + size) - n; }
};

// One adapter at one place, rank 0 where it does nothing there.
struct Update {
    u32 rank, in, out;
    Guarded<u16> down;
    Guarded<u32> up;
    u16* half(u32 o, u32 j) { return (u16*)(up.at() + (o / 64 * ((rank + 1) / 2) + j / 2) * 64 + o % 64) + j % 2; }
    Update(u32 rank, u32 in, u32 out) : rank(rank), in(in), out(out), down(std::max(rank * in, 1u)), up(std::max((out + 63) / 64 * ((rank + 1) / 2) * 64, 1u)) {
        memset(up.at(), 0, up.n * 4);
        for (u32 i = 0; i < rank * in; i++) down.at()[i] = of_b(uniform());
        for (u32 o = 0; o < out; o++)
            for (u32 j = 0; j < rank; j++) *half(o, j) = of_b(uniform());
    }
    double at(u32 o, u32 j) { return b_of(*half(o, j)); }
};

struct Segment { u32 first, rows, adapter; };

enum How { EXPANDED, FUSED_1, FUSED_2 };

// Runs both kernels over a batch; `whole` sums all splits in one block. Fused, it is products
// with zeros that they are added to, but for a target that is left out.
static std::vector<std::vector<float>> run(std::vector<std::vector<Update>>& adapters, std::vector<Segment> segments, Guarded<u16>& x, u32 rows, u32 in, std::vector<u32> outs,
                                           bool whole, u32 blocks, u64 seed, How how = EXPANDED, u32 left_out = ~0u) {
    const u32 targets = (u32)outs.size(), splits = whole ? 1 : (in + lora::SPLIT - 1) / lora::SPLIT;
    std::vector<std::vector<lora::Site>> tables;
    u32 widest = 1;
    for (auto& of : adapters) {
        tables.emplace_back(targets);
        for (u32 t = 0; t < targets; t++) {
            memset(&tables.back()[t], 0, sizeof(lora::Site));
            if (of[t].rank) tables.back()[t].down = of[t].down.at(), tables.back()[t].up = of[t].up.at(), tables.back()[t].rank = of[t].rank;
            widest = std::max(widest, of[t].rank);
        }
    }
    std::vector<lora::Worn> worn;
    std::vector<lora::Item> items;
    for (auto& s : segments) {
        for (u32 r = 0; r < s.rows; r += lora::ROWS) items.push_back({(u32)worn.size(), s.first + r});
        worn.push_back({tables[s.adapter].data(), s.first, s.rows});
    }
    const u32 stride = (widest + 15) & ~15u, tiles = stride / 16;
    const size_t all = targets * items.size() * 64 * stride;
    Guarded<float> partials(splits * all);
    Guarded<u16> high(all), low(all);
    std::vector<u32> ended(targets * tiles * items.size(), 0);
    std::vector<Guarded<float>> y;
    ExpandArgs e;
    memset(&e, 0, sizeof e);
    ShrinkArgs s;
    memset(&s, 0, sizeof s);
    s.worn = e.worn = worn.data(); s.items = e.items = items.data(); s.x = x.at(); s.partials = partials.at(); s.ended = ended.data();
    s.high = high.at(); s.low = low.at(); e.high = high.at(); e.low = low.at();
    s.in = in; s.stride = e.stride = stride; s.tiles = tiles;
    for (u32 t = 0; t < targets; t++) {
        y.emplace_back((size_t)rows * outs[t]);
        for (u32 i = 0; i < rows * outs[t]; i++) y.back().at()[i] = (float)(i % 7) - 3;
        s.place[t] = e.place[t] = t; e.y[t] = y[t].at(); e.out[t] = outs[t];
    }
    emu::launch(dim3((unsigned)items.size(), splits, targets * tiles), dim3(128), 20480, [&] { lora_shrink(s); }, seed);
    if (std::any_of(ended.begin(), ended.end(), [](u32 n) { return n != 0; })) FAIL("counts are left");
    if (how == EXPANDED) {
        emu::launch(dim3(blocks, (unsigned)items.size(), targets), dim3(128), 34816, [&] { lora_expand(e); }, seed);
    } else {
        LinearsWorn p;
        memset(&p, 0, sizeof p);
        p.worn = worn.data(); p.high = high.at(); p.low = low.at(); p.segments = (u32)worn.size(); p.stride = stride;
        p.linears.x = x.at(); p.linears.jobs = (int)targets; p.linears.rows = (int)rows; p.linears.in = p.linears.ldx = (int)in;
        std::vector<std::vector<u16>> zeros;
        for (u32 t = 0; t < targets; t++) {
            zeros.emplace_back((size_t)outs[t] * in, 0);
            p.linears.job[t].w[0] = zeros[t].data(); p.linears.job[t].y = y[t].at();
            p.linears.job[t].out = p.linears.job[t].ldy = (int)outs[t]; p.linears.job[t].mode = LINEAR_ADD;
            p.place[t][0] = p.target[t][0] = (u16)t; p.place[t][1] = p.target[t][1] = UNTOUCHED;
            if (t == left_out) p.target[t][0] = UNTOUCHED;
        }
        const u32 n = rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
        auto kernel = how == FUSED_1 ? (n == 1 ? linear_worn_m1_n1 : n == 2 ? linear_worn_m1_n2 : n == 4 ? linear_worn_m1_n4 : linear_worn_m1_n8)
                                     : (n == 1 ? linear_worn_m2_n1 : n == 2 ? linear_worn_m2_n2 : n == 4 ? linear_worn_m2_n4 : linear_worn_m2_n8);
        emu::launch(dim3(blocks), dim3(256), 65536 + 5120 * n + 3072, [&] { kernel(p); }, seed);
    }
    std::vector<std::vector<float>> got;
    for (u32 t = 0; t < targets; t++) got.emplace_back(y[t].at(), y[t].at() + (size_t)rows * outs[t]);
    return got;
}

static void check(std::vector<u32> ranks, u32 in, std::vector<u32> outs, std::vector<Segment> segments, u32 rows, u64 seed) {
    state = seed * 77 + 5;
    std::vector<std::vector<Update>> adapters;
    for (u32 rank : ranks) {
        adapters.emplace_back();
        // Every third place is left out by every second adapter.
        for (u32 t = 0; t < outs.size(); t++) adapters.back().emplace_back(adapters.size() % 2 == 0 && t % 3 == 1 ? 0 : rank, in, outs[t]);
    }
    Guarded<u16> x((size_t)rows * in);
    for (size_t i = 0; i < (size_t)rows * in; i++) x.at()[i] = of_b(uniform());
    auto got = run(adapters, segments, x, rows, in, outs, false, 2, 0);
    for (u32 t = 0; t < outs.size(); t++)
        for (u32 r = 0; r < rows; r++) {
            Update* u = nullptr;
            for (auto& s : segments) if (r >= s.first && r < s.first + s.rows) u = &adapters[s.adapter][t];
            std::vector<double> low(u ? u->rank : 0);
            for (u32 j = 0; j < low.size(); j++)
                for (u32 k = 0; k < in; k++) low[j] += (double)b_of(u->down.at()[j * in + k]) * b_of(x.at()[(size_t)r * in + k]);
            double scale = 1;
            for (double l : low) scale += l * l;
            for (u32 o = 0; o < outs[t]; o++) {
                double want = (double)((r * outs[t] + o) % 7) - 3;
                for (u32 j = 0; j < low.size(); j++) want += low[j] * u->at(o, j);
                const float have = got[t][(size_t)r * outs[t] + o];
                // What `low` loses of a shrunk value is 2^-17 of it.
                if (!(std::fabs(have - want) <= 4e-5 * std::sqrt(scale)) || (low.empty() && have != (float)want)) FAIL("in %u target %u row %u output %u: %g for %g", in, t, r, o, have, want);
            }
        }
    // The same bits however sums are split, blocks share tiles, and threads run.
    for (auto again : {run(adapters, segments, x, rows, in, outs, true, 1, 3), run(adapters, segments, x, rows, in, outs, false, 64, 4)})
        if (again != got) FAIL("in %u, %zu segments: other bits", in, segments.size());
    if (rows <= 64) {
        // Where products are summed, in every width of tile; again alone.
        auto fused = run(adapters, segments, x, rows, in, outs, false, 2, 5, FUSED_1);
        if (run(adapters, segments, x, rows, in, outs, false, 1, 6, FUSED_2) != fused) FAIL("in %u: other bits in wider tiles", in);
        for (u32 t = 0; t < outs.size(); t++)
            for (size_t i = 0; i < got[t].size(); i++)
                if (!(std::fabs(fused[t][i] - got[t][i]) <= 1e-5 * (1 + std::fabs(got[t][i])))) FAIL("in %u target %u: %g fused for %g", in, t, fused[t][i], got[t][i]);
        // One block goes from a job with updates to one without, and on.
        auto partly = run(adapters, segments, x, rows, in, outs, false, 1, 6, FUSED_2, 1);
        for (u32 t = 0; t < outs.size(); t++)
            for (size_t i = 0; i < got[t].size(); i++)
                if (partly[t][i] != (t == 1 ? (float)(i % 7) - 3 : fused[t][i])) FAIL("in %u target %u: %g where one is left out", in, t, partly[t][i]);
        for (auto& s : segments) {
            auto alone = run(adapters, {{s.first, s.rows, s.adapter}}, x, rows, in, outs, false, 3, 0, FUSED_2);
            for (u32 t = 0; t < outs.size(); t++)
                if (!std::equal(alone[t].begin() + s.first * outs[t], alone[t].begin() + (s.first + s.rows) * outs[t], fused[t].begin() + s.first * outs[t])) FAIL("in %u: other bits alone", in);
        }
    }
    // And alone.
    for (auto& s : segments) {
        auto alone = run(adapters, {{s.first + s.rows - 1, 1, s.adapter}}, x, rows, in, outs, false, 3, 0);
        for (u32 t = 0; t < outs.size(); t++) {
            const size_t at = (size_t)(s.first + s.rows - 1) * outs[t];
            if (!std::equal(alone[t].begin() + at, alone[t].begin() + at + outs[t], got[t].begin() + at)) FAIL("in %u: a row alone has other bits", in);
        }
    }
}

static void rows_of_gains() {
    const u32 rows = 5, width = 1500;
    std::vector<float> gain(width), bias(width), own(width), model(width);
    for (u32 i = 0; i < width; i++) gain[i] = uniform(), bias[i] = uniform(), own[i] = uniform(), model[i] = uniform();
    lora::Site sites[4] = {};
    sites[0].gain = gain.data();
    sites[1].gain = gain.data(), sites[1].own_bias = own.data(), sites[1].replaced = 1, sites[1].bias = bias.data();
    sites[2].bias = bias.data();
    lora::Worn worn[4] = {{&sites[0], 0, 1}, {&sites[1], 1, 1}, {&sites[2], 2, 1}, {&sites[3], 4, 1}};
    u32 of_row[rows] = {0, 1, 2, lora::NOBODY, 3};
    for (bool onto : {false, true}) {
        std::vector<float> y(rows * width), before, x(rows * width, 2.0f);
        for (auto& v : y) v = uniform();
        before = y;
        AdaptArgs p = {worn, of_row, y.data(), onto ? x.data() : nullptr, model.data(), 0, width};
        emu::launch(dim3(rows, 2), dim3(256), 0, [&] { adapt_rows(p); }, 1);
        for (u32 i = 0; i < rows * width; i++) {
            const u32 r = i / width, o = i % width;
            double v = before[i], want = v;
            if (r == 0) want = gain[o] * (v - model[o]) + model[o];
            if (r == 1) want = gain[o] * (v - own[o]) + own[o] + bias[o];
            if (r == 2) want = v + bias[o];
            const double have = onto ? x[i] - 2.0 : y[i];
            if (!(std::fabs(have - want) < 1e-5)) FAIL("row %u output %u: %g for %g", r, o, have, want);
        }
    }
    const u32 rank = 3, vocabulary = 9;
    std::vector<u16> down(rank * vocabulary);
    std::vector<float> up(rank * width), x(2 * width), before;
    for (auto& v : down) v = of_b(uniform());
    for (auto& v : up) v = uniform();
    for (auto& v : x) v = uniform();
    before = x;
    u32 tokens[2] = {8, 3};
    EmbedAdaptedArgs p = {tokens, gain.data(), down.data(), up.data(), x.data(), width, rank};
    emu::launch(dim3(2), dim3(256), 0, [&] { embed_adapted(p); }, 1);
    for (u32 i = 0; i < 2 * width; i++) {
        double want = (double)before[i] * gain[i % width];
        for (u32 j = 0; j < rank; j++) want += (double)b_of(down[tokens[i / width] * rank + j]) * up[j * width + i % width];
        if (!(std::fabs(x[i] - want) < 1e-5)) FAIL("embedding %u: %g for %g", i, x[i], want);
    }
}

int main() {
    check({16, 7}, 64, {64, 70, 8}, {{0, 1, 0}, {1, 1, 1}, {3, 2, 0}}, 6, 1);
    check({1, 17, 40}, 520, {65}, {{0, 3, 2}, {3, 66, 0}, {69, 9, 1}}, 80, 2);
    check({8, 64}, 1032, {192, 30}, {{2, 64, 1}, {66, 65, 0}}, 131, 3);
    check({65, 130}, 1544, {130}, {{0, 8, 0}, {8, 9, 1}}, 17, 4);
    check({5}, 8, {9}, {{0, 1, 0}}, 1, 5);
    // More segments than warps; rows that wear nothing between them.
    check({16, 33, 5}, 264, {80, 48, 20}, {{0, 1, 0}, {1, 1, 1}, {2, 3, 2}, {6, 1, 0}, {7, 9, 1}, {20, 1, 2}, {21, 1, 0}, {22, 1, 1}, {23, 1, 2}, {24, 2, 0}, {27, 4, 1}}, 33, 6);
    check({64, 20}, 520, {200}, {{3, 40, 1}, {45, 2, 0}}, 50, 7);
    rows_of_gains();
    printf(failures ? "FAILED: %d\n" : "lora: all the same\n", failures);
    return failures != 0;
}
