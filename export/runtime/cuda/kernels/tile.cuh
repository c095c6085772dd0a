// What the kernels share: the tile, how codes lie in it, and the few instructions that C++ cannot say.
//
// A TILE is 16 outputs x 64 inputs of the matrix. Lane 4g+t of a warp (g = 0..7, t = 0..3) holds outputs g and g+8 and the inputs
// 8t..8t+7 and 32+8t..32+8t+7: 32 codes, which are `bits` words, whatever `bits` is. They are 16 PAIRS of neighbouring inputs;
// pair p = 4m+r belongs to output g + 8*(r & 1) and to the inputs 32*(m >> 1) + 8t + 4*(m & 1) + 2*(r >> 1) + {0, 1}. So pairs
// 4m..4m+3 are the four registers of the A operand of mma.m16n8k16 number m, in order. The sum over inputs may run in any order,
// so the order is chosen for the activations: what a lane needs of them as B operands are two plain 16-byte loads from row-major
// x, and a quad's loads are 64 contiguous bytes. Numbers 0, 1 cover the first 32 inputs, 2, 3 the rest: so groups may be of 32.
//
// A UNIT is two tiles, 128 inputs: 2*bits words a lane, stored as 16-byte vectors [vector][lane][4], for 3 bits one of 16 and one
// of 8 bytes. In memory: [row tile][unit][64*bits words]; rows are padded to 16 and inputs to 128 with zeros.
//
// FIELDS of integers: the two codes of a pair lie 16 bits apart, so that one LOP3 brings both under the exponent of a number
// whose last place counts 1 ("magic": 128 + code in bf16, 1024 + code in fp16, and powers of two below for fields further left).
//   4 bits: pair p is field p%4 of word p/4;  2 bits: field p%8 of word p/8;  8 bits: bytes 0,1 or 2,3 of word p/2.
//   3 bits: field p%5 of word p/5 for p < 15; the bits 15 and 31 that are left in each of the three words are pair 15.
//
// FIELDS for tables: the codes of a pair are neighbours and make one index of 2*bits bits, lowest pair first; with 3 bits the two
// highest bits of the three words are pair 15, lowest first.
//
// SCALES are one u32 for a row and group: [row tile][block][g][group in unit][rows g, g+8], where a block is a unit, or a group
// where that is larger. A word is the scale in fp32; with zero points its last byte is that, which a 16-bit scale leaves free.
#pragma once
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int WARPS = 8;  // of a block
constexpr int THREADS = 32 * WARPS;
constexpr int UNIT = 128;         // inputs

struct alignas(16) Quad {
  u32 x, y, z, w;
};

#ifdef EMULATE
#include "emu.h"
#else
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__
#define SHARED(name) extern __shared__ __align__(16) u32 name[]
#define FLAG(name) __shared__ u32 name

// (a & b) | c
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Four bytes chosen from the eight of (b, a), a nibble of `selector` each; only selectors below 8 are used.
DEVICE u32 choose_bytes(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// a + b on two 16-bit floats. As a product with 1, because sm_80 has no other addition of bf16.
template <bool BF16>
DEVICE u32 add2(u32 a, u32 b) {
  u32 d;
  if constexpr (BF16) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80u), "r"(b));
  else asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// (low, high) rounded to two 16-bit floats
template <bool BF16>
DEVICE u32 round2(float low, float high) {
  u32 d;
  if constexpr (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

template <bool BF16>
DEVICE float widen(u16 a) {
  if constexpr (BF16) return __uint_as_float((u32)a << 16);
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a));
  return d;
}

// c [16 x 8] += A [16 x 16] B [16 x 8]: the fragments of PTX's mma.m16n8k16
template <bool BF16>
DEVICE void mma(float (&c)[4], const u32 *a, u32 b0, u32 b1) {
  if constexpr (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// N words that are read once: past L1, which is left to the activations
template <int N>
DEVICE void load_once(u32 *to, const u32 *from) {
  if constexpr (N == 4)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
  else
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}

// Ordinary, ordered after wait_for_previous: the kernel before may have written what is read.
DEVICE Quad load4(const void *from) {
  Quad q;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(from));
  return q;
}

// From L2, where other blocks of the same grid have written
DEVICE float load_shared_result(const float *from) {
  float d;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(d) : "l"(from));
  return d;
}

// c + the sum of the four bytes of a
DEVICE u32 sum_bytes(u32 a, u32 c) {
  u32 d;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x01010101u), "r"(c));
  return d;
}

// What `lane` of the warp has
DEVICE u32 from_lane(u32 value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }

