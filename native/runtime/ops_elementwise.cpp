// Arithmetic, comparisons and choices, value by value.
#include <cmath>
#include <type_traits>

#include "broadcast.hpp"
#include "bytes.hpp"

namespace subbyte::runtime {

Shape broadcast_shape(Op& op, const Shape& a, const Shape& b) {
  Shape found(std::max(a.size(), b.size()));
  for (std::size_t i = 0; i < found.size(); ++i) {
    const std::int64_t x = i < a.size() ? a[a.size() - 1 - i] : 1;
    const std::int64_t y = i < b.size() ? b[b.size() - 1 - i] : 1;
    if (x != y && x != 1 && y != 1)
      op.fail("sizes " + text_of(a) + " and " + text_of(b) + " differ");
    found[found.size() - 1 - i] = x == 1 ? y : x;
  }
  return found;
}

Shape broadcast_strides(const Shape& shape, const Shape& result) {
  const Shape own = strides_of(shape);
  Shape found(result.size(), 0);
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const std::size_t d = result.size() - shape.size() + i;
    found[d] = shape[i] == 1 ? 0 : own[i];
  }
  return found;
}

namespace {

int kind_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 2 : dtype == Dtype::kBool ? 0 : 1; }

Value known(Op& op, const Value& x) {
  if (!runs(x.dtype)) op.fail(std::string("values of type ") + name_of(x.dtype) + " do not run");
  return x;
}

}  // namespace

Value tensor_or_number(Op& op, const char* name, const Value& other) {
  const Arg& arg = op.arg(name);
  if (arg.kind == Arg::Kind::kTensor) return known(op, arg.value);
  const Dtype mine = arg.kind == Arg::Kind::kReal   ? Dtype::kFloat32
                     : arg.kind == Arg::Kind::kFlag ? Dtype::kBool
                                                    : Dtype::kInt64;
  const double value = op.real(name);
  const bool given = other.given() && kind_of(other.dtype) >= kind_of(mine);
  if (given && other.dtype == Dtype::kInt64) {
    const std::int64_t whole = arg.integer;
    return op.constant(Dtype::kInt64, {}, &whole);
  }
  return op.number(value, given ? other.dtype : mine);
}

Dtype common_type(Op& op, const Value& a, const Value& b) {
  known(op, a), known(op, b);
  if (a.dtype == b.dtype) return a.dtype;
  const int ka = kind_of(a.dtype), kb = kind_of(b.dtype);
  // A tensor without dimensions does not widen one with them, unless it is of a higher kind.
  if (ka != kb) return ka > kb ? a.dtype : b.dtype;
  if (!a.rank() && b.rank()) return b.dtype;
  if (!b.rank() && a.rank()) return a.dtype;
  return size_of(a.dtype) >= size_of(b.dtype) ? a.dtype : b.dtype;
}

Value cast(Op& op, const Value& x, Dtype dtype) {
  known(op, x);
  if (x.dtype == dtype) return x;
  const Value y = op.make(dtype, x.shape);
  known(op, y);
  op.step({x}, {y}, [=](const Run& run) {
    with_type(x.dtype, [&](auto from) {
      with_type(dtype, [&](auto to) {
        using From = decltype(from);
        using To = decltype(to);
        const From* in = run.in<From>(x);
        To* out = run.out<To>(y);
        for (std::int64_t i = 0, n = x.count(); i < n; ++i) {
          if (dtype == Dtype::kBool) {
            out[i] = static_cast<To>(in[i] != From{});
          } else if constexpr (std::is_same_v<From, float> && !std::is_same_v<To, float>) {
            // Beyond the type's range the result is a number of it, as in no other way is said.
            const double value = static_cast<double>(in[i]);
            const bool fits = value > -9.2e18 && value < 9.2e18;
            out[i] = static_cast<To>(fits ? static_cast<std::int64_t>(value) : INT64_MIN);
          } else {
            out[i] = static_cast<To>(in[i]);
          }
        }
      });
    });
  });
  return y;
}

