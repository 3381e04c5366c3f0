// A program as the manifest holds it (docs/format.md, "Program"), checked when it is read.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "json.hpp"
#include "kernels.hpp"
#include "tensor.hpp"

namespace subbyte::runtime {

struct Input {
  std::string name;
  Shape shape;  // -1 where any size goes
  Dtype dtype;
};

struct Node {
  std::string op, out, layer;
  const Json* args;
};

struct Program {
  std::vector<Input> inputs;
  std::map<std::string, const Json*> layers;  // settings by name
  std::vector<Node> nodes;
  const Json* output;
  std::map<std::string, ByteScale> activations;  // of values that may stay in 8 bits
};

// Of a manifest, which must outlive it. Throws Error for a file without one, for an operator that
// the runtime has not, and for names that are used before they are made.
Program read_program(const Json& manifest);

}  // namespace subbyte::runtime
