// What a stored matrix puts out, as the rotated one does: y = S H y' (+ bias), blocks of `block`, a power of two that divides N.
//
// Blocks of outputs may be smaller than eight, where N is no multiple of it; but they never lie across two rows. So rows are
// taken as one line of M * N numbers, eight a thread, and only the bias need know where a row begins.
//
// One variant a compilation: -DV_BF16= (of y and the bias) -DV_WIDE= (1: y' in fp32, 0: in the dtype of y).
#include "turn.cuh"

// Grid: (M * N / 2048 rounded up, 1).
template <bool BF16, bool WIDE>
DEVICE void turn_outputs(const void *from, const u16 *bias, u16 *y, int M, int N, int block) {
  const u64 at = ((u64)blockIdx.x * THREADS + threadIdx.x) * 8, count = (u64)M * N;
  const int left = at < count ? (int)(count - at < 8 ? count - at : 8) : 0;
  float v[8];
  let_next_start();
  wait_for_previous();
  if constexpr (WIDE) {
    const float *wide = (const float *)from + at;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < left ? wide[i] : 0.f;
  } else {
    load8<BF16>(v, (const u16 *)from + at, left, true);
  }
  mix(v, block);
  give_signs(v, OUTPUTS, (int)(at & (block - 1)), block);
  if (bias) {
    u32 n = (u32)(at % N);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < left) v[i] += widen<BF16>(bias[n]);
      if (++n == (u32)N) n = 0;
    }
  }
  store8_16<BF16>(y + at, v, left, true);
}

#ifdef V_BF16
KERNEL void __launch_bounds__(THREADS)
turn_outputs_kernel(const void *from, const u16 *bias, u16 *y, int M, int N, int block) {
  turn_outputs<V_BF16, V_WIDE>(from, bias, y, M, N, block);
}
#endif
