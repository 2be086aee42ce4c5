// A budget policy with all that a Compressor asks for. The compile-fail half leaves one member out: -DWITHOUT_LIMITS
// leaves out limits().
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

struct MyBudget {
  struct Options {};
  explicit MyBudget(Options) noexcept {}
  MyBudget() = default;

#ifndef WITHOUT_VALIDATE
  kvfold::Status validate() const noexcept;
#endif
#ifndef WITHOUT_LIMITS
  kvfold::RowLimits limits(kvfold::Index heads) const noexcept;
#endif
#ifndef WITHOUT_WORKSPACE_BYTES
  std::size_t workspace_bytes(kvfold::Index rows) const noexcept;
#endif
#ifndef WITHOUT_ALLOCATE
  kvfold::Status allocate(std::span<const kvfold::ScoreTable> tables, std::span<kvfold::Index> budgets,
                          kvfold::Workspace workspace) const noexcept;
#endif
};

using MyMethod = kvfold::Compressor<kvfold::StreamingLlmScorer, MyBudget, kvfold::EvictOnly>;

kvfold::Status plan(const kvfold::StridedView<float>& view, kvfold::Workspace workspace) {
  kvfold::SerialExecutor executor;
  return MyMethod().plan(view, kvfold::NoEvidence{}, workspace, executor).status();
}
