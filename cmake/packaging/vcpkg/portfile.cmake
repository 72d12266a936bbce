# An overlay port, which takes the checkout it lies in:
#   vcpkg install fastv --overlay-ports=fastv/cmake/packaging/vcpkg
get_filename_component(SOURCE_PATH "${CURRENT_PORT_DIR}/../../.." ABSOLUTE)
set(VCPKG_BUILD_TYPE release)  # header-only
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS -DFASTV_BUILD_TESTS=OFF -DFASTV_BUILD_EXAMPLES=OFF -DFASTV_BUILD_BENCHMARKS=OFF -DFASTV_INSTALL=ON)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH share/cmake/fastv)
vcpkg_fixup_pkgconfig()
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
