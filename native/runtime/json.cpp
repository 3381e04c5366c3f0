#include "json.hpp"

#include <algorithm>
#include <charconv>
#include <clocale>
#include <cmath>
#include <locale>
#include <sstream>

#include "error.hpp"

namespace subbyte::runtime {

std::string shown(const std::string& text) {
  std::string found;
  for (const char c : text.substr(0, 99))
    found += static_cast<unsigned char>(c) < 32 || c == 127 ? '?' : c;
  return found;
}

namespace {

constexpr int kDepth = 64;
constexpr std::size_t kValues = std::size_t{1} << 22;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json whole() {
    Json found = value(0);
    space();
    if (at_ != text_.size()) fail("something follows the value");
    return found;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw Error("malformed JSON at byte " + std::to_string(at_) + ": " + what);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }

  void expect(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail("a value is missing");
    at_ += word.size();
  }

  Json value(int depth) {
    if (depth > kDepth) fail("values lie too deep in values");
    if (++count_ > kValues) fail("too many values");
    space();
    Json found;
    switch (peek()) {
      case '{':
        return map(depth);
      case '[':
        return list(depth);
      case '"':
        found.kind = Json::Kind::kText;
        found.text = string();
        return found;
      case 't':
        expect("true");
        found.kind = Json::Kind::kBool;
        found.integer = 1;
        return found;
      case 'f':
        expect("false");
        found.kind = Json::Kind::kBool;
        return found;
      case 'n':
        expect("null");
        return found;
      default:
        return number();
    }
  }

  Json list(int depth) {
    Json found;
    found.kind = Json::Kind::kList;
    ++at_;
    space();
    if (peek() == ']') return ++at_, found;
    while (true) {
      found.items.push_back(value(depth + 1));
      space();
      const char next = peek();
      if (next != ',' && next != ']') fail("a list lacks its end");
      ++at_;
      if (next == ']') return found;
    }
  }

  Json map(int depth) {
    Json found;
    found.kind = Json::Kind::kMap;
    ++at_;
    space();
    if (peek() == '}') return ++at_, found;
    while (true) {
      space();
      if (peek() != '"') fail("a key is missing");
      found.keys.push_back(string());
      space();
      if (peek() != ':') fail("a colon is missing");
      ++at_;
      found.items.push_back(value(depth + 1));
      space();
      const char next = peek();
      if (next != ',' && next != '}') fail("a map lacks its end");
      ++at_;
      if (next == '}') break;
    }
    std::vector<std::string_view> sorted(found.keys.begin(), found.keys.end());
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) fail("a key comes twice");
    return found;
  }

  bool digits() {
    const std::size_t first = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ > first;
  }

  Json number() {
    const std::size_t first = at_;
    bool whole = true;
    if (peek() == '-') ++at_;
    const bool zero = peek() == '0';
    const std::size_t start = at_;
    if (!digits() || (zero && at_ > start + 1)) fail("a value is missing");
    if (peek() == '.') {
      whole = false, ++at_;
      if (!digits()) fail("a number ends at its point");
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false, ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      if (!digits()) fail("a number lacks its exponent");
    }
    const std::string word(text_.substr(first, at_ - first));
    if (word.size() > 400) fail("a number is too long");
    Json found;
    found.kind = whole ? Json::Kind::kInteger : Json::Kind::kReal;
    if (whole) {
      const auto done = std::from_chars(word.data(), word.data() + word.size(), found.integer);
      if (done.ec != std::errc()) fail("a whole number does not fit in 64 bits");
      found.real = static_cast<double>(found.integer);
      return found;
    }
    std::istringstream stream(word);  // the locale's point must not matter
    stream.imbue(std::locale::classic());
    stream >> found.real;
    if (stream.fail() && !(std::abs(found.real) < 1.0)) fail("a number is out of range");
    return found;
  }

  unsigned hex() {
    unsigned found = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("an escape lacks digits");
      found = 16 * found + static_cast<unsigned>(digit);
    }
    return found;
  }

  void escape(std::string& out) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    const char c = peek();
    ++at_;
    const std::size_t known = kNames.find(c);
    if (c != '\0' && known != std::string_view::npos) {
      out += kMeant[known];
      return;
    }
    if (c != 'u') fail("an escape is unknown");
    unsigned code = hex();
    if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const unsigned low = hex();
      if (low < 0xDC00 || low > 0xDFFF) fail("half of a character");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    utf8(code, out);
  }

  static void utf8(unsigned code, std::string& out) {
    const auto put = [&](unsigned byte) { out += static_cast<char>(byte); };
    if (code < 0x80) return put(code);
    if (code < 0x800) return put(0xC0 | code >> 6), put(0x80 | (code & 63));
    if (code < 0x10000)
      return put(0xE0 | code >> 12), put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
    put(0xF0 | code >> 18), put(0x80 | (code >> 12 & 63)), put(0x80 | (code >> 6 & 63));
    put(0x80 | (code & 63));
  }

  std::string string() {
    std::string found;
    ++at_;
    while (true) {
      if (at_ >= text_.size()) fail("a text lacks its end");
      const char c = text_[at_++];
      if (c == '"') return found;
      if (static_cast<unsigned char>(c) < 32) fail("a control character in a text");
      if (c == '\\')
        escape(found);
      else
        found += c;
    }
  }

  std::string_view text_;
  std::size_t at_ = 0, count_ = 0;
};

const char* name_of(Json::Kind kind) {
  static constexpr const char* kNames[] = {"null",   "true or false", "a whole number", "a number",
                                           "a text", "a list",        "a map"};
  return kNames[static_cast<int>(kind)];
}

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (std::size_t i = 0; i < keys.size(); ++i)
    if (keys[i] == key) return &items[i];
  return nullptr;
}

const Json& Json::at(std::string_view key, Kind wanted) const {
  const Json* found = find(key);
  if (!found || !found->is(wanted))
    throw Error("'" + std::string(key) + "' is not " + name_of(wanted));
  return *found;
}

Json parse_json(std::string_view text) { return Parser(text).whole(); }

}  // namespace subbyte::runtime
