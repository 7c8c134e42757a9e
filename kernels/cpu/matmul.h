// Products of rows of bfloat16 with weights in panels [K / width, C / 2, width, 2], width output channels of a panel:
// pairs of input channels together, which is how processors multiply bfloat16. Sums are float32.

namespace {

constexpr int64_t ROWS = 64;  // of a block: its products stay in the first cache

struct Matrix {
  int64_t in, out, width;  // the last panel is padded where out is no multiple of width
  const BFloat16* panels;
  const float* bias;  // [K]

  // products [count, width] = rows [count, C] x panel; `rows` lie `stride` apart.
  void multiply(const BFloat16* rows, int64_t stride, int64_t count, int64_t panel, float* products) const {
    at::native::cpublas::brgemm(count, width, in, stride, width, width, false, rows, panels + panel * in * width,
                                products);
  }

  // The same of rows of which the first channels lie in one place and the others in another.
  void multiply(const Source& source, int64_t pixel, int64_t count, int64_t panel, float* products) const {
    const BFloat16* weight = panels + panel * in * width;
    at::native::cpublas::brgemm(count, width, source.channels, source.channels, width, width, false,
                                source.x + pixel * source.channels, weight, products);
    if (source.skip_channels == 0) return;
    at::native::cpublas::brgemm(count, width, source.skip_channels, source.skip_channels, width, width, true,
                                source.skip + pixel * source.skip_channels, weight + source.channels * width, products);
  }

  // Rounds products [count, width] + bias to rows that lie `stride` apart; no channels but those that there are.
  void write(const float* products, int64_t count, int64_t panel, BFloat16* rows, int64_t stride) const {
    const int64_t channels = std::min(width, out - panel * width);
    const float* shift = bias + panel * width;
    for (int64_t r = 0; r < count; r++) {
      BFloat16* to = rows + r * stride + panel * width;
      int64_t c = 0;
      for (; c + LANES <= channels; c += LANES) {
        store(to + c, Vec::loadu(products + r * width + c) + Vec::loadu(shift + c));
      }
      for (; c < channels; c++) to[c] = products[r * width + c] + shift[c];
    }
  }
};

// Calls body(first row, rows, panel) for every block of rows and every panel, in parallel.
template <class Body>
void for_blocks(int64_t rows, int64_t panels, const Body& body) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  at::parallel_for(0, blocks * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t first = item / panels * ROWS;
      body(first, std::min(ROWS, rows - first), item % panels);
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace
