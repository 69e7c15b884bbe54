// rebuild.cuh against a definition in f64, thread by thread on a CPU:
//   g++ -O2 -march=x86-64-v3 -std=c++17 -DSTRAIT_EMULATED -I.. test_rebuild.cpp -o test_rebuild && ./test_rebuild
#include "rebuild.cuh"
#include <random>

static int failures = 0;
static void check(bool ok, const char* what, double found, double bound) {
    if (!ok) failures++;
    if (!ok || getenv("VERBOSE")) printf("%s %s: %.3g, at most %.3g\n", ok ? "ok  " : "FAIL", what, found, bound);
}
static std::mt19937 random_bits(13);
static float normal() { return std::normal_distribution<float>()(random_bits); }
static float rounded(float x) { return h_of(of_h(x)); }

// A code as `quant` documents the words.
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
static double level(u32 bits, u32 code) {
    return (code - 0.5 * ((1 << bits) - 1)) / (bits == 4 ? 5.9666 / 2 : bits == 3 ? 3.4129 / 2 : 2.0087 / 2);
}

struct Kind { u32 rank, bits; bool affine; };
struct Cut { u32 keys, values; bool resident; };  // chunks, zero for the whole; and whether the map stays

// One row over some sealed pages of random codes. `absorbed`: keys after rope.
struct Case {
    u32 heads, kv, d, groups, pages, skip; Kind k, v; bool absorbed;
    std::vector<u8> room; u8* arena; std::vector<u32> table;
    u32 unit, sinks_at, sinks_stride = 16;
    rebuild::Part keys, values;
    std::vector<double> kl, vl;  // [pages * 64][rank]
    std::vector<u16> up, value_up; std::vector<float> mean, value_mean, cos, sin;
    u32 stride, positions;

