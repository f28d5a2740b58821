// One row at a time: the segments that only this row reads, the merge with what other passes left in the partials,
// and the result. Included by paged_attention_body.h.
//
// Bound by reading the cache (two multiply-adds an element): all key heads of a block of tokens are taken together,
// because they lie together, and the next block is prefetched meanwhile.

// Where reading stands: token `start` of the segment of entry a.row_entries[position].
struct RowCursor {
  int64_t position, start;
};

METAREWARD_INLINE bool inlined(const AttentionArguments& a, int64_t entry) {
  return a.slots[entry] < 0 && a.limits[entry] > 0;
}

// Tokens of a segment from at.start on, at most ROW_TOKENS of them and none from `end` on; moves the cursor.
template <class T>
METAREWARD_INLINE void take_tokens(
    const AttentionArguments& a, RowCursor& at, int64_t segment, int64_t end, RowBlock<T>& block) {
  block.tokens = end - at.start < ROW_TOKENS ? end - at.start : ROW_TOKENS;
  token_rows(a, a.key_pages, a.key_strides, segment, at.start, block.tokens, 0, block.keys);
  token_rows(a, a.value_pages, a.value_strides, segment, at.start, block.tokens, 0, block.values);
  for (int64_t t = block.tokens; t < ROW_TOKENS; ++t)  // addresses that may be prefetched
    block.keys[t] = block.values[t] = (const T*)a.zeros;
  at.start += block.tokens;
}

// The tokens at the cursor, or none when it has passed `end`; moves the cursor to the next block.
template <class T>
METAREWARD_INLINE void take_block(const AttentionArguments& a, RowCursor& at, int64_t end, RowBlock<T>& block) {
  while (at.position < end && !inlined(a, a.row_entries[at.position])) ++at.position;
  block.tokens = 0;
  if (at.position >= end) {
    for (int64_t t = 0; t < ROW_TOKENS; ++t) block.keys[t] = block.values[t] = (const T*)a.zeros;
    return;
  }
  const int64_t entry = a.row_entries[at.position];
  take_tokens(a, at, a.segment_of[entry], a.limits[entry], block);
  if (at.start == a.limits[entry]) at = {at.position + 1, 0};
}

// Query heads [begin, end) of `row`, of all the key heads from that of `begin` to that of the last.
template <class T>  // not inlined: it has two callers and is most of the code
static __attribute__((noinline)) void attend_heads(
    const AttentionArguments& a, const RowBlock<T>& block, const RowBlock<T>& next, int64_t row, int64_t begin,
    int64_t end, const RowState& state) {
  const int64_t head_begin = begin / a.group, head_end = (end - 1) / a.group + 1, heads = head_end - head_begin;
  for (int64_t head = head_begin; head < head_end; ++head) {
#if defined(METAREWARD_AVX512_BF16)
    constexpr bool spread = sizeof(T) == 2;  // attend_pairs prefetches between its instructions
#else
    constexpr bool spread = false;
#endif
    const int64_t part = head - head_begin;  // a part of the next block at each head
    for (int64_t t = next.tokens * part / heads; !spread && t < next.tokens * (part + 1) / heads; ++t) {
      prefetch_heads(next.keys[t], head_begin, head_end, a.key_strides[2], a.dim);
      prefetch_heads(next.values[t], head_begin, head_end, a.value_strides[2], a.dim);
    }
    const int64_t last = (head + 1) * a.group < end ? (head + 1) * a.group : end;
    for (int64_t h = head * a.group > begin ? head * a.group : begin; h < last;) {
      switch (last - h) {
        case 1: attend_block<T, 1>(a, block, next, row, h, state); h += 1; break;
        case 2: attend_block<T, 2>(a, block, next, row, h, state); h += 2; break;
        case 3: attend_block<T, 3>(a, block, next, row, h, state); h += 3; break;
        default: attend_block<T, 4>(a, block, next, row, h, state); h += 4;
      }
    }
  }
}

// Adds one piece's partial sums for query heads [begin, end) to the state, by log-sum-exp.
METAREWARD_INLINE void merge_partial(
    const AttentionArguments& a, int64_t slot, int64_t begin, int64_t end, const RowState& state) {
  for (int64_t h = begin; h < end; ++h) {
    const int64_t place = slot * a.query_heads + h;
    const float top = a.statistics[2 * place], sum = a.statistics[2 * place + 1];
    const float* partial = a.partials + place * a.padded;
    float* acc = state.acc + h * a.padded;
    if (!(top > -__builtin_inff()) && top == top) continue;  // saw nothing
    const float new_top = top > state.top[h] ? top : state.top[h];
    f32x16 weight = {state.top[h] - new_top, top - new_top};
    weight = exp2_16(weight);
    state.top[h] = new_top;
    state.sum[h] = state.sum[h] * weight[0] + f32x16{sum * weight[1]};
    for (int64_t d = 0; d < a.dim; d += 16)
      store16(acc + d, load16(acc + d) * weight[0] + load16(partial + d) * weight[1]);
  }
}

template <class T>
METAREWARD_INLINE void start_row(
    const AttentionArguments& a, int64_t row, int64_t begin, int64_t end, const RowState& state) {
  const float sign = a.negative ? -1.0f : 1.0f;
  const T* query = (const T*)a.query + row * a.query_heads * a.dim;
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t d = 0; d < a.padded; d += 16) store16(state.acc + h * a.padded + d, f32x16{});
#if !defined(METAREWARD_AVX512_BF16)
    constexpr bool floats = true;
