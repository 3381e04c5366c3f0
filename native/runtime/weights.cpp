#include "weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "dispatch.hpp"
#include "error.hpp"
#include "radix.hpp"
#ifdef SUBBYTE_ZSTD
#include <zstd.h>
#endif

namespace subbyte::runtime {
namespace {

constexpr std::int64_t kSums = std::int64_t{1} << 31;

float half(std::uint16_t bits) {
  const float value = std::ldexp(static_cast<float>(bits & 1023), -24);
  const int exponent = bits >> 10 & 31;
  const float found = exponent ? std::ldexp(1024.0f + (bits & 1023), exponent - 25) : value;
  return bits & 0x8000 ? -found : found;
}

// Stored numbers as float32: F32, F16, BF16 or I8 (as they are).
std::vector<float> floats_of(const Tensor& tensor) {
  const std::size_t size = size_of(tensor.dtype), count = tensor.bytes / size;
  std::vector<float> found(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint8_t* at = tensor.data + i * size;
    std::uint16_t word = 0;
    std::uint32_t wide = 0;
    switch (tensor.dtype) {
      case Dtype::kFloat32:
        std::memcpy(&found[i], at, 4);
        break;
      case Dtype::kFloat16:
        std::memcpy(&word, at, 2);
        found[i] = half(word);
        break;
      case Dtype::kBFloat16:
        std::memcpy(&word, at, 2);
        wide = std::uint32_t{word} << 16;
        std::memcpy(&found[i], &wide, 4);
        break;
      case Dtype::kInt8:
        found[i] = static_cast<float>(static_cast<std::int8_t>(*at));
        break;
      default:
        throw Error(std::string("a tensor is ") + name_of(tensor.dtype) + ", no float type");
    }
  }
  return found;
}

// (offset, inverse), multiples of one half, with level i == (i + offset) / inverse; or false.
bool affine_of(const std::vector<double>& levels, double& offset, double& inverse) {
  inverse = static_cast<double>(levels.size() - 1) / (levels.back() - levels.front());
  if (!(inverse <= std::ldexp(1.0, 40))) return false;
  inverse = std::nearbyint(2 * inverse) / 2;
  offset = std::nearbyint(2 * levels.front() * inverse) / 2;
  if (inverse == 0.0) return false;
  for (std::size_t i = 0; i < levels.size(); ++i)
    if (levels[i] != (static_cast<double>(i) + offset) / inverse) return false;
  return true;
}

}  // namespace

Packed::Packed(const Entry& entry) : entry_(entry), unit_(floats_of(entry.scale)) {
  if (entry.grid.scale == Dtype::kInt8)
    for (float& exponent : unit_) exponent = std::ldexp(1.0f, static_cast<int>(exponent));
  for (const double level : entry.grid.levels) levels_.push_back(static_cast<float>(level));
  if (entry.bias) bias_ = floats_of(*entry.bias);
  double offset = 0.0;
  even_ = affine_of(entry.grid.levels, offset, inverse_);
  if (even_ && std::abs(offset) < 512) {
    affine_.factor = offset == std::floor(offset) ? 1 : 2;
    affine_.center = static_cast<int>(-affine_.factor * offset);
  } else {
    even_ = false;
  }
  take_words();
  if (entry.up) take_adapter();
}

// Words whose digits are all codes of the grid, and 0 behind the last one.
void Packed::take_words() {
  const std::uint64_t levels = levels_.size();
  for (std::uint64_t rest = ~std::uint64_t{0}; rest >= levels - 1; ++digits_)
    rest = (rest - (levels - 1)) / levels;
  const std::size_t count = static_cast<std::size_t>(count_of(entry_.shape));
  words_ = entry_.codes.data, bytes_ = entry_.codes.bytes;
  if (entry_.compressed) {
#ifdef SUBBYTE_ZSTD
    std::size_t digits = 0;
    for (std::uint64_t most = levels; most <= 256; most *= levels) ++digits;
    std::vector<std::uint8_t> packed((count + digits - 1) / digits), codes;
    if (ZSTD_getFrameContentSize(words_, bytes_) != packed.size() ||
        ZSTD_decompress(packed.data(), packed.size(), words_, bytes_) != packed.size())
      throw Error("its compressed codes are damaged");
    codes.reserve(count + digits);
    for (std::uint8_t byte : packed) {
      for (std::size_t k = 0; k < digits; ++k, byte = static_cast<std::uint8_t>(byte / levels))
        codes.push_back(static_cast<std::uint8_t>(byte % levels));
      if (byte) throw Error("a code is above the grid");
    }
    for (std::size_t i = count; i < codes.size(); ++i)
      if (codes[i]) throw Error("codes follow the last one");
    bytes_ = 8 * ((count + digits_ - 1) / digits_);
    unpacked_.resize(bytes_);
    radix_pack(codes.data(), count, static_cast<unsigned>(levels), digits_, unpacked_.data());
    words_ = unpacked_.data();
#else
    throw Error("its codes are compressed by zstd, which this runtime was built without");
#endif
  }
  std::uint64_t most = 1, last = 1;
  bool bounded = true;  // unless levels^digits is 2^64
  for (unsigned i = 0; i < digits_; ++i) bounded &= !__builtin_mul_overflow(most, levels, &most);
  const std::size_t rest = count % digits_;
  for (std::size_t i = 0; i < rest; ++i) last *= levels;
  for (std::size_t i = 0; i < bytes_; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, words_ + i, 8);
    if ((bounded && word >= most) || (rest && i + 8 == bytes_ && word >= last))
      throw Error("a code is above the grid, or follows the last one");
  }
}

