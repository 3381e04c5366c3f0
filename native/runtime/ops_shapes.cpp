// Other shapes of the same values: views where they lie as they did, copies where not.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "bytes.hpp"
#include "math.hpp"
#include "op.hpp"

namespace subbyte::runtime {
namespace {

// A copy of x's values that lie `strides` apart from `offset` on.
Value copied(Op& op, const Value& x, std::int64_t offset, const Shape& strides,
             const Shape& shape) {
  const Value y = op.make(x.dtype, shape);
  op.step({x}, {y}, [=](const Run& run) {
    if (y.count() == 0) return;
    copy_strided(run.in<std::uint8_t>(x), offset, strides, shape, size_of(x.dtype),
                 run.out<std::uint8_t>(y));
  });
  return y;
}

Value permuted(Op& op, const Value& x, const std::vector<int>& perm);

// x of another shape; images in bytes become rows in bytes, everything else floats.
void result_as(Op& op, const Shape& shape) {
  const Value x = op.bytes("x");
  const bool rows = x.rank() == 4 && shape.size() == 2 && shape[0] == x.shape[0];
  if (!rows || count_of(shape) != x.count()) return op.result(op.view(op.in("x"), shape));
  const Value together = permuted(op, plain(op, x), {0, 3, 1, 2});  // by channels, as floats lie
  op.result(as_bytes(op, together, shape, x.scale));
}

void reshape(Op& op) {
  Shape shape = op.integers("shape");
  const std::int64_t count = count_of(op.shape_of("x"));
  std::int64_t rest = -1, known = 1;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] == -1 && rest < 0)
      rest = static_cast<std::int64_t>(d);
    else if (shape[d] < 0 || __builtin_mul_overflow(known, shape[d], &known))
      op.fail("the shape is " + text_of(shape));
  }
  if (rest >= 0 && known > 0) shape[rest] = count / known;
  result_as(op, shape);
}

void flatten(Op& op) {
  const Shape own = op.shape_of("x");
  const int rank = static_cast<int>(own.size());
  const int first = op.axis(op.integer("start_dim", 0), rank);
  const int last = op.axis(op.integer("end_dim", -1), rank);
  if (!rank) return op.result(op.view(op.in("x"), {1}));
  if (first > last) op.fail("start_dim is behind end_dim");
  Shape shape(own.begin(), own.begin() + first);
  shape.push_back(count_of({own.begin() + first, own.begin() + last + 1}));
  shape.insert(shape.end(), own.begin() + last + 1, own.end());
  result_as(op, shape);
}

void unflatten(Op& op) {
  const Value x = op.in("x");
  const int axis = op.axis("axis", x.rank());
  Shape sizes = op.integers("sizes");
  if (!x.rank()) op.fail("x has no dimensions");
  std::int64_t known = 1;
  for (const std::int64_t size : sizes) {
    if (size < -1 || __builtin_mul_overflow(known, size == -1 ? 1 : size, &known))
      op.fail("sizes are " + text_of(sizes));
  }
  for (std::int64_t& size : sizes)
    if (size == -1 && known) size = x.shape[axis] / known;
  Shape shape(x.shape.begin(), x.shape.begin() + axis);
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  shape.insert(shape.end(), x.shape.begin() + axis + 1, x.shape.end());
  op.result(op.view(x, shape));
}

Value permuted(Op& op, const Value& x, const std::vector<int>& perm) {
  const Shape strides = strides_of(x.shape);
  Shape shape, steps;
  int before = -1;
  bool same = true;  // the dimensions that are more than 1 keep their order
  for (const int d : perm) {
    shape.push_back(x.shape[d]), steps.push_back(strides[d]);
    if (x.shape[d] == 1) continue;
    same = same && d > before;
    before = d;
  }
  return same ? op.view(x, shape) : copied(op, x, 0, steps, shape);
}

std::vector<int> in_order(int rank) {
  std::vector<int> perm(rank);
  std::iota(perm.begin(), perm.end(), 0);
  return perm;
}

void transpose(Op& op) {
  const Value x = op.in("x");
  std::vector<int> perm;
  for (const std::int64_t d : op.integers("perm")) perm.push_back(op.axis(d, x.rank()));
  std::vector<int> sorted = perm;
  std::sort(sorted.begin(), sorted.end());
  if (sorted != in_order(x.rank())) op.fail("perm is no order of the dimensions");
  op.result(permuted(op, x, perm));
}

