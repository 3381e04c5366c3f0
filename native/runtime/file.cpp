#include "file.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>

#include "error.hpp"
#include "sha256.hpp"

namespace subbyte::runtime {
namespace {

using Kind = Json::Kind;

constexpr std::size_t kHeader = std::size_t{1} << 26;  // bytes of a JSON header
constexpr int kVersion = 2;

std::string joined(const std::string& layer, const char* part) {
  return layer.empty() ? part : layer + "." + part;
}

Shape shape_of(const Json& value) {
  if (!value.is(Kind::kList) || value.items.size() > 16) throw Error("a shape is no list of sizes");
  Shape shape;
  for (const Json& size : value.items) {
    if (!size.is(Kind::kInteger)) throw Error("a shape has sizes that are no whole numbers");
    shape.push_back(size.integer);
  }
  count_of(shape);
  return shape;
}

Grid grid_of(const Json& value) {
  Grid grid;
  for (const Json& level : value.at("levels", Kind::kList).items) {
    if (!level.is(Kind::kInteger) && !level.is(Kind::kReal)) throw Error("a level is no number");
    const double before = grid.levels.empty() ? -INFINITY : static_cast<float>(grid.levels.back());
    if (!std::isfinite(static_cast<float>(level.real)) ||
        !(static_cast<float>(level.real) > before))
      throw Error("the levels of a grid do not strictly increase");
    grid.levels.push_back(level.real);
  }
  if (grid.levels.size() < 2 || grid.levels.size() > 256)
    throw Error("a grid has " + std::to_string(grid.levels.size()) + " levels, not 2 to 256");
  const Json* axis = value.find("channel_axis");
  if (axis && axis->is(Kind::kInteger) && axis->integer >= 0 && axis->integer < 16)
    grid.axis = static_cast<int>(axis->integer);
  else if (!axis || !axis->is(Kind::kNull))
    throw Error("a grid's channel_axis is malformed");
  const Json* group = value.find("group");
  if (group) {
    const bool good = group->is(Kind::kInteger) && group->integer >= 4 &&
                      group->integer <= 1 << 20 && group->integer % 4 == 0 && grid.axis < 0;
    if (!good) throw Error("a grid's group is malformed");
    grid.group = group->integer;
  }
  const std::string& domain = value.at("scale_domain", Kind::kText).text;
  if (domain == "float16")
    grid.scale = Dtype::kFloat16;
  else if (domain == "power_of_two")
    grid.scale = Dtype::kInt8;
  else if (domain != "float32")
    throw Error("scale_domain '" + shown(domain) + "' is unknown");
  return grid;
}

std::int64_t scales_of(const Entry& entry) {
  const Grid& grid = entry.grid;
  if (grid.group) {
    if (entry.shape.empty()) throw Error("a weight without dimensions has groups");
    if (entry.shape[0] == 0) return 0;
    const std::int64_t width = count_of(entry.shape) / entry.shape[0];
    return entry.shape[0] * ((width + grid.group - 1) / grid.group);
  }
  if (grid.axis < 0) return 1;
  if (grid.axis >= static_cast<int>(entry.shape.size()))
    throw Error("the grid's channel_axis is no dimension of the weight");
  return entry.shape[grid.axis];
}

unsigned digits_of(std::uint64_t levels, std::uint64_t top) {  // most with levels^d <= top + 1
  unsigned digits = 0;
  for (std::uint64_t rest = top; rest >= levels - 1; ++digits)
    rest = (rest - (levels - 1)) / levels;
  return digits;
}

bool is_float(Dtype dtype) { return dtype <= Dtype::kBFloat16; }

// Of NaN or infinity in a stored tensor.
bool finite(const Tensor& tensor) {
  const std::size_t size = size_of(tensor.dtype), count = tensor.bytes / size;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, tensor.data + i * size, size);
    const std::uint64_t exponent = tensor.dtype == Dtype::kFloat32    ? 0x7F800000u
                                   : tensor.dtype == Dtype::kFloat16  ? 0x7C00u
                                   : tensor.dtype == Dtype::kBFloat16 ? 0x7F80u
                                                                      : 0x7FF0000000000000u;
    if ((bits & exponent) == exponent) return false;
  }
  return true;
}

