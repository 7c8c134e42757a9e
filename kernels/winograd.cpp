// A 3x3 convolution by Winograd's algorithm: see winograd.py, which puts the schemes' constants before this text.
//
// Work is cut into blocks of tiles times blocks of output channels. A thread transforms the input of a block of tiles
// to bfloat16, multiplies it by the transformed weights, and transforms the float32 products to the output, all in
// buffers of its own that stay in its cache: no two threads share anything but the arguments.

#include <ATen/native/CPUBlas.h>

namespace {

struct Problem {
  int64_t batch, height, width, in, out;
  int64_t tiles;  // of a block
  int64_t block;  // output channels of a block, a divisor of out
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
  const Problem& p;
  const int64_t across = (p.width + S::STEP - 1) / S::STEP, down = (p.height + S::STEP - 1) / S::STEP;
  const int64_t out_height = p.height * M / S::STEP, out_width = p.width * M / S::STEP;
  const int64_t total = p.batch * down * across;
  const int64_t v_stride = p.tiles * p.in + 32, m_stride = p.tiles * p.block + 16;  // no power of two: cache sets

  // V[i, j] = (B^T d B)[i, j] for `count` tiles from `first`; outside of the image d is 0.
  void transform_input(const BFloat16* x, BFloat16* v, const BFloat16* zeros, int64_t first, int64_t count) const {
    for (int64_t k = 0; k < count; k++) {
      const int64_t tile = first + k, image = tile / (across * down);
      const int64_t top = tile / across % down * S::STEP - 1, left = tile % across * S::STEP - 1;
      const BFloat16* d[N][N];
      for (int i = 0; i < N; i++) {
        for (int j = 0; j < N; j++) {
          const int64_t row = top + i, column = left + j;
          const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
          d[i][j] = inside ? x + ((image * p.height + row) * p.width + column) * p.in : zeros;
        }
      }
      for (int64_t c = 0; c < p.in; c += LANES) {
        Vec t[N][N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
          Vec column[N];
#pragma GCC unroll 8
          for (int i = 0; i < N; i++) column[i] = load(d[i][j] + c);
#pragma GCC unroll 8
          for (int i = 0; i < N; i++) t[i][j] = combine(S::BT[i], [&](int a) { return column[a]; });
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
#pragma GCC unroll 8
          for (int j = 0; j < N; j++) {
            store(v + (i * N + j) * v_stride + k * p.in + c, combine(S::BT[j], [&](int a) { return t[i][a]; }));
          }
        }
      }
    }
  }

  // y = A^T m A + bias for the same tiles and the output channels from `channel`; what lies outside is not written.
  void transform_output(
      const float* m, BFloat16* y, const float* bias, int64_t first, int64_t count, int64_t channel) const {
    for (int64_t k = 0; k < count; k++) {
      const int64_t tile = first + k, image = tile / (across * down);
      const int64_t top = tile / across % down * M, left = tile % across * M;
      const int64_t rows = std::min<int64_t>(M, out_height - top), columns = std::min<int64_t>(M, out_width - left);
      BFloat16* to = y + ((image * out_height + top) * out_width + left) * p.out + channel;
      for (int64_t c = 0; c < p.block; c += LANES) {
        Vec t[M][N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
          Vec column[N];
#pragma GCC unroll 8
          for (int i = 0; i < N; i++) column[i] = Vec::loadu(m + (i * N + j) * m_stride + k * p.block + c);
#pragma GCC unroll 8
          for (int i = 0; i < M; i++) t[i][j] = combine(S::AT[i], [&](int a) { return column[a]; });
        }
        const Vec shift = Vec::loadu(bias + channel + c);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
#pragma GCC unroll 8
          for (int j = 0; j < M; j++) {
            if (i >= rows || j >= columns) continue;
            const Vec sum = combine(S::AT[j], [&](int a) { return t[i][a]; });
            store(to + (i * out_width + j) * p.out + c, sum + shift);
          }
        }
      }
    }
  }

  void run(const BFloat16* x, const BFloat16* u, const float* bias, BFloat16* y) const {
    const int64_t blocks = p.out / p.block;
    at::parallel_for(0, (total + p.tiles - 1) / p.tiles * blocks, 1, [&](int64_t begin, int64_t end) {
      static thread_local std::vector<BFloat16> v, zeros;
      static thread_local std::vector<float> m;
      v.resize(std::max<size_t>(v.size(), N * N * v_stride));
      m.resize(std::max<size_t>(m.size(), N * N * m_stride));
      zeros.resize(std::max<size_t>(zeros.size(), p.in));
      int64_t transformed = -1;
      for (int64_t item = begin; item < end; item++) {
        const int64_t first = item / blocks * p.tiles, block = item % blocks;
        const int64_t count = std::min(p.tiles, total - first);
        if (first != transformed) transform_input(x, v.data(), zeros.data(), first, count);
        transformed = first;
        for (int product = 0; product < N * N; product++) {
          const BFloat16* weight = u + (block * N * N + product) * p.in * p.block;
          at::native::cpublas::brgemm(count, p.block, p.in, p.in, p.block, p.block, false,
                                      v.data() + product * v_stride, weight, m.data() + product * m_stride);
        }
        transform_output(m.data(), y, bias, first, count, block * p.block);
      }
      at::native::cpublas::brgemm_release();
    });
  }
};

}  // namespace

// What went wrong, or null. x [B, H, W, C], u [K / block, N N, C / 2, block, 2], bias [K], y [B, H', W', K].
extern "C" const char* winograd_conv2d(
    int64_t products, const BFloat16* x, const BFloat16* u, const float* bias, BFloat16* y, int64_t batch,
    int64_t height, int64_t width, int64_t in, int64_t out, int64_t tiles, int64_t block) {
  static thread_local std::string message;
  const Problem problem{batch, height, width, in, out, tiles, block};
  try {
    switch (products) {
      case 9: Convolution<Up>{problem}.run(x, u, bias, y); return nullptr;
      case 16: Convolution<F2>{problem}.run(x, u, bias, y); return nullptr;
      case 36: Convolution<F4>{problem}.run(x, u, bias, y); return nullptr;
      default: return "there is no scheme with so many products";
    }
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
