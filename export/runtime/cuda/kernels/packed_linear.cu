// y = x W^T (+ B (A x)) (+ bias) for 1 to 64 rows of x, where W [N, K] is stored as codes of 2, 3, 4 or 8 bits.
//
// THE IDEA. At these sizes a product should take as long as reading the weights does. What stands against it below 4 bits is not
// bytes but instructions: an H100 that reads 3 TB/s has time for 5.2, 3.9 or 2.7 instructions a weight of 4, 3 or 2 bits (132 SMs
// x 128 lanes x 1.755 GHz, over the weights that are read in a second). So the design counts instructions.
//
//   * The weights are the A operand of mma.m16n8k16 and the tokens the 8 columns of B. The tensor cores do products and sums, and
//     8 tokens cost what one costs. A tile in memory is in the order of the registers of A already (tile.cuh).
//   * Codes become 16-bit floats in pairs: a field is masked and brought under a fixed exponent by one LOP3; one packed addition
//     takes the magic number and the zero point away. Both are exact, so what the tensor cores multiply is the integer itself,
//     and no magic number is left to be cancelled in a sum. LOP3 and shifts share a pipe of half rate; the addition has another.
//   * Codes into a table become pairs by one look-up of both: the table of all pairs lies in shared memory 32 times, once in each
//     bank, so lanes never conflict.
//   * Scales are applied to sums over 64 inputs (32 in groups of 32), in fp32, never to a weight. Where an output has one scale
//     it is applied once.
//   * K is cut into shares, eight for a block. With up to 8 tokens each of the block's 8 warps takes a share of one row tile.
//     With more, a warp takes four shares, one after the other, and the block has four row tiles, whose warps find each other's
//     activations in L1: these are then what costs bandwidth. A warp keeps two or three units of 128 inputs in flight, and asks
//     for the first before the previous kernel has ended (programmatic dependent launch).
//
// DETERMINISM. What is added to what, and in which order, depends on N, K and the format alone: not on the batch, not on how
// blocks are scheduled. A share's units are added in the order of K, shares as (0+1+2+3) + (4+5+6+7), by whichever warps, slices
// in their order; what is fused and what is rounded is written out. So a token gets the same bits in any company of up to 64, and
// in every run. Where K is split over blocks (slices), each writes its sums, and the last to arrive adds them and sets the
// counter back to 0: so the next launch finds it, and every replay of a CUDA graph. One matrix must therefore not be multiplied
// on two streams at once.
//
// ALTERNATIVES NOT TAKEN. (1) To leave the magic number in A and remove it by a second mma with -(magic + zero): 1.5 to 2.0
// instructions a weight at 8 tokens, but twice the tensor work, too much from 16 tokens on; a switch between the two would change
// bits with the batch; and sums hundreds of times the result are at the mercy of how tensor cores round. (2) Activations through
// shared memory: no barrier in the loop is worth more, while L1, which weights pass by, does as well. (3) A persistent grid that
// cuts K anywhere (stream-K): it evens out the last wave; slices by shape alone are simpler. (4) One shuffle, or four byte
// permutations, for each weight instead of the table of pairs: more instructions at every width. (5) wgmma: Hopper alone, and
// better only where tokens are many; above 128 rows the weights are dequantized for cuBLAS instead (dequantize.cu).
//
// LIMITS. sm_80 and later. K a multiple of 32; groups of 32, 64, 128, 256 or the whole row. Levels of tables are rounded to the
// activations' dtype before the product; scales are not. x in bf16 or fp16, y in the same or in fp32. Registers allow 24, 16 or 8 warps on
// an SM at up to 8, 32 and 64 tokens. Nothing here has been tuned on a GPU: slices, units in flight and residency are estimates.
//
// INSTRUCTIONS A WEIGHT of the main loop in sm_90 machine code, as benchmarks/kernels_budget.py counts them:
//
//                      8 tokens        16 tokens       32 tokens       64 tokens
//                      bf16   fp16     bf16   fp16     bf16   fp16     bf16   fp16
//   int2:g128          1.62   1.58     2.10   2.06     2.72   2.67     4.01   3.96
//   int2:g64:asym      2.02   2.08     2.42   2.48     3.06   3.14     4.36   4.43
//   int3:g128          1.90   1.81     2.36   2.27     2.98   2.89     4.28   4.19
//   int3:g128:asym     2.04   2.01     2.51   2.47     3.12   3.11     4.43   4.40
//   int4:g128          1.88   1.62     2.34   2.09     2.95   2.70     4.26   4.01
//   int4:g128:asym     1.95   1.73     2.43   2.21     3.05   2.84     4.36   4.13
//   int4:g32:asym      2.38   2.16     2.96   2.74     3.85   3.64     5.66   5.44
//   int4:channel       1.74   1.47     2.06   1.81     2.46   2.21     3.25   3.00
//   int8:g128          3.02   1.52     3.49   1.99     4.09   2.59     5.40   3.90
//   nf2:g64            2.02   2.02     2.49   2.49     3.09   3.09     4.37   4.37
//   nf3:g64            2.15   2.15     2.65   2.65     3.26   3.26     4.53   4.53
//   nf4:g64            2.12   2.12     2.51   2.51     3.12   3.12     4.40   4.40
//
// An H100 has time for 5.2, 3.9 or 2.7, see above; at 64 tokens the tensor cores set the pace.
//
// One variant a compilation: -DV_BITS= -DV_BF16= -DV_GROUP= (0: whole row) -DV_ZERO= -DV_TABLE= -DV_TILES= (1, 2, 4, 8).
#include "tile.cuh"

