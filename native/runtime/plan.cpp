#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "bytes.hpp"
#include "error.hpp"
#include "op.hpp"

namespace subbyte::runtime {
namespace {

using Kind = Json::Kind;

constexpr std::size_t kAlign = 64;
constexpr std::size_t kSlack = 64;  // a vector may be read across the end of a value

std::size_t rounded(std::size_t bytes) { return (bytes + kSlack + kAlign - 1) / kAlign * kAlign; }

}  // namespace

Plan::Plan(const Program& program, const File& file, Weights& weights, const Settings& settings,
           const std::vector<Shape>& inputs)
    : program_(program), file_(file), weights_(weights), settings_(settings) {
  for (std::size_t i = 0; i < program.inputs.size(); ++i) {
    const Input& input = program.inputs[i];
    inputs_.push_back(add(input.dtype, inputs[i]));
    held_.back().input = static_cast<int>(i);
    Arg& arg = named_[input.name];
    arg.kind = Arg::Kind::kTensor;
    arg.value = inputs_.back();
  }
  for (const Node& node : program.nodes) build(node);
  take_outputs(*program.output, "");
  set_lifetimes();
  share_memory();
  lay_out();
}

Value Plan::add(Dtype dtype, const Shape& shape) {
  Value value;
  value.id = static_cast<int>(held_.size());
  value.dtype = dtype;
  value.shape = shape;
  if (shape.size() > 16) throw Error("a value has more than 16 dimensions");
  Held held;
  held.bytes = static_cast<std::size_t>(count_of(shape)) * size_of(dtype);
  if (held.bytes > settings_.memory)
    throw Error("a value " + text_of(shape) + " takes more memory than is allowed");
  held_.push_back(held);
  return value;
}

int Plan::root(int id) const {
  while (held_[id].alias >= 0) id = held_[id].alias;
  return id;
}

void Plan::build(const Node& node) {
  try {
    Op op(*this, node);
    operator_named(node.op)(op);
    op.finish();
    named_[node.out] = op.found();
    made_.push_back({steps_.size(), node.out, op.found()});
  } catch (const std::invalid_argument& error) {  // of the kernels
    throw Error("operation '" + shown(node.out) + "' (" + node.op + "): " + error.what());
  } catch (const Error& error) {
    const std::string layer = node.layer.empty() ? "" : ", layer '" + shown(node.layer) + "'";
    throw Error("operation '" + shown(node.out) + "' (" + node.op + layer + "): " + error.what());
  }
}

Arg Plan::argument(const Json& json, int depth) {
  Arg arg;
  arg.integer = json.integer, arg.real = json.real;
  switch (json.kind) {
    case Kind::kNull:
      return arg;
    case Kind::kBool:
      arg.kind = Arg::Kind::kFlag;
      arg.real = static_cast<double>(json.integer);
      return arg;
    case Kind::kInteger:
      arg.kind = Arg::Kind::kInteger;
      return arg;
    case Kind::kReal:
      arg.kind = Arg::Kind::kReal;
      return arg;
    case Kind::kText:
      arg.kind = Arg::Kind::kWord;
      arg.word = json.text;
      return arg;
    case Kind::kList:
      arg.kind = Arg::Kind::kList;
      for (const Json& item : json.items) arg.list.push_back(argument(item, depth + 1));
      return arg;
    case Kind::kMap:
      break;
  }
  const std::string &kind = json.keys.at(0), &content = json.items.at(0).text;
  if (kind == "value") return named_.at(content);
  if (kind == "dtype") {
    arg.kind = Arg::Kind::kDtype;
    arg.dtype = dtype_named(content);
  } else if (kind == "number" && (content == "inf" || content == "-inf" || content == "nan")) {
    arg.kind = Arg::Kind::kReal;
    arg.real = content == "nan" ? NAN : content == "inf" ? INFINITY : -INFINITY;
  } else if (kind == "state") {
    const Tensor* tensor = file_.state(content);
    if (!tensor) throw Error("the program reads '" + shown(content) + "', which the file has not");
    arg.kind = Arg::Kind::kTensor;
    const auto known = states_.find(content);
    if (known != states_.end()) return arg.value = known->second, arg;
    arg.value = add(tensor->dtype, tensor->shape);
    static constexpr std::uint8_t kNothing[64] = {};
    held_.back().constant = tensor->bytes ? tensor->data : kNothing;
    states_.emplace(content, arg.value);
  } else if (kind != "layout") {
    throw Error("the program has an argument of kind '" + shown(kind) + "'");
  }
  return arg;
}

// The same in float32, computed once.
Value Plan::floats_of(const Value& bytes) {
  const auto known = floats_.find(bytes.id);
  if (known != floats_.end()) return known->second;
  const Value y = add(Dtype::kFloat32, bytes.shape);
  Step step;
  step.op = "ToFloat", step.how = "int8 to float32";
  step.work = [=](const Run& run) { floats_from_bytes(bytes, y, run); };
  step.reads = {bytes.id}, step.writes = {y.id};
  steps_.push_back(std::move(step));
  floats_.emplace(bytes.id, y);
  return y;
}

void Plan::to_floats(Arg& arg) {
  if (arg.kind == Arg::Kind::kTensor && arg.value.in_bytes()) arg.value = floats_of(arg.value);
  for (Arg& item : arg.list) to_floats(item);
}

void Plan::take_outputs(const Json& json, const std::string& way) {
  const bool map = json.is(Kind::kMap) && json.keys.size() == 1 && json.keys[0] == "map";
  const Json& held = map ? json.items[0] : json;
  if (!map && !json.is(Kind::kList)) {
    Arg arg = argument(json, 0);
    to_floats(arg);
    if (arg.kind == Arg::Kind::kList) {
      for (std::size_t i = 0; i < arg.list.size(); ++i)
        if (arg.list[i].kind == Arg::Kind::kTensor)
          outputs_.push_back({way + std::to_string(i), arg.list[i].value});
      return;
    }
    if (arg.kind == Arg::Kind::kNone) return;
    if (arg.kind != Arg::Kind::kTensor) throw Error("an output of the program is no tensor");
    outputs_.push_back({way.empty() ? "output" : way.substr(0, way.size() - 1), arg.value});
    return;
  }
  for (std::size_t i = 0; i < held.items.size(); ++i)
    take_outputs(held.items[i], way + (map ? held.keys[i] : std::to_string(i)) + ".");
}

void Plan::set_lifetimes() {
  const int end = static_cast<int>(steps_.size());
  for (int i = 0; i < end; ++i) {
    for (const int id : steps_[i].writes) {
      Held& held = held_[root(id)];
      if (held.first < 0) held.first = i;
      held.last = std::max(held.last, i);
    }
    for (const int id : steps_[i].reads) held_[root(id)].last = i;
  }
  for (const Output& output : outputs_) held_[root(output.value.id)].last = end;
}

// Results take the memory of a value that ends with the step which makes them.
void Plan::share_memory() {
  for (int i = 0; i < static_cast<int>(steps_.size()); ++i) {
    const Step& step = steps_[i];
    if (step.reuses < 0) continue;
    const int from = root(step.reuses), to = root(step.writes[0]);
    Held &old = held_[from], &made = held_[to];
    const bool own = !old.constant && old.input < 0 && old.first >= 0 && made.first == i;
    if (!own || from == to || old.last != i || old.bytes != made.bytes) continue;
    old.last = made.last;
    made.alias = from;
  }
}

// First fit, the largest values first.
void Plan::lay_out() {
  std::vector<int> order;
  for (int id = 0; id < static_cast<int>(held_.size()); ++id)
    if (held_[id].alias < 0 && !held_[id].constant && held_[id].input < 0 && held_[id].first >= 0)
      order.push_back(id);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return held_[a].bytes > held_[b].bytes; });
  std::vector<int> placed;  // by offset
  for (const int id : order) {
    Held& held = held_[id];
    std::size_t offset = 0;
    for (const int other : placed) {
      const Held& there = held_[other];
      if (there.first > held.last || there.last < held.first) continue;
      if (offset + rounded(held.bytes) <= there.offset) break;
      offset = std::max(offset, there.offset + rounded(there.bytes));
    }
    held.offset = offset;
    arena_ = std::max(arena_, offset + rounded(held.bytes));
    if (arena_ > settings_.memory)
      throw Error("the network takes " + std::to_string(arena_) +
                  " bytes or more for such inputs, over what is allowed");
    placed.insert(std::upper_bound(placed.begin(), placed.end(), id,
                                   [&](int a, int b) { return held_[a].offset < held_[b].offset; }),
                  id);
  }
}

std::vector<std::uint8_t*> Plan::places(std::uint8_t* arena,
                                        const std::vector<const std::uint8_t*>& inputs) const {
  std::vector<std::uint8_t*> found(held_.size());
  for (std::size_t id = 0; id < held_.size(); ++id) {
    const Held& held = held_[root(static_cast<int>(id))];
    // Steps never write to constants and inputs.
    if (held.constant)
      found[id] = const_cast<std::uint8_t*>(held.constant);
    else if (held.input >= 0)
      found[id] = const_cast<std::uint8_t*>(inputs[held.input]);
    else
      found[id] = arena + held.offset;
  }
  return found;
}

}  // namespace subbyte::runtime
