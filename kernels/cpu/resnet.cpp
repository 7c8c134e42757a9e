// conv2(silu(norm2(conv1(silu(norm1([x, skip])))))) + shortcut([x, skip]), all over `output_scale`: five passes, each
// in parallel. h [B, H, W, K] is room for what is between the convolutions. What went wrong, or null.
extern "C" const char* resnet_block(
    const Element* x, const Element* skip, const Element* time, const Element* scale, const Element* shift,
    const Element* norm1_weight, const Element* norm1_bias, const Element* conv1, const float* conv1_bias,
    const Element* norm2_weight, const Element* norm2_bias, const Element* conv2, const float* conv2_bias,
    const Element* shortcut, const float* shortcut_bias, Element* h, Element* y, int64_t batch, int64_t height,
    int64_t width, int64_t channels, int64_t skip_channels, int64_t out, int64_t products, int64_t block,
    int64_t groups, int64_t time_stride, int64_t scale_stride, int64_t shift_stride, double eps, double output_scale) {
  return guarded([&] {
    static thread_local Buffer<float> memory;
    const int64_t in = channels + skip_channels, pixels = height * width, wider = std::max(in, out);
    float *factor = memory.get(2 * batch * wider), *term = factor + batch * wider;
    const Source source{x, channels, skip, skip_channels}, between{h, out, nullptr, 0};

    const Norm norm1{norm1_weight, norm1_bias, nullptr, nullptr, nullptr, 0, 0, 0, groups, eps};
    factors(source, norm1, batch, pixels, factor, term);
    Winograd{products, in, out, block, conv1}.run(
        {source, factor, term, true}, {h, conv1_bias, nullptr, 1.0f}, batch, height, width);

    const Norm norm2{norm2_weight, norm2_bias, time, scale, shift, time_stride, scale_stride, shift_stride, groups, eps};
    factors(between, norm2, batch, pixels, factor, term);
    if (shortcut) {
      const Matrix matrix{in, out, block, shortcut, shortcut_bias};
      for_blocks(batch * pixels, out / block, [&](int64_t first, int64_t count, int64_t panel) {
        static thread_local Buffer<float> sums;
        float* products = sums.get(ROWS * block);
        matrix.multiply(source, first, count, panel, products);
        matrix.write(products, count, panel, y + first * out, out);
      });
    }
    Winograd{products, out, out, block, conv2}.run(
        {between, factor, term, true}, {y, conv2_bias, shortcut ? y : x, static_cast<float>(1.0 / output_scale)}, batch,
        height, width);
  });
}
