// Which tier runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace subbyte {

// The tiers that are compiled in and that this CPU has, best first.
const std::vector<const Kernels*>& tiers();

// The tier in use: the best one, or the one that the environment variable SUBBYTE_ISA names.
// Throws std::invalid_argument if that one is not among `tiers`.
const Kernels& kernels();

// The tier of this name. Throws std::invalid_argument if it is not among `tiers`.
const Kernels& tier_of(const std::string& name);

// Use the tier of this name from now on, likewise.
void select_tier(const std::string& name);

}  // namespace subbyte
