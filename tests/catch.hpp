// Includes Catch2, which is version 2 on Debian 12 and version 3 elsewhere.
#ifndef HYBRIDATTN_TESTS_CATCH_HPP
#define HYBRIDATTN_TESTS_CATCH_HPP

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#endif
