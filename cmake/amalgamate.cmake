# The library as one file:
#   cmake [-DADAPTORS="eigen ggml"] [-DOUT=fastv.hpp] -P cmake/amalgamate.cmake
#   cmake -DADAPTORS=cuda -DOUT=fastv.cuh -P cmake/amalgamate.cmake
# Every header once, in the order of their includes; the adaptors asked for behind the core.
cmake_minimum_required(VERSION 3.16)
get_filename_component(_root "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
if(NOT DEFINED OUT)
  set(OUT fastv.hpp)
endif()
string(REPLACE " " ";" _adaptors "${ADAPTORS}")
set(_seen "")
set(_text "")

# Appends a header to _text, each #include "..." in it replaced by that header. detail/begin.hpp and end.hpp, which stand
# in every header, stand once around the whole file.
function(append name)
  get_filename_component(_folder ${name} DIRECTORY)
  if(name MATCHES "detail/(begin|end).hpp$" OR name IN_LIST _seen)
    return()
  endif()
  list(APPEND _seen ${name})
  set(_path ${_root}/include/fastv/${name})
  if(NOT EXISTS ${_path})
    message(FATAL_ERROR "There is no ${_path}: ADAPTORS names headers of include/fastv without .hpp or .cuh")
  endif()
  file(READ ${_path} _rest)
  string(REPLACE "#pragma once\n" "" _rest "${_rest}")
  while(TRUE)
    string(FIND "${_rest}" "#include \"" _at)
    if(_at EQUAL -1)
      break()
    endif()
    string(SUBSTRING "${_rest}" 0 ${_at} _before)
    string(SUBSTRING "${_rest}" ${_at} -1 _rest)
    string(FIND "${_rest}" "\n" _end)
    string(SUBSTRING "${_rest}" 0 ${_end} _line)
    math(EXPR _end "${_end} + 1")
    string(SUBSTRING "${_rest}" ${_end} -1 _rest)
    string(REGEX REPLACE "#include \"([^\"]*)\".*" "\\1" _included "${_line}")
    string(APPEND _text "${_before}")
    # Names are relative to the including header's folder; _seen has them relative to include/fastv.
    get_filename_component(_included ${_root}/include/fastv/${_folder}/${_included} ABSOLUTE)
    file(RELATIVE_PATH _included ${_root}/include/fastv ${_included})
    append(${_included})
  endwhile()
  string(APPEND _text "${_rest}")
  set(_text "${_text}" PARENT_SCOPE)
  set(_seen "${_seen}" PARENT_SCOPE)
endfunction()

file(READ ${_root}/include/fastv/detail/begin.hpp _begin)
file(READ ${_root}/include/fastv/detail/end.hpp _end)
append(fastv.hpp)
# The kernels first: torch_device.hpp, which includes them for nvcc alone, then finds them there.
if("cuda" IN_LIST _adaptors)
  list(REMOVE_ITEM _adaptors cuda)
  list(INSERT _adaptors 0 cuda)
endif()
foreach(_adaptor IN LISTS _adaptors)
  if(_adaptor STREQUAL "cuda")
    append(cuda.cuh)
  else()
    append(${_adaptor}.hpp)
  endif()
endforeach()

file(READ ${_root}/include/fastv/version.hpp _version)
string(REGEX REPLACE ".*_MAJOR ([0-9]+).*_MINOR ([0-9]+).*_PATCH ([0-9]+).*" "\\1.\\2.\\3" _version "${_version}")
file(READ ${_root}/LICENSE _licence)
string(REGEX REPLACE "\n+$" "" _licence "${_licence}")
string(REPLACE "\n" "\n// " _licence "// ${_licence}")
string(REPLACE "// \n" "//\n" _licence "${_licence}")
file(WRITE ${OUT} "// fastv ${_version} in one file, made by cmake/amalgamate.cmake of its repository. Do not edit: change the headers there.
//
${_licence}
#pragma once
#if defined(FASTV_VERSION_MAJOR)
#error \"fastv is here already: include either this one file, from one place, or the headers of include/fastv\"
#endif

${_begin}
${_text}
${_end}")
message(STATUS "fastv ${_version} is in ${OUT}")
