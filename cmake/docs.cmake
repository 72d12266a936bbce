# The documentation of the public names, by Doxygen: target `docs`, and a test that fails where a public name has no
# comment. In script mode it runs Doxygen, since that does not fail where its filter does.
if(CMAKE_SCRIPT_MODE_FILE)
  execute_process(COMMAND ${DOXYGEN} ${DOXYFILE} RESULT_VARIABLE _result OUTPUT_VARIABLE _said ERROR_VARIABLE _said)
  if(NOT _result EQUAL 0 OR NOT _said STREQUAL "")
    message(FATAL_ERROR "Doxygen finds public names without a comment, or comments it cannot read:\n${_said}")
  endif()
  file(STRINGS ${FOLDER}/html/classfastv_1_1Pruner.html _found REGEX "True once, after the layer at which to prune")
  if(NOT _found)
    message(FATAL_ERROR "${FOLDER}/html lacks the comment of Pruner::due()")
  endif()
  message(STATUS "${FOLDER}/html/index.html")
  return()
endif()

find_program(DOXYGEN doxygen)
set(_docs_folder ${CMAKE_BINARY_DIR}/docs)
configure_file(${PROJECT_SOURCE_DIR}/cmake/Doxyfile.in ${CMAKE_BINARY_DIR}/Doxyfile @ONLY)
set(_command ${CMAKE_COMMAND} -DDOXYGEN=${DOXYGEN} -DDOXYFILE=${CMAKE_BINARY_DIR}/Doxyfile -DFOLDER=${_docs_folder}
             -P ${PROJECT_SOURCE_DIR}/cmake/docs.cmake)
if(DOXYGEN)
  add_custom_target(docs COMMAND ${_command} VERBATIM)
  add_test(NAME docs COMMAND ${_command})
else()
  add_custom_target(docs COMMAND ${CMAKE_COMMAND} -E echo "Install doxygen first, then configure again." VERBATIM
                    COMMAND ${CMAKE_COMMAND} -E false)
  add_test(NAME docs COMMAND ${CMAKE_COMMAND} -E echo "NOT TESTED HERE: install doxygen")
  set_tests_properties(docs PROPERTIES SKIP_REGULAR_EXPRESSION "NOT TESTED HERE")
endif()