void check_values(const std::string& name, const Tensor& tensor) {
  if (!is_float(tensor.dtype)) return;
  if (!finite(tensor)) throw Error("'" + shown(name) + "' has NaN or infinite values");
  constexpr char kVariance[] = "running_var";
  const std::size_t n = sizeof kVariance - 1;
  if (name.size() < n || name.compare(name.size() - n, n, kVariance)) return;
  for (std::size_t i = 0; tensor.dtype == Dtype::kFloat32 && i < tensor.bytes / 4; ++i) {
    float value;
    std::memcpy(&value, tensor.data + 4 * i, 4);
    if (value < 0) throw Error("'" + shown(name) + "' is a variance and has negative values");
  }
}

}  // namespace

File File::open(const std::string& path, bool verify) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             &std::fclose);
  if (!file) throw Error("cannot be opened; give the path of a packed .safetensors");
  std::fseek(file.get(), 0, SEEK_END);
  const long size = std::ftell(file.get());
  std::rewind(file.get());
  if (size < 0 || size == 0x7FFFFFFFFFFFFFFF) throw Error("is no file that can be read");
  Buffer bytes(static_cast<std::size_t>(size));
  if (std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size())
    throw Error("cannot be read to its end");
  File found(std::move(bytes));
  found.read(verify);
  return found;
}

File File::of_memory(const std::uint8_t* data, std::size_t size, bool verify) {
  Buffer bytes(size);
  if (size) std::memcpy(bytes.data(), data, size);
  File found(std::move(bytes));
  found.read(verify);
  return found;
}

void File::read(bool verify) {
  const std::string stated = read_header();
  const Json& sizes = manifest_.at("version", Kind::kInteger);
  if (manifest_.at("format", Kind::kText).text != "subbyte" || sizes.integer < 1)
    throw Error("the manifest is malformed");
  if (sizes.integer > kVersion)
    throw Error("format version " + std::to_string(sizes.integer) + ", this runtime reads up to " +
                std::to_string(kVersion) + "; upgrade it");
  take_layers();
  take_state();
  std::set<std::string> once(names_.begin(), names_.end());
  if (once.size() != names_.size() || once.size() != tensors_.size())
    throw Error("the manifest does not account for every tensor once");
  std::uint64_t header;
  std::memcpy(&header, bytes_.data(), 8);
  if (verify) check_digests(stated, 8 + static_cast<std::size_t>(header));
  for (const auto& [name, entry] : layers_)
    if (entry.bias) check_values(joined(name, "bias"), *entry.bias);
  for (const Json& name : manifest_.at("state", Kind::kList).items)
    check_values(name.text, tensor(name.text));
}

// Fills the tensors and the manifest; the header's checksum, "" if it has none.
std::string File::read_header() {
  std::uint64_t length;
  if (bytes_.size() < 8) throw Error("not a whole safetensors file; make or fetch it again");
  std::memcpy(&length, bytes_.data(), 8);
  if (length > bytes_.size() - 8 || length > kHeader)
    throw Error("not a whole safetensors file; make or fetch it again");
  const char* text = reinterpret_cast<const char*>(bytes_.data()) + 8;
  const Json header = parse_json({text, static_cast<std::size_t>(length)});
  if (!header.is(Kind::kMap)) throw Error("the header of the file is no JSON object");
  const Json* metadata = header.find("__metadata__");
  const Json* manifest = metadata ? metadata->find("subbyte") : nullptr;
  if (!manifest || !manifest->is(Kind::kText))
    throw Error("a safetensors file without a subbyte manifest; make one with subbyte.save");
  for (std::size_t i = 0; i < header.keys.size(); ++i)
    if (header.keys[i] != "__metadata__")
      take_tensor(header.keys[i], header.items[i], 8 + static_cast<std::size_t>(length));
  check_order();
  manifest_ = parse_json(manifest->text);
  const Json* digest = metadata->find("subbyte-sha256");
  return digest && digest->is(Kind::kText) ? digest->text : "";
}

