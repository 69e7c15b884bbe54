// rows.cuh and seal.cuh against definitions in f64, thread by thread on a CPU:
//   g++ -O2 -march=x86-64-v3 -std=c++17 -DSTRAIT_EMULATED -I.. test_rows.cpp -o test_rows && ./test_rows
#include "rows.cuh"
#include "seal.cuh"
#include <random>

static int failures = 0;
static void check(bool ok, const char* what, double found, double bound) {
    if (!ok) failures++;
    if (!ok || getenv("VERBOSE")) printf("%s %s: %.3g, at most %.3g\n", ok ? "ok  " : "FAIL", what, found, bound);
}
static std::mt19937 random_bits(7);
static float normal() { return std::normal_distribution<float>()(random_bits); }
static std::vector<float> normals(size_t n) { std::vector<float> x(n); for (auto& v : x) v = normal(); return x; }
// Poison: NaN in every float type.
template <class T> static std::vector<T> poison(size_t n) { std::vector<T> x(n); memset(x.data(), 0xff, n * sizeof(T)); return x; }
template <class T> static bool poisoned(const T& x) { T y; memset(&y, 0xff, sizeof y); return !memcmp(&x, &y, sizeof x); }
// Room for a vector at an address that 64 divides.
struct Arena {
    std::vector<u8> room; u8* at;
    explicit Arena(size_t n) : room(n + 64, 0xff), at((u8*)(((uintptr_t)room.data() + 63) & ~uintptr_t(63))) {}
};
struct Floats {
    Arena a; size_t n;
    explicit Floats(size_t n) : a(n * 4), n(n) {}
    explicit Floats(const std::vector<float>& x) : a(x.size() * 4), n(x.size()) { memcpy(a.at, x.data(), n * 4); }
    float* p() { return (float*)a.at; }
    float& operator[](size_t i) { return p()[i]; }
};
static double relative(double found, double want, double least) { return std::isnan(found) ? INFINITY : fabs(found - want) / fmax(fabs(want), least); }
// NaN is the worst, and stays so.
static void worst(double& w, double e) { if (std::isnan(e) || e > w) w = e; }

static void test_embed(u64 seed) {
    for (u32 width : {8u, 24u, 100u, 2056u}) {
        Arena table(width * 10 * 2), x(width * 4 * 4);
        u16* t = (u16*)table.at;
        for (u32 i = 0; i < width * 10; i++) t[i] = of_b(normal());
        u32 tokens[4] = {9, 0, 3, 3};
        emu::launch(dim3(3), dim3(256), 0, [&] { embed({tokens, t, (float*)x.at, width}); }, seed);
        double w = 0;
        for (u32 r = 0; r < 3; r++) for (u32 i = 0; i < width; i++) worst(w, relative(((float*)x.at)[r * width + i], b_of(t[tokens[r] * width + i]), 1e-30));
        check(w == 0, "embed", w, 0);
        check(poisoned(((float*)x.at)[3 * width]), "embed writes its rows only", 0, 0);
    }
}

static void test_norm(u64 seed) {
    for (u32 width : {4u, 100u, 257u, 1024u, 5000u, 7168u}) {
        const u32 rows = 3;
        Floats x(normals(rows * width)), weight(normals(width)); Arena out(width * (rows + 1) * 2);
        for (u32 i = 0; i < width; i++) x[i] *= 1e-3f;
        emu::launch(dim3(rows), dim3(256), 32, [&] { rms_norm({x.p(), weight.p(), (u16*)out.at, width, 1e-6f}); }, seed);
        double w = 0;
        for (u32 r = 0; r < rows; r++) {
            double s = 0;
            for (u32 i = 0; i < width; i++) s += (double)x[r * width + i] * x[r * width + i];
            for (u32 i = 0; i < width; i++) worst(w, relative(b_of(((u16*)out.at)[r * width + i]), x[r * width + i] / sqrt(s / width + 1e-6) * weight[i], 1e-6));
        }
        check(w < 0.00392, "rms_norm, relative", w, 0.00392);
        check(poisoned(((u16*)out.at)[rows * width]), "rms_norm writes its rows only", 0, 0);
    }
}

