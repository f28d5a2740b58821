// The vectorised parts of paged attention. Compiled once an instruction set by for_each_simd.h.
//
// Two ways through a segment: `attend_stacked` for the queries of several rows at once, `attend_rows` for segments
// that only one row reads; the latter also merges what the former left in the partials and writes the result.
#include "vector_math_body.h"

#include "attention_tiles_body.h"

#include "attention_stacked_body.h"

#include "attention_block_body.h"

#include "attention_row_body.h"
