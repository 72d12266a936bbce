# Everything that states the version agrees with include/fastv/version.hpp:  cmake -P cmake/check_version.cmake
cmake_minimum_required(VERSION 3.16)
get_filename_component(_root "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
file(READ ${_root}/include/fastv/version.hpp _version)
string(REGEX REPLACE ".*_MAJOR ([0-9]+).*_MINOR ([0-9]+).*_PATCH ([0-9]+).*" "\\1.\\2.\\3" _version "${_version}")
string(REGEX REPLACE "\\.[0-9]+$" "" _minor "${_version}")

# expect(FILE REGEX WANTED): every match of REGEX in FILE has WANTED as its group, and there is one.
function(expect file regex wanted)
  file(READ ${_root}/${file} _text)
  string(REGEX MATCHALL "${regex}" _matches "${_text}")
  if(NOT _matches)
    message(SEND_ERROR "${file} states no version where one is looked for: ${regex}")
  endif()
  foreach(_match IN LISTS _matches)
    string(REGEX REPLACE "${regex}" "\\1" _stated "${_match}")
    if(NOT _stated STREQUAL wanted)
      message(SEND_ERROR "${file} says \"${_match}\", but include/fastv/version.hpp says ${_version}")
    endif()
  endforeach()
endfunction()

expect(README.md "find_package\\(fastv ([0-9.]+)" ${_minor})
expect(cmake/packaging/vcpkg/vcpkg.json "\"version\": \"([0-9.]+)\"" ${_version})
expect(cmake/packaging/conan/conanfile.py "FASTV_VERSION_{part} (.)" "(")  # reads version.hpp itself
expect(cmake/fastv.pc.in "Version: ([^\n]*)" "@PROJECT_VERSION@")

# The changelog's newest entry. README's tags, where it states any.
file(READ ${_root}/.github/CHANGELOG.md _changes)
string(REGEX MATCH "\n## ([0-9.]+)" _ "${_changes}")
if(NOT CMAKE_MATCH_1 STREQUAL _version)
  message(SEND_ERROR ".github/CHANGELOG.md's newest entry is ${CMAKE_MATCH_1}, but include/fastv/version.hpp says ${_version}")
endif()
file(READ ${_root}/README.md _readme)
if(_readme MATCHES "GIT_TAG +v")
  expect(README.md "GIT_TAG +v([0-9.]+)" ${_version})
endif()
message(STATUS "fastv ${_version} everywhere")
