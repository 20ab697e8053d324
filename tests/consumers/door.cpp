// A small program, for a way into the library that hands the same headers to the compiler as another one does.
#include <hybridattn/hybridattn.hpp>

#include <cstdio>
#include <vector>

namespace ha = hybridattn;

int main() {
  ha::Cpu cpu{2};
  ha::Tensor<float, 1, ha::Cpu> x{cpu, {3}};
  upload(cpu, std::vector<float>{1, 2, 3}, x);
  auto const same = download(cpu, x);
  std::printf("%zu numbers\n", same.size());
  return same == std::vector<float>{1, 2, 3} ? 0 : 1;
}
