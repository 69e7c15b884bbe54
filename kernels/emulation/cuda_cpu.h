// Runs a CUDA C++ kernel as plain C++ (x86-64 and others, g++ and clang): one block at a time on an operating system's thread,
// every CUDA thread a fiber, so that barriers, shuffles and the collective products of a warp meet the kernel's real control flow.
//
// Hostile on purpose: shared memory begins as 0xff (NaN in every float type), and is so again where an asynchronous copy is asked for,
// which lands when it is waited for, no earlier; a seed picks the order of threads at every switch; a barrier that not all reach, or a shuffle that names a
// thread that left, ends the program with who waits where.
#pragma once
#include <cstdint>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <vector>
#include <functional>
#include <algorithm>
#include <memory>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#define CUDA_CPU_EMU 1
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __constant__ static
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
// static shared arrays: one copy per OS thread == one per running block; poisoned by no one,
// so kernels should use SHARED, which is poisoned with NaN bytes at every block start.
#define __shared__ static thread_local
#define SHARED(T, name) T* name = reinterpret_cast<T*>(emu::blk->smem)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; dim3(unsigned a=1, unsigned b=1, unsigned c=1):x(a),y(b),z(c){} };
struct alignas(8)  uint2  { unsigned x, y; };
struct alignas(16) uint4  { unsigned x, y, z, w; };
struct alignas(8)  float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float4 make_float4(float a, float b, float c, float d){ return {a,b,c,d}; }
static inline float2 make_float2(float a, float b){ return {a,b}; }
static inline uint2 make_uint2(unsigned a, unsigned b){ return {a,b}; }
static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d){ return {a,b,c,d}; }

