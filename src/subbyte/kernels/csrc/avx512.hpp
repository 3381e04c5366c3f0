// What both AVX-512 tiers include, before they switch their instructions on.
//
// SUBBYTE_EMULATE compiles them against SIMDe, which computes every instruction in plain C++: the
// tests run them so on machines without AVX-512. SUBBYTE_AVX512 says that they can be compiled.
#pragma once

#include "tier.hpp"

#if defined(SUBBYTE_EMULATE)
#define SUBBYTE_AVX512
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#elif defined(__x86_64__) || defined(_M_X64)
#define SUBBYTE_AVX512
#include <immintrin.h>
#endif

#if defined(SUBBYTE_AVX512)
namespace subbyte {
// Whether this CPU, or the emulation, has AVX-512 with VNNI; vbmi: and the byte permutes.
inline bool has_avx512(bool vbmi) {
#ifdef SUBBYTE_EMULATE
  static_cast<void>(vbmi);
  return true;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
         (!vbmi || __builtin_cpu_supports("avx512vbmi"));
#endif
}
}  // namespace subbyte
#endif
