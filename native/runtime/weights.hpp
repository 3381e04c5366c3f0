// Packed weights, made ready for the kernels once, when a plan first asks for them.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "conv.hpp"
#include "file.hpp"
#include "panels.hpp"

namespace subbyte::runtime {

class Packed {
 public:
  // Throws Error, without the layer's name, for codes that are damaged.
  explicit Packed(const Entry& entry);

  const Shape& shape() const { return entry_.shape; }
  const std::vector<float>& bias() const { return bias_; }  // empty: none
  std::int64_t rows() const { return entry_.shape.empty() ? 1 : entry_.shape[0]; }
  std::int64_t rank() const { return rank_; }               // of the adapter, 0: none
  const std::vector<float>& up() const { return up_; }      // [out][rank], scaled
  const std::vector<float>& down() const { return down_; }  // [groups * rank][width]
  bool by_groups() const { return entry_.grid.group > 0; }

  // Whether the kernels multiply with it; row_length: weights that a value is the sum of.
  bool served(std::int64_t row_length) const;
  const Panel& panel() const;
  const ConvPanels& conv(const ConvShape& shape) const;

  // The weight as float32. channel_axis: the dimension that the rows of `up` belong to.
  std::vector<float> decoded(bool adapter, int channel_axis = 0) const;
  // Row i of a matrix, with the adapter's part.
  void decode_row(std::int64_t row, float* out) const;

 private:
  void take_words();
  void take_adapter();
  RadixCodes codes() const;
  std::vector<float> row_scales() const;
  float scale_at(std::int64_t index) const;

  const Entry& entry_;
  std::vector<std::uint8_t> unpacked_;  // words of compressed codes
  const std::uint8_t* words_ = nullptr;
  std::size_t bytes_ = 0;
  unsigned digits_ = 0;
  std::vector<float> unit_, levels_, bias_, up_, down_;
  std::int64_t rank_ = 0;
  bool even_ = false;  // the levels are multiples of one step
  Affine affine_{1, 0};
  double inverse_ = 1.0;
  mutable std::unique_ptr<Panel> panel_;
  mutable std::unique_ptr<ConvPanels> conv_;
};

class Weights {
 public:
  explicit Weights(const File& file) : file_(file) {}
  // Null if the file has no packed layer of this name. Throws Error naming the layer.
  const Packed* find(const std::string& name);

 private:
  const File& file_;
  std::unordered_map<std::string, std::unique_ptr<Packed>> made_;
};

}  // namespace subbyte::runtime