namespace {

// One binary operation of values of one type, whole numbers wrap around.
template <class F>
Value arithmetic(Op& op, Value a, Value b, F f) {
  const Dtype dtype = common_type(op, a, b);
  a = cast(op, a, dtype), b = cast(op, b, dtype);
  const Value y = op.make(dtype, broadcast_shape(op, a.shape, b.shape));
  const Value& reuse = a.shape == y.shape ? a : b.shape == y.shape ? b : Value{};
  op.step(
      {a, b}, {y},
      [=](const Run& run) {
        with_type(dtype, [&](auto unit) {
          using T = decltype(unit);
          map_pairs<T, T>(a, b, y, run, f);
        });
      },
      "", reuse);
  return y;
}

template <class T>
T plus(T a, T b) {
  if constexpr (std::is_same_v<T, float>)
    return a + b;
  else
    return static_cast<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
}

template <class T>
T times(T a, T b) {
  if constexpr (std::is_same_v<T, float>)
    return a * b;
  else
    return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
}

template <class T>
T minus(T a, T b) {
  if constexpr (std::is_same_v<T, float>)
    return a - b;
  else
    return static_cast<T>(static_cast<std::uint64_t>(a) - static_cast<std::uint64_t>(b));
}

struct Pair {
  Value a, b;
};

Pair pair_of(Op& op) {
  const bool first = op.arg("a").kind == Arg::Kind::kTensor;
  if (first) {
    const Value a = known(op, op.in("a"));
    return {a, tensor_or_number(op, "b", a)};
  }
  const Value b = known(op, op.in("b"));
  return {tensor_or_number(op, "a", b), b};
}

// b times alpha, where it is not 1.
Value scaled(Op& op, const Value& b) {
  if (op.real("alpha", 1.0) == 1.0) return b;
  const Value alpha = tensor_or_number(op, "alpha", b);
  return arithmetic(op, b, alpha, [](auto x, auto y) { return times(x, y); });
}

// round((a - zero) * (a's scale / y's) + (b - zero) * (b's scale / y's)), in float32.
bool add_bytes(Op& op) {
  const Value a = op.bytes("a"), b = op.bytes("b");
  const ByteScale* scale = op.result_scale();
  if (!a.given() || !b.given() || a.shape != b.shape || !scale || op.real("alpha", 1.0) != 1.0)
    return false;
  const Value y = op.make_bytes(a.shape, *scale);
  op.step(
      {a, b}, {y},
      [=](const Run& run) {
        const std::uint8_t *left = run.in<std::uint8_t>(a), *right = run.in<std::uint8_t>(b);
        std::uint8_t* out = run.out<std::uint8_t>(y);
        const float inverse = 1.0f / y.scale.scale;
        const float p = a.scale.scale * inverse, q = b.scale.scale * inverse;
        spread(run.threads, y.count(), 2, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i)
            out[i] = rounded(static_cast<float>(left[i] - a.scale.zero) * p +
                                 static_cast<float>(right[i] - b.scale.zero) * q,
                             1.0f, y.scale);
        });
      },
      kStatic, a);
  op.result(y);
  return true;
}

void add(Op& op) {
  if (add_bytes(op)) return;
  const Pair p = pair_of(op);
  const Value b = scaled(op, p.b);
  if (p.a.dtype == Dtype::kBool && b.dtype == Dtype::kBool)
    return op.result(arithmetic(op, p.a, b, [](auto x, auto y) {
      return static_cast<decltype(x)>(x != decltype(x){} || y != decltype(y){});
    }));
  op.result(arithmetic(op, p.a, b, [](auto x, auto y) { return plus(x, y); }));
}

void sub(Op& op) {
  const Pair p = pair_of(op);
  op.result(arithmetic(op, p.a, scaled(op, p.b), [](auto x, auto y) { return minus(x, y); }));
}

void sub_from(Op& op) {
  const Pair p = pair_of(op);
  op.result(arithmetic(op, p.b, scaled(op, p.a), [](auto x, auto y) { return minus(x, y); }));
}

void mul(Op& op) {
  const Pair p = pair_of(op);
  op.result(arithmetic(op, p.a, p.b, [](auto x, auto y) { return times(x, y); }));
}

void div(Op& op) {
  const Pair p = pair_of(op);
  const Value a = cast(op, p.a, Dtype::kFloat32), b = cast(op, p.b, Dtype::kFloat32);
  op.result(arithmetic(op, a, b, [](auto x, auto y) {
    if constexpr (std::is_same_v<decltype(x), float>)
      return x / y;
    else
      return x;  // there are floats only
  }));
}

void maximum(Op& op) {
  const Pair p = pair_of(op);
  op.result(arithmetic(op, p.a, p.b, [](auto x, auto y) { return x > y || x != x ? x : y; }));
}

void minimum(Op& op) {
  const Pair p = pair_of(op);
  op.result(arithmetic(op, p.a, p.b, [](auto x, auto y) { return x < y || x != x ? x : y; }));
}

template <class F>
void whole(Op& op, F f) {
  const Pair p = pair_of(op);
  if (kind_of(p.a.dtype) == 2 || kind_of(p.b.dtype) == 2) op.fail("bits of float values");
  op.result(arithmetic(op, p.a, p.b, [f](auto x, auto y) {
    if constexpr (std::is_same_v<decltype(x), float>)
      return x + y;  // there are whole numbers only
    else
      return static_cast<decltype(x)>(f(x, y));
  }));
}

void bitwise_and(Op& op) {
  whole(op, [](auto x, auto y) { return x & y; });
}
void bitwise_or(Op& op) {
  whole(op, [](auto x, auto y) { return x | y; });
}

