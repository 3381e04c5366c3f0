// Values by their indices, and tensors made of nothing.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "broadcast.hpp"
#include "bytes.hpp"
#include "convs.hpp"

namespace subbyte::runtime {
namespace {

std::int64_t index_at(const Run& run, const Value& index, std::int64_t i, std::int64_t size) {
  std::int64_t found = index.dtype == Dtype::kInt64 ? run.in<std::int64_t>(index)[i]
                                                    : run.in<std::int32_t>(index)[i];
  if (found < -size || found >= size)
    throw Error("index " + std::to_string(found) + " is none of " + std::to_string(size));
  return found < 0 ? found + size : found;
}

Value indices(Op& op, const char* name) {
  const Value index = op.in(name);
  if (index.dtype != Dtype::kInt64 && index.dtype != Dtype::kInt32)
    op.fail("indices are " + std::string(name_of(index.dtype)));
  return index;
}

void index_select(Op& op, const Value& x, const Value& index, int axis, const Shape& shape) {
  const Value y = op.make(x.dtype, shape);
  std::int64_t outer = 1, inner = static_cast<std::int64_t>(size_of(x.dtype));
  for (int d = 0; d < axis; ++d) outer *= x.shape[d];
  for (int d = axis + 1; d < x.rank(); ++d) inner *= x.shape[d];
  const std::int64_t n = index.count(), size = x.shape[axis];
  op.step({x, index}, {y}, [=](const Run& run) {
    const std::uint8_t* in = run.in<std::uint8_t>(x);
    std::uint8_t* out = run.out<std::uint8_t>(y);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t at = index_at(run, index, i, size);
      for (std::int64_t o = 0; o < outer && inner; ++o)
        std::memcpy(out + (o * n + i) * inner, in + (o * size + at) * inner, inner);
    }
  });
  op.result(y);
}

void gather(Op& op) {
  const Value table = op.in("data"), index = indices(op, "indices");
  op.ignore({"padding_idx", "scale_grad_by_freq", "sparse"});
  if (table.rank() != 2) op.fail("the table is " + text_of(table.shape));
  Shape shape = index.shape;
  shape.push_back(table.shape[1]);
  index_select(op, table, index, 0, shape);
}

void index_select_operator(Op& op) {
  const Value x = op.in("x"), index = indices(op, "index");
  const int axis = op.axis("axis", x.rank());
  if (!x.rank() || index.rank() > 1) op.fail("x is " + text_of(x.shape));
  Shape shape = x.shape;
  shape[axis] = index.count();
  index_select(op, x, index, axis, shape);
}

void gather_elements(Op& op) {
  const Value x = op.in("x"), index = indices(op, "index");
  op.ignore({"sparse_grad"});
  const int axis = op.axis("axis", x.rank());
  bool fits = x.rank() == index.rank() && x.rank();
  for (int d = 0; fits && d < x.rank(); ++d) fits = d == axis || index.shape[d] <= x.shape[d];
  if (!fits) op.fail("x is " + text_of(x.shape) + ", the indices " + text_of(index.shape));
  const Value y = op.make(x.dtype, index.shape);
  const Shape strides = strides_of(x.shape);
  op.step({x, index}, {y}, [=](const Run& run) {
    const std::size_t size = size_of(x.dtype);
    for (std::int64_t i = 0, n = y.count(); i < n; ++i) {
      std::int64_t rest = i, at = 0;
      for (int d = y.rank(); d-- > 0; rest /= y.shape[d])
        at += (d == axis ? index_at(run, index, i, x.shape[axis]) : rest % y.shape[d]) * strides[d];
      std::memcpy(run.out<std::uint8_t>(y) + i * size, run.in<std::uint8_t>(x) + at * size, size);
    }
  });
  op.result(y);
}

// As x[i, j, ...] with tensors for some of the dimensions, which broadcast.
struct Picked {
  std::vector<Value> index;  // of the dimensions in `dims`
  std::vector<int> dims;
  Shape chosen{}, rest{}, rest_strides{}, result{};
  std::size_t before = 0;  // dimensions of the result before those of the indices
};

Picked picked_of(Op& op, const Value& x) {
  const Arg given = op.arg("indices");
  Picked p;
  if (given.kind != Arg::Kind::kList || given.list.size() > x.shape.size())
    op.fail("indices are no list of tensors");
  const Shape strides = strides_of(x.shape);
  for (int d = 0; d < x.rank(); ++d) {
    const bool here =
        d < static_cast<int>(given.list.size()) && given.list[d].kind == Arg::Kind::kTensor;
    if (!here) {
      p.rest.push_back(x.shape[d]), p.rest_strides.push_back(strides[d]);
      continue;
    }
    p.dims.push_back(d), p.index.push_back(given.list[d].value);
    if (p.index.back().dtype != Dtype::kInt64 && p.index.back().dtype != Dtype::kInt32)
      op.fail("indices are " + std::string(name_of(p.index.back().dtype)));
    p.chosen = p.index.size() == 1 ? p.index[0].shape
                                   : broadcast_shape(op, p.chosen, p.index.back().shape);
  }
  if (p.dims.empty()) op.fail("there are no indices");
  const bool together = p.dims.back() - p.dims.front() + 1 == static_cast<int>(p.dims.size());
  p.before = together ? static_cast<std::size_t>(p.dims.front()) : 0;
  p.result = p.rest;
  p.result.insert(p.result.begin() + static_cast<std::ptrdiff_t>(p.before), p.chosen.begin(),
                  p.chosen.end());
  return p;
}

void index(Op& op) {
  const Value x = op.in("x");
  const Picked p = picked_of(op, x);
  const Value y = op.make(x.dtype, p.result);
  std::vector<Value> reads = p.index;
  reads.push_back(x);
  const Shape strides = strides_of(x.shape);
  op.step(reads, {y}, [=](const Run& run) {
    const std::size_t size = size_of(x.dtype), first = p.before, last = first + p.chosen.size();
    for (std::int64_t i = 0, n = y.count(); i < n; ++i) {
      std::int64_t rest = i, place = 0;
      Shape at(p.result.size());
      for (std::size_t d = at.size(); d-- > 0; rest /= p.result[d]) at[d] = rest % p.result[d];
      for (std::size_t d = 0; d < p.rest.size(); ++d)
        place += at[d < first ? d : d + p.chosen.size()] * p.rest_strides[d];
      for (std::size_t k = 0; k < p.index.size(); ++k) {
        const Shape own = broadcast_strides(p.index[k].shape, p.chosen);
        std::int64_t of_index = 0;
        for (std::size_t d = first; d < last; ++d) of_index += at[d] * own[d - first];
        place += index_at(run, p.index[k], of_index, x.shape[p.dims[k]]) * strides[p.dims[k]];
      }
      std::memcpy(run.out<std::uint8_t>(y) + i * size, run.in<std::uint8_t>(x) + place * size,
                  size);
    }
  });
  op.result(y);
}

// Matrices with what lies above (or below) a diagonal set to 0.
template <bool Upper>
void triangle(Op& op) {
  const Value x = op.in("x");
  const std::int64_t diagonal = op.integer("diagonal", 0);
  if (x.rank() < 2) op.fail("x is " + text_of(x.shape));
  const std::int64_t rows = x.shape[x.rank() - 2], columns = x.shape.back();
  const Value y = op.make(x.dtype, x.shape);
  op.step({x}, {y}, [=](const Run& run) {
    const std::size_t size = size_of(x.dtype);
    for (std::int64_t i = 0, n = x.count(); i < n; ++i) {
      const std::int64_t row = i / columns % rows, column = i % columns;
      const bool keep = Upper ? column - row >= diagonal : column - row <= diagonal;
      std::uint8_t* out = run.out<std::uint8_t>(y) + i * size;
      if (keep)
        std::memcpy(out, run.in<std::uint8_t>(x) + i * size, size);
      else
        std::memset(out, 0, size);
    }
  });
  op.result(y);
}

// Images in bytes with zeros around them, left, right, above and below; row by row.
Value bordered(Op& op, const Value& x, const std::array<std::int64_t, 4>& pads) {
  const auto [left, right, above, below] = pads;
  const std::int64_t h = x.shape[2], w = x.shape[3], channels = x.shape[1];
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  for (const std::int64_t pad : pads)
    if (pad < 0 || pad > kMost) op.fail("pads are " + std::to_string(pad));
  const Value y =
      op.make_bytes({x.shape[0], channels, h + above + below, w + left + right}, x.scale);
  op.step(
      {x}, {y},
      [=](const Run& run) {
        const std::int64_t row = y.shape[3] * channels, own = w * channels;
        const std::int64_t before = left * channels, after = right * channels;
        const std::uint8_t* in = run.in<std::uint8_t>(x);
        std::uint8_t* out = run.out<std::uint8_t>(y);
        spread(run.threads, y.shape[0] * y.shape[2], row,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const std::int64_t at = i % y.shape[2] - above;
                   std::uint8_t* to = out + i * row;
                   if (at < 0 || at >= h) {
                     std::memset(to, x.scale.zero, row);
                     continue;
                   }
                   std::memset(to, x.scale.zero, before);
                   std::memcpy(to + before, in + (i / y.shape[2] * h + at) * own, own);
                   std::memset(to + before + own, x.scale.zero, after);
                 }
               });
      },
      kStatic);
  return y;
}

