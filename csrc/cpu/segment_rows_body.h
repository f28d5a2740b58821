// Row passes before and after the products of the backward pass. Included by segment_attention_backward_body.h.

// delta = sum(dO O) of the rows [begin, end) of [T * Hq].
template <class T>
METAREWARD_INLINE void row_products_of(const GradientArguments& g, int64_t begin, int64_t end) {
  const SegmentArguments& a = g.shared;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row / a.query_heads, head = row % a.query_heads;
    const T* x = (const T*)g.grad.data + token * g.grad.token + head * g.grad.head;
    const T* y = (const T*)g.out.data + token * g.out.token + head * g.out.head;
    f32x16 sum = {};
    int64_t d = 0;
    for (; d + 16 <= a.dim; d += 16) sum += load16(x + d) * load16(y + d);
    if (d < a.dim) sum += load_part(x + d, a.dim - d, 0.0f) * load_part(y + d, a.dim - d, 0.0f);
    g.delta[row] = horizontal_sum(sum);
  }
}

static void row_products(const GradientArguments& g, int64_t begin, int64_t end) {
  if (g.shared.bf16) {
    row_products_of<uint16_t>(g, begin, end);
  } else {
    row_products_of<float>(g, begin, end);
  }
}

// dQ of one token: its partial sums, added in the order of the keys. readers: its segment's; the last are of keys of its
// own segment, perhaps after the token.
template <class T>
METAREWARD_INLINE void sum_partials_of(const GradientArguments& g, const Reader* readers, int64_t count, int64_t token) {
  const SegmentArguments& a = g.shared;
  while (count > 0 && readers[count - 1].begin > token) --count;
  for (int64_t head = 0; head < a.query_heads; ++head) {
    T* out = (T*)g.grad_query + (token * a.query_heads + head) * a.dim;
    for (int64_t d = 0; d < a.dim; d += 16) {
      f32x16 sum = {};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = readers[i].slot + token - readers[i].begin;
        sum += load16(g.partials + (row * a.query_heads + head) * a.padded + d);
      }
      sum *= a.scale;
      if (a.dim - d >= 16) {
        store16(out + d, sum);
      } else {
        store_part(out + d, sum, a.dim - d);
      }
    }
  }
}

static void sum_partials(const GradientArguments& g, const Reader* readers, int64_t count, int64_t token) {
  if (g.shared.bf16) {
    sum_partials_of<uint16_t>(g, readers, count, token);
  } else {
    sum_partials_of<float>(g, readers, count, token);
  }
}
