// classify FILE input.bin: the class that a packed network gives to its input, raw float32 values.
//
//   c++ -std=c++17 classify.cpp -lsubbyte_runtime -o classify
#include <subbyte.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <vector>

namespace {

using Network = std::unique_ptr<subbyte_network, void (*)(subbyte_network*)>;

void check(int code) {
  if (code) throw std::runtime_error(subbyte_last_error());
}

Network open(const char* path) {
  subbyte_network* network = nullptr;
  check(subbyte_open(path, nullptr, &network));
  return {network, &subbyte_close};
}

// One example of the network's first input.
subbyte_tensor one_input(const Network& network) {
  subbyte_tensor input;
  check(subbyte_input(network.get(), 0, &input));
  for (int d = 0; d < input.rank; ++d)
    if (input.shape[d] < 0) input.shape[d] = 1;
  return input;
}

std::size_t count(const subbyte_tensor& tensor) {
  std::size_t values = 1;
  for (int d = 0; d < tensor.rank; ++d) values *= static_cast<std::size_t>(tensor.shape[d]);
  return values;
}

int classify(const char* path, const char* values) {
  const Network network = open(path);
  subbyte_tensor input = one_input(network), output;
  std::vector<float> x(count(input));
  std::ifstream(values, std::ios::binary)
      .read(reinterpret_cast<char*>(x.data()),
            static_cast<std::streamsize>(x.size() * sizeof x[0]));
  input.data = x.data();
  int32_t outputs = 0;
  check(subbyte_outputs(network.get(), &input, 1, &output, 1, &outputs));
  std::vector<float> scores(count(output));
  output.data = scores.data();
  check(subbyte_run(network.get(), &input, 1, &output, 1, /*threads=*/1));
  return static_cast<int>(std::max_element(scores.begin(), scores.end()) - scores.begin());
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::fprintf(stderr, "classify FILE input.bin\n");
    return 2;
  }
  try {
    std::printf("%d\n", classify(words[1], words[2]));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
    return 1;
  }
}
