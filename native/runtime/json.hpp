// JSON, strictly by RFC 8259, with limits on depth and on the number of values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace subbyte::runtime {

class Json {
 public:
  enum class Kind : std::uint8_t { kNull, kBool, kInteger, kReal, kText, kList, kMap };

  Kind kind = Kind::kNull;
  std::int64_t integer = 0;  // of a bool, too
  double real = 0.0;         // of an integer, too
  std::string text;
  std::vector<std::string> keys;  // of a map, in the order of `items`
  std::vector<Json> items;        // of a list or map

  bool is(Kind wanted) const { return kind == wanted; }
  // Null if this is no map, or has no such key.
  const Json* find(std::string_view key) const;
  // The value of a key, of this kind. Throws Error naming the key.
  const Json& at(std::string_view key, Kind wanted) const;
};

// Throws Error for what is no JSON, and beyond the limits.
Json parse_json(std::string_view text);

}  // namespace subbyte::runtime
