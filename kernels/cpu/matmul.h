// Products of rows with weights in panels of output channels: see weight_packing.py. Sums are float32.

namespace {

constexpr int64_t ROWS = 64;  // of a block: its products stay in the first cache

struct Matrix {
  int64_t in, out, width;  // the last panel is padded where out is no multiple of width
  const Element* panels;
  const float* bias;  // [K]

  Panel panel(int64_t index) const { return {panels + index * in * width, in, width}; }

  // products [count, width] = rows [count, C] x panel; `rows` lie `stride` apart.
  void multiply(const Element* rows, int64_t stride, int64_t count, int64_t index, float* products) const {
    panel(index).multiply(rows, stride, count, 0, in, false, products);
  }

  // The same of rows of which the first channels lie in one place and the others in another.
  void multiply(const Source& source, int64_t pixel, int64_t count, int64_t index, float* products) const {
    const int64_t channels = source.channels, others = source.skip_channels;
    panel(index).multiply(source.x + pixel * channels, channels, count, 0, channels, false, products);
    if (others == 0) return;
    panel(index).multiply(source.skip + pixel * others, others, count, channels, others, true, products);
  }

  // Rounds products [count, width] + bias to rows that lie `stride` apart; no channels but those that there are.
  void write(const float* products, int64_t count, int64_t panel, Element* rows, int64_t stride) const {
    const int64_t channels = std::min(width, out - panel * width);
    const float* shift = bias + panel * width;
    for (int64_t r = 0; r < count; r++) {
      Element* to = rows + r * stride + panel * width;
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
    release();
  });
}

}  // namespace