static void test_silu(u64 seed) {
    for (auto [width, stride] : {std::pair{1028u, 2056u}, {3u, 6u}, {1500u, 1500u}, {1101u, 2202u}}) {
        const u32 rows = 3;
        Floats in(normals(rows * stride + width)); Arena out(width * (rows + 1) * 2);
        for (size_t i = 0; i < in.n; i++) in[i] *= 20;
        in[0] = -200; in[1] = 200;
        float* up = stride > width ? in.p() + width : in.p() + rows * stride - (rows - 1) * stride;
        emu::launch(dim3(rows, (width + 1023) / 1024), dim3(256), 0, [&] { silu_mul({in.p(), up, (u16*)out.at, stride, width}); }, seed);
        double w = 0;
        for (u32 r = 0; r < rows; r++) for (u32 i = 0; i < width; i++) {
            double g = in[r * stride + i];
            worst(w, relative(b_of(((u16*)out.at)[r * width + i]), g / (1 + exp(-g)) * up[r * stride + i], 1e-30));
        }
        check(w < 0.00392, "silu_mul, relative", w, 0.00392);
        check(poisoned(((u16*)out.at)[rows * width]), "silu_mul writes its rows only", 0, 0);
    }
}

static double number(u16 x) { return b_of(x); }
static double number(float x) { return x; }

template <class E> static void test_append(u64 seed, u32 rows, u32 heads, u32 kv, u32 d, bool norms, bool fused) {
    u32 half = d / 2, qs = fused ? (heads + 2 * kv) * d : heads * d, ks = fused ? qs : kv * d, table = 200;
    Floats in(normals((size_t)rows * (heads + 2 * kv) * d)), cos(table * half), sin(table * half), qn(normals(d)), kn(normals(d));
    for (u32 p = 0; p < table; p++) for (u32 i = 0; i < half; i++) { double t = p * pow(1e4, -(double)i / half); cos[p * half + i] = 1.1 * ::cos(t); sin[p * half + i] = 1.1 * ::sin(t); }
    std::vector<float> before(in.p(), in.p() + in.n);
    u32 q_at = 0, k_at = fused ? heads * d : rows * heads * d, v_at = fused ? (heads + kv) * d : rows * (heads + kv) * d;
    u32 layer = 2 * kv * d * 64 * sizeof(E), unit = 2 * layer / 64;
    Arena arena((size_t)(rows + 6) * unit * 64);
    std::vector<u32> positions(rows), pages(rows);
    // One sequence from position 58 on in pages 5, 4, 3, ..; the last third of rows one by one in pages of their own.
    for (u32 r = 0; r < rows; r++) {
        bool alone = r >= rows - rows / 3;
        positions[r] = alone ? r * 37 % table : 58 + r;
        pages[r] = alone ? (6 + r) * unit : (5 - (positions[r] / 64)) * unit;
        if (r == rows / 2) pages[r] = rows::NO_PAGE;
    }
    std::vector<u8> touched(arena.room.size());
    emu::launch(dim3((rows + 15) / 16, heads + 2 * kv), dim3(256), 64 * (d + 1), [&] {
        AppendArgs p = {in.p() + q_at, in.p() + k_at, in.p() + v_at, norms ? qn.p() : nullptr, norms ? kn.p() : nullptr, cos.p(), sin.p(), positions.data(), pages.data(), arena.at, qs, ks, rows, heads, kv, d, layer, 1e-6f};
        if constexpr (sizeof(E) == 2) rope_append_b16(p); else rope_append_f32(p);
    }, seed);
    double wq = 0, wk = 0, wv = 0;
    std::vector<double> y(d);
    auto turn = [&](const float* x, const float* n, u32 position) {
        double s = 0;
        for (u32 i = 0; i < d; i++) s += (double)x[i] * x[i];
        s = norms ? 1 / sqrt(s / d + 1e-6) : 1;
        for (u32 i = 0; i < half; i++) {
            double a = x[i] * s * (norms ? n[i] : 1), b = x[i + half] * s * (norms ? n[i + half] : 1), c = cos[position * half + i], e = sin[position * half + i];
            y[i] = a * c - b * e; y[i + half] = b * c + a * e;
        }
    };
    for (u32 r = 0; r < rows; r++) {
        for (u32 h = 0; h < heads; h++) {
            turn(&before[q_at + r * qs + h * d], qn.p(), positions[r]);
            for (u32 i = 0; i < d; i++) worst(wq, relative(in[q_at + r * qs + h * d + i], y[i], 1));
        }
        for (u32 h = 0; h < kv; h++) {
            turn(&before[k_at + r * ks + h * d], kn.p(), positions[r]);
            for (u32 i = 0; i < d; i++) {
                check(in[k_at + r * ks + h * d + i] == before[k_at + r * ks + h * d + i], "k stays", 0, 0);
                if (pages[r] == rows::NO_PAGE) continue;
                E* p = (E*)(arena.at + (u64)pages[r] * 64 + layer) + 2 * h * d * 64;
                u32 slot = positions[r] % 64;
                worst(wk, relative(number(p[i * 64 + slot]), y[i], 1));
                worst(wv, relative(number(p[d * 64 + slot * d + i]), before[v_at + r * ks + h * d + i], 1e-3));
                touched[(u8*)&p[i * 64 + slot] - arena.at] = 1;
                touched[(u8*)&p[d * 64 + slot * d + i] - arena.at] = 1;
            }
        }
    }
    double bound = sizeof(E) == 2 ? 0.00393 : 2e-6;
    check(wq < 2e-6, "rope of q", wq, 2e-6);
    check(wk < bound, "rope and append of k", wk, bound);
    check(wv < bound, "append of v", wv, bound);
    size_t stray = 0;
    for (size_t i = 0; i < arena.room.size() - 64; i += sizeof(E)) if (!touched[i] && !poisoned(*(E*)(arena.at + i))) stray++;
    check(stray == 0, "append writes its slots only", stray, 0);
}

// quant.rs, once more.
struct Levels { std::vector<double> l; double unit; };
static Levels levels(u32 bits) {
    if (bits == 2) return {{-3, -1, 1, 3}, 2.0087f};
    if (bits == 3) return {{-7, -5, -3, -1, 1, 3, 5, 7}, 3.4129f};
    return {{-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15}, 5.9666f};
}
static u32 nearest(const Levels& v, double y) { u32 c = 0; for (size_t i = 1; i < v.l.size(); i++) c += y > (v.l[i - 1] + v.l[i]) / 2; return c; }
static double clamped(double x) { return fmin(fmax(x, -65504), 65504); }
static u32 get_code(const u32* words, u32 lanes, u32 lane, u32 bits, u32 n, u32 quad, u32 byte) {
    u32 code = 0, quads = (n + 3) / 4;
    for (u32 b = 0; b < bits; b++) {
        u32 word, bit, plane = bits == 3 ? 2 : bits;
        if (bits == 3 && b == 2) { word = (quads + 3) / 4 + quad / 8; bit = 8 * byte + quad % 8; }
        else { word = quad / (8 / plane); bit = 8 * byte + plane * (quad % (8 / plane)) + b; }
        code |= (words[word * lanes + lane] >> bit & 1) << b;
    }
    return code;
}
static u32 words_of(u32 n, u32 bits) { u32 quads = (n + 3) / 4; return bits == 3 ? (quads + 3) / 4 + (quads + 7) / 8 : (quads * bits + 7) / 8; }
static u32 up8(u32 x) { return (x + 7) / 8 * 8; }
// Distance in steps of f16 of what is stored from what should be, for numbers of one sign.
static double steps(u16 found, double want) { return fabs((double)found - of_h((float)want)); }

