// An open file that runs: plans are kept for the last sizes of inputs, memory for the next runs.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "plan.hpp"

namespace subbyte::runtime {

struct Given {  // an input or output of a run
  Dtype dtype;
  Shape shape;
  std::uint8_t* data;
};

class Network {
 public:
  Network(File file, const Settings& settings);
  Network(const Network&) = delete;

  const std::vector<Input>& inputs() const { return program_.inputs; }
  // For inputs of these types and shapes; lives as long as the network, or until forgotten: hold
  // it.
  std::shared_ptr<const Plan> plan(const std::vector<Given>& inputs);

  using Seen = std::function<void(const Step&, double seconds)>;
  using Shown = std::function<void(const std::string& name, const Value&, const std::uint8_t*)>;
  // Throws Error for values that do not fit. `seen` and `shown` may be empty.
  void run(const std::vector<Given>& inputs, const std::vector<Given>& outputs, int threads,
           const Seen& seen = {});
  void watch(const std::vector<Given>& inputs, int threads, const Shown& shown);

  // The same text, for as long as the network lives.
  const char* keep_name(const std::string& name) {
    const std::lock_guard<std::mutex> lock(guard_);
    return names_.insert(name).first->c_str();
  }

 private:
  struct Kept {
    std::vector<Shape> shapes;
    std::shared_ptr<const Plan> plan;
    std::vector<Buffer> arenas;
  };
  Buffer take_arena(const Plan& plan);
  void give_arena(const Plan& plan, Buffer arena);

  File file_;
  Program program_;
  Weights weights_;
  const Settings settings_;
  std::mutex guard_;
  std::set<std::string> names_;
  std::list<Kept> kept_;  // the last used first
};

}  // namespace subbyte::runtime
