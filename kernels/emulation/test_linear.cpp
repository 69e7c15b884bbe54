// linear.cuh and linear_wg.cuh against sums in f64: ragged shapes, every epilogue, poisoned and forbidden memory, shuffled threads, and a row's bits
// among others. A crash is a read past an input.
// g++ -O2 -march=x86-64-v3 -std=c++17 -DSTRAIT_EMULATED -I.. test_linear.cpp && ./a.out
#include "linear_wg.cuh"
#include <algorithm>
#include <malloc.h>
#include <sys/mman.h>

static u64 state = 1;
static float uniform() { state = state * 6364136223846793005ull + 1442695040888963407ull; return (float)(int)(state >> 40) / 8388608.0f - 1.0f; }

// What is only read: NaN lies before it, and a page that may not be touched right behind it.
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
// What is written: between walls of NaN that stay so.
template <class T> struct Walled {
    static constexpr int WALL = 256;
    std::vector<T> all;
    size_t n;
    explicit Walled(size_t n) : n(n) { all.resize(n + 2 * WALL + 8); memset(all.data(), 0xff, all.size() * sizeof(T)); }
    T* at() { T* p = all.data() + WALL; return (T*)(((uintptr_t)p + 15) & ~(uintptr_t)15); }
    bool whole() {
        const u8 *lo = (const u8*)all.data(), *hi = (const u8*)(all.data() + all.size()), *a = (const u8*)at(), *b = (const u8*)(at() + n);
        return std::all_of(lo, a, [](u8 v) { return v == 255; }) && std::all_of(b, hi, [](u8 v) { return v == 255; });
    }
};
static void fill(Guarded<u16>& m, int rows, int cols, int ld, float scale) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) m.at()[(size_t)r * ld + c] = of_b(uniform() * scale);
}

static int failures = 0;
static double worst_f32 = 0, worst_bf16 = 0;
#define FAIL(...) do { failures++; if (failures < 20) { printf(__VA_ARGS__); printf("\n"); } } while (0)

typedef void (*Kernel)(const Linears);
struct Named { const char* name; Kernel run; int m, n, outs = 128; };
static const Named FEW[] = {{"m1_n1", linear_few_m1_n1, 1, 1}, {"m1_n2", linear_few_m1_n2, 1, 2}, {"m1_n4", linear_few_m1_n4, 1, 4}, {"m1_n8", linear_few_m1_n8, 1, 8},
                            {"m2_n1", linear_few_m2_n1, 2, 1}, {"m2_n2", linear_few_m2_n2, 2, 2}, {"m2_n4", linear_few_m2_n4, 2, 4}, {"m2_n8", linear_few_m2_n8, 2, 8},
                            {"m4_n4", linear_few_m4_n4, 4, 4}, {"m4_n8", linear_few_m4_n8, 4, 8}};
static const Named MANY = {"many", linear_many, 0, 0};
static const Named WG[] = {{"wg_256", linear_wg_256, 0, 1, 256}, {"wg_128", linear_wg_128, 0, 1, 128}};

static void launch(const Named& k, const Linears& p, int blocks, u64 seed) {
    int per = k.m ? k.m * 16 : k.outs, tiles = 0;
    for (int j = 0; j < p.jobs; j++) { int q = p.job[j].mode == LINEAR_GATED ? per / 2 : per; tiles += (p.job[j].out + q - 1) / q; }
    if (k.m) emu::launch(dim3(std::min(tiles, blocks)), dim3(256), (k.m == 4 ? 131072 : 65536) + 4096 * k.n, [&] { k.run(p); }, seed);
    else if (k.n) emu::launch(dim3(std::min((p.rows + 127) / 128 * tiles, blocks)), dim3(256), 196608, [&] { k.run(p); }, seed);
    else emu::launch(dim3((p.rows + 127) / 128, tiles), dim3(256), 65536, [&] { k.run(p); }, seed);
}

