// A reducer with all that a Compressor asks for. The compile-fail half leaves one member out: -DWITHOUT_REDUCE leaves
// out reduce().
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

struct MyReducer {
  struct Options {};
  explicit MyReducer(Options) noexcept {}
  MyReducer() = default;

#ifndef WITHOUT_VALIDATE
  kvfold::Status validate() const noexcept;
#endif
#ifndef WITHOUT_WORKSPACE_BYTES
  std::size_t workspace_bytes(const auto& view, kvfold::RowLimits limits, kvfold::Index workers) const noexcept;
#endif
#ifndef WITHOUT_REDUCE
  kvfold::Result<kvfold::CompressionPlan> reduce(const auto& view, const kvfold::ScoreTable& table,
                                                 std::span<const kvfold::Index> budgets, kvfold::Workspace workspace,
                                                 auto& executor) const noexcept;
#endif
};

using MyMethod = kvfold::Compressor<kvfold::StreamingLlmScorer, kvfold::UniformBudget, MyReducer>;

kvfold::Status plan(const kvfold::StridedView<float>& view, kvfold::Workspace workspace) {
  kvfold::SerialExecutor executor;
  return MyMethod().plan(view, kvfold::NoEvidence{}, workspace, executor).status();
}
