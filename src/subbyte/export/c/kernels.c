/* The kernels of an exported network, one section for each kind of operation. The exporter copies
   the sections that a network uses. `number` is float, or the integer of a fixed-point network;
   KIND is how a weight is stored: packed, plain, half or byte. */

//! half_value
/* IEEE 754 binary16. */
static float half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int digits = bits & 1023;
  float v = (float)(exponent ? digits + 1024 : digits) * (1.0f / 16777216.0f);
  int i;
  for (i = 1; i < exponent; i++) v *= 2.0f;
  return bits >> 15 ? -v : v;
}

//! packed
typedef struct {
  const word* words; /* digits of base n, the first one highest, as fractions of a word */
  const number* levels;
  const stored* scales;
  uint32_t width, group; /* weights in a row; of these with one scale, 0: all rows have one */
  uint16_t n, digits;
} packed;

typedef struct {
  const packed* of;
  const word* next;
  const stored* scales;
  number scale;
  uint32_t row, same; /* weights left in the row, beyond those of this scale; with this scale */
  word now;
  uint16_t left;
} packed_stream;

static packed_stream packed_open(const packed* w, size_t row) {
  const size_t first = row * w->width;
  packed_stream s = {w, w->words + first / w->digits, w->scales, 0, 0, 0, 0, 0};
  size_t skip = first % w->digits;
  if (w->group) s.scales += row * ((w->width + w->group - 1) / w->group);
  if (skip) {
    s.now = *s.next++;
    s.left = (uint16_t)(w->digits - skip);
    while (skip--) s.now = (word)((wide)s.now * w->n);
  }
  return s;
}

static number packed_next(packed_stream* s) {
  const packed* w = s->of;
  wide product;
  if (!s->same) {
    if (!s->row) s->row = w->width;
    s->same = w->group && w->group < s->row ? w->group : s->row;
    s->row -= s->same;
    s->scale = STORED(*s->scales);
    if (w->group) s->scales++;
  }
  if (!s->left) {
    s->now = *s->next++;
    s->left = w->digits;
  }
  product = (wide)s->now * w->n;
  s->now = (word)product;
  s->left--;
  s->same--;
  return w->levels[product >> WORD_BITS] * s->scale;
}

//! plain
typedef struct {
  const number* values;
  uint32_t width;
} plain;

typedef const number* plain_stream;

static plain_stream plain_open(const plain* w, size_t row) { return w->values + row * w->width; }

static number plain_next(plain_stream* s) { return *(*s)++; }

//! half
typedef struct {
  const uint16_t* values; /* IEEE 754 binary16 */
  const float* scales;    /* one per row, or none */
  uint32_t width;
} half;

typedef struct {
  const half* of;
  size_t at;
} half_stream;

static half_stream half_open(const half* w, size_t row) {
  half_stream s = {w, row * w->width};
  return s;
}

static float half_next(half_stream* s) {
  const half* w = s->of;
  const float v = half_value(w->values[s->at]);
  const size_t row = s->at++ / w->width;
  return w->scales ? v * w->scales[row] : v;
}

//! byte
typedef struct {
  const int8_t* values;
  const float* scales; /* one per row, or none */
  uint32_t width;
} byte;

typedef struct {
  const byte* of;
  size_t at;
} byte_stream;

static byte_stream byte_open(const byte* w, size_t row) {
  byte_stream s = {w, row * w->width};
  return s;
}

static float byte_next(byte_stream* s) {
  const byte* w = s->of;
  const float v = (float)w->values[s->at];
  const size_t row = s->at++ / w->width;
  return w->scales ? v * w->scales[row] : v;
}

//! start
static void start(number* y, number bias, const number* plus, size_t n) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = plus ? bias + plus[i] : bias;
}

//! finish
enum { NONE, RELU, RELU6 };

static number finish(number v, int activation) {
  if (activation != NONE && !(v > 0)) return 0;
  return activation == RELU6 && v > 6 ? 6 : v;
}

