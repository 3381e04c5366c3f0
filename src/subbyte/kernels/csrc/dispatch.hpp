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

// Use the tier of this name from now on.
void select_tier(const std::string& name);

}  // namespace subbyte