template <class E> static void test_seal(u64 seed, u32 kv, u32 d, u32 key_rank, u32 value_rank, u32 groups, u32 key_bits, u32 value_bits, bool affine, u32 skip0, bool mean, bool turned = false) {
    u32 channels = kv * d, layer = 2 * channels * 64 * sizeof(E);
    seal::Part keys = {key_rank, groups, key_bits, affine, affine ? 1 : groups, 0, 0}, values = {value_rank, groups, value_bits, affine, affine ? 1 : groups, 0, 0};
    u32 start = 64;
    keys.codes = start;
    u32 at = up8(start + (key_bits == 16 ? key_rank * 128 : words_of(key_rank, key_bits) * 256));
    keys.meta = key_bits == 16 ? start : at;
    at = up8(at + (key_bits == 16 || !key_rank ? 0 : affine ? key_rank * 4 : groups * 128));
    values.codes = at;
    at = up8(at + (value_bits == 16 ? value_rank * 128 : words_of(64, value_bits) * value_rank * 4));
    values.meta = value_bits == 16 ? values.codes : at;
    u32 vgroups = affine ? (value_rank + 31) / 32 : groups;
    at = up8(at + (value_bits == 16 || !value_rank ? 0 : affine ? vgroups * 256 : groups * 128));
    u32 page = (at + 64 + 63) / 64, from_unit = 2 * layer / 64, jobs = 2;
    Arena arena((size_t)jobs * (page + from_unit) * 64);
    std::vector<seal::Job> job = {{0, layer, from_unit, skip0, 64}, {from_unit + page, 0, 2 * from_unit + page, 0, 192}};
    Floats km((size_t)channels * key_rank), vm((size_t)channels * value_rank), vmean(normals(channels)), kmean(normals(channels)), cos(256 * d / 2), sin(256 * d / 2), latents((size_t)jobs * (key_rank + value_rank) * 64 + 16);
    auto fill = [&](Floats& m, u32 rank) {
        for (u32 c = 0; c < channels; c++) for (u32 r = 0; r < rank; r++) m[c * rank + r] = c / (channels / groups) == r / (rank / groups) ? normal() / sqrtf(channels / groups) : 0;
    };
    // With an attention factor, as some models have.
    for (u32 i = 0; i < 256 * d / 2; i++) { float a = normal() * 3; cos[i] = 1.1f * cosf(a), sin[i] = 1.1f * sinf(a); }
    if (key_rank) fill(km, key_rank);
    if (value_rank) fill(vm, value_rank);
    std::vector<double> x[2][2];  // [job][kind][position][channel]
    for (u32 j = 0; j < jobs; j++) for (int kind = 0; kind < 2; kind++) {
        x[j][kind].resize(64 * channels);
        E* p = (E*)(arena.at + (u64)job[j].from * 64 + job[j].offset);
        for (u32 pos = 0; pos < 64; pos++) for (u32 c = 0; c < channels; c++) {
            E& e = p[(2 * (c / d) + kind) * d * 64 + (kind ? pos * d + c % d : c % d * 64 + pos)];
            float v = normal() * (pos == 40 ? 0 : pos == 41 ? 1e-9f : 3);
            if constexpr (sizeof(E) == 2) e = of_b(v); else e = v;
            x[j][kind][pos * channels + c] = number(e);
        }
        for (u32 pos = 0; turned && !kind && pos < 64; pos++) for (u32 h = 0; h < kv; h++) for (u32 i = 0; i < d / 2; i++) {
            double *a = &x[j][0][pos * channels + h * d + i], *b = a + d / 2, co = cos[(job[j].position + pos) * d / 2 + i], si = sin[(job[j].position + pos) * d / 2 + i];
            double y = (*a * co + *b * si) / (co * co + si * si), z = (*b * co - *a * si) / (co * co + si * si);
            *a = y, *b = z;
        }
    }
    u32 top = std::max(key_rank, value_rank);
    auto project = [&] {
        SealProjectArgs p = {arena.at, job.data(), km.p(), vm.p(), turned ? kmean.p() : nullptr, mean ? vmean.p() : nullptr, turned ? cos.p() : nullptr, turned ? sin.p() : nullptr, latents.p(), keys, values, channels, d};
        if constexpr (sizeof(E) == 2) seal_project_b16(p); else seal_project_f32(p);
    };
    emu::launch(dim3((top + 31) / 32, jobs, 2), dim3(128), 12288, project, seed);
    u32 shared = 4 * std::max(1536 + 32 * groups, 2 * ((top + 31) / 32 * 32));
    emu::launch(dim3(jobs, 4), dim3(512), shared, [&] { seal_codes({arena.at, job.data(), latents.p(), keys, values}); }, seed);
    double wl = 0, wrong = 0, scales = 0, near = 0;
    for (u32 j = 0; j < jobs; j++) for (int kind = 0; kind < 2; kind++) {
        const seal::Part& part = kind ? values : keys;
        Floats& map = kind ? vm : km;
        u32 rank = part.rank, bits = part.bits, skip = job[j].skip;
        if (!rank) continue;
        std::vector<double> l(64 * rank);
        float* found = latents.p() + ((size_t)j * (key_rank + value_rank) + (kind ? key_rank : 0)) * 64;
        for (u32 p = 0; p < 64; p++) {
            double big = 1e-30;
            for (u32 r = 0; r < rank; r++) {
                double s = 0;
                for (u32 c = 0; c < channels; c++) s += ((float)(x[j][kind][p * channels + c] - (kind && mean ? vmean[c] : !kind && turned ? kmean[c] : 0))) * (double)map[c * rank + r];
                l[p * rank + r] = (float)s;
                big = fmax(big, fabs(s));
            }
            for (u32 r = 0; r < rank; r++) worst(wl, fabs(found[kind ? p * rank + r : r * 64 + p] - l[p * rank + r]) / big);
        }
        u8* to = arena.at + (u64)job[j].to * 64;
        const u32* words = (u32*)(to + part.codes);
        const u16* meta = (u16*)(to + part.meta);
        if (bits == 16) {
            for (u32 p = 0; p < 64; p++) for (u32 r = 0; r < rank; r++) {
                double h = h_of(((u16*)words)[kind ? p * rank + r : r * 64 + p]), w = p < skip ? 0 : l[p * rank + r];
                if (!(fabs(h - w) <= fabs(w) / 2000 + 2e-6)) wrong++;
            }
            continue;
        }
        auto code_at = [&](u32 p, u32 r) { return kind ? get_code(words, rank, r, bits, 64, p % 16, p / 16) : get_code(words, 64, p, bits, rank, r / 4, r % 4); };
        auto codes_like = [&](u32 p, u32 r, double y, auto code_of, double slack) {
            u32 code = code_at(p, r);
            if (code == code_of(y)) return;
            if (code == code_of(y - slack) || code == code_of(y + slack)) near++; else wrong++;
        };
        double levels_top = (1 << bits) - 1;
        auto affine_of = [&](double y) { return (u32)fmin(fmax(nearbyint(y), 0), levels_top); };
        Levels lv = affine ? Levels{} : levels(bits);
        auto normal_of = [&](double y) { return nearest(lv, y); };
        auto affine_group = [&](u32 s_at, u32 m_at, auto list) {  // of (position, latent)
            double lo = INFINITY, hi = -INFINITY;
            for (auto [p, r] : list) if (p >= skip) { lo = fmin(lo, l[p * rank + r]); hi = fmax(hi, l[p * rank + r]); }
            bool any = lo <= hi;
            worst(scales, steps(meta[s_at], any ? clamped((hi - lo) / levels_top) : 0));
            worst(scales, steps(meta[m_at], any ? clamped(lo) : 0));
            double s = h_of(meta[s_at]), m = h_of(meta[m_at]);
            for (auto [p, r] : list) {
                if (p < skip || s == 0) { if (code_at(p, r)) wrong++; }
                else codes_like(p, r, (l[p * rank + r] - m) / s, affine_of, 1e-4 + 1e-5 * fabs(l[p * rank + r]) / s);
            }
        };
        typedef std::vector<std::pair<u32, u32>> List;
        if (affine && !kind) {
            for (u32 r = 0; r < rank; r++) { List list; for (u32 p = 0; p < 64; p++) list.push_back({p, r}); affine_group(r, rank + r, list); }
        } else if (affine) {
            for (u32 p = 0; p < 64; p++) for (u32 g = 0; g < vgroups; g++) { List list; for (u32 r = g * 32; r < std::min(g * 32 + 32, rank); r++) list.push_back({p, r}); affine_group(g * 64 + p, (vgroups + g) * 64 + p, list); }
        } else {
            u32 w = rank / groups;
            for (u32 p = 0; p < 64; p++) for (u32 g = 0; g < groups; g++) {
                double sq = 0, xl = 0, ll = 0;
                for (u32 r = g * w; r < (g + 1) * w; r++) sq += l[p * rank + r] * l[p * rank + r];
                double rms = sqrt(sq / w), by = rms > 0 ? lv.unit / rms : 0;
                for (u32 r = g * w; r < (g + 1) * w; r++) { double v = lv.l[nearest(lv, l[p * rank + r] * by)]; xl += l[p * rank + r] * v; ll += v * v; }
                double deviation = p < skip || rms == 0 ? 0 : clamped(xl / ll * lv.unit);
                // Where an element next to a boundary goes the other way, the deviation moves by what it is of the sum.
                worst(scales, steps(meta[g * 64 + p], deviation) / (w < 64 ? 4 : 1));
                double stored = h_of(meta[g * 64 + p]);
                if (stored > 0) by = lv.unit / stored;
                for (u32 r = g * w; r < (g + 1) * w; r++) {
                    if (p < skip) { if (code_at(p, r)) wrong++; }
                    else codes_like(p, r, l[p * rank + r] * by, normal_of, 1e-3);
                }
            }
        }
    }
    char what[128];
    auto say = [&](const char* s) { snprintf(what, sizeof what, "seal %u x %u to %u / %u in %u, %u / %u bits%s: %s", kv, d, key_rank, value_rank, groups, key_bits, value_bits, affine ? " affine" : "", s); return what; };
    check(wl < 3e-6, say("latents, relative to the greatest"), wl, 3e-6);
    check(wrong == 0, say("codes that are wrong"), wrong, 0);
    double most = 64.0 * jobs * (key_rank + value_rank) * 2e-4 + 2;
    check(near <= most, say("codes next to a boundary"), near, most);
    check(scales <= 1, say("scales, steps of f16"), scales, 1);
    size_t stray = 0;
    for (u32 j = 0; j < jobs; j++) {
        u8* to = arena.at + (u64)job[j].to * 64;
        for (u32 i = 0; i < page * 64; i++) {
            bool in = (i >= keys.codes && i < keys.codes + (key_bits == 16 ? key_rank * 128 : words_of(key_rank, key_bits) * 256)) || (i >= keys.meta && key_bits < 16 && i < keys.meta + (affine ? key_rank * 4 : key_rank ? groups * 128 : 0)) ||
                      (i >= values.codes && i < values.codes + (value_bits == 16 ? value_rank * 128 : words_of(64, value_bits) * value_rank * 4)) || (i >= values.meta && value_bits < 16 && i < values.meta + (affine ? vgroups * 256 : value_rank ? groups * 128 : 0));
            if (!in && to[i] != 0xff) stray++;
        }
    }
    check(stray == 0, say("bytes outside its sections"), stray, 0);
    check(poisoned(latents[(size_t)jobs * (key_rank + value_rank) * 64]), say("latents beyond their room"), 0, 0);
}