#if __CUDA_ARCH__ >= 1000  // code for these takes a few registers more
constexpr bool NEWER = true;
#else
constexpr bool NEWER = false;
#endif
constexpr int CHAIN = WARPS / 2;  // shares of K whose sums are added one after the other; a block's part of K is two chains

template <int BITS_, bool BF16_, int GROUP_, bool ZERO_, bool TABLE_, int TILES_>
struct Variant {
  static constexpr int BITS = BITS_, GROUP = GROUP_, TILES = TILES_;
  static constexpr bool BF16 = BF16_, ZERO = ZERO_, TABLE = TABLE_;
  static constexpr int SHARES = TILES == 1 ? 1 : CHAIN;  // of K that a warp takes, one after the other
  static constexpr int ROWS = SHARES;                    // row tiles of a block: what its warps have to spare
  static constexpr int WORDS = 2 * BITS, SCALES = 2 * Scales<GROUP>::COUNT;  // of a lane and unit
  // Units in flight, and blocks of an SM: as many as registers allow without spilling, which was found by trying.
  static constexpr bool HEAVY = BITS == 8 || GROUP == 32, ODD = ZERO && (GROUP == 64 || GROUP == 256);
  static constexpr int DEPTH = (TILES == 4 && ODD) || (BITS == 8 && GROUP == 32) ? 2 : 3;
  static constexpr int RESIDENT = TILES == 1   ? (HEAVY || ODD ? 2 : 3)
                                  : TILES == 2 ? 2
                                  : TILES == 4 ? (HEAVY || NEWER ? 1 : 2)
                                               : 1;
};

template <class V>
struct Unit {
  u32 words[V::WORDS], scales[V::SCALES];
};

// Where a warp stands in its row tile. Pointers move, so that the compiler need not find out every time where they point.
template <class V>
struct Cursor {
  static constexpr int WORD_STEP = 32 * V::WORDS, SCALE_STEP = 8 * V::SCALES;
  static constexpr bool BY_UNIT = V::GROUP && V::GROUP <= UNIT;  // a block of scales for each unit
  const u32 *words, *rest;  // the lane's vectors of 16 and, with 3 bits, of 8 bytes
  const u32 *scales;        // of unit u, or of the row tile where they are not BY_UNIT
  int u;

  DEVICE void fetch(Unit<V> &unit, int ahead) const {
    fetch_words<V::BITS>(unit.words, words + ahead * WORD_STEP, rest + ahead * WORD_STEP);
    if constexpr (V::GROUP)
      fetch_scales<V::GROUP>(unit.scales, scales + (BY_UNIT ? ahead : Scales<V::GROUP>::block(u + ahead)) * SCALE_STEP);
  }
  DEVICE void advance(int units) {
    words += units * WORD_STEP;
    if (V::WORDS % 4) rest += units * WORD_STEP;
    if (BY_UNIT) scales += units * SCALE_STEP;
    u += units;
  }
};

DEVICE float scale_of(u32 word, bool zero) { return __uint_as_float(zero ? word & 0xFFFFFF00u : word); }