void swap_axes(Op& op) {
  const Value x = op.in("x");
  std::vector<int> perm = in_order(x.rank());
  const int a = op.axis("dim0", x.rank()), b = op.axis("dim1", x.rank());
  if (x.rank()) std::swap(perm[a], perm[b]);
  op.result(permuted(op, x, perm));
}

void transpose_matrix(Op& op) {
  const Value x = op.in("x");
  if (x.rank() > 2) op.fail("x is " + text_of(x.shape));
  std::vector<int> perm = in_order(x.rank());
  std::reverse(perm.begin(), perm.end());
  op.result(permuted(op, x, perm));
}

void move_axis(Op& op) {
  const Value x = op.in("x");
  std::vector<int> perm = in_order(x.rank());
  if (!x.rank()) op.fail("x has no dimensions");
  const int from = op.axis("source", x.rank()), to = op.axis("destination", x.rank());
  perm.erase(perm.begin() + from);
  perm.insert(perm.begin() + to, from);
  op.result(permuted(op, x, perm));
}

void squeeze_axes(Op& op, const Shape& axes) {
  const Value x = op.in("x");
  std::vector<bool> gone(x.rank(), false);
  for (const std::int64_t axis : axes) {
    const int own = op.axis(axis, x.rank());
    if (x.rank() && x.shape[own] == 1) gone[own] = true;
  }
  Shape shape;
  for (int d = 0; d < x.rank(); ++d)
    if (!gone[d]) shape.push_back(x.shape[d]);
  op.result(op.view(x, shape));
}

void squeeze(Op& op) { squeeze_axes(op, {op.integer("axis")}); }
void squeeze_several(Op& op) { squeeze_axes(op, op.integers("axes")); }

void unsqueeze(Op& op) {
  const Value x = op.in("x");
  Shape shape = x.shape;
  shape.insert(shape.begin() + op.axis("axis", x.rank() + 1), 1);
  op.result(op.view(x, shape));
}

void expand(Op& op) {
  const Value x = op.in("x");
  Shape shape = op.integers("shape");
  op.ignore({"implicit"});
  if (shape.size() < x.shape.size()) op.fail("the shape is " + text_of(shape));
  const Shape own = strides_of(x.shape);
  Shape strides(shape.size(), 0);
  for (std::size_t i = 0; i < x.shape.size(); ++i) {
    std::int64_t& size = shape[shape.size() - x.shape.size() + i];
    if (size == -1) size = x.shape[i];
    if (size != x.shape[i] && x.shape[i] != 1)
      op.fail("x is " + text_of(x.shape) + ", the shape " + text_of(shape));
    strides[shape.size() - x.shape.size() + i] = x.shape[i] == 1 ? 0 : own[i];
  }
  if (count_of(shape) == x.count()) return op.result(op.view(x, shape));
  op.result(copied(op, x, 0, strides, shape));
}

void tile(Op& op) {
  Value x = op.in("x");
  const Shape repeats = op.integers("repeats");
  if (repeats.size() < x.shape.size()) op.fail("repeats are " + text_of(repeats));
  Shape shape = x.shape;
  shape.insert(shape.begin(), repeats.size() - shape.size(), 1);
  Shape wide, strides, result;
  const Shape own = strides_of(shape);
  for (std::size_t d = 0; d < shape.size(); ++d) {
    wide.push_back(repeats[d]), strides.push_back(0);
    wide.push_back(shape[d]), strides.push_back(own[d]);
    count_of({repeats[d], shape[d]});
    result.push_back(repeats[d] * shape[d]);
  }
  if (wide.size() > 16) op.fail("x has too many dimensions");
  op.result(op.view(copied(op, x, 0, strides, wide), result));
}

void repeat(Op& op) {
  const Value x = op.in("x");
  const std::int64_t times = op.integer("repeats");
  op.ignore({"output_size"});
  const int axis = op.axis("axis", x.rank());
  if (!x.rank() || times < 0) op.fail("repeats are " + std::to_string(times));
  Shape wide = x.shape, strides = strides_of(x.shape), shape = x.shape;
  wide.insert(wide.begin() + axis + 1, times), strides.insert(strides.begin() + axis + 1, 0);
  count_of({shape[axis], times});
  shape[axis] *= times;
  op.result(op.view(copied(op, x, 0, strides, wide), shape));
}

