// Self-attention with its norm, projections and residual: y = (x + out(softmax(q k^T / sqrt(D)) v)) / output_scale,
// over the T pixels of every image. Two passes after the norm's: keys and values of all pixels, packed as the matrix
// products read them; then everything else for a block of queries at a time, in memory that stays in the cache.

namespace {

struct Attention {
  int64_t batch, tokens, channels, heads, size;  // size: D, channels of a head
  int64_t places;  // of keys and values: T, rounded up to whole vectors
  Matrix query, key, value, projection;
  const Input input;
  BFloat16 *keys, *values;  // of an image and head: [D / 2, T', 2] and [T' / 2, D, 2], T' places

  // The rows of 16 keys, 32 channels each, become columns of pairs of channels.
  static void pack_keys(const float* rows, int64_t stride, BFloat16* to, int64_t to_stride) {
    alignas(64) uint32_t pairs[LANES][LANES];
    for (int64_t r = 0; r < LANES; r++) {
      const Vec low = Vec::loadu(rows + r * stride), high = Vec::loadu(rows + r * stride + LANES);
      _mm512_store_si512(pairs[r], (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    at::vec::transpose_mxn<float, 16, 16>(
        reinterpret_cast<float*>(pairs), LANES, reinterpret_cast<float*>(to), to_stride / 2);
  }

  // Two rows of values become one of pairs of rows; of those that are not there, zeros.
  static void pack_values(const float* rows, int64_t stride, int64_t count, BFloat16* to) {
    const auto row = [&](int64_t r) {
      return r < count ? _mm512_cvtepu16_epi32(rounded(Vec::loadu(rows + r * stride))) : _mm512_setzero_si512();
    };
    _mm512_storeu_si512(to, _mm512_or_si512(row(0), _mm512_slli_epi32(row(1), 16)));
  }

  static void add_bias(float* products, int64_t count, int64_t width, const float* bias) {
    for (int64_t r = 0; r < count; r++) {
      for (int64_t c = 0; c < width; c += LANES) {
        (Vec::loadu(products + r * width + c) + Vec::loadu(bias + c)).store(products + r * width + c);
      }
    }
  }

  // Blocks of at most 64 tokens of an image, in parallel: body(image, first token, tokens).
  template <class Body>
  void for_tokens(const Body& body) const {
    const int64_t blocks = (tokens + ROWS - 1) / ROWS;
    at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; item++) {
        const int64_t first = item % blocks * ROWS;
        body(item / blocks, first, std::min(ROWS, tokens - first));
      }
      at::native::cpublas::brgemm_release();
    });
  }

  void make_keys_and_values() const {
    for_tokens([&](int64_t image, int64_t first, int64_t count) {
      static thread_local Buffer<BFloat16> row_memory;
      static thread_local Buffer<float> memory;
      BFloat16* rows = row_memory.get(ROWS * channels);
      input.fill(image, image * tokens + first, count, rows);
      float* products = memory.get(ROWS * key.width);
      for (int64_t panel = 0; panel < channels / key.width; panel++) {
        const int64_t head = panel * key.width / size, channel = panel * key.width % size;
        BFloat16* to_keys = keys + (image * heads + head) * places * size;
        BFloat16* to_values = values + (image * heads + head) * places * size;
        key.multiply(rows, channels, count, panel, products);
        add_bias(products, count, key.width, key.bias + panel * key.width);
        for (int64_t t = 0; t < count; t += LANES) {
          for (int64_t c = 0; c < key.width; c += 2 * LANES) {
            pack_keys(products + t * key.width + c, key.width, to_keys + (channel + c) * places + 2 * (first + t),
                      2 * places);
          }
        }
        value.multiply(rows, channels, count, panel, products);
        add_bias(products, count, key.width, value.bias + panel * key.width);
        const int64_t end = first + count == tokens ? places - first : count;
        for (int64_t t = 0; t < end; t += 2) {
          for (int64_t c = 0; c < key.width; c += LANES) {
            pack_values(products + t * key.width + c, key.width, count - t,
                        to_values + (first + t) * size + 2 * (channel + c));
          }
        }
      }
    });
  }

