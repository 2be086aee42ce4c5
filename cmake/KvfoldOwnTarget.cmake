# What all of kvfold's own tests, benchmarks and examples are compiled with. Nothing here reaches a user's target.
include("${CMAKE_CURRENT_LIST_DIR}/KvfoldWarnings.cmake")

set(CMAKE_CXX_EXTENSIONS OFF)
set(KVFOLD_OWN_COMPILE_OPTIONS "")
set(KVFOLD_OWN_LINK_OPTIONS "")
if(KVFOLD_NATIVE)
  list(APPEND KVFOLD_OWN_COMPILE_OPTIONS -march=native)
elseif(KVFOLD_MARCH)
  list(APPEND KVFOLD_OWN_COMPILE_OPTIONS "-march=${KVFOLD_MARCH}")
endif()
if(KVFOLD_SANITIZE)
  list(JOIN KVFOLD_SANITIZE "," sanitizers)
  list(APPEND KVFOLD_OWN_COMPILE_OPTIONS
    "-fsanitize=${sanitizers}" -fno-sanitize-recover=all -fno-omit-frame-pointer)
  list(APPEND KVFOLD_OWN_LINK_OPTIONS "-fsanitize=${sanitizers}")
endif()
if((KVFOLD_NATIVE OR KVFOLD_MARCH OR KVFOLD_SANITIZE) AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # False alarms: in gcc's own header of AVX-512 intrinsics, and in instrumented code.
  list(APPEND KVFOLD_OWN_COMPILE_OPTIONS -Wno-maybe-uninitialized)
endif()

# For what depends on libraries that throw: the examples and their tests.
function(kvfold_own_target target)
  kvfold_enable_warnings(${target})
  target_compile_options(${target} PRIVATE ${KVFOLD_OWN_COMPILE_OPTIONS})
  target_link_options(${target} PRIVATE ${KVFOLD_OWN_LINK_OPTIONS})
endfunction()

# For what uses the library alone, which must do without exceptions and RTTI when asked to.
function(kvfold_own_core_target target)
  kvfold_own_target(${target})
  if(KVFOLD_NO_EXCEPTIONS)
    target_compile_options(${target} PRIVATE -fno-exceptions -fno-rtti)
  endif()
endfunction()
