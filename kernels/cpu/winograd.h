// 3x3 convolutions by Winograd's algorithm: see winograd.py, whose constants library.py puts before this text.
//
// Work is cut into blocks of tiles times blocks of output channels. A thread normalises the rows of pixels under a
// block of tiles, transforms them to Element, multiplies by the transformed weights, and transforms the float32
// products to the output, all in memory of its own that stays in its cache: threads share nothing but the arguments.

namespace {

// What is done with a sum of products: y = (sum + bias + residual) * scale.
struct Output {
  Element* y;
  const float* bias;  // [K]
  const Element* residual;  // like y, perhaps y itself; or null
  float scale;
};

// sum_i row[i] get(i); zeros and ones cost nothing.
template <int N, class Get>
__attribute__((always_inline)) inline Vec combine(const float (&row)[N], const Get& get) {
  Vec sum(0.0f);
  bool first = true;
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) {
    if (row[i] == 0.0f) continue;
    const Vec x = get(i);
    if (first) {
      sum = row[i] == 1.0f ? x : row[i] == -1.0f ? x.neg() : x * Vec(row[i]);
    } else if (row[i] == 1.0f) {
      sum = sum + x;
    } else if (row[i] == -1.0f) {
      sum = sum - x;
    } else {
      sum = at::vec::fmadd(x, Vec(row[i]), sum);
    }
    first = false;
  }
  return sum;
}

template <class S>
struct Convolution {
  static constexpr int N = S::INPUT, M = S::OUTPUT;
  int64_t batch, height, width, in, out;
  int64_t tiles;  // of a block
  int64_t block;  // output channels of a block, a divisor of out
  const int64_t across = (width + S::STEP - 1) / S::STEP, down = (height + S::STEP - 1) / S::STEP;
  const int64_t out_height = height * M / S::STEP, out_width = width * M / S::STEP;
  const int64_t total = batch * down * across;
  const int64_t v_stride = tiles * in + 32, m_stride = tiles * block + 16;  // no power of two: cache sets

  // The pixels under tiles `left` to `right` - 1 of a row of tiles, zeros outside of the image. Rows of pixels take
  // turns in N places, so that those which the next row of tiles shares are there already.
  struct Band {
    Element* memory;
    int64_t left, right, stride;
    int64_t image = -1, filled = 0;  // rows of pixels before this one are there
    Element* row(int64_t pixel_row) const { return memory + (pixel_row + 1) % N * stride; }
  };

  void fill(const Input& input, Band& band, int64_t image, int64_t tile_row) const {
    const int64_t top = tile_row * S::STEP - 1, start = band.left * S::STEP - 1;
    const int64_t pixels = band.stride / in, inside = std::max<int64_t>(start, 0);
    const int64_t end = std::min(start + pixels, width);
    if (image != band.image) band.filled = top;
    band.image = image;
    for (int64_t r = std::max(band.filled, top); r < top + N; r++) {
      Element* to = band.row(r);
      if (r < 0 || r >= height) {
        std::memset(to, 0, band.stride * sizeof(Element));
        continue;
      }
      std::memset(to, 0, (inside - start) * in * sizeof(Element));
      input.fill(image, (image * height + r) * width + inside, end - inside, to + (inside - start) * in);
      std::memset(to + (end - start) * in, 0, (start + pixels - end) * in * sizeof(Element));
    }
    band.filled = top + N;
  }

  // V[i, j] = (B^T d B)[i, j] for `count` tiles from `first`.
  void transform_input(const Input& input, Buffer<Element>& memory, Element* v, int64_t first, int64_t count) const {
    const bool one_row = first % across + count <= across;
    Band band{nullptr, one_row ? first % across : 0, one_row ? first % across + count : across, 0};
    band.stride = ((band.right - band.left - 1) * S::STEP + N) * in;
    band.memory = memory.get(N * band.stride);
    for (int64_t k = 0; k < count; k++) {
      const int64_t tile = first + k, tile_row = tile / across % down, column = tile % across;
      if (k == 0 || column == 0) fill(input, band, tile / (across * down), tile_row);
      const Element* d[N];
      for (int i = 0; i < N; i++) {
        d[i] = band.row(tile_row * S::STEP - 1 + i) + (column - band.left) * S::STEP * in;
      }
      for (int64_t c = 0; c < in; c += LANES) {
        Vec t[N][N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
          Vec pixels[N];
#pragma GCC unroll 8
          for (int i = 0; i < N; i++) pixels[i] = load(d[i] + j * in + c);
#pragma GCC unroll 8
          for (int i = 0; i < N; i++) t[i][j] = combine(S::BT[i], [&](int a) { return pixels[a]; });
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
#pragma GCC unroll 8
          for (int j = 0; j < N; j++) {
            store(v + (i * N + j) * v_stride + k * in + c, combine(S::BT[j], [&](int a) { return t[i][a]; }));
          }
        }
      }
    }
  }