// Of tensors that differ in `axis` alone.
Value joined(Op& op, std::vector<Value> parts, int axis) {
  Shape shape = parts[0].shape;
  shape[axis] = 0;
  for (const Value& part : parts) {
    Shape other = part.shape;
    if (part.rank() != parts[0].rank() || part.dtype != parts[0].dtype)
      op.fail("tensors of several kinds are joined");
    shape[axis] += part.shape[axis];
    other[axis] = parts[0].shape[axis];
    if (other != parts[0].shape) op.fail("sizes " + text_of(part.shape) + " do not fit");
  }
  const Value y = op.make(parts[0].dtype, shape);
  std::int64_t inner = static_cast<std::int64_t>(size_of(y.dtype));
  for (int d = axis + 1; d < y.rank(); ++d) inner *= shape[d];
  std::int64_t outer = 1;
  for (int d = 0; d < axis; ++d) outer *= shape[d];
  op.step(parts, {y}, [=](const Run& run) {
    std::uint8_t* out = run.out<std::uint8_t>(y);
    for (const Value& part : parts) {
      const std::int64_t bytes = part.shape[axis] * inner;
      const std::uint8_t* in = run.in<std::uint8_t>(part);
      for (std::int64_t i = 0; i < outer && bytes; ++i)
        std::memcpy(out + i * shape[axis] * inner, in + i * bytes, bytes);
      out += bytes;
    }
  });
  return y;
}

// Images in bytes by their channels; what has another scale is looked up.
bool concat_bytes(Op& op) {
  std::vector<Value> parts = op.list_of_bytes("inputs");
  const ByteScale* scale = op.result_scale();
  const auto image = [](const Value& part) { return part.rank() == 4; };
  if (parts.empty() || !scale || !std::all_of(parts.begin(), parts.end(), image) ||
      op.axis(op.integer("axis", 0), 4) != 1)
    return false;
  for (Value& part : parts) {
    const bool same = part.scale.scale == scale->scale && part.scale.zero == scale->zero;
    const auto value = [](float x) { return x; };
    if (!same) part = looked_up(op, part, *scale, table_of(part.scale, *scale, value));
    part = plain(op, part);
  }
  const Value y = joined(op, parts, 3);
  op.result(as_bytes(op, y, {y.shape[0], y.shape[3], y.shape[1], y.shape[2]}, *scale));
  return true;
}

void concat(Op& op) {
  if (concat_bytes(op)) return;
  std::vector<Value> parts;
  for (const Value& part : op.list("inputs"))  // as torch.cat: empty vectors do not count
    if (part.shape != Shape{0}) parts.push_back(part);
  const std::int64_t axis = op.integer("axis", 0);
  if (parts.empty() || !parts[0].rank()) op.fail("there is nothing to join");
  op.result(joined(op, parts, op.axis(axis, parts[0].rank())));
}

void stack(Op& op) {
  std::vector<Value> parts = op.list("inputs");
  if (parts.empty()) op.fail("there is nothing to join");
  const int axis = op.axis(op.integer("axis", 0), parts[0].rank() + 1);
  for (Value& part : parts) {
    Shape shape = part.shape;
    if (part.rank() != parts[0].rank()) op.fail("tensors of several kinds are joined");
    shape.insert(shape.begin() + axis, 1);
    part = op.view(part, shape);
  }
  op.result(joined(op, parts, axis));
}

Value sliced(Op& op, const Value& x, int axis, std::int64_t start, std::int64_t length,
             std::int64_t step) {
  const Shape own = strides_of(x.shape);
  Shape shape = x.shape, strides = own;
  shape[axis] = length;
  strides[axis] *= step;
  if (shape == x.shape) return op.view(x, shape);
  return copied(op, x, start * own[axis], strides, shape);
}

void slice(Op& op) {
  const Value bytes = op.bytes("x"), x = bytes.given() ? bytes : op.in("x");
  const int axis = op.axis(op.integer("axis", 0), x.rank());
  if (!x.rank()) op.fail("x has no dimensions");
  const std::int64_t size = x.shape[axis], step = op.integer("steps", 1);
  const auto within = [&](std::int64_t at) {
    return std::clamp<std::int64_t>(at < 0 ? at + size : at, 0, size);
  };
  if (step < 1) op.fail("the step is " + std::to_string(step));
  const std::int64_t start = within(op.integer("start", 0)), end = within(op.integer("end", size));
  const std::int64_t room = std::max<std::int64_t>(end - start, 0);
  const std::int64_t length = room / step + (room % step != 0);
  const std::int64_t own = length > 1 ? step : 1;
  if (!bytes.given()) return op.result(sliced(op, x, axis, start, length, own));
  Shape shape = x.shape;
  shape[axis] = length;
  const Value y = sliced(op, plain(op, x), axis_in_memory(x, axis), start, length, own);
  op.result(as_bytes(op, y, shape, x.scale));
}

