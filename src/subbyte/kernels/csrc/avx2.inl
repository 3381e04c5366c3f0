// The vectors of both 256-bit tiers. Included inside their namespaces.

struct Avx2 {
  static constexpr std::uint8_t kFlip = 0x80;
  static constexpr int kBytes = 32, kRegisters = 16, kTileVectors = 2, kTileColumns = 6;
  using Bytes = __m256i;
  using Sums = __m256i;

  template <class T>
  static Bytes load(const T* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  template <class T>
  static void store(T* p, __m256i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  template <class T>
  static Bytes splat(const T* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static Bytes fill(std::uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  // Of 16 bits: bits that cross into a neighbour are for the mask to drop.
  template <int N>
  static Bytes shift_right(Bytes v) {
    return N ? _mm256_srli_epi16(v, N) : v;
  }
  template <int N>
  static Bytes shift_left(Bytes v) {
    return N ? _mm256_slli_epi16(v, N) : v;
  }
  static Bytes mask(Bytes v, int bits) {
    return _mm256_and_si256(v, fill(static_cast<std::uint8_t>(bits)));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  static Bytes add(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
  static Bytes subtract(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
  static Bytes lookup(const std::uint8_t* table, Bytes index) {
    const auto half = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), index);
  }
  static Sums ints_of_bytes(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Sums ints_of_shorts(const std::int16_t* p) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Bytes shorts_of_bytes(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_low_bytes(std::uint8_t* p, Sums v) {
    const __m256i four = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0C080400));
    const __m128i eight =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), eight);
  }
  static Sums zero() { return _mm256_setzero_si256(); }
  template <class Floats>
  static Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }

  // Pairs of products in int16.
  struct Narrow {
    using Part = __m256i;
    static Part zero() { return _mm256_setzero_si256(); }
    static Part dot(Part part, Bytes u, Bytes s) {
      const __m256i products = _mm256_maddubs_epi16(u, s);
      asm volatile("vpaddw %1, %0, %0" : "+x"(part) : "x"(products));  // here and now: see in_order
      return part;
    }
    static Sums flush(Sums sums, Part part) {
      return _mm256_add_epi32(sums, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
    }
    static constexpr std::int64_t span(int u, int s) { return 32767 / (2 * u * s); }
  };

  // Products in int32, for bytes whose pairs of products do not fit in int16.
  struct Wide {
    using Part = __m256i;
    static Part zero() { return _mm256_setzero_si256(); }
    static Part dot(Part part, Bytes u, Bytes s) {
      const auto even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xFF)),
                                          _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
      const auto odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
      return _mm256_add_epi32(part, _mm256_add_epi32(even, odd));
    }
    static Sums flush(Sums sums, Part part) { return _mm256_add_epi32(sums, part); }
    static constexpr std::int64_t span(int, int) { return std::int64_t{1} << 40; }
  };
};
