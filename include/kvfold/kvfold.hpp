/// \file
/// kvfold: compresses the KV cache of large language models. Includes only, in pipeline order.
#pragma once

// clang-format off
#include "kvfold/version.hpp"

#include "kvfold/types.hpp"
#include "kvfold/status.hpp"

#include "kvfold/view/concepts.hpp"
#include "kvfold/view/strided.hpp"
#include "kvfold/view/paged.hpp"
#include "kvfold/view/sequences.hpp"
#include "kvfold/view/dlpack.hpp"
#include "kvfold/view/channel_rotation.hpp"

#include "kvfold/evidence/query_rows.hpp"
#include "kvfold/evidence/column_sums.hpp"
#include "kvfold/evidence/global_local_accumulator.hpp"

#include "kvfold/score/global_local_scorer.hpp"
#include "kvfold/score/streaming_llm_scorer.hpp"
#include "kvfold/score/column_scorers.hpp"

#include "kvfold/budget/uniform.hpp"
#include "kvfold/budget/adaptive_heads.hpp"

#include "kvfold/reduce/evict_only.hpp"
#include "kvfold/reduce/zero_class_batcher.hpp"
#include "kvfold/reduce/evict_then_merge.hpp"

#include "kvfold/apply.hpp"
#include "kvfold/compressor.hpp"
#include "kvfold/report_of_layers.hpp"
#include "kvfold/batch.hpp"
#include "kvfold/attend.hpp"

#include "kvfold/storage/elements.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/storage/ragged_cache.hpp"
#include "kvfold/storage/paged_cache.hpp"

#include "kvfold/exec/executor.hpp"
#include "kvfold/exec/workspace.hpp"
// clang-format on
