// What the sampling kernels share: element types, noise, and how a batch is cut into runs. Plain C++ that compilers
// vectorise for any instruction set. Every product and sum is rounded on its own (the library is compiled without
// contraction and with no other licence), so that all instruction sets give the bits of the PyTorch reference.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int64_t RUN = 1024;       // elements that are worked on at once: some such buffers fit into the first cache
constexpr int64_t TILE = 16 << 10;  // elements of the pixels between which channels_last images are reordered
constexpr float NOTHING = std::numeric_limits<float>::quiet_NaN();

template <class To, class From>
inline To bits_of(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// Elements of tensors. The codes are those of `sampling_library.py`.

enum Type : int64_t { FLOAT32, FLOAT16, BFLOAT16 };

struct Half {
  uint16_t bits;
};

struct Brain {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(Brain value) { return bits_of<float>(uint32_t(value.bits) << 16); }

// Exact. A normal number's exponent is rebiased by a product, a subnormal one becomes normal by a difference.
inline float widen(Half value) {
  const uint32_t word = uint32_t(value.bits) << 16, sign = word & 0x80000000u, rest = word + word;
  const float normal = bits_of<float>((rest >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = bits_of<float>((rest >> 17) | (126u << 23)) - 0.5f;
  return bits_of<float>(sign | bits_of<uint32_t>(rest < (1u << 27) ? subnormal : normal));
}

inline void narrow(float value, float& to) { to = value; }

// To nearest, ties to even.
inline void narrow(float value, Brain& to) {
  const uint32_t word = bits_of<uint32_t>(value);
  const uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
  to.bits = uint16_t(value == value ? rounded : 0x7FC0u);
}

// To nearest, ties to even: adding a power of two of the right exponent rounds the mantissa where it has to end.
inline void narrow(float value, Half& to) {
  const uint32_t word = bits_of<uint32_t>(value), sign = word & 0x80000000u, twice = word + word;
  const float bounded = (bits_of<float>(word & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;  // too large: infinite
  const uint32_t exponent = std::max(twice & 0xFF000000u, 0x71000000u);
  const uint32_t sum = bits_of<uint32_t>(bits_of<float>((exponent >> 1) + 0x07800000u) + bounded);
  const uint32_t rounded = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  to.bits = uint16_t((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : rounded));
}

template <class T>
inline void narrow_run(const float* __restrict from, T* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to[i]);
}

// Where a run of results is computed: in its place, or in `buffer` if it is to be narrowed.
inline float* place(void* to, int64_t type, int64_t start, float* buffer) {
  return type == FLOAT32 ? static_cast<float*>(to) + start : buffer;
}

inline void write_run(const float* from, void* to, int64_t type, int64_t start, int64_t count) {
  if (type == FLOAT32 && from != static_cast<float*>(to) + start) {
    std::memcpy(static_cast<float*>(to) + start, from, count * sizeof(float));
  }
  if (type == FLOAT16) narrow_run(from, static_cast<Half*>(to) + start, count);
  if (type == BFLOAT16) narrow_run(from, static_cast<Brain*>(to) + start, count);
}

// A batch of images [B, C, P] as it lies in memory, P pixels an image; strides in elements.
struct Images {
  const void* data = nullptr;
  int64_t type = FLOAT32, lane = 0, channel = 0, pixel = 0;

  // `form` is the type, plus 4 where the channels of a pixel lie together.
  static Images of(const void* data, int64_t form, int64_t channels, int64_t pixels) {
    const bool last = form >= 4;
    return {data, form % 4, channels * pixels, last ? 1 : pixels, last ? channels : 1};
  }

  // `count` elements of a channel from a pixel on, as float32: where they lie, or in `buffer`.
  const float* read(int64_t image, int64_t at_channel, int64_t at_pixel, int64_t count, float* buffer) const {
    const int64_t start = image * lane + at_channel * channel + at_pixel * pixel;
    if (type == FLOAT16) return widened(static_cast<const Half*>(data) + start, count, buffer);
    if (type == BFLOAT16) return widened(static_cast<const Brain*>(data) + start, count, buffer);
    const float* from = static_cast<const float*>(data) + start;
    return pixel == 1 ? from : widened(from, count, buffer);
  }

 private:
  template <class T>
  const float* widened(const T* from, int64_t count, float* buffer) const {
    if (pixel == 1) return widened_by<1>(from, count, buffer);
    if (pixel == 3) return widened_by<3>(from, count, buffer);
    if (pixel == 4) return widened_by<4>(from, count, buffer);
    if (pixel == 6) return widened_by<6>(from, count, buffer);
    return widened_by<0>(from, count, buffer);
  }

  // STRIDE is `pixel`, for which compilers then know shuffles, or 0.
  template <int64_t STRIDE, class T>
  const float* widened_by(const T* __restrict from, int64_t count, float* __restrict buffer) const {
    const int64_t stride = STRIDE != 0 ? STRIDE : pixel;
    for (int64_t i = 0; i < count; i++) buffer[i] = widen(from[i * stride]);
    return buffer;
  }
};

// Calls body(image, channel, pixel, count) for runs that cover images [C, P] of a batch, in parallel where there are
// more than `grain` elements for each thread. With C > 1 the channels of a few pixels follow each other, so that
// memory in which they lie together is read from a cache.
template <class Body>
void for_runs(int64_t images, int64_t channels, int64_t pixels, int64_t grain, const Body& body) {
  const int64_t run = std::clamp(TILE / channels / 16 * 16, int64_t(16), RUN);
  const int64_t tiles = (pixels + run - 1) / run, elements = std::min(run, pixels) * channels;
  at::parallel_for(0, images * tiles, std::max(int64_t(1), grain / elements), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t pixel = item % tiles * run, count = std::min(run, pixels - pixel);
      for (int64_t channel = 0; channel < channels; channel++) body(item / tiles, channel, pixel, count);
    }
  });
}

constexpr int64_t GRAIN = 32 << 10;        // of passes that memory bounds: what PyTorch takes for its own
constexpr int64_t GRAIN_OF_NOISE = 8 << 10;  // of passes that make noise

// Noise, as kernels/philox.py has it.

// Vectors of counters, and how many of them go through the rounds together, so that the latency of one's products hides
// behind the others. Four are sixteen registers, which AVX512 has twice.
#if defined(__AVX512F__)
using Words = uint64_t __attribute__((vector_size(64)));
constexpr int64_t TOGETHER = 4;
#elif defined(__AVX2__)
using Words = uint64_t __attribute__((vector_size(32)));
constexpr int64_t TOGETHER = 2;
#else
using Words = uint64_t __attribute__((vector_size(16)));
constexpr int64_t TOGETHER = 2;
#endif
constexpr int64_t WORDS = sizeof(Words) / sizeof(uint64_t);
constexpr int64_t WHOLE = std::max<int64_t>(16, TOGETHER * WORDS);  // quads made at once, by Philox and by Box-Muller
constexpr int64_t QUADS = RUN / 4 + WHOLE;  // of a run that starts and ends inside a quad, up to a multiple of WHOLE
static_assert(RUN / 4 % WHOLE == 0 && WHOLE % (TOGETHER * WORDS) == 0);

// 32-bit words in lanes of 64 bits, whose upper halves do not count, times a word: all 64 bits.
// Compilers multiply vectors of 32-bit words with twice as many shuffles as products; this needs none.
inline Words wide_product(Words a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#elif defined(__ARM_NEON)
  return reinterpret_cast<Words>(vmull_n_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), b));
#else
  return (a & 0xFFFFFFFFu) * uint64_t(b);
#endif
}

enum Stream : uint32_t { STREAM_STEP = 0, STREAM_FORWARD = 2 };

// What a lane draws its noise from.
struct Key {
  uint64_t seed;
  uint32_t timestep, index, stream;
};

// Philox-4x32-10 (Salmon et al. 2011, section 3.3): four words for each of `quads` counters, in the lower halves.
inline void philox(const Key& key, uint32_t first, int64_t quads, uint64_t (*words)[QUADS]) {
  for (int64_t i = 0; i < quads; i += WORDS * TOGETHER) {
    Words c0[TOGETHER], c1[TOGETHER], c2[TOGETHER], c3[TOGETHER];
    for (int v = 0; v < TOGETHER; v++) {
      for (int64_t w = 0; w < WORDS; w++) c0[v][w] = first + uint64_t(i + WORDS * v + w);
      c1[v] = Words{} + key.timestep;
      c2[v] = Words{} + key.index;
      c3[v] = Words{} + key.stream;
    }
    uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      for (int v = 0; v < TOGETHER; v++) {
        const Words p0 = wide_product(c0[v], 0xD2511F53u), p1 = wide_product(c2[v], 0xCD9E8D57u);
        c0[v] = (p1 >> 32) ^ c1[v] ^ uint64_t(k0);
        c2[v] = (p0 >> 32) ^ c3[v] ^ uint64_t(k1);
        c1[v] = p1;
        c3[v] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int v = 0; v < TOGETHER; v++) {
      std::memcpy(words[0] + i + WORDS * v, &c0[v], sizeof(Words));
      std::memcpy(words[1] + i + WORDS * v, &c1[v], sizeof(Words));
      std::memcpy(words[2] + i + WORDS * v, &c2[v], sizeof(Words));
      std::memcpy(words[3] + i + WORDS * v, &c3[v], sizeof(Words));
    }
  }
}

// Two independent standard normals from two words: Box-Muller with the polynomials of kernels/philox.py.
inline void box_muller(uint32_t radius_word, uint32_t angle_word, float& x, float& y) {
  const float word = float(int32_t(radius_word >> 16)) * 65536.0f + float(int32_t(radius_word & 0xFFFFu));
  const int32_t bits = bits_of<int32_t>(word + 1.0f) - (32 << 23);  // u = (word + 1) / 2**32
  const int32_t exponent = (bits - 0x3F2AAAAB) >> 23;
  const float f = bits_of<float>(bits - exponent * (1 << 23)) - 1.0f;  // u = (1 + f) 2**exponent
  float p = 0.15177200734615326f * f;
  p = (p - 0.16964882612228394f) * f;
  p = (p + 0.16462457180023193f) * f;
  p = (p - 0.1982250213623047f) * f;
  p = (p + 0.25004664063453674f) * f;
  p = (p - 0.33336564898490906f) * f;
  p = (p + 0.5f) * f;
  p = (p - 1.0f) * f;
  const float radius = std::sqrt(float(exponent) * -0.69314718055994531f + p);

  const float b = float(int32_t(angle_word)) * 0x1.921fb54442d18p-32f;  // pi / 4 / 2**31
  const float b2 = b * b;
  const float sine = (((-0.0001951526792254299f * b2 + 0.00833216030150652f) * b2 - 0.16666655242443085f) * b2 + 1.0f) * b;
  const float cosine = ((-0.0013648702297359705f * b2 + 0.04166107252240181f) * b2 - 0.5f) * b2 + 1.0f;
  x = bits_of<float>(bits_of<uint32_t>((cosine - sine) * radius) ^ (angle_word << 31));
  y = bits_of<float>(bits_of<uint32_t>((cosine + sine) * radius) ^ (angle_word << 30 & 0x80000000u));
}

// Room for the noise of a run.
struct Noise {
  alignas(64) uint64_t words[4][QUADS];
  alignas(64) float values[4 * QUADS];

  // The normals of `count` elements of an image, at most RUN, from `element` on.
  const float* draw(const Key& key, int64_t element, int64_t count) {
    const int64_t skipped = element % 4, quads = (skipped + count + 3) / 4;
    const int64_t whole = (quads + WHOLE - 1) / WHOLE * WHOLE;  // vectors and nothing else
    philox(key, uint32_t(element / 4), whole, words);
    for (int64_t i = 0; i < whole; i++) {
      float a, b, c, d;
      box_muller(uint32_t(words[0][i]), uint32_t(words[1][i]), a, b);
      box_muller(uint32_t(words[2][i]), uint32_t(words[3][i]), c, d);
      values[4 * i] = a;
      values[4 * i + 1] = b;
      values[4 * i + 2] = c;
      values[4 * i + 3] = d;
    }
    return values + skipped;
  }
};

}  // namespace
