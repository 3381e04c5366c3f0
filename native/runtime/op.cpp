#include "op.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_map>

namespace subbyte::runtime {

Op::Op(Plan& plan, const Node& node) : plan_(plan), node_(node) {
  for (std::size_t i = 0; i < node.args->keys.size(); ++i)
    args_.emplace_back(node.args->keys[i], plan.argument(node.args->items[i], 0));
}

void Op::fail(const std::string& what) const { throw Error(what); }

bool Op::has(const char* name) {
  return std::any_of(args_.begin(), args_.end(), [&](const auto& arg) {
    return arg.first == name && arg.second.kind != Arg::Kind::kNone;
  });
}

Arg* Op::given(const char* name) {
  seen_.insert(name);
  for (auto& [own, value] : args_)
    if (own == name) return &value;
  return nullptr;
}

const Arg& Op::arg(const char* name) {
  static const Arg kNothing;
  Arg* found = given(name);
  if (!found) return kNothing;
  plan_.to_floats(*found);
  return *found;
}

Value Op::bytes(const char* name) {
  const Arg* found = given(name);
  const bool held = found && found->kind == Arg::Kind::kTensor && found->value.in_bytes();
  return held ? found->value : Value{};
}

std::vector<Value> Op::list_of_bytes(const char* name) {
  const Arg* found = given(name);
  std::vector<Value> values;
  if (!found || found->kind != Arg::Kind::kList) return {};
  for (const Arg& item : found->list) {
    if (item.kind != Arg::Kind::kTensor || !item.value.in_bytes()) return {};
    values.push_back(item.value);
  }
  return values;
}

const Shape& Op::shape_of(const char* name) {
  const Arg* found = given(name);
  if (!found || found->kind != Arg::Kind::kTensor) fail(std::string("'") + name + "' is no tensor");
  return found->value.shape;
}

const ByteScale* Op::result_scale() const {
  if (!plan_.settings_.chain || plan_.settings_.precision != Precision::kInt8) return nullptr;
  const auto found = plan_.program_.activations.find(node_.out);
  return found == plan_.program_.activations.end() ? nullptr : &found->second;
}

Value Op::make_bytes(const Shape& shape, ByteScale scale) {
  Value made = make(Dtype::kUint8, shape);
  made.scale = scale;
  return made;
}

Value Op::checked(const Arg& arg, const char* name) const {
  if (arg.kind != Arg::Kind::kTensor) fail(std::string("'") + name + "' is no tensor");
  return arg.value;
}

Value Op::in(const char* name) { return checked(arg(name), name); }

Value Op::maybe(const char* name) { return has(name) ? in(name) : (arg(name), Value{}); }

Value Op::floats(const char* name) {
  const Value value = in(name);
  if (value.dtype != Dtype::kFloat32)
    fail(std::string("'") + name + "' is " + name_of(value.dtype) + ", not float32");
  return value;
}

Value Op::maybe_floats(const char* name) { return has(name) ? floats(name) : (arg(name), Value{}); }

std::vector<Value> Op::list(const char* name) {
  const Arg& given = arg(name);
  if (given.kind != Arg::Kind::kList) fail(std::string("'") + name + "' is no list");
  std::vector<Value> found;
  for (const Arg& item : given.list) found.push_back(checked(item, name));
  return found;
}

std::int64_t Op::integer(const char* name) {
  const Arg& given = arg(name);
  if (given.kind != Arg::Kind::kInteger && given.kind != Arg::Kind::kFlag)
    fail(std::string("'") + name + "' is no whole number");
  return given.integer;
}

std::int64_t Op::integer(const char* name, std::int64_t otherwise) {
  return has(name) ? integer(name) : (arg(name), otherwise);
}

double Op::real(const char* name) {
  const Arg& given = arg(name);
  if (given.kind != Arg::Kind::kInteger && given.kind != Arg::Kind::kReal &&
      given.kind != Arg::Kind::kFlag)
    fail(std::string("'") + name + "' is no number");
  return given.kind == Arg::Kind::kInteger ? static_cast<double>(given.integer) : given.real;
}

double Op::real(const char* name, double otherwise) {
  return has(name) ? real(name) : (arg(name), otherwise);
}

bool Op::flag(const char* name, bool otherwise) {
  const Arg& given = arg(name);
  if (given.kind == Arg::Kind::kNone) return otherwise;
  if (given.kind != Arg::Kind::kFlag && given.kind != Arg::Kind::kInteger)
    fail(std::string("'") + name + "' is neither true nor false");
  return given.integer != 0;
}

std::string Op::word(const char* name, const std::string& otherwise) {
  const Arg& given = arg(name);
  if (given.kind == Arg::Kind::kNone) return otherwise;
  if (given.kind != Arg::Kind::kWord) fail(std::string("'") + name + "' is no word");
  return given.word;
}

Shape Op::integers(const char* name) {
  const Arg& given = arg(name);
  if (given.kind == Arg::Kind::kInteger) return {given.integer};
  if (given.kind != Arg::Kind::kList || given.list.size() > 16)
    fail(std::string("'") + name + "' is no list of whole numbers");
  Shape found;
  for (const Arg& item : given.list) {
    if (item.kind != Arg::Kind::kInteger)
      fail(std::string("'") + name + "' is no list of whole numbers");
    found.push_back(item.integer);
  }
  return found;
}

Shape Op::integers(const char* name, const Shape& otherwise) {
  return has(name) ? integers(name) : (arg(name), otherwise);
}

int Op::axis(std::int64_t given, int rank) const {
  const int least = std::max(rank, 1);
  if (given < -least || given >= least)
    fail("dimension " + std::to_string(given) + " is none of a tensor of " + std::to_string(rank));
  return static_cast<int>(given < 0 ? given + least : given);
}

int Op::axis(const char* name, int rank) { return axis(integer(name), rank); }

Dtype Op::dtype(const char* name, Dtype otherwise) {
  const Arg& given = arg(name);
  if (given.kind == Arg::Kind::kNone) return otherwise;
  if (given.kind != Arg::Kind::kDtype) fail(std::string("'") + name + "' is no type");
  return given.dtype;
}

void Op::ignore(std::initializer_list<const char*> names) {
  for (const char* name : names) seen_.insert(name);
}

void Op::finish() const {
  for (const auto& [name, value] : args_)
    if (!seen_.count(name)) fail("argument '" + shown(name) + "' is unknown");
  if (found_.kind == Arg::Kind::kNone) fail("it has no result");
}

Value Op::make(Dtype dtype, const Shape& shape) { return plan_.add(dtype, shape); }

Value Op::view(const Value& x, const Shape& shape) {
  if (count_of(shape) != x.count())
    fail("a tensor " + text_of(x.shape) + " has not the shape " + text_of(shape));
  const Value found = plan_.add(x.dtype, shape);
  plan_.held_[found.id].alias = x.id;
  return found;
}

Value Op::constant(Dtype dtype, const Shape& shape, const void* data) {
  const Value found = plan_.add(dtype, shape);
  const std::size_t bytes = plan_.held_[found.id].bytes;
  plan_.constants_.emplace_back(bytes);
  if (bytes) std::memcpy(plan_.constants_.back().data(), data, bytes);
  plan_.held_[found.id].constant = plan_.constants_.back().data();
  return found;
}

Value Op::constant_floats(const std::vector<float>& values, const Shape& shape) {
  if (count_of(shape) != static_cast<std::int64_t>(values.size())) fail("a constant has no shape");
  return constant(Dtype::kFloat32, shape, values.data());
}

Value Op::number(double value, Dtype dtype) {
  const float real = static_cast<float>(value);
  const bool fits = std::abs(value) < 9e18;
  const std::int64_t whole = fits ? static_cast<std::int64_t>(value) : 0;
  const std::int32_t narrow = static_cast<std::int32_t>(whole);
  const std::uint8_t byte = static_cast<std::uint8_t>(whole), truth = value != 0;
  switch (dtype) {
    case Dtype::kFloat32:
      return constant(dtype, {}, &real);
    case Dtype::kInt64:
      return constant(dtype, {}, &whole);
    case Dtype::kInt32:
      return constant(dtype, {}, &narrow);
    case Dtype::kUint8:
      return constant(dtype, {}, &byte);
    case Dtype::kBool:
      return constant(dtype, {}, &truth);
    default:
      fail(std::string("values of type ") + name_of(dtype) + " do not run");
  }
}

Value Op::maybe_state(const std::string& name) {
  if (!plan_.file_.state(name)) return {};
  const auto known = plan_.states_.find(name);
  if (known != plan_.states_.end()) return known->second;
  const Tensor& tensor = *plan_.file_.state(name);
  const Value found = plan_.add(tensor.dtype, tensor.shape);
  static constexpr std::uint8_t kNothing[64] = {};
  plan_.held_[found.id].constant = tensor.bytes ? tensor.data : kNothing;
  plan_.states_.emplace(name, found);
  return found;
}

Value Op::state(const std::string& name) {
  const Value found = maybe_state(name);
  if (!found.given()) fail("the file has no '" + shown(name) + "'");
  return found;
}

void Op::step(std::vector<Value> reads, std::vector<Value> writes, Work work, const char* how,
              const Value& reuse) {
  Step step;
  step.op = node_.op, step.out = node_.out, step.layer = node_.layer, step.how = how;
  step.work = std::move(work);
  for (const Value& value : reads)
    if (value.given()) step.reads.push_back(value.id);
  for (const Value& value : writes) step.writes.push_back(value.id);
  step.reuses = reuse.id;
  plan_.steps_.push_back(std::move(step));
}

void Op::result(const Value& value) {
  found_.kind = Arg::Kind::kTensor;
  found_.value = value;
}

void Op::result(const std::vector<Value>& values) {
  found_.kind = Arg::Kind::kList;
  for (const Value& value : values) {
    Arg item;
    item.kind = Arg::Kind::kTensor;
    item.value = value;
    found_.list.push_back(item);
  }
}

void Op::result(std::int64_t number) {
  found_.kind = Arg::Kind::kInteger;
  found_.integer = number;
}

Build operator_named(const std::string& name) {
  static const std::unordered_map<std::string, Build> kKnown = [] {
    std::unordered_map<std::string, Build> known;
    for (const auto& list :
         {layer_operators(), product_operators(), window_operators(), norm_operators(),
          elementwise_operators(), activation_operators(), reduction_operators(), shape_operators(),
          index_operators(), image_operators(), constant_operators()})
      for (const auto& [own, build] : list) known.emplace(own, build);
    return known;
  }();
  const auto found = kKnown.find(name);
  return found == kKnown.end() ? nullptr : found->second;
}

}  // namespace subbyte::runtime
