// The kernels of one tier. Included inside the tier's namespace, after it has defined V: the tier's
// vectors. Everything here is compiled for that tier's instructions and is visible in it only.
//
// V::Bytes holds V::kBytes bytes, V::Sums one int32 for 4 of them. V::Narrow and V::Wide are two
// ways to add up products: `dot` adds to a Part, which may overflow after `span` dots unless it is
// flushed into Sums before.

// ---------------------------------------------------------------- activations

inline std::int32_t bits_of(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

std::int32_t peak(const float* x, std::int64_t n) {
  std::int32_t most = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

// Adding 1.5 * 2^23 rounds: it leaves the integer in the low mantissa bits.
void round(const float* x, std::int64_t n, float inverse, std::uint8_t flip, std::int8_t* q) {
  for (std::int64_t i = 0; i < n; ++i)
    q[i] = static_cast<std::int8_t>((bits_of(x[i] * inverse + 12582912.0f) - 0x4B400000) ^ flip);
}

std::int32_t sum(const std::int8_t* q, std::int64_t n) {
  std::int32_t total = 0;
  for (std::int64_t i = 0; i < n; ++i) total += q[i];
  return total;
}

// ---------------------------------------------------------------- packings

template <Packing>
struct Format;

// Digits of whole bits, `Width` of them at a time from run V0 on, shifted down in the register.
template <int Width, int Position>
inline V::Bytes field(const std::uint8_t* runs) {
  constexpr int per_byte = 8 / Width;
  const auto v = V::load(runs + Position / per_byte * kRunBytes);
  return V::mask(V::template shift_right<Width*(Position % per_byte)>(v), (1 << Width) - 1);
}

template <int Bit, int Target>  // bit `Bit` of every byte, moved to bit `Target`
inline V::Bytes bit(const std::uint8_t* run) {
  const auto v = V::load(run);
  if constexpr (Bit >= Target)
    return V::mask(V::template shift_right<Bit - Target>(v), 1 << Target);
  else
    return V::mask(V::template shift_left<Target - Bit>(v), 1 << Target);
}

// Digits where they lie in their byte, for sums that are divided at the end (`sums_in_place`):
// `place` of a position is its digit times the weight of its chain, chains are what is added up
// apart.
template <int Width>
struct Places {
  static constexpr int kChains = 8 / Width;  // a position each
  static constexpr int chain(int position) { return position; }
  static constexpr int weight(int chain) { return 1 << (Width * chain); }
  template <int P>
  static V::Bytes place(const std::uint8_t* runs) {
    return V::mask(V::load(runs), ((1 << Width) - 1) << (Width * P));
  }
};

template <>
struct Format<Packing::kBits1> : Places<1> {
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    return field<1, P>(runs);
  }
};

template <>
struct Format<Packing::kBits2> : Places<2> {
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    return field<2, P>(runs);
  }
};

template <>
struct Format<Packing::kBits3> {
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    return V::either(field<2, P>(runs), bit<P, 2>(runs + 2 * kRunBytes));
  }
};

template <>
struct Format<Packing::kBits4> : Places<4> {
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    return field<4, P>(runs);
  }
};

template <>
struct Format<Packing::kBits5> {
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    return V::either(field<4, P>(runs), bit<P, 4>(runs + 4 * kRunBytes));
  }
};

template <>
struct Format<Packing::kBits8> {
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    return V::load(runs);
  }
};

template <>
struct Format<Packing::kQuints3> {
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    // a nibble n is 5 times a part of the second digit and one of the others
    alignas(16) static constexpr std::uint8_t kRest[16] = {0, 1, 2, 3, 4, 0, 1, 2,
                                                           3, 4, 0, 1, 2, 3, 4, 0};
    alignas(16) static constexpr std::uint8_t kFives[16] = {0, 0, 0, 0, 0, 1, 1, 1,
                                                            1, 1, 2, 2, 2, 2, 2, 3};
    const auto high = field<4, 1>(runs), low = field<4, 0>(runs);
    if constexpr (P == 0) return V::lookup(kRest, high);
    if constexpr (P == 1) return V::add(V::lookup(kFives, high), V::lookup(kFives, low));
    return V::lookup(kRest, low);
  }
};

#ifdef SUBBYTE_TABLES  // the tier's V looks bytes up in tables of 64 and of 128

struct Table {
  alignas(64) std::uint8_t at[128] = {};
};
template <class F>
constexpr Table table(int length, F&& entry) {
  Table found;
  for (int i = 0; i < length; ++i) found.at[i] = static_cast<std::uint8_t>(entry(i));
  return found;
}

template <>
struct Format<Packing::kTrits5> {
  // A quarter of the byte tells its last digit.
  static constexpr Table kLast = table(64, [](int i) { return i / 21; });
  static constexpr Table kLast84 = table(64, [](int i) { return i / 21 * 84; });
  static constexpr Table kRest =
      table(81, [](int i) { return i % 3 | i / 3 % 3 << 2 | i / 9 % 3 << 4 | i / 27 % 3 << 6; });
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    const auto v = V::load(runs), quarter = V::template shift_right<2>(v);
    if constexpr (P == 4) return V::lookup64(kLast.at, quarter);
    const auto rest = V::lookup128(kRest.at, V::subtract(v, V::lookup64(kLast84.at, quarter)));
    return V::mask(V::template shift_right<2 * (P % 4)>(rest), 3);
  }

  static constexpr int kChains = 5;
  static constexpr int chain(int position) { return position; }
  static constexpr int weight(int chain) { return chain == 4 ? 84 : 1 << (2 * chain); }
  template <int P>
  static V::Bytes place(const std::uint8_t* runs) {
    const auto v = V::load(runs), last = V::lookup64(kLast84.at, V::template shift_right<2>(v));
    if constexpr (P == 4) return last;
    return V::mask(V::lookup128(kRest.at, V::subtract(v, last)), 3 << (2 * (P % 4)));
  }
};

