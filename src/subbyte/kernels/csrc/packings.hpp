// How the codes of a weight lie in memory while it is used.
//
// A panel holds kBlockRows rows. Its unit is the group: `vectors` runs of kBlockRows x 4 bytes that
// hold `positions` x 4 consecutive k of every row; byte 4 r + j of a run belongs to row r and to
// k = 4 p + j of the group, for every position p that the run holds. So a run is read as vectors of
// rows x 4 k, the operand of an 8-bit dot product, whatever the width of a vector is.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace subbyte {

constexpr int kBlockRows = 32;
constexpr int kRunBytes = kBlockRows * 4;

enum class Packing : std::uint8_t {
  kBits1,    // 8 positions, a bit each
  kBits2,    // 4 positions
  kBits3,    // 8 positions: the low two bits in two runs, the third in another
  kBits4,    // 2 positions, nibbles
  kBits5,    // 8 positions: nibbles in four runs, the fifth bit in another
  kBits8,    // 1 position
  kQuints3,  // 3 positions of 5 levels: nibbles a + 5 bh and c + 5 bl with b = bh + bl
  // For tiers that look bytes up in tables of 128:
  kTrits5,    // 5 positions of 3 levels: d0 + 3 d1 + 9 d2 + 27 d3 + 84 d4
  kQuints10,  // 10 positions of 5 levels: three times d0 + 5 d1 + 25 d2 in the low 7 bits of a
              // byte, the tenth digit in the three high bits
};

struct Traits {
  int positions, vectors, max_digit;
  constexpr int group() const { return 4 * positions; }  // k of a group
  constexpr double bits() const { return 8.0 * vectors / positions; }
};

constexpr Traits traits(Packing packing) {
  switch (packing) {
    case Packing::kBits1:
      return {8, 1, 1};
    case Packing::kBits2:
      return {4, 1, 3};
    case Packing::kBits3:
      return {8, 3, 7};
    case Packing::kBits4:
      return {2, 1, 15};
    case Packing::kBits5:
      return {8, 5, 16};
    case Packing::kBits8:
      return {1, 1, 255};
    case Packing::kQuints3:
      return {3, 1, 4};
    case Packing::kTrits5:
      return {5, 1, 2};
    case Packing::kQuints10:
      return {10, 3, 4};
  }
  throw std::logic_error("no such packing");
}

constexpr int kMaxPositions = 10;

// The smallest packing of this many levels. tables: for tiers with tables of 128.
inline Packing packing_of(int levels, bool tables) {
  if (tables && levels == 3) return Packing::kTrits5;
  if (tables && levels == 5) return Packing::kQuints10;
  if (levels <= 2) return Packing::kBits1;
  if (levels <= 4) return Packing::kBits2;
  if (levels == 5) return Packing::kQuints3;
  if (levels <= 8) return Packing::kBits3;
  if (levels <= 16) return Packing::kBits4;
  if (levels == 17) return Packing::kBits5;
  return Packing::kBits8;
}

// The packing of the fewest bytes when every `length` k begin a group of their own: what is left of
// their last one is padding.
inline Packing packing_of(int levels, bool tables, std::int64_t length) {
  const auto bytes = [&](Packing packing) {
    const Traits t = traits(packing);
    return (length + t.group() - 1) / t.group() * t.vectors;
  };
  Packing best = packing_of(levels, tables);
  // Wider ones, which are also quicker to take apart.
  for (const int more : {levels, 4, 16, 18})
    if (more >= levels && bytes(packing_of(more, false)) <= bytes(best))
      best = packing_of(more, false);
  return best;
}

// The bytes, one for each run, of one group's digits at one row and one k mod 4.
inline void encode(Packing packing, const std::uint8_t* digit, std::uint8_t* byte) {
  const Traits t = traits(packing);
  for (int v = 0; v < t.vectors; ++v) byte[v] = 0;
  switch (packing) {
    case Packing::kBits1:
      for (int p = 0; p < 8; ++p) byte[0] |= digit[p] << p;
      return;
    case Packing::kBits2:
      for (int p = 0; p < 4; ++p) byte[0] |= digit[p] << (2 * p);
      return;
    case Packing::kBits3:
      for (int p = 0; p < 8; ++p) {
        byte[p / 4] |= (digit[p] & 3) << (2 * (p % 4));
        byte[2] |= (digit[p] >> 2) << p;
      }
      return;
    case Packing::kBits4:
      byte[0] = digit[0] | digit[1] << 4;
      return;
    case Packing::kBits5:
      for (int p = 0; p < 8; ++p) {
        byte[p / 2] |= (digit[p] & 15) << (4 * (p % 2));
        byte[4] |= (digit[p] >> 4) << p;
      }
      return;
    case Packing::kBits8:
      byte[0] = digit[0];
      return;
    case Packing::kQuints3: {
      const int high = digit[1] / 2, low = digit[1] - high;  // each 0 to 2
      byte[0] = static_cast<std::uint8_t>((digit[0] + 5 * high) << 4 | (digit[2] + 5 * low));
      return;
    }
    case Packing::kTrits5:
      byte[0] = static_cast<std::uint8_t>(digit[0] + 3 * digit[1] + 9 * digit[2] + 27 * digit[3] +
                                          84 * digit[4]);
      return;
    case Packing::kQuints10:
      for (int v = 0; v < 3; ++v, digit += 3)
        byte[v] = static_cast<std::uint8_t>(digit[0] + 5 * digit[1] + 25 * digit[2]);
      for (int v = 0; v < 3; ++v) byte[v] |= (*digit >> v & 1) << 7;
      return;
  }
}

}  // namespace subbyte
