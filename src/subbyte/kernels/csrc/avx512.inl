// The vectors of both AVX-512 tiers. Included inside their namespaces.

struct Avx512 {
  static constexpr std::uint8_t kFlip = 0x80;
  static constexpr bool kInPlace = true;  // dots take bytes up to 255, exactly
  static constexpr int kBytes = 64, kRegisters = 32, kTileVectors = 2, kTileColumns = 12;
  using Bytes = __m512i;
  using Sums = __m512i;

  template <class T>
  static Bytes load(const T* p) {
    return _mm512_loadu_si512(p);
  }
  template <class T>
  static void store(T* p, __m512i v) {
    _mm512_storeu_si512(p, v);
  }
  template <class T>
  static Bytes splat(const T* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static Bytes fill(std::uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  // Of 16 bits: bits that cross into a neighbour are for the mask to drop.
  template <int N>
  static Bytes shift_right(Bytes v) {
    return N ? _mm512_srli_epi16(v, N) : v;
  }
  template <int N>
  static Bytes shift_left(Bytes v) {
    return N ? _mm512_slli_epi16(v, N) : v;
  }
  static Bytes mask(Bytes v, int bits) {
    return _mm512_and_si512(v, fill(static_cast<std::uint8_t>(bits)));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  static Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
  static Bytes subtract(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
  static Bytes lookup(const std::uint8_t* table, Bytes index) {
    const auto quarter = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(quarter), index);
  }
  static Sums ints_of_bytes(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Sums ints_of_shorts(const std::int16_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Bytes shorts_of_bytes(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_low_bytes(std::uint8_t* p, Sums v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static Sums zero() { return _mm512_setzero_si512(); }
  template <class Floats>
  static Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }

  struct Narrow {
    using Part = __m512i;
    static Part zero() { return _mm512_setzero_si512(); }
    static Part dot(Part part, Bytes u, Bytes s) { return _mm512_dpbusd_epi32(part, u, s); }
    static Sums flush(Sums sums, Part part) { return _mm512_add_epi32(sums, part); }
    static constexpr std::int64_t span(int, int) { return std::int64_t{1} << 40; }
  };
  using Wide = Narrow;
};
