// A packed file (docs/format.md): every size and offset is checked before memory is read.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "json.hpp"
#include "memory.hpp"
#include "tensor.hpp"

namespace subbyte::runtime {

struct Grid {
  std::vector<double> levels;
  int axis = -1;           // the dimension that has a scale for each index; -1: none
  std::int64_t group = 0;  // weights of a row that share a scale; 0: no groups
  Dtype scale = Dtype::kFloat32;
};

// What the manifest says of a layer, and its tensors; `bias`, `up`, `down` and `adapter_scale` are
// null where it has none.
struct Entry {
  std::string type;
  Shape shape;
  Grid grid;
  bool compressed = false;
  Tensor codes, scale;
  const Tensor *bias = nullptr, *up = nullptr, *down = nullptr, *adapter_scale = nullptr;
};

class File {
 public:
  // verify: by the file's checksums, where it has any. Throw Error in one line.
  static File open(const std::string& path, bool verify);
  static File of_memory(const std::uint8_t* data, std::size_t bytes, bool verify);
  File(File&&) = default;

  const Json& manifest() const { return manifest_; }
  const std::map<std::string, Entry>& layers() const { return layers_; }
  // A tensor of the state, by any of the names that it goes by; null if there is none.
  const Tensor* state(const std::string& name) const;
  bool absorbed(const std::string& norm) const;  // into scale and shift
  // A shared layer's own name, or that of the layer whose weight it uses.
  const std::string& weight_of(const std::string& layer) const;
  std::size_t bytes() const { return bytes_.size(); }

 private:
  explicit File(Buffer bytes) : bytes_(std::move(bytes)) {}
  void read(bool verify);
  std::string read_header();
  void take_tensor(const std::string& name, const Json& stated, std::size_t start);
  void check_order() const;
  void take_layers();
  void take_state();
  void check_digests(const std::string& stated, std::size_t header) const;
  const Tensor& tensor(const std::string& name) const;

  Buffer bytes_;
  std::deque<Buffer> aligned_;  // copies of tensors that lie at odd places
  Json manifest_;
  std::map<std::string, Tensor> tensors_;
  std::vector<std::string> names_;  // in the manifest's order
  std::map<std::string, Entry> layers_;
  std::map<std::string, std::string> state_, shared_;  // name -> the tensor's or layer's name
};

}  // namespace subbyte::runtime
