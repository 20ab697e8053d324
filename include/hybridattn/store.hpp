// The door to models in files, for programs that do not train: parameters of checkpoints, released models. Needs nlohmann-json.
#ifndef HYBRIDATTN_STORE_HPP
#define HYBRIDATTN_STORE_HPP

#include <hybridattn/store/checkpoint.hpp>
#include <hybridattn/store/hugging_face.hpp>

#endif
