# What our own programs are compiled with; none of it reaches a user's target. Each option is for C++ alone: another language's
# compiler knows others.
function(hybridattn_development_options)
  foreach(option ${ARGN})
    target_compile_options(hybridattn_development INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${option}>)
  endforeach()
endfunction()

add_library(hybridattn_development INTERFACE)
target_link_libraries(hybridattn_development INTERFACE hybridattn)
hybridattn_development_options(-Wall -Wextra -Wconversion)
if(HYBRIDATTN_NATIVE)
  hybridattn_development_options(-march=native)
  # g++ 12 does not know Zen 4 and later: it tunes them as their ancestor, and halves the vectors.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13 AND CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
    include(CheckCXXSourceCompiles)
    set(CMAKE_REQUIRED_FLAGS "-march=native")
    check_cxx_source_compiles("#ifndef __AVX512F__\n#error\n#endif\nint main() {}" HYBRIDATTN_HAS_AVX512)
    unset(CMAKE_REQUIRED_FLAGS)
    if(HYBRIDATTN_HAS_AVX512)
      hybridattn_development_options(-mtune=icelake-server -mprefer-vector-width=512)
    endif()
  endif()
endif()