#else
    constexpr bool floats = sizeof(T) == sizeof(float);
#endif
    if (floats) {
      float* q = state.q + h * a.padded;
      int64_t d = 0;
      for (; d + 16 <= a.dim; d += 16) store16(q + d, load16(query + h * a.dim + d) * sign);
      if (d < a.dim) store16(q + d, load_part(query + h * a.dim + d, a.dim - d, 0.0f) * sign);
    }
    state.top[h] = -__builtin_inff();
    state.sum[h] = f32x16{};
  }
}

// Units [unit_begin, unit_end), a unit being (row, key head): reads, merges and writes the result.
template <class T>
METAREWARD_INLINE void attend_rows_of(
    const AttentionArguments& a, int64_t unit_begin, int64_t unit_end, float* scratch) {
  const RowState state = row_state(a, scratch);
  RowBlock<T> blocks[2];
  int now = 0;
  RowCursor ahead = {a.row_entry_starts[unit_begin / a.kv_heads], 0};
  const int64_t last = a.row_entry_starts[(unit_end - 1) / a.kv_heads + 1];
  take_block(a, ahead, last, blocks[now]);
  for (int64_t unit = unit_begin; unit < unit_end;) {
    const int64_t row = unit / a.kv_heads, head_begin = unit % a.kv_heads;
    const int64_t left = unit_end - row * a.kv_heads, head_end = left < a.kv_heads ? left : a.kv_heads;
    const int64_t begin = head_begin * a.group, end = head_end * a.group;
    start_row<T>(a, row, begin, end, state);
    for (int64_t i = a.row_entry_starts[row]; i < a.row_entry_starts[row + 1]; ++i) {
      const int64_t entry = a.row_entries[i];
      if (inlined(a, entry)) {
        for (int64_t start = 0; start < a.limits[entry]; start += ROW_TOKENS, now ^= 1) {
          take_block(a, ahead, last, blocks[now ^ 1]);
          attend_heads(a, blocks[now], blocks[now ^ 1], row, begin, end, state);
        }
      } else {
        for (int64_t start = 0; start < a.limits[entry]; start += a.chunk)
          merge_partial(a, a.slots[entry] + start / a.chunk, begin, end, state);
      }
    }
    T* out = (T*)a.out + row * a.query_heads * a.dim;
    for (int64_t h = begin; h < end; ++h) {
      const bool seen = state.top[h] != -__builtin_inff();
      const float inverse = seen ? 1.0f / horizontal_sum(state.sum[h]) : 0.0f;
      for (int64_t d = 0; d < a.dim; d += 16) {
        const f32x16 x = load16(state.acc + h * a.padded + d) * inverse;
        if (a.dim - d >= 16) {
          store16(out + h * a.dim + d, x);
        } else {
          store_part(out + h * a.dim + d, x, a.dim - d);
        }
      }
    }
    unit += head_end - head_begin;
  }
}

// The part [u.token_begin, u.token_end) of a segment for the few queries of a unit, into the partials.
template <class T>
METAREWARD_INLINE void attend_few_of(const AttentionArguments& a, const AttentionUnit& u, float* scratch) {
  const RowState state = row_state(a, scratch);
  const int64_t last = u.first + u.stacked + u.few;
  for (int64_t query = u.first + u.stacked, next; query < last; query = next) {
    const int64_t entry = u.entry + query / a.group, row = a.rows[entry], limit = a.limits[entry];
    next = (query / a.group + 1) * a.group < last ? (query / a.group + 1) * a.group : last;
    const int64_t begin = u.head * a.group + query % a.group, end = begin + next - query;
    const int64_t token_end = limit < u.token_end ? limit : u.token_end;
    if (token_end <= u.token_begin) continue;
    start_row<T>(a, row, begin, end, state);
    RowBlock<T> blocks[2];
    RowCursor ahead = {0, u.token_begin};
    take_tokens(a, ahead, u.segment, token_end, blocks[0]);
    for (int now = 0; blocks[now].tokens > 0; now ^= 1) {
      take_tokens(a, ahead, u.segment, token_end, blocks[now ^ 1]);
      attend_heads(a, blocks[now], blocks[now ^ 1], row, begin, end, state);
    }
    const int64_t slot = a.slots[entry] + u.token_begin / a.chunk;
    for (int64_t h = begin; h < end; ++h) {
      const int64_t place = slot * a.query_heads + h;
      a.statistics[2 * place] = state.top[h];
      a.statistics[2 * place + 1] = horizontal_sum(state.sum[h]);
      for (int64_t d = 0; d < a.dim; d += 16)
        store16(a.partials + place * a.padded + d, load16(state.acc + h * a.padded + d));
    }
  }
}

static void attend_few(const AttentionArguments& a, const AttentionUnit& u, float* scratch) {
  if (a.bf16) {
    attend_few_of<uint16_t>(a, u, scratch);
  } else {
    attend_few_of<float>(a, u, scratch);
  }
}

static void attend_rows(const AttentionArguments& a, int64_t unit_begin, int64_t unit_end, float* scratch) {
  if (a.bf16) {
    attend_rows_of<uint16_t>(a, unit_begin, unit_end, scratch);
  } else {
    attend_rows_of<float>(a, unit_begin, unit_end, scratch);
  }
}