// The same value for all lanes, and known to the compiler as such
DEVICE int uniform(int value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// Programmatic dependent launch: the next kernel may start now; and nothing before has yet to be written.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif

// Eight numbers, to a multiple of 16 bytes: rounded to 16-bit floats, or as they are
template <bool BF16>
DEVICE void store8(u16 *to, const float (&v)[8]) {
  *(Quad *)to = Quad{round2<BF16>(v[0], v[1]), round2<BF16>(v[2], v[3]), round2<BF16>(v[4], v[5]), round2<BF16>(v[6], v[7])};
}
DEVICE void store8_32(float *to, const float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    ((Quad *)to)[i / 4] = Quad{__float_as_uint(v[i]), __float_as_uint(v[i + 1]), __float_as_uint(v[i + 2]),
                               __float_as_uint(v[i + 3])};
}

// Whether this block is the last of `of` to come by; what the others wrote before is then there to be read. Resets the counter.
DEVICE bool is_last(u32 *counter, u32 of) {
  FLAG(last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == of - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// The field of integers that holds pair p after a shift: its place in the half-word, the shift, and the magic number around it.
template <bool BF16, int BITS>
struct Field {
  static constexpr int MANTISSA = BF16 ? 7 : 10;
  static constexpr int PER_WORD = BITS == 3 ? 5 : 16 / BITS;
  static constexpr int PER_SHIFT = BITS == 8 ? 1 : MANTISSA / BITS;  // fields that lie inside the mantissa at once
  static constexpr int PLACES = PER_SHIFT < PER_WORD ? PER_SHIFT : PER_WORD;

  static DEVICE constexpr int index(int pair) { return pair % PER_WORD; }
  static DEVICE constexpr int place(int pair) { return BITS == 3 && pair == 15 ? 0 : index(pair) % PER_SHIFT; }
  static DEVICE constexpr int shift(int pair) { return index(pair) / PER_SHIFT * PER_SHIFT * BITS; }
  // 2^(MANTISSA - place*BITS), whose mantissa bit place*BITS counts 1; in both halves
  static DEVICE constexpr u32 magic(int place) {
    return ((BF16 ? 0x4300u : 0x6400u) - ((u32)(place * BITS) << MANTISSA)) * 0x10001u;
  }
};

// The code of a pair's first (half 0) or second input, from the words of a tile. Slow and plain: for what is not in the inner
// loop.
template <int BITS, bool TABLE>
DEVICE u32 code(const u32 *words, int pair, int half) {
  constexpr u32 mask = (1u << BITS) - 1;
  if constexpr (BITS == 8) {
    return words[pair / 2] >> (16 * (pair % 2) + 8 * half) & mask;
  } else if constexpr (BITS == 3) {
    if (pair == 15) {
      u32 index = TABLE ? words[0] >> 30 | words[1] >> 30 << 2 | words[2] >> 30 << 4 : 0;
      if (TABLE) return index >> (3 * half) & mask;
      for (int i = 0; i < 3; i++) index |= (words[i] >> (15 + 16 * half) & 1u) << i;
      return index;
    }
    return words[pair / 5] >> (TABLE ? 6 * (pair % 5) + 3 * half : 3 * (pair % 5) + 16 * half) & mask;
  } else {
    constexpr int per = 16 / BITS;
    int at = pair % per;
    return words[pair / per] >> (TABLE ? BITS * (2 * at + half) : BITS * at + 16 * half) & mask;
  }
}

// How scales lie; GROUP 0 is one for all inputs.
template <int GROUP>
struct Scales {
  static constexpr int SPAN = GROUP == 32 ? 32 : 64;  // inputs of a tile under one scale
  static constexpr int COUNT = GROUP == 0 || GROUP >= UNIT ? 1 : UNIT / GROUP;  // in a unit
  static DEVICE int block(int unit) { return GROUP == 0 ? 0 : GROUP <= UNIT ? unit : unit / (GROUP / UNIT); }
  static DEVICE constexpr int of(int k) { return GROUP == 0 || GROUP >= UNIT ? 0 : k / GROUP; }  // k inside the unit
};

// A lane's words of a unit, from its vectors of 16 bytes at unit + 4 * lane and, with 3 bits, of 8 bytes at unit + 128 + 2 * lane
template <int BITS>
DEVICE void fetch_words(u32 *to, const u32 *mine, const u32 *rest) {
  constexpr int words = 2 * BITS, whole = words / 4;
#pragma unroll
  for (int i = 0; i < whole; i++) load_once<4>(to + 4 * i, mine + 128 * i);
  if constexpr (words % 4) load_once<2>(to + 4 * whole, rest);
}

// The scales of a unit for a lane's two outputs: to[2 * group in unit + (row >= 8)]
template <int GROUP>
DEVICE void fetch_scales(u32 *to, const u32 *mine) {
  constexpr int words = 2 * Scales<GROUP>::COUNT;
  if constexpr (words == 2) load_once<2>(to, mine);
#pragma unroll
  for (int i = 0; i < words / 4; i++) load_once<4>(to + 4 * i, mine + 4 * i);
}