    static u32 up8(u32 x) { return (x + 7) / 8 * 8; }
    Case(u32 heads, u32 kv, u32 d, u32 groups, u32 pages, u32 skip, Kind k, Kind v, bool absorbed)
        : heads(heads), kv(kv), d(d), groups(groups), pages(pages), skip(skip), k(k), v(v), absorbed(absorbed) {
        u32 ks = k.rank / groups, vs = v.rank / groups, width = 0;
        for (u32 g = 0; g < groups; g++) width = std::max(width, g * ks % 32 + ks);
        width = (width + 15) / 16 * 16;
        keys = {k.rank, ks, width, width, k.bits, k.bits < 16 && k.affine, 64, 0};
        values = {v.rank, vs, (vs + 15) / 16 * 16, (vs + 15) / 16 * 16, v.bits, v.bits < 16 && v.affine, 0, 0};
        u32 vgroups = (v.rank + 31) / 32;
        u32 at = up8(64 + (k.bits == 16 ? k.rank * 128 : words_of(k.rank, k.bits) * 256));
        keys.meta = k.bits == 16 ? 64 : at;
        at = up8(at + (k.bits == 16 || !k.rank ? 0 : k.affine ? k.rank * 4 : groups * 128));
        values.codes = at;
        at = up8(at + (v.bits == 16 ? v.rank * 128 : words_of(64, v.bits) * v.rank * 4));
        values.meta = v.bits == 16 ? values.codes : at;
        at = up8(at + (v.bits == 16 || !v.rank ? 0 : v.affine ? vgroups * 256 : groups * 128));
        unit = (at + 63) / 64, sinks_at = unit * (pages + 1);
        positions = (pages + 3) * 64;
        size_t bytes = (size_t)sinks_at * 64 + (size_t)2 * kv * d * sinks_stride * 2;
        room.assign(bytes + 64, 0xff);
        arena = (u8*)(((uintptr_t)room.data() + 63) & ~uintptr_t(63));
        room.resize(arena - room.data() + bytes);  // what is read beyond, the sanitizer sees
        for (u32 i = 0; i < pages; i++) table.push_back((pages - i) * unit);
        kl.resize((size_t)pages * 64 * k.rank), vl.resize((size_t)pages * 64 * v.rank);
        for (u32 i = 0; i < pages; i++) {
            u8* page = arena + (size_t)table[i] * 64;
            u32 *kw = (u32*)(page + 64), *vw = (u32*)(page + values.codes);
            u16 *km = (u16*)(page + keys.meta), *vm = (u16*)(page + values.meta);
            if (k.bits == 16) for (u32 j = 0; j < k.rank * 64; j++) ((u16*)kw)[j] = of_h(normal());
            else {
                memset(kw, 0, words_of(k.rank, k.bits) * 256);
                for (u32 p = 0; p < 64; p++) for (u32 r = 0; r < k.rank; r++) put(kw, 64, p, k.bits, k.rank, r / 4, r % 4);
                if (k.affine) for (u32 r = 0; r < k.rank; r++) km[r] = of_h(3.0f / (1 << k.bits)), km[k.rank + r] = of_h(normal() - 1.5f);
                else for (u32 j = 0; j < groups * 64; j++) km[j] = of_h(1 + 0.3f * normal());
            }
            if (v.bits == 16) for (u32 j = 0; j < v.rank * 64; j++) ((u16*)vw)[j] = of_h(normal());
            else {
                for (u32 p = 0; p < 64; p++) for (u32 r = 0; r < v.rank; r++) put(vw, v.rank, r, v.bits, 64, p % 16, p / 16);
                if (v.affine) for (u32 j = 0; j < vgroups * 64; j++) vm[j] = of_h(2.0f / (1 << v.bits)), vm[vgroups * 64 + j] = of_h(normal());
                else for (u32 j = 0; j < groups * 64; j++) vm[j] = of_h(1 + 0.3f * normal());
            }
            for (u32 p = 0; p < 64; p++) {
                for (u32 r = 0; r < k.rank; r++) {
                    double& x = kl[((size_t)i * 64 + p) * k.rank + r];
                    if (k.bits == 16) { x = h_of(((u16*)kw)[r * 64 + p]); continue; }
                    u32 code = get_code(kw, 64, p, k.bits, k.rank, r / 4, r % 4);
                    x = k.affine ? h_of(km[k.rank + r]) + code * (double)h_of(km[r]) : level(k.bits, code) * h_of(km[r / ks * 64 + p]);
                }
                for (u32 r = 0; r < v.rank; r++) {
                    double& x = vl[((size_t)i * 64 + p) * v.rank + r];
                    if (v.bits == 16) { x = h_of(((u16*)vw)[p * v.rank + r]); continue; }
                    u32 code = get_code(vw, v.rank, r, v.bits, 64, p % 16, p / 16);
                    x = v.affine ? h_of(vm[(vgroups + r / 32) * 64 + p]) + code * (double)h_of(vm[r / 32 * 64 + p]) : level(v.bits, code) * h_of(vm[r / vs * 64 + p]);
                }
            }
        }
        for (size_t i = (size_t)sinks_at * 64; i < bytes; i += 2) *(u16*)(arena + i) = of_b(normal());
        stride = (vs + 7) / 8 * 8;
        up.assign((size_t)kv * width * d, 0), value_up.assign((size_t)kv * stride * d, 0);
        for (u32 h = 0; h < kv; h++) {
            u32 off = h * groups / kv * ks % 32;
            for (u32 r = 0; r < ks; r++) for (u32 c = 0; c < d; c++) up[((size_t)h * width + off + r) * d + c] = of_h(normal() / sqrtf(ks));
            for (u32 r = 0; r < vs; r++) for (u32 c = 0; c < d; c++) value_up[((size_t)h * stride + r) * d + c] = of_h(normal() / sqrtf(vs));
        }
        for (u32 i = 0; i < kv * d; i++) mean.push_back(normal()), value_mean.push_back(normal());
        for (u32 p = 0; p < positions; p++) for (u32 i = 0; i < d / 2; i++) {
            double a = p * pow(1e4, -2.0 * i / d);
            cos.push_back(1.1f * (float)::cos(a)), sin.push_back(1.1f * (float)::sin(a));
        }
    }
    static void put(u32* words, u32 lanes, u32 lane, u32 bits, u32 n, u32 quad, u32 byte) {
        u32 code = random_bits() >> (32 - bits), quads = (n + 3) / 4;
        for (u32 b = 0; b < bits; b++) {
            u32 word, bit, plane = bits == 3 ? 2 : bits;
            if (bits == 3 && b == 2) { word = (quads + 3) / 4 + quad / 8; bit = 8 * byte + quad % 8; }
            else { word = quad / (8 / plane); bit = 8 * byte + plane * (quad % (8 / plane)) + b; }
            u32& w = words[word * lanes + lane];
            w = (w & ~(1u << bit)) | (code >> b & 1) << bit;
        }
    }
    // What a head meets of a latent, from its group's first spread one on.
    double spread(u32 h, u32 position, u32 column) const {
        u32 g = h * groups / kv, first = g * keys.span / 32 * 32, r = first + column;
        return r >= g * keys.span && r < (g + 1) * keys.span ? kl[(size_t)position * k.rank + r] : 0;
    }
    std::vector<double> key(u32 h, u32 position, bool turned) const {
        std::vector<double> x(d);
        for (u32 c = 0; c < d; c++) {
            if (turned) x[c] = mean[h * d + c];
            for (u32 r = 0; r < keys.width; r++) x[c] += spread(h, position, r) * h_of(up[((size_t)h * keys.width + r) * d + c]);
        }
        for (u32 i = 0; turned && i < d / 2; i++) {
            double co = cos[(size_t)position * d / 2 + i], si = sin[(size_t)position * d / 2 + i], a = x[i], b = x[i + d / 2];
            x[i] = a * co - b * si, x[i + d / 2] = b * co + a * si;
        }
        return x;
    }
    size_t scales_bytes() const { return (keys.affine ? 4 * keys.width : 0) + (values.affine ? 4 * rebuild::value_groups(values) * PAGE : 0) + 8 * PAGE; }
    void name(char* what, const char* s) const {
        snprintf(what, 160, "%s %u / %u of %u in %u, %u x %u%s and %u x %u%s: %s", absorbed ? "absorbed" : "rebuilt", heads, kv, d, groups, k.rank, k.bits, k.affine ? "a" : "", v.rank, v.bits, v.affine ? "a" : "", s);
    }

