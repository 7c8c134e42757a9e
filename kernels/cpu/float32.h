// What depends on the dtype of images and weights, for float32: products of rows with weights in strips of 16 output
// channels, [width / 16, C, 16], by kernels that keep a block of sums in registers.

namespace {

using Element = float;

inline Vec load(const Element* from) { return Vec::loadu(from); }

inline void store(Element* to, const Vec& value) { value.store(to); }

// Registers hold ROWS x 2 vectors of sums, and what they are made of: 12 of 16, or 24 of 32.
constexpr int MOST_ROWS = LANES == 16 ? 12 : 6;
constexpr int STRIPS = LANES == 16 ? 2 : 1;  // of a block of sums, two vectors wide

// products [R, 16 S] = rows [R, depth] x S strips [depth, 16], or added to them. The channels of a row are summed in
// their order, whatever R and S.
template <int R, int S>
void multiply_block(const float* rows, int64_t stride, const float* strips, int64_t strip, int64_t depth, bool add,
                    float* products, int64_t width) {
  constexpr int V = S * CHANNELS / LANES, EACH = CHANNELS / LANES;
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = add ? Vec::loadu(products + r * width + v * LANES) : Vec(0.0f);
  }
  for (int64_t k = 0; k < depth; k++) {
    Vec weight[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) weight[v] = Vec::loadu(strips + v / EACH * strip + k * CHANNELS + v % EACH * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vec x(rows[r * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = at::vec::fmadd(x, weight[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v].store(products + r * width + v * LANES);
  }
}

// The same of at most R rows.
template <int S, int R = MOST_ROWS>
void multiply_rows(const float* rows, int64_t stride, int64_t count, const float* strips, int64_t strip, int64_t depth,
                   bool add, float* products, int64_t width) {
  if (count == R) return multiply_block<R, S>(rows, stride, strips, strip, depth, add, products, width);
  if constexpr (R > 1) multiply_rows<S, R - 1>(rows, stride, count, strips, strip, depth, add, products, width);
}

// The same of any number of rows: as few blocks as there can be, of nearly as many rows each.
template <int S>
void multiply_strips(const float* rows, int64_t stride, int64_t count, const float* strips, int64_t strip,
                     int64_t depth, bool add, float* products, int64_t width) {
  for (int64_t blocks = (count + MOST_ROWS - 1) / MOST_ROWS; blocks > 0; blocks--) {
    const int64_t some = (count + blocks - 1) / blocks;
    multiply_rows<S>(rows, stride, some, strips, strip, depth, add, products, width);
    rows += some * stride;
    products += some * width;
    count -= some;
  }
}

// A matrix of weights from `inputs` to `width` channels.
struct Panel {
  const Element* weights;
  int64_t inputs, width;

  // products [count, width] = rows [count, depth] x the weights of the input channels from `from`, or added to them;
  // `rows` lie `stride` apart.
  void multiply(const Element* rows, int64_t stride, int64_t count, int64_t from, int64_t depth, bool add,
                float* products) const {
    const int64_t strip = inputs * CHANNELS;
    const float* strips = weights + from * CHANNELS;
    int64_t c = 0;
    for (; c + STRIPS * CHANNELS <= width; c += STRIPS * CHANNELS, strips += STRIPS * strip) {
      multiply_strips<STRIPS>(rows, stride, count, strips, strip, depth, add, products + c, width);
    }
    if (c < width) multiply_strips<1>(rows, stride, count, strips, strip, depth, add, products + c, width);
  }
};

// Called by a thread after its last product.
inline void release() {}

// Keys become a panel from D channels to `places` keys: 16 rows of 32 channels from (place, channel).
inline void pack_keys(const float* rows, int64_t stride, Element* keys, int64_t size, int64_t, int64_t place,
                      int64_t channel) {
  float* to = keys + place * size + channel * CHANNELS;
  for (int64_t c = 0; c < 2 * CHANNELS; c += LANES) {
    for (int64_t r = 0; r < CHANNELS; r += LANES) {
      at::vec::transpose_mxn<float, LANES, LANES>(rows + r * stride + c, stride, to + c * CHANNELS + r, CHANNELS);
    }
  }
}

// Values become a panel from `places` of them to D channels: 2 rows of 16 channels from (place, channel), of which
// `count` are there; zeros for the others.
inline void pack_values(const float* rows, int64_t stride, int64_t count, Element* values, int64_t, int64_t places,
                        int64_t place, int64_t channel) {
  float* to = values + channel * places + place * CHANNELS;
  for (int64_t r = 0; r < 2; r++) {
    for (int64_t c = 0; c < CHANNELS; c += LANES) {
      (r < count ? Vec::loadu(rows + r * stride + c) : Vec(0.0f)).store(to + r * CHANNELS + c);
    }
  }
}

}  // namespace
