// Chooses the scan kernels for the processor at hand, once.
#include "diagonal_scan.h"

#include <atomic>
#include <string>

namespace compressm {

#if defined(__x86_64__)
namespace avx512 {
extern const ScanKernels kernels;
}
namespace avx2 {
extern const ScanKernels kernels;
}
#endif
namespace portable {
extern const ScanKernels kernels;
}

namespace {

const ScanKernels* find(const std::string& name) {
  const bool any = name == "auto";
#if defined(__x86_64__)
  if ((any || name == "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return &avx512::kernels;
  }
  if ((any || name == "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kernels;
#endif
  return any || name == "portable" ? &portable::kernels : nullptr;
}

std::atomic<const ScanKernels*> chosen{nullptr};

}  // namespace

const ScanKernels& scan_kernels() {
  const ScanKernels* kernels = chosen.load();
  if (kernels == nullptr) {
    kernels = find("auto");
    chosen.store(kernels);
  }
  return *kernels;
}

bool select_scan_kernels(const std::string& name) {
  const ScanKernels* kernels = find(name);
  if (kernels != nullptr) chosen.store(kernels);
  return kernels != nullptr;
}

}  // namespace compressm
