#include "roofs.hpp"

#include <cstring>

#include "dispatch.hpp"
#include "sizes.hpp"
#include "threads.hpp"

#if !defined(SUBBYTE_EMULATE) && (defined(__x86_64__) || defined(_M_X64))
#define SUBBYTE_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace subbyte {
namespace {

constexpr std::int64_t kStep = 128;                          // bytes read at a time
constexpr std::int64_t kMostRounds = std::int64_t{1} << 30;  // seconds, not days
constexpr std::int64_t kMostBytes = std::int64_t{1} << 42;   // likewise
constexpr int kSums = 12;  // independent ones: more than the latency of a product in any CPU here

// A round adds one product to each sum. The empty assembly keeps every product: the compiler can
// know neither an operand nor that nobody reads the sums.
#define SUBBYTE_SPIN(Vector, first, constraint, step)                      \
  Vector sum[kSums], a = first, b = first;                                 \
  asm volatile("" : "+" constraint(b));                                    \
  _Pragma("GCC unroll 12") for (int i = 0; i < kSums; ++i) sum[i] = first; \
  for (std::int64_t r = 0; r < rounds; ++r) {                              \
    _Pragma("GCC unroll 12") for (int i = 0; i < kSums; ++i) {             \
      asm volatile("" : "+" constraint(sum[i]), "+" constraint(a));        \
      sum[i] = step(sum[i], a, b);                                         \
    }                                                                      \
  }                                                                        \
  _Pragma("GCC unroll 12") for (int i = 0; i < kSums; ++i) asm volatile("" : : constraint(sum[i]));

// Multiply-adds of a round, with the loop that does them.
struct Spin {
  int products;
  void (*run)(std::int64_t rounds);
};

#if defined(SUBBYTE_X86)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
inline __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
}
inline __m256 fused_256(__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); }
void bytes_avx2(std::int64_t rounds) {
  SUBBYTE_SPIN(__m256i, _mm256_setzero_si256(), "x", add_pairs)
}
void read_avx2(const std::uint8_t* p, std::int64_t steps) {
  __m256i sum[4] = {};
  for (std::int64_t i = 0; i < steps; ++i, p += kStep)
    for (int j = 0; j < 4; ++j)
      sum[j] = _mm256_add_epi8(sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + j));
  for (__m256i& part : sum) asm volatile("" : "+x"(part));
}
void floats_avx2(std::int64_t rounds) { SUBBYTE_SPIN(__m256, _mm256_setzero_ps(), "x", fused_256) }
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avxvnni,avx2")
void bytes_avxvnni(std::int64_t rounds) {
  SUBBYTE_SPIN(__m256i, _mm256_setzero_si256(), "x", _mm256_dpbusd_avx_epi32)
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
inline __m512 fused_512(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
void bytes_avx512(std::int64_t rounds) {
  SUBBYTE_SPIN(__m512i, _mm512_setzero_si512(), "v", _mm512_dpbusd_epi32)
}
void floats_avx512(std::int64_t rounds) {
  SUBBYTE_SPIN(__m512, _mm512_setzero_ps(), "v", fused_512)
}
#pragma GCC pop_options

#elif defined(__aarch64__)

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
inline int32x4_t add_fours(int32x4_t sum, int32x4_t a, int32x4_t b) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
void bytes_neon(std::int64_t rounds) { SUBBYTE_SPIN(int32x4_t, vdupq_n_s32(0), "w", add_fours) }
#pragma GCC pop_options
void floats_neon(std::int64_t rounds) { SUBBYTE_SPIN(float32x4_t, vdupq_n_f32(0), "w", vfmaq_f32) }

#endif

// Plain C++: a compiler may use the vectors that every CPU of its kind has.
template <class T, class Sum>
void plain(std::int64_t rounds) {
  constexpr int kLanes = 16;
  Sum sum[kLanes] = {};
  T a[kLanes] = {}, b[kLanes] = {};
  for (std::int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");
    for (int i = 0; i < kLanes; ++i) sum[i] += static_cast<Sum>(a[i]) * static_cast<Sum>(b[i]);
    asm volatile("" : : "r"(sum) : "memory");
  }
}

Spin bytes_of([[maybe_unused]] const std::string& tier) {
#if defined(SUBBYTE_X86)
  if (tier == "avx512vnni" || tier == "avx512vbmi") return {64 * kSums, &bytes_avx512};
  if (tier == "avxvnni") return {32 * kSums, &bytes_avxvnni};
  if (tier == "avx2") return {32 * kSums, &bytes_avx2};
#elif defined(__aarch64__)
  if (tier == "neon") return {16 * kSums, &bytes_neon};
#endif
  return {16, &plain<std::int8_t, std::int32_t>};
}

Spin floats() {
#if defined(SUBBYTE_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    return {16 * kSums, &floats_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {8 * kSums, &floats_avx2};
#elif defined(__aarch64__)
  return {4 * kSums, &floats_neon};
#endif
  return {16, &plain<float, float>};
}

void read_plain(const std::uint8_t* p, std::int64_t steps) {
  std::uint64_t sum[kStep / 8] = {};
  for (std::int64_t i = 0; i < steps; ++i, p += kStep)
    for (std::int64_t j = 0; j < kStep / 8; ++j) {
      std::uint64_t word;
      std::memcpy(&word, p + 8 * j, 8);
      sum[j] += word;
    }
  asm volatile("" : : "r"(sum) : "memory");
}

auto reader() -> void (*)(const std::uint8_t*, std::int64_t) {
#if defined(SUBBYTE_X86)
  if (__builtin_cpu_supports("avx2")) return &read_avx2;
#endif
  return &read_plain;
}

std::int64_t spin(const Spin& of, std::int64_t rounds, int threads) {
  threads = team_of(threads);
  require(rounds >= 1 && rounds <= kMostRounds, "rounds must be 1 to 2^30");
  parallel(threads, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) of.run(rounds);
  });
  return of.products * rounds * threads;
}

}  // namespace

std::int64_t spin_int8(const std::string& tier, std::int64_t rounds, int threads) {
  return spin(bytes_of(tier_of(tier).name), rounds, threads);
}

std::int64_t spin_float(std::int64_t rounds, int threads) {
  return spin(floats(), rounds, threads);
}

Stream::Stream(std::size_t bytes) : bytes_(bytes) {
  require(bytes >= kStep && bytes <= std::size_t{1} << 32, "bytes must be 128 to 2^32");
  buffer_ = Buffer(bytes);
  std::memset(buffer_.data(), 1, bytes);
}

std::int64_t Stream::read(int passes, int threads) const {
  threads = team_of(threads);
  require(passes >= 1 && product({passes, static_cast<std::int64_t>(bytes_)}) <= kMostBytes,
          "passes must be 1 or more, and read no more than 2^42 bytes");
  const auto read = reader();
  const std::int64_t steps = static_cast<std::int64_t>(bytes_) / kStep;
  parallel(threads, steps, [&](std::int64_t begin, std::int64_t end) {
    for (int pass = 0; pass < passes; ++pass) read(buffer_.data() + begin * kStep, end - begin);
  });
  return steps * kStep * passes;
}

}  // namespace subbyte
