// C [rows, K] from its trellis code, to the bits of the format: value * a * t in fp32, in this order, rounded once. For products
// with many rows of x, and for gradients.
//
// A warp takes a unit, 256 outputs x 32 inputs, and a lane writes eight inputs of an output at a time, 16 bytes in a row of four
// lanes. Steps a are 1 at most and scales t make up for it, by powers of two: no bit is changed by that.
//
// One variant a compilation: -DV_HALVES= -DV_SIZE= -DV_OUT= (0: fp16, 1: bf16, 2: fp32).
#include "trellis.cuh"

template <int OUT>
DEVICE void store_row(char *to, const float (&v)[8], int left, bool aligned) {
  if (aligned) {
    if constexpr (OUT == 2) store8_32((float *)to, v);
    else store8<OUT == 1>((u16 *)to, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < left) {
      if constexpr (OUT == 2) ((float *)to)[i] = v[i];
      else ((u16 *)to)[i] = (u16)round2<OUT == 1>(v[i], 0.f);
    }
}

// Grid: (units / WARPS rounded up, rings). `words`, `scales` and `out` begin at the first ring; rows: of `out`.
template <class V, int OUT>
DEVICE void trellis_dequantize(const u32 *words, const float *step, const float *scales, char *out, int rows, int K) {
  const int lane = threadIdx.x % 32, units = (K + STEP - 1) / STEP, u = blockIdx.x * WARPS + threadIdx.x / 32;
  if (u >= units) return;
  const int n = blockIdx.y * RING + lane / 4 * RUN, k = u * STEP + lane % 4 * 8;
  u32 w[V::WORDS], streams[8][V::LENGTH];
  V::fetch(w, words + ((u64)blockIdx.y * units + u) * (32 * V::WORDS) + 4 * lane);
#pragma unroll
  for (int j = 0; j < 8; j++) V::stream(streams[j], w, j);
  float a[8], v[8];
#pragma unroll
  for (int j = 0; j < 8; j++) a[j] = k + j < K ? step[k + j] : 0.f;
  let_next_start();
  wait_for_previous();
#pragma unroll
  for (int o = 0; o < RUN; o++) {
    if (n + o >= rows || k >= K) continue;
    const float t = scales[n + o];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = __fmul_rn(__fmul_rn(V::value(streams[j], o), a[j]), t);
    store_row<OUT>(out + ((u64)(n + o) * K + k) * (OUT == 2 ? 4 : 2), v, K - k, K % 8 == 0);
  }
}

#ifdef V_HALVES
KERNEL void __launch_bounds__(THREADS)
trellis_dequantize_kernel(const u32 *words, const float *step, const float *scales, char *out, int rows, int K) {
  trellis_dequantize<Trellis<V_HALVES, V_SIZE>, V_OUT>(words, step, scales, out, rows, K);
}
#endif
