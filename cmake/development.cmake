# What our own tests, examples and benchmarks are built with. Users of the header inherit none of it.
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_EXTENSIONS OFF)

# Eigen's version file accepts only the same major version, so the version is checked by hand.
find_package(Eigen3 CONFIG REQUIRED)
if(Eigen3_VERSION VERSION_LESS 3.4)
  message(FATAL_ERROR "fastv's examples and tests need Eigen 3.4 or newer, found ${Eigen3_VERSION}")
endif()
find_package(nlohmann_json CONFIG REQUIRED)
find_package(OpenMP COMPONENTS CXX)

add_library(fastv_warnings INTERFACE)
if(MSVC)
  target_compile_options(fastv_warnings INTERFACE /W4 /permissive- /WX)
else()
  target_compile_options(fastv_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror)
endif()

add_library(fastv_native INTERFACE)
if(FASTV_NATIVE AND NOT MSVC)
  target_compile_options(fastv_native INTERFACE -march=native)
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
    # gcc 12's own AVX-512 intrinsics, which Eigen calls, trip these two (gcc bug 105593).
    target_compile_options(fastv_native INTERFACE -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
endif()

include(cmake/llama_cpp.cmake)