//! window
typedef struct {
  int16_t channels, in_h, in_w, out_channels, out_h, out_w, groups;
  int16_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
} window;

//! first_inside
static int first_inside(int shift, int stride) {
  return shift > 0 ? (shift + stride - 1) / stride : 0;
}

//! end_inside
static int end_inside(int shift, int stride, int size, int n) {
  const int last = size - 1 + shift;
  return last < 0 ? 0 : last / stride + 1 < n ? last / stride + 1 : n;
}

//! KIND_conv
/* y [out_channels, out_h, out_w] = activation(x [channels, in_h, in_w] * weight + bias + plus): one
   weight at a time, added to the plane of its output channel. y may be plus. */
static void KIND_tap(const number* x, number* y, number weight, const window* w, int ky, int kx) {
  const int down = w->top - ky * w->dilation_h, right = w->left - kx * w->dilation_w;
  const int end_y = end_inside(down, w->stride_h, w->in_h, w->out_h);
  const int end_x = end_inside(right, w->stride_w, w->in_w, w->out_w);
  const int first_x = first_inside(right, w->stride_w);
  int i, j;
  for (i = first_inside(down, w->stride_h); i < end_y; i++) {
    const number* row = x + (i * w->stride_h - down) * w->in_w;
    for (j = first_x; j < end_x; j++) y[i * w->out_w + j] += weight * row[j * w->stride_w - right];
  }
}

static void KIND_conv(const number* x, number* y, const stored* bias, const number* plus,
                      const KIND* weight, const window* w, int activation) {
  const int n = w->out_h * w->out_w, per_group = w->channels / w->groups;
  KIND_stream s = KIND_open(weight, 0);
  int o, c, ky, kx, i;
  for (o = 0; o < w->out_channels; o++, y += n) {
    const int group = o / (w->out_channels / w->groups);
    start(y, bias ? STORED(bias[o]) : 0, plus ? plus + o * n : 0, (size_t)n);
    for (c = 0; c < per_group; c++)
      for (ky = 0; ky < w->kernel_h; ky++)
        for (kx = 0; kx < w->kernel_w; kx++) {
          const number v = KIND_next(&s);
          const int plane = (group * per_group + c) * w->in_h * w->in_w;
          if (v != 0) KIND_tap(x + plane, y, v, w, ky, kx);
        }
    for (i = 0; i < n; i++) y[i] = finish(y[i], activation);
  }
}

//! KIND_conv_transpose
/* The same with each input value spread over the outputs that the kernel reaches; rows of the
   weight are output channels: [out_channels, channels / groups, kernel_h, kernel_w]. */
static void KIND_spread(const number* x, number* y, number weight, const window* w, int ky,
                        int kx) {
  int i, j;
  for (i = 0; i < w->in_h; i++)
    for (j = 0; j < w->in_w; j++) {
      const int row = i * w->stride_h + ky * w->dilation_h - w->top;
      const int column = j * w->stride_w + kx * w->dilation_w - w->left;
      if (row >= 0 && row < w->out_h && column >= 0 && column < w->out_w)
        y[row * w->out_w + column] += weight * x[i * w->in_w + j];
    }
}

static void KIND_conv_transpose(const number* x, number* y, const stored* bias, const KIND* weight,
                                const window* w) {
  const int n = w->out_h * w->out_w, per_group = w->channels / w->groups;
  KIND_stream s = KIND_open(weight, 0);
  int o, c, ky, kx;
  for (o = 0; o < w->out_channels; o++, y += n) {
    const int group = o / (w->out_channels / w->groups);
    start(y, bias ? STORED(bias[o]) : 0, 0, (size_t)n);
    for (c = 0; c < per_group; c++)
      for (ky = 0; ky < w->kernel_h; ky++)
        for (kx = 0; kx < w->kernel_w; kx++) {
          const number v = KIND_next(&s);
          const int plane = (group * per_group + c) * w->in_h * w->in_w;
          if (v != 0) KIND_spread(x + plane, y, v, w, ky, kx);
        }
  }
}

