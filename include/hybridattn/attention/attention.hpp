// All policies of the library.
#ifndef HYBRIDATTN_ATTENTION_ATTENTION_HPP
#define HYBRIDATTN_ATTENTION_ATTENTION_HPP

#include <hybridattn/attention/dsa/dsa.hpp>
#include <hybridattn/attention/full/full.hpp>
#include <hybridattn/attention/gdn/gdn.hpp>

#endif
