// A scorer with all that a Compressor asks for. The compile-fail half leaves one member out: -DWITHOUT_SCORE leaves out
// score().
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

struct MyScorer {
  struct Options {};
  explicit MyScorer(Options) noexcept {}
  MyScorer() = default;

#ifndef WITHOUT_VALIDATE
  kvfold::Status validate() const noexcept;
#endif
#ifndef WITHOUT_WORKSPACE_BYTES
  std::size_t workspace_bytes(const auto& view, const auto& evidence, kvfold::Index workers) const noexcept;
#endif
#ifndef WITHOUT_SCORE
  kvfold::Status score(const auto& view, const auto& evidence, kvfold::ScoreTable table, kvfold::Workspace workspace,
                       auto& executor) const noexcept;
#endif
};

using MyMethod = kvfold::Compressor<MyScorer, kvfold::UniformBudget, kvfold::EvictOnly>;

kvfold::Status plan(const kvfold::StridedView<float>& view, kvfold::Workspace workspace) {
  kvfold::SerialExecutor executor;
  return MyMethod().plan(view, kvfold::NoEvidence{}, workspace, executor).status();
}