//! KIND_linear
/* y [rows, out] = activation(x [rows, in] * weight' + bias + plus). y may be plus. A few weights
   are decoded at a time. */
enum { KIND_AT_ONCE = 32 };

static void KIND_linear(const number* x, number* y, const stored* bias, const number* plus,
                        const KIND* weight, const int* sizes, int activation) {
  const int rows = sizes[0], in = sizes[1], out = sizes[2];
  KIND_stream s = KIND_open(weight, 0);
  number some[KIND_AT_ONCE];
  int o, i, r, k;
  for (o = 0; o < out; o++) {
    for (r = 0; r < rows; r++)
      y[r * out + o] = (bias ? STORED(bias[o]) : 0) + (plus ? plus[r * out + o] : 0);
    for (i = 0; i < in; i += KIND_AT_ONCE) {
      const int n = in - i < KIND_AT_ONCE ? in - i : KIND_AT_ONCE;
      for (k = 0; k < n; k++) some[k] = KIND_next(&s);
      for (r = 0; r < rows; r++) {
        number sum = 0;
        for (k = 0; k < n; k++) sum += some[k] * x[r * in + i + k];
        y[r * out + o] += sum;
      }
    }
    for (r = 0; r < rows; r++) y[r * out + o] = finish(y[r * out + o], activation);
  }
}

//! KIND_embedding
/* y [count, width]: the rows of the table that x names. A row beyond the table reads as row 0. */
static void KIND_embedding(const int32_t* x, number* y, const KIND* table, int count, int entries) {
  int i;
  uint32_t k;
  for (i = 0; i < count; i++) {
    const int row = x[i] >= 0 && x[i] < entries ? x[i] : 0;
    KIND_stream s = KIND_open(table, (size_t)row);
    for (k = 0; k < table->width; k++) *y++ = KIND_next(&s);
  }
}

//! affine
/* y = x * scale + shift per channel; x [channels, n]. y may be x. */
static void affine(const float* x, float* y, const float* scale, const float* shift, int channels,
                   int n) {
  int c, i;
  for (c = 0; c < channels; c++)
    for (i = 0; i < n; i++) y[c * n + i] = x[c * n + i] * scale[c] + shift[c];
}

