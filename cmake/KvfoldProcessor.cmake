# Whether this machine's processor can run code for x86-64-v3, and whether it has instructions beyond these that kvfold has code
# for. Neither is set where everything is compiled for this processor anyway.
if(NOT KVFOLD_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  include(CheckCXXSourceRuns)
  set(CMAKE_REQUIRED_FLAGS -march=x86-64-v3)
  check_cxx_source_runs("int main() { return __builtin_cpu_supports(\"avx2\") ? 0 : 1; }" KVFOLD_RUNS_X86_64_V3)
  set(CMAKE_REQUIRED_FLAGS -march=native)
  check_cxx_source_runs("
    #if !defined(__AVX512BW__) && !defined(__AVXVNNI__)
    #error This processor has neither.
    #endif
    int main() {}" KVFOLD_RUNS_MORE_THAN_X86_64_V3)
  unset(CMAKE_REQUIRED_FLAGS)
endif()
