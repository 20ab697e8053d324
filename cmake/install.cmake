# What `cmake --install` puts below a prefix: headers, licence, the package for find_package, the file for pkg-config.
# All of it is text that works with any compiler.
include(CMakePackageConfigHelpers)

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/hybridattn)
install(TARGETS hybridattn EXPORT hybridattnTargets)
install(EXPORT hybridattnTargets NAMESPACE hybridattn:: DESTINATION ${package_dir})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/hybridattnConfig.cmake.in hybridattnConfig.cmake INSTALL_DESTINATION ${package_dir}
  NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(hybridattnConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/hybridattnConfig.cmake ${PROJECT_BINARY_DIR}/hybridattnConfigVersion.cmake DESTINATION ${package_dir})

# Where the prefix is follows from where the .pc lies, so that the installed tree may move.
file(RELATIVE_PATH prefix_from_pc /${CMAKE_INSTALL_DATADIR}/pkgconfig /)
set(pc_hana)
if(NOT HYBRIDATTN_HANA_DIR IN_LIST CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES)
  set(pc_hana "-isystem ${HYBRIDATTN_HANA_DIR}")
endif()
configure_file(${CMAKE_CURRENT_LIST_DIR}/hybridattn.pc.in hybridattn.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/hybridattn.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
