// The vectorised parts of paged attention. Compiled once an instruction set by for_each_simd.h.
//
// Two ways through a segment: `attend_stacked` for the queries of several rows at once, `attend_rows` for segments
// that only one row reads; the latter also merges what the former left in the partials and writes the result.
#include "vector_math_body.h"

#include "attention_tiles_body.h"

// Addresses of the tokens of a segment for one cache, in order; a division a page instead of one a token.
template <class T>
METAREWARD_INLINE void token_rows(
    const AttentionArguments& a, const void* pages, const int64_t* strides, int64_t segment, int64_t start,
    int64_t tokens, int64_t offset, const T** rows) {
  const int32_t* ids = a.page_ids + a.page_starts[segment] + start / a.page;
  int64_t slot = start % a.page;
  for (int64_t t = 0; t < tokens; ++ids, slot = 0) {
    const T* row = (const T*)pages + *ids * strides[0] + slot * strides[1] + offset;
    const int64_t end = tokens - t < a.page - slot ? tokens : t + a.page - slot;
    for (; t < end; ++t, row += strides[1]) rows[t] = row;
  }
}

#include "attention_stacked_body.h"

#include "attention_block_body.h"

#include "attention_row_body.h"