//! layer_norm
/* Rows of n to mean 0 and variance 1, then * weight + bias. y may be x. */
static void layer_norm(const float* x, float* y, const float* weight, const float* bias,
                       float epsilon, int rows, int n) {
  int i;
  for (; rows > 0; rows--, x += n, y += n) {
    float mean = 0, variance = 0, scale;
    for (i = 0; i < n; i++) mean += x[i];
    mean /= (float)n;
    for (i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    scale = 1.0f / sqrtf(variance / (float)n + epsilon);
    for (i = 0; i < n; i++) {
      const float v = (x[i] - mean) * scale;
      y[i] = (weight ? v * weight[i] : v) + (bias ? bias[i] : 0);
    }
  }
}

//! rms_norm
/* Rows of n to mean square 1, then * weight. y may be x. */
static void rms_norm(const float* x, float* y, const float* weight, float epsilon, int rows,
                     int n) {
  int i;
  for (; rows > 0; rows--, x += n, y += n) {
    float sum = 0, scale;
    for (i = 0; i < n; i++) sum += x[i] * x[i];
    scale = 1.0f / sqrtf(sum / (float)n + epsilon);
    for (i = 0; i < n; i++) y[i] = weight ? x[i] * scale * weight[i] : x[i] * scale;
  }
}

//! group_norm
/* Groups of channels to mean 0 and variance 1, then * weight + bias per channel; x [channels, n].
   y may be x. */
static void group_norm(const float* x, float* y, const float* weight, const float* bias,
                       float epsilon, const int* sizes) {
  const int channels = sizes[0], n = sizes[1], groups = sizes[2], size = channels / groups * n;
  int c, i;
  layer_norm(x, y, 0, 0, epsilon, groups, size);
  for (c = 0; c < channels; c++)
    for (i = 0; i < n; i++)
      y[c * n + i] = y[c * n + i] * (weight ? weight[c] : 1) + (bias ? bias[c] : 0);
}

//! max_pool
/* The largest value in each window; x [channels, in_h, in_w]. */
static void max_pool(const number* x, number* y, const window* w) {
  int c, i, j, ky, kx;
  for (c = 0; c < w->channels; c++, x += w->in_h * w->in_w)
    for (i = 0; i < w->out_h; i++)
      for (j = 0; j < w->out_w; j++) {
        number best = 0;
        int any = 0;
        for (ky = 0; ky < w->kernel_h; ky++)
          for (kx = 0; kx < w->kernel_w; kx++) {
            const int row = i * w->stride_h + ky * w->dilation_h - w->top;
            const int column = j * w->stride_w + kx * w->dilation_w - w->left;
            if (row < 0 || row >= w->in_h || column < 0 || column >= w->in_w) continue;
            if (!any || x[row * w->in_w + column] > best) best = x[row * w->in_w + column];
            any = 1;
          }
        *y++ = best;
      }
}

//! average_pool
/* The mean of each window; x [channels, in_h, in_w]. padded: zeros at the border count. divisor: in
   place of the count, or 0. */
static void average_pool(const float* x, float* y, const window* w, int padded, int divisor) {
  int c, i, j, row, column;
  for (c = 0; c < w->channels; c++, x += w->in_h * w->in_w)
    for (i = 0; i < w->out_h; i++)
      for (j = 0; j < w->out_w; j++) {
        int top = i * w->stride_h - w->top, left = j * w->stride_w - w->left;
        int end_y = top + w->kernel_h, end_x = left + w->kernel_w, count;
        float sum = 0;
        if (end_y > w->in_h + w->top) end_y = w->in_h + w->top;
        if (end_x > w->in_w + w->left) end_x = w->in_w + w->left;
        count = (end_y - top) * (end_x - left);
        if (top < 0) top = 0;
        if (left < 0) left = 0;
        if (end_y > w->in_h) end_y = w->in_h;
        if (end_x > w->in_w) end_x = w->in_w;
        if (!padded) count = (end_y - top) * (end_x - left);
        for (row = top; row < end_y; row++)
          for (column = left; column < end_x; column++) sum += x[row * w->in_w + column];
        *y++ = sum / (float)(divisor ? divisor : count);
      }
}

//! adaptive_average_pool
/* The means of out_h * out_w parts of each plane; x [channels, in_h, in_w]. */
static void adaptive_average_pool(const float* x, float* y, const window* w) {
  int c, i, j, row, column;
  for (c = 0; c < w->channels; c++, x += w->in_h * w->in_w)
    for (i = 0; i < w->out_h; i++)
      for (j = 0; j < w->out_w; j++) {
        const int top = i * w->in_h / w->out_h, left = j * w->in_w / w->out_w;
        const int end_y = ((i + 1) * w->in_h + w->out_h - 1) / w->out_h;
        const int end_x = ((j + 1) * w->in_w + w->out_w - 1) / w->out_w;
        float sum = 0;
        for (row = top; row < end_y; row++)
          for (column = left; column < end_x; column++) sum += x[row * w->in_w + column];
        *y++ = sum / (float)((end_y - top) * (end_x - left));
      }
}

//! softmax
/* Along the middle of [outer, n, inner]; logarithm: of the result. y may be x. */
static void softmax(const float* x, float* y, const int* sizes, int logarithm) {
  const int n = sizes[1], inner = sizes[2];
  int o, i, k;
  for (o = 0; o < sizes[0]; o++, x += n * inner, y += n * inner)
    for (i = 0; i < inner; i++) {
      float best = x[i], sum = 0;
      for (k = 1; k < n; k++)
        if (x[k * inner + i] > best) best = x[k * inner + i];
      for (k = 0; k < n; k++) {
        y[k * inner + i] = x[k * inner + i] - best;
        sum += expf(y[k * inner + i]);
      }
      for (k = 0; k < n; k++) {
        const float v = y[k * inner + i];
        y[k * inner + i] = logarithm ? v - logf(sum) : expf(v) / sum;
      }
    }
}

//! attention
/* softmax(scale * q k' + mask) v for each head. Steps between tokens and heads are in values. some:
   keys values for scratch. mask [heads or 1, queries, keys] is added, or 0. */
typedef struct {
  int heads, sharing, queries, keys, width, value_width, causal; /* sharing: heads per key head */
  int q_token, q_head, k_token, k_head, v_token, v_head, y_token, y_head, mask_head, mask_query;
} heads;

static void attention(const float* q, const float* k, const float* v, const float* mask, float* y,
                      float* some, const heads* a, float scale) {
  int h, i, j, c;
  for (h = 0; h < a->heads; h++)
    for (i = 0; i < a->queries; i++) {
      const float* query = q + h * a->q_head + i * a->q_token;
      float* out = y + h * a->y_head + i * a->y_token;
      const int keys = a->causal && i + 1 < a->keys ? i + 1 : a->keys;
      float best = 0, sum = 0;
      for (j = 0; j < keys; j++) {
        const float* key = k + h / a->sharing * a->k_head + j * a->k_token;
        float dot = 0;
        for (c = 0; c < a->width; c++) dot += query[c] * key[c];
        some[j] = dot * scale;
        if (mask) some[j] += mask[h * a->mask_head + i * a->mask_query + j];
        if (!j || some[j] > best) best = some[j];
      }
      for (j = 0; j < keys; j++) {
        some[j] = expf(some[j] - best);
        sum += some[j];
      }
      for (c = 0; c < a->value_width; c++) {
        const float* value = v + h / a->sharing * a->v_head + c;
        float dot = 0;
        for (j = 0; j < keys; j++) dot += some[j] * value[j * a->v_token];
        out[c] = dot / sum;
      }
    }
}

//! mat_mul
/* y [batch, m, n] = a [batch, m, k] b [batch, k, n]; a step of 0 gives all batches one matrix. */
static void mat_mul(const float* a, const float* b, float* y, const int* sizes) {
  const int m = sizes[1], k = sizes[2], n = sizes[3];
  int s, i, j, c;
  for (s = 0; s < sizes[0]; s++, a += sizes[4], b += sizes[5])
    for (i = 0; i < m; i++)
      for (j = 0; j < n; j++) {
        float sum = 0;
        for (c = 0; c < k; c++) sum += a[i * k + c] * b[c * n + j];
        *y++ = sum;
      }
}

//! walk
enum { RANK = 6 };

/* The next position of [shape], and where it lies: at += the steps of the dimensions that moved. */
static void walk(int* index, const int* shape, const int* steps, long* at) {
  int d = RANK - 1;
  for (; d >= 0; d--) {
    *at += steps[d];
    if (++index[d] < shape[d]) return;
    *at -= (long)steps[d] * shape[d];
    index[d] = 0;
  }
}

//! copy
/* y[to] = x[from] over all positions of shape; places[0..5] shape, [6..11] steps in x, [12..17] in
 * y. */
static void copy(const number* x, number* y, const int* places, size_t n) {
  int from_index[RANK] = {0}, to_index[RANK] = {0};
  long from = 0, to = 0;
  for (; n > 0; n--) {
    y[to] = x[from];
    walk(from_index, places, places + RANK, &from);
    walk(to_index, places, places + 2 * RANK, &to);
  }
}

//! fill
static void fill(number* y, number value, size_t n) {
  while (n--) *y++ = value;
}

//! pick
/* y[i] = x[table[i]]. */
static void pick(const number* x, number* y, const int32_t* table, size_t n) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = x[table[i]];
}

