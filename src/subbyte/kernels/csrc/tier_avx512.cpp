// AVX-512 with VNNI: 64 bytes, products of unsigned and signed bytes added up in int32.
//
// SUBBYTE_EMULATE compiles it against SIMDe, which computes every instruction in plain C++: the
// tests run it so on machines without AVX-512.
#include "tier.hpp"

#if defined(SUBBYTE_EMULATE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#elif defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if defined(SUBBYTE_EMULATE) || defined(__x86_64__) || defined(_M_X64)

#ifndef SUBBYTE_EMULATE
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,bmi2")
#endif

namespace subbyte {
namespace avx512 {

#include "avx512.inl"

struct V : Avx512 {
  static constexpr const char* kName = "avx512vnni";
};

#include "kernels.inl"

}  // namespace avx512
}  // namespace subbyte

#ifndef SUBBYTE_EMULATE
#pragma GCC pop_options
#endif

namespace subbyte {
const Kernels* avx512_kernels() {
#ifdef SUBBYTE_EMULATE
  return &avx512::kKernels;
#else
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return here ? &avx512::kKernels : nullptr;
#endif
}
}  // namespace subbyte

#else
namespace subbyte {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace subbyte
#endif
