// Noise, as kernels/philox.py has it: vectors of counters become words, and words normals, in registers.

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t VECTOR = 64;  // bytes
#elif defined(__AVX2__)
constexpr int64_t VECTOR = 32;
#else
constexpr int64_t VECTOR = 16;
#endif
using Words = uint64_t __attribute__((vector_size(VECTOR)));  // of 32 bits: upper halves do not count
using Packed = uint32_t __attribute__((vector_size(VECTOR)));
using Signed = int32_t __attribute__((vector_size(VECTOR)));
using Floats = float __attribute__((vector_size(VECTOR)));
constexpr int64_t LANES = VECTOR / int64_t(sizeof(float)), BLOCKS = VECTOR / 16;

// Instructions that compilers do not find by themselves. Each function ends in plain C++, for other processors.

// Words times a word: all 64 bits. Compilers multiply vectors of 32 bits with twice as many shuffles as products.
inline Words wide_product(Words a, uint32_t b) {
#if defined(__AVX512F__)
  return bits_of<Words>(_mm512_mul_epu32(bits_of<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bits_of<Words>(_mm256_mul_epu32(bits_of<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bits_of<Words>(_mm_mul_epu32(bits_of<__m128i>(a), _mm_set1_epi64x(b)));
#elif defined(__aarch64__)
  return bits_of<Words>(vmull_n_u32(vmovn_u64(bits_of<uint64x2_t>(a)), b));
#else
  return (a & 0xFFFFFFFFu) * uint64_t(b);
#endif
}

// Words of two vectors by turns.
inline Packed pack(Words even, Words odd) {
#if defined(__AVX512F__)
  const __m512i swapped = bits_of<__m512i>(odd);
  return bits_of<Packed>(_mm512_mask_shuffle_epi32(bits_of<__m512i>(even), 0xAAAA, swapped, _MM_PERM_CDAB));
#elif defined(__AVX2__)
  const __m256i shifted = _mm256_slli_epi64(bits_of<__m256i>(odd), 32);
  return bits_of<Packed>(_mm256_blend_epi32(bits_of<__m256i>(even), shifted, 0xAA));
#else
  return bits_of<Packed>((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

inline Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return bits_of<Floats>(_mm512_sqrt_ps(bits_of<__m512>(x)));
#elif defined(__AVX2__)
  return bits_of<Floats>(_mm256_sqrt_ps(bits_of<__m256>(x)));
#elif defined(__SSE2__)
  return bits_of<Floats>(_mm_sqrt_ps(bits_of<__m128>(x)));
#elif defined(__aarch64__)
  return bits_of<Floats>(vsqrtq_f32(bits_of<float32x4_t>(x)));
#else
  for (int64_t i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Stores a, b, c and d of lanes (0, 4, 8, 12), of lanes (1, 5, 9, 13), and so on, together: blocks of 16 bytes each.
inline void store_blocks(Floats a, Floats b, Floats c, Floats d, float* to) {
#if defined(__AVX512F__)
  const __m512 p = bits_of<__m512>(a), q = bits_of<__m512>(b), r = bits_of<__m512>(c), s = bits_of<__m512>(d);
  const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(p, q)), high = _mm512_castps_pd(_mm512_unpackhi_ps(p, q));
  const __m512d rest_low = _mm512_castps_pd(_mm512_unpacklo_ps(r, s));
  const __m512d rest_high = _mm512_castps_pd(_mm512_unpackhi_ps(r, s));
  _mm512_storeu_pd(to, _mm512_unpacklo_pd(low, rest_low));
  _mm512_storeu_pd(to + LANES, _mm512_unpackhi_pd(low, rest_low));
  _mm512_storeu_pd(to + 2 * LANES, _mm512_unpacklo_pd(high, rest_high));
  _mm512_storeu_pd(to + 3 * LANES, _mm512_unpackhi_pd(high, rest_high));
#elif defined(__AVX2__)
  const __m256 p = bits_of<__m256>(a), q = bits_of<__m256>(b), r = bits_of<__m256>(c), s = bits_of<__m256>(d);
  const __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(p, q)), high = _mm256_castps_pd(_mm256_unpackhi_ps(p, q));
  const __m256d rest_low = _mm256_castps_pd(_mm256_unpacklo_ps(r, s));
  const __m256d rest_high = _mm256_castps_pd(_mm256_unpackhi_ps(r, s));
  _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(low, rest_low)));
  _mm256_storeu_ps(to + LANES, _mm256_castpd_ps(_mm256_unpackhi_pd(low, rest_low)));
  _mm256_storeu_ps(to + 2 * LANES, _mm256_castpd_ps(_mm256_unpacklo_pd(high, rest_high)));
  _mm256_storeu_ps(to + 3 * LANES, _mm256_castpd_ps(_mm256_unpackhi_pd(high, rest_high)));
#elif defined(__aarch64__)
  vst4q_f32(to, {{bits_of<float32x4_t>(a), bits_of<float32x4_t>(b), bits_of<float32x4_t>(c), bits_of<float32x4_t>(d)}});
#else
  for (int64_t lane = 0; lane < LANES; lane++) {
    float* block = to + lane % 4 * LANES + lane / 4 * 4;
    block[0] = a[lane], block[1] = b[lane], block[2] = c[lane], block[3] = d[lane];
  }
#endif
}

enum Stream : uint32_t { STREAM_STEP = 0, STREAM_FORWARD = 2 };

// What a lane draws its noise from.
struct Key {
  uint64_t seed;
  uint32_t timestep, index, stream;
};

constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;

// Philox-4x32-10 (Salmon et al. 2011, section 3.3) of counters (quad, timestep, index, stream), for many quads. Three
// words of a counter are the same for all, and what the first rounds make of them is computed once.
class Philox {
 public:
  explicit Philox(const Key& key) : k0(uint32_t(key.seed)), k1(uint32_t(key.seed >> 32)) {
    const uint64_t first = uint64_t(key.index) * M1;
    const uint64_t second = uint64_t(uint32_t(first >> 32) ^ key.timestep ^ k0) * M0;
    first_c2 = key.stream ^ k1;
    second_c0 = uint32_t(first) ^ (k0 + W0);
    second_c2 = uint32_t(second >> 32) ^ (k1 + W1);
    third_c2 = uint32_t(second) ^ (k1 + 2 * W1);
  }

  // Four words for each quad; several vectors go through a round together, so that the latency of one's products hides
  // behind the others.
  template <int VECTORS>
  void operator()(const Words (&quads)[VECTORS], Words (&c)[VECTORS][4]) const {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      const Words first = wide_product(quads[v], M0);
      const Words second = wide_product((first >> 32) ^ uint64_t(first_c2), M1);
      const Words p0 = wide_product((second >> 32) ^ uint64_t(second_c0), M0);
      const Words p1 = wide_product(first ^ uint64_t(second_c2), M1);
      c[v][0] = (p1 >> 32) ^ second ^ uint64_t(k0 + 2 * W0);
      c[v][1] = p1;
      c[v][2] = (p0 >> 32) ^ uint64_t(third_c2);
      c[v][3] = p0;
    }
#pragma GCC unroll 7
    for (uint32_t round = 3; round < 10; round++) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        const Words p0 = wide_product(c[v][0], M0), p1 = wide_product(c[v][2], M1);
        c[v][0] = (p1 >> 32) ^ c[v][1] ^ uint64_t(k0 + round * W0);
        c[v][2] = (p0 >> 32) ^ c[v][3] ^ uint64_t(k1 + round * W1);
        c[v][1] = p1;
        c[v][3] = p0;
      }
    }
  }

 private:
  uint32_t k0, k1;                                   // the key
  uint32_t first_c2, second_c0, second_c2, third_c2;  // what the first three rounds add to a counter, with their key
};

// Two independent standard normals from two words: Box-Muller with the polynomials of kernels/philox.py.
inline void box_muller(Packed radius_word, Packed angle_word, Floats& x, Floats& y) {
  const Signed bits = bits_of<Signed>(__builtin_convertvector(radius_word, Floats) + 1.0f) - (32 << 23);
  const Signed exponent = (bits - 0x3F2AAAAB) >> 23;
  const Floats f = bits_of<Floats>(bits - exponent * (1 << 23)) - 1.0f;  // u = (word + 1) / 2**32 = (1 + f) 2**exponent
  Floats p = 0.15177200734615326f * f;
  p = (p - 0.16964882612228394f) * f;
  p = (p + 0.16462457180023193f) * f;
  p = (p - 0.1982250213623047f) * f;
  p = (p + 0.25004664063453674f) * f;
  p = (p - 0.33336564898490906f) * f;
  p = (p + 0.5f) * f;
  p = (p - 1.0f) * f;
  const Floats radius = square_root(__builtin_convertvector(exponent, Floats) * -0.69314718055994531f + p);

  // The angle is pi / 4 + b.
  const Floats b = __builtin_convertvector(bits_of<Signed>(angle_word), Floats) * 0x1.921fb54442d18p-32f;
  const Floats b2 = b * b;
  const Floats sine =
      (((-0.0001951526792254299f * b2 + 0.00833216030150652f) * b2 - 0.16666655242443085f) * b2 + 1.0f) * b;
  const Floats cosine = ((-0.0013648702297359705f * b2 + 0.04166107252240181f) * b2 - 0.5f) * b2 + 1.0f;
  x = bits_of<Floats>(bits_of<Packed>((cosine - sine) * radius) ^ (angle_word << 31));
  y = bits_of<Floats>(bits_of<Packed>((cosine + sine) * radius) ^ (angle_word << 30 & 0x80000000u));
}

// The noise of a run.
class Noise {
 public:
  // The normals of `count` elements of an image, at most RUN, from `element` on. Meanwhile memory fetches `next`, a few
  // lines at a time: all at once they would hold up what is computed.
  const float* draw(const Key& key, int64_t element, int64_t count, std::initializer_list<Behind> next) {
    const Philox philox(key);
    const Words order = bits_of<Words>(ORDER);
    const int64_t skipped = element % 4, quads = (skipped + count + 3) / 4;
    for (int64_t i = 0; i < quads; i += TOGETHER * LANES) {  // vectors and nothing else
      for (const Behind& run : next) run.fetch(4 * i, 4 * TOGETHER * LANES);
      Words counters[2 * TOGETHER], words[2 * TOGETHER][4];
      for (int64_t v = 0; v < 2 * TOGETHER; v++) {
        counters[v] = order + uint64_t(element / 4 + i + v / 2 * LANES + v % 2 * BLOCKS);
      }
      philox(counters, words);
      for (int64_t v = 0; v < TOGETHER; v++) {
        const Words *even = words[2 * v], *odd = words[2 * v + 1];
        Floats a, b, c, d;
        box_muller(pack(even[0], odd[0]), pack(even[1], odd[1]), a, b);
        box_muller(pack(even[2], odd[2]), pack(even[3], odd[3]), c, d);
        store_blocks(a, b, c, d, values + 4 * (i + v * LANES));
      }
    }
    return values + skipped;
  }

 private:
  static constexpr int64_t TOGETHER = 2;                        // vectors of quads that are made at once
  static constexpr int64_t QUADS = RUN / 4 + TOGETHER * LANES;  // a run may start and end inside a quad

  // Of the quads whose words come to lie in even lanes, so that `store_blocks` has them in their order.
  static constexpr auto ORDER = [] {
    std::array<uint64_t, VECTOR / 8> quads{};
    for (int64_t w = 0; w < VECTOR / 8; w++) quads[w] = uint64_t(w % 2 * 2 * BLOCKS + w / 2);
    return quads;
  }();

  alignas(64) float values[4 * QUADS];
};

}  // namespace
