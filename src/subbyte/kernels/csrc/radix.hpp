// Base-N digits in 64-bit words. No Python, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace subbyte {

// Throws std::invalid_argument unless `levels` is 2 to 256 and `digits` the most of them that fit
// in a word.
void check_radix(unsigned levels, unsigned digits);

// words[i] = sum over k < digits of codes[i * digits + k] * levels^k; codes past `count` are 0.
// `words` has ceil(count / digits) entries. Every code must be below `levels`.
void radix_pack(const std::uint8_t* codes, std::size_t count, unsigned levels, unsigned digits,
                std::uint8_t* words);

// The reverse: writes exactly `count` codes.
void radix_unpack(const std::uint8_t* words, std::size_t count, unsigned levels, unsigned digits,
                  std::uint8_t* codes);

// `count` codes from code `start` on.
void radix_unpack_range(const std::uint8_t* words, std::size_t start, std::size_t count,
                        unsigned levels, unsigned digits, std::uint8_t* codes);

}  // namespace subbyte
