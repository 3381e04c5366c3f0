// What an instruction set must provide, as one table. The tiers agree to the bit.
#pragma once

#include <cstdint>
#include <limits>

#include "panels.hpp"

namespace subbyte {

constexpr int kMaxSmall = 8;  // columns that `small` takes at once
constexpr int kMaxTile = 16;  // no tier's tile has more columns
constexpr int kRowStep = 16;  // floats of the widest vector

// Whether loops over weights ask for them a few kilobytes before they read them.
extern const bool reads_ahead;

// How a block's integer sums become values: (factor * sum - excess) * (scale * row_scale) + (bias +
// plus), moved into [low, high]; NaN stays. bias and plus may be null.
struct Scaling {
  int factor;                  // 1 or 2
  const std::int32_t* excess;  // [32]
  const float* scale;          // of column c: scale[c * scale_step]
  std::int64_t scale_step;     // 0 or 1
  const float* row_scale;      // [32]
  const float* bias;           // [32]
  const float* plus;           // of column c: [32] at plus + c * plus_step; may be the result
  std::int64_t plus_step;
  float low, high;
  std::int64_t rows = kBlockRows;  // the first so many; `whole_rows` of those that there are
};

// As many rows as whole vectors have.
constexpr std::int64_t whole_rows(std::int64_t rows) {
  return (rows + kRowStep - 1) / kRowStep * kRowStep;
}

// What becomes of a layer's products: y = min(max(product + bias + plus, low), high); NaN stays.
struct Finish {
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float* bias = nullptr;  // [rows], or null
  const float* plus = nullptr;  // as y lies in memory, or null
  float low = -kInfinity, high = kInfinity;
};

// The scale of activations that stay in 8 bits between layers, known before they are computed:
// x = scale * (byte - zero). zero: 0, for bytes 0..255, or 128, for 1..255.
struct ByteScale {
  float scale = 0.0f;
  std::uint8_t zero = 0;

  float low() const { return zero ? -127.0f : 0.0f; }  // of byte - zero
  float high() const { return zero ? 127.0f : 255.0f; }
};

// How sums become bytes: round(sum * scale[r] + bias[r] + (plus - plus_zero) * plus_scale), ties to
// even, moved into [low, high] (NaN to low), plus zero. plus may be null.
struct Rounding {
  const float *scale, *bias;  // of each row
  const std::uint8_t* plus;   // of column c at plus + c * plus_step
  std::int64_t plus_step;
  float plus_scale;
  int plus_zero;
  float low, high;
  int zero;
};

// Where the 4-byte groups of a column lie, relative to its pointer: runs of consecutive ones.
struct Runs {
  int count;
  const std::int64_t* offset;  // bytes
  const std::int32_t* length;  // groups of 4 bytes
};

// Where the values and the weights of a window lie, relative to their pointers.
struct Taps {
  int count;
  const std::int64_t *x, *weights;
};

struct Kernels {
  const char* name;
  std::uint8_t flip;  // tiles take q ^ flip: 0x80 where the dot product wants unsigned activations
  int tile;           // columns of a tile
  bool tables;        // has the packings that need tables of 128 (`packing_of`)

  // The bits of the largest magnitude: floats of one sign order as integers do, infinity and NaN
  // on top.
  std::int32_t (*peak)(const float* x, std::int64_t n);
  // q = round(x * inverse) ^ flip, ties to even, for products within -127..127.
  void (*round)(const float* x, std::int64_t n, float inverse, std::uint8_t flip, std::int8_t* q);
  std::int32_t (*sum)(const std::int8_t* q, std::int64_t n);

  // Codes times q, decoded in registers. x: n columns of panel.groups() * group bytes, n at most
  // kMaxSmall; sums: [n][32].
  void (*small)(const Panel& panel, std::int64_t block, const std::int8_t* const* x, int n,
                std::int32_t* sums);

  // Codes times q where weights of a row share scales: the sums of factor * code - center times q,
  // each times its scale, added up in their order in float32. excess: of column c at excess[c],
  // center times the sum of q for each scale; values: [n][32].
  void (*small_groups)(const Panel& panel, std::int64_t block, const std::int8_t* const* x, int n,
                       const std::int32_t* const* excess, float* values);

  // A block of factor * code - center as [groups * group / 4][32 rows][4], 0 where there is
  // padding.
  void (*decode)(const Panel& panel, std::int64_t block, std::int8_t* out);

  // Decoded weights times q ^ flip for `tile` columns; sums: [tile][32], the first `rows` of each
  // at least. With a flip of 0x80 they are too large by 128 times the sum of the row's weights.
  void (*multiply)(const std::int8_t* weights, int max_abs, std::int64_t rows, const Runs& runs,
                   const std::uint8_t* const* x, std::int32_t* sums);

  // The same of n columns, at most `tile`, as bytes: sums less excess [32] as `rounding` says,
  // those of column c at y + c * step; whole vectors of rows.
  void (*multiply_bytes)(const std::int8_t* weights, int max_abs, std::int64_t rows,
                         const Runs& runs, const std::uint8_t* const* x, std::int64_t n,
                         const std::int32_t* excess, const Rounding& rounding, std::uint8_t* y,
                         std::int64_t step);

  // What products with q ^ flip have too much for each scale of a row, [scales][32].
  void (*excess)(const Panel& panel, const std::int8_t* decoded, std::int32_t* out);
  // `multiply` where weights of a row share scales: as `small_groups`, of `tile` columns.
  void (*multiply_groups)(const Panel& panel, std::int64_t block, const std::int8_t* decoded,
                          const std::int32_t* excess, const std::uint8_t* const* x, float* values);

  // The same block as float32 [k][32 rows], without its padding; times its scales if weights of a
  // row share them.
  void (*widen)(const Panel& panel, std::int64_t block, const std::int8_t* decoded, float* out);
  // And its products with n float32 columns, n at most `tile`; offsets of runs in bytes, lengths in
  // floats.
  void (*multiply_float)(const float* weights, std::int64_t rows, const Runs& runs, std::int64_t n,
                         const std::uint8_t* const* x, float* sums);

  // sums [n][32] as values [n][scaling.rows]: those of column c at y + c * step.
  void (*values)(const std::int32_t* sums, std::int64_t n, const Scaling& scaling, float* y,
                 std::int64_t step);
  // The same for sums in float32, which have no factor and no excess.
  void (*values_float)(const float* sums, std::int64_t n, const Scaling& scaling, float* y,
                       std::int64_t step);

  // In float32: the sum over taps, one after another, of weights[t + c] * x[t + c], finished, for c
  // < channels and for n pixels, which lie `step` values of x apart.
  void (*pixels)(const Taps& taps, const float* x, std::int64_t step, const float* weights,
                 std::int64_t channels, std::int64_t n, const Finish& finish, float* y);
  // The same of bytes: sums of weights[t + c] * (x[t + c] - zero) as bytes, in int16 if `narrow`,
  // where no sum leaves it.
  void (*pixels_bytes)(const Taps& taps, const std::uint8_t* x, std::int64_t step, int zero,
                       const std::int16_t* weights, std::int64_t channels, std::int64_t n,
                       bool narrow, const Rounding& rounding, std::uint8_t* y);
  // The sums of `pixels` as weights[t] * x[t + i] for i < n, a multiple of kRowStep. There is one
  // bias, and no finish.plus.
  void (*row)(const Taps& taps, const float* x, const float* weights, std::int64_t n,
              const Finish& finish, float* y);
};

// Null where the tier is not compiled in or this CPU lacks it.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512vbmi_kernels();
const Kernels* neon_kernels();

}  // namespace subbyte
