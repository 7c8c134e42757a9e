// What depends on the dtype of images and weights, for bfloat16: rounding, and products of rows with weights in panels
// [C / 2, width, 2], pairs of input channels together, which is how processors multiply bfloat16, by oneDNN's brgemm.

#include <ATen/native/CPUBlas.h>

namespace {

using Element = at::BFloat16;

inline Vec load(const Element* from) {
  Vec value;
  at::vec::load_fp32_from_bf16(from, value);
  return value;
}

// Rounds to nearest, ties to even, in one instruction.
inline __m256i rounded(const Vec& value) { return (__m256i)_mm512_cvtneps_pbh(value); }

inline void store(Element* to, const Vec& value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(value));
}

// A matrix of weights from `inputs` to `width` channels.
struct Panel {
  const Element* weights;
  int64_t inputs, width;

  // products [count, width] = rows [count, depth] x the weights of the input channels from `from`, or added to them;
  // `rows` lie `stride` apart.
  void multiply(const Element* rows, int64_t stride, int64_t count, int64_t from, int64_t depth, bool add,
                float* products) const {
    at::native::cpublas::brgemm(count, width, depth, stride, width, width, add, rows, weights + from * width, products);
  }
};

// Called by a thread after its last product.
inline void release() { at::native::cpublas::brgemm_release(); }

// Keys become a panel from D channels to `places` keys: 16 rows of 32 channels from (place, channel).
inline void pack_keys(const float* rows, int64_t stride, Element* keys, int64_t, int64_t places, int64_t place,
                      int64_t channel) {
  alignas(64) uint32_t pairs[LANES][LANES];
  for (int64_t r = 0; r < LANES; r++) {
    const Vec low = Vec::loadu(rows + r * stride), high = Vec::loadu(rows + r * stride + LANES);
    _mm512_store_si512(pairs[r], (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  at::vec::transpose_mxn<float, 16, 16>(reinterpret_cast<float*>(pairs), LANES,
                                        reinterpret_cast<float*>(keys + channel * places + 2 * place), places);
}

// Values become a panel from `places` of them to D channels: 2 rows of 16 channels from (place, channel), of which
// `count` are there; zeros for the others.
inline void pack_values(const float* rows, int64_t stride, int64_t count, Element* values, int64_t size, int64_t,
                        int64_t place, int64_t channel) {
  const auto row = [&](int64_t r) {
    return r < count ? _mm512_cvtepu16_epi32(rounded(Vec::loadu(rows + r * stride))) : _mm512_setzero_si512();
  };
  _mm512_storeu_si512(values + place * size + 2 * channel, _mm512_or_si512(row(0), _mm512_slli_epi32(row(1), 16)));
}

}  // namespace
