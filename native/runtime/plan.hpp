// A program for inputs of given sizes: steps over values that lie in one block of memory.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "activations.hpp"
#include "memory.hpp"
#include "program.hpp"
#include "tensor.hpp"
#include "weights.hpp"

namespace subbyte::runtime {

// A tensor of a plan. Activations in 8 bits are uint8 and have a scale; with four dimensions they
// lie N H W C, whatever the order in `shape`: [n, c, h, w].
struct Value {
  int id = -1;
  Dtype dtype = Dtype::kFloat32;
  Shape shape;
  ByteScale scale;

  bool in_bytes() const { return scale.scale > 0.0f; }

  bool given() const { return id >= 0; }
  int rank() const { return static_cast<int>(shape.size()); }
  std::int64_t count() const { return count_of(shape); }
};

// Where values lie during one run.
class Run {
 public:
  Run(std::uint8_t* const* at, int threads) : at_(at), threads(threads) {}
  template <class T>
  const T* in(const Value& value) const {
    return reinterpret_cast<const T*>(at_[value.id]);
  }
  template <class T>
  T* out(const Value& value) const {
    return reinterpret_cast<T*>(at_[value.id]);
  }

 private:
  std::uint8_t* const* at_;

 public:
  const int threads;
};

using Work = std::function<void(const Run&)>;

struct Step {
  std::string op, out, layer;
  std::string how;  // "int8", "float32", ...
  Work work;
  std::vector<int> reads, writes;
  int reuses = -1;  // a value whose memory the first result may take
};

// What an argument of an operation is at planning time.
struct Arg {
  enum class Kind : std::uint8_t { kNone, kFlag, kInteger, kReal, kWord, kList, kTensor, kDtype };
  Kind kind = Kind::kNone;
  std::int64_t integer = 0;
  double real = 0.0;
  std::string word;
  std::vector<Arg> list;
  Value value;
  Dtype dtype = Dtype::kFloat32;
};

struct Settings {
  Precision precision = Precision::kInt8;
  bool chain = true;  // of int8: activations stay in 8 bits where the file has scales for them
  std::size_t memory = std::size_t{1} << 34;  // bytes that the values of a run may take
};

// An operation's result, made when the first `steps` steps are done.
struct Made {
  std::size_t steps;
  std::string name;
  Arg result;
};

struct Output {
  std::string name;  // "0", "map.logits": the way to it
  Value value;
};

class Plan {
 public:
  // Throws Error, naming the operation, for what the program does not do with such inputs.
  Plan(const Program& program, const File& file, Weights& weights, const Settings& settings,
       const std::vector<Shape>& inputs);

  const std::vector<Value>& inputs() const { return inputs_; }
  const std::vector<Output>& outputs() const { return outputs_; }
  const std::vector<Step>& steps() const { return steps_; }
  const std::vector<Made>& made() const { return made_; }
  std::size_t arena() const { return arena_; }

  // Where the values lie, given the arena and the inputs.
  std::vector<std::uint8_t*> places(std::uint8_t* arena,
                                    const std::vector<const std::uint8_t*>& inputs) const;

 private:
  friend class Op;
  struct Held {  // a value: in the arena, of an input, or a constant
    std::size_t bytes = 0, offset = 0;
    const std::uint8_t* constant = nullptr;
    int alias = -1, input = -1, first = -1, last = -1;
  };

  Value add(Dtype dtype, const Shape& shape);
  int root(int id) const;
  Arg argument(const Json& json, int depth);
  Value floats_of(const Value& bytes);
  void to_floats(Arg& arg);
  void build(const Node& node);
  void take_outputs(const Json& json, const std::string& way);
  void set_lifetimes();
  void share_memory();
  void lay_out();

  const Program& program_;
  const File& file_;
  Weights& weights_;
  const Settings settings_;
  std::vector<Held> held_;
  std::vector<Step> steps_;
  std::vector<Value> inputs_;
  std::vector<Output> outputs_;
  std::vector<Made> made_;
  std::map<std::string, Arg> named_;
  std::map<std::string, Value> states_;
  std::map<int, Value> floats_;  // of values in bytes, by their number
  std::deque<Buffer> constants_;
  std::size_t arena_ = 0;
};

}  // namespace subbyte::runtime