//! reduce_mean
/* Over the middle of [outer, n, inner]. */
static void reduce_mean(const float* x, float* y, const int* sizes) {
  const int n = sizes[1], inner = sizes[2];
  int o, i, k;
  for (o = 0; o < sizes[0]; o++, x += n * inner)
    for (i = 0; i < inner; i++) {
      float sum = 0;
      for (k = 0; k < n; k++) sum += x[k * inner + i];
      *y++ = sum / (float)n;
    }
}

//! reduce_sum
/* Over the middle of [outer, n, inner]. */
static void reduce_sum(const float* x, float* y, const int* sizes) {
  const int n = sizes[1], inner = sizes[2];
  int o, i, k;
  for (o = 0; o < sizes[0]; o++, x += n * inner)
    for (i = 0; i < inner; i++) {
      float sum = 0;
      for (k = 0; k < n; k++) sum += x[k * inner + i];
      *y++ = sum;
    }
}

//! reduce_max
/* Over the middle of [outer, n, inner]. */
static void reduce_max(const float* x, float* y, const int* sizes) {
  const int n = sizes[1], inner = sizes[2];
  int o, i, k;
  for (o = 0; o < sizes[0]; o++, x += n * inner)
    for (i = 0; i < inner; i++) {
      float best = x[i];
      for (k = 1; k < n; k++)
        if (x[k * inner + i] > best) best = x[k * inner + i];
      *y++ = best;
    }
}

