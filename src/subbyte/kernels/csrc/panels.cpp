#include "panels.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "radix.hpp"
#include "sizes.hpp"

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

void check(const RadixCodes& codes, std::int64_t first_row, std::int64_t rows,
           std::int64_t row_length, const std::vector<std::int32_t>& order) {
  check_radix(codes.levels, codes.digits);
  require(codes.bytes % 8 == 0, "words are 8 bytes each");
  require(first_row >= 0 && rows >= 1 && row_length >= 1, "a panel needs rows, and rows weights");
  const std::int64_t stored = product({static_cast<std::int64_t>(codes.bytes / 8), codes.digits});
  require(first_row <= stored - rows && product({first_row + rows, row_length}) <= stored,
          "rows reach past the end of the words");
  require(!order.empty() && order.size() < std::size_t{1} << 31, "order is empty or too long");
  for (const std::int32_t from : order)
    require(from >= -1 && from < row_length, "order points outside of a row");
}

}  // namespace

int largest(Affine affine, std::int64_t levels) {
  require(affine.factor == 1 || affine.factor == 2, "factor must be 1 or 2");
  const std::int64_t center = affine.center, top = affine.factor * (levels - 1) - center;
  const std::int64_t most = std::max(std::abs(center), std::abs(top));
  require(most <= 127, "a weight's integers must be -127 to 127");
  return static_cast<int>(most);
}

namespace {

// Everything but the scales and the packed codes. rows: of the weight; length: of a sum.
Panel empty_panel(std::int64_t rows, const std::vector<std::int32_t>& order, Affine affine,
                  int levels, Packing packing, std::int64_t length) {
  Panel panel;
  panel.rows = rows;
  panel.k = static_cast<std::int64_t>(order.size());
  panel.packing = packing;
  panel.affine = affine;
  panel.max_abs = largest(affine, levels);
  require(product({affine.factor, std::max(panel.max_abs, panel.traits().max_digit), 255, length}) <
              std::int64_t{1} << 31,
          "rows are too long for 32-bit sums");
  for (std::size_t i = 0; i < order.size(); ++i)
    if (order[i] < 0) panel.padding.push_back(static_cast<std::int32_t>(i));
  return panel;
}

// scale: [rows][scales of a row].
void take_scales(const float* scale, Panel& panel) {
  const std::int64_t count = panel.scales_of_row();
  panel.scale.resize(panel.blocks() * count * kBlockRows);
  for (std::int64_t r = 0; r < panel.rows; ++r)
    for (std::int64_t s = 0; s < count; ++s, ++scale) {
      panel.scale[(r / kBlockRows * count + s) * kBlockRows + r % kBlockRows] = *scale;
      panel.max_scale = std::max(panel.max_scale, std::abs(*scale));
    }
}

// Whether a scale is a float16 that is 0 or normal: its bits are then those of its float32,
// shifted.
bool is_half(float scale) {
  std::uint32_t bits;
  std::memcpy(&bits, &scale, 4);
  return !bits || (!(bits & 0x80001FFF) && bits >= 113u << 23 && bits < 143u << 23);
}

void shrink_scales(Panel& panel) {
  if (!std::all_of(panel.scale.begin(), panel.scale.end(), is_half)) return;
  for (const float scale : panel.scale) {
    std::uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    panel.half.push_back(static_cast<std::uint16_t>(bits ? (bits - (112u << 23)) >> 13 : 0));
  }
  panel.scale = {};
}

void take_codes(const RadixCodes& codes, std::int64_t first_row, std::int64_t row_length,
                const std::vector<std::int32_t>& order, Panel& panel) {
  const Affine affine = panel.affine;
  panel.excess_of_flip.resize(panel.blocks() * kBlockRows);
  panel.data = Buffer(panel.blocks() * panel.block_bytes());
  std::vector<std::uint8_t> scratch(kBlockRows * row_length);
  for (std::int64_t b = 0; b < panel.blocks(); ++b) {
    const std::int64_t n = std::min<std::int64_t>(kBlockRows, panel.rows - b * kBlockRows);
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
}

// The k of a row whose every `shared` weights take `span`.
std::vector<std::int32_t> spaced(std::int64_t row_length, std::int64_t shared, std::int64_t span) {
  std::vector<std::int32_t> order;
  for (std::int64_t i = 0; i < row_length; ++i) {
    if (i && i % shared == 0) order.resize(i / shared * span, -1);
    order.push_back(static_cast<std::int32_t>(i));
  }
  return order;
}

}  // namespace

Panel make_panel(const RadixCodes& codes, std::int64_t first_row, std::int64_t rows,
                 std::int64_t row_length, const std::vector<std::int32_t>& order,
                 const float* scale, Affine affine, bool tables) {
  check(codes, first_row, rows, row_length, order);
  const int levels = static_cast<int>(codes.levels);
  Panel panel = empty_panel(rows, order, affine, levels, packing_of(levels, tables), order.size());
  take_scales(scale, panel);
  take_codes(codes, first_row, row_length, order, panel);
  return panel;
}

Panel make_panel_of_groups(const RadixCodes& codes, std::int64_t rows, std::int64_t row_length,
                           std::int64_t shared, const float* scale, float unit, Affine affine,
                           bool tables) {
  require(shared >= 4 && shared % 4 == 0, "weights share a scale by a multiple of 4");
  check(codes, 0, rows, row_length, {0});
  const int levels = static_cast<int>(codes.levels);
  shared = std::min(shared, (row_length + 3) / 4 * 4);
  const Packing packing = packing_of(levels, tables, shared);
  const std::int64_t group = traits(packing).group(), span = (shared + group - 1) / group * group;
  const std::vector<std::int32_t> order = spaced(row_length, shared, span);
  check(codes, 0, rows, row_length, order);
  Panel panel = empty_panel(rows, order, affine, levels, packing, span);
  panel.shared = shared;
  panel.unit = unit;
  take_scales(scale, panel);
  shrink_scales(panel);
  take_codes(codes, 0, row_length, order, panel);
  return panel;
}

}  // namespace subbyte
