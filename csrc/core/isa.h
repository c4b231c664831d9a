// The instruction set that the kernels use.
//
// Kernels are compiled once per set: the files <name>_<set>.cpp include their body under the set's target pragma, and each
// defines the table of its functions in the set's own namespace.
#pragma once

#include <string>

namespace compressm {

enum class Isa { portable, avx2, avx512 };

// The widest that the processor supports, unless another was selected.
Isa isa();

// "portable", "avx2" or "avx512".
std::string isa_name();

// Selects one by its name, or "auto"; false if the processor lacks it (nothing changes then).
bool select_isa(const std::string& name);

// Declares the tables `name` of every set, and name() in this namespace, which is the one in use.
#if defined(__x86_64__)
#define COMPRESSM_KERNELS(Type, name)                                                                          \
  namespace avx512 {                                                                                           \
  extern const Type name;                                                                                      \
  }                                                                                                            \
  namespace avx2 {                                                                                             \
  extern const Type name;                                                                                      \
  }                                                                                                            \
  namespace portable {                                                                                         \
  extern const Type name;                                                                                      \
  }                                                                                                            \
  inline const Type& name() {                                                                                  \
    const Isa set = isa();                                                                                     \
    return set == Isa::avx512 ? avx512::name : set == Isa::avx2 ? avx2::name : portable::name;                 \
  }
#else
#define COMPRESSM_KERNELS(Type, name) \
  namespace portable {                \
  extern const Type name;             \
  }                                   \
  inline const Type& name() { return portable::name; }
#endif

}  // namespace compressm