Value selected(Op& op, const Value& x, int axis, std::int64_t index) {
  Shape shape = x.shape;
  shape.erase(shape.begin() + axis);
  return op.view(sliced(op, x, axis, index, 1, 1), shape);
}

void select(Op& op) {
  const Value x = op.in("x");
  const int axis = op.axis("axis", x.rank());
  std::int64_t index = op.integer("index");
  if (!x.rank()) op.fail("x has no dimensions");
  if (index < -x.shape[axis] || index >= x.shape[axis])
    op.fail("index " + std::to_string(index) + " is none of " + text_of(x.shape));
  op.result(selected(op, x, axis, index < 0 ? index + x.shape[axis] : index));
}

void split_by(Op& op, const Value& x, int axis, const Shape& sizes) {
  std::vector<Value> parts;
  std::int64_t start = 0;
  for (const std::int64_t size : sizes) {
    if (size < 0 || size > x.shape[axis] - start) op.fail("sizes are " + text_of(sizes));
    parts.push_back(sliced(op, x, axis, start, size, 1));
    start += size;
  }
  if (start != x.shape[axis]) op.fail("sizes are " + text_of(sizes));
  op.result(parts);
}

void split_evenly(Op& op, const Value& x, int axis, std::int64_t size) {
  if (size < 1 || !x.rank()) op.fail("parts of " + std::to_string(size));
  Shape sizes;
  if (x.shape[axis] / size > 1 << 16) op.fail("too many parts");
  for (std::int64_t at = 0; at < x.shape[axis]; at += size)
    sizes.push_back(std::min(size, x.shape[axis] - at));
  split_by(op, x, axis, sizes);
}

void split(Op& op) {
  const Value x = op.in("x");
  const int axis = op.axis(op.integer("axis", 0), x.rank());
  split_evenly(op, x, axis, op.integer("split_size"));
}

void split_sizes(Op& op) {
  const Value x = op.in("x");
  const int axis = op.axis(op.integer("axis", 0), x.rank());
  if (!x.rank()) op.fail("x has no dimensions");
  split_by(op, x, axis, op.integers("split_sizes"));
}

void chunk(Op& op) {
  const Value x = op.in("x");
  const int axis = op.axis(op.integer("axis", 0), x.rank());
  const std::int64_t count = op.integer("chunks");
  if (!x.rank() || count < 1) op.fail("chunks are " + std::to_string(count));
  split_evenly(op, x, axis, std::max<std::int64_t>(1, (x.shape[axis] - 1) / count + 1));
}

void unbind(Op& op) {
  const Value x = op.in("x");
  const int axis = op.axis(op.integer("axis", 0), x.rank());
  if (!x.rank() || x.shape[axis] > 1 << 16) op.fail("x is " + text_of(x.shape));
  std::vector<Value> parts;
  for (std::int64_t i = 0; i < x.shape[axis]; ++i) parts.push_back(selected(op, x, axis, i));
  op.result(parts);
}

void flip(Op& op) {
  const Value x = op.in("x");
  Shape strides = strides_of(x.shape);
  std::int64_t offset = 0;
  for (const std::int64_t given : op.integers("axes")) {
    const int axis = op.axis(given, x.rank());
    if (!x.rank() || strides[axis] < 0) op.fail("a dimension comes twice");
    offset += strides[axis] * std::max<std::int64_t>(x.shape[axis] - 1, 0);
    strides[axis] = -strides[axis];
  }
  op.result(copied(op, x, offset, strides, x.shape));
}

void unfold(Op& op) {
  const Value x = op.in("x");
  const int axis = op.axis("dimension", x.rank());
  const std::int64_t size = op.integer("size"), step = op.integer("step");
  if (!x.rank() || size < 0 || size > x.shape[axis] || step < 1)
    op.fail("windows of " + std::to_string(size) + " in " + text_of(x.shape));
  Shape shape = x.shape, strides = strides_of(x.shape);
  shape[axis] = (x.shape[axis] - size) / step + 1;
  shape.push_back(size), strides.push_back(strides[axis]);
  if (shape[axis] > 1) strides[axis] *= step;
  op.result(copied(op, x, 0, strides, shape));
}