    void decode(u64 seed, Cut cut) {
        rebuild::Part ks = keys, vs = values;
        if (cut.keys) ks.chunk = cut.keys;
        if (cut.values) vs.chunk = cut.values;
        u32 tiles = (heads + 15) / 16, group = heads / kv;
        // Two items of the row, the second from another page on.
        std::vector<SealedItem> items = {{1, 0, pages, skip, 2}};
        if (pages > 1) items[0].pages = 1, items.push_back({1, 1, pages - 1, 0, 3, 1});
        std::vector<float> q((size_t)2 * heads * d), factors((size_t)2 * tiles * 16, NAN);
        std::vector<u16> absorbed_q((size_t)2 * tiles * 16 * ks.width, 0x7e00);
        for (auto& x : q) x = 2 * normal();
        float scale = 1 / sqrtf(d);
        for (u32 h = 0; h < heads; h++) {
            factors[tiles * 16 + h] = 0.3f + 0.1f * normal();
            // Zero where the head has no part.
            u32 g = h / group * groups / kv, off = g * ks.span % 32;
            for (u32 r = 0; r < ks.width; r++) absorbed_q[((size_t)tiles * 16 + h) * ks.width + r] = r >= off && r < off + ks.span ? of_h(normal() / 2) : 0;
        }
        std::vector<u16> out(items.size() * tiles * 16 * stride + 8, 0xffff);
        std::vector<float> state(items.size() * tiles * 16 * 4, NAN);
        u32 units = absorbed ? groups : kv, lines = absorbed ? 32 : 8, reach = absorbed ? 512 : 1024;
        LatentsArgs p = {arena, table.data(), items.data(), absorbed ? (const void*)absorbed_q.data() : q.data(), factors.data(), up.data(), mean.data(), cos.data(), sin.data(),
                         out.data(), state.data(), scale, heads, units, groups, d, tiles, stride, cut.resident, unit * 64, ks, vs};
        size_t shared = 2 * rebuild::tile_size(ks, vs) + scales_bytes() + (absorbed ? 0 : 2 * (cut.resident ? ks.width : ks.chunk) * (d + 8)) +
                        lines * (2 * ((absorbed ? ks.width : d) + 8) + 4 * (absorbed ? 2 : 4) * rebuild::S_ROW + 2 * rebuild::V_ROW + 8) + 4 * SEALED_MOST;
        dim3 grid(items.size() * units * ((heads / units + lines - 1) / lines), 1, std::max(1u, (vs.width + reach - 1) / reach));
        emu::launch(grid, dim3(256), shared, [&] { if (absorbed) attend_absorbed(p); else attend_rebuilt(p); }, seed);
        double off = 0, norm = 0, lse = 0;
        for (u32 item = 0; item < items.size(); item++) for (u32 h = 0; h < heads; h++) {
            u32 kh = h / group, g = kh * groups / kv, n = items[item].pages * 64;
            std::vector<double> w(n); double top = -INFINITY, total = 0;
            for (u32 j = 0; j < n; j++) {
                u32 at = items[item].table * 64 + j;
                if (absorbed) {
                    for (u32 r = 0; r < ks.width; r++) w[j] += spread(kh, at, r) * h_of(absorbed_q[((size_t)tiles * 16 + h) * ks.width + r]);
                    w[j] *= factors[tiles * 16 + h];
                } else {
                    // Item `item` stands where its `page` says.
                    Case& self = *this;
                    std::vector<double> x(d);
                    for (u32 c = 0; c < d; c++) { x[c] = mean[kh * d + c]; for (u32 r = 0; r < ks.width; r++) x[c] += spread(kh, at, r) * h_of(self.up[((size_t)kh * ks.width + r) * d + c]); }
                    u32 position = items[item].page * 64 + j;
                    for (u32 i = 0; i < d / 2; i++) {
                        double co = cos[(size_t)position * d / 2 + i], si = sin[(size_t)position * d / 2 + i], a = x[i], b = x[i + d / 2];
                        w[j] += q[((size_t)heads + h) * d + i] * (a * co - b * si) + q[((size_t)heads + h) * d + d / 2 + i] * (b * co + a * si);
                    }
                    w[j] *= scale * 1.44269504;
                }
                if (j < items[item].skip) w[j] = -INFINITY;
                top = fmax(top, w[j]);
            }
            const float* s = &state[((size_t)item * tiles * 16 + h) * 4];
            if (top == -INFINITY) { if (s[1] != 0 || s[2] != 0) failures++; continue; }
            for (auto& x : w) total += x = exp2(x - top);
            // NaN is the worst, and stays so; fmax would pass it over.
            double e = fabs(log2(s[1]) + s[0] - log2(total) - top);
            if (std::isnan(e) || e > lse) lse = e;
            for (u32 r = 0; r < stride; r++) {
                double want = 0, found = (double)h_of(out[((size_t)item * tiles * 16 + h) * stride + r]) * s[2] / s[1];
                for (u32 j = 0; r < vs.span && j < n; j++) want += w[j] / total * vl[((size_t)items[item].table * 64 + j) * v.rank + g * vs.span + r];
                off += (found - want) * (found - want), norm += want * want;
            }
        }
        char what[192];
        if (stride) { name(what, "sums, relative"); check(sqrt(off / norm) < 3e-3, what, sqrt(off / norm), 3e-3); }
        name(what, "log-sum-exp"); check(lse < 2e-2, what, lse, 2e-2);
        name(what, "beyond its room"); check(out[out.size() - 1] == 0xffff, what, 0, 0);
    }

