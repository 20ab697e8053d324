// An NVIDIA GPU: one stream of work, memory from a pool, and the kernels of gpu.hpp.
#ifndef HYBRIDATTN_BACKEND_CUDA_CUDA_CUH
#define HYBRIDATTN_BACKEND_CUDA_CUDA_CUH

#include <hybridattn/backend/gpu/convert.hpp>
#include <hybridattn/backend/gpu/gemm.hpp>
#include <hybridattn/core/type_name.hpp>

#include <cuda_runtime.h>

#if HYBRIDATTN_CUBLAS
#include <hybridattn/backend/cuda/cublas.cuh>
#endif

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Who computes matrix products. The library's own keep every bitwise law. cuBLAS is faster, and chooses its kernel by the number of rows:
// a row's bits then depend on the rest of the batch. It needs the CMake target hybridattn::cuda_cublas.
enum class Products { own, cublas };

struct CudaOptions {
  int device = 0;
  Products products = Products::own;
  bool wait_after_each_kernel = false;   // an error then names the kernel that made it, instead of the last kernels
};

namespace cuda {

template <class K> constexpr std::size_t shared_bytes = std::is_empty_v<typename K::Shared> ? 0 : sizeof(typename K::Shared);

// The library's only __global__ function, and its only extern __shared__ memory: two of different types would clash. Its name tells the
// compiler's reports how many threads and how much shared memory a block has.
template <class K, int threads, std::size_t shared_bytes> __global__ void __launch_bounds__(threads, 1)
    run(__grid_constant__ typename K::Params const params) {
  extern __shared__ __align__(128) unsigned char shared[];
  K::run(*reinterpret_cast<typename K::Shared*>(shared), params);
}

template <class K> inline constexpr auto* entry_of = run<K, K::threads, shared_bytes<K>>;

// A kernel that every program with a Cuda has.
struct Probe {
  HYBRIDATTN_HD void operator()(Index) const {}
};

// The last kernels that were started since the host last waited.
class Started {
 public:
  void add(std::string (*kernel)()) { kernels_[count_++ % kernels_.size()] = kernel; }
  void clear() { count_ = 0; }
  std::string names() const {
    std::string text = count_ == 0 ? "no kernel was started since the last wait" : "the last kernels, the latest first:";
    for (std::size_t i = 0; i < std::min(count_, kernels_.size()); ++i) text += " " + kernels_[(count_ - 1 - i) % kernels_.size()]();
    return text;
  }

 private:
  std::array<std::string (*)(), 8> kernels_ = {};
  std::size_t count_ = 0;
};

}  // namespace cuda

class Cuda {
 public:
  static constexpr std::string_view name = "Cuda";

