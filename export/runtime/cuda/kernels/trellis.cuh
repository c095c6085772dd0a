// How a trellis code lies for the kernels, and how it becomes numbers.
//
// A RING is 256 outputs of one input (formats/trellis.py), a UNIT the rings of 32 inputs over the same outputs. Lane 4g+t of a
// warp holds outputs 32g..32g+31 of inputs 8t..8t+7: eight STREAMS of 16 * HALVES bits, which are 4 * HALVES words, whatever the
// rate is: HALVES vectors of 16 bytes, stored [vector][lane][4]. In memory: [ring][unit][128 * HALVES words]. What a shorter last
// ring lacks begins with its first word again; inputs are padded to 32 with zeros.
//
// The lane's words are its streams one after the other where HALVES is even. Where it is odd a stream ends in half a word, and
// those of inputs 2i and 2i+1 share theirs: HALVES / 2 words of the one, its last half beside the other's, and as many of that.
//
// A STATE is the SIZE bits from where its output's own begin. All shifts are known to the compiler. Only the last few states of a
// stream reach over its end, into the first word of the next lane's, which is fetched once for 32 weights; and the last lane's
// into the first one's, for that is what a ring is.
#pragma once
#include "tile.cuh"

constexpr int RING = 256, RUN = 32;  // outputs of a ring, and of a lane
constexpr int STEP = 32;             // inputs of a unit

template <int HALVES, int SIZE>
struct Trellis {
  static constexpr int WORDS = 4 * HALVES;      // of a lane and unit
  static constexpr int WHOLE = HALVES / 2;      // words of a stream
  static constexpr bool SHARES = HALVES % 2;    // and half of one
  static constexpr int LENGTH = WHOLE + 1;      // with what follows
  static constexpr u32 MASK = (1u << SIZE) - 1;

  static DEVICE void fetch(u32 *to, const u32 *mine) {
#pragma unroll
    for (int i = 0; i < HALVES; i++) load_once<4>(to + 4 * i, mine + 128 * i);
  }

  // The stream of input `j` of a lane's eight, with the bits that follow. All lanes of a warp.
  static DEVICE void stream(u32 (&to)[LENGTH], const u32 *words, int j) {
    const int first = SHARES ? j / 2 * HALVES + j % 2 * (WHOLE + 1) : j * WHOLE;
#pragma unroll
    for (int i = 0; i < WHOLE; i++) to[i] = words[first + i];
    const u32 next = from_lane(to[0], (threadIdx.x + 4) % 32);
    if constexpr (SHARES) {
      const u32 both = words[j / 2 * HALVES + WHOLE];
      to[WHOLE] = (j % 2 ? both >> 16 : both & 0xFFFFu) | next << 16;
    } else {
      to[WHOLE] = next;
    }
  }

  // x = 0x83DCD12D * state, of output `o` of a stream: the number is the sum of its bytes, less 510, over 128.
  static DEVICE u32 product(const u32 (&stream)[LENGTH], int o) {
    const int at = o / 2 * HALVES + o % 2 * (HALVES / 2), word = at / 32, by = at % 32;
    const u32 window = by + SIZE <= 32 ? stream[word] >> by
                                       : (u32)(((u64)stream[word + 1 < LENGTH ? word + 1 : word] << 32 | stream[word]) >> by);
    return (window & MASK) * 0x83DCD12Du;
  }

  // 128 times the numbers of output `o` of two inputs, as two fp16: whole numbers, exact. A sum of bytes is put in the last places
  // of 1024.0, of which 1534 are taken away.
  static DEVICE u32 pair(const u32 (&low)[LENGTH], const u32 (&high)[LENGTH], int o) {
    const u32 above = sum_bytes(product(high, o), 0x6400u);
    return add2<false>(sum_bytes(product(low, o), (above << 16) + 0x6400u), 0xE5FEE5FEu);
  }

  // The number of output `o`, exact: by way of 2^23.
  static DEVICE float value(const u32 (&stream)[LENGTH], int o) {
    return (__uint_as_float(sum_bytes(product(stream, o), 0x4B000000u)) - 8389118.f) * 0.0078125f;
  }
};