    void rebuild_all(u64 seed, Cut cut) {
        rebuild::Part ks = keys, vs = values;
        if (cut.keys) ks.chunk = cut.keys;
        if (cut.values) vs.chunk = cut.values;
        std::vector<RebuildJob> jobs;
        for (u32 i = 0; i < pages; i++) jobs.push_back({table[i], i, sinks_at, i ? 0 : std::min(skip, sinks_stride)});
        std::vector<u16> out((size_t)pages * kv * 2 * d * 64, 0xffff);
        RebuildArgs p = {arena, jobs.data(), out.data(), up.data(), absorbed ? nullptr : mean.data(), absorbed ? nullptr : cos.data(), absorbed ? nullptr : sin.data(), value_up.data(), value_mean.data(),
                         groups, d, stride, 0, sinks_stride, ks, vs};
        size_t shared = 2 * std::max(ks.chunk, vs.chunk) * (d + 8) + 2 * std::max(rebuild::tile_size(ks, vs), d * rebuild::V_ROW) + scales_bytes();
        emu::launch(dim3(pages, kv), dim3(256), shared, [&] { rebuild_pages(p); }, seed);
        double off = 0, norm = 0; int sinks = 0;
        for (u32 i = 0; i < pages; i++) for (u32 h = 0; h < kv; h++) for (u32 j = 0; j < 64; j++) {
            const u16* page = &out[((size_t)i * kv + h) * 2 * d * 64];
            const u16* kept = (const u16*)(arena + (size_t)sinks_at * 64) + (size_t)2 * h * d * sinks_stride;
            std::vector<double> x = key(h, i * 64 + j, !absorbed);
            for (u32 c = 0; c < d; c++) {
                if (j < jobs[i].sinks) { sinks += page[c * 64 + j] != kept[c * sinks_stride + j] || page[d * 64 + j * d + c] != kept[d * sinks_stride + j * d + c]; continue; }
                double y = value_mean[h * d + c];
                for (u32 r = 0; r < vs.span; r++) y += vl[((size_t)i * 64 + j) * v.rank + h * groups / kv * vs.span + r] * h_of(value_up[((size_t)h * stride + r) * d + c]);
                double a = b_of(page[c * 64 + j]) - x[c], b = b_of(page[d * 64 + j * d + c]) - y;
                off += a * a + b * b, norm += x[c] * x[c] + y * y;
            }
        }
        char what[192];
        name(what, "rebuilt pages, relative"); check(sqrt(off / norm) < 2.5e-3, what, sqrt(off / norm), 2.5e-3);
        name(what, "sinks"); check(sinks == 0, what, sinks, 0);
    }
    void both(u64 seed, Cut cut) { decode(seed, cut); rebuild_all(seed, cut); }
};