// Jobs of out[j] outputs in mode[j]; answers the raw bytes of every y.
static std::vector<std::vector<u8>> check(const Named& k, int rows, int in, std::vector<int> outs, std::vector<int> modes, bool bias, int blocks, u64 seed, u64 data) {
    state = data;
    const int ldx = in + (data & 1 ? 8 : 0), jobs = (int)outs.size();
    std::vector<Guarded<u16>> w;
    std::vector<Guarded<float>> b;
    std::vector<Walled<float>> y;
    std::vector<std::vector<float>> before(jobs);
    for (int j = 0; j < jobs; j++)
        for (int h = 0; h < 2; h++) {
            w.emplace_back((size_t)outs[j] * in); fill(w.back(), outs[j], in, in, 2.0f / sqrtf((float)in));
            b.emplace_back(outs[j]); for (int o = 0; o < outs[j]; o++) b.back().at()[o] = uniform();
        }
    Linears p;
    memset(&p, 0, sizeof p);
    p.jobs = jobs; p.rows = rows; p.in = in; p.ldx = ldx;
    for (int j = 0; j < jobs; j++) {
        // The row length of y is odd where the output's is; its gaps are NaN and stay so.
        const int ldy = outs[j] + (j & 1) * 2;
        const bool half = modes[j] == LINEAR_BF16 || modes[j] == LINEAR_GATED;
        // Where a pair is all that y is aligned to, no kernel for warpgroups may take it for more.
        const size_t shift = !k.m && k.n && data & 4 ? (half ? 1 : 2) : 0;
        y.emplace_back(((size_t)rows * ldy * (half ? 2 : 4) + 3) / 4 + shift);
        float* const to = y[j].at() + shift;
        if (modes[j] == LINEAR_ADD) {
            before[j].resize((size_t)rows * ldy);
            // By row, so that a row means the same however many there are.
            for (int r = 0; r < rows; r++) for (int o = 0; o < outs[j]; o++) to[(size_t)r * ldy + o] = before[j][(size_t)r * ldy + o] = (float)((r * 131 + o * 17) % 64) / 32.0f - 1.0f;
        }
        Linear& q = p.job[j];
        q.w[0] = w[j * 2].at(); q.w[1] = modes[j] == LINEAR_GATED ? w[j * 2 + 1].at() : nullptr;
        if (bias) { q.bias[0] = b[j * 2].at(); if (modes[j] == LINEAR_GATED) q.bias[1] = b[j * 2 + 1].at(); }
        q.y = to; q.out = outs[j]; q.ldy = ldy; q.mode = modes[j];
    }
    Guarded<u16> x((size_t)rows * ldx - (ldx - in));
    fill(x, rows, in, ldx, 1.0f);
    p.x = x.at();
    launch(k, p, blocks, seed);
    std::vector<std::vector<u8>> bytes;
    for (int j = 0; j < jobs; j++) {
        const Linear& q = p.job[j];
        const bool half = modes[j] == LINEAR_BF16 || modes[j] == LINEAR_GATED;
        const size_t size = half ? 2 : 4;
        if (!y[j].whole() || std::any_of((u8*)y[j].at(), (u8*)q.y, [](u8 v) { return v != 255; })) FAIL("%s rows %d in %d out %d: wrote outside y", k.name, rows, in, outs[j]);
        bytes.emplace_back();
        for (int r = 0; r < rows; r++) {
            for (int o = 0; o < q.ldy; o++) {
                const size_t at = (size_t)r * q.ldy + o;
                if (o >= q.out) {
                    // The gap after the last row may lie in the wall, which was looked at.
                    if (r + 1 < rows) for (size_t i = 0; i < size; i++) if (((u8*)q.y)[at * size + i] != 255) { FAIL("%s: wrote between rows", k.name); break; }
                    continue;
                }
                double sum[2], mass[2];
                for (int h = 0; h < (modes[j] == LINEAR_GATED ? 2 : 1); h++) {
                    sum[h] = bias ? q.bias[h][o] : 0; mass[h] = fabs(sum[h]) + 1e-3;
                    for (int i = 0; i < in; i++) { double v = (double)b_of(x.at()[(size_t)r * ldx + i]) * b_of(q.w[h][(size_t)o * in + i]); sum[h] += v; mass[h] += fabs(v); }
                }
                double want = sum[0], scale = mass[0];
                if (modes[j] == LINEAR_GATED) { want = sum[0] / (1 + exp(-sum[0])) * sum[1]; scale = mass[0] * mass[1]; }
                if (modes[j] == LINEAR_ADD) { want += before[j][at]; scale += fabs(before[j][at]); }
                const double got = half ? b_of(((u16*)q.y)[at]) : ((float*)q.y)[at];
                const double rounding = half ? fabs(want) / 256 : 0, off = fabs(got - want) - rounding;
                double& worst = half ? worst_bf16 : worst_f32;
                if (!(off / scale < 2e-6)) FAIL("%s rows %d in %d out %d mode %d: y[%d][%d] = %g, not %g", k.name, rows, in, q.out, q.mode, r, o, got, want);
                else worst = std::max(worst, half ? fabs(got - want) / scale : off / scale);
            }
            bytes.back().insert(bytes.back().end(), (u8*)q.y + (size_t)r * q.ldy * size, (u8*)q.y + ((size_t)r * q.ldy + q.out) * size);
        }
    }
    return bytes;
}