template <class F>
void comparison(Op& op, F f) {
  Pair p = pair_of(op);
  const Dtype dtype = common_type(op, p.a, p.b);
  const Value a = cast(op, p.a, dtype), b = cast(op, p.b, dtype);
  const Value y = op.make(Dtype::kBool, broadcast_shape(op, a.shape, b.shape));
  op.step({a, b}, {y}, [=](const Run& run) {
    with_type(dtype, [&](auto unit) {
      using T = decltype(unit);
      map_pairs<T, std::uint8_t>(a, b, y, run, f);
    });
  });
  op.result(y);
}

void equal(Op& op) {
  comparison(op, [](auto x, auto y) { return x == y; });
}
void not_equal(Op& op) {
  comparison(op, [](auto x, auto y) { return x != y; });
}
void less(Op& op) {
  comparison(op, [](auto x, auto y) { return x < y; });
}
void less_or_equal(Op& op) {
  comparison(op, [](auto x, auto y) { return x <= y; });
}
void greater(Op& op) {
  comparison(op, [](auto x, auto y) { return x > y; });
}
void greater_or_equal(Op& op) {
  comparison(op, [](auto x, auto y) { return x >= y; });
}

void logical_and(Op& op) {
  comparison(op, [](auto x, auto y) { return x != decltype(x){} && y != decltype(y){}; });
}

void logical_not(Op& op) {
  const Value x = known(op, op.in("x"));
  const Value y = op.make(Dtype::kBool, x.shape);
  op.step({x}, {y}, [=](const Run& run) {
    with_type(x.dtype, [&](auto unit) {
      using T = decltype(unit);
      for (std::int64_t i = 0, n = x.count(); i < n; ++i)
        run.out<std::uint8_t>(y)[i] = run.in<T>(x)[i] == T{};
    });
  });
  op.result(y);
}

void bitwise_not(Op& op) {
  if (op.in("x").dtype != Dtype::kBool) op.fail("bits of values that are no bool");
  logical_not(op);
}

// condition ? a : b, all three broadcast.
void choose(Op& op, Value condition, Value a, Value b) {
  const Dtype dtype = common_type(op, a, b);
  a = cast(op, a, dtype), b = cast(op, b, dtype);
  if (condition.dtype != Dtype::kBool) condition = cast(op, condition, Dtype::kBool);
  const Shape shape = broadcast_shape(op, condition.shape, broadcast_shape(op, a.shape, b.shape));
  const Value y = op.make(dtype, shape);
  op.step({condition, a, b}, {y}, [=](const Run& run) {
    const Shape sc = broadcast_strides(condition.shape, shape);
    const Shape sa = broadcast_strides(a.shape, shape), sb = broadcast_strides(b.shape, shape);
    with_type(dtype, [&](auto unit) {
      using T = decltype(unit);
      for (std::int64_t i = 0, n = y.count(); i < n; ++i) {
        std::int64_t rest = i, at_c = 0, at_a = 0, at_b = 0;
        for (std::size_t d = shape.size(); d-- > 0; rest /= shape[d]) {
          const std::int64_t at = rest % shape[d];
          at_c += at * sc[d], at_a += at * sa[d], at_b += at * sb[d];
        }
        run.out<T>(y)[i] =
            run.in<std::uint8_t>(condition)[at_c] ? run.in<T>(a)[at_a] : run.in<T>(b)[at_b];
      }
    });
  });
  op.result(y);
}

void where(Op& op) {
  const bool first = op.arg("x").kind == Arg::Kind::kTensor;
  const Value tensor = first ? op.in("x") : op.maybe("y");
  const Value x = tensor_or_number(op, "x", tensor), y = tensor_or_number(op, "y", x);
  choose(op, op.in("condition"), x, y);
}

void masked_fill(Op& op) {
  const Value x = known(op, op.in("x"));
  const Value value = cast(op, tensor_or_number(op, "value", x), x.dtype);
  choose(op, op.in("mask"), value, x);
}

}  // namespace

Operators elementwise_operators() {
  return {{"Add", add},
          {"AddScalar", add},
          {"Sub", sub},
          {"SubFrom", sub_from},
          {"Mul", mul},
          {"MulScalar", mul},
          {"Div", div},
          {"Maximum", maximum},
          {"Minimum", minimum},
          {"BitwiseAnd", bitwise_and},
          {"BitwiseOr", bitwise_or},
          {"BitwiseNot", bitwise_not},
          {"Equal", equal},
          {"EqualScalar", equal},
          {"NotEqualScalar", not_equal},
          {"Less", less},
          {"LessScalar", less},
          {"LessOrEqual", less_or_equal},
          {"LessOrEqualScalar", less_or_equal},
          {"Greater", greater},
          {"GreaterScalar", greater},
          {"GreaterOrEqual", greater_or_equal},
          {"GreaterOrEqualScalar", greater_or_equal},
          {"And", logical_and},
          {"Not", logical_not},
          {"Where", where},
          {"WhereScalar", where},
          {"MaskedFill", masked_fill},
          {"MaskedFillTensor", masked_fill}};
}

}  // namespace subbyte::runtime
