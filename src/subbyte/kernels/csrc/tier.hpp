// What every tier's file includes before it switches its instructions on: nothing of the standard
// library may be compiled for them, or another tier could be linked to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.hpp"
