// The models of train and generate in bf16.
#include "kernels.hpp"

namespace models {

template struct KernelsOf<Trained, ha::bf16>;
template struct KernelsOf<Released, ha::bf16>;
template std::unique_ptr<NewModel> new_model_in<ha::bf16>(std::string const& pattern, Sizes sizes);

}  // namespace models
