# What `cmake --install` puts below a prefix: headers, licence, the package for find_package, the file for pkg-config.
# All of it is text that works with any compiler.
include(CMakePackageConfigHelpers)

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.hpp")
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/hybridattn)
install(TARGETS hybridattn EXPORT hybridattnTargets)
install(EXPORT hybridattnTargets NAMESPACE hybridattn:: DESTINATION ${package_dir})
write_basic_package_version_file(hybridattnConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
file(WRITE ${PROJECT_BINARY_DIR}/hybridattnConfig.cmake [=[
include(${CMAKE_CURRENT_LIST_DIR}/hybridattnTargets.cmake)
find_path(HYBRIDATTN_HANA_DIR boost/hana/tuple.hpp DOC "Where Boost.Hana's headers are (Debian: libboost-dev)")
if(HYBRIDATTN_HANA_DIR)
  target_include_directories(hybridattn::hybridattn SYSTEM INTERFACE ${HYBRIDATTN_HANA_DIR})
else()
  set(hybridattn_FOUND FALSE)
  set(hybridattn_NOT_FOUND_MESSAGE "hybridattn needs Boost.Hana's headers: set HYBRIDATTN_HANA_DIR to the folder that has boost/hana/tuple.hpp")
endif()
find_package(OpenMP QUIET COMPONENTS CXX)
if(OpenMP_CXX_FOUND)
  target_link_libraries(hybridattn::hybridattn INTERFACE OpenMP::OpenMP_CXX)
endif()
]=])
install(FILES ${PROJECT_BINARY_DIR}/hybridattnConfig.cmake ${PROJECT_BINARY_DIR}/hybridattnConfigVersion.cmake DESTINATION ${package_dir})

# Where the prefix is follows from where the .pc lies, so that the installed tree may move.
file(RELATIVE_PATH prefix_from_pc /${CMAKE_INSTALL_DATADIR}/pkgconfig /)
set(pc_hana)
if(NOT HYBRIDATTN_HANA_DIR IN_LIST CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES)
  set(pc_hana "-isystem ${HYBRIDATTN_HANA_DIR}")
endif()
set(pc_openmp)
if(OpenMP_CXX_FOUND)
  set(pc_openmp -fopenmp)
endif()
file(CONFIGURE OUTPUT hybridattn.pc @ONLY CONTENT [[
prefix=${pcfiledir}/@prefix_from_pc@
includedir=${prefix}/@CMAKE_INSTALL_INCLUDEDIR@

Name: hybridattn
Description: @PROJECT_DESCRIPTION@
Version: @PROJECT_VERSION@
Cflags: -I${includedir} @pc_hana@ @pc_openmp@
Libs: @pc_openmp@
]])
install(FILES ${PROJECT_BINARY_DIR}/hybridattn.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