// Zeros around images in bytes: the last dimension in memory is that of the channels.
bool pad_bytes(Op& op) {
  const Value x = op.bytes("x");
  Shape pads = op.integers("pads");
  const bool grows = std::all_of(pads.begin(), pads.end(), [](std::int64_t p) { return p >= 0; });
  const bool zeros =
      grows && op.word("mode", "constant") == "constant" && op.real("value", 0.0) == 0.0;
  if (x.rank() != 4 || !zeros || pads.size() % 2 || pads.size() > 8) return false;
  pads.resize(8, 0);  // of w, h, c, n
  if (pads[4] || pads[5] || pads[6] || pads[7]) {
    const Shape own{pads[4], pads[5], pads[0], pads[1], pads[2], pads[3], pads[6], pads[7]};
    const Value y = padded(op, plain(op, x), own, "constant", x.scale.zero);
    op.result(as_bytes(op, y, {y.shape[0], y.shape[3], y.shape[1], y.shape[2]}, x.scale));
    return true;
  }
  op.result(bordered(op, x, {pads[0], pads[1], pads[2], pads[3]}));
  return true;
}

void pad(Op& op) {
  if (pad_bytes(op)) return;
  const Value x = op.in("x");
  const std::string mode = op.word("mode", "constant");
  op.result(padded(op, x, op.integers("pads"), mode, op.real("value", 0.0)));
}

