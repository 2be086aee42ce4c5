# Builds and runs the project in this folder as two strangers would: from an installed kvfold, and with kvfold as a subdirectory.
set(consumer_build_dir "${CMAKE_CURRENT_BINARY_DIR}/consumer")
set(consumer_prefix "${consumer_build_dir}/prefix")

function(kvfold_add_consumer_test name)
  add_test(NAME consumer/${name}
    COMMAND ${CMAKE_CTEST_COMMAND}
      --build-and-test "${CMAKE_CURRENT_SOURCE_DIR}/consumer" "${consumer_build_dir}/${name}"
      --build-generator "${CMAKE_GENERATOR}"
      --build-makeprogram "${CMAKE_MAKE_PROGRAM}"
      --build-options
        "-DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}"
        "-DCMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER}"
        ${ARGN}
      --test-command kvfold_consumer)
  set_tests_properties(consumer/${name} PROPERTIES TIMEOUT 300 LABELS consumer)
endfunction()

kvfold_add_consumer_test(subdirectory "-DKVFOLD_SUBDIRECTORY=${PROJECT_SOURCE_DIR}")

if(KVFOLD_INSTALL)
  add_test(NAME consumer/install
    COMMAND ${CMAKE_COMMAND} --install "${PROJECT_BINARY_DIR}" --config $<CONFIG> --prefix "${consumer_prefix}")
  set_tests_properties(consumer/install PROPERTIES FIXTURES_SETUP kvfold_installed TIMEOUT 60 LABELS consumer)
  kvfold_add_consumer_test(find_package
    "-DCMAKE_PREFIX_PATH=${consumer_prefix}" "-DKVFOLD_EXPECTED_VERSION=${PROJECT_VERSION}")
  set_tests_properties(consumer/find_package PROPERTIES FIXTURES_REQUIRED kvfold_installed)
endif()
