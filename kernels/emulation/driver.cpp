// A CUDA driver library whose devices are this CPU: what the host's code allocates, copies, loads and launches, with the very
// kernels of this folder run by cuda_cpu.h. Any image is accepted as a module; kernels are found by their names.
//
// It is strict where a device is: copies outside an allocation, freed memory, more shared memory or threads than were asked for
// are errors. Fresh memory is 0xff. STRAIT_EMULATED_SEED shuffles the order of threads. Copies from pinned memory are made as late as
// they may be: when their stream is waited for, or has more to do.
//
// Device 0 is like an H200, but for 16 GiB of memory; device 1 like a small card of compute capability 8.6; device 2 is of an architecture
// that the image has no code of, so that the driver compiles its PTX.
#define STRAIT_EMULATED 1
#include "../strait.cu"
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

typedef int CUresult;
typedef uint64_t CUdeviceptr;

namespace {

struct Kind {
    const char* name;
    int capability[2];
    int shared;                     // bytes of a block, asked for
    int ptx;                        // what its kernels were compiled for
    size_t bytes;
};
constexpr int DEVICES = 3;
const Kind KINDS[DEVICES] = {
    {"emulated on the CPU", {9, 0}, 232448, 90, size_t(16) << 30},
    {"emulated on the CPU, small", {8, 6}, 101376, 80, size_t(1) << 30},
    {"emulated on the CPU, later", {11, 0}, 232448, 80, size_t(1) << 30},
};
// A context is the place of its device, and one.
thread_local size_t context = 0;
size_t device_of(size_t context) { return context ? context - 1 : 0; }

struct Kernel {
    const Kind* kind = KINDS;
    std::string name;
    std::function<void(void**, dim3, dim3, unsigned)> run;
    size_t bytes = 0;               // of its parameters
    unsigned shared = 48 * 1024;
};

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

// Every kernel of ours takes one struct.
template <class A> bool add(const char* name, void (*kernel)(A)) {
    kernels()[name].name = name;
    kernels()[name].bytes = sizeof(A);
    kernels()[name].run = [kernel](void** p, dim3 grid, dim3 block, unsigned shared) {
        const A args = *reinterpret_cast<A*>(p[0]);
        static const char* seed = getenv("STRAIT_EMULATED_SEED");
        emu::launch(grid, block, shared, [&] { kernel(args); }, seed ? strtoull(seed, nullptr, 10) : 0);
    };
    return true;
}
#define ADD(name) const bool added_##name = add(#name, name);
STRAIT_KERNELS(ADD)

std::mutex lock;
std::map<CUdeviceptr, size_t> live;
// Bytes taken, by device; and the device of what is live.
size_t taken[DEVICES];
std::map<CUdeviceptr, size_t> owner;
bool inside(CUdeviceptr p, size_t n) {
    std::lock_guard<std::mutex> hold(lock);
    auto it = live.upper_bound(p);
    if (it == live.begin()) return n == 0;
    --it;
    return p + n <= it->first + it->second;
}

// Work is done when it is asked for, unless it is being recorded.
struct Stream {
    std::vector<std::function<CUresult()>>* recording = nullptr;
    // Launches until the device is lost to this stream; never where negative.
    int left = -1;
    bool lost = false;
    // What was recorded is worth nothing: the stream was waited for meanwhile.
    bool spoilt_recording = false;
    // Kernels whose names begin so are launched, and do nothing.
    std::string spoilt;
    // Copies from pinned memory that are under way.
    struct Copy { CUdeviceptr to; const void* from; size_t n; };
    std::vector<Copy> copies;
};
struct Graph {
    std::vector<std::function<CUresult()>> nodes;
};
Stream legacy;
Stream& stream_of(void* s) { return s ? *(Stream*)s : legacy; }
std::map<const void*, size_t> pinned;
bool is_pinned(const void* p) {
    std::lock_guard<std::mutex> hold(lock);
    auto it = pinned.upper_bound(p);
    return it != pinned.begin() && (--it, (const char*)p < (const char*)it->first + it->second);
}
// For tests: copies from pinned memory do not end.
std::atomic<bool> held{false};
CUresult land(Stream& stream) {
    while (!stream.copies.empty() && held) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::vector<Stream::Copy> copies;
    copies.swap(stream.copies);
    for (const Stream::Copy& copy : copies) {
        if (!inside(copy.to, copy.n) || !is_pinned(copy.from)) return 700;
        memcpy((void*)copy.to, copy.from, copy.n);
    }
    return 0;
}
CUresult submit(void* s, std::function<CUresult()> work) {
    Stream& stream = stream_of(s);
    if (!stream.recording) {
        const CUresult landed = land(stream);
        return landed ? landed : work();
    }
    stream.recording->push_back(std::move(work));
    return 0;
}

struct Event {
    double at;
    Stream* on;
};
double now() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// What was freed last is handed out first, as drivers do: an address says little about what lies there.
std::vector<std::pair<CUdeviceptr, size_t>> freed[DEVICES];
CUresult allocate(CUdeviceptr* p, size_t n) {
    const size_t on = device_of(context);
    std::lock_guard<std::mutex> hold(lock);
    if (taken[on] + n > KINDS[on].bytes) return 2;
    void* q = nullptr;
    for (size_t i = freed[on].size(); i--;)
        if (freed[on][i].second >= n && freed[on][i].second <= 2 * n) {
            q = (void*)freed[on][i].first;
            freed[on].erase(freed[on].begin() + i);
            break;
        }
    if (!q && posix_memalign(&q, 256, n ? n : 1)) return 2;
    memset(q, 0xff, n);
    *p = (CUdeviceptr)q;
    live[*p] = n;
    owner[*p] = on;
    taken[on] += n;
    return 0;
}
CUresult release(CUdeviceptr p) {
    if (!p) return 0;
    std::lock_guard<std::mutex> hold(lock);
    auto it = live.find(p);
    if (it == live.end()) return 1;
    const size_t n = it->second, on = owner[p];
    memset((void*)p, 0xff, n);
    live.erase(it);
    owner.erase(p);
    taken[on] -= n;
    if (n > size_t(4) << 20) {
        free((void*)p);
        return 0;
    }
    freed[on].push_back({p, n});
    if (freed[on].size() > 64) {
        free((void*)freed[on][0].first);
        freed[on].erase(freed[on].begin());
    }
    return 0;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) CUresult
API cuInit(unsigned) { return 0; }
API cuDriverGetVersion(int* v) { *v = 13000; return 0; }
API cuDeviceGet(int* d, int ordinal) { if (ordinal < 0 || ordinal >= DEVICES) return 101; *d = ordinal; return 0; }
API cuDeviceGetCount(int* n) { *n = DEVICES; return 0; }
API cuDeviceGetName(char* s, int n, int d) { snprintf(s, n, "%s", KINDS[d].name); return 0; }
API cuDeviceGetUuid_v2(void* p, int d) { memset(p, d, 16); return 0; }
API cuDeviceTotalMem_v2(size_t* n, int d) { *n = KINDS[d].bytes; return 0; }
API cuMemGetInfo_v2(size_t* free, size_t* total) {
    const size_t on = device_of(context);
    std::lock_guard<std::mutex> hold(lock);
    *total = KINDS[on].bytes;
    *free = *total - taken[on];
    return 0;
}
API cuDeviceGetAttribute(int* v, int a, int d) {
    switch (a) {
        case 1: *v = 1024; break;       // threads of a block
        case 10: *v = 32; break;        // of a warp
        case 16: *v = 4; break;         // multiprocessors
        case 38: *v = 1 << 20; break;   // bytes of L2
        case 75: *v = KINDS[d].capability[0]; break;
        case 76: *v = KINDS[d].capability[1]; break;
        case 97: *v = KINDS[d].shared; break;
        case 115: *v = 1; break;
        default: *v = 0;
    }
    return 0;
}
API cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)size_t(d + 1); return 0; }
API cuDevicePrimaryCtxRelease_v2(int) { return 0; }
API cuCtxSetCurrent(void* c) { context = (size_t)c; return 0; }
API cuCtxGetCurrent(void** c) { *c = (void*)context; return 0; }
API cuCtxSynchronize() { return 0; }
API cuStreamCreate(void** s, unsigned) { *s = new Stream; return 0; }
API cuStreamCreateWithPriority(void** s, unsigned, int) { *s = new Stream; return 0; }
API cuStreamDestroy_v2(void* s) { delete (Stream*)s; return 0; }
API cuStreamSynchronize(void* s) {
    Stream& stream = stream_of(s);
    if (stream.recording) stream.spoilt_recording = true;
    return stream.recording ? 900 : stream.lost ? 719 : land(stream);
}
API cuStreamWaitEvent(void*, void*, unsigned) { return 0; }
API cuStreamIsCapturing(void* s, int* v) { *v = stream_of(s).recording != nullptr; return 0; }
API cuStreamBeginCapture_v2(void* s, int) {
    Stream& stream = stream_of(s);
    if (stream.recording) return 1;
    stream.recording = &(new Graph)->nodes;
    return 0;
}
API cuStreamEndCapture(void* s, void** graph) {
    Stream& stream = stream_of(s);
    if (!stream.recording) return 1;
    *graph = stream.recording;          // the first member of its Graph
    stream.recording = nullptr;
    if (!stream.spoilt_recording) return 0;
    stream.spoilt_recording = false;
    delete (Graph*)*graph;
    *graph = nullptr;
    return 901;
}
API cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) { *exec = new Graph(*(Graph*)graph); return 0; }
API cuGraphLaunch(void* exec, void* s) {
    if (stream_of(s).recording) return 900;
    if (CUresult r = land(stream_of(s))) return r;
    for (auto& node : ((Graph*)exec)->nodes)
        if (CUresult r = node()) return r;
    return 0;
}
API cuGraphDestroy(void* graph) { delete (Graph*)graph; return 0; }
API cuGraphExecDestroy(void* exec) { delete (Graph*)exec; return 0; }
API cuEventCreate(void** e, unsigned) { *e = new Event{0, nullptr}; return 0; }
API cuEventDestroy_v2(void* e) { delete (Event*)e; return 0; }
API cuEventRecord(void* e, void* s) { *(Event*)e = {now(), &stream_of(s)}; return 0; }
API cuEventSynchronize(void* e) { return ((Event*)e)->on ? land(*((Event*)e)->on) : 0; }
API cuEventQuery(void*) { return 0; }
API cuEventElapsedTime(float* ms, void* a, void* b) { *ms = (float)(((Event*)b)->at - ((Event*)a)->at); return 0; }
API cuMemAlloc_v2(CUdeviceptr* p, size_t n) { return allocate(p, n); }
API cuMemAllocAsync(CUdeviceptr* p, size_t n, void*) { return allocate(p, n); }
API cuMemFree_v2(CUdeviceptr p) { return release(p); }
API cuMemFreeAsync(CUdeviceptr p, void*) { return release(p); }
API cuMemHostAlloc(void** p, size_t n, unsigned) {
    if (posix_memalign(p, 256, n ? n : 1)) return 2;
    std::lock_guard<std::mutex> hold(lock);
    pinned[*p] = n;
    return 0;
}
API cuMemAllocHost_v2(void** p, size_t n) { return cuMemHostAlloc(p, n, 0); }
API cuMemFreeHost(void* p) {
    {
        std::lock_guard<std::mutex> hold(lock);
        if (!pinned.erase(p)) return 1;
    }
    free(p);
    return 0;
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void* s, size_t n, void* stream) {
    if (!inside(d, n)) return 1;
    if (is_pinned(s) && !stream_of(stream).recording) {
        stream_of(stream).copies.push_back({d, s, n});
        return 0;
    }
    return submit(stream, [=] { memcpy((void*)d, s, n); return 0; });
}
API cuMemcpyDtoHAsync_v2(void* d, CUdeviceptr s, size_t n, void* stream) {
    if (!inside(s, n)) return 1;
    return submit(stream, [=] { memcpy(d, (void*)s, n); return 0; });
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr s, size_t n, void* stream) {
    if (!inside(d, n) || !inside(s, n)) return 1;
    return submit(stream, [=] { memmove((void*)d, (void*)s, n); return 0; });
}
API cuMemcpyHtoD_v2(CUdeviceptr d, const void* s, size_t n) { return cuMemcpyHtoDAsync_v2(d, s, n, nullptr); }
API cuMemcpyDtoH_v2(void* d, CUdeviceptr s, size_t n) { return cuMemcpyDtoHAsync_v2(d, s, n, nullptr); }
API cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, void* stream) {
    if (!inside(d, n)) return 1;
    return submit(stream, [=] { memset((void*)d, v, n); return 0; });
}
// What a module's functions may take is its own: others of this process ask for other sizes.
typedef std::map<std::string, Kernel> Module;
API cuModuleLoadData(void** m, const void*) {
    Module* all = new Module(kernels());
    for (auto& one : *all) one.second.kind = &KINDS[device_of(context)];
    *m = all;
    return 0;
}
API cuModuleUnload(void* m) { delete (Module*)m; return 0; }
API cuModuleGetFunction(void** f, void* m, const char* name) {
    auto it = ((Module*)m)->find(name);
    if (it == ((Module*)m)->end()) return 500;
    *f = &it->second;
    return 0;
}
API cuFuncSetAttribute(void* f, int attribute, int v) {
    if (attribute == 8) {
        if (v > ((Kernel*)f)->kind->shared) return 1;
        ((Kernel*)f)->shared = v;
    }
    return 0;
}
API cuFuncGetAttribute(int* v, int attribute, void* f) { *v = attribute == 5 ? ((Kernel*)f)->kind->ptx : 0; return 0; }
API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** args, void**) {
    Kernel* kernel = (Kernel*)f;
    Stream& on = stream_of(stream);
    if (on.left == 0) on.lost = true;
    if (on.left > 0) on.left--;
    if (on.lost) return 719;
    if (shared > kernel->shared || bx * by * bz > 1024 || !gx || !gy || !gz || gy > 65535 || gz > 65535) return 1;
    if (!on.spoilt.empty() && kernel->name.compare(0, on.spoilt.size(), on.spoilt) == 0) return 0;
    if (!stream_of(stream).recording) {
        if (CUresult r = land(on)) return r;
        kernel->run(args, dim3(gx, gy, gz), dim3(bx, by, bz), shared);
        return 0;
    }
    // Parameters are copied when a launch is recorded.
    auto copy = std::make_shared<std::vector<unsigned char>>(kernel->bytes);
    memcpy(copy->data(), args[0], kernel->bytes);
    return submit(stream, [=] {
        void* one[1] = {copy->data()};
        kernel->run(one, dim3(gx, gy, gz), dim3(bx, by, bz), shared);
        return 0;
    });
}
// For tests: the device is lost to a stream after so many launches, as after a kernel that went wrong.
extern "C" __attribute__((visibility("default"))) void strait_emulated_lose(void* stream, int launches) { stream_of(stream).left = launches; }
// For tests: copies from pinned memory do not end as long as this is set.
extern "C" __attribute__((visibility("default"))) void strait_emulated_hold(bool hold) { held = hold; }
// For tests: kernels of these names compute nothing on a stream.
extern "C" __attribute__((visibility("default"))) void strait_emulated_spoil(void* stream, const char* names) { stream_of(stream).spoilt = names; }
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    void* attributes;
    unsigned n;
};
API cuLaunchKernelEx(const LaunchConfig* c, void* f, void** args, void** extra) {
    // What begins before the launch ahead has ended must wait for it: code for older architectures does not.
    if (c->n && ((Kernel*)f)->kind->ptx < 90) return 1;
    return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, c->stream, args, extra);
}
API cuGetErrorName(int, const char** s) { *s = "CUDA_ERROR_EMULATED"; return 0; }
API cuGetErrorString(int code, const char** s) {
    static thread_local char text[64];
    snprintf(text, sizeof text, "error %d of the emulated driver", code);
    *s = text;
    return 0;
}
