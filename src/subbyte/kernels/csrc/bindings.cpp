// The only file that knows Python. torch CPU tensors come in without a copy (DLPack).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "radix.hpp"

namespace nb = nanobind;

using InBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

void require_words(std::size_t count, unsigned digits, std::size_t bytes) {
  if (digits == 0 || bytes != 8 * ((count + digits - 1) / digits))
    throw std::invalid_argument("words and codes differ in size");
}

void pack(InBytes codes, unsigned levels, unsigned digits, OutBytes words) {
  require_words(codes.size(), digits, words.size());
  nb::gil_scoped_release released;
  subbyte::radix_pack(codes.data(), codes.size(), levels, digits, words.data());
}

void unpack(InBytes words, unsigned levels, unsigned digits, OutBytes codes) {
  require_words(codes.size(), digits, words.size());
  nb::gil_scoped_release released;
  subbyte::radix_unpack(words.data(), codes.size(), levels, digits, codes.data());
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "subbyte's C++ core";
  module.def("radix_pack", &pack, nb::arg("codes"), nb::arg("levels"), nb::arg("digits"),
             nb::arg("words"), "Write the radix words of `codes` into `words`.");
  module.def("radix_unpack", &unpack, nb::arg("words"), nb::arg("levels"), nb::arg("digits"),
             nb::arg("codes"), "Write the digits of `words` into `codes`.");
}
