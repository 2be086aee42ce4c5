// Evidence that a method understands; in the compile-fail half, a struct of the engine's own, which it does not.
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

#ifdef KVFOLD_COMPILE_FAIL
struct MyEvidence {};
#else
using MyEvidence = kvfold::QueryRows;
#endif

#ifdef WITH_EMS
using Method = kvfold::Ems;
#else
using Method = kvfold::SnapKv;
#endif

kvfold::Status plan(const kvfold::StridedView<float>& view, const MyEvidence& evidence, kvfold::Workspace workspace) {
  kvfold::SerialExecutor executor;
  return Method().plan(view, evidence, workspace, executor).status();
}
