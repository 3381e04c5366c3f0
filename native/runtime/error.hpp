// What the runtime refuses, in one line.
#pragma once

#include <stdexcept>
#include <string>

namespace subbyte::runtime {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A word from outside as it may stand in an error: cut, and without control characters.
std::string shown(const std::string& text);

}  // namespace subbyte::runtime
