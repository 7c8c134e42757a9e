// Vectors of float32 from and to memory in bfloat16; cpu_library.py puts this before every kernel.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <string>
#include <vector>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();

inline Vec load(const BFloat16* from) {
  Vec value;
  at::vec::load_fp32_from_bf16(from, value);
  return value;
}

inline void store(BFloat16* to, const Vec& value) {
  at::vec::convert_float_bfloat16(value, value).store(to, LANES);
}

}  // namespace
