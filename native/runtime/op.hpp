// One operation while it is planned: its arguments, its results, and what computes them.
#pragma once

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"
#include "plan.hpp"

namespace subbyte::runtime {

class Op {
 public:
  Op(Plan& plan, const Node& node);

  const std::string& name() const { return node_.op; }
  const std::string& layer() const { return node_.layer; }
  const Json& settings() const { return *plan_.program_.layers.at(node_.layer); }
  Precision precision() const { return plan_.settings_.precision; }
  [[noreturn]] void fail(const std::string& what) const;

  // Arguments; they count as understood then. A missing one without a default throws Error.
  bool has(const char* name);
  const Arg& arg(const char* name);
  // A tensor that lies in 8 bits; without an id if it does not. All others give it in float32.
  Value bytes(const char* name);
  // All tensors of a list, if all lie in 8 bits; else none.
  std::vector<Value> list_of_bytes(const char* name);
  const Shape& shape_of(const char* name);  // of a tensor
  Value in(const char* name);               // a tensor
  Value maybe(const char* name);            // the same, without an id if there is none
  Value floats(const char* name);           // a float32 tensor
  Value maybe_floats(const char* name);
  std::vector<Value> list(const char* name);
  std::int64_t integer(const char* name);
  std::int64_t integer(const char* name, std::int64_t otherwise);
  double real(const char* name);
  double real(const char* name, double otherwise);
  bool flag(const char* name, bool otherwise);
  std::string word(const char* name, const std::string& otherwise);
  Shape integers(const char* name);
  Shape integers(const char* name, const Shape& otherwise);
  int axis(const char* name, int rank);
  int axis(std::int64_t given, int rank) const;
  Dtype dtype(const char* name, Dtype otherwise);
  void ignore(std::initializer_list<const char*> names);
  void finish() const;  // throws Error for an argument that nobody asked for

  // Values.
  Value make(Dtype dtype, const Shape& shape);  // of this operation's own
  Value make_bytes(const Shape& shape, ByteScale scale);
  // Where the file has a scale for this operation's result, and the network is to use it.
  const ByteScale* result_scale() const;
  Value view(const Value& x, const Shape& shape);  // the same memory
  Value constant(Dtype dtype, const Shape& shape, const void* data);
  Value number(double value, Dtype dtype);  // of shape []
  Value state(const std::string& name);     // Error if the file has none
  Value maybe_state(const std::string& name);
  const Tensor* stored(const std::string& name) const { return plan_.file_.state(name); }
  Value constant_floats(const std::vector<float>& values, const Shape& shape);
  const Packed* packed(const std::string& layer) { return plan_.weights_.find(layer); }
  bool absorbed(const std::string& norm) const { return plan_.file_.absorbed(norm); }

  // What the operation does. reuse: a value whose memory the first result may take, for work that
  // reads each value of it before it writes that place.
  void step(std::vector<Value> reads, std::vector<Value> writes, Work work, const char* how = "",
            const Value& reuse = {});
  void result(const Value& value);
  void result(const std::vector<Value>& values);  // a list
  void result(std::int64_t number);
  const Arg& found() const { return found_; }

 private:
  Value checked(const Arg& arg, const char* name) const;
  Arg* given(const char* name);

  Plan& plan_;
  const Node& node_;
  std::vector<std::pair<std::string, Arg>> args_;
  std::set<std::string> seen_;
  Arg found_;
};

using Build = void (*)(Op&);

// Null for an operator that the runtime has not.
Build operator_named(const std::string& name);

using Operators = std::vector<std::pair<const char*, Build>>;
Operators layer_operators();
Operators product_operators();
Operators window_operators();
Operators norm_operators();
Operators elementwise_operators();
Operators activation_operators();
Operators reduction_operators();
Operators shape_operators();
Operators index_operators();
Operators image_operators();
Operators constant_operators();

}  // namespace subbyte::runtime
