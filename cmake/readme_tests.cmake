# README.md held to what it says: every ```cpp and ```c block compiles, and every block of printed lines is what a program
# prints.
#
# A block with an #include is a program of its own, which examples/minimal.cpp ends with. Any other is a fragment: it becomes
# the body of a function that sees the names which tests/readme/context.hpp declares, or engine_context.hpp where the text
# since the last block names the engine's adaptor (c_context.h, where it is C99; cuda_context.hpp, for nvcc); or, where it starts
# with a declaration of a type or template, it stands at namespace scope behind them.
if(CMAKE_SCRIPT_MODE_FILE AND DEFINED PROGRAM_TEXT)
  # -DPROGRAM_TEXT=file -DSOURCE=file -P: is the block the end of the source?
  file(READ ${PROGRAM_TEXT} _block)
  file(READ ${SOURCE} _source)
  string(FIND "${_source}" "${_block}" _at)
  if(_at EQUAL -1)
    message(FATAL_ERROR "README.md shows a program that is not that of ${SOURCE}:\n${_block}")
  endif()
  return()
elseif(CMAKE_SCRIPT_MODE_FILE)
  # -DPROGRAM=... -DEXPECTED=file -P: do the lines of EXPECTED come one after another in what PROGRAM prints? Times vary,
  # and with them their width and their ratio.
  execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE _printed RESULT_VARIABLE _result)
  file(READ ${EXPECTED} _expected)
  foreach(_text _printed _expected)
    string(REGEX REPLACE "[0-9.]+ ms( \\([0-9]+%\\))?" "# ms" ${_text} "${${_text}}")
    string(REGEX REPLACE " +" " " ${_text} "${${_text}}")
    string(REGEX REPLACE " *\n" "\n" ${_text} "${${_text}}")
  endforeach()
  string(FIND "${_printed}" "${_expected}" _at)
  if(NOT _result EQUAL 0 OR _at EQUAL -1)
    message(FATAL_ERROR "README.md shows\n${_expected}\nbut ${PROGRAM} prints\n${_printed}(status ${_result})")
  endif()
  return()
endif()

# Which program prints the block that begins so. Where none does so quickly, the block shows up as a skipped test.
set(_programs "layers 0-1 ran" minimal "Question  " scenes_demo)

set(_readme ${PROJECT_SOURCE_DIR}/README.md)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${_readme} ${PROJECT_SOURCE_DIR}/tests/readme)
set(_folder ${CMAKE_CURRENT_BINARY_DIR}/readme)

set(_engine_includes "")
foreach(_folder_of_engine ${FASTV_GGML_INCLUDES})
  list(APPEND _engine_includes -isystem ${_folder_of_engine})
endforeach()

function(add_cpp_block line code before)
  set(_context context)
  set(_needs "")
  set(_compiler ${CMAKE_CXX_COMPILER} -std=c++17 -fsyntax-only -Wall -Wextra -Wpedantic -Wconversion -Werror -Wno-unused)
  if(before MATCHES "fastv/cuda\\.cuh")
    set(_context cuda_context)
    set(_needs cuda)
    set(_compiler nvcc -std=c++17 -x cu -Werror all-warnings -o /dev/null -c)
  elseif(before MATCHES "fastv/(ggml|torch)\\.hpp")
    set(_context ${CMAKE_MATCH_1}_context)
    set(_needs ${CMAKE_MATCH_1})
  endif()
  if(code MATCHES "#include")
    set(_source "#line ${line} \"README.md\"\n${code}")
    file(WRITE ${_folder}/line_${line}.txt "${code}")
    add_test(NAME readme.program_${line} COMMAND ${CMAKE_COMMAND} -DPROGRAM_TEXT=${_folder}/line_${line}.txt
      -DSOURCE=${PROJECT_SOURCE_DIR}/examples/minimal.cpp -P ${PROJECT_SOURCE_DIR}/cmake/readme_tests.cmake)
    set_tests_properties(readme.program_${line} PROPERTIES LABELS readme)
  elseif(code MATCHES "^(//[^\n]*\n)*(template|struct|class|namespace)")
    set(_source "#include \"${_context}.hpp\"\n#line ${line} \"README.md\"\n${code}")
  else()
    set(_source "#include \"${_context}.hpp\"\nint readme_block();\nint readme_block() {\n#line ${line} \"README.md\"\n${code}return 0;\n}\n")
  endif()
  file(WRITE ${_folder}/line_${line}.cpp "${_source}")
  add_test(NAME readme.line_${line} COMMAND sh -c
    "case $NEEDS in
       '') ;;
       cuda) command -v nvcc >/dev/null || { echo NOT TESTED HERE: nvcc is not installed; exit 77; } ;;
       *) echo \"#include <fastv/$NEEDS.hpp>\" | $0 \"$@\" -x c++ - 2>/dev/null ||
            { echo NOT TESTED HERE: fastv/$NEEDS.hpp or its engine is not installed; exit 77; } ;;
     esac
     exec $0 \"$@\" $BLOCK"
    ${_compiler}
    -I${PROJECT_SOURCE_DIR}/include -I${PROJECT_SOURCE_DIR}/tests/readme ${_engine_includes})
  set_tests_properties(readme.line_${line} PROPERTIES LABELS readme SKIP_RETURN_CODE 77
    ENVIRONMENT "NEEDS=${_needs};BLOCK=${_folder}/line_${line}.cpp")
