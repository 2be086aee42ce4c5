// An executor with all that plan() asks for; the compile-fail half has no run().
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

struct MyExecutor {
  kvfold::Index concurrency() const noexcept;
#ifndef KVFOLD_COMPILE_FAIL
  void run(kvfold::Index n, kvfold::TaskRef task) noexcept;
#endif
};

kvfold::Status plan(const kvfold::StridedView<float>& view, kvfold::Workspace workspace, MyExecutor& executor) {
  return kvfold::StreamingLlm().plan(view, kvfold::NoEvidence{}, workspace, executor).status();
}