void File::take_tensor(const std::string& name, const Json& stated, std::size_t start) {
  Tensor found;
  found.dtype = dtype_named(stated.at("dtype", Kind::kText).text);
  found.shape = shape_of(stated.at("shape", Kind::kList));
  const std::vector<Json>& range = stated.at("data_offsets", Kind::kList).items;
  const std::int64_t room = static_cast<std::int64_t>(bytes_.size() - start);
  const bool good = range.size() == 2 && range[0].is(Kind::kInteger) &&
                    range[1].is(Kind::kInteger) && range[0].integer >= 0 &&
                    range[0].integer <= range[1].integer && range[1].integer <= room;
  if (!good)
    throw Error("tensor '" + shown(name) + "' does not lie in the file; make or fetch it again");
  found.bytes = static_cast<std::size_t>(range[1].integer - range[0].integer);
  if (found.bytes != static_cast<std::size_t>(count_of(found.shape)) * size_of(found.dtype))
    throw Error("tensor '" + shown(name) + "' has not the size of its shape");
  found.data = bytes_.data() + start + range[0].integer;
  if (found.bytes && reinterpret_cast<std::uintptr_t>(found.data) % size_of(found.dtype)) {
    aligned_.emplace_back(found.bytes);
    std::memcpy(aligned_.back().data(), found.data, found.bytes);
    found.data = aligned_.back().data();
  }
  tensors_.emplace(name, found);
}

// Copies may not make memory out of one that many tensors share.
void File::check_order() const {
  std::size_t total = 0;
  for (const auto& [name, tensor] : tensors_)
    if (__builtin_add_overflow(total, tensor.bytes, &total) || total > bytes_.size())
      throw Error("tensors of the file lie over each other");
}

const Tensor& File::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end())
    throw Error("tensor '" + shown(name) + "' is in the manifest but not in the file");
  return found->second;
}

void File::take_layers() {
  std::vector<Grid> grids;
  for (const Json& grid : manifest_.at("grids", Kind::kList).items) grids.push_back(grid_of(grid));
  const Json& layers = manifest_.at("layers", Kind::kMap);
  for (std::size_t i = 0; i < layers.keys.size(); ++i) {
    const std::string& name = layers.keys[i];
    const Json& stated = layers.items[i];
    try {
      Entry entry;
      entry.type = stated.at("type", Kind::kText).text;
      entry.shape = shape_of(stated.at("shape", Kind::kList));
      const std::int64_t grid = stated.at("grid", Kind::kInteger).integer;
      if (grid < 0 || grid >= static_cast<std::int64_t>(grids.size()))
        throw Error("the manifest has no grid " + std::to_string(grid));
      entry.grid = grids[static_cast<std::size_t>(grid)];
      const std::string& encoding = stated.at("encoding", Kind::kText).text;
      entry.compressed = encoding == "radix-bytes+zstd";
      if (!entry.compressed && encoding != "radix64")
        throw Error("encoding '" + shown(encoding) + "' is unknown; upgrade the runtime");
      const auto part = [&](const char* own) {
        names_.push_back(joined(name, own));
        return &tensor(names_.back());
      };
      entry.codes = *part("codes"), entry.scale = *part("scale");
      if (stated.at("bias", Kind::kBool).integer) entry.bias = part("bias");
      if (stated.find("adapter") && stated.at("adapter", Kind::kBool).integer)
        entry.up = part("up"), entry.down = part("down"),
        entry.adapter_scale = part("adapter_scale");
      if (entry.codes.dtype != Dtype::kUint8 || entry.codes.shape.size() != 1)
        throw Error("its codes are no bytes");
      const std::uint64_t levels = entry.grid.levels.size();
      const std::size_t count = static_cast<std::size_t>(count_of(entry.shape));
      const std::size_t digits = digits_of(levels, ~std::uint64_t{0});
      if (!entry.compressed && entry.codes.bytes != 8 * ((count + digits - 1) / digits))
        throw Error("its codes are " + std::to_string(entry.codes.bytes) + " bytes, not those of " +
                    std::to_string(count) + " weights");
      if (entry.scale.dtype != entry.grid.scale || entry.scale.shape != Shape{scales_of(entry)})
        throw Error("its scale is " + std::string(name_of(entry.scale.dtype)) + " " +
                    text_of(entry.scale.shape) + ", the grid needs " + name_of(entry.grid.scale) +
                    " [" + std::to_string(scales_of(entry)) + "]");
      if (is_float(entry.scale.dtype) && !finite(entry.scale))
        throw Error("its scales are NaN or infinite");
      for (std::size_t k = 0; !is_float(entry.scale.dtype) && k < entry.scale.bytes; ++k)
        if (static_cast<std::int8_t>(entry.scale.data[k]) < -126)
          throw Error("a scale's exponent is below -126");
      layers_.emplace(name, std::move(entry));
    } catch (const Error& error) {
      throw Error("layer '" + shown(name) + "': " + error.what());
    }
  }
}

