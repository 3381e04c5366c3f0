// Plain C++, for any machine; loops over bytes that a compiler can turn into vectors.
#include "tier.hpp"

namespace subbyte {
namespace portable {

struct V {
  static constexpr const char* kName = "portable";
  static constexpr std::uint8_t kFlip = 0x80;
  static constexpr bool kInPlace = false;  // dots take bytes up to 255, exactly
  static constexpr int kBytes = 16, kRegisters = 8, kTileVectors = 2, kTileColumns = 4;
  struct Bytes {
    std::uint8_t at[kBytes];
  };
  struct Sums {
    std::int32_t at[kBytes / 4];
  };

  template <class T>
  static Bytes load(const T* p) {
    Bytes v;
    std::memcpy(v.at, p, kBytes);
    return v;
  }
  static void store(std::int8_t* p, Bytes v) { std::memcpy(p, v.at, kBytes); }
  static void store(std::int32_t* p, Sums v) { std::memcpy(p, v.at, kBytes); }
  template <class F>
  static Bytes map(F f) {
    Bytes v;
    for (int i = 0; i < kBytes; ++i) v.at[i] = static_cast<std::uint8_t>(f(i));
    return v;
  }
  template <class T>
  static Bytes splat(const T* p) {
    return map([&](int i) { return p[i % 4]; });
  }
  static Bytes fill(std::uint8_t value) {
    return map([&](int) { return value; });
  }
  template <int N>
  static Bytes shift_right(Bytes v) {
    return map([&](int i) { return v.at[i] >> N; });
  }
  template <int N>
  static Bytes shift_left(Bytes v) {
    return map([&](int i) { return v.at[i] << N; });
  }
  static Bytes mask(Bytes v, int bits) {
    return map([&](int i) { return v.at[i] & bits; });
  }
  static Bytes either(Bytes a, Bytes b) {
    return map([&](int i) { return a.at[i] | b.at[i]; });
  }
  static Bytes add(Bytes a, Bytes b) {
    return map([&](int i) { return a.at[i] + b.at[i]; });
  }
  static Bytes subtract(Bytes a, Bytes b) {
    return map([&](int i) { return a.at[i] - b.at[i]; });
  }
  static Bytes lookup(const std::uint8_t* table, Bytes index) {
    return map([&](int i) { return table[index.at[i]]; });
  }
  static Sums ints_of_bytes(const std::uint8_t* p) {
    Sums v;
    for (int i = 0; i < kBytes / 4; ++i) v.at[i] = p[i];
    return v;
  }
  static Sums ints_of_shorts(const std::int16_t* p) {
    Sums v;
    for (int i = 0; i < kBytes / 4; ++i) v.at[i] = p[i];
    return v;
  }
  struct Pairs {
    std::int16_t at[kBytes / 2];
  };
  static Pairs shorts_of_bytes(const std::uint8_t* p) {
    Pairs v;
    for (int i = 0; i < kBytes / 2; ++i) v.at[i] = p[i];
    return v;
  }
  static void store_low_bytes(std::uint8_t* p, Sums v) {
    for (int i = 0; i < kBytes / 4; ++i) p[i] = static_cast<std::uint8_t>(v.at[i]);
  }
  static Sums zero() { return {}; }
  template <class Floats>
  static Floats fma(Floats a, Floats b, Floats c) {
    return a * b + c;
  }

  struct Narrow {
    using Part = Sums;
    static Part zero() { return {}; }
    static Part dot(Part part, Bytes u, Bytes s) {
      for (int i = 0; i < kBytes; ++i)
        part.at[i / 4] += static_cast<int>(u.at[i]) * static_cast<std::int8_t>(s.at[i]);
      return part;
    }
    static Sums flush(Sums sums, Part part) {
      for (int i = 0; i < kBytes / 4; ++i) sums.at[i] += part.at[i];
      return sums;
    }
    static constexpr std::int64_t span(int, int) { return std::int64_t{1} << 40; }
  };
  using Wide = Narrow;
};

#include "kernels.inl"

}  // namespace portable

const Kernels* portable_kernels() { return &portable::kKernels; }

}  // namespace subbyte
