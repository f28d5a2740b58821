// Attention of a step in two parts: what its rows read is cut up once, and attended to once a layer.
#pragma once

#include <memory>

#include "../ops.h"

namespace metareward {

struct AttentionWork;

// The arguments are those of `paged_attention`; of query and pages, only shapes, strides and dtype count. Checks all of
// them, indices included.
std::shared_ptr<AttentionWork> plan_attention(
    Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_ids, Tensor page_starts, Tensor lengths,
    Tensor rows, Tensor row_starts, Tensor limits, double scale);

// [T,Hq,D]. Not for two threads at once: the work has room for one layer's sums.
Tensor attend(AttentionWork& work, Tensor query, Tensor key_pages, Tensor value_pages);

}  // namespace metareward