namespace emu {
#if defined(__x86_64__)
// callee-saved switch: ~2 ns instead of swapcontext's two sigprocmask system calls
extern "C" void emu_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.p2align 4
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#endif
struct Fiber {
#if defined(__x86_64__)
  void* sp;
#else
  ucontext_t ctx;
#endif
  uint3 tid; unsigned lane, warp, lin;
  struct Cp{ void* d; const void* s; unsigned n, grp; }; std::vector<Cp> cp; unsigned cpg=0, votes=0;   // cp.async in flight
  struct Wg{ const void* d; std::function<void()> run; unsigned grp; }; std::vector<Wg> wg; unsigned wgg=0;   // products of warpgroups in flight
  uintptr_t landed_lo=~uintptr_t(0), landed_hi=0; bool fenced=false, handed=false;   // what this thread's copies brought since it last handed shared memory over; whether registers are, and shared memory since the last barrier
  bool waited=false;                                                                                // for the launches ahead
};
struct Warp {
  uint32_t ready=0, live=0, arrived=0; unsigned gen=0;   // bit sets over lanes
  alignas(16) uint32_t slot[2][32][16];                  // double-buffered deposit slots
  const char* op=nullptr;
};
struct Block {
  dim3 grid, bdim; uint3 bid; unsigned nthr=0, nwarp=0, done=0, barred=0;
  int vote[3]={0,0,0}; unsigned cur=0; uint8_t* smem=nullptr; size_t smem_bytes=0;
  std::vector<Fiber> f; std::vector<Warp> w; std::vector<uint32_t> atbar;
  unsigned handed=0; std::vector<uint8_t> seen;         // threads that handed shared memory over since the last barrier; what matrix units see of it
  uint8_t* stacks=nullptr; const std::function<void()>* body=nullptr;
  std::unique_ptr<uint8_t[]> own_smem, own_stacks; unsigned lent=0;
  // Whether its threads stop where they wait for the launches ahead, and which have; whether any let the next launch begin before it waited.
  bool holds=false; unsigned stopped=0; std::vector<uint32_t> atgrid; bool went_first=false;
  uint64_t rng=0; bool shuffle=false; uint64_t nswitch=0;
#if defined(__x86_64__)
  void* main_sp=nullptr;
#else
  ucontext_t main_ctx;
#endif
};
inline thread_local Block* blk=nullptr;
static inline Fiber& self(){ return blk->f[blk->cur]; }
constexpr size_t STACK=64*1024;

static inline int pick(){            // next READY fiber; this warp first, or random order
  Block& b=*blk; unsigned w0=b.f[b.cur].warp;
  if(b.shuffle){ b.rng=b.rng*6364136223846793005ull+1442695040888963407ull; w0=(b.rng>>33)%b.nwarp; }
  for(unsigned i=0;i<b.nwarp;i++){ unsigned w=(w0+i)%b.nwarp; uint32_t m=b.w[w].ready;
    if(!m) continue;
    unsigned lane;
    if(b.shuffle){ unsigned k=(b.rng>>40)&31; uint32_t hi=m>>k<<k; lane=__builtin_ctz(hi?hi:m); }
    else { unsigned k=(b.f[b.cur].warp==w)?(b.f[b.cur].lane+1)&31:0; uint32_t hi=k?(m>>k<<k):m; lane=__builtin_ctz(hi?hi:m); }
    return int(w*32+lane); }
  return -1;
}
[[noreturn]] static inline void deadlock(){
  Block& b=*blk; fprintf(stderr,"cuda_cpu: DEADLOCK in block (%u,%u,%u): %u/%u threads done, %u at __syncthreads\n",
    b.bid.x,b.bid.y,b.bid.z,b.done,b.nthr,b.barred);
  for(unsigned w=0;w<b.nwarp;w++) if(b.w[w].arrived) fprintf(stderr,"  warp %u: lanes %08x wait in %s\n",w,b.w[w].arrived,b.w[w].op);
  abort();
}
// Back to who runs the block: all that can go on without the launches ahead has.
static inline void leave(){
  Block& b=*blk; if(!b.stopped) deadlock();
#if defined(__x86_64__)
  emu_switch(&b.f[b.cur].sp,b.main_sp);
#else
  swapcontext(&b.f[b.cur].ctx,&b.main_ctx);
#endif
}
static inline void switch_to(int nx){
  Block& b=*blk; if(nx<0) return leave(); if((unsigned)nx==b.cur) return;
  unsigned me=b.cur; b.cur=nx; b.nswitch++;
#if defined(__x86_64__)
  emu_switch(&b.f[me].sp,b.f[nx].sp);
#else
  swapcontext(&b.f[me].ctx,&b.f[nx].ctx);
#endif
}
static void fiber_main(){
  Block& b=*blk; (*b.body)();
  Fiber& f=self(); Warp& w=b.w[f.warp]; uint32_t bit=1u<<f.lane;
  w.ready&=~bit; w.live&=~bit; b.done++;
  // an exited thread counts as arrived at later block barriers (CUDA semantics since Volta)
  if(b.barred && b.barred+b.done==b.nthr){ b.barred=0; for(auto& x:b.atbar){ unsigned i=&x-&b.atbar[0]; b.w[i].ready|=x; x=0; } }
  if(b.done==b.nthr){
#if defined(__x86_64__)
    void* dummy; emu_switch(&dummy,b.main_sp);
#else
    setcontext(&b.main_ctx);
#endif
  }
  int nx=pick(); if(nx<0) leave(); unsigned me=b.cur; b.cur=nx;
#if defined(__x86_64__)
  emu_switch(&b.f[me].sp,b.f[nx].sp);
#else
  setcontext(&b.f[nx].ctx);
#endif
  __builtin_unreachable();
}
static inline void sync_block(){
  Block& b=*blk; Fiber& f=self(); uint32_t bit=1u<<f.lane;
  b.barred++;
  if(b.barred+b.done==b.nthr){ b.barred=0;
    // What all handed over is seen from here on, and what some did is not.
    if(b.handed){ if(b.handed+b.done==b.nthr) b.seen.assign(b.smem,b.smem+b.smem_bytes);
      b.handed=0; for(auto& x:b.f) x.handed=false; }
    for(unsigned i=0;i<b.nwarp;i++){ b.w[i].ready|=b.atbar[i]; b.atbar[i]=0; }
    if(b.shuffle) switch_to(pick());
    return; }
  b.w[f.warp].ready&=~bit; b.atbar[f.warp]|=bit; switch_to(pick());
}
// Three flags take turns: that of the vote before this one is cleared, which all have read and none sets before all have come to the next.
static inline int any_of_block(int p){
  Block& b=*blk; unsigned g=self().votes++%3; if(p) b.vote[g]=1;
  sync_block(); int r=b.vote[g]; b.vote[(g+2)%3]=0; return r; }
// one barrier per collective: deposits are double buffered by generation parity
static inline uint32_t (*deposit(uint32_t mask,const void* p,size_t n,const char* op))[16]{
  Block& b=*blk; Fiber& f=self(); Warp& w=b.w[f.warp]; uint32_t bit=1u<<f.lane;
  if(!(mask&bit)){ fprintf(stderr,"cuda_cpu: lane %u calls %s but is not in mask %08x\n",f.lane,op,mask); abort(); }
  if(mask&~w.live){ fprintf(stderr,"cuda_cpu: %s names exited lanes %08x\n",op,mask&~w.live); abort(); }
  if(w.arrived && w.op!=op && strcmp(w.op,op)){ fprintf(stderr,"cuda_cpu: warp %u diverged: %s vs %s\n",f.warp,w.op,op); abort(); }
  w.op=op; unsigned g=w.gen&1; memcpy(w.slot[g][f.lane],p,n); w.arrived|=bit;
  if(w.arrived==mask){ w.arrived=0; w.gen++; w.ready|=mask; }
  else { w.ready&=~bit; switch_to(pick()); }
  return w.slot[g];
}
// As for launches that may begin before the one ahead has ended; see Launch.
static inline void wait_for_launches(){
  Block& b=*blk; Fiber& f=self(); f.waited=true; if(!b.holds) return;
  uint32_t bit=1u<<f.lane; b.w[f.warp].ready&=~bit; b.atgrid[f.warp]|=bit; b.stopped++; switch_to(pick()); }
static inline void let_next_begin(){ if(!self().waited) blk->went_first=true; }

// A launch. Some of its blocks may be begun before what is ahead of it is done: they stop where they wait for that, and go on when all is finished.
class Launch {
  dim3 grid, bdim; size_t smem_bytes; std::function<void()> body; uint64_t seed; size_t blocks;
  std::vector<std::unique_ptr<Block>> begun; std::vector<size_t> which;
  std::unique_ptr<Block> make(){
    std::unique_ptr<Block> made(new Block); Block& b=*made; b.grid=grid; b.bdim=bdim; b.nthr=bdim.x*bdim.y*bdim.z; b.nwarp=(b.nthr+31)/32;
    b.own_smem.reset(new uint8_t[smem_bytes+1024]);
    b.smem=(uint8_t*)(((uintptr_t)b.own_smem.get()+1023)&~uintptr_t(1023)); b.smem_bytes=smem_bytes;
    b.f.resize(b.nthr); b.w.resize(b.nwarp); b.atbar.assign(b.nwarp,0); b.atgrid.assign(b.nwarp,0);
    b.body=&body; b.shuffle=seed!=0; return made; }
  // Stacks are kept from launch to launch, and never cleared: most of a launch would be that.
  struct Stacks { std::unique_ptr<uint8_t[]> of; unsigned n=0; };
  static std::vector<Stacks>& kept(){ static thread_local std::vector<Stacks> all; return all; }
  static void lend(Block& b){
    auto& all=kept(); for(size_t i=all.size();i--;) if(all[i].n>=b.nthr){ b.own_stacks=std::move(all[i].of); b.lent=all[i].n; all.erase(all.begin()+i); b.stacks=b.own_stacks.get(); return; }
    if(!all.empty()) all.pop_back();
    b.own_stacks.reset(new uint8_t[size_t(b.nthr)*STACK]); b.lent=b.nthr; b.stacks=b.own_stacks.get(); }
  static void give_back(Block& b){ kept().push_back({std::move(b.own_stacks),b.lent}); }
  void prepare(Block& b,size_t at){
    b.bid={unsigned(at%grid.x),unsigned(at/grid.x%grid.y),unsigned(at/grid.x/grid.y)};
    b.rng=seed+at*0x9e3779b97f4a7c15ull; b.handed=0; b.seen.clear(); b.done=b.barred=b.stopped=0; b.holds=b.went_first=false;
    b.vote[0]=b.vote[1]=b.vote[2]=0; b.cur=0; memset(b.smem,0xFF,smem_bytes);   // 0xFFFF = NaN in bf16/f16/f32
    for(unsigned i=0;i<b.nthr;i++){ Fiber& f=b.f[i]; f.lin=i; f.lane=i&31; f.warp=i>>5;
      f.cp.clear(); f.cpg=0; f.votes=0; f.wg.clear(); f.wgg=0; f.landed_lo=~uintptr_t(0); f.landed_hi=0; f.fenced=f.handed=f.waited=false; f.tid={i%bdim.x,(i/bdim.x)%bdim.y,i/(bdim.x*bdim.y)};
      uint8_t* top=b.stacks+size_t(i+1)*STACK; top=(uint8_t*)((uintptr_t)top&~uintptr_t(15));
#if defined(__x86_64__)
      void** sp=(void**)top; *--sp=nullptr; *--sp=(void*)&fiber_main; for(int k=0;k<6;k++) *--sp=nullptr; f.sp=sp;
#else
      getcontext(&f.ctx); f.ctx.uc_stack.ss_sp=b.stacks+size_t(i)*STACK; f.ctx.uc_stack.ss_size=STACK; f.ctx.uc_link=nullptr; makecontext(&f.ctx,fiber_main,0);
#endif
    }
    for(unsigned i=0;i<b.nwarp;i++){ Warp& w=b.w[i]; unsigned n=b.nthr-i*32; w.live=w.ready=n>=32?~0u:((1u<<n)-1); w.arrived=0; b.atbar[i]=b.atgrid[i]=0; } }
  // Until it is done, or stops.
  static void run(Block& b){
    Block* old=blk; blk=&b;
#if defined(__x86_64__)
    emu_switch(&b.main_sp,b.f[b.cur].sp);
#else
    swapcontext(&b.main_ctx,&b.f[b.cur].ctx);
#endif
    blk=old; }
  void ended(const Block& b){
    if(!must_wait) return;
    for(auto& f:b.f) if(!f.waited){ fprintf(stderr,"cuda_cpu: thread %u of block (%u,%u,%u) left and did not wait for the launches ahead: who waits for this one would not wait for those\n",f.lin,b.bid.x,b.bid.y,b.bid.z); abort(); } }
public:
  // Whether every thread must wait for the launches ahead, sooner or later.
  bool must_wait=false;
  // Whether it takes what is ahead of it for done, and does not wait.
  bool hasty=false;
  // Whether the next launch may begin as soon as this one does.
  bool goes_first=false;
  Launch(dim3 grid,dim3 bdim,size_t smem_bytes,std::function<void()> body,uint64_t seed):grid(grid),bdim(bdim),smem_bytes(smem_bytes),body(std::move(body)),seed(seed),blocks(size_t(grid.x)*grid.y*grid.z){}
  Launch(const Launch&)=delete;
  // The first block, the last and one between, as far as they come without the launches ahead.
  void begin(){
    goes_first=true;
    for(size_t at:{size_t(0),blocks/2,blocks-1}){
      if(!which.empty()&&at<=which.back()) continue;
      auto b=make(); lend(*b); prepare(*b,at); b->holds=!hasty; run(*b);
      goes_first&=b->went_first; begun.push_back(std::move(b)); which.push_back(at); } }
  // All of it.
  void finish(){
    for(auto& b:begun){
      b->holds=false; const bool all=b->done==b->nthr;
      for(unsigned i=0;i<b->nwarp;i++){ b->w[i].ready|=b->atgrid[i]; b->atgrid[i]=0; }
      b->stopped=0;
      if(!all){ Block* old=blk; blk=b.get(); b->cur=unsigned(pick()); blk=old; run(*b); }
      ended(*b); give_back(*b); }
    begun.clear();
    std::unique_ptr<Block> b;
    for(size_t at=0,next=0;at<blocks;at++){
      if(next<which.size()&&which[next]==at){ next++; continue; }
      if(!b){ b=make(); lend(*b); }
      prepare(*b,at); run(*b); ended(*b); }
    if(b){ if(getenv("EMU_STAT")) fprintf(stderr,"emu: %llu switches\n",(unsigned long long)b->nswitch); give_back(*b); }
    which.clear(); }
};
template<class K> void launch(dim3 grid, dim3 bdim, size_t smem_bytes, K&& body, uint64_t seed=0){ Launch(grid,bdim,smem_bytes,body,seed).finish(); }
} // namespace emu
// cp.async lands only when waited for (the latest moment the hardware allows), and what lay there is gone when it is asked for (the
// soonest): a missing wait reads poison, and so does who is not through with what lay there
static inline void emu_cp_async(void* d,const void* s,unsigned n){ emu::Fiber& f=emu::self(); if((uintptr_t)d%n||(uintptr_t)s%n){ fprintf(stderr,"cuda_cpu: a copy of %u bytes that are not aligned\n",n); abort(); } memset(d,0xff,n); f.cp.push_back({d,s,n,f.cpg}); }
static inline void emu_cp_commit(){ emu::self().cpg++; }
static inline void emu_cp_wait(unsigned left){ emu::Fiber& f=emu::self(); size_t k=0; for(auto& c:f.cp){ if(c.grp+left<f.cpg){ f.landed_lo=std::min(f.landed_lo,(uintptr_t)c.d); f.landed_hi=std::max(f.landed_hi,(uintptr_t)c.d+c.n); if(c.s) memcpy(c.d,c.s,c.n); else memset(c.d,0,c.n); } else f.cp[k++]=c; } f.cp.resize(k); }
static inline void emu_bad(const char* why){ fprintf(stderr,"cuda_cpu: thread %u: %s\n",emu::self().lin,why); abort(); }
// products of a warpgroup land when they are waited for, in order; what they read of shared memory must have been handed over, by every thread that copied it
// there, and by all threads ahead of a barrier since it was written; and registers since the last wait
static inline void emu_wg_handed_over(const void* from,size_t n){
  emu::Fiber& me=emu::self(); if(!me.fenced) emu_bad("a product whose registers were not handed over");
  if(me.lane) return;
  for(auto& f:emu::blk->f) if((uintptr_t)from<f.landed_hi&&f.landed_lo<(uintptr_t)from+n) emu_bad("a product reads what was copied and not handed over");
  auto& b=*emu::blk; if(b.seen.empty()||memcmp(from,b.seen.data()+((const uint8_t*)from-b.smem),n)) emu_bad("a product reads what was written and not handed over"); }
