// The door to the laws: for the policies and operations of the library and for yours, on any backend. It needs no test framework.
#ifndef HYBRIDATTN_TESTING_HPP
#define HYBRIDATTN_TESTING_HPP

#include <hybridattn/testing/fake.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>
#include <hybridattn/testing/policies.hpp>

#endif
