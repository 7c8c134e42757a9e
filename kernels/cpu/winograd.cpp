// y [B, H', W', K] of x [B, H, W, C]. What went wrong, or null.
extern "C" const char* winograd_conv2d(
    const Element* x, const Element* u, const float* bias, Element* y, int64_t batch, int64_t height, int64_t width,
    int64_t in, int64_t out, int64_t products, int64_t block) {
  return guarded([&] {
    const Input input{{x, in, nullptr, 0}, nullptr, nullptr, false};
    Winograd{products, in, out, block, u}.run(input, {y, bias, nullptr, 1.0f}, batch, height, width);
  });
}
