// Which of the kernels that are compiled once per instruction set this processor runs.
#pragma once

#include <cstdlib>
#include <cstring>

#ifdef FG_X86
#define FG_PER_ISA(declaration) \
  namespace baseline {          \
  declaration                   \
  }                             \
  namespace avx2 {              \
  declaration                   \
  }                             \
  namespace avx512 {            \
  declaration                   \
  }
#else
#define FG_PER_ISA(declaration) \
  namespace baseline {          \
  declaration                   \
  }
#endif

namespace fg3dgs {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// Static, like every plain function that files compiled for several sets include: the linker would otherwise keep one
// copy of it, perhaps one that this processor cannot run.

static inline Isa best_isa() {
#ifdef FG_X86
  const char* cap = std::getenv("FG3DGS_ISA");  // tests run the narrower kernels on wide machines
  const bool no512 = cap && std::strcmp(cap, "avx512") != 0, no2 = no512 && std::strcmp(cap, "avx2") != 0;
  if (!no512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return Isa::kAvx512;
  if (!no2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// The best of an array of kernels declared by FG_PER_ISA, looked up once.
#ifdef FG_X86
#define FG_BEST(kernels)                                                     \
  (best_isa() == Isa::kAvx512 ? avx512::kernels : best_isa() == Isa::kAvx2 ? avx2::kernels : baseline::kernels)
#else
#define FG_BEST(kernels) (baseline::kernels)
#endif

}  // namespace fg3dgs