  // A^T m A for the same tiles and the output channels from `channel`; what lies outside is not written.
  void transform_output(const float* m, const Output& output, int64_t first, int64_t count, int64_t channel) const {
    const Vec scale(output.scale);
    for (int64_t k = 0; k < count; k++) {
      const int64_t tile = first + k, image = tile / (across * down);
      const int64_t top = tile / across % down * M, left = tile % across * M;
      const int64_t rows = std::min<int64_t>(M, out_height - top), columns = std::min<int64_t>(M, out_width - left);
      const int64_t start = ((image * out_height + top) * out_width + left) * out + channel;
      for (int64_t c = 0; c < block; c += LANES) {
        Vec t[M][N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
          Vec products[N];
#pragma GCC unroll 8
          for (int i = 0; i < N; i++) products[i] = Vec::loadu(m + (i * N + j) * m_stride + k * block + c);
#pragma GCC unroll 8
          for (int i = 0; i < M; i++) t[i][j] = combine(S::AT[i], [&](int a) { return products[a]; });
        }
        const Vec bias = Vec::loadu(output.bias + channel + c);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
#pragma GCC unroll 8
          for (int j = 0; j < M; j++) {
            if (i >= rows || j >= columns) continue;
            Vec y = combine(S::AT[j], [&](int a) { return t[i][a]; }) + bias;
            const int64_t at = start + (i * out_width + j) * out + c;
            if (output.residual) y = (y + load(output.residual + at)) * scale;
            store(output.y + at, y);
          }
        }
      }
    }
  }

  void run(const Input& input, const Element* u, const Output& output) const {
    const int64_t blocks = out / block;
    at::parallel_for(0, (total + tiles - 1) / tiles * blocks, 1, [&](int64_t begin, int64_t end) {
      static thread_local Buffer<Element> band, v_memory;
      static thread_local Buffer<float> m_memory;
      Element* v = v_memory.get(N * N * v_stride);
      float* m = m_memory.get(N * N * m_stride);
      int64_t transformed = -1;
      for (int64_t item = begin; item < end; item++) {
        const int64_t first = item / blocks * tiles, channels = item % blocks;
        const int64_t count = std::min(tiles, total - first);
        if (first != transformed) transform_input(input, band, v, first, count);
        transformed = first;
        for (int product = 0; product < N * N; product++) {
          const Panel panel{u + (channels * N * N + product) * in * block, in, block};
          panel.multiply(v + product * v_stride, in, count, 0, in, false, m + product * m_stride);
        }
        transform_output(m, output, first, count, channels * block);
      }
      release();
    });
  }
};

// A convolution of images [B, H, W, C] by u, N N matrices for each panel of `block` channels, whose number of products is its scheme.
struct Winograd {
  int64_t products, in, out, block;
  const Element* u;

  void run(const Input& input, const Output& output, int64_t batch, int64_t height, int64_t width) const {
    switch (products) {
      case Up::INPUT * Up::INPUT: return run<Up>(input, output, batch, height, width);
      case F2::INPUT * F2::INPUT: return run<F2>(input, output, batch, height, width);
      case F4::INPUT * F4::INPUT: return run<F4>(input, output, batch, height, width);
      default: throw std::invalid_argument("there is no scheme with so many products");
    }
  }

 private:
  template <class S>
  void run(const Input& input, const Output& output, int64_t batch, int64_t height, int64_t width) const {
    const int64_t tiles = batch * ((height + S::STEP - 1) / S::STEP) * ((width + S::STEP - 1) / S::STEP);
    Convolution<S>{batch, height, width, in, out, tiles_of_a_block(tiles), block}.run(input, u, output);
  }

  // At most 64; fewer if threads are left without work, but not below 16.
  static int64_t tiles_of_a_block(int64_t tiles) {
    const int64_t threads = at::get_num_threads();
    return std::min<int64_t>(64, std::max<int64_t>(16, (tiles + threads - 1) / threads));
  }
};

}  // namespace
