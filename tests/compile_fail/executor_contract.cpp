// An executor with all that plan() asks for. The compile-fail half leaves one member out: -DWITHOUT_RUN leaves out
// run().
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

struct MyExecutor {
#ifndef WITHOUT_CONCURRENCY
  kvfold::Index concurrency() const noexcept;
#endif
#ifndef WITHOUT_RUN
  void run(kvfold::Index n, kvfold::TaskRef task) noexcept;
#endif
};

kvfold::Status plan(const kvfold::StridedView<float>& view, kvfold::Workspace workspace, MyExecutor& executor) {
  return kvfold::StreamingLlm().plan(view, kvfold::NoEvidence{}, workspace, executor).status();
}