void Packed::take_adapter() {
  const Tensor &up = *entry_.up, &down = *entry_.down, &scale = *entry_.adapter_scale;
  const bool good = up.shape.size() == 2 && down.shape.size() == 2 && up.shape[1] >= 1 &&
                    down.shape[0] >= 1 && down.shape[0] % up.shape[1] == 0 &&
                    up.shape[0] % (down.shape[0] / up.shape[1]) == 0 &&
                    up.shape[0] * down.shape[1] == count_of(entry_.shape) &&
                    scale.dtype == Dtype::kFloat32 && scale.shape == Shape{down.shape[0]};
  if (!good) throw Error("its adapter does not fit its weight");
  rank_ = up.shape[1];
  up_ = floats_of(up), down_ = floats_of(down);
  const std::vector<float> factor = floats_of(scale);
  const std::int64_t rows = up.shape[0] / (down.shape[0] / rank_);
  for (std::int64_t i = 0; i < up.shape[0]; ++i)
    for (std::int64_t r = 0; r < rank_; ++r) up_[i * rank_ + r] *= factor[i / rows * rank_ + r];
}

RadixCodes Packed::codes() const {
  return {words_, bytes_, static_cast<unsigned>(levels_.size()), digits_};
}

bool Packed::served(std::int64_t row_length) const {
  if (!even_ || count_of(entry_.shape) == 0) return false;
  const std::int64_t levels = static_cast<std::int64_t>(levels_.size());
  const std::int64_t center = affine_.center, top = affine_.factor * (levels - 1) - center;
  const std::int64_t largest = std::max(std::abs(center), std::abs(top));
  if (largest > 127) return false;
  if (entry_.grid.group) row_length = std::min(row_length, entry_.grid.group);
  if (row_length > kSums) return false;
  if (entry_.grid.axis > 0) return false;
  return affine_.factor * std::max(largest, levels - 1) * 255 * (row_length + 64) < kSums;
}

// What the integers of a row are multiplied with.
std::vector<float> Packed::row_scales() const {
  std::vector<float> found(rows());
  const float divisor = static_cast<float>(affine_.factor * inverse_);
  for (std::size_t i = 0; i < found.size(); ++i)
    found[i] = unit_[unit_.size() == 1 ? 0 : i] / divisor;
  return found;
}