// One tile of integers as A operands: the pairs code - zero, exact. `scales`: of the unit, for their zero points; k: inside the
// unit.
template <class V>
DEVICE void decode_integers(u32 (&a)[16], const u32 *words, const u32 *scales, int k) {
  using F = Field<V::BF16, V::BITS>;
  u32 last = 0;
  if constexpr (V::BITS == 3) {
    last = words[0] >> 15 & 0x00010001u;
    last = and_or(words[1] >> 14, 0x00020002u, last);
    last = and_or(words[2] >> 13, 0x00040004u, last);
  }
#pragma unroll
  for (int p = 0; p < 16; p++) {
    u32 zero = 1u << (V::BITS - 1);
    if constexpr (V::ZERO) zero = scales[2 * Scales<V::GROUP>::of(k + 32 * (p >> 3)) + (p & 1)] & 0xFFu;
    if constexpr (V::BITS == 8 && V::BF16) {  // 7 bits of mantissa do not hold a magic number and 8 bits: by way of fp32
      float minus = __uint_as_float(0xCB000000u | zero);  // -(2^23 + zero)
      u32 low = choose_bytes(words[p / 2], 0x4B000000u, 0x7440u + 2 * (p & 1));
      u32 high = choose_bytes(words[p / 2], 0x4B000000u, 0x7441u + 2 * (p & 1));
      a[p] = round2<true>(__uint_as_float(low) + minus, __uint_as_float(high) + minus);
    } else {
      u32 magic = F::magic(F::place(p)), mask = ((1u << V::BITS) - 1) * 0x10001u << (F::place(p) * V::BITS), value;
      if constexpr (V::BITS == 8) value = choose_bytes(words[p / 2], magic, p & 1 ? 0x5352u : 0x5150u);
      else if (V::BITS == 3 && p == 15) value = last | magic;
      else value = and_or(words[p / F::PER_WORD] >> F::shift(p), mask, magic);
      a[p] = add2<V::BF16>(value, zero * (0x10001u << (F::place(p) * V::BITS)) + (magic | 0x80008000u));
    }
  }
}

// One tile of codes into a table as A operands. The entry of a pair lies 128 bytes times its index from the start, in the lane's
// bank.
template <class V>
DEVICE void decode_table(u32 (&a)[16], const u32 *words, const u32 *table, int lane) {
  constexpr int wide = 2 * V::BITS, per = 32 / wide;  // pairs in a word
  constexpr u32 mask = ((1u << wide) - 1) << 7;
#pragma unroll
  for (int p = 0; p < 16; p++) {
    u32 at;
    if (V::BITS == 3 && p == 15) {
      at = and_or(words[0] >> 23, 3u << 7, 4 * lane);
      at = and_or(words[1] >> 21, 3u << 9, at);
      at = and_or(words[2] >> 19, 3u << 11, at);
    } else {
      int by = p % per * wide - 7;
      u32 w = words[p / per];
      at = and_or(by < 0 ? w << (by < 0 ? -by : 0) : w >> (by < 0 ? 0 : by), mask, 4 * lane);
    }
    a[p] = *(const u32 *)((const char *)table + at);
  }
}

// Fills the table of pairs from 2^bits levels in fp32.
template <class V>
DEVICE void fill_table(u32 *table, const float *levels) {
  constexpr u32 mask = (1u << V::BITS) - 1;
  for (u32 i = threadIdx.x; i < 8u << (2 * V::BITS); i += THREADS) {
    u32 pair = round2<V::BF16>(levels[i >> 3 & mask], levels[i >> (3 + V::BITS)]);
    ((Quad *)table)[i] = Quad{pair, pair, pair, pair};
  }
}

