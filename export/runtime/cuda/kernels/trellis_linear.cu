// y = S H t (C x') (+ bias) for 1 to 16 rows of x', where C [N, K] is a trellis code of 1 to 5 bits a weight.
//
// x' is what turn_inputs.cu makes of activations: rotated, times the steps of inputs, in fp16 with a power of two for each row.
// Scales of outputs t, the rotation of outputs, the bias and the rounding are the end of this kernel.
//
// THE IDEA. As in packed_linear.cu, weights become the A operand of mma.m16n8k16 in registers, and tokens are the columns of B.
// The code decides the rest. A state is a window of a stream that runs over outputs, so a lane takes 32 outputs in a row: it reads
// their bits once, and windows are shifts by constants. Which row of which A is whose output is free, so outputs 2r and 2r+1 of
// each lane are rows g and g+8 of A number r: sixteen products make the 256 outputs of a ring. Which inputs are which columns is
// free too, and a lane's eight are neighbours: it needs one 16-byte load of x' for each token. Both halves of a register are one
// output of two inputs, by two streams.
//
// A number is computed: a multiplication, a sum of four bytes (dp4a) that lands in the last places of an fp16, one packed
// subtraction for two. 128 times a value is a whole number up to 510, exact in fp16, so products are exact, and sums are those of
// fp32. Nothing is looked up: of 32 random look-ups in shared memory three or four fall on one bank, so a table of pairs would
// take longer than the five instructions a weight that this takes.
//
// K is cut into slices over blocks, and these into eight shares, one a warp; all warps of a block have the same ring. Warps add
// their sums up in shared memory in their order, slices in theirs, by the last block of a ring to arrive, as in packed_linear.cu:
// a token gets the same bits in any company, and in every run. The ring is then complete, and a warp turns it: blocks of a
// rotation never lie across rings.
//
// ALTERNATIVES NOT TAKEN. (1) 128 outputs a warp: half the accumulators, so twice the tokens a launch; but then a stream ends in
// another warp's, and x' is read twice as often. (2) Values in bf16, for activations in it: half of those above 2 are no such
// numbers. (3) Products in int8 (dp4a of codes and of activations in 8 bits): the sum of bytes is linear, and that would be the
// fewest instructions; but activations would be rounded to 8 bits.
//
// LIMITS. sm_80 and later; N as the format has it, any K. More than 16 tokens take another launch, which reads the codes again
// (from L2, where they fit). Instructions a weight of the main loop in sm_90 machine code (benchmarks/kernels_budget.py): 5.2 at
// any rate and 8 tokens (5.0 at 4 bits), 5.3 at 16. An H100 has time for 2.7, 3.9 or 5.2 at 2, 3 or 4 bits while it reads them,
// see packed_linear.cu: so at 4 bits it is memory that counts, at 2 bits half of its speed is all that can be had. Nothing has been
// tuned on a GPU.
//
// One variant a compilation: -DV_HALVES= (half bits a weight) -DV_SIZE= (bits of a state) -DV_BF16= (of y and the bias)
// -DV_TILES= (1 or 2 times 8 tokens).
#include "trellis.cuh"
#include "turn.cuh"

constexpr int PRODUCTS = RING / 16;  // of a ring

template <int HALVES_, int SIZE_, bool BF16_, int TILES_>
struct Coded : Trellis<HALVES_, SIZE_> {
  static constexpr int TILES = TILES_, SUMS = 4 * TILES * PRODUCTS;  // of a lane
  static constexpr bool BF16 = BF16_;
  // The next unit is on its way while one is at work, where registers allow: found by trying.
  static constexpr bool AHEAD = TILES == 1 || HALVES_ < 6;
};

// sum += the products with one unit. x: of each token tile eight inputs of a token.
template <class V>
DEVICE void multiply(float (&sum)[V::TILES][PRODUCTS][4], const u32 *words, const Quad (&x)[V::TILES]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 streams[4][V::LENGTH];
#pragma unroll
    for (int j = 0; j < 4; j++) V::stream(streams[j], words, 4 * half + j);
#pragma unroll
    for (int r = 0; r < PRODUCTS; r++) {
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = V::pair(streams[i / 2 * 2], streams[i / 2 * 2 + 1], 2 * r + i % 2);
#pragma unroll
      for (int j = 0; j < V::TILES; j++) mma<false>(sum[j][r], a, half ? x[j].z : x[j].x, half ? x[j].w : x[j].y);
    }
  }
}

