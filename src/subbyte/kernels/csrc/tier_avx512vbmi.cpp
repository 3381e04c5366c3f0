// AVX-512 with VNNI and VBMI, whose permutes look bytes up in tables of 64 and 128: 3 levels at 1.6
// bits, 5 at 2.4. Otherwise as tier_avx512.cpp.
#include "avx512.hpp"

#if defined(SUBBYTE_AVX512)

#ifndef SUBBYTE_EMULATE
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,bmi2")
#endif

namespace subbyte {
namespace avx512vbmi {

#define SUBBYTE_TABLES
#include "avx512.inl"

struct V : Avx512 {
  static constexpr const char* kName = "avx512vbmi";

  // Of an index, 6 bits and 7 bits count.
  static Bytes lookup64(const std::uint8_t* table, Bytes index) {
    return _mm512_permutexvar_epi8(index, load(table));
  }
  static Bytes lookup128(const std::uint8_t* table, Bytes index) {
    return _mm512_permutex2var_epi8(load(table), index, load(table + 64));
  }
};

#include "kernels.inl"

}  // namespace avx512vbmi
}  // namespace subbyte

#ifndef SUBBYTE_EMULATE
#pragma GCC pop_options
#endif

namespace subbyte {
const Kernels* avx512vbmi_kernels() { return has_avx512(true) ? &avx512vbmi::kKernels : nullptr; }
}  // namespace subbyte

#else
namespace subbyte {
const Kernels* avx512vbmi_kernels() { return nullptr; }
}  // namespace subbyte
#endif