void roll(Op& op) {
  Value x = op.in("x");
  const Shape shifts = op.integers("shifts"), dims = op.integers("dims", {});
  if (dims.size() != shifts.size()) op.fail("shifts are " + text_of(shifts));
  for (std::size_t i = 0; i < dims.size(); ++i) {
    const int axis = op.axis(dims[i], x.rank());
    if (!x.rank() || !x.shape[axis]) continue;
    const std::int64_t size = x.shape[axis], shift = (shifts[i] % size + size) % size;
    if (shift)
      x = joined(
          op,
          {sliced(op, x, axis, size - shift, shift, 1), sliced(op, x, axis, 0, size - shift, 1)},
          axis);
  }
  op.result(x.id == op.in("x").id ? op.view(x, x.shape) : x);
}

void same(Op& op) {
  op.ignore({"memory_format", "p"});
  if (op.flag("train", false)) op.fail("dropout is on");
  const Value bytes = op.bytes("x");
  op.result(bytes.given() ? bytes : op.in("x"));
}

void item(Op& op) {
  const Arg& list = op.arg("x");
  const std::int64_t index = op.integer("index");
  if (list.kind != Arg::Kind::kList || index < 0 ||
      index >= static_cast<std::int64_t>(list.list.size()))
    op.fail("element " + std::to_string(index) + " of what has not so many");
  op.result(list.list[index].value);
}

void size(Op& op) {
  const Shape shape = op.shape_of("x");
  const int axis = op.axis("axis", static_cast<int>(shape.size()));
  if (shape.empty()) op.fail("x has no dimensions");
  op.result(shape[axis]);
}

template <class F>
void whole_numbers(Op& op, F f) {
  std::int64_t found = 0;
  if (f(op.integer("a"), op.integer("b"), &found)) op.fail("a whole number does not fit");
  op.result(found);
}

void int_add(Op& op) {
  whole_numbers(op, [](auto a, auto b, auto* y) { return __builtin_add_overflow(a, b, y); });
}
void int_sub(Op& op) {
  whole_numbers(op, [](auto a, auto b, auto* y) { return __builtin_sub_overflow(a, b, y); });
}
void int_mul(Op& op) {
  whole_numbers(op, [](auto a, auto b, auto* y) { return __builtin_mul_overflow(a, b, y); });
}
void int_floor_div(Op& op) {
  whole_numbers(op, [](std::int64_t a, std::int64_t b, std::int64_t* y) {
    if (b == 0 || (a == INT64_MIN && b == -1)) return true;
    *y = a / b - (a % b != 0 && (a < 0) != (b < 0));
    return false;
  });
}
void int_neg(Op& op) {
  std::int64_t found = 0;
  if (__builtin_sub_overflow(std::int64_t{0}, op.integer("a"), &found))
    op.fail("a whole number does not fit");
  op.result(found);
}

}  // namespace

Operators shape_operators() {
  return {{"Reshape", reshape},
          {"ReshapeCopy", reshape},
          {"Flatten", flatten},
          {"Unflatten", unflatten},
          {"Transpose", transpose},
          {"SwapAxes", swap_axes},
          {"MoveAxis", move_axis},
          {"T", transpose_matrix},
          {"Squeeze", squeeze},
          {"SqueezeAxes", squeeze_several},
          {"Unsqueeze", unsqueeze},
          {"Expand", expand},
          {"Tile", tile},
          {"Repeat", repeat},
          {"Concat", concat},
          {"Stack", stack},
          {"Slice", slice},
          {"Select", select},
          {"Split", split},
          {"SplitSizes", split_sizes},
          {"Chunk", chunk},
          {"Unbind", unbind},
          {"Flip", flip},
          {"Unfold", unfold},
          {"Roll", roll},
          {"Identity", same},
          {"Contiguous", same},
          {"Alias", same},
          {"Dropout", same},
          {"Item", item},
          {"Size", size},
          {"IntAdd", int_add},
          {"IntSub", int_sub},
          {"IntMul", int_mul},
          {"IntFloorDiv", int_floor_div},
          {"IntNeg", int_neg}};
}

}  // namespace subbyte::runtime