// The sums of all warps, added in their order, in shared memory [SUMS][32].
template <class V>
DEVICE void gather(float *shared, const float (&sum)[V::TILES][PRODUCTS][4], int warp, int lane) {
  for (int w = 0; w < WARPS; w++) {
    if (warp == w) {
#pragma unroll
      for (int i = 0; i < V::SUMS; i++) {
        float &at = shared[32 * i + lane];
        const float own = sum[i / 4 / PRODUCTS][i / 4 % PRODUCTS][i % 4];
        at = w ? at + own : own;
      }
    }
    __syncthreads();
  }
}

// What `gather` left of an output of the ring and a token.
DEVICE float gathered(const float *shared, int output, int token) {
  const int product = token / 8 * PRODUCTS + output % RUN / 2, i = output % 2 * 2 + token % 2;
  return shared[32 * (4 * product + i) + output / RUN * 4 + token % 8 / 2];
}

// Scales [N] of outputs and [M] of rows, and what else becomes of a sum.
struct Ending {
  const float *scales, *rows;
  const u16 *bias;
  u16 *y;
  int N, block;

  // Eight outputs of a token from `n` on; all lanes of a warp have neighbouring ones. block 0: no rotation.
  template <bool BF16>
  DEVICE void store(float (&v)[8], int n, int token) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = n < N ? v[i] * scales[n + i] * (rows[token] * 0.0078125f) : 0.f;
    if (block) {
      mix(v, block);
      give_signs(v, OUTPUTS, n, block);
    }
    if (n >= N) return;
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (bias) v[i] += widen<BF16>(bias[n + i]);
    store8<BF16>(y + (u64)token * N + n, v);
  }
};

// Grid: (rings, slices). x [M, K], K a multiple of 32. `partial`: fp32 [slices, M, 256 * rings]; `counters`: one a ring, 0.
template <class V>
DEVICE void trellis_linear(const u32 *words, const u16 *x, Ending out, float *partial, u32 *counters, int M, int K) {
  SHARED(shared);
  float *sums = (float *)shared;
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), slices = gridDim.y, units = K / STEP;
  const int slice = (units + slices - 1) / slices, share = (slice + WARPS - 1) / WARPS;
  const int begin = blockIdx.y * slice + warp * share;
  const int end = min(min(begin + share, (int)(blockIdx.y + 1) * slice), units);
  let_next_start();

  words += ((u64)blockIdx.x * units + begin) * (32 * V::WORDS) + 4 * lane;
  u32 now[V::WORDS], ahead[V::AHEAD ? V::WORDS : 1];
  if (begin < end) V::fetch(now, words);
  float sum[V::TILES][PRODUCTS][4] = {};
  const u16 *at[V::TILES];
#pragma unroll
  for (int j = 0; j < V::TILES; j++)  // columns past M repeat the last and are not stored
    at[j] = x + (u64)min(8 * j + lane / 4, M - 1) * K + begin * STEP + lane % 4 * 8;
  wait_for_previous();
  for (int u = begin; u < end; u++) {
    words += 32 * V::WORDS;
    if constexpr (V::AHEAD)
      if (u + 1 < end) V::fetch(ahead, words);
    Quad tokens[V::TILES];
#pragma unroll
    for (int j = 0; j < V::TILES; j++) tokens[j] = load4(at[j]), at[j] += STEP;
    multiply<V>(sum, now, tokens);
    if constexpr (V::AHEAD) {
#pragma unroll
      for (int i = 0; i < V::WORDS; i++) now[i] = ahead[i];
    } else if (u + 1 < end) {
      V::fetch(now, words);
    }
  }
  gather<V>(sums, sum, warp, lane);

  const int first = 8 * lane, n = blockIdx.x * RING + first;
  auto part = [&](int slice, int token) { return partial + (((u64)slice * M + token) * gridDim.x + blockIdx.x) * RING + first; };
  float v[8];
  for (int token = warp; token < M; token += WARPS) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = gathered(sums, first + i, token);
    if (slices == 1) out.template store<V::BF16>(v, n, token);
    else store8_32(part(blockIdx.y, token), v);
  }
  if (slices == 1 || !is_last(counters + blockIdx.x, slices)) return;
  for (int token = warp; token < M; token += WARPS) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = 0.f;
    for (int s = 0; s < slices; s++)
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] += load_shared_result(part(s, token) + i);
    out.template store<V::BF16>(v, n, token);
  }
}

#ifdef V_HALVES
KERNEL void __launch_bounds__(THREADS, V_TILES == 1 && V_HALVES < 6 ? 2 : 1)
trellis_linear_kernel(const u32 *words, const float *scales, const u16 *x, const float *rows, u16 *y, const u16 *bias,
                      float *partial, u32 *counters, int M, int N, int K, int block) {
  trellis_linear<Coded<V_HALVES, V_SIZE, V_BF16, V_TILES>>(words, x, Ending{scales, rows, bias, y, N, block}, partial, counters, M, K);
}
#endif