template <>
struct Format<Packing::kQuints10> {
  static constexpr Table kDigit[3] = {table(125, [](int i) { return i % 5; }),
                                      table(125, [](int i) { return i / 5 % 5; }),
                                      table(125, [](int i) { return i / 25; })};
  template <int P>
  static V::Bytes digit(const std::uint8_t* runs) {
    if constexpr (P == 9)
      return V::either(V::either(bit<7, 0>(runs), bit<7, 1>(runs + kRunBytes)),
                       bit<7, 2>(runs + 2 * kRunBytes));
    else
      return V::lookup128(kDigit[P % 3].at, V::load(runs + P / 3 * kRunBytes));
  }

  // Two digits of three in one lookup: 1 and 16 times; the tenth digit is 32 times its own.
  static constexpr Table kPair = table(125, [](int i) { return i % 5 | i / 5 % 5 << 4; });
  static constexpr int kChains = 4;
  static constexpr int chain(int position) { return position == 9 ? 3 : position % 3; }
  static constexpr int weight(int chain) { return chain == 3 ? 32 : chain == 1 ? 16 : 1; }
  template <int P>
  static V::Bytes place(const std::uint8_t* runs) {
    if constexpr (P == 9)
      return V::either(V::mask(V::load(runs + 2 * kRunBytes), 0x80),
                       V::either(bit<7, 6>(runs + kRunBytes), bit<7, 5>(runs)));
    const auto v = V::load(runs + P / 3 % 3 * kRunBytes);
    if constexpr (P % 3 == 2) return V::lookup128(kDigit[2].at, v);
    return V::mask(V::lookup128(kPair.at, v), P % 3 ? 0xF0 : 0x0F);
  }
};

#endif

// f(integral_constant<int, 0>), f(integral_constant<int, 1>), ... in order.
template <class F, int... I>
inline void each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
inline void each(F&& f) {
  each(std::make_integer_sequence<int, N>(), f);
}

// ---------------------------------------------------------------- float32 vectors

static_assert(V::kTileColumns % 2 == 0, "the two planes of a row are in one tile");
constexpr int kFloats = V::kBytes / 4;
typedef float Floats __attribute__((vector_size(V::kBytes)));
typedef std::int32_t Ints __attribute__((vector_size(V::kBytes)));