// sum += the products with one unit, `start` inputs from where the lane's `x` of each token tile points. `left`: inputs from the
// unit's start to the end of K, or more if the unit is WHOLE. What lies behind is not read, and counts 0.
template <class V, bool WHOLE>
DEVICE void multiply(float (&sum)[V::TILES][4], const u32 *words, const u32 *scales, const u16 *const (&x)[V::TILES], int start,
                     int left, const u32 *table, int lane) {
  using S = Scales<V::GROUP>;
  Quad ahead[2][2];  // of x: of the token tile at work and of the next
  auto load = [&](int step) {
    const int k = step / V::TILES * 64;
#pragma unroll
    for (int h = 0; h < 2; h++)
      ahead[step % 2][h] = WHOLE || k + 32 * h < left ? load4(x[step % V::TILES] + start + k + 32 * h) : Quad{0, 0, 0, 0};
  };
  load(0), load(1);
#pragma unroll
  for (int k = 0; k < UNIT; k += 64) {
    if (V::TILES > 1 && k >= left) break;  // and a wall: the compiler would mix both tiles until it runs out of registers
    u32 a[16];
    if constexpr (V::TABLE) decode_table<V>(a, words + k / 64 * V::BITS, table, lane);
    else decode_integers<V>(a, words + k / 64 * V::BITS, scales, k);
#pragma unroll
    for (int j = 0; j < V::TILES; j++) {
      const int step = k / 64 * V::TILES + j;
      const Quad(&b)[2] = ahead[step % 2];
#pragma unroll
      for (int m = 0; m < 4; m += S::SPAN / 16) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        float(&to)[4] = V::GROUP ? c : sum[j];
#pragma unroll
        for (int i = m; i < m + S::SPAN / 16; i++)
          mma<V::BF16>(to, a + 4 * i, i & 1 ? b[i >> 1].z : b[i >> 1].x, i & 1 ? b[i >> 1].w : b[i >> 1].y);
        if constexpr (V::GROUP) {
          const u32 *s = scales + 2 * S::of(k + 16 * m);
#pragma unroll
          for (int i = 0; i < 4; i++) sum[j][i] = __fmaf_rn(scale_of(s[i >> 1], V::ZERO), c[i], sum[j][i]);
        }
      }
      if (step + 2 < 2 * V::TILES) load(step + 2);
    }
  }
}

// What a result takes besides the sum; wide: it is left in fp32, to be turned (turn_outputs.cu). B [N, rank], rank a multiple of 8; t [M, rank] = A x in fp32; bias [N] or null.
struct Epilogue {
  void *y;
  const u16 *bias, *B;
  const float *t;
  int N, rank, wide;

  template <bool BF16>
  DEVICE void store(int row, int token, float value) const {
    const u16 *b = B + (u64)row * rank;
    const float *mine = t + (u64)token * rank;
    float low = 0.f;
    for (int i = 0; i < rank; i += 8) {
      Quad pairs = load4(b + i);
      const u32 both[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
      for (int h = 0; h < 4; h++) {
        low = __fmaf_rn(widen<BF16>((u16)both[h]), mine[i + 2 * h], low);
        low = __fmaf_rn(widen<BF16>((u16)(both[h] >> 16)), mine[i + 2 * h + 1], low);
      }
    }
    value += low;
    if (bias) value += widen<BF16>(bias[row]);
    const u64 at = (u64)token * N + row;
    if (wide) ((float *)y)[at] = value;
    else ((u16 *)y)[at] = (u16)round2<BF16>(value, 0.f);
  }
};

// Adds the sums of a share of K to the thread's own places in shared memory, [4 * TILES][THREADS], and clears them.
template <class V>
DEVICE void deliver(float *mine, float (&sum)[V::TILES][4], const u32 (&channel)[2]) {
#pragma unroll
  for (int j = 0; j < V::TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // rounded before it is added, in every variant: left to itself, the compiler would fuse the two where it can
      mine[(4 * j + i) * THREADS] += V::GROUP ? sum[j][i] : __fmul_rn(sum[j][i], scale_of(channel[i >> 1], V::ZERO));
      sum[j][i] = 0.f;
    }
}

// What all shares of K have given to an output of the block and a token: (0 + 1 + 2 + 3) + (4 + 5 + 6 + 7), whoever computed
// them.
template <class V>
DEVICE float collect(const float *delivered, int output, int token) {
  const int lane = output % 8 * 4 + token % 8 / 2, i = token / 8 * 4 + output % 16 / 8 * 2 + token % 2;
  const float *at = delivered + i * THREADS + output / 16 * 32 + lane;
  constexpr int half = CHAIN / V::SHARES, step = 32 * V::ROWS;
  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int w = 0; w < 2 * half; w++) sums[w / half] += at[w * step];
  return sums[0] + sums[1];
}

// Grid: (row tiles / ROWS rounded up, slices). `partial`: fp32 [slices, M, N]; `counters`: one a block of rows, 0.
template <class V>
DEVICE void packed_linear(const u32 *words, const u32 *scales, const float *levels, const u16 *x, Epilogue out, float *partial,
                          u32 *counters, int M, int K) {
  SHARED(shared);
  float *delivered = (float *)shared;
  u32 *table = shared + 4 * V::TILES * THREADS;
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), slices = gridDim.y;
  const int row_tiles = (out.N + 15) / 16, units = (K + UNIT - 1) / UNIT, blocks = Scales<V::GROUP>::block(units - 1) + 1;
  // of the slice's units [.., end) this warp takes SHARES shares, one after the other
  const int slice = (units + slices - 1) / slices, share = (slice + WARPS - 1) / WARPS;
  const int begin = blockIdx.y * slice + warp / V::ROWS * V::SHARES * share;
  const int end = min(min(begin + V::SHARES * share, (int)(blockIdx.y + 1) * slice), units), whole = min(end, K / UNIT);
  let_next_start();

  const u32 row_tile = min((int)blockIdx.x * V::ROWS + warp % V::ROWS, row_tiles - 1);  // past the end the last again, not stored
  words += (u64)row_tile * units * (32 * V::WORDS);
  Cursor<V> cursor{words + 4 * lane, words + 128 + 2 * lane, scales + ((u64)row_tile * blocks * 8 + lane / 4) * V::SCALES, 0};
  cursor.advance(begin);
  Unit<V> ring[V::DEPTH];
