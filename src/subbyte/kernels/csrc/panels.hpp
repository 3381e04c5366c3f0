// A weight repacked for the kernels, and what turns integer sums back into values.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory.hpp"
#include "packings.hpp"

namespace subbyte {

// Codes as they are stored: base-`levels` digits, `digits` to a 64-bit word (docs/format.md).
struct RadixCodes {
  const std::uint8_t* words;
  std::size_t bytes;
  unsigned levels, digits;
};

// A weight is (factor * code - center) * scale with integer factor and center: the grid's levels
// (i + offset) / inverse, with both doubled where offset is half an integer.
struct Affine {
  int factor, center;
};

struct Panel {
  std::int64_t rows = 0;    // output channels
  std::int64_t k = 0;       // weights of a row as the kernels see it, padding included
  std::int64_t shared = 0;  // weights of a row that share a scale; 0: all of them
  Packing packing = Packing::kBits8;
  Affine affine{1, 0};
  std::vector<std::int32_t> padding;         // the k that hold no weight
  std::vector<float> scale;                  // [blocks][scales][32]; of factor * code - center
  std::vector<std::int32_t> excess_of_flip;  // [blocks * 32]; 128 times the sum of a row's integers
  std::vector<std::uint16_t> half;           // the same in float16, if shared scales are such
  float unit = 1.0f;                         // of shared scales, what multiplies all of them
  float max_scale = 0.0f;                    // the largest magnitude of `scale`
  int max_abs = 0;                           // of factor * code - center
  Buffer data;                               // [blocks][groups][vectors][32 rows][4]

  Traits traits() const { return subbyte::traits(packing); }
  std::int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  std::int64_t groups() const { return (k + traits().group() - 1) / traits().group(); }
  std::int64_t block_bytes() const { return groups() * traits().vectors * kRunBytes; }
  std::size_t bytes() const {
    return data.size() + half.size() * sizeof half[0] +
           (shared ? scale.size() : 0) * sizeof scale[0];
  }
  std::int64_t inputs() const { return k - static_cast<std::int64_t>(padding.size()); }

  // Weights that share a scale begin a group of their own: so many k belong to them, padding
  // included. Of one scale a row all do.
  std::int64_t span() const {
    const std::int64_t group = traits().group();
    return shared ? (shared + group - 1) / group * group : groups() * group;
  }
  std::int64_t scales_of_row() const { return (k + span() - 1) / span(); }

  // Whether a tier with these tables, or none, can read it.
  bool readable(bool tables) const {
    return tables || (packing != Packing::kTrits5 && packing != Packing::kQuints10);
  }

  // Whether the product of an activation's scale with those of the rows is finite, and sums are
  // that are scaled by the weights' alone.
  bool scales(float activation) const {
    if (!shared) return std::isfinite(activation * max_scale);
    const float most = 2.0f * 127.0f * static_cast<float>(max_abs) * static_cast<float>(k);
    return std::isfinite(activation * unit) && std::isfinite(most * max_scale);
  }

  // What sums [32] over q ^ flip have too much.
  const std::int32_t* excess(std::uint8_t flip, std::int64_t block) const {
    static constexpr std::int32_t kNothing[kBlockRows] = {};
    return flip ? excess_of_flip.data() + block * kBlockRows : kNothing;
  }
};

// The largest magnitude of a weight's integer, of so many levels. Throws std::invalid_argument if
// it does not fit in a signed byte, or if the factor is neither 1 nor 2.
int largest(Affine affine, std::int64_t levels);

// rows x order.size() of the weight as a panel. order[i]: where in a row of the stored weight k = i
// comes from, -1 for padding. row_length: weights of a stored row; first_row: the first one taken;
// scale: [rows]; tables: of the tier that will use it (`Kernels`). Throws std::invalid_argument for
// sizes that do not fit together, codes above the grid, and sums that could leave 32 bits.
Panel make_panel(const RadixCodes& codes, std::int64_t first_row, std::int64_t rows,
                 std::int64_t row_length, const std::vector<std::int32_t>& order,
                 const float* scale, Affine affine, bool tables);

// The same of whole stored rows in their order, with a scale for every `shared` weights of a row
// (the last may have fewer); scale: [rows][scales of a row], in units of `unit`.
Panel make_panel_of_groups(const RadixCodes& codes, std::int64_t rows, std::int64_t row_length,
                           std::int64_t shared, const float* scale, float unit, Affine affine,
                           bool tables);

}  // namespace subbyte
