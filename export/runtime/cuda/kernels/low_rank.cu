// t [M, rank] = x A^T in fp32, the first half of a low-rank term B (A x); packed_linear.cu adds the second as it writes y.
//
// A is small (rank 16 of 4096 inputs: 128 KB) and so is the product; what counts is that many SMs share the reading and that the
// order of the sum is the same in any batch. A block takes one row of A and TOKENS rows of x: its threads stride over K eight
// inputs at a time, then warps and block add up in a fixed order. Tensor cores would be idle for want of rows.
//
// One variant a compilation: -DV_BF16=
#include "tile.cuh"

constexpr int TOKENS = 4;  // of a block: as many as keep the sums in registers

DEVICE float sum_of_warp(float v) {
#pragma unroll
  for (int by = 16; by; by /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, by);
  return v;
}

template <bool BF16>
DEVICE void dot8(float &sum, Quad a, Quad b) {
  const u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum = __fmaf_rn(widen<BF16>((u16)left[i]), widen<BF16>((u16)right[i]), sum);
    sum = __fmaf_rn(widen<BF16>((u16)(left[i] >> 16)), widen<BF16>((u16)(right[i] >> 16)), sum);
  }
}

// Grid: (rank, M / TOKENS rounded up). K is a multiple of 8.
template <bool BF16>
DEVICE void low_rank(const u16 *A, const u16 *x, float *t, int M, int K) {
  SHARED(shared);  // WARPS * TOKENS floats
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  let_next_start();
  wait_for_previous();
  float sum[TOKENS] = {};
  for (int k = 8 * threadIdx.x; k < K; k += 8 * THREADS) {
    Quad a = load4(A + (u64)blockIdx.x * K + k);
#pragma unroll
    for (int j = 0; j < TOKENS; j++) {
      int token = blockIdx.y * TOKENS + j;
      dot8<BF16>(sum[j], a, load4(x + (u64)(token < M ? token : M - 1) * K + k));
    }
  }
#pragma unroll
  for (int j = 0; j < TOKENS; j++) {
    float of_warp = sum_of_warp(sum[j]);
    if (lane == 0) ((float *)shared)[warp * TOKENS + j] = of_warp;
  }
  __syncthreads();
  int token = blockIdx.y * TOKENS + threadIdx.x;
  if (threadIdx.x >= TOKENS || token >= M) return;
  float total = 0.f;
  for (int w = 0; w < WARPS; w++) total += ((float *)shared)[w * TOKENS + threadIdx.x];
  t[(u64)token * gridDim.x + blockIdx.x] = total;
}

#ifdef V_BF16
KERNEL void __launch_bounds__(THREADS) low_rank_kernel(const u16 *A, const u16 *x, float *t, int M, int K) {
  low_rank<V_BF16>(A, x, t, M, K);
}
#endif
