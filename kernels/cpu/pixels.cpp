// Images to pixels, as kernels/to_uint8.py has it.

namespace {

// round(255 clamp(x / 2 + 1 / 2, 0, 1)), halves to even; NaN becomes 0.
inline void levels(const float* __restrict x, uint8_t* __restrict level, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    float value = x[i] == x[i] ? x[i] * 0.5f + 0.5f : 0.0f;
    value = value < 0.0f ? 0.0f : value;
    value = value > 1.0f ? 1.0f : value;
    level[i] = uint8_t(bits_of<int32_t>(value * 255.0f + 0x1.8p23f));  // no fraction bits: the lowest ones are whole
  }
}

// Planes of RUN levels to pixels of C, which a compiler does with shuffles where it knows C.
template <int64_t C>
inline void interleave(const uint8_t (*__restrict planes)[RUN], uint8_t* __restrict pixel, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    for (int64_t c = 0; c < C; c++) pixel[i * C + c] = planes[c][i];
  }
}

}  // namespace

// x [B, C, P] to pixels [B, P, C].
extern "C" void to_uint8(const void* x, uint8_t* pixels_out, int64_t images, int64_t channels, int64_t pixels,
                         int64_t type) {
  const Images source = Images::of(x, type, channels, pixels);
  for_runs(images, 1, pixels, GRAIN / channels, [&](int64_t image, int64_t, int64_t pixel, int64_t count) {
    float buffer[RUN];
    uint8_t planes[4][RUN];
    uint8_t* to = pixels_out + (image * pixels + pixel) * channels;
    const bool few = channels <= 4;
    for (int64_t c = 0; c < channels; c++) {
      uint8_t* plane = planes[few ? c : 0];
      levels(source.read(image, c, pixel, count, buffer), plane, count);
      for (int64_t i = 0; !few && i < count; i++) to[i * channels + c] = plane[i];
    }
    if (channels == 1) std::memcpy(to, planes[0], count);
    if (channels == 2) interleave<2>(planes, to, count);
    if (channels == 3) interleave<3>(planes, to, count);
    if (channels == 4) interleave<4>(planes, to, count);
  });
}