int main() {
    for (u64 seed : {0, 1, 2}) {
        test_embed(seed);
        test_norm(seed);
        test_silu(seed);
        test_append<u16>(seed, 37, 4, 2, 128, true, true);
        test_append<u16>(seed, 1, 3, 1, 64, false, false);
        test_append<u16>(seed, 33, 2, 2, 80, false, true);
        test_append<u16>(seed, 18, 2, 1, 96, true, false);
        test_append<float>(seed, 20, 2, 1, 16, true, false);
        test_append<u16>(seed, 3, 2, 1, 256, true, false);
        //               heads d  ranks    groups bits affine skip mean turned
        test_seal<u16>(seed, 2, 64, 70, 45, 1, 4, 4, false, 4, true);
        test_seal<u16>(seed, 2, 80, 90, 50, 1, 3, 3, false, 0, true);
        test_seal<u16>(seed, 1, 64, 18, 33, 1, 2, 2, false, 64, false);
        test_seal<u16>(seed, 4, 24, 96, 96, 4, 4, 3, false, 5, true);
        test_seal<u16>(seed, 2, 40, 60, 44, 2, 3, 2, false, 1, false);
        test_seal<float>(seed, 2, 16, 32, 20, 1, 4, 4, false, 4, true);
        test_seal<u16>(seed, 2, 32, 64, 0, 1, 2, 4, false, 0, false);
        test_seal<u16>(seed, 2, 64, 70, 45, 1, 4, 4, true, 4, true);
        test_seal<u16>(seed, 2, 32, 64, 64, 2, 8, 8, true, 0, false);
        test_seal<float>(seed, 2, 16, 30, 31, 1, 3, 3, true, 64, true);
        test_seal<u16>(seed, 2, 16, 32, 32, 1, 2, 2, true, 3, true);
        test_seal<u16>(seed, 2, 32, 50, 37, 1, 16, 16, true, 4, true);
        test_seal<u16>(seed, 2, 64, 70, 45, 1, 4, 4, false, 4, true, true);
        test_seal<float>(seed, 4, 24, 52, 44, 2, 8, 3, true, 0, true, true);
    }
    test_seal<u16>(3, 8, 64, 200, 136, 1, 4, 3, false, 0, true);
    test_seal<u16>(3, 1, 64, 1024, 512, 1, 3, 2, false, 0, true);
    printf("%s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