inline Floats floats(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T, class Limits>  // T: float or Floats; Limits has low and high
inline T limited(T value, const Limits& limits) {
  const T low = limits.low + T{}, high = limits.high + T{};
  const T above = value < low ? low : value;  // NaN stays
  return above > high ? high : above;
}

// ---------------------------------------------------------------- few columns

// Asks for what a stream of weights holds further on.
template <int Bytes>
inline void ask_ahead(const std::uint8_t* run) {
  constexpr std::int64_t kDistance = 4096;
  for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(run + kDistance + i);
}

// Keeps the compiler from computing all products before it adds the first one up: it would run out
// of registers.
template <class T>
inline T in_order(T value) {
#if defined(__GNUC__) && defined(__x86_64__) && !defined(SUBBYTE_EMULATE)
  if constexpr (sizeof(T) == 64)
    asm volatile("" : "+v"(value));  // any of the 32 registers; "x" are the first 16
  else if constexpr (sizeof(T) == 32)
    asm volatile("" : "+x"(value));
#endif
  return value;
}

// Sums over `groups` groups from `run` on, of V::kBytes / 4 * R rows and N columns.
// Ahead: whether weights are asked for before they are read.
template <Packing P, class Dots, int R, int N, bool Ahead>
inline void small_sums(const std::uint8_t* run, std::int64_t groups, const std::int8_t* const* x,
                       typename V::Sums (&total)[R][N]) {
  constexpr Traits t = traits(P);
  // Of a single column, positions in turn: one after another would wait for the last product.
  constexpr int kChains = N == 1 && V::kRegisters == 32 ? std::min(4, t.positions) : 1;
  for (auto& line : total)
    for (auto& sum : line) sum = V::zero();
  const std::int64_t stride = Dots::span(t.max_digit, 127) / t.positions;
  for (std::int64_t g = 0; g < groups;) {
    const std::int64_t stop = std::min(groups, g + stride);
    typename Dots::Part part[R][N * kChains];
    for (auto& line : part)
      for (auto& sum : line) sum = Dots::zero();
    for (; g < stop; ++g, run += t.vectors * kRunBytes) {
      if constexpr (Ahead) ask_ahead<t.vectors * kRunBytes>(run);
      if constexpr (N == 1) {  // a register a position; every run is read once
        typename V::Bytes column[t.positions];
        for (int p = 0; p < t.positions; ++p) column[p] = V::splat(x[0] + g * t.group() + 4 * p);
        for (int r = 0; r < R; ++r)
          each<t.positions>([&](auto position) {
            const auto digit = Format<P>::template digit<position>(run + r * V::kBytes);
            auto& chain = part[r][position % kChains];
            chain = in_order(Dots::dot(chain, digit, column[position]));
          });
      } else {
        each<t.positions>([&](auto position) {
          typename V::Bytes column[N];
          for (int n = 0; n < N; ++n) column[n] = V::splat(x[n] + g * t.group() + 4 * position);
          for (int r = 0; r < R; ++r) {
            const auto digit = Format<P>::template digit<position>(run + r * V::kBytes);
            for (int n = 0; n < N; ++n)
              part[r][n] = in_order(Dots::dot(part[r][n], digit, column[n]));
          }
        });
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N * kChains; ++n)
        total[r][n / kChains] = Dots::flush(total[r][n / kChains], part[r][n]);
  }
}

// A sum of products with `weight` times what was meant, exactly: as the others it is modulo 2^32.
template <int Weight>
inline typename V::Sums divided(typename V::Sums sum) {
  if constexpr (Weight == 1) return sum;
  Ints value;
  std::memcpy(&value, &sum, sizeof value);
  constexpr int kDown = __builtin_ctz(Weight);
  value >>= kDown;
  if constexpr (Weight >> kDown == 21) {
    typedef std::uint32_t Unsigned __attribute__((vector_size(V::kBytes)));
    value = (Ints)((Unsigned)value * 0x3CF3CF3Du);  // the inverse of 21
  }
  static_assert(Weight >> kDown == 1 || Weight >> kDown == 21, "its inverse is not known");
  std::memcpy(&sum, &value, sizeof value);
  return sum;
}

template <Packing P, class = void>
constexpr bool has_places = false;
template <Packing P>
constexpr bool has_places<P, std::void_t<decltype(Format<P>::kChains)>> = true;

// Whether the chains of so many vectors of rows and columns stay in registers.
template <Packing P>
constexpr bool fits_in_place(int vectors, int columns) {
  if constexpr (V::kInPlace && has_places<P>)
    return Format<P>::kChains * vectors * columns <= V::kRegisters * 5 / 8;
  return false;
}

// As `small_sums`, of digits that stay where they lie: nothing is shifted, chains are divided at
// the end. Only for dots that take bytes up to 255 and add up in int32.
template <Packing P, int R, int N, bool Ahead>
inline void sums_in_place(const std::uint8_t* run, std::int64_t groups, const std::int8_t* const* x,
                          typename V::Sums (&total)[R][N]) {
  using F = Format<P>;
  using Dots = typename V::Narrow;
  constexpr Traits t = traits(P);
  constexpr std::int64_t kMost = 8192;  // groups whose chains stay below 2^31
  static_assert(kMost * 4 * 240 * 127 < std::int64_t{1} << 31, "a chain may overflow");
  for (auto& line : total)
    for (auto& sum : line) sum = V::zero();
  for (std::int64_t g = 0; g < groups;) {
    const std::int64_t stop = std::min(groups, g + kMost);
    typename Dots::Part part[R][N][F::kChains];
    for (auto& line : part)
      for (auto& chains : line)
        for (auto& sum : chains) sum = Dots::zero();
    for (; g < stop; ++g, run += t.vectors * kRunBytes) {
      if constexpr (Ahead) ask_ahead<t.vectors * kRunBytes>(run);
      each<t.positions>([&](auto position) {
        typename V::Bytes column[N];
        for (int n = 0; n < N; ++n) column[n] = V::splat(x[n] + g * t.group() + 4 * position);
        for (int r = 0; r < R; ++r) {
          const auto digit = F::template place<position>(run + r * V::kBytes);
          for (int n = 0; n < N; ++n) {
            auto& chain = part[r][n][F::chain(position)];
            chain = in_order(Dots::dot(chain, digit, column[n]));
          }
        }
      });
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        each<F::kChains>([&](auto chain) {
          total[r][n] = Dots::flush(total[r][n], divided<F::weight(chain)>(part[r][n][chain]));
        });
  }
}

template <Packing P>
using DotsOf = std::conditional_t<(traits(P).max_digit > 64), typename V::Wide, typename V::Narrow>;

// The rows of a block from `row` on, one scale each: their sums.
struct WholeRows {
  const Panel& panel;
  std::int64_t block;
  const std::int8_t* const* x;
  std::int32_t* sums;

  template <Packing P, int R, int N>
  void take(int first, int row) const {
    typename V::Sums total[R][N];
    if (reads_ahead)
      add<P, R, N, true>(first, row, total);
    else
      add<P, R, N, false>(first, row, total);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        V::store(sums + (first + n) * kBlockRows + row + r * kFloats, total[r][n]);
  }

 private:
  template <Packing P, int R, int N, bool Ahead>
  void add(int first, int row, typename V::Sums (&total)[R][N]) const {
    const std::uint8_t* runs = panel.data.data() + block * panel.block_bytes() + 4 * row;
    if constexpr (fits_in_place<P>(1, N)) {
      constexpr int kPart = fits_in_place<P>(R, N) ? R : fits_in_place<P>(R / 2, N) ? R / 2 : 1;
      for (int r = 0; r < R; r += kPart) {
        typename V::Sums part[kPart][N];
        sums_in_place<P, kPart, N, Ahead>(runs + r * V::kBytes, panel.groups(), x + first, part);
        for (int i = 0; i < kPart; ++i)
          for (int n = 0; n < N; ++n) total[r + i][n] = part[i][n];
      }
    } else {
      small_sums<P, DotsOf<P>, R, N, Ahead>(runs, panel.groups(), x + first, total);
    }
  }
};

typedef std::uint16_t Halves __attribute__((vector_size(V::kBytes / 2)));

// The shared scales of a block, [scales][32].
struct ScalesOf {
  const float* single;
  const std::uint16_t* half;  // null if they are float32

  ScalesOf(const Panel& panel, std::int64_t block) {
    const std::int64_t place = block * panel.scales_of_row() * kBlockRows;
    single = panel.scale.data() + place;
    half = panel.half.empty() ? nullptr : panel.half.data() + place;
  }
  Floats at(std::int64_t place) const {
    if (!half) return floats(single + place);
    Halves stored;
    std::memcpy(&stored, half + place, sizeof stored);
    const Ints bits = __builtin_convertvector(stored, Ints) << 13;
    Floats value;
    std::memcpy(&value, &bits, sizeof value);
    return value * 0x1p112f;  // exponents of float16 begin 112 later
  }
};

// factor * sum - excess, times the scales; factor = 1 << shift.
inline Floats scaled(typename V::Sums sum, Ints excess, int shift, Floats scale) {
  Ints integer;
  std::memcpy(&integer, &sum, sizeof integer);
  return __builtin_convertvector((integer << shift) - excess, Floats) * scale;
}

// The same rows where their weights share scales: values.
struct SharedScales {
  const Panel& panel;
  std::int64_t block;
  const std::int8_t* const* x;
  const std::int32_t* const* excess;
  float* values;

  template <Packing P, int R, int N>
  void take(int first, int row) const {
    constexpr Traits t = traits(P);
    const std::int64_t most = panel.span() / t.group();
    const std::uint8_t* run = panel.data.data() + block * panel.block_bytes() + 4 * row;
    const ScalesOf scales(panel, block);
    const int shift = panel.affine.factor - 1;
    const std::int8_t* column[N];
    for (int n = 0; n < N; ++n) column[n] = x[first + n];
    Floats value[R][N] = {};
    for (std::int64_t s = 0, left = panel.groups(); left > 0; ++s, left -= most) {
      const std::int64_t groups = std::min(most, left);
      typename V::Sums total[R][N];
      if (reads_ahead)
        small_sums<P, DotsOf<P>, R, N, true>(run, groups, column, total);
      else
        small_sums<P, DotsOf<P>, R, N, false>(run, groups, column, total);
      for (int r = 0; r < R; ++r) {
        const Floats scale = scales.at(s * kBlockRows + row + r * kFloats);
        for (int n = 0; n < N; ++n)
          value[r][n] += scaled(total[r][n], excess[first + n][s] + Ints{}, shift, scale);
      }
      for (int n = 0; n < N; ++n) column[n] += groups * t.group();
      run += groups * t.vectors * kRunBytes;
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        std::memcpy(values + (first + n) * kBlockRows + row + r * kFloats, &value[r][n],
                    sizeof(Floats));
  }
};

// All rows of a block, n columns.
template <Packing P, class Rows>
void small_of(const Rows& rows, int n) {
  constexpr int kVectors = kRunBytes / V::kBytes;
  constexpr int kFour = std::min(V::kRegisters / 8, kVectors);
  constexpr int kTwo = std::min(V::kRegisters / 4, kVectors);
  int c = 0;
  for (; c + 4 <= n; c += 4)
    for (int row = 0; row < kBlockRows; row += kFour * kFloats)
      rows.template take<P, kFour, 4>(c, row);
  if (n - c == 3 && fits_in_place<P>(1, 3)) {
    for (int row = 0; row < kBlockRows; row += kTwo * kFloats)
      rows.template take<P, kTwo, 3>(c, row);
    return;
  }
  for (; c + 2 <= n; c += 2)
    for (int row = 0; row < kBlockRows; row += kTwo * kFloats)
      rows.template take<P, kTwo, 2>(c, row);
  if (c < n)
    for (int row = 0; row < kBlockRows; row += kTwo * kFloats)
      rows.template take<P, kTwo, 1>(c, row);
}

// Calls f with the packing as a constant.
template <class F>
inline void with_packing(Packing packing, F&& f) {
  switch (packing) {
    case Packing::kBits1:
      return f(std::integral_constant<Packing, Packing::kBits1>());
    case Packing::kBits2:
      return f(std::integral_constant<Packing, Packing::kBits2>());
    case Packing::kBits3:
      return f(std::integral_constant<Packing, Packing::kBits3>());
    case Packing::kBits4:
      return f(std::integral_constant<Packing, Packing::kBits4>());
    case Packing::kBits5:
      return f(std::integral_constant<Packing, Packing::kBits5>());
    case Packing::kBits8:
      return f(std::integral_constant<Packing, Packing::kBits8>());
    case Packing::kQuints3:
      return f(std::integral_constant<Packing, Packing::kQuints3>());
#ifdef SUBBYTE_TABLES
    case Packing::kTrits5:
      return f(std::integral_constant<Packing, Packing::kTrits5>());
    case Packing::kQuints10:
      return f(std::integral_constant<Packing, Packing::kQuints10>());
#else
    default:  // no panel of this tier
      return;
#endif
  }
}

void small(const Panel& panel, std::int64_t block, const std::int8_t* const* x, int n,
           std::int32_t* sums) {
  const WholeRows rows{panel, block, x, sums};
  with_packing(panel.packing, [&](auto packing) { small_of<packing>(rows, n); });
}

void small_groups(const Panel& panel, std::int64_t block, const std::int8_t* const* x, int n,
                  const std::int32_t* const* excess, float* values) {
  const SharedScales rows{panel, block, x, excess, values};
  with_packing(panel.packing, [&](auto packing) { small_of<packing>(rows, n); });
}

// ---------------------------------------------------------------- many columns

template <Packing P>
void decode_of(const Panel& panel, std::int64_t block, std::int8_t* out) {
  constexpr Traits t = traits(P);
  const std::uint8_t* run = panel.data.data() + block * panel.block_bytes();
  const bool twice = panel.affine.factor == 2;
  const auto center = V::fill(static_cast<std::uint8_t>(panel.affine.center));
  for (std::int64_t g = 0; g < panel.groups(); ++g, run += t.vectors * kRunBytes)
    each<t.positions>([&](auto position) {
      for (int i = 0; i < kRunBytes; i += V::kBytes, out += V::kBytes) {
        auto digit = Format<P>::template digit<position>(run + i);
        if (twice) digit = V::add(digit, digit);
        V::store(out, V::subtract(digit, center));
      }
    });
}

void decode(const Panel& panel, std::int64_t block, std::int8_t* out) {
  with_packing(panel.packing, [&](auto packing) { decode_of<packing>(panel, block, out); });
  const auto clear = [&](std::int64_t k) {
    std::int8_t* column = out + k / 4 * kRunBytes + k % 4;
    for (int r = 0; r < kBlockRows; ++r) column[4 * r] = 0;
  };
  for (const std::int32_t k : panel.padding) clear(k);
  for (std::int64_t k = panel.k; k < panel.groups() * panel.traits().group(); ++k) clear(k);
}

// ---------------------------------------------------------------- bytes

typedef std::int16_t Shorts __attribute__((vector_size(V::kBytes)));

template <class Vector, class T>
inline Vector loaded(const T* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class To, class From>  // of one size
inline To same_bits(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from, "bits of one size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A number of bytes of y from float sums: kFloats of them. Adding 1.5 * 2^23 leaves the integer in
// the low mantissa bits.
struct ToBytes {
  Floats plus_scale, low, high, whole;
  Ints plus_zero;

  explicit ToBytes(const Rounding& r)
      : plus_scale(r.plus_scale + Floats{}),
        low(r.low + Floats{}),
        high(r.high + Floats{}),
        whole(12582912.0f + static_cast<float>(r.zero) + Floats{}),
        plus_zero(r.plus_zero + Ints{}) {}

  // plus: null, or what is added.
  void store(Ints sums, Floats scale, Floats bias, const std::uint8_t* plus,
             std::uint8_t* y) const {
    Floats value = __builtin_convertvector(sums, Floats) * scale + bias;
    if (plus) {
      const Ints more = same_bits<Ints>(V::ints_of_bytes(plus)) - plus_zero;
      value += __builtin_convertvector(more, Floats) * plus_scale;
    }
    value = value > low ? value : low;
    value = value < high ? value : high;
    V::store_low_bytes(y, same_bits<typename V::Sums>(value + whole));
  }
};

// What becomes of the sums of column n and the rows from `row` on.
struct Stored {
  std::int32_t* sums;  // [columns][32]
  void take(int n, int row, typename V::Sums sum) const {
    V::store(sums + n * kBlockRows + row, sum);
  }
};
struct Accumulated {
  const std::int32_t* excess;  // [32]
  const float* scale;          // [32]
  float* values;               // [columns][32]
  void take(int n, int row, typename V::Sums sum) const {
    Ints more;
    std::memcpy(&more, excess + row, sizeof more);
    float* place = values + n * kBlockRows + row;
    const Floats value = floats(place) + scaled(sum, more, 0, floats(scale + row));
    std::memcpy(place, &value, sizeof value);
  }
};

template <bool Plus>
struct Rounded {
  std::int64_t columns;
  const std::int32_t* excess;  // [32]
  Rounding rounding;
  ToBytes to;
  std::uint8_t* y;
  std::int64_t step;
  __attribute__((always_inline)) void take(int n, int row, typename V::Sums sum) const {
    if (n >= columns) return;
    const Ints integers = same_bits<Ints>(sum) - loaded<Ints>(excess + row);
    to.store(integers, floats(rounding.scale + row), floats(rounding.bias + row),
             Plus ? rounding.plus + n * rounding.plus_step + row : nullptr, y + n * step + row);
  }
};
template <class Sink>
constexpr bool gives_bytes =
    std::is_same_v<Sink, Rounded<true>> || std::is_same_v<Sink, Rounded<false>>;

// Once: no part overflows before the end, so there are no totals to keep in registers.
template <class Dots, int R, int N, bool Once, class Sink>
void multiply_rows(const std::int8_t* weights, std::int64_t span, const Runs& runs,
                   const std::uint8_t* const* x, const Sink& sink, int row) {
  typename V::Sums total[R][N];
  typename Dots::Part part[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) total[r][n] = V::zero(), part[r][n] = Dots::zero();
  const std::int8_t* w = weights + 4 * row;
  std::int64_t left = span;  // dots until the parts may overflow
  for (int run = 0; run < runs.count; ++run) {
    const std::uint8_t* column[N];
    for (int n = 0; n < N; ++n) column[n] = x[n] + runs.offset[run];
    for (std::int64_t i = 0, end = runs.length[run]; i < end;) {
      const std::int64_t stop = Once ? end : std::min(end, i + left);
      left -= stop - i;
      for (; i < stop; ++i, w += kRunBytes) {
        typename V::Bytes weight[R];
        for (int r = 0; r < R; ++r) weight[r] = V::load(w + r * V::kBytes);
        for (int n = 0; n < N; ++n) {
          const auto value = V::splat(column[n] + 4 * i);
          for (int r = 0; r < R; ++r)
            part[r][n] = in_order(Dots::dot(part[r][n], value, weight[r]));
        }
      }
      if (Once || left) continue;
      left = span;
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
          total[r][n] = Dots::flush(total[r][n], part[r][n]);
          part[r][n] = Dots::zero();
        }
    }
  }
  // A copy, where it is small, and constants as indices: both stay in registers.
  std::conditional_t<gives_bytes<Sink>, const Sink&, const Sink> out = sink;
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<N>([&](auto n) __attribute__((always_inline)) {
      out.take(n, row + r * kFloats, Dots::flush(Once ? V::zero() : total[r][n], part[r][n]));
    });
  });
}

template <class Dots, class Sink>
void multiply_with(const std::int8_t* weights, std::int64_t span, std::int64_t rows,
                   const Runs& runs, const std::uint8_t* const* x, const Sink& sink) {
  constexpr int kStep = V::kTileVectors * V::kBytes / 4;
  std::int64_t length = 0;
  for (int run = 0; run < runs.count; ++run) length += runs.length[run];
  // The other vectors would hold nothing, and bytes of theirs would lie on those of other rows.
  if constexpr (!gives_bytes<Sink> || kFloats >= kRowStep)
    if (rows <= kFloats && length <= span)
      return multiply_rows<Dots, 1, V::kTileColumns, true>(weights, span, runs, x, sink, 0);
  if constexpr (gives_bytes<Sink> && kFloats >= kRowStep)
    if (rows <= kFloats)
      return multiply_rows<Dots, 1, V::kTileColumns, false>(weights, span, runs, x, sink, 0);
  const auto part = length <= span
                        ? multiply_rows<Dots, V::kTileVectors, V::kTileColumns, true, Sink>
                        : multiply_rows<Dots, V::kTileVectors, V::kTileColumns, false, Sink>;
  for (int row = 0; row < std::min<std::int64_t>(rows, kBlockRows); row += kStep)
    part(weights, span, runs, x, sink, row);
}

template <class Sink>
void multiply_into(const std::int8_t* weights, int max_abs, std::int64_t rows, const Runs& runs,
                   const std::uint8_t* const* x, const Sink& sink) {
  const std::int64_t span = V::Narrow::span(255, max_abs);
  if (span)
    multiply_with<typename V::Narrow>(weights, span, rows, runs, x, sink);
  else
    multiply_with<typename V::Wide>(weights, V::Wide::span(255, max_abs), rows, runs, x, sink);
}

void multiply(const std::int8_t* weights, int max_abs, std::int64_t rows, const Runs& runs,
              const std::uint8_t* const* x, std::int32_t* sums) {
  multiply_into(weights, max_abs, rows, runs, x, Stored{sums});
}

void multiply_bytes(const std::int8_t* weights, int max_abs, std::int64_t rows, const Runs& runs,
                    const std::uint8_t* const* x, std::int64_t n, const std::int32_t* excess,
                    const Rounding& rounding, std::uint8_t* y, std::int64_t step) {
  const ToBytes to(rounding);
  if (rounding.plus)
    multiply_into(weights, max_abs, rows, runs, x, Rounded<true>{n, excess, rounding, to, y, step});
  else
    multiply_into(weights, max_abs, rows, runs, x,
                  Rounded<false>{n, excess, rounding, to, y, step});
}

// The sums of a row's weights for each scale.
template <class Dots>
void weights_of_scales(const std::int8_t* weights, std::int64_t span, const Panel& panel,
                       std::int32_t* out) {
  const auto ones = V::fill(1);
  const std::int64_t most = panel.span() / 4;
  for (std::int64_t left = panel.groups() * panel.traits().group() / 4; left > 0; left -= most) {
    const std::int64_t count = std::min(most, left);
    for (int row = 0; row < kRunBytes; row += V::kBytes, out += kFloats) {
      typename V::Sums total = V::zero();
      for (std::int64_t i = 0; i < count;) {
        typename Dots::Part part = Dots::zero();
        for (const std::int64_t stop = std::min(count, i + span); i < stop; ++i)
          part = Dots::dot(part, ones, V::load(weights + i * kRunBytes + row));
        total = Dots::flush(total, part);
      }
      V::store(out, total);
    }
    weights += count * kRunBytes;
  }
}

void excess(const Panel& panel, const std::int8_t* decoded, std::int32_t* out) {
  const std::int64_t count = panel.scales_of_row() * kBlockRows;
  if (!V::kFlip) {
    std::memset(out, 0, count * sizeof *out);
    return;
  }
  weights_of_scales<typename V::Narrow>(decoded, V::Narrow::span(1, panel.max_abs), panel, out);
  for (std::int64_t i = 0; i < count; ++i) out[i] *= V::kFlip;
}

void multiply_groups(const Panel& panel, std::int64_t block, const std::int8_t* decoded,
                     const std::int32_t* excess, const std::uint8_t* const* x, float* values) {
  const std::int64_t rows = panel.rows - block * kBlockRows, most = panel.span() / 4;
  const std::int64_t end = panel.groups() * panel.traits().group() / 4;
  const ScalesOf scales(panel, block);
  alignas(64) float scale[kBlockRows];
  std::memset(values, 0, V::kTileColumns * kBlockRows * sizeof *values);
  for (std::int64_t s = 0, start = 0; start < end; ++s, start += most) {
    const std::int64_t offset = 4 * start;
    const std::int32_t length = static_cast<std::int32_t>(std::min(most, end - start));
    for (int r = 0; r < kBlockRows; r += kFloats) {
      const Floats of_rows = scales.at(s * kBlockRows + r);
      std::memcpy(scale + r, &of_rows, sizeof of_rows);
    }
    multiply_into(decoded + start * kRunBytes, panel.max_abs, rows, Runs{1, &offset, &length}, x,
                  Accumulated{excess + s * kBlockRows, scale, values});
  }
}

// ---------------------------------------------------------------- many columns, float32

void widen(const Panel& panel, std::int64_t block, const std::int8_t* decoded, float* out) {
  const std::int64_t span = panel.shared ? panel.span() : panel.k;
  const ScalesOf scales(panel, block);
  const std::int32_t* padding = panel.padding.data();
  const std::int32_t* const end = padding + panel.padding.size();
  for (std::int64_t k = 0; k < panel.k; ++k) {
    if (padding != end && *padding == k) {
      ++padding;
      continue;
    }
    const std::int64_t place = k / span * kBlockRows;
    const int up = 24 - 8 * static_cast<int>(k % 4);  // to the top, and down with its sign
    for (int r = 0; r < kBlockRows; r += kFloats, out += kFloats) {
      Ints four;
      std::memcpy(&four, decoded + k / 4 * kRunBytes + 4 * r, sizeof four);
      Floats value = __builtin_convertvector(four << up >> 24, Floats);
      if (panel.shared) value *= scales.at(place + r);
      std::memcpy(out, &value, sizeof value);
    }
  }
}

// Floats are 4 bytes, as the groups of other products are.
struct Single {
  using Part = Floats;
  static Part zero() { return Part{}; }
  static Part dot(Part part, typename V::Bytes u, typename V::Bytes s) {
    Floats value, weight;
    std::memcpy(&value, &u, sizeof value);
    std::memcpy(&weight, &s, sizeof weight);
    return V::fma(value, weight, part);
  }
  static typename V::Sums flush(typename V::Sums, Part part) {
    typename V::Sums bits;
    std::memcpy(&bits, &part, sizeof bits);
    return bits;
  }
};

void multiply_float(const float* weights, std::int64_t rows, const Runs& runs, std::int64_t n,
                    const std::uint8_t* const* x, float* sums) {
  constexpr int kVectors = kBlockRows / kFloats;
  const auto* bytes = reinterpret_cast<const std::int8_t*>(weights);
  const Stored sink{reinterpret_cast<std::int32_t*>(sums)};
  if (n == 1) return multiply_rows<Single, kVectors, 1, true>(bytes, 0, runs, x, sink, 0);
  constexpr int kStep = V::kTileVectors * kFloats;
  for (int row = 0; row < std::min<std::int64_t>(rows, kBlockRows); row += kStep)
    multiply_rows<Single, V::kTileVectors, V::kTileColumns, true>(bytes, 0, runs, x, sink, row);
}

// ---------------------------------------------------------------- results

// Sums as floats, less what they have too much: the same for all columns of some rows.
template <bool Twice>
struct Exact {
  Ints excess;

  explicit Exact(const std::int32_t* from) { std::memcpy(&excess, from, sizeof excess); }
  Floats operator()(const std::int32_t* sums) const {
    Ints sum;
    std::memcpy(&sum, sums, sizeof sum);
    return __builtin_convertvector((Twice ? sum + sum : sum) - excess, Floats);
  }
  Floats operator()(const float* sums) const { return floats(sums); }
};

template <bool Twice, class Sum>
void values_of(const Sum* sums, std::int64_t n, const Scaling& scaling, float* y,
               std::int64_t step) {
  const Scaling s = scaling;  // a copy that no value written can change: it stays in registers
  for (int i = 0; i < s.rows; i += kFloats) {
    const Exact<Twice> exact(s.excess + i);
    const Floats row_scale = floats(s.row_scale + i);
    const Floats bias = s.bias ? floats(s.bias + i) : Floats{};
    for (std::int64_t c = 0; c < n; ++c) {
      const Floats scale = s.scale[c * s.scale_step] + Floats{};
      const Floats start = s.plus ? bias + floats(s.plus + c * s.plus_step + i) : bias;
      const Floats product = exact(sums + c * kBlockRows + i) * (scale * row_scale);
      const Floats value = limited(product + start, s);
      std::memcpy(y + c * step + i, &value, sizeof value);
    }
  }
}

void values(const std::int32_t* sums, std::int64_t n, const Scaling& scaling, float* y,
            std::int64_t step) {
  if (scaling.factor == 2)
    values_of<true>(sums, n, scaling, y, step);
  else
    values_of<false>(sums, n, scaling, y, step);
}

void values_float(const float* sums, std::int64_t n, const Scaling& scaling, float* y,
                  std::int64_t step) {
  values_of<false>(sums, n, scaling, y, step);
}

// ---------------------------------------------------------------- depthwise, bytes

// Sums of a window in int16 or int32, from kLanes channels on.
struct InShorts {
  static constexpr int kLanes = V::kBytes / 2;
  using Sum = Shorts;
  static Sum weights(const std::int16_t* p) { return loaded<Sum>(p); }
  static Sum bytes(const std::uint8_t* p) { return same_bits<Sum>(V::shorts_of_bytes(p)); }
  static Sum all(int value) { return static_cast<std::int16_t>(value) + Sum{}; }
  static Ints ints(const Sum& sum, int from) {
    return same_bits<Ints>(V::ints_of_shorts(reinterpret_cast<const std::int16_t*>(&sum) + from));
  }
};
struct InInts {
  static constexpr int kLanes = kFloats;
  using Sum = Ints;
  static Sum weights(const std::int16_t* p) { return same_bits<Sum>(V::ints_of_shorts(p)); }
  static Sum bytes(const std::uint8_t* p) { return same_bits<Sum>(V::ints_of_bytes(p)); }
  static Sum all(int value) { return value + Sum{}; }
  static Ints ints(const Sum& sum, int) { return sum; }
};

// P pixels, as many channels from x and y on as In has lanes.
template <class In, int P>
inline void window_bytes(const Taps& taps, const std::uint8_t* x, std::int64_t step, int zero,
                         const std::int16_t* weights, std::int64_t channels, const Rounding& r,
                         std::uint8_t* y) {
  const typename In::Sum zeros = In::all(zero);
  const ToBytes to(r);
  typename In::Sum sum[P];
  for (auto& own : sum) own = In::all(0);
  for (int t = 0; t < taps.count; ++t) {
    const auto weight = In::weights(weights + taps.weights[t]);
    for (int p = 0; p < P; ++p) sum[p] += weight * (In::bytes(x + taps.x[t] + p * step) - zeros);
  }
  for (int i = 0; i < In::kLanes; i += kFloats) {
    const Floats scale = floats(r.scale + i), bias = floats(r.bias + i);
    for (int p = 0; p < P; ++p) {
      const std::int64_t place = p * channels + i;
      to.store(In::ints(sum[p], i), scale, bias, r.plus ? r.plus + place : nullptr, y + place);
    }
  }
}

// The same of one channel.
inline void value_of_bytes(const Taps& taps, const std::uint8_t* x, int zero,
                           const std::int16_t* weights, const Rounding& r, std::uint8_t* y) {
  std::int32_t sum = 0;
  for (int t = 0; t < taps.count; ++t) sum += weights[taps.weights[t]] * (x[taps.x[t]] - zero);
  float value = static_cast<float>(sum) * *r.scale + *r.bias;
  if (r.plus) value += static_cast<float>(*r.plus - r.plus_zero) * r.plus_scale;
  value = value > r.low ? value : r.low;
  value = (value < r.high ? value : r.high) + (12582912.0f + static_cast<float>(r.zero));
  *y = static_cast<std::uint8_t>(bits_of(value));
}

// All channels of P pixels: whole vectors, the last of which ends with the last channel.
template <class In, int P>
inline void windows_bytes(const Taps& taps, const std::uint8_t* x, std::int64_t step, int zero,
                          const std::int16_t* weights, std::int64_t channels, const Rounding& r,
                          std::uint8_t* y) {
  constexpr std::int64_t kLanes = In::kLanes;
  const auto from = [&](std::int64_t c) {
    Rounding own = r;
    own.scale += c, own.bias += c;
    if (own.plus) own.plus += c;
    return own;
  };
  if (channels < kLanes) {
    for (int p = 0; p < P; ++p)
      for (std::int64_t c = 0; c < channels; ++c) {
        Rounding own = from(c);
        if (own.plus) own.plus += p * channels;
        value_of_bytes(taps, x + p * step + c, zero, weights + c, own, y + p * channels + c);
      }
    return;
  }
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    const std::int64_t at = std::min(c, channels - kLanes);
    window_bytes<In, P>(taps, x + at, step, zero, weights + at, channels, from(at), y + at);
  }
}

void pixels_bytes(const Taps& taps, const std::uint8_t* x, std::int64_t step, int zero,
                  const std::int16_t* weights, std::int64_t channels, std::int64_t n, bool narrow,
                  const Rounding& rounding, std::uint8_t* y) {
  Rounding at = rounding;
  const auto four = narrow ? windows_bytes<InShorts, 4> : windows_bytes<InInts, 4>;
  const auto one = narrow ? windows_bytes<InShorts, 1> : windows_bytes<InInts, 1>;
  while (n > 0) {
    const std::int64_t count = n >= 4 ? 4 : 1;
    (count == 4 ? four : one)(taps, x, step, zero, weights, channels, at, y);
    n -= count, x += count * step, y += count * channels;
    if (at.plus) at.plus += count * channels;
  }
}

// ---------------------------------------------------------------- float32

typedef float Four __attribute__((vector_size(16)));

// P pixels, and N vectors of their channels.
template <class Vector, int P, int N>
inline void window(const Taps& taps, const float* x, std::int64_t step, const float* weights,
                   std::int64_t channels, const Finish& finish, float* y) {
  constexpr int kWidth = sizeof(Vector) / sizeof(float);
  Vector sum[P][N];
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < N; ++i)
      sum[p][i] = finish.bias ? loaded<Vector>(finish.bias + i * kWidth) : Vector{};
  for (int t = 0; t < taps.count; ++t) {
    const float *value = x + taps.x[t], *weight = weights + taps.weights[t];
    for (int i = 0; i < N; ++i) {
      const Vector w = loaded<Vector>(weight + i * kWidth);
      for (int p = 0; p < P; ++p) sum[p][i] += w * loaded<Vector>(value + p * step + i * kWidth);
    }
  }
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < N; ++i) {
      const std::int64_t place = p * channels + i * kWidth;
      if (finish.plus) sum[p][i] += loaded<Vector>(finish.plus + place);
      sum[p][i] = limited(sum[p][i], finish);
      std::memcpy(y + place, &sum[p][i], sizeof(Vector));
    }
}

