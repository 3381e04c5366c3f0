// subbyte.h: nothing that is thrown gets past here.
#include <algorithm>
#include <exception>
#include <new>

#include "error.hpp"
#include "network.hpp"
#include "subbyte.h"

struct subbyte_network {
  subbyte::runtime::Network own;
};

namespace {

using namespace subbyte::runtime;

thread_local std::string last_error;

int failed(const std::string& what) noexcept {
  try {
    last_error = what;
    std::replace(last_error.begin(), last_error.end(), '\n', ' ');
  } catch (...) {
    last_error.clear();
  }
  return -1;
}

template <class F>
int guarded(F&& f) noexcept {
  try {
    last_error.clear();
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return failed("there is not enough memory");
  } catch (const std::exception& error) {
    return failed(error.what());
  } catch (...) {
    return failed("something unknown was thrown");
  }
}

void require_that(bool holds, const char* what) {
  if (!holds) throw Error(what);
}

std::vector<Given> given_of(const subbyte_tensor* tensors, std::int32_t count) {
  require_that(count >= 0 && count < 1 << 20 && (tensors || !count), "the tensors are missing");
  std::vector<Given> found;
  for (std::int32_t i = 0; i < count; ++i) {
    const subbyte_tensor& t = tensors[i];
    require_that(t.rank >= 0 && t.rank <= SUBBYTE_MOST_DIMENSIONS, "a rank is not 0 to 16");
    require_that(t.dtype >= 0 && t.dtype <= SUBBYTE_BOOL, "a dtype is unknown");
    found.push_back({static_cast<Dtype>(t.dtype), Shape(t.shape, t.shape + t.rank),
                     static_cast<std::uint8_t*>(t.data)});
    count_of(found.back().shape);
  }
  return found;
}

void fill(subbyte_tensor& tensor, Dtype dtype, const Shape& shape, const char* name) {
  tensor = subbyte_tensor{};
  tensor.dtype = static_cast<subbyte_dtype>(dtype);
  tensor.rank = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), tensor.shape);
  tensor.name = name;
}

Settings settings_of(const subbyte_options* options) {
  Settings settings;
  if (!options) return settings;
  require_that(options->precision >= 0 && options->precision <= SUBBYTE_PRECISION_DYNAMIC,
               "the precision is unknown");
  settings.chain = options->precision != SUBBYTE_PRECISION_DYNAMIC;
  settings.precision = settings.chain ? static_cast<subbyte::Precision>(options->precision)
                                      : subbyte::Precision::kInt8;
  if (options->memory) settings.memory = static_cast<std::size_t>(options->memory);
  return settings;
}

}  // namespace

extern "C" {

const char* subbyte_version(void) { return "0.1.0"; }

const char* subbyte_last_error(void) { return last_error.c_str(); }

int subbyte_open(const char* path, const subbyte_options* options, subbyte_network** network) {
  return guarded([&] {
    require_that(path && network, "a path or the place for the network is missing");
    *network = nullptr;
    const Settings settings = settings_of(options);
    try {
      File file = File::open(path, !options || options->verify);
      *network = new subbyte_network{{std::move(file), settings}};
    } catch (const Error& error) {
      throw Error(shown(path) + ": " + error.what());
    }
  });
}

int subbyte_open_memory(const void* data, size_t bytes, const subbyte_options* options,
                        subbyte_network** network) {
  return guarded([&] {
    require_that((data || !bytes) && network, "the data or the place for the network is missing");
    *network = nullptr;
    const Settings settings = settings_of(options);
    File file =
        File::of_memory(static_cast<const std::uint8_t*>(data), bytes, !options || options->verify);
    *network = new subbyte_network{{std::move(file), settings}};
  });
}

void subbyte_close(subbyte_network* network) { delete network; }

int32_t subbyte_input_count(const subbyte_network* network) {
  return network ? static_cast<int32_t>(network->own.inputs().size()) : 0;
}

int subbyte_input(const subbyte_network* network, int32_t index, subbyte_tensor* input) {
  return guarded([&] {
    require_that(network && input, "the network or the place for the input is missing");
    require_that(index >= 0 && index < subbyte_input_count(network), "there is no such input");
    const Input& own = network->own.inputs()[static_cast<std::size_t>(index)];
    fill(*input, own.dtype, own.shape, own.name.c_str());
  });
}

int subbyte_outputs(subbyte_network* network, const subbyte_tensor* inputs, int32_t input_count,
                    subbyte_tensor* outputs, int32_t most, int32_t* count) {
  return guarded([&] {
    require_that(network && count, "the network or the place for the count is missing");
    const auto plan = network->own.plan(given_of(inputs, input_count));
    *count = static_cast<int32_t>(plan->outputs().size());
    for (int32_t i = 0; outputs && i < std::min(most, *count); ++i) {
      const Output& own = plan->outputs()[static_cast<std::size_t>(i)];
      fill(outputs[i], own.value.dtype, own.value.shape, network->own.keep_name(own.name));
    }
  });
}

int subbyte_run(subbyte_network* network, const subbyte_tensor* inputs, int32_t input_count,
                const subbyte_tensor* outputs, int32_t output_count, int32_t threads) {
  return subbyte_profile(network, inputs, input_count, outputs, output_count, threads, nullptr,
                         nullptr);
}

int subbyte_profile(subbyte_network* network, const subbyte_tensor* inputs, int32_t input_count,
                    const subbyte_tensor* outputs, int32_t output_count, int32_t threads,
                    void (*seen)(void* context, const subbyte_step* step), void* context) {
  return guarded([&] {
    require_that(network, "the network is missing");
    Network::Seen call;
    if (seen)
      call = [&](const Step& step, double seconds) {
        const subbyte_step shown{step.op.c_str(), step.out.c_str(), step.layer.c_str(),
                                 step.how.c_str(), seconds};
        seen(context, &shown);
      };
    network->own.run(given_of(inputs, input_count), given_of(outputs, output_count), threads, call);
  });
}

int subbyte_watch(subbyte_network* network, const subbyte_tensor* inputs, int32_t input_count,
                  int32_t threads, void (*seen)(void* context, const subbyte_tensor* value),
                  void* context) {
  return guarded([&] {
    require_that(network && seen, "the network or the call is missing");
    network->own.watch(given_of(inputs, input_count), threads,
                       [&](const std::string& name, const Value& value, const std::uint8_t* data) {
                         subbyte_tensor tensor;
                         fill(tensor, value.dtype, value.shape, name.c_str());
                         tensor.data = const_cast<std::uint8_t*>(data);
                         seen(context, &tensor);
                       });
  });
}

}  // extern "C"