endfunction()

function(add_c_block line code)
  file(WRITE ${_folder}/line_${line}.c
    "#include \"c_context.h\"\nint readme_block(void);\nint readme_block(void) {\n#line ${line} \"README.md\"\n${code}return 0;\n}\n")
  add_test(NAME readme.line_${line} COMMAND ${CMAKE_C_COMPILER} -std=c99 -fsyntax-only -Wall -Wextra -Wpedantic -Wconversion
    -Werror -Wno-unused -I${PROJECT_SOURCE_DIR}/include -I${PROJECT_SOURCE_DIR}/tests/readme ${_folder}/line_${line}.c)
  set_tests_properties(readme.line_${line} PROPERTIES LABELS readme)
endfunction()

function(add_printed_block line text)
  list(LENGTH _programs _left)
  set(_found "")
  foreach(_at RANGE 0 ${_left} 2)
    if(_at LESS _left)
      list(GET _programs ${_at} _begin)
      string(FIND "${text}" "${_begin}" _where)
      if(_where EQUAL 0)
        math(EXPR _next "${_at} + 1")
        list(GET _programs ${_next} _found)
      endif()
    endif()
  endforeach()
  file(WRITE ${_folder}/line_${line}.txt "${text}")
  if(_found AND TARGET ${_found})
    add_test(NAME readme.prints_${line} COMMAND ${CMAKE_COMMAND} -DPROGRAM=$<TARGET_FILE:${_found}>
      -DEXPECTED=${_folder}/line_${line}.txt -P ${PROJECT_SOURCE_DIR}/cmake/readme_tests.cmake)
  else()
    add_test(NAME readme.prints_${line} COMMAND ${CMAKE_COMMAND} -E echo
      "NOT TESTED HERE: no program of this build that README.md line ${line} was copied from is known to readme_tests.cmake")
    set_tests_properties(readme.prints_${line} PROPERTIES SKIP_REGULAR_EXPRESSION "NOT TESTED HERE")
  endif()
  set_tests_properties(readme.prints_${line} PROPERTIES LABELS readme)
endfunction()

# Walks the fences. Not by lines, since CMake's lists do not take every line as it is.
file(READ ${_readme} _rest)
set(_line 1)
set(_blocks 0)
while(TRUE)
  string(FIND "${_rest}" "\n```" _at)
  if(_at EQUAL -1)
    break()
  endif()
  math(EXPR _at "${_at} + 1")
  string(SUBSTRING "${_rest}" 0 ${_at} _before)
  string(SUBSTRING "${_rest}" ${_at} -1 _rest)
  string(FIND "${_rest}" "\n" _end)
  math(EXPR _length "${_end} - 3")
  string(SUBSTRING "${_rest}" 3 ${_length} _language)
  string(STRIP "${_language}" _language)
  math(EXPR _end "${_end} + 1")
  string(SUBSTRING "${_rest}" ${_end} -1 _rest)
  string(REGEX REPLACE "[^\n]" "" _newlines "${_before}")
  string(LENGTH "${_newlines}" _passed)
  math(EXPR _line "${_line} + ${_passed} + 1")
  string(FIND "${_rest}" "\n```" _end)
  math(EXPR _end "${_end} + 1")
  string(SUBSTRING "${_rest}" 0 ${_end} _code)
  math(EXPR _end "${_end} + 3")
  string(SUBSTRING "${_rest}" ${_end} -1 _rest)
  if(_language STREQUAL "cpp")
    add_cpp_block(${_line} "${_code}" "${_before}")
    math(EXPR _blocks "${_blocks} + 1")
  elseif(_language STREQUAL "c")
    add_c_block(${_line} "${_code}")
  elseif(_language STREQUAL "")
    add_printed_block(${_line} "${_code}")
  endif()
  string(REGEX REPLACE "[^\n]" "" _newlines "${_code}")
  string(LENGTH "${_newlines}" _passed)
  math(EXPR _line "${_line} + ${_passed}")
endwhile()
if(_blocks EQUAL 0)
  message(FATAL_ERROR "readme_tests.cmake found no \`\`\`cpp block in README.md")
endif()
