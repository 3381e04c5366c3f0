// Sums, means and extremes over dimensions; sums in float64.
#include <cmath>
#include <limits>

#include "broadcast.hpp"
#include "bytes.hpp"

namespace subbyte::runtime {
namespace {

// How x is walked: for each value of the result, the values of x that it is made of.
struct Walk {
  Shape kept, kept_strides, gone, gone_strides, result;
  std::int64_t rows = 1, n = 1;
};

Walk walk_of(Op& op, const Value& x, const Shape& axes, bool keep, bool all) {
  std::vector<bool> reduced(x.rank(), all);
  for (const std::int64_t axis : axes) {
    const int own = op.axis(axis, x.rank());
    if (x.rank()) reduced[own] = true;
  }
  const Shape strides = strides_of(x.shape);
  Walk walk;
  for (int d = 0; d < x.rank(); ++d) {
    (reduced[d] ? walk.gone : walk.kept).push_back(x.shape[d]);
    (reduced[d] ? walk.gone_strides : walk.kept_strides).push_back(strides[d]);
    if (!reduced[d]) walk.result.push_back(x.shape[d]);
    if (reduced[d] && keep) walk.result.push_back(1);
  }
  walk.rows = count_of(walk.kept), walk.n = count_of(walk.gone);
  return walk;
}

std::int64_t place(std::int64_t index, const Shape& shape, const Shape& strides) {
  std::int64_t found = 0;
  for (std::size_t d = shape.size(); d-- > 0; index /= shape[d])
    found += index % shape[d] * strides[d];
  return found;
}

// f(result index, at) where at(i) is the place of the i-th of its values.
template <class F>
void for_rows(const Walk& walk, int threads, F&& f) {
  const bool line = walk.gone.size() == 1;
  std::vector<std::int64_t> places;
  if (!line)
    for (std::int64_t i = 0; i < walk.n; ++i)
      places.push_back(place(i, walk.gone, walk.gone_strides));
  spread(threads, walk.rows, walk.n, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t first = place(row, walk.kept, walk.kept_strides);
      f(row, [&](std::int64_t i) { return first + (line ? i * walk.gone_strides[0] : places[i]); });
    }
  });
}

Walk walk_of(Op& op, const Value& x, bool all) {
  const Shape axes = all ? Shape{} : op.integers("axes", {});
  return walk_of(op, x, axes, !all && op.flag("keepdims", false), all || axes.empty());
}

// T(sum of f(value)) -> g(sum, n)
template <class F, class G>
void sum_operator(Op& op, bool all, F f, G g) {
  Value x = op.in("x");
  const Dtype wanted = op.dtype("dtype", Dtype::kFloat32);
  if (wanted != Dtype::kFloat32) op.fail(std::string("a sum as ") + name_of(wanted));
  x = op.has("dtype") ? cast(op, x, wanted) : x;
  if (x.dtype != Dtype::kFloat32) op.fail(std::string("x is ") + name_of(x.dtype));
  const Walk walk = walk_of(op, x, all);
  const Value y = op.make(Dtype::kFloat32, walk.result);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const float* in = run.in<float>(x);
        float* out = run.out<float>(y);
        for_rows(walk, run.threads, [&](std::int64_t row, auto&& at) {
          double sum = 0.0;
          for (std::int64_t i = 0; i < walk.n; ++i) sum += f(static_cast<double>(in[at(i)]));
          out[row] = static_cast<float>(g(sum, static_cast<double>(walk.n)));
        });
      },
      "float32");
  op.result(y);
}

// The mean over the last two of four dimensions in bytes.
bool mean_of_bytes(Op& op) {
  const Value x = op.bytes("x");
  if (x.rank() != 4 || op.has("dtype")) return false;
  Shape axes = op.integers("axes", {});
  for (std::int64_t& axis : axes) axis = op.axis(axis, 4);
  std::sort(axes.begin(), axes.end());
  if (axes != Shape{2, 3}) return false;
  const bool keep = op.flag("keepdims", false);
  op.ignore({"dtype"});
  const Value y = mean_of_images(op, x);
  op.result(keep ? op.view(y, {x.shape[0], x.shape[1], 1, 1}) : y);
  return true;
}

void mean(Op& op) {
  if (mean_of_bytes(op)) return;
  sum_operator(op, false, [](double x) { return x; }, [](double sum, double n) { return sum / n; });
}

void mean_of_all(Op& op) {
  sum_operator(op, true, [](double x) { return x; }, [](double sum, double n) { return sum / n; });
}

void whole_sum(Op& op) {
  const Value x = cast(op, op.in("x"), Dtype::kInt64);
  const Walk walk = walk_of(op, x, false);
  const Value y = op.make(Dtype::kInt64, walk.result);
  op.step({x}, {y}, [=](const Run& run) {
    for_rows(walk, run.threads, [&](std::int64_t row, auto&& at) {
      std::uint64_t sum = 0;
      for (std::int64_t i = 0; i < walk.n; ++i)
        sum += static_cast<std::uint64_t>(run.in<std::int64_t>(x)[at(i)]);
      run.out<std::int64_t>(y)[row] = static_cast<std::int64_t>(sum);
    });
  });
  op.result(y);
}

