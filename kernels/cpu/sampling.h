// What the sampling kernels share: element types, and how a batch is cut into runs; noise is in noise.h. Plain C++ that
// compilers vectorise for any instruction set. Every product and sum is rounded on its own (the library is compiled
// without contraction and with no other licence), so that all instruction sets give the bits of the PyTorch reference.

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

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

// What lies behind a run: the next one, which comes into a cache while the noise of this one is computed.
struct Behind {
  const char* start = nullptr;
  int64_t size = 0;  // of an element, in bytes

  // `count` elements from `first` on; what lies beyond a tensor does no harm.
  void fetch(int64_t first, int64_t count) const {
    if (start == nullptr) return;
    for (int64_t byte = first * size; byte < (first + count) * size; byte += 64) __builtin_prefetch(start + byte);
  }
};

// Of a run of `count` elements of type `type` from `start` on; nothing where there is no tensor.
inline Behind behind(const void* tensor, int64_t type, int64_t start, int64_t count) {
  const int64_t size = type == FLOAT32 ? 4 : 2;
  const char* first = static_cast<const char*>(tensor);
  return first == nullptr ? Behind{} : Behind{first + (start + count) * size, size};
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

  // What is read after such a run. Where the channels of a pixel lie together, it has been read with the first.
  Behind after(int64_t image, int64_t at_channel, int64_t at_pixel, int64_t count) const {
    return pixel == 1 ? behind(data, type, image * lane + at_channel * channel + at_pixel, count) : Behind{};
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

}  // namespace
