// As much of cuBLASLt as the host's code asks for, on the emulated driver: D = A^T B (+ C) (+ bias) of bf16, in f32 sums, columns first.
//
// It is strict where the library is: an algorithm does for the very problem it was found for, at any number of columns; addresses are
// aligned as the preference said, and a bias, which needs a result in f32, as the one it was found for; a handle is of the context it was made in.
// It uses its workspace, all of what it asked for. Where reductions over blocks are allowed it splits sums by how many columns there are, so that a column depends on the others.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>

typedef int cublasStatus_t;
enum { SUCCESS = 0, INVALID = 7, FAILED = 13, UNSUPPORTED = 15 };
enum { F32 = 0, BF16 = 14 };

namespace {

typedef int (*Do)(void*, int (*)(const void*), const void*, size_t);
typedef bool (*Inside)(uint64_t, size_t);
void* driver() {
    static void* found = [] { void* d = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD); return d ? d : dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD); }();
    return found;
}

// The context that is bound to this thread.
void* bound() {
    static const auto ask = (int (*)(void**))dlsym(driver(), "cuCtxGetCurrent");
    void* context = nullptr;
    ask(&context);
    return context;
}
bool usable(void* handle) { return handle && *(void**)handle == bound(); }

struct Matrix { int type; uint64_t rows, columns; int64_t ld; };
struct Product { int transposed = 0, epilogue = 1; uint64_t bias = 0; };
struct Preference { uint64_t workspace = 0; uint32_t reductions = 7, aligned[4] = {256, 256, 256, 256}; };
constexpr uint64_t WORKSPACE = 1 << 20, MAGIC = 0x5717a17;
struct Algorithm { uint64_t magic, rows, inner, types, aligned, split, bias, nothing; };
static_assert(sizeof(Algorithm) == 64, "as the library's");
struct Result { Algorithm algorithm; uint64_t workspace; int state; float waves; int reserved[4]; };

// For tests: 1: nothing is computed; 2: sums are split by how many columns there are; 3: odd numbers of columns have no algorithm; 4: nothing is
// recorded, as it waits for the stream; 5: every other algorithm it is asked for splits sums.
int spoilt = 0, asked_for = 0;

float of(uint16_t b) { uint32_t u = uint32_t(b) << 16; float f; memcpy(&f, &u, 4); return f; }
uint16_t to(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
size_t bytes(int type) { return type == F32 ? 4 : 2; }
size_t spans(const Matrix& m) { return ((m.columns - 1) * m.ld + m.rows) * bytes(m.type); }

Algorithm asked(const Product& p, const Matrix& a, const Matrix& d) {
    uint64_t bias = 1;
    while (bias < 256 && p.bias % (2 * bias) == 0) bias *= 2;
    return {MAGIC, d.rows, a.rows, uint64_t(d.type) << 8 | uint64_t(p.epilogue), 0, 0, p.epilogue == 4 ? bias : 1, 0};
}
bool fits(const Product& p, const Matrix& a, const Matrix& b, const Matrix& c, const Matrix& d) {
    return p.transposed == 1 && (p.epilogue == 1 || (p.epilogue == 4 && d.type == F32 && p.bias)) && a.type == BF16 && b.type == BF16 && a.rows == b.rows && a.columns == d.rows &&
           b.columns == d.columns && a.ld >= int64_t(a.rows) && b.ld >= int64_t(b.rows) && d.ld >= int64_t(d.rows) && !memcmp(&c, &d, sizeof c);
}
bool aligned(const Matrix& a, const Matrix& b, const Matrix& d, uint64_t to) { return a.ld * 2 % to == 0 && b.ld * 2 % to == 0 && d.ld * bytes(d.type) % to == 0; }
cublasStatus_t checked(const Product& p, const Matrix& a, const Matrix& b, const Matrix& c, const Matrix& d, const Algorithm& algorithm) {
    const Algorithm want = asked(p, a, d);
    if (!fits(p, a, b, c, d)) return INVALID;
    if (algorithm.magic != MAGIC || algorithm.rows != want.rows || algorithm.inner != want.inner || algorithm.types != want.types) return UNSUPPORTED;
    if (want.bias < algorithm.bias) return UNSUPPORTED;
    return (spoilt == 3 && d.columns % 2) || !aligned(a, b, d, algorithm.aligned) ? UNSUPPORTED : SUCCESS;
}

struct Work { Matrix a, b, d; Product p; float beta; uint64_t at[3], workspace; bool split; };
int multiply(const void* args) {
    const Work& w = *(const Work*)args;
    memset((void*)w.workspace, 0xff, WORKSPACE);
    if (spoilt == 1) return 0;
    const uint16_t *a = (const uint16_t*)w.at[0], *b = (const uint16_t*)w.at[1];
    const uint64_t half = w.split ? w.a.rows * (w.d.columns % 7 + 1) / 9 : 0;
    for (uint64_t column = 0; column < w.d.columns; column++)
        for (uint64_t row = 0; row < w.d.rows; row++) {
            float sums[2] = {0, 0};
            for (uint64_t k = 0; k < w.a.rows; k++) sums[k < half] += of(a[row * w.a.ld + k]) * of(b[column * w.b.ld + k]);
            float sum = sums[0] + sums[1];
            const uint64_t at = column * w.d.ld + row;
            // Not zero times what is there, which may be no number.
            if (w.beta != 0) sum += w.beta * ((const float*)w.at[2])[at];
            if (w.p.epilogue == 4) sum += ((const float*)w.p.bias)[row];
            if (w.d.type == F32) ((float*)w.at[2])[at] = sum;
            else ((uint16_t*)w.at[2])[at] = to(sum);
        }
    return 0;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))
