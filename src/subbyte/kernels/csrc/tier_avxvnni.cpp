// AVX-VNNI: 32 bytes, products of unsigned and signed bytes added up in int32, on CPUs without
// AVX-512. Otherwise as tier_avx2.cpp.
//
// SUBBYTE_EMULATE computes the product in AVX2's instructions: the tests run it so on machines
// without AVX-VNNI.
#include "tier.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#pragma GCC push_options
#ifdef SUBBYTE_EMULATE
#pragma GCC target("avx2,fma,bmi2")
#else
#pragma GCC target("avxvnni,avx2,fma,bmi2")
#endif

namespace subbyte {
namespace avxvnni {

#include "avx2.inl"

struct V : Avx2 {
  static constexpr const char* kName = "avxvnni";
  static constexpr bool kInPlace = true;  // dots take bytes up to 255, exactly

  struct Narrow {
    using Part = __m256i;
    static Part zero() { return _mm256_setzero_si256(); }
    static Part dot(Part part, Bytes u, Bytes s) {
#ifdef SUBBYTE_EMULATE
      return Avx2::Wide::dot(part, u, s);
#else
      return _mm256_dpbusd_avx_epi32(part, u, s);
#endif
    }
    static Sums flush(Sums sums, Part part) { return _mm256_add_epi32(sums, part); }
    static constexpr std::int64_t span(int, int) { return std::int64_t{1} << 40; }
  };
  using Wide = Narrow;
};

#include "kernels.inl"

}  // namespace avxvnni
}  // namespace subbyte

#pragma GCC pop_options

namespace subbyte {
const Kernels* avxvnni_kernels() {
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef SUBBYTE_EMULATE
  return has ? &avxvnni::kKernels : nullptr;
#else
  return has && __builtin_cpu_supports("avxvnni") ? &avxvnni::kKernels : nullptr;
#endif
}
}  // namespace subbyte
#else
namespace subbyte {
const Kernels* avxvnni_kernels() { return nullptr; }
}  // namespace subbyte
#endif
