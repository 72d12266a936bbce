// What fragments of README.md on Eigen may name.
#pragma once

#include <fastv/eigen.hpp>

#include "context.hpp"
