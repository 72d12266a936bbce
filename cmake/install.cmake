# fastv::fastv for find_package(fastv), the same spelling as add_subdirectory gives, and fastv.pc for pkg-config. Neither
# knows where it was installed to: the prefix may be moved.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(_package_dir ${CMAKE_INSTALL_DATADIR}/cmake/fastv)
install(DIRECTORY include/fastv DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS fastv EXPORT fastv)
install(EXPORT fastv NAMESPACE fastv:: FILE fastv-targets.cmake DESTINATION ${_package_dir})
configure_package_config_file(cmake/fastv-config.cmake.in fastv-config.cmake INSTALL_DESTINATION ${_package_dir})
write_basic_package_version_file(fastv-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fastv-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/fastv-config-version.cmake
              cmake/fastv-components.cmake
        DESTINATION ${_package_dir})

file(RELATIVE_PATH _pc_to_prefix /${CMAKE_INSTALL_DATADIR}/pkgconfig /)
configure_file(cmake/fastv.pc.in fastv.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fastv.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