  // Throws Error where there is no device of this number, where its driver is too old, where the program has no code for its
  // architecture, and where the products need a library that the program does not link.
  explicit Cuda(CudaOptions options = {}) : options_(options) {
    check_device(options);
    select();
    succeed(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
#if HYBRIDATTN_CUBLAS
    if (options.products == Products::cublas) cublas_ = std::make_unique<cuda::Cublas>(stream_);
#endif
  }
  Cuda(Cuda const&) = delete;
  Cuda& operator=(Cuda const&) = delete;
  ~Cuda() {
    cudaSetDevice(options_.device);
    cudaStreamSynchronize(stream_);
    pool_.trim(release);
#if HYBRIDATTN_CUBLAS
    cublas_.reset();
#endif
    cudaStreamDestroy(stream_);
  }
  // Whether a Cuda of these options can be made here.
  static bool available(CudaOptions options = {}) { return why_not(options).empty(); }
  // Why not, or nothing.
  static std::string why_not(CudaOptions options = {}) {
    try {
      check_device(options);
      return {};
    } catch (Error const& error) {
      return error.what();
    }
  }

  void* take(std::size_t bytes) {
    return pool_.take(bytes, [this](std::size_t n) { return allocate(n); }, release, device_memory());
  }
  void give(void* block, std::size_t bytes) noexcept { pool_.give(block, bytes); }   // the stream orders who uses it next
  void trim() noexcept {
    cudaStreamSynchronize(stream_);
    pool_.trim(release);
  }
  // Waits for the copy: the host may change its bytes at once.
  void upload(void* to, void const* from, std::size_t bytes) {
    succeed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "an upload");
    synchronise();
  }
  void download(void* to, void const* from, std::size_t bytes) {
    succeed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "a download");
    synchronise();
  }
  void copy(void* to, void const* from, std::size_t bytes) {
    succeed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "a copy");
  }
  void fill(void* to, std::byte value, std::size_t bytes) {
    succeed(cudaMemsetAsync(to, std::to_integer<int>(value), bytes, stream_), "a fill");
  }
  void synchronise() {
    succeed(cudaStreamSynchronize(stream_), "waiting");
    started_.clear();
  }
  bool owns(void const* memory) const {
    cudaPointerAttributes attributes;
    bool const known = cudaPointerGetAttributes(&attributes, memory) == cudaSuccess;
    return known && attributes.type == cudaMemoryTypeDevice && attributes.device == options_.device;
  }
  Pool& pool() { return pool_; }
  CudaOptions const& options() const { return options_; }
  // "NVIDIA H100 PCIe".
  std::string device_name() const {
    cudaDeviceProp properties;
    succeed(cudaGetDeviceProperties(&properties, options_.device), "reading the properties of a device");
    return properties.name;
  }
  // All memory of the device, in bytes.
  static std::size_t device_memory() {
    std::size_t free = 0, all = 0;
    return cudaMemGetInfo(&free, &all) == cudaSuccess ? all : 0;
  }
  cudaStream_t stream() const { return stream_; }

  // Starts a kernel behind all earlier work.
  template <class K> void start(Grid grid, typename K::Params const& params) {
    constexpr std::size_t shared = cuda::shared_bytes<K>;
    if constexpr (shared > 48 * 1024) {
      cudaError_t const allowed =
          cudaFuncSetAttribute(cuda::entry_of<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      check(allowed == cudaSuccess, "CUDA: kernel ", type_name<K>(), " needs ", shared,
            " bytes of shared memory: ", cudaGetErrorString(allowed));
    }
    started_.add(type_name<K>);
    auto const narrow = [](Index n) { return static_cast<unsigned>(n); };
    cuda::run<K, K::threads, shared><<<dim3(narrow(grid.x), narrow(grid.y), narrow(grid.z)), K::threads, shared, stream_>>>(params);
    succeed(cudaGetLastError(), "starting a kernel");
    if (options_.wait_after_each_kernel) synchronise();
  }
#if HYBRIDATTN_CUBLAS
  // Whether cuBLAS computes this product.
  template <class T> bool multiply(gpu::Product<T> const& product) { return cublas_ != nullptr && cublas_->multiply(product); }
#endif

 private:
  static void check_device(CudaOptions const& options) {
    int driver = 0, runtime = 0, devices = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    auto const version = [](int number) { return sentence(number / 1000, ".", number % 1000 / 10); };
    check(driver != 0, "Cuda: no NVIDIA driver is installed. This program needs one for CUDA ", version(runtime),
          "; the backends Cpu and Emulator need none");
    cudaError_t const counted = cudaGetDeviceCount(&devices);
    check(counted != cudaErrorInsufficientDriver, "Cuda: the driver is for CUDA ", version(driver), ", the program needs CUDA ",
          version(runtime), " or later");
    check(counted == cudaSuccess && devices > 0, "Cuda: no GPU was found (", cudaGetErrorString(counted),
          "); the backends Cpu and Emulator need none");
    check(0 <= options.device && options.device < devices, "Cuda: device ", options.device, "; allowed: 0 .. ", devices - 1);
    cudaDeviceProp properties;
    succeed_with(cudaGetDeviceProperties(&properties, options.device), "reading the properties of a device", {});
    cudaFuncAttributes attributes;
    int current = 0;
    cudaGetDevice(&current);
    cudaSetDevice(options.device);
    cudaError_t const has_code = cudaFuncGetAttributes(&attributes, cuda::entry_of<gpu::ForEach<cuda::Probe>>);
    cudaSetDevice(current);
    cudaGetLastError();
    check(has_code == cudaSuccess, "Cuda: the program has no code for device ", options.device, ", ", properties.name,
          " of architecture sm_", properties.major, properties.minor, "; compile it with nvcc -arch=sm_", properties.major,
          properties.minor);
    check(HYBRIDATTN_CUBLAS || options.products == Products::own, "Cuda: Products::cublas needs the CMake target hybridattn::cuda_cublas");
  }
  void select() { succeed(cudaSetDevice(options_.device), "selecting a device"); }
  void* allocate(std::size_t bytes) {
    void* block = nullptr;
    cudaError_t const status = cudaMalloc(&block, bytes);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    succeed(status, "taking memory");
    return block;
  }
  static void release(void* block, std::size_t) noexcept { cudaFree(block); }   // cudaFree waits for the device
  void succeed(cudaError_t status, char const* what) const { succeed_with(status, what, started_); }
  static void succeed_with(cudaError_t status, char const* what, cuda::Started const& started) {
    if (status != cudaSuccess) fail("CUDA: ", what, ": ", cudaGetErrorString(status), "; ", started.names());
  }

  CudaOptions options_;
  Pool pool_;
  cudaStream_t stream_ = nullptr;
  cuda::Started started_;
#if HYBRIDATTN_CUBLAS
  std::unique_ptr<cuda::Cublas> cublas_;   // of Products::cublas
#endif
};
static_assert(GpuBackend<Cuda>);

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
