// Matrix products by cuBLAS. The CMake target hybridattn::cuda_cublas defines HYBRIDATTN_CUBLAS and links the library.
#ifndef HYBRIDATTN_BACKEND_CUDA_CUBLAS_CUH
#define HYBRIDATTN_BACKEND_CUDA_CUBLAS_CUH

#include <hybridattn/backend/gpu/product.hpp>

#include <cublas_v2.h>

namespace hybridattn::inline HYBRIDATTN_ABI::cuda {

class Cublas {
 public:
  explicit Cublas(cudaStream_t stream) {
    succeed(cublasCreate(&handle_), "starting");
    succeed(cublasSetStream(handle_, stream), "starting");
    succeed(cublasSetMathMode(handle_, CUBLAS_PEDANTIC_MATH), "starting");   // exact float
  }
  Cublas(Cublas const&) = delete;
  Cublas& operator=(Cublas const&) = delete;
  ~Cublas() { cublasDestroy(handle_); }

  // Whether cuBLAS computes it: its sizes are 32-bit numbers, and a product without depth is none.
  template <class T> bool multiply(gpu::Product<T> const& product) {
    auto const p = gpu::column_major(product);
    Index const sizes[] = {p.m, p.n, p.k, p.first.step, p.second.step, p.c_step};
    for (Index size : sizes)
      if (size <= 0 || size > largest_int32) return false;
    auto const narrow = [](Index size) { return static_cast<int>(size); };
    auto const operation = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
    T const one = 1;
    auto const compute = [&](auto gemm) {
      return gemm(handle_, operation(p.first.transposed), operation(p.second.transposed), narrow(p.m), narrow(p.n), narrow(p.k), &one,
                  p.first.data, narrow(p.first.step), p.second.data, narrow(p.second.step), &p.old, p.c, narrow(p.c_step));
    };
    if constexpr (std::is_same_v<T, float>) succeed(compute(cublasSgemm), "a product");
    else succeed(compute(cublasDgemm), "a product");
    return true;
  }

 private:
  static void succeed(cublasStatus_t status, char const* what) {
    check(status == CUBLAS_STATUS_SUCCESS, "cuBLAS: ", what, ": ", cublasGetStatusString(status));
  }
  cublasHandle_t handle_ = nullptr;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cuda
#endif
