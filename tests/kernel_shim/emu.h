// The machine that tile.cuh asks for, on a CPU: the kernels' own source runs here, one fiber a thread of a block, blocks one
// after the other in an order that the test chooses. Fibers change places at collectives only, so a run is the same every time.
//
// Loads through tile.cuh are checked against the memory that the test made known, and for alignment. What this cannot see: races
// between collectives, the rounding of tensor cores, speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define DEVICE inline
#define SHARED(name) u32 *name = emu::shared
#define FLAG(name) static u32 name

namespace emu {
struct Index { int x, y; };
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool fresh = true, done = false;
  std::unique_ptr<char[]> stack;
};
struct Warp {
  unsigned arrived = 0, round = 0;
  float a[2][16][16], b[2][16][8];  // operands of one mma, twice: a fast lane may be one ahead
  u32 value[2][32];
};
struct Range { uintptr_t from, to; };

inline constexpr int COUNT = 256;
inline Fiber fibers[COUNT];
inline Warp warps[COUNT / 32];
inline unsigned arrived, round_;
inline int current, alive;
inline const std::function<void()> *body;
alignas(16) inline u32 shared[1 << 14];
inline std::vector<Range> memory;
inline int faults, shared_words;
}  // namespace emu

inline emu::Index threadIdx, blockIdx, gridDim;

namespace emu {
inline jmp_buf home;

inline void enter(int i) {
  current = i;
  threadIdx = {i, 0};
  if (fibers[i].fresh) {
    fibers[i].fresh = false;
    setcontext(&fibers[i].start);
  }
  _longjmp(fibers[i].at, 1);
}
inline void next() {
  int i = current;
  do i = (i + 1) % COUNT; while (fibers[i].done);
  enter(i);
}
inline void yield() {
  if (!_setjmp(fibers[current].at)) next();
}
inline void run_fiber() {
  (*body)();
  fibers[current].done = true;
  if (--alive == 0) _longjmp(home, 1);
  next();
}
inline void meet(unsigned &here, unsigned &round, unsigned of) {
  unsigned mine = round;
  if (++here == of) here = 0, round++;
  else while (round == mine) yield();
}
inline Warp &warp() { return warps[threadIdx.x / 32]; }
inline void meet_warp() { meet(warp().arrived, warp().round, 32); }

inline void run_block() {
  for (auto &s : shared) s = 0x7FC00000u;  // what was never written is NaN
  for (int i = 0; i < COUNT; i++) {
    Fiber &f = fibers[i];
    if (!f.stack) f.stack.reset(new char[1 << 16]);
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = 1 << 16;
    f.fresh = true, f.done = false;
    makecontext(&f.start, run_fiber, 0);
  }
  alive = COUNT;
  if (!_setjmp(home)) enter(0);
  faults += (int)std::count_if(shared + shared_words, std::end(shared), [](u32 s) { return s != 0x7FC00000u; });
}

// All blocks of a grid, in the order of launch (seed 0) or in another. Returns the number of loads that were not allowed,
// and of words written behind the shared memory that the launch asked for.
inline int run_grid(int x, int y, int seed, const std::function<void()> &f) {
  std::vector<int> order(x * y);
  for (int i = 0; i < x * y; i++) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  body = &f, faults = 0, gridDim = {x, y};
  for (int i : order) blockIdx = {i % x, i / x}, run_block();
  return faults;
}

inline bool allowed(const void *p, size_t bytes) {
  uintptr_t at = (uintptr_t)p;
  auto holds = [&](Range r) { return r.from <= at && at + bytes <= r.to; };
  bool good = at % bytes == 0 && std::any_of(memory.begin(), memory.end(), holds);
  if (!good) faults++;
  return good;
}
}  // namespace emu

inline float __uint_as_float(u32 u) { float f; memcpy(&f, &u, 4); return f; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline u32 __float_as_uint(float f) { u32 u; memcpy(&u, &f, 4); return u; }
inline void __syncthreads() { emu::meet(emu::arrived, emu::round_, emu::COUNT); }
inline int min(int a, int b) { return a < b ? a : b; }
inline void __threadfence() {}
inline u32 atomicAdd(u32 *at, u32 by) { u32 before = *at; *at += by; return before; }
inline u32 from_lane(u32 value, int lane) {
  emu::Warp &w = emu::warp();
  int turn = w.round & 1;
  w.value[turn][threadIdx.x % 32] = value;
  emu::meet_warp();
  return w.value[turn][lane];
}
inline float __shfl_xor_sync(u32, float v, int by) {
  return __uint_as_float(from_lane(__float_as_uint(v), threadIdx.x % 32 ^ by));
}
inline u32 sum_bytes(u32 a, u32 c) { return c + (a & 255) + (a >> 8 & 255) + (a >> 16 & 255) + (a >> 24); }

template <bool BF16>
inline float widen(u16 a) {
  if (BF16) return __uint_as_float((u32)a << 16);
  _Float16 h;
  memcpy(&h, &a, 2);
  return (float)h;
}
template <bool BF16>
inline u16 narrow(float f) {
  if (BF16) {
    u32 u = __float_as_uint(f);
    if (f != f) return 0x7FFF;
    return (u16)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  _Float16 h = (_Float16)f;
  u16 u;
  memcpy(&u, &h, 2);
  return u;
}
template <bool BF16>
inline u32 round2(float low, float high) { return (u32)narrow<BF16>(high) << 16 | narrow<BF16>(low); }
template <bool BF16>
inline u32 add2(u32 a, u32 b) {
  return round2<BF16>(widen<BF16>((u16)a) + widen<BF16>((u16)b), widen<BF16>(a >> 16) + widen<BF16>(b >> 16));
}
inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
inline u32 choose_bytes(u32 a, u32 b, u32 selector) {
  u64 all = (u64)b << 32 | a;
  u32 d = 0;
  for (int i = 0; i < 4; i++) d |= (u32)(all >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return d;
}

// The fragments of mma.m16n8k16 as PTX's manual draws them
template <bool BF16>
inline void mma(float (&c)[4], const u32 *a, u32 b0, u32 b1) {
  emu::Warp &w = emu::warp();
  int turn = w.round & 1, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int r = 0; r < 4; r++)
    for (int h = 0; h < 2; h++) w.a[turn][g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = widen<BF16>(a[r] >> 16 * h);
  for (int h = 0; h < 2; h++) {
    w.b[turn][2 * t + h][g] = widen<BF16>(b0 >> 16 * h);
    w.b[turn][2 * t + h + 8][g] = widen<BF16>(b1 >> 16 * h);
  }
  emu::meet_warp();
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) c[i] += w.a[turn][g + 8 * (i >> 1)][k] * w.b[turn][k][2 * t + (i & 1)];
}

template <int N>
inline void load_once(u32 *to, const u32 *from) {
  if (emu::allowed(from, 4 * N)) memcpy(to, from, 4 * N);
}
inline Quad load4(const void *from) {
  Quad q{0x7FC07FC0, 0x7FC07FC0, 0x7FC07FC0, 0x7FC07FC0};
  if (emu::allowed(from, 16)) memcpy(&q, from, 16);
  return q;
}
inline int uniform(int value) { return value; }
inline float load_shared_result(const float *from) { return *from; }
inline void let_next_start() {}
inline void wait_for_previous() {}
