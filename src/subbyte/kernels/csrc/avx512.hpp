// What both AVX-512 tiers include, before they switch their instructions on.
//
// SUBBYTE_EMULATE compiles them against SIMDe, which computes every instruction in plain C++: the
// tests run them so on machines without AVX-512. SUBBYTE_AVX512 says that they can be compiled.
#pragma once

#include <cstdint>
#include <cstring>

#include "tier.hpp"

#if defined(SUBBYTE_EMULATE)
#define SUBBYTE_AVX512
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
// Instructions that SIMDe may lack, lane by lane.
namespace subbyte {
namespace emulated {
template <class To, class From, int Lanes, class Source>
inline __m512i widened(const Source& v) {
  From from[Lanes];
  To to[Lanes];
  std::memcpy(from, &v, sizeof(from));
  for (int i = 0; i < Lanes; ++i) to[i] = static_cast<To>(from[i]);
  return _mm512_loadu_si512(to);
}
inline __m128i low_bytes(const __m512i& v) {
  std::int32_t from[16];
  std::uint8_t to[16];
  std::memcpy(from, &v, sizeof(from));
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::uint8_t>(from[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(to));
}
}  // namespace emulated
}  // namespace subbyte
#define _mm512_cvtepu8_epi32(v) subbyte::emulated::widened<std::int32_t, std::uint8_t, 16>(v)
#define _mm512_cvtepi16_epi32(v) subbyte::emulated::widened<std::int32_t, std::int16_t, 16>(v)
#define _mm512_cvtepu8_epi16(v) subbyte::emulated::widened<std::int16_t, std::uint8_t, 32>(v)
#define _mm512_cvtepi32_epi8(v) subbyte::emulated::low_bytes(v)
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