// linear_normed_* against rms_norm and then linear_few_*: the same bits, whatever the order of threads and the grid.
static void normed(int rows, int in, std::vector<int> outs, std::vector<int> modes, bool bias, int blocks, u64 seed, u64 data) {
    state = data;
    const int ldx = in + (data & 1 ? 8 : 0), jobs = (int)outs.size(), line = (in + 31) / 64 * 64 + 32;
    Guarded<float> x((size_t)rows * ldx - (ldx - in)), weight(in);
    Guarded<u16> halves((size_t)rows * in);
    // Rows of unlike sizes, one of zeros.
    for (int r = 0; r < rows; r++) for (int i = 0; i < in; i++) x.at()[(size_t)r * ldx + i] = r == 5 ? 0.0f : uniform() * ldexpf(1.0f, r * 3 - 9);
    for (int i = 0; i < in; i++) weight.at()[i] = 1.0f + uniform();
    for (int r = 0; r < rows; r++)
        emu::launch(dim3(1), dim3(256), 32, [&] { rms_norm({x.at() + (size_t)r * ldx, weight.at(), halves.at() + (size_t)r * in, (u32)in, 1e-5f}); }, seed);
    std::vector<Guarded<u16>> w;
    std::vector<Guarded<float>> b;
    for (int out : outs)
        for (int h = 0; h < 2; h++) {
            w.emplace_back((size_t)out * in); fill(w.back(), out, in, in, 2.0f / sqrtf((float)in));
            b.emplace_back(out); for (int o = 0; o < out; o++) b.back().at()[o] = uniform();
        }
    auto run = [&](int m, bool itself) {
        LinearsNormed p;
        memset(&p, 0, sizeof p);
        std::vector<Walled<float>> y;
        int tiles = 0;
        for (int j = 0; j < jobs; j++) {
            y.emplace_back((size_t)rows * outs[j]);
            if (modes[j] == LINEAR_ADD) for (int i = 0; i < rows * outs[j]; i++) y[j].at()[i] = (float)(i % 64) / 32.0f - 1.0f;
            Linear& q = p.linears.job[j];
            q.w[0] = w[j * 2].at(); q.w[1] = modes[j] == LINEAR_GATED ? w[j * 2 + 1].at() : nullptr;
            if (bias) { q.bias[0] = b[j * 2].at(); if (modes[j] == LINEAR_GATED) q.bias[1] = b[j * 2 + 1].at(); }
            q.y = y[j].at(); q.out = q.ldy = outs[j]; q.mode = modes[j];
            const int per = modes[j] == LINEAR_GATED ? m * 8 : m * 16;
            tiles += (outs[j] + per - 1) / per;
        }
        p.linears.jobs = jobs; p.linears.rows = rows; p.linears.in = in;
        if (itself) {
            p.linears.x = x.at(); p.linears.ldx = ldx; p.weight = weight.at(); p.eps = 1e-5f;
            auto kernel = m == 1 ? linear_normed_m1 : linear_normed_m2;
            emu::launch(dim3(std::min(tiles, blocks)), dim3(256), 65536 + rows * (512 + 2 * line), [&] { kernel(p); }, seed + m);
        } else {
            p.linears.x = halves.at(); p.linears.ldx = in;
            launch(FEW[m == 1 ? 0 : 4], p.linears, blocks, seed);
        }
        std::vector<u8> bytes;
        for (int j = 0; j < jobs; j++) {
            if (!y[j].whole()) FAIL("normed rows %d in %d: wrote outside y", rows, in);
            const size_t size = modes[j] == LINEAR_BF16 || modes[j] == LINEAR_GATED ? 2 : 4;
            bytes.insert(bytes.end(), (u8*)y[j].at(), (u8*)y[j].at() + size * rows * outs[j]);
        }
        return bytes;
    };
    const bool gated = std::count(modes.begin(), modes.end(), LINEAR_GATED) > 0;
    const auto want = run(2, false);
    for (int m = gated ? 2 : 1; m <= 2; m++)
        if (run(m, true) != want) FAIL("normed m%d rows %d in %d: other bits than rms_norm and a product", m, rows, in);
}

