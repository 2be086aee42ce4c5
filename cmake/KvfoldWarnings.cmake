# The warnings that kvfold's own code is held to, in one place.
set(KVFOLD_WARNINGS
  -Wall -Wextra -Wpedantic
  -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast
  -Wnon-virtual-dtor -Wdouble-promotion -Wundef)
if(KVFOLD_WERROR)
  list(APPEND KVFOLD_WARNINGS -Werror)
endif()

function(kvfold_enable_warnings target)
  target_compile_options(${target} PRIVATE ${KVFOLD_WARNINGS})
endfunction()