void sum(Op& op) {
  const bool whole =
      op.in("x").dtype != Dtype::kFloat32 && op.dtype("dtype", Dtype::kInt64) == Dtype::kInt64;
  if (whole) return whole_sum(op);
  sum_operator(op, false, [](double x) { return x; }, [](double total, double) { return total; });
}

void norm(Op& op) {
  if (op.real("ord", 2.0) != 2.0) op.fail("a norm that is not of order 2");
  sum_operator(
      op, false, [](double x) { return x * x; },
      [](double total, double) { return std::sqrt(total); });
}

void variance(Op& op) {
  const Value x = op.floats("x");
  const double correction = op.real("correction", 1.0);
  const Walk walk = walk_of(op, x, false);
  const Value y = op.make(Dtype::kFloat32, walk.result);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const float* in = run.in<float>(x);
        for_rows(walk, run.threads, [&](std::int64_t row, auto&& at) {
          double total = 0.0, square = 0.0;
          for (std::int64_t i = 0; i < walk.n; ++i) total += in[at(i)];
          const double middle = total / static_cast<double>(walk.n);
          for (std::int64_t i = 0; i < walk.n; ++i)
            square += (in[at(i)] - middle) * (in[at(i)] - middle);
          const double n = std::max(0.0, static_cast<double>(walk.n) - correction);
          run.out<float>(y)[row] = static_cast<float>(square / n);
        });
      },
      "float32");
  op.result(y);
}

template <bool Most>
void extreme(Op& op) {
  const Value x = op.floats("x");
  const Walk walk = walk_of(op, x, false);
  if (walk.n < 1) op.fail("an extreme of no values");
  const Value y = op.make(Dtype::kFloat32, walk.result);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const float* in = run.in<float>(x);
        for_rows(walk, run.threads, [&](std::int64_t row, auto&& at) {
          float found = in[at(0)];
          for (std::int64_t i = 1; i < walk.n; ++i) {
            const float value = in[at(i)];
            if ((Most ? value > found : value < found) || std::isnan(value)) found = value;
          }
          run.out<float>(y)[row] = found;
        });
      },
      "float32");
  op.result(y);
}

template <bool Any>
void truth(Op& op) {
  const Value x = cast(op, op.in("x"), Dtype::kBool);
  const bool keep = op.flag("keepdim", false);
  const Walk walk = walk_of(op, x, {op.integer("axis")}, keep, false);
  const Value y = op.make(Dtype::kBool, walk.result);
  op.step({x}, {y}, [=](const Run& run) {
    for_rows(walk, run.threads, [&](std::int64_t row, auto&& at) {
      bool found = !Any;
      for (std::int64_t i = 0; i < walk.n; ++i) {
        const bool value = run.in<std::uint8_t>(x)[at(i)] != 0;
        found = Any ? found || value : found && value;
      }
      run.out<std::uint8_t>(y)[row] = found;
    });
  });
  op.result(y);
}

void arg_max(Op& op) {
  const Value x = op.floats("x");
  const bool all = !op.has("axis"), keep = op.flag("keepdim", false);
  const Walk walk = walk_of(op, x, all ? Shape{} : Shape{op.integer("axis")}, keep, all);
  op.ignore({"axis"});
  if (walk.n < 1) op.fail("an extreme of no values");
  const Value y = op.make(Dtype::kInt64, walk.result);
  op.step({x}, {y}, [=](const Run& run) {
    const float* in = run.in<float>(x);
    for_rows(walk, run.threads, [&](std::int64_t row, auto&& at) {
      std::int64_t found = 0;
      for (std::int64_t i = 1; i < walk.n && !std::isnan(in[at(found)]); ++i)
        if (in[at(i)] > in[at(found)] || std::isnan(in[at(i)])) found = i;
      run.out<std::int64_t>(y)[row] = found;
    });
  });
  op.result(y);
}

void cumulative_sum(Op& op) {
  Value x = op.in("x");
  const Dtype natural = x.dtype == Dtype::kFloat32 ? x.dtype : Dtype::kInt64;
  x = cast(op, x, op.dtype("dtype", natural));
  const Walk walk = walk_of(op, x, {op.integer("axis")}, true, false);
  const Value y = op.make(x.dtype, x.shape);
  op.step({x}, {y}, [=](const Run& run) {
    with_type(x.dtype, [&](auto unit) {
      using T = decltype(unit);
      for_rows(walk, run.threads, [&](std::int64_t, auto&& at) {
        T sum{};
        for (std::int64_t i = 0; i < walk.n; ++i) {
          if constexpr (std::is_same_v<T, float>)
            sum += run.in<T>(x)[at(i)];
          else
            sum = static_cast<T>(static_cast<std::uint64_t>(sum) +
                                 static_cast<std::uint64_t>(run.in<T>(x)[at(i)]));
          run.out<T>(y)[at(i)] = sum;
        }
      });
    });
  });
  op.result(y);
}

}  // namespace

Operators reduction_operators() {
  return {{"ReduceMean", mean},
          {"ReduceMeanAll", mean_of_all},
          {"ReduceSum", sum},
          {"ReduceL2", norm},
          {"Variance", variance},
          {"ReduceMax", extreme<true>},
          {"ReduceMin", extreme<false>},
          {"ReduceAny", truth<true>},
          {"ReduceAll", truth<false>},
          {"ArgMax", arg_max},
          {"CumSum", cumulative_sum}};
}

}  // namespace subbyte::runtime
