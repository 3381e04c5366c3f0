// 64-bit ARM with the dot product instruction: 16 bytes, products of signed bytes in int32.
#include "tier.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>
#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")

namespace subbyte {
namespace neon {

struct V {
  static constexpr const char* kName = "neon";
  static constexpr std::uint8_t kFlip = 0;
  static constexpr bool kInPlace = false;  // dots take bytes up to 255, exactly
  static constexpr int kBytes = 16, kRegisters = 32, kTileVectors = 4, kTileColumns = 4;
  using Bytes = uint8x16_t;
  using Sums = int32x4_t;

  static Bytes load(const std::uint8_t* p) { return vld1q_u8(p); }
  static Bytes load(const std::int8_t* p) { return vreinterpretq_u8_s8(vld1q_s8(p)); }
  static void store(std::int8_t* p, Bytes v) { vst1q_s8(p, vreinterpretq_s8_u8(v)); }
  static void store(std::int32_t* p, Sums v) { vst1q_s32(p, v); }
  template <class T>
  static Bytes splat(const T* p) {
    std::uint32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
  }
  static Bytes fill(std::uint8_t value) { return vdupq_n_u8(value); }
  template <int N>
  static Bytes shift_right(Bytes v) {
    if constexpr (N == 0)
      return v;
    else
      return vshrq_n_u8(v, N);
  }
  template <int N>
  static Bytes shift_left(Bytes v) {
    return vshlq_n_u8(v, N);
  }
  static Bytes mask(Bytes v, int bits) {
    return vandq_u8(v, fill(static_cast<std::uint8_t>(bits)));
  }
  static Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
  static Bytes add(Bytes a, Bytes b) { return vaddq_u8(a, b); }
  static Bytes subtract(Bytes a, Bytes b) { return vsubq_u8(a, b); }
  static Bytes lookup(const std::uint8_t* table, Bytes index) {
    return vqtbl1q_u8(vld1q_u8(table), index);
  }
  static Sums ints_of_bytes(const std::uint8_t* p) {
    std::uint32_t four;
    std::memcpy(&four, p, 4);
    const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
  }
  static Sums ints_of_shorts(const std::int16_t* p) { return vmovl_s16(vld1_s16(p)); }
  static uint16x8_t shorts_of_bytes(const std::uint8_t* p) { return vmovl_u8(vld1_u8(p)); }
  static void store_low_bytes(std::uint8_t* p, Sums v) {
    const uint16x4_t wide = vmovn_u32(vreinterpretq_u32_s32(v));
    const std::uint32_t four =
        vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(wide, wide))), 0);
    std::memcpy(p, &four, 4);
  }
  static Sums zero() { return vdupq_n_s32(0); }
  template <class Floats>
  static Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }

  // Both operands signed: digits are below 128 here, and activations are not flipped.
  struct Narrow {
    using Part = int32x4_t;
    static Part zero() { return vdupq_n_s32(0); }
    static Part dot(Part part, Bytes u, Bytes s) {
      return vdotq_s32(part, vreinterpretq_s8_u8(u), vreinterpretq_s8_u8(s));
    }
    static Sums flush(Sums sums, Part part) { return vaddq_s32(sums, part); }
    static constexpr std::int64_t span(int, int) { return std::int64_t{1} << 40; }
  };

  // Unsigned digits up to 255 times signed bytes.
  struct Wide {
    using Part = int32x4_t;
    static Part zero() { return vdupq_n_s32(0); }
    static Part dot(Part part, Bytes u, Bytes s) {
      // 128 (u >> 7) s + (u & 127) s
      const auto top = vshrq_n_u8(u, 7);
      const auto high = vdotq_s32(zero(), vreinterpretq_s8_u8(top), vreinterpretq_s8_u8(s));
      return vaddq_s32(Narrow::dot(part, vandq_u8(u, vdupq_n_u8(127)), s), vshlq_n_s32(high, 7));
    }
    static Sums flush(Sums sums, Part part) { return vaddq_s32(sums, part); }
    static constexpr std::int64_t span(int, int) { return std::int64_t{1} << 40; }
  };
};

#include "kernels.inl"

}  // namespace neon
}  // namespace subbyte

#pragma GCC pop_options

namespace subbyte {
const Kernels* neon_kernels() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &neon::kKernels : nullptr;
#else
  return &neon::kKernels;  // every Apple machine of this kind has it
#endif
}
}  // namespace subbyte
#else
namespace subbyte {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace subbyte
#endif
