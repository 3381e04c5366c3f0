// subbyte-run FILE input.npy output.npy [--threads N] [--precision P] [--bench]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "npy.hpp"
#include "subbyte.h"

namespace {

using subbyte::runtime::Npy;

constexpr char kUsage[] =
    "subbyte-run FILE input.npy [input.npy ...] output.npy [--threads N] "
    "[--precision int8|dynamic|int16|float32] [--bench] [--profile]";

struct Line {
  std::vector<std::string> files;
  int threads = 1;
  subbyte_options options{SUBBYTE_PRECISION_INT8, 1, 0};
  bool bench = false, profile = false;
};

struct Failure {
  std::string what;
};

void check(int code) {
  if (code) throw Failure{subbyte_last_error()};
}

Line line_of(int count, char** words) {
  Line line;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto next = [&] { return ++i < count ? std::string(words[i]) : std::string(); };
    if (word == "--bench") {
      line.bench = true;
    } else if (word == "--profile") {
      line.profile = true;
    } else if (word == "--threads") {
      line.threads = std::atoi(next().c_str());
      if (line.threads < 1) throw Failure{"--threads takes a number from 1 up"};
    } else if (word == "--precision") {
      const std::string name = next();
      static const char* const kNames[] = {"int8", "int16", "float32", "dynamic"};
      const auto found = std::find(std::begin(kNames), std::end(kNames), name);
      if (found == std::end(kNames))
        throw Failure{"--precision takes int8, dynamic, int16 or float32, not '" + name + "'"};
      line.options.precision = static_cast<subbyte_precision>(found - kNames);
    } else if (word.rfind("--", 0) == 0) {
      throw Failure{"'" + word + "' is unknown; " + kUsage};
    } else {
      line.files.push_back(word);
    }
  }
  if (line.files.size() < 3) throw Failure{kUsage};
  return line;
}

subbyte_tensor tensor_of(Npy& array) {
  subbyte_tensor tensor{};
  tensor.dtype = static_cast<subbyte_dtype>(array.dtype);
  if (array.shape.size() > SUBBYTE_MOST_DIMENSIONS)
    throw Failure{"an input has too many dimensions"};
  tensor.rank = static_cast<int32_t>(array.shape.size());
  std::copy(array.shape.begin(), array.shape.end(), tensor.shape);
  tensor.data = array.data.data();
  return tensor;
}

// "out.npy" for one output, "out.NAME.npy" for several.
std::string path_of(const std::string& path, const std::string& name, bool several) {
  if (!several) return path;
  const std::size_t dot = path.rfind(".npy");
  return dot == std::string::npos ? path + "." + name : path.substr(0, dot) + "." + name + ".npy";
}

void measure(subbyte_network* network, const std::vector<subbyte_tensor>& in,
             const std::vector<subbyte_tensor>& out, int threads) {
  std::vector<double> times;
  double total = 0.0;
  while (times.size() < 5 || (total < 1.0 && times.size() < 10000)) {
    const auto start = std::chrono::steady_clock::now();
    check(subbyte_run(network, in.data(), static_cast<int32_t>(in.size()), out.data(),
                      static_cast<int32_t>(out.size()), threads));
    times.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    total += times.back();
  }
  std::sort(times.begin(), times.end());
  std::printf("median %.3f ms, fastest %.3f ms, %zu runs, %d threads\n",
              1e3 * times[times.size() / 2], 1e3 * times.front(), times.size(), threads);
}

void print_step(void*, const subbyte_step* step) {
  std::printf("%9.1f us  %-20s %-8s %s  %s\n", 1e6 * step->seconds, step->op, step->out,
              step->layer, step->how);
}

struct Closer {
  subbyte_network* network = nullptr;
  ~Closer() { subbyte_close(network); }
};

void run(const Line& line) {
  Closer held;
  check(subbyte_open(line.files[0].c_str(), &line.options, &held.network));
  std::vector<Npy> arrays, results;
  std::vector<subbyte_tensor> in;
  for (std::size_t i = 1; i + 1 < line.files.size(); ++i) {
    arrays.push_back(subbyte::runtime::read_npy(line.files[i]));
    in.push_back(tensor_of(arrays.back()));
  }
  for (std::size_t i = 0; i < in.size(); ++i) in[i].data = arrays[i].data.data();
  const int32_t given = static_cast<int32_t>(in.size());
  int32_t count = 0;
  check(subbyte_outputs(held.network, in.data(), given, nullptr, 0, &count));
  std::vector<subbyte_tensor> out(static_cast<std::size_t>(count));
  check(subbyte_outputs(held.network, in.data(), given, out.data(), count, &count));
  for (subbyte_tensor& tensor : out) {
    results.push_back(
        subbyte::runtime::empty_npy(static_cast<subbyte::runtime::Dtype>(tensor.dtype),
                                    {tensor.shape, tensor.shape + tensor.rank}));
    tensor.data = results.back().data.data();
  }
  if (line.profile)
    check(subbyte_profile(held.network, in.data(), given, out.data(), count, line.threads,
                          print_step, nullptr));
  else
    check(subbyte_run(held.network, in.data(), given, out.data(), count, line.threads));
  if (line.bench) measure(held.network, in, out, line.threads);
  for (std::size_t i = 0; i < out.size(); ++i)
    subbyte::runtime::write_npy(path_of(line.files.back(), out[i].name, out.size() > 1),
                                results[i]);
}

}  // namespace

extern "C" int subbyte_command(int32_t count, char** words) {
  try {
    run(line_of(count, words));
    return 0;
  } catch (const Failure& failure) {
    std::fprintf(stderr, "subbyte-run: %s\n", failure.what.c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "subbyte-run: %s\n", error.what());
  }
  return 1;
}
