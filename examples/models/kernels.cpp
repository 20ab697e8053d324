// The models of train and generate in float.
#include "kernels.hpp"

namespace models {

template struct KernelsOf<Trained, float>;
template struct KernelsOf<Released, float>;

std::unique_ptr<NewModel> new_model(std::string const& pattern, Sizes sizes, std::string const& dtype) {
  return with_dtype(dtype, [&]<class T>(T) { return new_model_in<T>(pattern, sizes); });
}

}  // namespace models
