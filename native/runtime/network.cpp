#include "network.hpp"

#include <chrono>
#include <cstring>

#include "bytes.hpp"
#include "error.hpp"

namespace subbyte::runtime {
namespace {

constexpr std::size_t kPlans = 8;
constexpr std::size_t kArenas = 16;

// Inputs where the steps can read them: those at odd places are copied.
class Inputs {
 public:
  explicit Inputs(const std::vector<Given>& given) {
    for (const Given& input : given) {
      const std::size_t bytes =
          static_cast<std::size_t>(count_of(input.shape)) * size_of(input.dtype);
      if (!input.data && bytes) throw Error("an input has no data");
      const std::uint8_t* at = input.data;
      if (!at || reinterpret_cast<std::uintptr_t>(at) % size_of(input.dtype)) {
        copies_.emplace_back(bytes);
        if (bytes) std::memcpy(copies_.back().data(), at, bytes);
        at = copies_.back().data();
      }
      places.push_back(at);
    }
  }
  std::vector<const std::uint8_t*> places;

 private:
  std::vector<Buffer> copies_;
};

}  // namespace

Network::Network(File file, const Settings& settings)
    : file_(std::move(file)),
      program_(read_program(file_.manifest())),
      weights_(file_),
      settings_(settings) {}

std::shared_ptr<const Plan> Network::plan(const std::vector<Given>& inputs) {
  if (inputs.size() != program_.inputs.size())
    throw Error("the network takes " + std::to_string(program_.inputs.size()) + " inputs, not " +
                std::to_string(inputs.size()));
  std::vector<Shape> shapes;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Input& wanted = program_.inputs[i];
    bool fits = inputs[i].shape.size() == wanted.shape.size();
    for (std::size_t d = 0; fits && d < wanted.shape.size(); ++d)
      fits = wanted.shape[d] < 0 ? inputs[i].shape[d] >= 0 : inputs[i].shape[d] == wanted.shape[d];
    if (!fits || inputs[i].dtype != wanted.dtype)
      throw Error("input '" + shown(wanted.name) + "' is " + name_of(inputs[i].dtype) + " " +
                  text_of(inputs[i].shape) + "; the network takes " + name_of(wanted.dtype) + " " +
                  text_of(wanted.shape) + " (-1: any size)");
    shapes.push_back(inputs[i].shape);
  }
  const std::lock_guard<std::mutex> lock(guard_);
  for (auto kept = kept_.begin(); kept != kept_.end(); ++kept)
    if (kept->shapes == shapes) {
      kept_.splice(kept_.begin(), kept_, kept);
      return kept_.front().plan;
    }
  auto made = std::make_shared<const Plan>(program_, file_, weights_, settings_, shapes);
  kept_.push_front({shapes, made, {}});
  if (kept_.size() > kPlans) kept_.pop_back();
  return made;
}

Buffer Network::take_arena(const Plan& plan) {
  {
    const std::lock_guard<std::mutex> lock(guard_);
    for (Kept& kept : kept_)
      if (kept.plan.get() == &plan && !kept.arenas.empty()) {
        Buffer arena = std::move(kept.arenas.back());
        kept.arenas.pop_back();
        return arena;
      }
  }
  return Buffer(plan.arena());
}

void Network::give_arena(const Plan& plan, Buffer arena) {
  const std::lock_guard<std::mutex> lock(guard_);
  for (Kept& kept : kept_)
    if (kept.plan.get() == &plan && kept.arenas.size() < kArenas)
      kept.arenas.push_back(std::move(arena));
}

void Network::run(const std::vector<Given>& inputs, const std::vector<Given>& outputs, int threads,
                  const Seen& seen) {
  if (threads < 1) throw Error("threads must be 1 or more, not " + std::to_string(threads));
  const std::shared_ptr<const Plan> own = plan(inputs);
  const std::vector<Output>& results = own->outputs();
  if (outputs.size() != results.size())
    throw Error("the network has " + std::to_string(results.size()) + " outputs, not " +
                std::to_string(outputs.size()));
  for (std::size_t i = 0; i < results.size(); ++i) {
    const Value& value = results[i].value;
    if (outputs[i].dtype != value.dtype || outputs[i].shape != value.shape ||
        (!outputs[i].data && value.count()))
      throw Error("output '" + results[i].name + "' is " + name_of(value.dtype) + " " +
                  text_of(value.shape) + "; the room for it is not");
  }
  const Inputs given(inputs);
  Buffer arena = take_arena(*own);
  const std::vector<std::uint8_t*> places = own->places(arena.data(), given.places);
  const Run now(places.data(), threads);
  for (const Step& step : own->steps()) {
    if (!seen) {
      step.work(now);
      continue;
    }
    const auto start = std::chrono::steady_clock::now();
    step.work(now);
    seen(step, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  for (std::size_t i = 0; i < results.size(); ++i) {
    const Value& value = results[i].value;
    const std::size_t bytes = static_cast<std::size_t>(value.count()) * size_of(value.dtype);
    if (bytes) std::memcpy(outputs[i].data, places[value.id], bytes);
  }
  give_arena(*own, std::move(arena));
}

void Network::watch(const std::vector<Given>& inputs, int threads, const Shown& shown) {
  if (threads < 1) throw Error("threads must be 1 or more, not " + std::to_string(threads));
  const std::shared_ptr<const Plan> own = plan(inputs);
  const Inputs given(inputs);
  Buffer arena = take_arena(*own);
  const std::vector<std::uint8_t*> places = own->places(arena.data(), given.places);
  const Run now(places.data(), threads);
  std::size_t done = 0;
  for (const Made& made : own->made()) {
    for (; done < made.steps; ++done) own->steps()[done].work(now);
    if (made.result.kind == Arg::Kind::kTensor) {
      Value value = made.result.value;
      value.shape = shape_in_memory(value);
      shown(made.name, value, places[value.id]);
    }
    for (std::size_t i = 0; i < made.result.list.size(); ++i)
      shown(made.name + "." + std::to_string(i), made.result.list[i].value,
            places[made.result.list[i].value.id]);
  }
  give_arena(*own, std::move(arena));
}

}  // namespace subbyte::runtime
