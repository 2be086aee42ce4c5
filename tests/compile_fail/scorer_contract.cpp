// A scorer with all that a Compressor asks for; the compile-fail half has no score().
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

struct MyScorer {
  struct Options {};
  MyScorer() = default;
  explicit MyScorer(Options) noexcept {}

  kvfold::Status validate() const noexcept;
  std::size_t workspace_bytes(const auto& view, const auto& evidence, kvfold::Index workers) const noexcept;
#ifndef KVFOLD_COMPILE_FAIL
  kvfold::Status score(const auto& view, const auto& evidence, kvfold::ScoreTable table, kvfold::Workspace workspace,
                       auto& executor) const noexcept;
#endif
};

using MyMethod = kvfold::Compressor<MyScorer, kvfold::UniformBudget, kvfold::EvictOnly>;

kvfold::Status plan(const kvfold::StridedView<float>& view, kvfold::Workspace workspace) {
  kvfold::SerialExecutor executor;
  return MyMethod().plan(view, kvfold::NoEvidence{}, workspace, executor).status();
}
