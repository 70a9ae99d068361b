#define FG_ISA avx512
#include "mlp_kernels.h"