const Panel& Packed::panel() const {
  if (panel_) return *panel_;
  const std::int64_t k = count_of(shape()) / rows();
  if (by_groups()) {
    panel_ = std::make_unique<Panel>(make_panel_of_groups(
        codes(), rows(), k, entry_.grid.group, unit_.data(),
        static_cast<float>(1 / (affine_.factor * inverse_)), affine_, kernels().tables));
    return *panel_;
  }
  std::vector<std::int32_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  const std::vector<float> scales = row_scales();
  panel_ = std::make_unique<Panel>(
      make_panel(codes(), 0, rows(), k, order, scales.data(), affine_, kernels().tables));
  return *panel_;
}

const ConvPanels& Packed::conv(const ConvShape& shape) const {
  if (!conv_) {
    const std::vector<float> scales = row_scales();
    conv_ = std::make_unique<ConvPanels>(shape, codes(), scales.data(), affine_, kernels().tables);
  }
  return *conv_;
}

// Of the weight at this place in C order.
float Packed::scale_at(std::int64_t index) const {
  if (unit_.size() == 1) return unit_[0];
  const Shape& s = entry_.shape;
  if (entry_.grid.group) {
    const std::int64_t width = count_of(s) / s[0], group = entry_.grid.group;
    return unit_[index / width * ((width + group - 1) / group) + index % width / group];
  }
  std::int64_t inner = 1;
  for (std::size_t d = s.size() - 1; d > static_cast<std::size_t>(entry_.grid.axis); --d)
    inner *= s[d];
  return unit_[index / inner % s[entry_.grid.axis]];
}

std::vector<float> Packed::decoded(bool adapter, int channel_axis) const {
  const std::size_t count = static_cast<std::size_t>(count_of(entry_.shape));
  std::vector<std::uint8_t> code(count);
  radix_unpack(words_, count, static_cast<unsigned>(levels_.size()), digits_, code.data());
  std::vector<float> weight(count);
  for (std::size_t i = 0; i < count; ++i)
    weight[i] = levels_[code[i]] * scale_at(static_cast<std::int64_t>(i));
  if (!adapter || !rank_) return weight;
  const std::int64_t out = entry_.up->shape[0], width = entry_.down->shape[1];
  const std::int64_t groups = entry_.down->shape[0] / rank_;
  std::int64_t before = 1, after = 1;  // of the channel axis
  for (int d = 0; d < static_cast<int>(entry_.shape.size()); ++d)
    if (d != channel_axis) (d < channel_axis ? before : after) *= entry_.shape[d];
  for (std::int64_t i = 0; i < out; ++i)
    for (std::int64_t j = 0; j < width; ++j) {
      float sum = 0.0f;
      for (std::int64_t r = 0; r < rank_; ++r)
        sum += up_[i * rank_ + r] * down_[(i / (out / groups) * rank_ + r) * width + j];
      weight[j / after * out * after + i * after + j % after] += sum;
    }
  (void)before;
  return weight;
}

void Packed::decode_row(std::int64_t row, float* out) const {
  const std::int64_t width = count_of(entry_.shape) / rows();
  std::vector<std::uint8_t> code(width);
  radix_unpack_range(words_, row * width, width, static_cast<unsigned>(levels_.size()), digits_,
                     code.data());
  for (std::int64_t i = 0; i < width; ++i) {
    out[i] = levels_[code[i]] * scale_at(row * width + i);
    float sum = 0.0f;
    for (std::int64_t r = 0; r < rank_; ++r) sum += up_[row * rank_ + r] * down_[r * width + i];
    if (rank_) out[i] += sum;
  }
}

const Packed* Weights::find(const std::string& name) {
  const std::string& own = file_.weight_of(name);
  const auto found = made_.find(own);
  if (found != made_.end()) return found->second.get();
  const auto entry = file_.layers().find(own);
  if (entry == file_.layers().end()) return nullptr;
  try {
    return made_.emplace(own, std::make_unique<Packed>(entry->second)).first->second.get();
  } catch (const Error& error) {
    throw Error("layer '" + shown(own) + "': " + error.what());
  }
}

}  // namespace subbyte::runtime
