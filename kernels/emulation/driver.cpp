// A CUDA driver library whose devices are this CPU: what the host's code allocates, copies, loads and launches, with the very
// kernels of this folder run by cuda_cpu.h. Any image is accepted as a module; kernels are found by their names.
//
// It is strict where a device is: copies outside an allocation, freed memory, more shared memory or threads than were asked for
// are errors, and kernels that touch what lies beyond an allocation end the program (Fence). Fresh memory is 0xff.
// STRAIT_EMULATED_SEED shuffles the order of threads. Copies from the host's memory are made as late as they may be: when their
// stream is waited for, or has more to do. (Most drivers have read what is not pinned when they return; none promises it.)
// Launches overlap where they ask for it, as far as they may (Overlap).
//
// Device 0 is like an H200, but for 16 GiB of memory; device 1 like a small card of compute capability 8.6; device 2 is of an architecture
// that the image has no code of, so that the driver compiles its PTX.
#define STRAIT_EMULATED 1
#include "../strait.cu"
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>
#include <sys/mman.h>

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
    // A launch of it, with a copy of its parameters.
    std::function<std::unique_ptr<emu::Launch>(const void*, dim3, dim3, unsigned)> launch;
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
    kernels()[name].launch = [kernel](const void* p, dim3 grid, dim3 block, unsigned shared) {
        const A args = *reinterpret_cast<const A*>(p);
        static const char* seed = getenv("STRAIT_EMULATED_SEED");
        return std::unique_ptr<emu::Launch>(new emu::Launch(grid, block, shared, [=] { kernel(args); }, seed ? strtoull(seed, nullptr, 10) : 0));
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

// A thread that does one thing after another for who waits for it: what stands still on a stack goes on only on the thread it stopped on.
class Worker {
    std::mutex one, at;
    std::condition_variable changed;
    const std::function<void()>* job = nullptr;
    bool ends = false;
    std::thread thread{[this] {
        std::unique_lock<std::mutex> hold(at);
        while (changed.wait(hold, [this] { return job || ends; }), !ends) {
            (*job)();
            job = nullptr;
            changed.notify_all();
        }
    }};

public:
    void call(const std::function<void()>& what) {
        std::lock_guard<std::mutex> alone(one);
        std::unique_lock<std::mutex> hold(at);
        job = &what;
        changed.notify_all();
        changed.wait(hold, [this] { return !job; });
    }
    ~Worker() {
        {
            std::lock_guard<std::mutex> hold(at);
            ends = true;
        }
        changed.notify_all();
        thread.join();
    }
};

// Launches that may begin before the ones ahead have ended do, as early and as far as they may: some blocks, to where they wait. What is ahead
// is done as late as that allows.
struct Overlap {
    std::vector<std::unique_ptr<emu::Launch>> pending;
    std::unique_ptr<Worker> worker;

    void finish() {
        pending.front()->finish();
        pending.erase(pending.begin());
    }
    void add(std::unique_ptr<emu::Launch> launch, bool overlaps) {
        if (!worker) worker.reset(new Worker);
        worker->call([&] {
            // One begins when all blocks of the one ahead let it: of one that waits first, when all before that is done.
            while (std::any_of(pending.begin() + !pending.empty(), pending.end(), [&](auto& one) { return !one->goes_first; }) || (!overlaps && !pending.empty())) finish();
            pending.push_back(std::move(launch));
            if (overlaps) pending.back()->begin();
            else finish();
        });
    }
    void drain() {
        if (!worker) return;
        worker->call([&] {
            while (!pending.empty()) finish();
        });
    }
};

// Work is done when it is asked for, unless it is being recorded; launches when what follows them asks for it.
struct Stream {
    const size_t of = context;
    Overlap launches;
    std::vector<std::function<CUresult()>>* recording = nullptr;
    // Launches until the device is lost to this stream; never where negative.
    int left = -1;
    bool lost = false;
    // What was recorded is worth nothing: the stream was waited for meanwhile.
    std::atomic<bool> spoilt_recording{false};
    // The launch ahead is the library's: nobody knows when it lets the next begin, and what it has waited for by then.
    bool behind_library = false;
    // Kernels whose names begin so are launched, and do nothing; or wait for nothing.
    std::string spoilt, hasty;
    // Copies from the host that are under way.
    struct Copy { CUdeviceptr to; const void* from; size_t n; bool pinned; };
    std::vector<Copy> copies;
    std::mutex copying;
};
struct Graph {
    std::vector<std::function<CUresult()>> nodes;
    // Of launches.
    std::set<const Kernel*> kernels;
};
// Those that are there, as recorded and to be launched.
std::set<Graph*> graphs;
Stream legacy;
// Those that record.
std::set<Stream*> recorded_to;
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
    stream.launches.drain();
    auto waits = [&] { std::lock_guard<std::mutex> hold(stream.copying); return held && std::any_of(stream.copies.begin(), stream.copies.end(), [](const Stream::Copy& copy) { return copy.pinned; }); };
    while (waits()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::lock_guard<std::mutex> hold(stream.copying);
    std::vector<Stream::Copy> copies;
    copies.swap(stream.copies);
    for (const Stream::Copy& copy : copies) {
        if (!inside(copy.to, copy.n) || (copy.pinned && !is_pinned(copy.from))) return 700;
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

// What lies between pages that nobody may touch, to 16 bytes of its end.
struct Fence {
    char* at;
    size_t pages;                   // bytes of whole pages between the two
    static constexpr size_t PAGE_BYTES = 4096;
    explicit Fence(size_t n) : pages((n + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES) {
        at = (char*)mmap(nullptr, pages + 2 * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) at = nullptr;
        else if (mprotect(at + PAGE_BYTES, pages, PROT_READ | PROT_WRITE)) gone(), at = nullptr;
    }
    char* place(size_t n) const { return at + PAGE_BYTES + pages - (n + 15) / 16 * 16; }
    void gone() { munmap(at, pages + 2 * PAGE_BYTES); }
};
std::map<CUdeviceptr, Fence> fences;
// What was freed last is handed out first, as drivers do: an address says little about what lies there.
std::vector<Fence> freed[DEVICES];
CUresult allocate(CUdeviceptr* p, size_t n) {
    const size_t on = device_of(context);
    std::lock_guard<std::mutex> hold(lock);
    if (taken[on] + n > KINDS[on].bytes) return 2;
    const size_t pages = (std::max(n, size_t(1)) + Fence::PAGE_BYTES - 1) / Fence::PAGE_BYTES * Fence::PAGE_BYTES;
    auto found = std::find_if(freed[on].rbegin(), freed[on].rend(), [&](const Fence& f) { return f.pages == pages; });
    Fence fence = found != freed[on].rend() ? *found : Fence(pages);
    if (!fence.at) return 2;
    if (found != freed[on].rend()) freed[on].erase(std::next(found).base());
    char* q = fence.place(n);
    memset(q, 0xff, n);
    *p = (CUdeviceptr)q;
    fences.insert({*p, fence});
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
    Fence fence = fences.at(p);
    memset((void*)p, 0xff, n);
    live.erase(it);
    owner.erase(p);
    fences.erase(p);
    taken[on] -= n;
    if (n > size_t(4) << 20) {
        fence.gone();
        return 0;
    }
    freed[on].push_back(fence);
    if (freed[on].size() > 64) {
        freed[on][0].gone();
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
// Not while a stream of it records, whoever does, and whoever asks: that is spoilt then.
API cuCtxSynchronize() {
    std::lock_guard<std::mutex> hold(lock);
    bool any = false;
    for (Stream* stream : recorded_to)
        if (stream->of == context) any = stream->spoilt_recording = true;
    return any ? 900 : 0;
}
API cuStreamCreate(void** s, unsigned) { *s = new Stream; return 0; }
API cuStreamCreateWithPriority(void** s, unsigned, int) { *s = new Stream; return 0; }
API cuStreamDestroy_v2(void* s) { stream_of(s).launches.drain(); delete (Stream*)s; return 0; }
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
    Graph* graph = new Graph;
    stream.recording = &graph->nodes;
    std::lock_guard<std::mutex> hold(lock);
    graphs.insert(graph);
    recorded_to.insert(&stream);
    return 0;
}
API cuStreamEndCapture(void* s, void** graph) {
    Stream& stream = stream_of(s);
    if (!stream.recording) return 1;
    *graph = stream.recording;          // the first member of its Graph
    stream.recording = nullptr;
    std::lock_guard<std::mutex> hold(lock);
    recorded_to.erase(&stream);
    if (!stream.spoilt_recording) return 0;
    stream.spoilt_recording = false;
    graphs.erase((Graph*)*graph);
    delete (Graph*)*graph;
    *graph = nullptr;
    return 901;
}
API cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
    std::lock_guard<std::mutex> hold(lock);
    *exec = *graphs.insert(new Graph(*(Graph*)graph)).first;
    return 0;
}
API cuGraphLaunch(void* exec, void* s) {
    if (stream_of(s).recording) return 900;
    if (CUresult r = land(stream_of(s))) return r;
    stream_of(s).behind_library = false;
    for (auto& node : ((Graph*)exec)->nodes)
        if (CUresult r = node()) return r;
    // What follows waits for all of it.
    stream_of(s).behind_library = false;
    return land(stream_of(s));
}
API cuGraphDestroy(void* graph) {
    std::lock_guard<std::mutex> hold(lock);
    graphs.erase((Graph*)graph);
    delete (Graph*)graph;
    return 0;
}
API cuGraphExecDestroy(void* exec) { return cuGraphDestroy(exec); }
API cuEventCreate(void** e, unsigned) { *e = new Event{0, nullptr}; return 0; }
API cuEventDestroy_v2(void* e) { delete (Event*)e; return 0; }
API cuEventRecord(void* e, void* s) { stream_of(s).launches.drain(); *(Event*)e = {now(), &stream_of(s)}; return 0; }
API cuEventSynchronize(void* e) { return ((Event*)e)->on ? land(*((Event*)e)->on) : 0; }
API cuEventQuery(void*) { return 0; }
API cuEventElapsedTime_v2(float* ms, void* a, void* b) { *ms = (float)(((Event*)b)->at - ((Event*)a)->at); return 0; }
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
    if (!stream_of(stream).recording) {
        Stream& on = stream_of(stream);
        on.launches.drain();
        const bool is = is_pinned(s);
        std::lock_guard<std::mutex> hold(on.copying);
        on.copies.push_back({d, s, n, is});
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
API cuMemcpyHtoD_v2(CUdeviceptr d, const void* s, size_t n) {
    const CUresult asked = cuMemcpyHtoDAsync_v2(d, s, n, nullptr);
    return asked ? asked : land(legacy);
}
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
// Not while anything recorded names its functions: what a driver makes of that is its own affair.
API cuModuleUnload(void* m) {
    std::lock_guard<std::mutex> hold(lock);
    for (auto& one : *(Module*)m)
        for (Graph* graph : graphs)
            if (graph->kernels.count(&one.second)) {
                fprintf(stderr, "a module is unloaded, and %s of it is in a graph that is still there\n", one.first.c_str());
                abort();
            }
    delete (Module*)m;
    return 0;
}
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
CUresult launch(Kernel* kernel, dim3 grid, dim3 block, unsigned shared, void* stream, void** args, bool overlaps) {
    Stream& on = stream_of(stream);
    if (on.left == 0) on.lost = true;
    if (on.left > 0) on.left--;
    if (on.lost) return 719;
    if (shared > kernel->shared || block.x * block.y * block.z > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return 1;
    auto is = [&](const std::string& names) { return !names.empty() && kernel->name.compare(0, names.size(), names) == 0; };
    if (is(on.spoilt)) return 0;
    const bool hasty = is(on.hasty);
    auto go = [=, &on](const void* parameters) -> CUresult {
        const bool copies = (std::lock_guard<std::mutex>(on.copying), !on.copies.empty());
        if (copies)
            if (CUresult r = land(on)) return r;
        if (on.behind_library && overlaps) return 1;
        on.behind_library = false;
        auto one = kernel->launch(parameters, grid, block, shared);
        // What only reads may end when it likes.
        one->must_wait = overlaps && kernel->name != "probe_read";
        one->hasty = hasty;
        on.launches.add(std::move(one), overlaps);
        return 0;
    };
    if (!on.recording) return go(args[0]);
    // Parameters are copied when a launch is recorded.
    std::vector<unsigned char> copy((unsigned char*)args[0], (unsigned char*)args[0] + kernel->bytes);
    {
        std::lock_guard<std::mutex> hold(lock);
        ((Graph*)on.recording)->kernels.insert(kernel);
    }
    on.recording->push_back([=] { return go(copy.data()); });
    return 0;
}
API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** args, void**) {
    return launch((Kernel*)f, dim3(gx, gy, gz), dim3(bx, by, bz), shared, stream, args, false);
}
// For tests: the device is lost to a stream after so many launches, as after a kernel that went wrong.
extern "C" __attribute__((visibility("default"))) void strait_emulated_lose(void* stream, int launches) { stream_of(stream).left = launches; }
// For tests: copies from pinned memory do not end as long as this is set.
extern "C" __attribute__((visibility("default"))) void strait_emulated_hold(bool hold) { held = hold; }
// For tests: kernels of these names compute nothing on a stream.
extern "C" __attribute__((visibility("default"))) void strait_emulated_spoil(void* stream, const char* names) { stream_of(stream).spoilt = names; }
// For tests: kernels of these names do not wait for the launches ahead on a stream.
extern "C" __attribute__((visibility("default"))) void strait_emulated_hurry(void* stream, const char* names) { stream_of(stream).hasty = names; }
// For the emulated library of products: `work` on a copy of its arguments, in the order of a stream, as a launch that waits for all before it; the
// next may not ask to begin before it has ended.
API strait_emulated_do(void* s, CUresult (*work)(const void*), const void* args, size_t bytes) {
    Stream& on = stream_of(s);
    if (on.left == 0) on.lost = true;
    if (on.left > 0) on.left--;
    if (on.lost) return 719;
    std::vector<unsigned char> copy((const unsigned char*)args, (const unsigned char*)args + bytes);
    return submit(s, [=, &on] { on.launches.drain(); on.behind_library = true; return work(copy.data()); });
}
extern "C" __attribute__((visibility("default"))) bool strait_emulated_inside(CUdeviceptr p, size_t n) { return inside(p, n); }
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    void* attributes;
    unsigned n;
};
API cuLaunchKernelEx(const LaunchConfig* c, void* f, void** args, void**) {
    // What begins before the launch ahead has ended must wait for it: code for older architectures does not.
    if (c->n && ((Kernel*)f)->kind->ptx < 90) return 1;
    const auto size = [](const unsigned (&n)[3]) { return dim3(n[0], n[1], n[2]); };
    return launch((Kernel*)f, size(c->grid), size(c->block), c->shared, c->stream, args, c->n > 0);
}
API cuGetErrorName(int, const char** s) { *s = "CUDA_ERROR_EMULATED"; return 0; }
API cuGetErrorString(int code, const char** s) {
    static thread_local char text[64];
    snprintf(text, sizeof text, "error %d of the emulated driver", code);
    *s = text;
    return 0;
}
