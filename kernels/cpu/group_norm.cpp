// y = norm(x), activated or not, [B, P, C]. What went wrong, or null.
extern "C" const char* group_norm_silu(
    const Element* x, const Element* weight, const Element* bias, const Element* time, const Element* scale,
    const Element* shift, Element* y, int64_t batch, int64_t pixels, int64_t channels, int64_t groups,
    int64_t time_stride, int64_t scale_stride, int64_t shift_stride, int64_t silu, double eps) {
  return guarded([&] {
    const Source source{x, channels, nullptr, 0};
    const Norm norm{weight, bias, time, scale, shift, time_stride, scale_stride, shift_stride, groups, eps};
    static thread_local Buffer<float> memory;
    float *factor = memory.get(2 * batch * channels), *term = factor + batch * channels;
    factors(source, norm, batch, pixels, factor, term);
    const Input input{source, factor, term, silu != 0};
    at::parallel_for(0, batch * pixels, RUN, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // one image after the other
        const int64_t image = begin / pixels, count = std::min(end, (image + 1) * pixels) - begin;
        input.fill(image, begin, count, y + begin * channels);
        begin += count;
      }
    });
  });
}
