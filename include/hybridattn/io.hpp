// The door to files: texts, tensors, and whole models. Needs nlohmann-json.
#ifndef HYBRIDATTN_IO_HPP
#define HYBRIDATTN_IO_HPP

#include <hybridattn/io/atomic_file.hpp>
#include <hybridattn/io/safetensors.hpp>
#include <hybridattn/io/text.hpp>
#include <hybridattn/store.hpp>
#include <hybridattn/train/checkpoint.hpp>

#endif
