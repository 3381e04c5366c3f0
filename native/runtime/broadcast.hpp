// Values of two or three tensors that broadcast, and their common type.
#pragma once

#include <algorithm>

#include "math.hpp"
#include "op.hpp"

namespace subbyte::runtime {

Shape broadcast_shape(Op& op, const Shape& a, const Shape& b);
Shape broadcast_strides(const Shape& shape, const Shape& result);

// The argument as a tensor: numbers become one of `dtype` unless they need a wider kind.
Value tensor_or_number(Op& op, const char* name, const Value& other);
// The type that PyTorch gives to a result of both; numbers do not widen tensors of their kind.
Dtype common_type(Op& op, const Value& a, const Value& b);
Value cast(Op& op, const Value& x, Dtype dtype);

// f(begin, end, place of a, step of a, place of b, step of b) for runs of the result.
template <class F>
void for_pairs(const Shape& result, const Shape& a, const Shape& b, F&& f) {
  const std::size_t rank = result.size();
  std::size_t split = rank;  // dimensions from here on are one run
  std::int64_t inner = 1;
  std::int64_t step_a = 0, step_b = 0;
  while (split > 0) {
    const std::size_t d = split - 1;
    if (result[d] != 1) {
      const bool first = inner == 1;
      if (!first && (a[d] != step_a * inner || b[d] != step_b * inner)) break;
      if (first) step_a = a[d], step_b = b[d];
      inner *= result[d];
    }
    --split;
  }
  std::int64_t rows = 1;
  for (std::size_t d = 0; d < split; ++d) rows *= result[d];
  if (inner == 0) return;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int64_t rest = row, at_a = 0, at_b = 0;
    for (std::size_t d = split; d-- > 0; rest /= result[d]) {
      at_a += rest % result[d] * a[d];
      at_b += rest % result[d] * b[d];
    }
    f(row * inner, inner, at_a, step_a, at_b, step_b);
  }
}

// f of T to R for every value of two tensors of T.
template <class T, class R, class F>
void map_pairs(const Value& a, const Value& b, const Value& y, const Run& run, F&& f) {
  const Shape sa = broadcast_strides(a.shape, y.shape), sb = broadcast_strides(b.shape, y.shape);
  const T *left = run.in<T>(a), *right = run.in<T>(b);
  R* out = run.out<R>(y);
  for_pairs(y.shape, sa, sb,
            [&](std::int64_t at, std::int64_t n, std::int64_t p, std::int64_t step_p,
                std::int64_t q, std::int64_t step_q) {
              const T *l = left + p, *r = right + q;
              if (step_p == 1 && step_q == 1)
                for (std::int64_t i = 0; i < n; ++i) out[at + i] = f(l[i], r[i]);
              else if (step_p == 1 && step_q == 0)
                for (std::int64_t i = 0; i < n; ++i) out[at + i] = f(l[i], *r);
              else
                for (std::int64_t i = 0; i < n; ++i) out[at + i] = f(l[i * step_p], r[i * step_q]);
            });
}

// call(T{}) with the type that lies in memory.
template <class F>
void with_type(Dtype dtype, F&& call) {
  switch (dtype) {
    case Dtype::kFloat32:
      return call(float{});
    case Dtype::kInt64:
      return call(std::int64_t{});
    case Dtype::kInt32:
      return call(std::int32_t{});
    default:
      return call(std::uint8_t{});
  }
}

inline bool runs(Dtype dtype) {
  return dtype == Dtype::kFloat32 || dtype == Dtype::kInt64 || dtype == Dtype::kInt32 ||
         dtype == Dtype::kUint8 || dtype == Dtype::kBool;
}

}  // namespace subbyte::runtime
