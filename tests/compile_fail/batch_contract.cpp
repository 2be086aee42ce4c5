// A batch of views that can be written; in the compile-fail half they are const.
#include <kvfold/batch.hpp>
#include <kvfold/view/strided.hpp>

#ifdef KVFOLD_COMPILE_FAIL
using View = const kvfold::StridedView<float>;
#else
using View = kvfold::StridedView<float>;
#endif

kvfold::Status compress(std::span<View> views, std::span<const kvfold::QueryRows> queries,
                        std::span<kvfold::Result<kvfold::CompressionReport>> results, kvfold::Workspace workspace) {
  kvfold::SerialExecutor executor;
  return kvfold::compress_batch(kvfold::SnapKv(), views, queries, results, workspace, executor);
}