#pragma unroll
  for (int d = 0; d < V::DEPTH; d++)
    if (begin + d < whole) cursor.fetch(ring[d], d);
  u32 channel[2] = {0, 0};  // the scales where there is one for each output
  if constexpr (!V::GROUP) fetch_scales<0>(channel, cursor.scales);
  if constexpr (V::TABLE) {
    fill_table<V>(table, levels);
    __syncthreads();
  }
  float sum[V::TILES][4];
  const u16 *at[V::TILES];
#pragma unroll
  for (int j = 0; j < V::TILES; j++) {
    const int token = min(8 * j + lane / 4, M - 1);  // columns past M repeat the last and are not stored
    at[j] = x + (u64)token * K + begin * UNIT + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) delivered[(4 * j + i) * THREADS + threadIdx.x] = sum[j][i] = 0.f;
  }
  wait_for_previous();
  int left = whole - begin, until = share;  // units to the end, and to the end of the share
  for (; left > 0; left -= V::DEPTH) {
#pragma unroll
    for (int d = 0; d < V::DEPTH; d++) {
      if (left > d) {
        multiply<V, true>(sum, ring[d].words, V::GROUP ? ring[d].scales : channel, at, d * UNIT, K, table, lane);
        if (left > d + V::DEPTH) cursor.fetch(ring[d], d + V::DEPTH);
        if (V::SHARES > 1 && --until == 0) {
          deliver<V>(delivered + threadIdx.x, sum, channel);
          until = share;
        }
      }
    }
    cursor.advance(V::DEPTH);
#pragma unroll
    for (int j = 0; j < V::TILES; j++) at[j] += V::DEPTH * UNIT;
  }
  if (begin <= whole && whole < end) {  // a last unit that is not whole; the cursor stands -left units behind it
    cursor.fetch(ring[0], left);
    multiply<V, false>(sum, ring[0].words, V::GROUP ? ring[0].scales : channel, at, left * UNIT, K % UNIT, table, lane);
  }
  deliver<V>(delivered + threadIdx.x, sum, channel);
  __syncthreads();

  const int first = blockIdx.x * V::ROWS * 16;
  auto each = [&](auto value, auto use) {
    for (int e = threadIdx.x; e < V::ROWS * 16 * M; e += THREADS) {
      const int output = e % (V::ROWS * 16), token = e / (V::ROWS * 16);
      if (first + output < out.N) use(first + output, token, value(output, token));
    }
  };
  auto collected = [&](int output, int token) { return collect<V>(delivered, output, token); };
  auto store = [&](int row, int token, float value) { out.template store<V::BF16>(row, token, value); };
  if (slices == 1) {
    each(collected, store);
    return;
  }
  each(collected, [&](int row, int token, float value) { partial[((u64)blockIdx.y * M + token) * out.N + row] = value; });
  if (!is_last(counters + blockIdx.x, slices)) return;
  each([&](int output, int token) {
    float total = 0.f;
    for (int s = 0; s < slices; s++) total += load_shared_result(partial + ((u64)s * M + token) * out.N + first + output);
    return total;
  }, store);
}

#ifdef V_BITS
using Chosen = Variant<V_BITS, V_BF16, V_GROUP, V_ZERO, V_TABLE, V_TILES>;
KERNEL void __launch_bounds__(THREADS, Chosen::RESIDENT)
packed_linear_kernel(const u32 *words, const u32 *scales, const float *levels, const u16 *x, void *y, const u16 *bias,
                     const u16 *B, const float *t, float *partial, u32 *counters, int M, int N, int K, int rank, int wide) {
  packed_linear<Chosen>(words, scales, levels, x, Epilogue{y, bias, B, t, N, rank, wide}, partial, counters, M, K);
}
#endif
