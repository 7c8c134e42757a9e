// Vectors of float32, 16 numbers of AVX512 or 8 of AVX2, and what is computed on them. network_library.py puts the
// headers of this folder, in the order that it names, before the kernels: of bfloat16.h and float32.h the one for the
// dtype of images and weights, Element, which is float32 or bfloat16 in all of a library.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

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

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t CHANNELS = 16;  // of a panel at least, whatever the vectors: see weight_packing.py

// 2^x for x up to 127, relative error below 3e-7; NaN stays NaN. Taylor's polynomial of 2^f for |f| <= 1/2.
inline Vec exp2(const Vec& given) {
#ifdef CPU_CAPABILITY_AVX512
  const Vec x = given;
  const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec x = _mm256_max_ps(Vec(-126.0f), given);  // the second operand, if one is NaN
  const Vec whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  const Vec f = x - whole;
  Vec p(1.5403530e-4f);
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) {
    p = at::vec::fmadd(p, f, Vec(c));
  }
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(p, whole);
#else
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return p * Vec(_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
#endif
}

// x / (1 + exp(-x)), relative error below 4e-7 + 8e-8 |x| down to x = -83; from there on it is x times 1e-36, or less.
inline Vec activate(const Vec& x) {
#ifdef CPU_CAPABILITY_AVX512
  const Vec exponent = _mm512_min_ps(Vec(120.0f), x * Vec(-1.44269504f));  // the second operand, if one is NaN
  const Vec d = Vec(1.0f) + exp2(exponent);
  const Vec r = _mm512_rcp14_ps(d);
#else
  const Vec exponent = _mm256_min_ps(Vec(120.0f), x * Vec(-1.44269504f));
  const Vec d = Vec(1.0f) + exp2(exponent);
  const Vec r = _mm256_rcp_ps(d);
#endif
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
