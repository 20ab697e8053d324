// The families that the library knows.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_FAMILIES_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_FAMILIES_HPP

#include <hybridattn/store/hugging_face/qwen3_5.hpp>
#include <hybridattn/store/hugging_face/qwen3_next.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

inline constexpr Family const* families[] = {&qwen3_next, &qwen3_5_text};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