void cast_to(Op& op) {
  const Value x = op.in("x");
  op.ignore({"non_blocking", "copy", "memory_format"});
  op.result(cast(op, x, op.dtype("to", x.dtype)));
}

void cast_like(Op& op) { op.result(cast(op, op.in("x"), op.in("like").dtype)); }

void filled(Op& op, const Shape& shape, const Value& number) {
  const Value y = op.make(number.dtype, shape);
  op.step({number}, {y}, [=](const Run& run) {
    const std::size_t size = size_of(y.dtype);
    for (std::int64_t i = 0, n = y.count(); i < n; ++i)
      std::memcpy(run.out<std::uint8_t>(y) + i * size, run.in<std::uint8_t>(number), size);
  });
  op.result(y);
}

// A number, of the type that is asked for, or its own.
Value number_of(Op& op, const char* name, Dtype otherwise) {
  const Value own = tensor_or_number(op, name, {});
  const Dtype dtype = op.dtype("dtype", own.dtype == Dtype::kInt64 ? otherwise : own.dtype);
  return cast(op, own, dtype);
}

void full(Op& op) {
  const Value number = number_of(op, "value", Dtype::kInt64);
  filled(op, op.integers("shape"), number);
}

void full_like(Op& op) {
  const Value x = op.in("x");
  op.ignore({"memory_format"});
  const Value own = tensor_or_number(op, "value", x);
  filled(op, x.shape, cast(op, own, op.dtype("dtype", x.dtype)));
}

template <int Number, bool Like>
void constant(Op& op) {
  Dtype dtype = Dtype::kFloat32;
  Shape shape;
  if (Like) {
    const Value x = op.in("x");
    dtype = x.dtype, shape = x.shape;
    op.ignore({"memory_format"});
  } else {
    if (op.has("x")) dtype = op.in("x").dtype;
    shape = op.integers("shape");
  }
  filled(op, shape, op.number(Number, op.dtype("dtype", dtype)));
}

void scalar_tensor(Op& op) {
  const Arg& given = op.arg("s");
  const Dtype dtype = op.dtype("dtype", Dtype::kFloat32);
  if (given.kind == Arg::Kind::kTensor) return op.result(cast(op, given.value, dtype));
  op.result(op.number(op.real("s"), dtype));
}

void range(Op& op, std::int64_t start, std::int64_t end, std::int64_t step) {
  const Dtype dtype = op.dtype("dtype", Dtype::kInt64);
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  if (step == 0 || std::abs(step) > kMost || std::abs(start) > kMost || std::abs(end) > kMost ||
      (end - start) / step > 1 << 28)
    op.fail("numbers from " + std::to_string(start) + " to " + std::to_string(end));
  const std::int64_t n = std::max<std::int64_t>(
      0, (end - start) / step + ((end - start) % step != 0 && (end > start) == (step > 0)));
  std::vector<std::int64_t> numbers;
  for (std::int64_t i = 0; i < n; ++i) numbers.push_back(start + i * step);
  op.result(cast(op, op.constant(Dtype::kInt64, {n}, numbers.data()), dtype));
}

void range_operator(Op& op) {
  const std::int64_t start = op.integer("start");
  range(op, start, op.integer("end"), op.integer("step", 1));
}
void range_to(Op& op) { range(op, 0, op.integer("end"), 1); }
void range_from(Op& op) {
  const std::int64_t start = op.integer("start");
  range(op, start, op.integer("end"), 1);
}

}  // namespace

Operators index_operators() {
  return {{"Gather", gather},
          {"IndexSelect", index_select_operator},
          {"GatherElements", gather_elements},
          {"Index", index},
          {"Trilu", triangle<false>},
          {"Triu", triangle<true>},
          {"Pad", pad},
          {"ConstantPad", pad},
          {"Cast", cast_to},
          {"CastCopy", cast_to},
          {"CastLike", cast_like}};
}

Operators constant_operators() {
  return {{"Range", range_operator},       {"RangeTo", range_to},
          {"RangeFrom", range_from},       {"ConstantOfShape", full},
          {"FullLike", full_like},         {"Zeros", constant<0, false>},
          {"Ones", constant<1, false>},    {"NewZeros", constant<0, false>},
          {"NewOnes", constant<1, false>}, {"ZerosLike", constant<0, true>},
          {"OnesLike", constant<1, true>}, {"ScalarTensor", scalar_tensor}};
}

}  // namespace subbyte::runtime
