// Vectors of 16 float32, from and to memory in bfloat16, and what is computed on them. library.py puts the headers
// of this folder, in the order that it names, before the kernels.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();

inline Vec load(const BFloat16* from) {
  Vec value;
  at::vec::load_fp32_from_bf16(from, value);
  return value;
}

// Rounds to nearest, ties to even, in one instruction.
inline __m256i rounded(const Vec& value) { return (__m256i)_mm512_cvtneps_pbh(value); }

inline void store(BFloat16* to, const Vec& value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(value));
}

// 2^x for x up to 127, relative error below 3e-7; NaN stays NaN. Taylor's polynomial of 2^f for |f| <= 1/2.
inline Vec exp2(const Vec& x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = x - Vec(whole);
  Vec p(1.5403530e-4f);
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) {
    p = at::vec::fmadd(p, f, Vec(c));
  }
  return _mm512_scalef_ps(p, whole);
}

// x / (1 + exp(-x)), relative error below 1e-6 down to x = -83; from there on it is x times 1e-36, or less.
inline Vec activate(const Vec& x) {
  const Vec exponent = _mm512_min_ps(Vec(120.0f), x * Vec(-1.44269504f));  // the second operand, if one is NaN
  const Vec d = Vec(1.0f) + exp2(exponent);
  const Vec r = _mm512_rcp14_ps(d);
  return x * (r * at::vec::fnmadd(d, r, Vec(2.0f)));
}

// Memory of one thread, which only grows, on a boundary of cache lines.
template <class T>
class Buffer {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

// Runs what may throw: null, or the message, which lasts until the thread's next one. No exception may reach Python.
template <class Body>
const char* guarded(const Body& body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
