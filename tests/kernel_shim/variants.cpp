// The kernels for a CPU, in the variants that variants.inc lists, which the test writes. Each function takes a grid, the order of
// its blocks (0: as launched) and the pointers to arguments that a driver would be given, and returns the number of accesses that
// were not allowed.
#define EMULATE
#include "packed_linear.cu"
#include "dequantize.cu"
#include "low_rank.cu"
#include "turn_inputs.cu"
#include "turn_outputs.cu"
#include "trellis_linear.cu"
#include "trellis_dequantize.cu"

template <class T>
T arg(void **p, int i) { return *(T *)p[i]; }

#define LINEAR(bits, bf16, group, zero, table, tiles)                                                                            \
  extern "C" int packed_linear_##bits##_##bf16##_##group##_##zero##_##table##_##tiles(int x, int y, int seed, void **p) {        \
    return emu::run_grid(x, y, seed, [&] {                                                                                       \
      packed_linear<Variant<bits, bf16, group, zero, table, tiles>>(                                                             \
          arg<const u32 *>(p, 0), arg<const u32 *>(p, 1), arg<const float *>(p, 2), arg<const u16 *>(p, 3),                      \
          Epilogue{arg<void *>(p, 4), arg<const u16 *>(p, 5), arg<const u16 *>(p, 6), arg<const float *>(p, 7), arg<int>(p, 11), \
                   arg<int>(p, 13), arg<int>(p, 14)},                                                                            \
          arg<float *>(p, 8), arg<u32 *>(p, 9), arg<int>(p, 10), arg<int>(p, 12));                                               \
    });                                                                                                                          \
  }
#define DEQUANTIZE(bits, table, out)                                                                                             \
  extern "C" int dequantize_##bits##_##table##_##out(int x, int y, int seed, void **p) {                                         \
    return emu::run_grid(x, y, seed, [&] {                                                                                       \
      dequantize<bits, table, out>(arg<const u32 *>(p, 0), arg<const u32 *>(p, 1), arg<const float *>(p, 2),                     \
                                   arg<const float *>(p, 3), arg<char *>(p, 4), arg<int>(p, 5), arg<int>(p, 6), arg<int>(p, 7),  \
                                   arg<int>(p, 8));                                                                              \
    });                                                                                                                          \
  }
#define LOW_RANK(bf16)                                                                                                           \
  extern "C" int low_rank_##bf16(int x, int y, int seed, void **p) {                                                             \
    return emu::run_grid(x, y, seed, [&] {                                                                                       \
      low_rank<bf16>(arg<const u16 *>(p, 0), arg<const u16 *>(p, 1), arg<float *>(p, 2), arg<int>(p, 3), arg<int>(p, 4));        \
    });                                                                                                                          \
  }
#define TURN_INPUTS(bf16, scaled)                                                                                                \
  extern "C" int turn_inputs_##bf16##_##scaled(int x, int y, int seed, void **p) {                                               \
    return emu::run_grid(x, y, seed, [&] {                                                                                       \
      turn_inputs<bf16, scaled>(arg<const u16 *>(p, 0), arg<const float *>(p, 1), arg<u16 *>(p, 2), arg<float *>(p, 3),          \
                                arg<int>(p, 4), arg<int>(p, 5), arg<int>(p, 6));                                                 \
    });                                                                                                                          \
  }
#define TURN_OUTPUTS(bf16, wide)                                                                                                 \
  extern "C" int turn_outputs_##bf16##_##wide(int x, int y, int seed, void **p) {                                                \
    return emu::run_grid(x, y, seed, [&] {                                                                                       \
      turn_outputs<bf16, wide>(arg<const void *>(p, 0), arg<const u16 *>(p, 1), arg<u16 *>(p, 2), arg<int>(p, 3),                \
                               arg<int>(p, 4), arg<int>(p, 5));                                                                  \
    });                                                                                                                          \
  }
#define TRELLIS_LINEAR(halves, size, bf16, tiles)                                                                                \
  extern "C" int trellis_linear_##halves##_##size##_##bf16##_##tiles(int x, int y, int seed, void **p) {                         \
    return emu::run_grid(x, y, seed, [&] {                                                                                       \
      trellis_linear<Coded<halves, size, bf16, tiles>>(                                                                          \
          arg<const u32 *>(p, 0), arg<const u16 *>(p, 2),                                                                        \
          Ending{arg<const float *>(p, 1), arg<const float *>(p, 3), arg<const u16 *>(p, 5), arg<u16 *>(p, 4), arg<int>(p, 9),   \
                 arg<int>(p, 11)},                                                                                               \
          arg<float *>(p, 6), arg<u32 *>(p, 7), arg<int>(p, 8), arg<int>(p, 10));                                                \
    });                                                                                                                          \
  }
#define TRELLIS_DEQUANTIZE(halves, size, out)                                                                                    \
  extern "C" int trellis_dequantize_##halves##_##size##_##out(int x, int y, int seed, void **p) {                                \
    return emu::run_grid(x, y, seed, [&] {                                                                                       \
      trellis_dequantize<Trellis<halves, size>, out>(arg<const u32 *>(p, 0), arg<const float *>(p, 1), arg<const float *>(p, 2), \
                                                     arg<char *>(p, 3), arg<int>(p, 4), arg<int>(p, 5));                         \
    });                                                                                                                          \
  }
extern "C" void begin(int shared_bytes) { emu::memory.clear(), emu::shared_words = shared_bytes / 4; }
extern "C" void know(const void *at, u64 bytes) { emu::memory.push_back({(uintptr_t)at, (uintptr_t)at + bytes}); }

#include "variants.inc"