//! round_to
/* Fixed point: x with `shift` bits more behind the point, rounded half up and saturated. y may be
 * x. */
static number floor_shift(number v, int shift) { return v < 0 ? ~(~v >> shift) : v >> shift; }

static void round_to(const number* x, number* y, int shift, number top, size_t n) {
  const number some = shift < 0 ? top >> -shift : 0, most = some ? some : 1;
  size_t i;
  for (i = 0; i < n; i++) {
    number v = x[i];
    if (shift > 0) v = floor_shift(v + ((number)1 << (shift - 1)), shift);
    if (shift < 0) v = (v > most ? most : v < -most ? -most : v) * ((number)1 << -shift);
    y[i] = v < -top ? -top : v > top - 1 ? top - 1 : v;
  }
}

//! affine_integer
/* Fixed point: y = x * scale + shift per channel, scale a whole number; x [channels, n]. y may be
 * x. */
static void affine_integer(const number* x, number* y, const number* scale, const number* shift,
                           int channels, int n) {
  int c, i;
  for (c = 0; c < channels; c++)
    for (i = 0; i < n; i++) y[c * n + i] = x[c * n + i] * scale[c] + shift[c];
}

//! relu_integer
/* y may be x. */
static void relu_integer(const number* x, number* y, size_t n) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = x[i] > 0 ? x[i] : 0;
}

//! scaled_integer
/* Fixed point: more bits behind the point. y may be x. */
static void scaled_integer(const number* x, number* y, number by, size_t n) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = x[i] * by;
}

//! sum_integer
/* y may be a or b. */
static void sum_integer(const number* a, const number* b, number* y, size_t n) {
  size_t i;
  for (i = 0; i < n; i++) y[i] = a[i] + b[i];
}

//! sum_pool_integer
/* The sums of out_h * out_w equal parts of each plane; x [channels, in_h, in_w]. */
static void sum_pool_integer(const number* x, number* y, const window* w) {
  int c, i, j, ky, kx;
  for (c = 0; c < w->channels; c++, x += w->in_h * w->in_w)
    for (i = 0; i < w->out_h; i++)
      for (j = 0; j < w->out_w; j++) {
        number sum = 0;
        for (ky = 0; ky < w->kernel_h; ky++)
          for (kx = 0; kx < w->kernel_w; kx++)
            sum += x[(i * w->stride_h + ky) * w->in_w + j * w->stride_w + kx];
        *y++ = sum;
      }
}
