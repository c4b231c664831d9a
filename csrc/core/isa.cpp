#include "core/torch.h"
#include "core/isa.h"

#include <atomic>
#include <optional>

namespace compressm {
namespace {

std::optional<Isa> find(const std::string& name) {
  const bool any = name == "auto";
#if defined(__x86_64__)
  if ((any || name == "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if ((any || name == "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return any || name == "portable" ? std::optional(Isa::portable) : std::nullopt;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> set{*find("auto")};
  return set;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

std::string isa_name() {
  const Isa set = isa();
  return set == Isa::avx512 ? "avx512" : set == Isa::avx2 ? "avx2" : "portable";
}

bool select_isa(const std::string& name) {
  const std::optional<Isa> set = find(name);
  if (set) chosen().store(*set);
  return set.has_value();
}

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("isa() -> str", &isa_name);
  m.def("select_isa(str name) -> bool", &select_isa);
}

}  // namespace compressm
