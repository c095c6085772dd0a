// Rotations of activations: y = H S x and y = S H x by blocks, H a Hadamard matrix over the square root of its side, S signs.
//
// A warp holds 256 neighbouring numbers, eight a lane, so the largest block is a warp's and every block lies in one. Three of the
// eight steps of its butterflies stay in a lane's registers, five are exchanges between lanes: 8 additions a number and no memory.
// The alternative, a product with a small matrix on tensor cores, would round what it multiplies to 16 bits, or split it; these
// launches last as long as it takes to start them, so there is nothing to win.
//
// Which place of a block has which sign is a hash of the place, so nothing is read for it: signs() in formats/rotated.py.
#pragma once
#include "tile.cuh"

enum Side { INPUTS, OUTPUTS };

DEVICE float sign_of(Side side, int place) {
  u32 x = place + 1;
#pragma unroll
  for (int i = 0; i < 2; i++) x = (x >> 16 ^ x) * 0x45D9F3Bu;
  return (x >> 16 ^ x) >> side & 1 ? -1.f : 1.f;
}

// v = S v, of which v[0] has this place in its row
DEVICE void give_signs(float (&v)[8], Side side, int place, int block) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= sign_of(side, (place + i) & (block - 1));
}

// v = H v for blocks of a power of two, up to 256; 1: nothing. All lanes of a warp.
DEVICE void mix(float (&v)[8], int block) {
  int steps = 0;
#pragma unroll
  for (int half = 1; half < 8; half *= 2) {
    if (half >= block) break;
    steps++;
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (!(i & half)) {
        float low = v[i], high = v[i + half];
        v[i] = low + high, v[i + half] = low - high;
      }
  }
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    if (8 * by >= block) break;
    steps++;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float other = __shfl_xor_sync(0xFFFFFFFFu, v[i], by);
      v[i] = threadIdx.x & by ? other - v[i] : v[i] + other;
    }
  }
  float norm = __uint_as_float((u32)(127 - steps / 2) << 23) * (steps & 1 ? 0.70710678f : 1.f);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= norm;
}

// Eight 16-bit floats, of which the first `left` are there; the rest is 0.
template <bool BF16>
DEVICE void load8(float (&v)[8], const u16 *from, int left, bool aligned) {
  if (aligned && left >= 8) {
    Quad q = load4(from);
    const u32 pairs[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = widen<BF16>((u16)(pairs[i / 2] >> 16 * (i % 2)));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < left ? widen<BF16>(from[i]) : 0.f;
  }
}

template <bool BF16>
DEVICE void store8_16(u16 *to, const float (&v)[8], int left, bool aligned) {
  if (aligned && left >= 8) {
    store8<BF16>(to, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < left) to[i] = (u16)round2<BF16>(v[i], 0.f);
  }
}