API size_t cublasLtGetVersion() { return 130100; }
API cublasStatus_t cublasLtCreate(void** handle) { *handle = driver() ? new void*(bound()) : nullptr; return *handle ? SUCCESS : 1; }
API cublasStatus_t cublasLtDestroy(void* handle) { delete (void**)handle; return SUCCESS; }
API cublasStatus_t cublasLtMatrixLayoutCreate(void** m, int type, uint64_t rows, uint64_t columns, int64_t ld) { *m = new Matrix{type, rows, columns, ld}; return SUCCESS; }
API cublasStatus_t cublasLtMatrixLayoutDestroy(void* m) { delete (Matrix*)m; return SUCCESS; }
API cublasStatus_t cublasLtMatmulDescCreate(void** p, int compute, int scale) {
    if (compute != 68 || scale != F32) return UNSUPPORTED;
    *p = new Product;
    return SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescDestroy(void* p) { delete (Product*)p; return SUCCESS; }
API cublasStatus_t cublasLtMatmulDescSetAttribute(void* p, int attribute, const void* value, size_t n) {
    Product& of = *(Product*)p;
    if (attribute == 3 && n == 4) memcpy(&of.transposed, value, n);
    else if (attribute == 7 && n == 4) memcpy(&of.epilogue, value, n);
    else if (attribute == 8 && n == 8) memcpy(&of.bias, value, n);
    else return INVALID;
    return SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceCreate(void** p) { *p = new Preference; return SUCCESS; }
API cublasStatus_t cublasLtMatmulPreferenceDestroy(void* p) { delete (Preference*)p; return SUCCESS; }
API cublasStatus_t cublasLtMatmulPreferenceSetAttribute(void* p, int attribute, const void* value, size_t n) {
    Preference& of = *(Preference*)p;
    if (attribute == 1 && n == 8) memcpy(&of.workspace, value, n);
    else if (attribute == 3 && n == 4) memcpy(&of.reductions, value, n);
    else if (attribute >= 5 && attribute <= 8 && n == 4) memcpy(&of.aligned[attribute - 5], value, n);
    else return INVALID;
    return SUCCESS;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(void* handle, void* p, void* a, void* b, void* c, void* d, void* preference, int most, Result* results, int* n) {
    const Preference& wish = *(Preference*)preference;
    *n = 0;
    if (!usable(handle) || most < 1 || !fits(*(Product*)p, *(Matrix*)a, *(Matrix*)b, *(Matrix*)c, *(Matrix*)d)) return INVALID;
    if (wish.workspace < WORKSPACE) return UNSUPPORTED;
    uint64_t to = 256;
    for (uint32_t one : wish.aligned) to = one < to ? one : to;
    if (!aligned(*(Matrix*)a, *(Matrix*)b, *(Matrix*)d, to)) return UNSUPPORTED;
    *results = Result{asked(*(Product*)p, *(Matrix*)a, *(Matrix*)d), WORKSPACE, SUCCESS, 1, {}};
    results->algorithm.aligned = to;
    results->algorithm.split = wish.reductions != 0 || (spoilt == 5 && asked_for++ % 2);
    *n = 1;
    return SUCCESS;
}
API cublasStatus_t cublasLtMatmulAlgoCheck(void* handle, void* p, void* a, void* b, void* c, void* d, const Algorithm* algorithm, Result* result) {
    if (!usable(handle)) return INVALID;
    const cublasStatus_t status = checked(*(Product*)p, *(Matrix*)a, *(Matrix*)b, *(Matrix*)c, *(Matrix*)d, *algorithm);
    *result = Result{*algorithm, WORKSPACE, status, 1, {}};
    return status;
}
API cublasStatus_t cublasLtMatmul(void* handle, void* p, const float* alpha, const void* a, void* la, const void* b, void* lb, const float* beta, const void* c, void* lc, void* d, void* ld,
                                  const Algorithm* algorithm, void* workspace, size_t n, void* stream) {
    const Matrix &ma = *(Matrix*)la, &mb = *(Matrix*)lb, &mc = *(Matrix*)lc, &md = *(Matrix*)ld;
    if (!usable(handle) || *alpha != 1 || c != d) return INVALID;
    if (spoilt == 4) {
        static const auto recorded = (int (*)(void*, int*))dlsym(driver(), "cuStreamIsCapturing");
        static const auto wait = (int (*)(void*))dlsym(driver(), "cuStreamSynchronize");
        int is = 0;
        recorded(stream, &is);
        if (is && wait(stream)) return 14;
    }
    if (cublasStatus_t status = checked(*(Product*)p, ma, mb, mc, md, *algorithm)) return status;
    static const Inside inside = (Inside)dlsym(driver(), "strait_emulated_inside");
    static const Do queue = (Do)dlsym(driver(), "strait_emulated_do");
    const uint64_t at[3] = {(uint64_t)a, (uint64_t)b, (uint64_t)d}, bias = ((Product*)p)->epilogue == 4 ? ((Product*)p)->bias : 0;
    for (uint64_t address : at)
        if (address % algorithm->aligned) return UNSUPPORTED;
    const bool there = inside(at[0], spans(ma)) && inside(at[1], spans(mb)) && inside(at[2], spans(md)) && (!bias || inside(bias, md.rows * 4)) && n >= WORKSPACE && inside((uint64_t)workspace, WORKSPACE);
    const Work work{ma, mb, md, *(Product*)p, *beta, {at[0], at[1], at[2]}, (uint64_t)workspace, algorithm->split || spoilt == 2};
    return there && !queue(stream, multiply, &work, sizeof work) ? SUCCESS : FAILED;
}
API void strait_emulated_spoil_library(int how) { spoilt = how, asked_for = 0; }
