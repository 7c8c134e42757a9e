// Self-attention with its norm, projections and residual: y = (x + out(softmax(q k^T / sqrt(D)) v)) / output_scale,
// over the T pixels of every image. Two passes after the norm's: keys and values of all pixels, packed as the matrix
// products read them; then everything else for a block of queries at a time, in memory that stays in the cache.

namespace {

struct Attention {
  int64_t batch, tokens, channels, heads, size;  // size: D, channels of a head
  int64_t places;  // of keys and values: T, rounded up to a multiple of 16
  Matrix query, key, value, projection;
  const Input input;
  Element *keys, *values;  // of an image and head: panels from D channels to T' places, and from T' to D

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
      release();
    });
  }

  void make_keys_and_values() const {
    for_tokens([&](int64_t image, int64_t first, int64_t count) {
      static thread_local Buffer<Element> row_memory;
      static thread_local Buffer<float> memory;
      Element* rows = row_memory.get(ROWS * channels);
      input.fill(image, image * tokens + first, count, rows);
      float* products = memory.get(ROWS * key.width);
      for (int64_t panel = 0; panel < channels / key.width; panel++) {
        const int64_t head = panel * key.width / size, channel = panel * key.width % size;
        Element* to_keys = keys + (image * heads + head) * places * size;
        Element* to_values = values + (image * heads + head) * places * size;
        key.multiply(rows, channels, count, panel, products);
        add_bias(products, count, key.width, key.bias + panel * key.width);
        for (int64_t t = 0; t < count; t += CHANNELS) {
          for (int64_t c = 0; c < key.width; c += 2 * CHANNELS) {
            pack_keys(products + t * key.width + c, key.width, to_keys, size, places, first + t, channel + c);
          }
        }
        value.multiply(rows, channels, count, panel, products);
        add_bias(products, count, key.width, value.bias + panel * key.width);
        const int64_t end = first + count == tokens ? places - first : count;
        for (int64_t t = 0; t < end; t += 2) {
          for (int64_t c = 0; c < key.width; c += CHANNELS) {
            pack_values(products + t * key.width + c, key.width, count - t, to_values, size, places, first + t,
                        channel + c);
          }
        }
      }
    });
  }

  // One row of scores to weights that are to be divided by the sum, which is returned; of places that are none, zeros.
  float weigh(const float* scores, float scale, Element* weights) const {
    const Vec lowest(std::numeric_limits<float>::lowest()), factor(scale * 1.44269504f);
    const auto there = [&](int64_t t) { return std::clamp<int64_t>(tokens - t, 0, LANES); };
    Vec largest = lowest, sum(0.0f);
    for (int64_t t = 0; t < places; t += LANES) {
      largest = at::vec::maximum(largest, Vec::set(lowest, Vec::loadu(scores + t), there(t)));
    }
    const Vec shift(at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, largest));
    for (int64_t t = 0; t < places; t += LANES) {
      const Vec weight = Vec::set(Vec(0.0f), exp2((Vec::loadu(scores + t) - shift) * factor), there(t));
      sum = sum + weight;
      store(weights + t, weight);
    }
    return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
  }

  void attend(const Output& output) const {
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    for_tokens([&](int64_t image, int64_t first, int64_t count) {
      static thread_local Buffer<Element> row_memory;
      static thread_local Buffer<float> memory;
      Element *rows = row_memory.get(ROWS * (2 * channels + places)), *queries = rows + ROWS * channels;
      Element *weights = queries + ROWS * channels, *attended = rows;
      float* products = memory.get(ROWS * (size + places + 1));  // no panel is wider than a head
      float *scores = products + ROWS * size, *sums = scores + ROWS * places;
      input.fill(image, image * tokens + first, count, rows);
      for (int64_t panel = 0; panel < channels / query.width; panel++) {
        query.multiply(rows, channels, count, panel, products);
        query.write(products, count, panel, queries, channels);
      }
      for (int64_t head = 0; head < heads; head++) {
        const int64_t at = (image * heads + head) * places * size;
        Panel{keys + at, size, places}.multiply(queries + head * size, channels, count, 0, size, false, scores);
        for (int64_t r = 0; r < count; r++) {
          sums[r] = weigh(scores + r * places, scale, weights + r * places);
        }
        Panel{values + at, places, size}.multiply(weights, places, count, 0, places, false, products);
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
    const Element* x, const Element* norm_weight, const Element* norm_bias, const Element* weights,
    const float* biases, Element* keys, Element* values, Element* y, int64_t batch, int64_t tokens,
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
    const int64_t places = (tokens + CHANNELS - 1) / CHANNELS * CHANNELS;
    const Attention attention{batch,     tokens,    channels,  heads,     channels / heads,
                              places,    matrix(0), matrix(1), matrix(2), matrix(3),
                              {source, factor, term, false}, keys, values};
    attention.make_keys_and_values();
    attention.attend({y, biases + 3 * channels, x, static_cast<float>(1.0 / output_scale)});
  });
}