int main() {
    // The fibers' stacks, 32 MiB a launch, are kept from one to the next.
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    const int ROWS[] = {1, 2, 7, 8, 9, 16, 33, 64, 65, 130}, OUTS[] = {1, 15, 16, 17, 130}, INS[] = {64, 72, 200, 512};
    int n = 0;
    // Every shape at three seeds; epilogues, the m of a tile, biases and grids in turn.
    for (int rows : ROWS) for (int out : OUTS) for (int in : INS) for (u64 seed = 0; seed < 3; seed++) {
        const int mode = n % 4;
        std::vector<Named> fit;
        for (const Named& k : FEW) if (rows <= 8 * k.n && (k.n == 1 || rows > 4 * k.n) && (mode != LINEAR_GATED || k.m > 1)) fit.push_back(k);
        if (rows > 64) fit.push_back(MANY);
        else if (n % 13 == 0) check(MANY, rows, in, {out}, {mode}, n >> 3 & 1, 0, seed, n + 7);
        check(fit[n / 4 % fit.size()], rows, in, {out}, {mode}, n >> 3 & 1, 1 + n % 3, seed, n + 1);
        n++;
    }
    // Three jobs of unlike kinds in one launch, at three seeds.
    for (u64 seed = 0; seed < 3; seed++) {
        for (const Named& k : FEW) if (k.n < 8 || seed == 1) check(k, k.n * 8 - 1, 584, {33, 70, 18}, {LINEAR_BF16, LINEAR_F32, LINEAR_ADD}, seed & 1, 2, seed, seed + 11);
        check(FEW[4], 5, 136, {33, 70, 18}, {LINEAR_GATED, LINEAR_F32, LINEAR_GATED}, seed & 1, 3, seed, seed + 12);
        check(FEW[8], 20, 72, {33, 70, 41}, {LINEAR_BF16, LINEAR_GATED, LINEAR_ADD}, !(seed & 1), 2, seed, seed + 13);
        check(MANY, 70, 72, {130, 65, 18}, {LINEAR_BF16, LINEAR_GATED, LINEAR_ADD}, seed & 1, 0, seed, seed + 14);
    }
    // A row's bits: alone or among 64, in tiles of 16, 32 or 64 outputs, by any number of blocks, in any order of threads.
    for (int mode = 0; mode < 4; mode++) {
        const bool gated = mode == LINEAR_GATED;
        auto all = check(FEW[7], 64, 1096, {66}, {mode}, true, 2, 1, 22)[0];
        const size_t row = all.size() / 64;
        for (const Named& k : FEW) {
            if ((gated && k.m == 1) || (k.n == 8 && k.m == 2)) continue;
            const int rows = k.n == 1 ? 1 : k.n * 4 + 1;
            auto some = check(k, rows, 1096, {66}, {mode}, true, 1 + k.n, 2 + k.m, 22)[0];
            if (some.size() != row * rows || memcmp(some.data(), all.data(), some.size())) FAIL("%s: bits of %d rows differ from those among 64, mode %d", k.name, rows, mode);
        }
        auto many = check(MANY, 130, 200, {66}, {mode}, true, 0, 1, 22)[0], one = check(MANY, 1, 200, {66}, {mode}, true, 0, 0, 22)[0];
        if (memcmp(one.data(), many.data(), one.size())) FAIL("many: bits of a row differ, mode %d", mode);
    }
    // Products of warpgroups: about the edges of their tiles; epilogues, tiles, biases and grids in turn.
    for (int rows : {1, 64, 129, 200}) for (int out : {1, 16, 130, 264, 300}) for (int in : {8, 64, 72, 328}) {
        const Named& k = WG[n / 4 % 2];
        check(k, rows, in, {out}, {n % 4}, n >> 3 & 1, 1 + n % 5, n % 3, n + 1);
        n++;
    }
    for (u64 seed = 0; seed < 3; seed++)
        for (const Named& k : WG) {
            check(k, 70, 72, {270, 65, 18}, {LINEAR_BF16, LINEAR_GATED, LINEAR_ADD}, seed & 1, 3, seed, seed + 14);
            check(k, 130, 136, {33, 140, 258}, {LINEAR_GATED, LINEAR_F32, LINEAR_GATED}, !(seed & 1), 2 + seed, seed, seed + 15);
        }
    // More rows than are met together, by one block and by many.
    check(WG[0], 2180, 8, {260}, {LINEAR_F32}, true, 1, 1, 31);
    check(WG[1], 2180, 72, {20, 70}, {LINEAR_GATED, LINEAR_ADD}, false, 7, 0, 32);
    // A row's bits: alone or among others, in tiles of 256 or 128 outputs, by any number of blocks, in any order of threads.
    for (int mode = 0; mode < 4; mode++) {
        const auto all = check(WG[0], 200, 328, {150}, {mode}, true, 1, 1, 24)[0];
        const size_t row = all.size() / 200;
        for (const Named& k : WG)
            for (int rows : {1, 64, 130}) {
                const auto some = check(k, rows, 328, {150}, {mode}, true, 1 + rows % 5, rows % 3, 24)[0];
                if (some.size() != row * rows || memcmp(some.data(), all.data(), some.size())) FAIL("%s: bits of %d rows differ from those among 200, mode %d", k.name, rows, mode);
            }
    }
    // Every count of rows, widths that fill neither a chunk nor a thread's quads, and beyond what a thread keeps of a row.
    for (int rows = 1; rows <= 8; rows++)
        for (int in : {8, 64, 72, 200, 1096, 4104}) {
            const int mode = (rows + in / 8) % 4;
            normed(rows, in, {in > 1000 ? 17 : 35}, {mode}, rows & 1, 1 + rows % 3, rows % 3, rows * 31 + in);
        }
    for (u64 seed = 0; seed < 3; seed++) {
        normed(1 + (int)seed * 3, 584, {33, 70, 18}, {LINEAR_BF16, LINEAR_F32, LINEAR_ADD}, seed & 1, 2, seed, seed + 21);
        normed(8 - (int)seed, 136, {33, 70, 18}, {LINEAR_GATED, LINEAR_F32, LINEAR_GATED}, !(seed & 1), 3, seed, seed + 22);
        normed(1, 6152, {20}, {LINEAR_GATED}, true, 2, seed, seed + 23);
    }
    printf("linear: %d cases; worst error over the sum of magnitudes: %.2e in f32, %.2e in bf16; %d failures\n", n, worst_f32, worst_bf16, failures);
    return failures != 0;
}