// P pixels, all channels. What is left of the channels behind whole vectors is done by one more
// that ends with them.
template <int P>
inline void windows(const Taps& taps, const float* x, std::int64_t step, const float* weights,
                    std::int64_t channels, const Finish& finish, float* y) {
  const auto at = [&](auto vector, auto count, std::int64_t c) {
    const Finish rest{finish.bias ? finish.bias + c : nullptr,
                      finish.plus ? finish.plus + c : nullptr, finish.low, finish.high};
    window<decltype(vector), P, count>(taps, x + c, step, weights + c, channels, rest, y + c);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  std::int64_t c = 0;
  for (; c + 2 * kFloats <= channels; c += 2 * kFloats) at(Floats{}, two, c);
  for (; c + kFloats <= channels; c += kFloats) at(Floats{}, one, c);
  if (c == channels) return;
  if (c > 0) return at(Floats{}, one, channels - kFloats);
  for (; c + 4 <= channels; c += 4) at(Four{}, one, c);
  if (c == channels) return;
  if (c > 0) return at(Four{}, one, channels - 4);
  for (; c < channels; ++c) at(0.0f, one, c);
}

void pixels(const Taps& taps, const float* x, std::int64_t step, const float* weights,
            std::int64_t channels, std::int64_t n, const Finish& finish, float* y) {
  Finish at = finish;
  const auto advance = [&](std::int64_t count) {
    n -= count, x += count * step, y += count * channels;
    if (at.plus) at.plus += count * channels;
  };
  for (; n >= 4; advance(4)) windows<4>(taps, x, step, weights, channels, at, y);
  for (; n > 0; advance(1)) windows<1>(taps, x, step, weights, channels, at, y);
}

// N vectors of a row, from i on.
template <int N>
inline void row_part(const Taps& taps, const float* x, const float* weights, std::int64_t i,
                     const Finish& finish, float* y) {
  Floats sum[N];
  for (int v = 0; v < N; ++v) sum[v] = (finish.bias ? *finish.bias : 0.0f) + Floats{};
  for (int t = 0; t < taps.count; ++t) {
    const Floats w = weights[taps.weights[t]] + Floats{};
    for (int v = 0; v < N; ++v) sum[v] += w * floats(x + taps.x[t] + i + v * kFloats);
  }
  for (int v = 0; v < N; ++v) {
    if (finish.plus) sum[v] += floats(finish.plus + i + v * kFloats);
    sum[v] = limited(sum[v], finish);
    std::memcpy(y + i + v * kFloats, &sum[v], sizeof(Floats));
  }
}

void row(const Taps& taps, const float* x, const float* weights, std::int64_t n,
         const Finish& finish, float* y) {
  std::int64_t i = 0;
  for (; i + 4 * kFloats <= n; i += 4 * kFloats) row_part<4>(taps, x, weights, i, finish, y);
  for (; i < n; i += kFloats) row_part<1>(taps, x, weights, i, finish, y);
}

#ifdef SUBBYTE_TABLES
constexpr bool kTables = true;
#else
constexpr bool kTables = false;
#endif
constexpr Kernels kKernels{V::kName,
                           V::kFlip,
                           V::kTileColumns,
                           kTables,
                           &peak,
                           &round,
                           &sum,
                           &small,
                           &small_groups,
                           &decode,
                           &multiply,
                           &multiply_bytes,
                           &excess,
                           &multiply_groups,
                           &widen,
                           &multiply_float,
                           &values,
                           &values_float,
                           &pixels,
                           &pixels_bytes,
                           &row};
