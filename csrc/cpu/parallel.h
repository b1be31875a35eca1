// PyTorch's own thread pool, and the standard headers of all kernels: they must not be compiled for a
// particular instruction set, or their inline functions could end up in code for every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>
#include <immintrin.h>

#include "kernels.h"
