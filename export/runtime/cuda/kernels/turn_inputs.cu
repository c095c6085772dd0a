// Activations as a stored matrix takes them: x' = a * (H S x), of which H S is the rotation of inputs (blocks of 1: none) and
// a [K] the steps of inputs that have them, 1 at most (null: none). In fp32, rounded once.
//
// Without SCALED x' has the dtype of x: what packed_linear.cu multiplies. With it x' is fp16 whatever x is, each row times a
// power of two that brings it near the top of what fp16 holds: no number can overflow, since |H x| is at most sqrt(block) times
// the largest of x, and what lies 2^-20 below the largest is still rounded to 11 bits, where bf16 has 8. The values of a trellis
// code are whole in fp16 and not in bf16. `scale` [M] is what a row's results are to be multiplied by. Rows are padded with
// zeros, from K to P.
//
// A block of threads takes 2048 inputs of a row. The largest of the row is found by each of the row's blocks anew: that is one
// pass over some kilobytes that lie in L2, and takes no second launch.
//
// One variant a compilation: -DV_BF16= (of x) -DV_SCALED=
#include "turn.cuh"

// The largest magnitude in a row, for all threads. A NaN is passed over: it comes out of the product.
template <bool BF16>
DEVICE float largest_of(const u16 *x, int K, bool aligned) {
  SHARED(shared);  // WARPS floats
  float most = 0.f, v[8];
  for (int k = 8 * threadIdx.x; k < K; k += 8 * THREADS) {
    load8<BF16>(v, x + k, K - k, aligned);
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(v[i]));
  }
#pragma unroll
  for (int by = 16; by; by /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, by));
  if (threadIdx.x % 32 == 0) ((float *)shared)[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; w++) most = fmaxf(most, ((float *)shared)[w]);
  return most;
}

// The exponent, as fp32 stores it, of the power of two that takes numbers up to sqrt(block) * most below 2^15.
DEVICE u32 exponent_for(float most, int block) {
  int growth = 0;
  for (int b = 1; b < block; b *= 4) growth++;  // sqrt(block) <= 2^growth
  return min(253, 268 - (int)(__float_as_uint(most) >> 23) - growth);
}

// Grid: (M, P / 2048 rounded up). x [M, K], out [M, P].
template <bool BF16, bool SCALED>
DEVICE void turn_inputs(const u16 *x, const float *step, u16 *out, float *scale, int K, int P, int block) {
  const bool aligned = K % 8 == 0;
  const int row = blockIdx.x, k = blockIdx.y * 8 * THREADS + 8 * threadIdx.x;
  let_next_start();
  wait_for_previous();
  x += (u64)row * K;
  float by = 1.f, v[8];
  if constexpr (SCALED) {
    u32 exponent = exponent_for(largest_of<BF16>(x, K, aligned), block);
    by = __uint_as_float(exponent << 23);
    if (k == 0) scale[row] = __uint_as_float((254 - exponent) << 23);
  }
  load8<BF16>(v, x + k, K - k, aligned);
  if (block > 1) give_signs(v, INPUTS, k, block);
  mix(v, block);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= step && k + i < K ? step[k + i] * by : by;
  store8_16<BF16 && !SCALED>(out + (u64)row * P + k, v, P - k, P % 8 == 0);
}

#ifdef V_BF16
KERNEL void __launch_bounds__(THREADS)
turn_inputs_kernel(const u16 *x, const float *step, u16 *out, float *scale, int K, int P, int block) {
  turn_inputs<V_BF16, V_SCALED>(x, step, out, scale, K, P, block);
}
#endif
