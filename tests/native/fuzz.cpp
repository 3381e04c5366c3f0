// Packed files with faults, opened and run: fuzz FOLDER SECONDS [SEED]. Nothing may crash; build it
// with sanitizers (run.sh fuzz). With -DSUBBYTE_LIBFUZZER it is a target of libFuzzer instead.
#include <dirent.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "subbyte.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

struct Counts {
  long files = 0, opened = 0, ran = 0;
} counts;

// Opens the bytes as a file and runs it on zeros, each free size as 2.
void attempt(const Bytes& bytes) {
  ++counts.files;
  const subbyte_options options{SUBBYTE_PRECISION_INT8, 0, 1 << 22};
  subbyte_network* network = nullptr;
  if (subbyte_open_memory(bytes.data(), bytes.size(), &options, &network)) return;
  ++counts.opened;
  const int32_t n = subbyte_input_count(network);
  std::vector<subbyte_tensor> in(static_cast<std::size_t>(n)), out(16);
  std::vector<std::vector<double>> room;  // aligned
  bool good = n < 16;
  for (int32_t i = 0; good && i < n; ++i) {
    subbyte_input(network, i, &in[i]);
    std::size_t values = 1;
    for (int d = 0; d < in[i].rank; ++d) {
      if (in[i].shape[d] < 0) in[i].shape[d] = 2;
      values = in[i].shape[d] < 4096 && values < 65536 ? values * in[i].shape[d] : 1 << 30;
    }
    good = values < 1 << 20;
    if (good) room.emplace_back(values + 1);
    if (good) in[i].data = room.back().data();
  }
  int32_t count = 0;
  if (good && !subbyte_outputs(network, in.data(), n, out.data(), 16, &count) && count <= 16) {
    for (int32_t i = 0; i < count; ++i) {
      std::size_t values = 1;
      for (int d = 0; d < out[i].rank; ++d) values *= static_cast<std::size_t>(out[i].shape[d]);
      room.emplace_back(values + 1);
      out[i].data = room.back().data();
    }
    counts.ran += !subbyte_run(network, in.data(), n, out.data(), count, 1);
  }
  subbyte_close(network);
}

Bytes read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// A number, a letter, a bit or a piece of the header is another; the header's length stays right.
Bytes mutated(const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  static const char* const kWords[] = {"0",     "-1",         "1",    "2",    "3",
                                       "255",   "4294967296", "null", "true", "9223372036854775807",
                                       "1e308", "[]",         "{}",   "\"\"", "1000000"};
  Bytes bytes = corpus[random() % corpus.size()];
  for (int i = static_cast<int>(random() % 4); i >= 0; --i) {
    std::uint64_t length = 0;
    if (bytes.size() < 10) return bytes;
    std::memcpy(&length, bytes.data(), 8);
    const std::size_t end = length < bytes.size() - 8 ? 8 + length : bytes.size();
    const std::size_t at = 8 + random() % (end - 8);
    switch (random() % 6) {
      case 0:
        bytes[random() % bytes.size()] ^= static_cast<std::uint8_t>(1u << random() % 8);
        break;
      case 1:
        bytes.resize(random() % (bytes.size() + 1));
        break;
      case 2: {  // a piece of the header again, elsewhere
        const std::size_t from = 8 + random() % (end - 8), n = random() % 40;
        for (std::size_t k = 0; k < n && from + k < end && at + k < end; ++k)
          bytes[at + k] = bytes[from + k];
        break;
      }
      default: {  // another number
        std::size_t first = at;
        while (first < end && !std::strchr("0123456789", bytes[first])) ++first;
        std::size_t last = first;
        while (last < end && bytes[last] && std::strchr("0123456789.e-", bytes[last])) ++last;
        if (first == end) break;
        const std::string word = kWords[random() % (sizeof kWords / sizeof *kWords)];
        bytes.erase(bytes.begin() + first, bytes.begin() + last);
        bytes.insert(bytes.begin() + first, word.begin(), word.end());
        length += word.size() - (last - first);
        std::memcpy(bytes.data(), &length, 8);
      }
    }
  }
  return bytes;
}

}  // namespace

#ifdef SUBBYTE_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  attempt(Bytes(data, data + size));
  return 0;
}
#else
int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "fuzz FOLDER SECONDS [SEED]\n"), 2;
  std::vector<Bytes> corpus;
  if (DIR* folder = opendir(argv[1])) {
    while (const dirent* entry = readdir(folder))
      if (entry->d_name[0] != '.')
        corpus.push_back(read(std::string(argv[1]) + "/" + entry->d_name));
    closedir(folder);
  }
  if (corpus.empty()) return std::fprintf(stderr, "%s: no files\n", argv[1]), 2;
  for (const Bytes& bytes : corpus) attempt(bytes);
  if (counts.ran != static_cast<long>(corpus.size()))
    return std::fprintf(stderr, "%ld of %zu files of the corpus run: %s\n", counts.ran,
                        corpus.size(), subbyte_last_error()),
           1;
  std::mt19937_64 random(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[2]));
  while (std::chrono::steady_clock::now() < end) {
    const Bytes bytes = mutated(corpus, random);
    std::ofstream("fuzz-last.bin", std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    attempt(bytes);
  }
  std::printf("%ld files, %ld opened, %ld ran\n", counts.files, counts.opened, counts.ran);
  return 0;
}
#endif
