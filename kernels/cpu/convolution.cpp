// A convolution by its definition: the pixels under each output are gathered to a row, zeros where there are none.

namespace {

struct Gather {
  const Element* x;  // [B, H, W, C]
  int64_t height, width, channels, kernel, stride, before, out_height, out_width;

  void row(int64_t pixel, Element* to) const {
    const int64_t image = pixel / (out_height * out_width), top = pixel / out_width % out_height * stride - before;
    const int64_t left = pixel % out_width * stride - before;
    const int64_t begin = std::clamp<int64_t>(-left, 0, kernel), end = std::clamp(width - left, begin, kernel);
    for (int64_t i = 0; i < kernel; i++, to += kernel * channels) {
      if (top + i < 0 || top + i >= height) {
        std::memset(to, 0, kernel * channels * sizeof(Element));
        continue;
      }
      const Element* from = x + ((image * height + top + i) * width + left + begin) * channels;
      std::memset(to, 0, begin * channels * sizeof(Element));
      std::memcpy(to + begin * channels, from, (end - begin) * channels * sizeof(Element));
      std::memset(to + end * channels, 0, (kernel - end) * channels * sizeof(Element));
    }
  }
};

}  // namespace

// y [B, H', W', K]; weights in panels, their input channels kernel * kernel * C, padded to `depth`, an even number,
// and their output channels to whole panels. What went wrong, or null.
extern "C" const char* gathered_conv2d(
    const Element* x, const Element* weight, const float* bias, Element* y, int64_t batch, int64_t height,
    int64_t width, int64_t channels, int64_t kernel, int64_t stride, int64_t before, int64_t out_height,
    int64_t out_width, int64_t out, int64_t depth, int64_t panels, int64_t block) {
  return guarded([&] {
    const Gather gather{x, height, width, channels, kernel, stride, before, out_height, out_width};
    const Matrix matrix{depth, out, block, weight, bias};
    for_blocks(batch * out_height * out_width, 1, [&](int64_t first, int64_t count, int64_t) {
      static thread_local Buffer<Element> row_memory;
      static thread_local Buffer<float> memory;
      Element* rows = row_memory.get(ROWS * depth);
      float* products = memory.get(ROWS * block);
      const int64_t padding = depth - kernel * kernel * channels;
      for (int64_t p = 0; p < count; p++) {
        gather.row(first + p, rows + p * depth);
        std::memset(rows + (p + 1) * depth - padding, 0, padding * sizeof(Element));
      }
      for (int64_t panel = 0; panel < panels; panel++) {
        matrix.multiply(rows, depth, count, panel, products);
        matrix.write(products, count, panel, y + first * out, out);
      }
    });
  });
}
