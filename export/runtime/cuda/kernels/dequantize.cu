// W [rows, K] from its codes, in the arithmetic of the formats' definition and so to the same bits: integers (code - zero) *
// scale and levels table[code] * scale in fp32, rounded once. What was entropy-coded has a step for each input besides, by which
// it is multiplied first (else null). For products with many rows of x, and for gradients.
//
// A warp takes a unit, 16 outputs x 128 inputs. This runs at the speed of its writes, so codes are taken out one by one, and one
// variant serves all groups, tables and output types but for what shapes the layout: the number of bits and whether they index a
// table.
//
// One variant a compilation: -DV_BITS= -DV_TABLE= -DV_OUT= (0: fp16, 1: bf16, 2: fp32).
#include "tile.cuh"

// Grid: (units / WARPS rounded up, row tiles). `words`, `scales` and `out` begin at the first row tile; rows: of `out`. group 0:
// whole row.
template <int BITS, bool TABLE, int OUT>
DEVICE void dequantize(const u32 *words, const u32 *scales, const float *levels, const float *step, char *out, int rows,
                       int K, int group, bool zeros) {
  const int lane = threadIdx.x % 32, g = lane / 4, units = (K + UNIT - 1) / UNIT, u = blockIdx.x * WARPS + threadIdx.x / 32;
  if (u >= units) return;
  const int count = group == 0 || group >= UNIT ? 1 : UNIT / group;  // groups in a unit
  const int block = group == 0 ? 0 : group <= UNIT ? u : u / (group / UNIT);
  const int blocks = group == 0 ? 1 : group <= UNIT ? units : (units - 1) / (group / UNIT) + 1;
  u32 w[2 * BITS];
  words += ((u64)blockIdx.y * units + u) * (64 * BITS);
  fetch_words<BITS>(w, words + 4 * lane, words + 128 + 2 * lane);
  const u32 *s = scales + (((u64)blockIdx.y * blocks + block) * 8 + g) * (2 * count);
  let_next_start();
  wait_for_previous();
#pragma unroll
  for (int q = 0; q < 8; q++) {  // eight inputs of one output: tile q/4, half q/2%2, output g or g+8
    const int row = blockIdx.y * 16 + g + 8 * (q % 2), in = q / 2 * 32 + lane % 4 * 8, k = u * UNIT + in;
    if (row >= rows || k >= K) continue;
    const u32 word = s[2 * (count == 1 ? 0 : q / 2 * 32 / group) + q % 2];
    const float scale = __uint_as_float(zeros ? word & 0xFFFFFF00u : word);
    const float zero = zeros ? (float)(word & 0xFFu) : (float)(1u << (BITS - 1));
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u32 c = code<BITS, TABLE>(w + q / 4 * BITS, 8 * (q / 2 % 2) + 4 * (i / 4) + 2 * (i / 2 % 2) + q % 2, i % 2);
      v[i] = TABLE ? levels[c] : (float)c - zero;
      v[i] = (step ? v[i] * step[k + i] : v[i]) * scale;
    }
    char *to = out + ((u64)row * K + k) * (OUT == 2 ? 4 : 2);
    if constexpr (OUT == 2) store8_32((float *)to, v);
    else store8<OUT == 1>((u16 *)to, v);
  }
}

#ifdef V_BITS
KERNEL void __launch_bounds__(THREADS)
dequantize_kernel(const u32 *words, const u32 *scales, const float *levels, const float *step, char *out, int rows, int K,
                  int group, int zeros) {
  dequantize<V_BITS, V_TABLE, V_OUT>(words, scales, levels, step, out, rows, K, group, zeros);
}
#endif
