# Decides KVFOLD_ENABLE_ASSERTIONS once, on the library's target, so that all translation units of a program agree.
# KVFOLD_ASSERTIONS is ON, OFF or AUTO; AUTO means Debug configurations and kvfold's own sanitizer builds.
# Used by the build tree and, through the package file, by projects which find an installed kvfold.
function(kvfold_define_assertions target)
  if(NOT DEFINED KVFOLD_ASSERTIONS OR KVFOLD_ASSERTIONS STREQUAL "AUTO")
    set(enabled "$<CONFIG:Debug>")
    if(KVFOLD_SANITIZE)
      set(enabled 1)
    endif()
  elseif(KVFOLD_ASSERTIONS)
    set(enabled 1)
  else()
    set(enabled 0)
  endif()
  # BUILD_INTERFACE keeps the choice of this build out of the installed target: there the package file makes it anew.
  target_compile_definitions(${target} INTERFACE "$<BUILD_INTERFACE:KVFOLD_ENABLE_ASSERTIONS=${enabled}>")
endfunction()