static inline bool emu_wg_first(const void* d){ for(auto& w:emu::self().wg) if(w.d==d) return false; return true; }
static inline void emu_wg_push(const void* d,std::function<void()> run){ emu::Fiber& f=emu::self(); f.wg.push_back({d,std::move(run),f.wgg}); }
static inline void emu_wg_wait(unsigned left){ emu::Fiber& f=emu::self(); f.fenced=false; size_t k=0; for(auto& w:f.wg){ if(w.grp+left<f.wgg) w.run(); else f.wg[k++]=std::move(w); } f.wg.resize(k); }
#define threadIdx (emu::self().tid)
#define blockIdx  (emu::blk->bid)
#define blockDim  (emu::blk->bdim)
#define gridDim   (emu::blk->grid)
static inline void __syncthreads(){ emu::sync_block(); }
static inline void __syncwarp(uint32_t m=~0u){ uint32_t z=0; emu::deposit(m,&z,4,"__syncwarp"); }
static inline void __threadfence(){}
template<class T> static inline T emu_shfl(uint32_t m,T v,unsigned src,const char* op){
  static_assert(sizeof(T)<=64); auto s=emu::deposit(m,&v,sizeof(T),op); T r; memcpy(&r,s[src&31],sizeof(T)); return r; }
template<class T> static inline T __shfl_sync(uint32_t m,T v,int src,int w=32){ unsigned l=emu::self().lane; return emu_shfl(m,v,(l&~(w-1))|(src&(w-1)),"shfl"); }
template<class T> static inline T __shfl_xor_sync(uint32_t m,T v,int x,int w=32){ unsigned l=emu::self().lane; unsigned s=l^x; if((s&~(w-1))!=(l&~(w-1))) s=l; return emu_shfl(m,v,s,"shfl_xor"); }
template<class T> static inline T __shfl_down_sync(uint32_t m,T v,unsigned d,int w=32){ unsigned l=emu::self().lane; unsigned s=l+d; if((s&~(w-1))!=(l&~(w-1))) s=l; return emu_shfl(m,v,s,"shfl_down"); }
static inline uint32_t __ballot_sync(uint32_t m,int p){ uint32_t v=p!=0; auto s=emu::deposit(m,&v,4,"ballot"); uint32_t r=0; for(int i=0;i<32;i++) if(m>>i&1) r|=(s[i][0]&1)<<i; return r; }
static inline int __any_sync(uint32_t m,int p){ return __ballot_sync(m,p)!=0; }
template<class T> static inline T atomicAdd(T* p,T v){ return __atomic_fetch_add(p,v,__ATOMIC_RELAXED); }
static inline float atomicAdd(float* p,float v){ float o=*p; *p=o+v; return o; }
static inline float emu_expf(float x){ return expf(x); }
#define __expf emu_expf
static inline float exp2f_approx(float x){ return exp2f(x); }
static inline float __fdividef(float a,float b){ return a/b; }
using std::min; using std::max;
