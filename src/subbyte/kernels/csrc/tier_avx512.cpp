// AVX-512 with VNNI: 64 bytes, products of unsigned and signed bytes added up in int32.
#include "avx512.hpp"

#if defined(SUBBYTE_AVX512)

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
const Kernels* avx512_kernels() { return has_avx512(false) ? &avx512::kKernels : nullptr; }
}  // namespace subbyte

#else
namespace subbyte {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace subbyte
#endif