void File::take_state() {
  for (const Json& name : manifest_.at("state", Kind::kList).items) {
    if (!name.is(Kind::kText)) throw Error("a name in 'state' is no text");
    tensor(name.text);
    names_.push_back(name.text);
    state_.emplace(name.text, name.text);
  }
  const auto words = [&](const char* key, auto&& take) {
    const Json* map = manifest_.find(key);
    for (std::size_t i = 0; map && i < map->keys.size(); ++i) {
      if (!map->items[i].is(Kind::kText)) throw Error(std::string("'") + key + "' is malformed");
      take(map->keys[i], map->items[i].text);
    }
  };
  words("ties", [&](const std::string& alias, const std::string& name) {
    if (!state_.count(name) || !state_.emplace(alias, name).second)
      throw Error("the manifest ties '" + shown(alias) + "' to '" + shown(name) + "'");
  });
  words("shared", [&](const std::string& alias, const std::string& name) {
    if (!layers_.count(name) || layers_.count(alias))
      throw Error("the manifest shares layer '" + shown(name) + "' with '" + shown(alias) + "'");
    shared_.emplace(alias, name);
  });
}

void File::check_digests(const std::string& stated, std::size_t header) const {
  const Json* digests = manifest_.find("sha256");
  if (!stated.empty() || digests) {
    std::string text(reinterpret_cast<const char*>(bytes_.data()), header);
    std::size_t at = stated.size() == 64 ? text.find(stated) : std::string::npos;
    for (; at != std::string::npos; at = text.find(stated, at + 64))
      text.replace(at, 64, std::string(64, '0'));
    Sha256 sum;
    sum.add(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
    if (sum.hex() != stated)
      throw Error("the header's checksum does not fit; the file is damaged, fetch it again");
  }
  if (!digests) return;
  const std::vector<Json>& sums = manifest_.at("sha256", Kind::kList).items;
  if (sums.size() != names_.size()) throw Error("the manifest has not a checksum for each tensor");
  for (std::size_t i = 0; i < sums.size(); ++i) {
    Sha256 sum;
    const Tensor& own = tensor(names_[i]);
    sum.add(own.data, own.bytes);
    if (sum.hex().substr(0, 16) != sums[i].text)
      throw Error("the checksum of tensor '" + shown(names_[i]) +
                  "' does not fit; the file is damaged, fetch it again");
  }
}

const Tensor* File::state(const std::string& name) const {
  const auto found = state_.find(name);
  return found == state_.end() ? nullptr : &tensors_.at(found->second);
}

bool File::absorbed(const std::string& norm) const {
  const Json* names = manifest_.find("affine");
  if (!names || !names->is(Kind::kList)) return false;
  return std::any_of(names->items.begin(), names->items.end(),
                     [&](const Json& name) { return name.text == norm; });
}

const std::string& File::weight_of(const std::string& layer) const {
  const auto found = shared_.find(layer);
  return found == shared_.end() ? layer : found->second;
}

}  // namespace subbyte::runtime
