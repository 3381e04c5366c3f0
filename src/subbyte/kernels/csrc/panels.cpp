#include "panels.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "radix.hpp"

namespace subbyte {
namespace {

// One block of rows: codes [rows][row_length] to groups of runs.
void encode_block(const std::uint8_t* codes, std::int64_t rows, std::int64_t row_length,
                  const std::vector<std::int32_t>& order, const Panel& panel, std::uint8_t* out) {
  const Traits t = panel.traits();
  std::uint8_t digit[kMaxPositions], byte[8];
  for (std::int64_t g = 0; g < panel.groups(); ++g, out += t.vectors * kRunBytes) {
    for (int lane = 0; lane < kRunBytes; ++lane) {
      const std::int64_t row = lane / 4;
      for (int p = 0; p < t.positions; ++p) {
        const std::size_t k = static_cast<std::size_t>(g * t.group() + 4 * p + lane % 4);
        const bool real = row < rows && k < order.size() && order[k] >= 0;
        digit[p] = real ? codes[row * row_length + order[k]] : 0;
      }
      encode(panel.packing, digit, byte);
      for (int v = 0; v < t.vectors; ++v) out[v * kRunBytes + lane] = byte[v];
    }
  }
}

}  // namespace

Panel make_panel(const RadixCodes& codes, std::int64_t first_row, std::int64_t rows,
                 std::int64_t row_length, const std::vector<std::int32_t>& order,
                 const float* scale, Affine affine, bool tables) {
  Panel panel;
  panel.rows = rows;
  panel.k = static_cast<std::int64_t>(order.size());
  panel.packing = packing_of(static_cast<int>(codes.levels), tables);
  panel.affine = affine;
  panel.scale.resize(panel.blocks() * kBlockRows);
  std::copy(scale, scale + rows, panel.scale.begin());
  const int top = affine.factor * static_cast<int>(codes.levels - 1) - affine.center;
  panel.max_abs = std::max(std::abs(affine.center), std::abs(top));
  for (std::size_t i = 0; i < order.size(); ++i)
    if (order[i] < 0) panel.padding.push_back(static_cast<std::int32_t>(i));
  panel.excess_of_flip.resize(panel.blocks() * kBlockRows);
  panel.data = Buffer(panel.blocks() * panel.block_bytes());

  std::vector<std::uint8_t> scratch(kBlockRows * row_length);
  for (std::int64_t b = 0; b < panel.blocks(); ++b) {
    const std::int64_t n = std::min<std::int64_t>(kBlockRows, rows - b * kBlockRows);
    const std::size_t start = (first_row + b * kBlockRows) * row_length;
    radix_unpack_range(codes.words, start, n * row_length, codes.levels, codes.digits,
                       scratch.data());
    for (std::int64_t i = 0; i < n * row_length; ++i)
      if (scratch[i] >= codes.levels) throw std::invalid_argument("a code is above the grid");
    for (std::int64_t r = 0; r < n; ++r) {
      std::int64_t sum = 0, count = 0;
      for (const std::int32_t from : order) {
        if (from < 0) continue;
        sum += scratch[r * row_length + from];
        ++count;
      }
      panel.excess_of_flip[b * kBlockRows + r] =
          static_cast<std::int32_t>(128 * (affine.factor * sum - affine.center * count));
    }
    encode_block(scratch.data(), n, row_length, order, panel,
                 panel.data.data() + b * panel.block_bytes());
  }
  return panel;
}

}  // namespace subbyte
