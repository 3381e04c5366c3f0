// Norms and attention, as operators and as layers.
#pragma once

#include <array>

#include "op.hpp"

namespace subbyte::runtime {

// scale * x + shift a channel; x [n, channels, ...].
Value affine(Op& op, const Value& x, const Value& scale, const Value& shift, std::int64_t channels);
// parts: weight, bias (both or neither may be missing), mean, variance.
Value batch_norm(Op& op, const Value& x, const std::array<Value, 4>& parts, double eps);

// The layer MultiheadAttention.
void attention_layer(Op& op);
// x [..., in] times a packed weight; with the bias and adapter that the layer has.
Value packed_linear(Op& op, const Value& x, const Packed& packed, const Value& bias);
Value packed_layer(Op& op, const Value& x, const std::string& name, const Packed& packed);

}  // namespace subbyte::runtime