int main() {
    for (u64 seed : {0, 1, 2}) {
        //   heads kv d groups pages skip keys values absorbed    chunks, map in shared memory
        Case(4, 2, 64, 1, 3, 4, {41, 4, false}, {55, 4, false}, false).both(seed, {0, 0, true});
        Case(3, 3, 80, 1, 2, 0, {77, 3, true}, {50, 3, true}, false).both(seed, {32, 0, false});
        Case(2, 1, 96, 1, 2, 64, {64, 8, true}, {260, 2, true}, false).both(seed, {32, 128, true});
        Case(10, 1, 128, 1, 1, 5, {130, 16, true}, {37, 16, true}, false).both(seed, {96, 0, false});
        Case(6, 3, 64, 3, 2, 4, {75, 2, false}, {42, 3, false}, false).both(seed, {0, 0, true});
        Case(4, 4, 64, 2, 2, 4, {26, 4, true}, {34, 8, true}, false).both(seed, {0, 0, true});
        Case(4, 2, 64, 1, 3, 4, {42, 8, true}, {55, 8, true}, true).both(seed, {32, 0, false});
        Case(34, 2, 80, 1, 2, 0, {78, 4, true}, {301, 4, true}, true).both(seed, {64, 128, false});
        Case(3, 3, 96, 3, 1, 17, {96, 3, false}, {93, 2, false}, true).both(seed, {0, 0, false});
        Case(2, 1, 64, 1, 2, 4, {20, 16, true}, {9, 16, true}, true).both(seed, {0, 0, false});
        Case(2, 2, 64, 1, 1, 0, {0, 4, true}, {12, 3, false}, false).both(seed, {0, 0, true});
        Case(2, 2, 64, 1, 1, 0, {12, 3, false}, {0, 4, true}, true).both(seed, {0, 0, false});
    }
    // More values than a block sums.
    Case(2, 1, 64, 1, 1, 0, {24, 4, false}, {1100, 4, false}, false).both(3, {0, 512, true});
    Case(2, 1, 64, 1, 1, 0, {24, 2, true}, {530, 2, true}, true).both(3, {0, 256, false});
    printf("%s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
