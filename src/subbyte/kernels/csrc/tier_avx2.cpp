// AVX2: 32 bytes, products of unsigned and signed bytes added up in int16 pairs.
#include "tier.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")

namespace subbyte {
namespace avx2 {

#include "avx2.inl"

struct V : Avx2 {
  static constexpr const char* kName = "avx2";
  static constexpr bool kInPlace = false;  // pairs of larger digits' products leave 16 bits
};

#include "kernels.inl"

}  // namespace avx2
}  // namespace subbyte

#pragma GCC pop_options

namespace subbyte {
const Kernels* avx2_kernels() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::kKernels
                                                                         : nullptr;
}
}  // namespace subbyte
#else
namespace subbyte {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace subbyte
#endif
