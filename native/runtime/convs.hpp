// Convolutions of all kinds: what the layers and the operators share.
#pragma once

#include "math.hpp"
#include "op.hpp"

namespace subbyte::runtime {

// The settings of a convolution; padding may differ before and after where `same`.
struct ConvSettings {
  int dims = 2;
  std::int64_t groups = 1;
  Shape stride, padding, after, dilation, extra;  // extra: output padding
};

// stride, padding ("same", "valid" or sizes), dilation as a program gives them; 0 < dims <= 3.
ConvSettings conv_settings(Op& op, int dims, std::int64_t groups, Shape stride, Shape padding,
                           Shape dilation);
void pad_same(ConvSettings& settings, const Shape& kernel);

// The geometry for x [n, channels, ...] and a weight; throws Error for what does not fit.
Geometry geometry_of(Op& op, const ConvSettings& settings, const Value& x, const Shape& weight,
                     bool transposed);
Shape result_of(const Geometry& g, const Value& x, int dims);

// x with values around it, of the last dimensions; pads from the last dimension on, before and
// after each, as torch.nn.functional.pad takes them. Zero-sized pads give x.
Value padded(Op& op, const Value& x, const Shape& pads, const std::string& mode, double value);

}  // namespace subbyte::runtime