  // One row of scores to weights that are to be divided by the sum, which is returned; of places past `count`, zeros.
  static float weigh(const float* scores, int64_t count, float scale, BFloat16* weights) {
    const auto there = [&](int64_t t) { return static_cast<__mmask16>(count - t < LANES ? (1 << (count - t)) - 1 : ~0); };
    const Vec lowest(std::numeric_limits<float>::lowest());
    Vec largest = lowest;
    for (int64_t t = 0; t < count; t += LANES) {
      largest = at::vec::maximum(largest, Vec(_mm512_mask_loadu_ps(lowest, there(t), scores + t)));
    }
    const Vec shift(_mm512_reduce_max_ps(largest)), factor(scale * 1.44269504f);
    Vec sum(0.0f);
    for (int64_t t = 0; t < count; t += LANES) {
      const Vec weight = _mm512_maskz_mov_ps(there(t), exp2((Vec::loadu(scores + t) - shift) * factor));
      sum = sum + weight;
      store(weights + t, weight);
    }
    return _mm512_reduce_add_ps(sum);
  }

  void attend(const Output& output) const {
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    for_tokens([&](int64_t image, int64_t first, int64_t count) {
      static thread_local Buffer<BFloat16> row_memory;
      static thread_local Buffer<float> memory;
      BFloat16 *rows = row_memory.get(ROWS * (2 * channels + places)), *queries = rows + ROWS * channels;
      BFloat16 *weights = queries + ROWS * channels, *attended = rows;
      float* products = memory.get(ROWS * (size + places + 1));  // no panel is wider than a head
      float *scores = products + ROWS * size, *sums = scores + ROWS * places;
      input.fill(image, image * tokens + first, count, rows);
      for (int64_t panel = 0; panel < channels / query.width; panel++) {
        query.multiply(rows, channels, count, panel, products);
        query.write(products, count, panel, queries, channels);
      }
      for (int64_t head = 0; head < heads; head++) {
        const int64_t at = (image * heads + head) * places * size;
        at::native::cpublas::brgemm(count, places, size, channels, places, places, false, queries + head * size,
                                    keys + at, scores);
        for (int64_t r = 0; r < count; r++) {
          sums[r] = weigh(scores + r * places, tokens, scale, weights + r * places);
        }
        at::native::cpublas::brgemm(count, size, places, places, size, size, false, weights, values + at, products);
        for (int64_t r = 0; r < count; r++) {
          const Vec share(1.0f / sums[r]);
          for (int64_t c = 0; c < size; c += LANES) {
            store(attended + r * channels + head * size + c, Vec::loadu(products + r * size + c) * share);
          }
        }
      }
      const int64_t start = (image * tokens + first) * channels;
      for (int64_t panel = 0; panel < channels / projection.width; panel++) {
        projection.multiply(attended, channels, count, panel, products);
        for (int64_t r = 0; r < count; r++) {
          for (int64_t c = 0; c < projection.width; c += LANES) {
            const int64_t channel = panel * projection.width + c, at = start + r * channels + channel;
            const Vec sum = Vec::loadu(products + r * projection.width + c) + Vec::loadu(output.bias + channel);
            store(output.y + at, (sum + load(output.residual + at)) * Vec(output.scale));
          }
        }
      }
    });
  }
};

}  // namespace

// What went wrong, or null. Weights [4]: query, key, value, projection; keys and values
// [B, T', C] are room for them, T' the multiple of 16 from T on.
extern "C" const char* attention_block(
    const BFloat16* x, const BFloat16* norm_weight, const BFloat16* norm_bias, const BFloat16* weights,
    const float* biases, BFloat16* keys, BFloat16* values, BFloat16* y, int64_t batch, int64_t tokens,
    int64_t channels, int64_t heads, int64_t width, int64_t groups, double eps, double output_scale) {
  return guarded([&] {
    static thread_local Buffer<float> memory;
    float *factor = nullptr, *term = nullptr;
    const Source source{x, channels, nullptr, 0};
    if (norm_weight) {
      factor = memory.get(2 * batch * channels);
      term = factor + batch * channels;
      const Norm norm{norm_weight, norm_bias, nullptr, nullptr, nullptr, 0, 0, 0, groups, eps};
      factors(source, norm, batch, tokens, factor, term);
    }
    const auto matrix = [&](int64_t i) {
      return Matrix{channels, channels, width, weights + i * channels * channels, biases + i * channels};
    };
    const int64_t places = (tokens + LANES - 1) / LANES * LANES;
    const Attention attention{batch,     tokens,    channels,  heads,     channels / heads,
                              places,    matrix(0), matrix(1), matrix(2), matrix(3),
                              {source, factor, term, false}, keys, values};
    attention.make_keys_and_values();
    attention.attend({y, biases + 3 * channels, x, static_cast<float>(1.0 / output_scale)});
  });
}
