#include "npy.hpp"

#include <cstdio>
#include <cstring>
#include <memory>

#include "error.hpp"

namespace subbyte::runtime {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
// In the order of Dtype; "" for types that NumPy has not.
constexpr const char* kTypes[] = {"<f4", "<f8", "<f2", "",    "<i8",
                                  "<i4", "<i2", "|i1", "|u1", "|b1"};

using Stream = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

Stream stream(const std::string& path, const char* mode) {
  return {std::fopen(path.c_str(), mode),
          [](std::FILE* file) { return file ? std::fclose(file) : 0; }};
}

std::string word_after(const std::string& text, const std::string& key) {
  const std::size_t at = text.find("'" + key + "':");
  if (at == std::string::npos) throw Error("its header has no '" + key + "'");
  const std::size_t start = text.find_first_not_of(' ', at + key.size() + 3);
  if (start == std::string::npos) throw Error("its header is cut off");
  return text.substr(start);
}

Dtype type_of(const std::string& header) {
  const std::string rest = word_after(header, "descr");
  const std::size_t end = rest.find('\'', 1);
  for (int i = 0; i < 10 && rest[0] == '\'' && end != std::string::npos; ++i)
    if (*kTypes[i] && rest.substr(1, end - 1) == kTypes[i]) return static_cast<Dtype>(i);
  throw Error("its values are of a type that does not run: " + shown(rest.substr(0, 20)));
}

Shape shape_in(const std::string& header) {
  const std::string rest = word_after(header, "shape");
  const std::size_t end = rest.find(')');
  if (rest[0] != '(' || end == std::string::npos) throw Error("its shape is malformed");
  Shape shape;
  for (std::size_t i = 1; i < end;) {
    if (rest[i] == ' ' || rest[i] == ',') {
      ++i;
      continue;
    }
    std::int64_t size = 0;
    const std::size_t first = i;
    for (; rest[i] >= '0' && rest[i] <= '9'; ++i)
      if (i - first > 15)
        throw Error("its shape is malformed");
      else
        size = 10 * size + (rest[i] - '0');
    if (i == first) throw Error("its shape is malformed");
    shape.push_back(size);
  }
  return shape;
}

Npy read(std::FILE* file) {
  unsigned char start[12] = {};
  if (std::fread(start, 1, 10, file) != 10 || std::memcmp(start, kMagic, 6))
    throw Error("is no .npy file");
  std::size_t length = start[8] | static_cast<std::size_t>(start[9]) << 8;
  if (start[6] > 1) {
    if (std::fread(start + 10, 1, 2, file) != 2) throw Error("is cut off");
    length |= static_cast<std::size_t>(start[10]) << 16 | static_cast<std::size_t>(start[11]) << 24;
  }
  if (length > 1 << 20) throw Error("its header is too long");
  std::string header(length, ' ');
  if (std::fread(&header[0], 1, length, file) != length) throw Error("is cut off");
  if (word_after(header, "fortran_order").rfind("False", 0) != 0)
    throw Error("its values are not in C order; save numpy.ascontiguousarray(x)");
  const long here = std::ftell(file);
  std::fseek(file, 0, SEEK_END);
  const long end = std::ftell(file);
  std::fseek(file, here, SEEK_SET);
  const Dtype dtype = type_of(header);
  const Shape shape = shape_in(header);
  if (static_cast<std::int64_t>(size_of(dtype)) * count_of(shape) != end - here)
    throw Error("has not as many values as its shape");
  Npy array = empty_npy(dtype, shape);
  if (std::fread(array.data.data(), 1, array.data.size(), file) != array.data.size())
    throw Error("is cut off");
  return array;
}

}  // namespace

Npy empty_npy(Dtype dtype, const Shape& shape) {
  return {dtype, shape, Buffer(static_cast<std::size_t>(count_of(shape)) * size_of(dtype))};
}

Npy read_npy(const std::string& path) {
  try {
    const Stream file = stream(path, "rb");
    if (!file) throw Error("cannot be opened");
    return read(file.get());
  } catch (const Error& error) {
    throw Error(shown(path) + ": " + error.what());
  }
}

void write_npy(const std::string& path, const Npy& array) {
  const char* type = kTypes[static_cast<int>(array.dtype)];
  if (!*type) throw Error(shown(path) + ": NumPy has no such type");
  std::string header = std::string("{'descr': '") + type + "', 'fortran_order': False, 'shape': (";
  for (const std::int64_t size : array.shape) header += std::to_string(size) + ", ";
  header += "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  const std::string part = path + ".part";
  {
    const Stream file = stream(part, "wb");
    if (!file) throw Error(shown(path) + ": cannot be written");
    const unsigned char start[10] = {0x93,
                                     'N',
                                     'U',
                                     'M',
                                     'P',
                                     'Y',
                                     1,
                                     0,
                                     static_cast<unsigned char>(header.size() & 255),
                                     static_cast<unsigned char>(header.size() >> 8)};
    const bool done =
        std::fwrite(start, 1, 10, file.get()) == 10 &&
        std::fwrite(header.data(), 1, header.size(), file.get()) == header.size() &&
        std::fwrite(array.data.data(), 1, array.data.size(), file.get()) == array.data.size() &&
        std::fflush(file.get()) == 0;
    if (!done) {
      std::remove(part.c_str());
      throw Error(shown(path) + ": cannot be written to its end");
    }
  }
  if (std::rename(part.c_str(), path.c_str())) throw Error(shown(path) + ": cannot be written");
}

}  // namespace subbyte::runtime
